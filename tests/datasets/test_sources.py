import io
import os
import pickle
import re
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image

from data_loader import load_photo, to_model_range
from datasets.sources import find_source
from errors import UserError


def picture(width=178, height=218, seed=0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def reference_pixels(image, side, size):
    return np.asarray(T.Compose([T.CenterCrop(side), T.Resize((size, size))])(image))


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("dataset, crop_size, shape, side", [
    ("celeb", None, (178, 218), 160), ("celeb", None, (200, 161), 160), ("celeb", None, (161, 201), 160),
    ("celeb", 80, (178, 218), 80), ("folder", None, (300, 101), 101), ("folder", 160, (300, 100), 100),
])  # fmt: skip
def test_pixels_equal_those_of_the_reference_s_transforms(tmp_path, dataset, crop_size, shape, side, size):
    save(picture(*shape), tmp_path / "CelebA" / "1.png")
    source = find_source(dataset, str(tmp_path), crop_size)
    assert np.array_equal(source.decode(source.items[0], size), reference_pixels(picture(*shape), side, size))


@pytest.mark.parametrize("dataset, crop_size, shape, side", [
    ("celeb", None, (178, 218), 160), ("celeb", None, (356, 500), 320), ("celeb", 89, (356, 500), 178),
    ("folder", None, (300, 101), 101), ("folder", 80, (300, 101), 80), ("toy", None, (40, 50), 40),
    ("lsun", None, (300, 100), (100, 300)),
])  # fmt: skip
def test_a_photo_from_anywhere_is_cropped_as_the_images_of_the_dataset(tmp_path, dataset, crop_size, shape, side):
    save(picture(*shape), tmp_path / "me.png")
    photo = load_photo(str(tmp_path / "me.png"), dataset, crop_size, 64)
    assert torch.equal(photo, to_model_range(torch.tensor(reference_pixels(picture(*shape), side, 64)[None])))
    for path, problem in (("missing.png", "there is no image file"), (__file__, "cannot be read")):
        with pytest.raises(UserError, match=problem):
            load_photo(str(path), dataset, crop_size, 64)


@pytest.mark.parametrize("image_path, folder, other", [
    (".", "celeba/img_align_celeba", None), (".", "CelebA", None), (".", "img_align_celeba", None),
    ("celeba", "celeba/img_align_celeba", None), ("CelebA", "CelebA", None),
    ("CelebA", "CelebA/Img/img_align_celeba", "CelebA/Img/img_celeba"),  # the official layout, with unaligned images
    ("CelebA/Img", "CelebA/Img/img_align_celeba", "CelebA/Img/img_celeba"),
    ("img_align_celeba", "img_align_celeba/img_align_celeba", "img_align_celeba/thumbnails"),  # Kaggle's
    (".", "CelebA/img_align_celeba_png", "CelebA/img_celeba"),
    (".", "CelebA/img_align_celeba", "CelebA/img_align_celeba_png"),
])  # fmt: skip
def test_celeb_s_aligned_images_are_found_in_each_layout(tmp_path, capsys, image_path, folder, other):
    save(picture(), tmp_path / folder / "000001.png")
    if other:
        save(picture(300, 300), tmp_path / other / "000001.png")
    source = find_source("celeb", str(tmp_path / image_path))
    (item,) = source.items
    assert np.array_equal(source.decode(item, 32), reference_pixels(picture(), 160, 32))
    assert capsys.readouterr().err == ""


def test_celeb_images_of_another_size_are_a_warning_unless_the_crop_is_given(tmp_path, capsys):
    for number in range(5):
        save(picture(), tmp_path / "CelebA" / f"{number}.jpg")
    (tmp_path / "CelebA" / "0.jpg").write_text("no image")  # it is skipped when it is decoded
    assert find_source("celeb", str(tmp_path)).description.startswith("5 of CelebA's 202,599 images in ")
    for number in (4, 2):
        save(picture(300, 400), tmp_path / "CelebA" / f"{number}.jpg")
        find_source("celeb", str(tmp_path), crop_size=178)
        assert capsys.readouterr().err == ""
        find_source("celeb", str(tmp_path))
        assert f"{number}.jpg has 300x400" in capsys.readouterr().err


def test_files_that_are_no_images_are_counted_in_one_warning_except_companions_and_hidden_ones(tmp_path, capsys):
    save(picture(8, 8), tmp_path / "b" / "a.png")
    for name in ("1.HEIX", "b/2.heix", "film.mov", "nameless", "12.30 o'clock", "odd.a\nb", ".DS_Store", "labels.csv"):
        (tmp_path / name).touch()
    assert find_source("folder", str(tmp_path)).description == f"1 images in {tmp_path}"
    others = "3 without ending, 2 .heix, 1 .mov"
    assert re.fullmatch(f".* 6 files .*: {others}\n", capsys.readouterr().err)
    (tmp_path / "b" / "a.png").unlink()
    with pytest.raises(UserError, match=f"no image .*: {others}"):
        find_source("folder", str(tmp_path))
    with pytest.raises(UserError, match="is not a folder"):
        find_source("folder", "~nobody-of-this-name/pictures")


@pytest.mark.parametrize("dataset, name, download", [
    ("celeb", "CelebA", r"quota exceeded.*img_align_celeba\.zip.*celeba"),
    ("cifar10", "CIFAR10", r"quota exceeded.*cifar-10-python\.tar\.gz"),
])  # fmt: skip
def test_missing_data_and_a_failed_download_say_what_to_do(tmp_path, monkeypatch, dataset, name, download):
    with pytest.raises(UserError, match=f"no {name[:5]}.*{download.rpartition('.*')[2]}"):
        find_source(dataset, str(tmp_path))
    monkeypatch.setattr(f"torchvision.datasets.{name}", Mock(side_effect=RuntimeError("quota exceeded\nmore")))
    with pytest.raises(UserError, match=download):
        find_source(dataset, str(tmp_path), download=True)
    if dataset == "celeb":
        image = tmp_path / "celeba/img_align_celeba/1.png"
        monkeypatch.setattr("torchvision.datasets.CelebA", lambda *_, **__: save(picture(), image))
        assert find_source(dataset, str(tmp_path), download=True).items == ["1.png"]


def test_fingerprints_depend_on_the_files_and_the_crop_and_stay_the_same_in_later_versions(tmp_path):
    """They are in the names of caches."""

    def fingerprint(dataset="folder", **options):
        return find_source(dataset, str(tmp_path), **options).fingerprint

    (tmp_path / "CelebA").mkdir()
    (tmp_path / "CelebA" / "a.png").write_bytes(b"12345")
    os.utime(tmp_path / "CelebA" / "a.png", ns=(6, 6))
    found = [fingerprint(), fingerprint(crop_size=32), fingerprint("celeb")]
    assert found == ["f785f12808ca9641", "5b026ac97e65bb69", "d467ce6885d010b4"]
    os.utime(tmp_path / "CelebA" / "a.png", ns=(5, 5))
    assert fingerprint() not in found
    assert fingerprint("toy", toy_num=5, seed=1) == "f21e1e0359b4f11f"
    assert fingerprint("toy", toy_num=5, seed=2) == "1018fe642641a440"


def test_cifar10(tmp_path, monkeypatch):
    """Small files in its format, which do not have the checksums that torchvision expects."""
    folder, random = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        entry = {"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [3, 0, 9, 3]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))
    with pytest.raises(UserError, match="damaged: unpack"):
        find_source("cifar10", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    source = find_source("cifar10", str(folder))
    assert source.description == "20 images of CIFAR-10" and len(source.items) == 20
    pixels = pickle.loads((folder / "data_batch_2").read_bytes())["data"][3].reshape(3, 32, 32)
    assert np.array_equal(np.asarray(source.decode(7, 32)), pixels.transpose(1, 2, 0))
    assert source.labels() == (tuple("0123456789"), [3, 0, 9, 3] * 5)


def test_lsun(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    folder = tmp_path / "church_outdoor_train_lmdb"
    with pytest.raises(UserError, match=folder.name):
        find_source("lsun", str(tmp_path))
    with lmdb.open(str(folder), map_size=2**24) as database, database.begin(write=True) as transaction:
        for number in range(3):
            file = io.BytesIO()
            picture(90, 60, seed=number).save(file, "webp", lossless=True)
            transaction.put(str(number).encode(), file.getvalue())
    source = find_source("lsun", str(tmp_path))
    assert len(source.items) == 3 and source.description.startswith("3 images of LSUN church_outdoor_train in ")
    for decode in (source.decode, pickle.loads(pickle.dumps(source.decode))):
        assert np.array_equal(decode(source.items[1], 32), T.Resize((32, 32))(picture(90, 60, seed=1)))  # no crop

    size = (folder / "data.mdb").stat().st_size
    os.truncate(folder / "data.mdb", size // 2)
    with pytest.raises(UserError, match=f"cut off: {size // 2:,} of {size:,} bytes"):
        find_source("lsun", str(tmp_path))
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match="pip install lmdb"):
        find_source("lsun", str(tmp_path))
