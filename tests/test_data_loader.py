import re
import zlib

import pytest
import torch
from conftest import cache_folder
from PIL import Image

from data_loader import Loader
from datasets.labels import Labels
from datasets.sources import Source, find_source
from errors import UserError
from training.checkpoint import Checkpoint
from training.resuming import warn_of_trained_holdout


def test_a_batch_is_a_function_of_seed_and_position_and_an_epoch_has_no_image_twice(toy):
    in_order, at_random = toy(), toy()
    batches = [in_order.batch(position)[0] for position in range(6)]
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    epochs = [torch.cat(batches[first : first + 2]) for first in (0, 2, 4)]
    assert all(len({image.numpy().tobytes() for image in epoch}) == 8 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    for position in (5, 0, 3):
        assert torch.equal(at_random.batch(position)[0], batches[position])
        assert torch.equal(at_random.batch(position, slice(1, 3))[0], batches[position][1:3])
    assert not torch.equal(toy(seed=1).batch(5)[0], batches[5])
    assert in_order._order.tolist() == [8, 2, 1, 0, 5, 6, 7, 4, 3, 9]  # of epoch 2, as in later versions


def test_the_cache_is_built_by_open_and_by_nothing_else_and_without_a_warning(tmp_path, recwarn):
    loader = Loader(find_source("toy", toy_num=10), 32, 4, cache_path=tmp_path / "cache", num_workers=0)
    assert len(loader.images) == len(loader.skipped) == len(loader) == 0
    assert not (tmp_path / "cache").exists()
    torch.set_warn_always(True)  # torch says once in a process that an array is read-only
    assert loader.open() is loader and not recwarn
    torch.set_warn_always(False)


def test_hflip_flips_about_half_of_the_images_reproducibly(toy):
    plain, flipped = ([batch for position in range(20) for batch in toy(hflip=hflip).batch(position)[0]]
                      for hflip in (False, True))  # fmt: skip
    assert all(torch.equal(other, image) or torch.equal(other, image.flip(2))
               for image, other in zip(plain, flipped, strict=True))  # fmt: skip
    assert 32 < sum(not torch.equal(*pair) for pair in zip(plain, flipped, strict=True)) < 48
    assert torch.equal(toy(hflip=True).batch(7)[0], torch.stack(flipped[28:32]))


@pytest.fixture
def numbered(tmp_path):
    """A function that opens a loader of gray images, whose levels are the numbers in their items."""

    def open_it(items, unreadable=(), labels=None, **options):
        def decode(item, size):
            if item in unreadable:
                raise OSError("damaged")
            return Image.new("RGB", (size, size), (int(re.sub(r"\D", "", str(item))),) * 3)

        source = Source("folder", items, decode, f"{zlib.crc32(repr((items, unreadable)).encode())}", "", labels)
        return Loader(source, 8, 2, **(dict(cache_path=str(tmp_path / "cache"), num_workers=0) | options)).open()

    return open_it


@pytest.fixture
def labelled(numbered):
    """A function that opens a loader of such images in two classes."""
    labels = Labels(["dark", "light"], torch.tensor([0] * 5 + [1] * 3))
    return lambda *unreadable, conditional=True, **options: numbered(
        range(0, 160, 20), unreadable, lambda: labels, conditional=conditional, **options
    )


def gray_levels(images):
    return [round((image.mean().item() + 1) * 127.5) for image in images]


def test_labels_stay_with_their_images(labelled):
    loader = labelled(hflip=True, seed=3)
    assert loader.classes == ("dark", "light") and loader.labels.tolist() == [0] * 5 + [1] * 3
    for position in range(12):
        images, labels = loader.batch(position)
        assert labels.tolist() == [level // 20 >= 5 for level in gray_levels(images)]
        shards = [loader.batch(position, slice(rank, rank + 1))[1] for rank in range(2)]
        assert torch.equal(torch.cat(shards), labels)
    assert gray_levels(loader.images_of_class(1, 2)) == [100, 120]
    assert gray_levels(loader.images_of_class(1, 9)) == [100, 120, 140]


def test_one_cache_serves_with_and_without_labels_and_skipped_images_have_none(labelled, tmp_path):
    plain, loader = labelled(60, conditional=False), labelled(60)
    assert cache_folder(tmp_path)  # the only one
    assert len(plain.labels) == 0 and loader.labels.tolist() == [0] * 4 + [1] * 3
    assert gray_levels(loader.images_of_class(1, 9)) == [100, 120, 140]
    assert len(loader.skipped) == 1 and plain.skipped == loader.skipped
    assert loader.fingerprint == labelled(60).fingerprint != plain.fingerprint


def test_held_out_images_are_in_no_batch_and_the_others_in_all_epochs(labelled):
    loader = labelled(holdout=0.25, hflip=True, seed=8)
    assert (len(loader), len(loader.images), loader.fingerprint["training_images"]) == (3, 8, 6)
    held_out, labels = loader.held_out(0, 2)
    assert gray_levels(held_out) == gray_levels(loader.held_out(1, 2)[0])
    assert labels.tolist() == [level // 20 >= 5 for level in gray_levels(held_out)]
    assert len(loader.held_out(0, 9)[0]) == 2 and gray_levels(loader.held_out(1, 1)[0]) == gray_levels(held_out)[1:]
    for epoch in range(2):
        images = torch.cat([loader.batch(3 * epoch + index)[0] for index in range(3)])
        assert sorted(gray_levels(images)) == sorted({*range(0, 160, 20)} - {*gray_levels(held_out)})
    assert sorted(loader.training_labels.tolist() + labels.tolist()) == loader.labels.tolist()
    of_classes = [level for label in (0, 1) for level in gray_levels(loader.images_of_class(label, 9))]
    assert of_classes == sorted({*range(0, 160, 20)} - {*gray_levels(held_out)})


def test_held_out_images_are_of_all_classes_in_turn_or_of_given_ones(numbered):
    targets = [number // 50 for number in range(200)]  # in the order of the images
    loader = numbered([*range(200)], labels=lambda: Labels(tuple("abcd"), targets), conditional=True, holdout=0.3)
    assert {*loader.held_out(0, 16)[1].tolist()} == {0, 1, 2, 3}
    images, labels = loader.held_out(0, 7, [3])
    assert labels.tolist() == [3] * 7 and min(gray_levels(images)) >= 150
    assert len(loader.held_out(0, 7, [4])[0]) == 0


def test_checksum_depends_on_the_images_and_their_number(numbered):
    """Of the many ones, on every second."""
    loaders = [numbered(items) for items in ([1, 2, 3], [1, 2, 4], [1, 2], [1] * 512, [1] * 511)]
    assert len({loader.fingerprint["checksum"] for loader in loaders}) == 5


def levels_held_out(loader):
    return {*gray_levels(loader.held_out(0, 300)[0])}


@pytest.mark.parametrize("name", [int, "cat/{}.png".format, b"%d".__mod__])
def test_whether_an_image_is_held_out_depends_on_its_name_and_the_seed_alone(numbered, name):
    items = [name(number) for number in range(200)]
    held_out = levels_held_out(numbered(items, holdout=0.2))
    assert 20 < len(held_out) < 60
    fewer = {*range(50), *range(53, 120)}
    assert levels_held_out(numbered([name(number) for number in fewer], holdout=0.2)) == held_out & fewer
    unreadable = sorted(held_out)[3]
    assert levels_held_out(numbered(items, (name(unreadable),), holdout=0.2)) == held_out - {unreadable}
    assert held_out < levels_held_out(numbered(items, holdout=0.4))
    assert len(held_out & levels_held_out(numbered(items, holdout=0.2, seed=1))) < 20
    assert levels_held_out(numbered([*range(40)], holdout=0.1, seed=3)) == {22, 26, 32, 33}  # as in later versions


def test_at_least_one_image_is_held_out_and_none_that_was_trained_on_before_more_were_added(numbered):
    trained = set()
    for count in (*range(3, 30), 200):
        held_out = levels_held_out(numbered([*range(count)], holdout=0.01))
        assert held_out and not held_out & trained
        trained |= {*range(count)} - held_out


def test_fewer_images_than_one_batch_are_an_error(numbered, labelled, tmp_path):
    with pytest.raises(UserError, match=r"has 10 images, .* set --batch_size to 10 or"):
        Loader(find_source("toy", toy_num=10), 32, 11, cache_path=str(tmp_path))
    with pytest.raises(UserError, match=r"has 1 images, .* set --batch_size to 1 or"):
        numbered(["1", "2"], unreadable=["2"])
    lower = r"fewer than one batch: lower --holdout \(0: none\)"
    for items, words in ((range(100), rf"leaves 1 of the 100 images, {lower} or set --batch_size to 1 or less$"),
                         (range(50, 59), f"leaves 0 of the 9 images, {lower}$")):  # fmt: skip
        with pytest.raises(UserError, match="^--holdout " + words):
            numbered([*items], holdout=0.99)
    with pytest.raises(UserError, match=r"--holdout 0\.5 leaves no training images of light: lower it"):
        labelled(holdout=0.5, seed=7)
    words = r"light has 1; add images, or remove the class\. Unreadable: 2 images, the first 100: "
    with pytest.raises(UserError, match=words):
        labelled(100, 120)


@pytest.mark.parametrize("changes, is_warning", [
    ({}, False), ({"holdout": 0.1}, False), ({"items": [*range(90)]}, False), ({"holdout": 0, "seed": 2}, False),
    ({"holdout": 0.3}, True), ({"seed": 1}, True), ({"items": [f"dog/{number}" for number in range(60)]}, True),
    ({"items": [f"dog/{number}" for number in reversed(range(60))]}, True),
])  # fmt: skip
def test_a_resumed_run_warns_of_held_out_images_that_were_trained_on(numbered, capsys, changes, is_warning):
    saved = {"items": [*range(60)], "holdout": 0.2}
    fingerprint, current = (numbered(**options).fingerprint for options in (saved, saved | changes))
    warn_of_trained_holdout(Checkpoint(1, {}, None, {"data": fingerprint}), current)
    assert capsys.readouterr().err.count("held out") == is_warning
    warn_of_trained_holdout(Checkpoint(1, {}, None, None), current)  # does not say
    assert bool(capsys.readouterr().err) == (changes.get("holdout") != 0)
