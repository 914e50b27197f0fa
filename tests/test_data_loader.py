import json
import shutil

import pytest
import torch
from conftest import cache_folder
from PIL import Image

from data_loader import Loader
from datasets.sources import find_source
from errors import UserError


def test_batches_are_scaled_as_in_the_reference(toy):
    batch = toy().batch(0)
    assert batch.shape == (4, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)
    raw = toy().images
    expected = (raw.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5  # ToTensor, Normalize(0.5, 0.5)
    for image in batch:
        assert min((image - candidate).abs().max() for candidate in expected) < 1e-6


def test_an_epoch_has_no_image_twice_and_epochs_differ_in_order(toy):
    loader = toy()
    assert len(loader) == 2
    epochs = [torch.cat([loader.batch(2 * epoch), loader.batch(2 * epoch + 1)]) for epoch in range(3)]
    for epoch in epochs:
        assert len({image.numpy().tobytes() for image in epoch}) == 8
    assert not torch.equal(epochs[0], epochs[1])


def test_a_batch_is_a_function_of_seed_and_position(toy):
    in_order, at_random = toy(), toy()
    batches = [in_order.batch(position) for position in range(6)]
    for position in (5, 0, 3):
        assert torch.equal(at_random.batch(position), batches[position])
        assert torch.equal(at_random.batch(position, slice(1, 3)), batches[position][1:3])
    assert not torch.equal(toy(seed=1).batch(5), batches[5])


def test_the_cache_is_built_by_open_and_by_nothing_else(tmp_path):
    loader = Loader(find_source("toy", toy_num=10), 32, 4, cache_path=tmp_path / "cache", num_workers=0)
    assert len(loader.images) == len(loader.skipped) == len(loader) == 0
    assert not (tmp_path / "cache").exists()
    assert loader.open() is loader
    images = loader.images
    assert images.shape == (10, 32, 32, 3) and images.dtype == torch.uint8
    shutil.rmtree(tmp_path / "cache")
    assert loader.open().images is images
    assert not (tmp_path / "cache").exists()


def test_checksum_depends_on_the_images_and_their_number(tmp_path):
    def checksum(count, seed):
        source = find_source("toy", toy_num=count, seed=seed)
        return Loader(source, 8, 4, cache_path=tmp_path, num_workers=0).open().identity["checksum"]

    assert checksum(600, 0) == checksum(600, 0)
    assert len({checksum(600, 0), checksum(600, 1), checksum(601, 0), checksum(20, 0)}) == 4


def test_hflip_flips_about_half_of_the_images_reproducibly(toy):
    plain, flipped = toy(), toy(hflip=True)
    count = 0
    for position in range(20):
        for image, other in zip(plain.batch(position), flipped.batch(position), strict=True):
            assert torch.equal(other, image) or torch.equal(other, image.flip(2))
            count += not torch.equal(other, image)
    assert 20 < count < 60
    assert torch.equal(toy(hflip=True).batch(7), flipped.batch(7))


@pytest.fixture
def labelled(tmp_path):
    """A function that opens a loader of images in two class folders, each image gray in a level of its own."""
    for number in range(8):
        path = tmp_path / "images" / ("dark" if number < 5 else "light") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number,) * 3).save(path)

    def open_it(**options):
        source = find_source("folder", str(tmp_path / "images"))
        options |= dict(cache_path=str(tmp_path / "cache"), num_workers=0, conditional=True)
        return Loader(source, 8, 2, **options).open()

    return open_it


def gray_levels(images):
    return [round((image.mean().item() + 1) * 127.5) for image in images]


def test_labels_stay_with_their_images(labelled):
    loader = labelled(hflip=True, seed=3)
    assert loader.classes == ("dark", "light") and loader.labels.tolist() == [0] * 5 + [1] * 3
    for position in range(12):
        levels, labels = gray_levels(loader.batch(position)), loader.batch_labels(position)
        assert labels.tolist() == [level // 20 >= 5 for level in levels]
        shards = [loader.batch_labels(position, slice(rank, rank + 1)) for rank in range(2)]
        assert torch.equal(torch.cat(shards), labels)
    assert gray_levels(loader.images_of_class(1, 2)) == [100, 120]
    assert gray_levels(loader.images_of_class(1, 9)) == [100, 120, 140]


@pytest.mark.parametrize("cached_as", [2, 1, None])
def test_labels_of_skipped_images_are_left_out_whatever_the_cache(labelled, tmp_path, cached_as):
    """Caches have no labels: those of older versions, and those written for other labels or none, stay valid."""
    (tmp_path / "images" / "light" / "5.png").write_bytes(b"damaged")
    if cached_as:
        source = find_source("folder", str(tmp_path / "images"))
        Loader(source, 8, 2, cache_path=str(tmp_path / "cache"), num_workers=0).open()
        info = cache_folder(tmp_path) / "info.json"
        content = json.loads(info.read_text())
        if cached_as == 1:  # it had lines without the numbers of the items
            content |= {"format": 1, "skipped": [line for _, line in content["skipped"]]}
        info.write_text(json.dumps(content))
    loader = labelled()
    assert loader.labels.tolist() == [0] * 5 + [1] * 2 and len(loader.skipped) == 1
    assert gray_levels(loader.images_of_class(1, 9)) == [120, 140]
    assert len([*(tmp_path / "cache").iterdir()]) == 1


def test_other_labels_are_other_data(labelled, tmp_path):
    before = labelled().identity
    plain = Loader(find_source("folder", str(tmp_path / "images")), 8, 2, cache_path=str(tmp_path / "cache")).open()
    assert plain.identity != before and len(plain.labels) == 0
    assert labelled().identity == before


def test_held_out_images_are_in_no_batch_and_the_others_in_all_epochs(labelled):
    loader = labelled(holdout=0.25, hflip=True)
    assert len(loader) == 3 and len(loader.images) == 8  # two of eight images are held out
    held_out, labels = loader.held_out(0, 2)
    assert gray_levels(held_out) == gray_levels(loader.held_out(1, 2)[0])
    assert labels.tolist() == [level // 20 >= 5 for level in gray_levels(held_out)]
    assert len(loader.held_out(0, 9)[0]) == 2 and gray_levels(loader.held_out(1, 1)[0]) == gray_levels(held_out)[1:]
    epochs = [sorted(level for i in range(3) for level in gray_levels(loader.batch(3 * epoch + i))) for epoch in (0, 1)]
    assert epochs[0] == epochs[1] == sorted({*range(0, 160, 20)} - {*gray_levels(held_out)})
    assert sorted(loader.training_labels.tolist() + labels.tolist()) == loader.labels.tolist()
    assert gray_levels(labelled(holdout=0.25).held_out(0, 2)[0]) == gray_levels(held_out)
    others = [gray_levels(labelled(holdout=0.25, seed=seed).held_out(0, 2)[0]) for seed in range(1, 6)]
    assert any(levels != gray_levels(held_out) for levels in others)


def test_the_smallest_holdout_is_an_image_and_the_rest_must_fill_a_batch(toy, tmp_path):
    assert len(toy(holdout=0.001).held_out(0, 5)[0]) == 1
    with pytest.raises(UserError, match="5 images, fewer than one batch"):
        Loader(find_source("toy", toy_num=10), 32, 6, cache_path=str(tmp_path / "cache"), holdout=0.5).open()
