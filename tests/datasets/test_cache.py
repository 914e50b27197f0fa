import dataclasses
import errno
import json
import os
import shutil
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import cache_folder
from PIL import Image

from data_loader import Loader
from datasets import cache
from datasets.cache import open_cache
from datasets.sources import Source, find_source
from errors import UserError


def test_an_existing_cache_is_opened_without_decoding(toy, tmp_path, monkeypatch):
    first = toy().batch(0)
    monkeypatch.setattr(cache, "_build_cache", None)
    assert torch.equal(toy().batch(0), first)


def test_worker_processes_write_the_same_cache(tmp_path):
    source = find_source("toy", toy_num=600)  # three chunks
    alone, _ = open_cache(source, 32, tmp_path / "alone", num_workers=0)
    parallel, _ = open_cache(source, 32, tmp_path / "parallel", num_workers=2)
    assert np.array_equal(alone, parallel)


def test_a_cache_built_meanwhile_by_another_process_is_kept(toy, tmp_path, monkeypatch):
    decode = cache._decode
    inodes = []

    def slower(*arguments):
        monkeypatch.setattr(cache, "_decode", decode)
        toy()
        inodes.extend(path.stat().st_ino for path in (tmp_path / "cache").iterdir() if "building" not in path.name)
        return decode(*arguments)

    monkeypatch.setattr(cache, "_decode", slower)
    toy()
    assert inodes == [cache_folder(tmp_path).stat().st_ino]


def test_each_size_and_crop_has_its_own_cache(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "a.png")
    for size, crop in ((32, None), (64, None), (32, 16)):
        open_cache(find_source("folder", str(tmp_path / "images"), crop), size, tmp_path / "cache", 0)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def replace(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("damage", [
    lambda folder: os.truncate(folder / "images.bin", 100),
    lambda folder: (folder / "images.bin").unlink(),
    lambda folder: (folder / "info.json").unlink(),
    lambda folder: (folder / "info.json").write_text("{"),
    lambda folder: (folder / "info.json").write_text('{"count": "many"}'),
    lambda folder: (folder / "info.json").write_bytes(b"\xff\xfe\x00"),
    lambda folder: (folder / "info.json").write_text("[]"),
    lambda folder: (folder / "info.json").write_text("3"),
    lambda folder: replace(folder / "info.json", '"format": 2', '"format": 3'),
    lambda folder: replace(folder / "info.json", '"count": 10', '"count": 9'),
    lambda folder: replace(folder / "info.json", '"skipped": []', '"skipped": 3'),
    lambda folder: replace(folder / "info.json", '"skipped": []', '"skipped": [[99, "no such item"]]'),
    lambda folder: replace(folder / "info.json", '"skipped": []', '"skipped": [["a", "no number"]]'),
])  # fmt: skip
def test_a_damaged_cache_is_rebuilt(toy, tmp_path, damage):
    first = toy().batch(0)
    info = (cache_folder(tmp_path) / "info.json").read_bytes()
    damage(cache_folder(tmp_path))
    assert torch.equal(toy().batch(0), first)
    assert (cache_folder(tmp_path) / "info.json").read_bytes() == info


def test_a_whole_cache_of_format_1_is_used(toy, tmp_path, monkeypatch):
    first = toy().batch(0)
    replace(cache_folder(tmp_path) / "info.json", '"format": 2', '"format": 1')
    monkeypatch.setattr(cache, "_build_cache", None)
    assert torch.equal(toy().batch(0), first)


def test_a_cache_of_format_1_with_skipped_images_is_rebuilt(tmp_path):
    make_images(tmp_path / "images", good=3, bad=2)
    before, skipped = open_images(tmp_path)
    before, info = before.tobytes(), cache_folder(tmp_path) / "info.json"
    info.write_text(json.dumps({"format": 1, "count": 3, "skipped": [*skipped.values()]}))
    after, again = open_images(tmp_path)
    assert after.tobytes() == before and again == skipped
    assert json.loads(info.read_text())["format"] == 2


def test_a_killed_build_leaves_no_cache(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        toy()
    monkeypatch.undo()
    assert not list((tmp_path / "cache").iterdir())
    assert toy().batch(0).shape == (4, 3, 32, 32)


def test_stale_builds_are_removed(toy, tmp_path):
    toy()
    folder = cache_folder(tmp_path)
    for age, name in ((0, "live"), (2 * cache.STALE_SECONDS, "dead"), (2 * cache.STALE_SECONDS, "mixed")):
        leftover = folder.with_name(f"{folder.name}.building-{name}")
        leftover.mkdir()
        (leftover / "images.bin").write_bytes(b"half")
        if name == "mixed":
            (leftover / "notes.txt").write_text("the user's")
        for path in (*leftover.iterdir(), leftover):
            os.utime(path, (time.time() - age,) * 2)
    shutil.rmtree(folder)
    toy()
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {"", ".building-live", ".building-mixed"}
    assert [path.name for path in (tmp_path / "cache").glob("*mixed/*")] == ["notes.txt"]


def test_a_stale_build_that_another_process_removes_first_is_no_error(toy, tmp_path, monkeypatch):
    def vanish(path):
        path.rmdir()
        return iter([path / "images.bin"])

    toy()
    folder = cache_folder(tmp_path)
    folder.with_name(f"{folder.name}.building-dead").mkdir()
    shutil.rmtree(folder)
    monkeypatch.setattr(Path, "iterdir", vanish)
    assert len(toy().images) == 10


def test_a_damaged_cache_with_the_user_s_files_is_an_error_and_keeps_them(toy, tmp_path):
    toy()
    folder = cache_folder(tmp_path)
    (folder / "notes.txt").write_text("the user's")
    (folder / "info.json").write_text("{")
    with pytest.raises(UserError, match="--cache_path"):
        toy()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert [*(tmp_path / "cache").iterdir()] == [folder]


def make_images(folder, good, bad=0):
    folder.mkdir()
    for number in range(good):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"good{number}.png")
    for number in range(bad):
        (folder / f"bad{number}.png").write_text("not an image")


def open_images(tmp_path, workers=0):
    return open_cache(find_source("folder", str(tmp_path / "images")), 32, tmp_path / "cache", workers)


@pytest.fixture
def flaky(tmp_path):
    """A source of 10 items: `broken` cannot be read, `open` opens the cache, `tried` are those that it has decoded."""
    broken, tried = set(), []

    def decode(item, size):
        tried.append(item)
        if item in broken:
            raise OSError("no connection")
        return Image.new("RGB", (size, size), (int(item), 0, 0))

    def open_flaky():
        tried.clear()
        return open_cache(Source("flaky", [*"0123456789"], decode, "1", "10 images"), 8, tmp_path / "cache", 0)

    return SimpleNamespace(broken=broken, tried=tried, open=open_flaky)


def test_skipped_images_alone_are_tried_again_at_the_next_start(flaky, capsys):
    flaky.broken |= {"3", "5"}
    images, skipped = flaky.open()
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 4, 6, 7, 8, 9]
    again, still_skipped = flaky.open()
    assert flaky.tried == ["3", "5"]
    assert np.array_equal(again, images) and still_skipped == skipped
    assert capsys.readouterr().out == ""


def test_the_cache_is_built_again_when_a_skipped_image_can_be_read(flaky, tmp_path, capsys):
    flaky.broken |= {"3", "5"}
    flaky.open()
    flaky.broken.remove("5")
    images, skipped = flaky.open()
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert skipped == {3: "3: OSError: no connection"}
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert cache_folder(tmp_path)  # the only one
    flaky.open()
    assert flaky.tried == ["3"]


def test_a_cache_stays_if_it_cannot_be_built_again_as_well(flaky, tmp_path, monkeypatch, capsys):
    flaky.broken |= {"3"}
    before, _ = flaky.open()
    flaky.broken.clear()

    def decode(*arguments):  # more is broken by then
        flaky.broken.update({"3", "4", "5"})
        return _decode(*arguments)

    _decode = cache._decode
    monkeypatch.setattr(cache, "_decode", decode)
    images, skipped = flaky.open()
    assert np.array_equal(images, before) and skipped == {3: "3: OSError: no connection"}
    flaky.broken.clear()
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EROFS))
    images, skipped = flaky.open()
    assert np.array_equal(images, before) and skipped == {3: "3: OSError: no connection"}
    assert "Read-only file system" in capsys.readouterr().err


def refuse(number):
    def raise_error(*_, **__):
        raise OSError(number, os.strerror(number))

    return raise_error


def test_a_cache_that_can_only_be_read_is_used(toy, tmp_path, monkeypatch):
    expected = toy().batch(0)
    for name in ("mkdir", "touch", "unlink", "rmdir", "write_text"):
        monkeypatch.setattr(Path, name, refuse(errno.EROFS))
    assert torch.equal(toy().batch(0), expected)


def test_a_cache_that_cannot_be_read_is_an_error_and_stays(toy, tmp_path, monkeypatch):
    toy()
    files = {path: path.read_bytes() for path in cache_folder(tmp_path).iterdir()}
    monkeypatch.setattr(Path, "read_text", refuse(errno.EACCES))
    with pytest.raises(UserError, match=r"Permission denied.*--cache_path"):
        toy()
    assert {path: path.read_bytes() for path in cache_folder(tmp_path).iterdir()} == files


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENODEV, errno.EINVAL, errno.EACCES])
def test_a_cache_that_cannot_be_memory_mapped_is_read(toy, monkeypatch, number):
    expected = toy().batch(0)
    monkeypatch.setattr("mmap.mmap", refuse(number))
    monkeypatch.setattr(cache, "_build_cache", None)
    assert torch.equal(toy().batch(0), expected)


def test_opening_a_cache_prints_no_warning(toy, monkeypatch):
    from_numpy = torch.from_numpy

    def from_numpy_of_a_new_process(array):  # later torch does not repeat the warning
        if not array.flags.writeable:
            warnings.warn("not writable", stacklevel=1)
        return from_numpy(array)

    monkeypatch.setattr(torch, "from_numpy", from_numpy_of_a_new_process)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy()
        toy()


def test_unreadable_images_are_skipped_and_listed(tmp_path):
    make_images(tmp_path / "images", good=3)
    (tmp_path / "images" / "text.jpg").write_text("not an image")
    (tmp_path / "images" / "empty.png").touch()
    os.symlink(tmp_path / "nowhere", tmp_path / "images" / "dangling.jpg")
    content = (tmp_path / "images" / "good0.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(content[: len(content) // 2])
    loader = Loader(find_source("folder", str(tmp_path / "images")), 32, 2, cache_path=str(tmp_path / "cache"),
                        num_workers=0).open()  # fmt: skip
    assert sorted(line.split(":")[0] for line in loader.skipped) == ["cut.png", "dangling.jpg", "empty.png", "text.jpg"]
    assert len(loader.images) == 3
    again = Loader(find_source("folder", str(tmp_path / "images")), 32, 2, cache_path=str(tmp_path / "cache")).open()
    assert again.skipped == loader.skipped


def noise(*shape):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def bomb(path):
    """Write a PNG whose header says 20000 x 20000, more than a gigabyte of pixels."""
    noise(8, 8).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 20000, 20000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def broken_exif(path):
    noise(40, 40, 3).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12" + b"\xff" * 20)


GOOD = {
    "a_png.jpg": lambda path: noise(40, 40, 3).save(path, "PNG"),
    "one_pixel.png": lambda path: noise(1, 1, 3).save(path),
    "long.png": lambda path: noise(2, 900, 3).save(path),
    "animated.gif": lambda path: noise(40, 40).save(path, save_all=True, append_images=[noise(40, 40)] * 3),
    "animated.webp": lambda path: noise(40, 40, 3).save(path, save_all=True, append_images=[noise(40, 40, 3)] * 3),
    "deep.png": lambda path: Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(path),
    "cmyk.jpg": lambda path: Image.merge("CMYK", [noise(40, 40)] * 4).save(path),
    "broken_exif.jpg": broken_exif,
    "palette.png": lambda path: noise(40, 40).convert("P").save(path, transparency=3),
    "name with \n and \udce9.png": lambda path: noise(40, 40, 3).save(path),
}
BAD = {
    "bomb.png": bomb,
    "text.jpg": lambda path: path.write_text("not an image"),
    "zero_bytes.png": lambda path: path.touch(),
    "cut.jpg": lambda path: (noise(40, 40, 3).save(path), os.truncate(path, 400)),
    "dangling.jpg": lambda path: path.symlink_to("nowhere"),
    "text named \udcff\n.png": lambda path: path.write_text("not an image"),
    "pipe.png": lambda path: os.mkfifo(path),
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes")
@pytest.mark.parametrize("workers", [0, 2])
def test_unusual_images_are_converted_and_unreadable_ones_skipped(tmp_path, workers):
    for name, make in (GOOD | BAD).items():
        (tmp_path / "images").mkdir(exist_ok=True)
        make(tmp_path / "images" / name)
    noise(40, 40, 3).save(tmp_path / "images" / "secret.png")
    (tmp_path / "images" / "secret.png").chmod(0)
    readable = os.access(tmp_path / "images" / "secret.png", os.R_OK)  # root may read it
    bad = BAD.keys() | (set() if readable else {"secret.png"})
    source = find_source("folder", str(tmp_path / "images"))
    source = dataclasses.replace(source, items=source.items * 15)  # more than one chunk
    images, skipped = open_cache(source, 32, tmp_path / "cache", workers)
    expected = {name.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n") for name in bad}
    assert {line.split(":")[0] for line in skipped.values()} == expected
    assert len(skipped) == 15 * len(bad)
    assert len(images) == 15 * (len(GOOD) + readable)
    good = [name for name in source.items if name not in bad]
    for index, name in enumerate(good):  # in order, without a gap
        assert np.array_equal(images[index], np.asarray(source.decode(name, 32))), name


def fail(item, size):
    raise OSError("broken")


def test_no_readable_image_is_an_error(tmp_path):
    with pytest.raises(UserError, match="a: OSError: broken"):
        open_cache(Source("folder", ["a", "b", "c"], fail, "x", "3 images"), 32, tmp_path / "cache", 0)


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="--cache_path"):
        open_cache(find_source("toy", toy_num=2), 32, tmp_path / "cache", 0)


def test_fewer_images_than_one_batch_are_an_error(tmp_path):
    with pytest.raises(UserError, match="--batch_size to 10 "):
        Loader(find_source("toy", toy_num=10), 32, 11, cache_path=str(tmp_path))
    make_images(tmp_path / "images", good=2)
    (tmp_path / "images" / "text.jpg").write_text("not an image")
    loader = Loader(find_source("folder", str(tmp_path / "images")), 32, 3, cache_path=str(tmp_path), num_workers=0)
    with pytest.raises(UserError, match="--batch_size to 2 "):
        loader.open()
