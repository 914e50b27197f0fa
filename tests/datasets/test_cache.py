import errno
import mmap
import os
import shutil
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import cache_folder, contents
from PIL import Image

from datasets.cache import STALE_SECONDS, open_cache
from datasets.sources import Source
from errors import UserError


class Numbers:
    """A source of 10 items: `broken` cannot be read; `tried` are those that were decoded since the last `open`."""

    def __init__(self, folder):
        self.folder, self.broken, self.tried = folder / "cache", set(), []
        self.at_first = lambda: None  # called before the next image is decoded

    def decode(self, item, size):
        call, self.at_first = self.at_first, lambda: None
        call()
        self.tried.append(item)
        if item in self.broken:
            raise OSError("no connection")
        return Image.new("RGB", (size, size), (int(item), 0, 0))

    def open(self, size=8):
        """Returns one value of each image, and the skipped ones."""
        self.tried.clear()
        source = Source("numbers", [*"0123456789"], self.decode, "1", "10 images")
        images, skipped = open_cache(source, size, self.folder, 0)
        assert images.shape[1:] == (size, size, 3)
        return images[:, 0, 0, 0].tolist(), skipped


@pytest.fixture
def numbers(tmp_path):
    return Numbers(tmp_path)


ALL, INFO = [*range(10)], b'{"format": 2, "count": 10, "skipped": []}'
WITHOUT_3 = [0, 1, 2, 4, 5, 6, 7, 8, 9], {3: "3: OSError: no connection"}


def test_an_existing_cache_is_opened_without_decoding_or_writing(numbers, tmp_path):
    assert numbers.open() == (ALL, {}) and numbers.tried == [*"0123456789"]
    folder = cache_folder(tmp_path)
    assert folder.name == "numbers_8_1"  # so that later versions find it
    assert contents(folder)["info.json"] == INFO
    paths = (folder.parent, folder, *folder.iterdir())
    times = [path.stat().st_mtime_ns for path in paths]
    assert numbers.open() == (ALL, {}) and not numbers.tried
    assert times == [path.stat().st_mtime_ns for path in paths]
    numbers.open(16)
    assert len([*folder.parent.iterdir()]) == 2  # each size has its own


@pytest.mark.parametrize("name, content", [
    ("images.bin", bytes(100)), ("images.bin", None), ("info.json", None), ("info.json", b"\xff\xfe\x00"),
    ("info.json", b"3"), *(("info.json", INFO.replace(*change)) for change in (
        (b"2", b"1"), (b"10", b"9"), (b'"count"', b'"number"'), (b"[]", b'[[99, "no such item"]]'),
        (b"[]", b'[["a", "no number"]]')))
])  # fmt: skip
def test_a_damaged_cache_is_rebuilt_beside_files_of_others(numbers, tmp_path, name, content):
    def damage():
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    numbers.open()
    folder = cache_folder(tmp_path)
    complete = contents(folder)
    damage()
    assert numbers.open() == (ALL, {})
    assert cache_folder(tmp_path) == folder and contents(folder) == complete
    damage()
    (folder / ".DS_Store").write_text("a file manager's")
    assert numbers.open() == (ALL, {})
    assert cache_folder(tmp_path) == folder and contents(folder) == complete | {".DS_Store": b"a file manager's"}


def test_a_cache_built_meanwhile_by_another_process_is_kept(numbers, tmp_path):
    folder, inodes = tmp_path / "cache" / "numbers_8_1", []
    numbers.at_first = lambda: (numbers.open(), inodes.append(folder.stat().st_ino))
    assert numbers.open() == (ALL, {})
    assert inodes == [cache_folder(tmp_path).stat().st_ino]


def test_stale_builds_are_removed(numbers, tmp_path):
    numbers.open()
    folder = cache_folder(tmp_path)
    for age, name in ((0, "live"), (2 * STALE_SECONDS, "dead"), (2 * STALE_SECONDS, "mixed")):
        leftover = shutil.copytree(folder, folder.with_name(f"{folder.name}.building-{name}"))
        if name == "mixed":
            (leftover / "notes.txt").write_text("the user's")
        for path in (*leftover.iterdir(), leftover):
            os.utime(path, (time.time() - age,) * 2)
    shutil.rmtree(folder)
    numbers.open()
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {"", ".building-live", ".building-mixed"}
    assert [path.name for path in (tmp_path / "cache").glob("*mixed/*")] == ["notes.txt"]


def test_skipped_images_alone_are_tried_again_and_the_cache_built_again_when_one_can_be_read(numbers, tmp_path, capsys):
    numbers.broken |= {"3", "5"}
    first = numbers.open()
    assert first[0] == [0, 1, 2, 4, 6, 7, 8, 9]
    assert numbers.open() == first and numbers.tried == ["3", "5"] and not capsys.readouterr().out
    numbers.broken.remove("5")
    assert numbers.open() == WITHOUT_3 and capsys.readouterr().out.count("\n") == 1
    assert cache_folder(tmp_path)  # the only one
    assert numbers.open() == WITHOUT_3 and numbers.tried == ["3"]


def test_a_cache_stays_if_it_cannot_be_built_again_as_well(numbers, monkeypatch, capsys):
    numbers.broken |= {"3"}
    assert numbers.open() == WITHOUT_3
    numbers.broken.clear()
    # After "3" was tried.
    numbers.at_first = lambda: setattr(numbers, "at_first", lambda: numbers.broken.update({"3", "4", "5"}))
    assert numbers.open() == WITHOUT_3
    numbers.broken.clear()
    monkeypatch.setattr(Path, "mkdir", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
    assert numbers.open() == WITHOUT_3
    assert "Read-only file system" in capsys.readouterr().err


def test_a_cache_that_cannot_be_memory_mapped_is_read_and_one_that_cannot_be_read_stays(numbers, tmp_path, monkeypatch):
    numbers.open()
    files = contents(cache_folder(tmp_path))
    monkeypatch.setattr(mmap, "mmap", Mock(side_effect=OSError(errno.ENODEV, "No such device")))
    assert numbers.open() == (ALL, {}) and not numbers.tried
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=OSError(errno.EACCES, "Permission denied")))
    with pytest.raises(UserError, match=r"Permission denied.*--cache_path"):
        numbers.open()
    assert contents(cache_folder(tmp_path)) == files


def decode_most(item, size):
    """At module level, for the worker processes."""
    if item % 100 == 7:
        raise OSError("broken")
    return Image.fromarray(np.random.default_rng(item).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("workers", [0, 2])
def test_readable_images_are_stored_in_order_without_gaps(tmp_path, workers):
    source = Source("noise", range(600), decode_most, "1", "600 images")  # three chunks
    images, skipped = open_cache(source, 4, tmp_path / "cache", workers)
    assert skipped == {number: f"{number}: OSError: broken" for number in range(7, 600, 100)}
    assert np.array_equal(images, [decode_most(number, 4) for number in range(600) if number not in skipped])


@pytest.mark.parametrize("image", [Image.new("L", (8, 8)), Image.new("RGB", (8, 9)), np.zeros((8, 8, 3), np.uint8)])
def test_a_source_must_decode_to_rgb_images_of_the_size(tmp_path, image):
    with pytest.raises(UserError, match=r"first: 0: (ValueError: decoded to|AttributeError: .*ndarray)"):
        open_cache(Source("own", range(3), lambda *_: image, "1", "3 images"), 8, tmp_path, 0)


def test_a_failed_build_leaves_no_cache(numbers, tmp_path):
    numbers.at_first = sys.exit
    with pytest.raises(SystemExit):
        numbers.open()
    numbers.broken |= {*"0123456789"}
    with pytest.raises(UserError, match="10 images could be read; the first: 0: OSError: no connection"):
        numbers.open()
    assert not list((tmp_path / "cache").iterdir())
