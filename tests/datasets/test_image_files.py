import errno
import os
import re
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_pictures
from PIL import Image, ImageFile

from datasets.decoding import try_decode
from datasets.image_files import UNREADABLE_FORMATS, decode_file, find_images, image_endings, register_heif, to_rgb
from errors import UserError

GRAY = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
UPRIGHT = Image.fromarray(GRAY).convert("RGB")
LYING = UPRIGHT.transpose(Image.Transpose.ROTATE_90)


def names(root, **options):
    return [name for name, _, _ in find_images(str(root), **options)[0]]


def test_images_are_found_in_subfolders_and_through_links(tmp_path):
    images, outside = tmp_path / "images", tmp_path / "outside"
    for path in make_pictures(tmp_path, ["images/a.jpg", "images/deep/er/b.PNG", "outside/c.webp"]):
        os.utime(path, ns=(5, 5))
    (images / "._a.jpg").write_bytes(b"macOS writes such files")
    os.symlink(outside, images / "linked")
    os.symlink(images, images / "cycle")
    os.symlink(images / "nowhere", images / "dangling.png")
    found = find_images(str(images))[0]
    expected = ["a.jpg", "dangling.png", os.path.join("deep", "er", "b.PNG"), os.path.join("linked", "c.webp")]
    assert [name for name, _, _ in found] == expected
    os.symlink(images / "deep", images / "also deep")  # not found first, on any system
    assert names(images) == expected
    for name, *size_and_time in found:
        assert size_and_time == ([0, 0] if "dangling" in name else [(images / name).stat().st_size, 5])


@pytest.mark.parametrize("folder", [".cache", "@eaDir", "__MACOSX", "$RECYCLE.BIN"])
def test_hidden_and_junk_folders_are_no_data_unless_given(tmp_path, folder):
    make_pictures(tmp_path, ["a.png", f"{folder}/deeper/b.png", f"cats/{folder}/c.png"])
    os.symlink(tmp_path / folder, tmp_path / "cats" / folder / "link")
    assert names(tmp_path) == ["a.png"]
    for given in (tmp_path / folder, tmp_path / "cats" / folder / "link"):
        assert names(given) == [os.path.join("deeper", "b.png")]


def test_excluded_folders_below_are_left_out_and_named_however_they_are_reached(tmp_path, capsys):
    pics = tmp_path / "pics"
    make_pictures(pics, ["cats/a.png", "samples/v1/a.png", "elsewhere/a.png"])
    (tmp_path / "out").symlink_to(pics / "elsewhere")
    exclude = [pics / "cats" / ".." / "samples", tmp_path / "out", tmp_path / "not_yet_there"]
    assert names(pics, exclude=exclude) == [os.path.join("cats", "a.png")]
    (line,) = capsys.readouterr().err.splitlines()
    assert "samples" in line and "elsewhere" in line and "cats" not in line


def test_images_among_the_run_s_results_are_an_error(tmp_path):
    samples = tmp_path / "samples"
    make_pictures(samples, ["v1/mine/a.png"])
    for images, run, option in (("v1", "v1", "--version"), ("v1/mine", "v1", "--version"), ("", "v2", "--sample_path")):
        with pytest.raises(UserError, match=option):
            find_images(str(samples / images), [samples / run], [samples])
    found = names(samples / "v1" / ".." / "v1", run_folders=[samples / "v"], exclude=[tmp_path])
    assert found == [os.path.join("mine", "a.png")]


def test_what_pillow_decodes_is_an_image():
    endings = image_endings()
    assert {".jpg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".pgm", ".jp2", ".mpo", ".tga"} <= endings
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf"} & endings
    stubs = {name for name, (factory, _) in Image.OPEN.items()
             if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)}  # fmt: skip
    assert stubs and stubs <= UNREADABLE_FORMATS  # those of later versions of Pillow too


def test_heic_is_an_image_if_pillow_heif_is_installed_also_in_a_worker_which_only_decodes(tmp_path, monkeypatch):
    opener = lambda: monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")  # noqa: E731
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=opener))
    make_pictures(tmp_path, ["a.png"])
    for prepare in (lambda: decode_file(str(tmp_path), None, "a.png", 8), image_endings):
        monkeypatch.delitem(Image.EXTENSION, ".heic", raising=False)
        for function in (register_heif, image_endings):
            function.cache_clear()
        prepare()
        assert ".heic" in Image.EXTENSION
    assert ".heic" in image_endings()
    for function in (register_heif, image_endings):
        function.cache_clear()


def test_a_subfolder_that_cannot_be_listed_is_a_warning_and_the_folder_itself_an_error(tmp_path, monkeypatch, capsys):
    make_pictures(tmp_path, ["cats/a.png", "cows/a.png", "dogs/a.png"])
    scandir, refused = os.scandir, {"cows", "dogs"}

    def refuse(path):
        if Path(path).name in refused:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert names(tmp_path) == [os.path.join("cats", "a.png")]
    assert re.search(r"[ow]s \(Permission denied\), and 1 more\n$", capsys.readouterr().err)
    refused.add(tmp_path.name)
    with pytest.raises(UserError, match="cannot be listed: Permission denied"):
        find_images(str(tmp_path))


def assert_gray(image, expected=GRAY):
    """Up to rounding."""
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - expected[..., None].astype(int)).max() <= 2


def test_every_mode_gives_the_same_gray_and_transparent_becomes_white():
    gray = Image.fromarray(GRAY)
    for mode in ("L", "RGB", "RGBA", "CMYK", "LA", "P", "YCbCr", "I"):
        assert_gray(to_rgb((gray if mode in ("LA", "P", "I") else gray.convert("RGB")).convert(mode)))
    assert set(np.unique(np.asarray(to_rgb(gray.convert("1"))))) == {0, 255}
    assert np.asarray(to_rgb(Image.new("RGBA", (4, 4), (10, 20, 30, 0)))).min() == 255


@pytest.mark.parametrize("bits, kind, ending", [
    *((bits, np.uint16, ending) for bits in (8, 12, 16) for ending in ("png", "tif")),
    *((bits, kind, "tif") for bits in (8, 12, 16, 20) for kind in (np.int32, np.float32)),
])  # fmt: skip
def test_deep_grays_are_scaled_by_the_bits_that_they_use(tmp_path, bits, kind, ending):
    Image.fromarray((GRAY / 255 * (2**bits - 1)).round().astype(kind)).save(tmp_path / f"deep.{ending}")
    assert_gray(decode_file(str(tmp_path), None, f"deep.{ending}", 64))


def test_transparent_gray_of_16_bits_is_left_as_it_is(tmp_path):
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / "a.png", transparency=256)
    assert_gray(decode_file(str(tmp_path), None, "a.png", 64))


@pytest.mark.parametrize("brightest, other", [(0.5, 0), (1, 0), (1.3, 0), (1, np.nan), (1, np.inf), (1, -1)])
def test_float_gray_in_0_to_1_has_the_same_scale_in_every_image_even_beside_values_that_are_no_gray(brightest, other):
    levels = GRAY.astype(np.float32) / 255 * brightest
    levels[0] = other
    assert_gray(to_rgb(Image.fromarray(levels)).crop((0, 1, 64, 64)), np.minimum(GRAY[1:] * brightest, 255))


def decode_rotated(path, damage=lambda exif: exif):
    """Save and decode `LYING`, whose EXIF data says that it is to be rotated by 90 degrees clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    LYING.save(path, exif=damage(exif.tobytes()), lossless=True)
    return decode_file(str(path.parent), None, path.name, 64)


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_exif_rotation_is_applied_unless_it_cannot_be_parsed(tmp_path, monkeypatch, ending):
    damaged = decode_rotated(tmp_path / "damaged.png", lambda exif: exif.replace(b"MM\0*", b"MM\0\xff"))
    assert np.array_equal(damaged, LYING)
    assert np.array_equal(decode_rotated(tmp_path / f"a.{ending}"), UPRIGHT)
    monkeypatch.setattr(Image.Exif, "tobytes", lambda *_: struct.pack(">H", "no integer"))  # Pillow's, afterwards
    assert np.array_equal(decode_file(str(tmp_path), None, f"a.{ending}", 64), UPRIGHT)


def noise(*shape):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def save_bomb(path):
    """Write a PNG whose header says 20000 x 20000, more than a gigabyte of pixels."""
    noise(8, 8).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 20000, 20000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


@pytest.mark.skipif(sys.platform != "linux", reason="needs pipes, and file names of any bytes")
@pytest.mark.parametrize("is_damaged, name, write", [
    (False, "a_png.jpg", lambda path: noise(40, 40, 3).save(path, "PNG")),
    (False, "animated.webp", lambda path: noise(9, 9, 3).save(path, save_all=True, append_images=[noise(9, 9, 3)])),
    (False, "transparent_palette.png", lambda path: noise(40, 40).convert("P").save(path, transparency=3)),
    (False, "name with \n and \udce9.png", lambda path: noise(40, 40, 3).save(path)),
    (True, "bomb.png", save_bomb),
    (True, "cut.jpg", lambda path: (noise(40, 40, 3).save(path), os.truncate(path, 400))),
    (True, "cut.jp2", lambda path: (decode_rotated(path), os.truncate(path, path.stat().st_size // 2))),
    (True, "dangling.jpg", lambda path: path.symlink_to("nowhere")),
    (True, "text named \udcff\n.png", lambda path: path.write_text("not an image")),
    (True, "pipe.png", lambda path: os.mkfifo(path)),
])  # fmt: skip
def test_an_unusual_image_is_decoded_and_a_damaged_one_is_one_line(tmp_path, name, write, is_damaged):
    write(tmp_path / name)
    assert names(tmp_path) == [name]
    result = try_decode(lambda name, size: decode_file(str(tmp_path), None, name, size), name, 16)
    if is_damaged:
        assert result.startswith(name.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n") + ": ")
        assert len(result.splitlines()) == 1
    else:
        assert (result.mode, result.size) == ("RGB", (16, 16))
