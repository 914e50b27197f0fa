import io
import os
import pickle

import numpy as np
import pytest
import torchvision.transforms as T
from PIL import Image

from datasets.sources import crop_center, find_source, resize, to_rgb
from errors import UserError


def picture(width=178, height=218, seed=0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("shape", [(178, 218), (200, 161), (161, 201)])
def test_celeb_pixels_equal_the_reference_s_transforms(tmp_path, size, shape):
    save(picture(*shape), tmp_path / "CelebA" / "img_align_celeba" / "000001.png")
    source = find_source("celeb", str(tmp_path))
    reference = T.Compose([T.CenterCrop(160), T.Resize((size, size))])
    with Image.open(tmp_path / "CelebA" / "img_align_celeba" / "000001.png") as image:
        expected = np.asarray(reference(image.convert("RGB")))
    assert np.array_equal(np.asarray(source.decode(source.items[0], size)), expected)


@pytest.mark.parametrize("folder", ["celeba/img_align_celeba", "CelebA/img_align_celeba", "CelebA", "img_align_celeba"])
def test_celeb_is_found_in_each_layout(tmp_path, folder):
    save(picture(), tmp_path / folder / "000001.jpg")
    assert len(find_source("celeb", str(tmp_path)).items) == 1


def test_missing_celeb_names_both_layouts_and_the_toy_faces(tmp_path):
    with pytest.raises(UserError) as error:
        find_source("celeb", str(tmp_path))
    for token in ("celeba/img_align_celeba", "CelebA/*/", "--dataset toy", "--image_path"):
        assert token in str(error.value)


def test_a_failed_download_names_the_file_to_download_by_hand(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("quota exceeded\nmore")

    monkeypatch.setattr("torchvision.datasets.CelebA", fail)
    with pytest.raises(UserError, match=r"quota exceeded.*img_align_celeba.zip.*celeba"):
        find_source("celeb", str(tmp_path), download=True)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
    with pytest.raises(UserError, match=r"quota exceeded.*cifar-10-python.tar.gz"):
        find_source("cifar10", str(tmp_path), download=True)


def test_folder_images_are_cropped_to_the_largest_center_square(tmp_path):
    image = Image.new("RGB", (300, 100), "red")
    image.paste((0, 0, 255), (100, 0, 200, 100))
    save(image, tmp_path / "wide.png")
    source = find_source("folder", str(tmp_path))
    assert np.array_equal(np.unique(np.asarray(source.decode("wide.png", 32)).reshape(-1, 3), axis=0), [[0, 0, 255]])


def test_crop_size_sets_the_crop_which_never_pads(tmp_path):
    assert crop_center(picture(50, 40), 20).size == (20, 20)
    assert crop_center(picture(50, 40), 160).size == (40, 40)
    save(picture(), tmp_path / "CelebA" / "a.png")
    source = find_source("celeb", str(tmp_path), crop_size=80)
    expected = resize(crop_center(picture(), 80), 32)
    assert np.array_equal(np.asarray(source.decode("a.png", 32)), np.asarray(expected))


def test_folder_finds_images_in_subfolders_and_through_links(tmp_path):
    images, outside = tmp_path / "images", tmp_path / "outside"
    for path in (images / "a.jpg", images / "deep" / "er" / "b.PNG", outside / "c.webp"):
        save(picture(40, 40), path)
    (images / "notes.txt").write_text("no image")
    (images / "._a.jpg").write_bytes(b"macOS writes such files")
    os.symlink(outside, images / "linked")
    os.symlink(images, images / "cycle")
    names = find_source("folder", str(images)).items
    assert sorted(names) == ["a.jpg", os.path.join("deep", "er", "b.PNG"), os.path.join("linked", "c.webp")]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("file")])
def test_a_folder_without_images_is_an_error(tmp_path, make):
    make(tmp_path / "images")
    with pytest.raises(UserError, match="images"):
        find_source("folder", str(tmp_path / "images"))


GRAY = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)


@pytest.mark.parametrize("image", [
    Image.fromarray(GRAY), Image.fromarray(GRAY.astype(np.uint16) * 257), Image.fromarray(GRAY.astype(np.int32) * 257),
    Image.fromarray(GRAY.astype(np.float32) / 255), Image.merge("RGB", [Image.fromarray(GRAY)] * 3),
    Image.merge("RGBA", [Image.fromarray(GRAY)] * 3 + [Image.new("L", (64, 64), 255)]),
    Image.merge("RGB", [Image.fromarray(GRAY)] * 3).convert("CMYK"), Image.merge("LA", [Image.fromarray(GRAY),
    Image.new("L", (64, 64), 255)]), Image.fromarray(GRAY).convert("P"), Image.fromarray(GRAY).convert("YCbCr"),
], ids=lambda image: image.mode)  # fmt: skip
def test_every_mode_gives_the_same_gray(image):
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert np.abs(np.asarray(rgb).astype(int) - GRAY[..., None]).max() <= 2


def test_a_16_bit_png_is_scaled_to_8_bits(tmp_path):
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    decoded = find_source("folder", str(tmp_path)).decode("deep.png", 64)
    assert np.abs(np.asarray(decoded).astype(int) - GRAY[..., None]).max() <= 2


def test_float_gray_has_the_same_scale_in_every_image():
    dark = Image.fromarray(GRAY.astype(np.float32) / 255 / 2)
    assert np.abs(np.asarray(to_rgb(dark)).astype(int) - GRAY[..., None] // 2).max() <= 2


def test_black_and_white_and_transparency():
    assert set(np.unique(np.asarray(to_rgb(Image.fromarray(GRAY).convert("1"))))) == {0, 255}
    assert np.asarray(to_rgb(Image.new("RGBA", (4, 4), (10, 20, 30, 0)))).min() == 255  # transparent becomes white


def test_exif_rotation_is_applied(tmp_path):
    upright = picture(64, 64)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "rotated.png", exif=exif)
    decoded = find_source("folder", str(tmp_path)).decode("rotated.png", 64)
    assert np.array_equal(np.asarray(decoded), np.asarray(upright))


def test_fingerprint_depends_on_the_files_and_the_crop(tmp_path):
    save(picture(), tmp_path / "a.png")
    first = find_source("folder", str(tmp_path)).fingerprint
    assert find_source("folder", str(tmp_path)).fingerprint == first
    assert find_source("folder", str(tmp_path), crop_size=32).fingerprint != first
    os.utime(tmp_path / "a.png", (1, 1))
    touched = find_source("folder", str(tmp_path)).fingerprint
    save(picture(), tmp_path / "b.png")
    assert len({first, touched, find_source("folder", str(tmp_path)).fingerprint}) == 3


def test_toy_faces_are_a_function_of_seed_and_index():
    source = find_source("toy", toy_num=5, seed=1)
    assert len(source.items) == 5
    again = find_source("toy", toy_num=5, seed=1)
    assert np.array_equal(np.asarray(source.decode(3, 64)), np.asarray(again.decode(3, 64)))
    assert find_source("toy", toy_num=5, seed=2).fingerprint != source.fingerprint


def write_cifar10(root):
    """Write small files in CIFAR-10's format; they do not have the checksums that torchvision expects."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        entry = {"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0] * 4}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))


def test_cifar10(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz"):
        find_source("cifar10", str(tmp_path))
    write_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    source = find_source("cifar10", str(tmp_path))
    assert len(source.items) == 20
    assert source.decode(7, 64).size == (64, 64)


def test_lsun(tmp_path):
    with pytest.raises(UserError, match="church_outdoor_train_lmdb"):
        find_source("lsun", str(tmp_path))
    lmdb = pytest.importorskip("lmdb")
    with (
        lmdb.open(str(tmp_path / "church_outdoor_train_lmdb"), map_size=2**24) as database,
        database.begin(write=True) as transaction,
    ):
        for number in range(3):
            file = io.BytesIO()
            picture(90, 60, seed=number).save(file, "webp", lossless=True)
            transaction.put(str(number).encode(), file.getvalue())
    source = find_source("lsun", str(tmp_path))
    assert len(source.items) == 3
    expected = T.Resize((32, 32))(picture(90, 60, seed=1))  # without a crop
    for decode in (source.decode, pickle.loads(pickle.dumps(source.decode))):
        assert np.array_equal(np.asarray(decode(source.items[1], 32)), np.asarray(expected))


def test_lsun_without_lmdb_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "church_outdoor_train_lmdb").mkdir()
    (tmp_path / "church_outdoor_train_lmdb" / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(UserError, match="pip install lmdb"):
        find_source("lsun", str(tmp_path))
