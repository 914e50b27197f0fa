"""The cache of decoded images.

    images, skipped = open_cache(find_source("toy"), 64, Path("cache"))     # (N, 64, 64, 3) uint8, memory-mapped

A cache is a folder with `images.bin` (uint8, N x S x S x 3) and `info.json` (the number of images, and which could not
be read). It is written under a temporary name and renamed when complete, so that a killed build leaves no cache. It has
no labels: one cache serves any of them.
"""

import json
import os
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from datasets.decoding import CHUNK, decode_chunks, try_decode
from datasets.sources import Source
from errors import UserError, warn
from utils import flush_to_disk, progress

FORMAT = 2  # version of the cache format; caches of another version are rebuilt
CACHE_FILES = ("images.bin", "info.json")  # in this order, a cache that is replaced half way counts as incomplete
STALE_SECONDS = 3600  # a build that has written nothing for this long is dead


def open_cache(source: Source, size: int, cache_path: Path, num_workers: int = 2) -> tuple[np.ndarray, dict[int, str]]:
    """Open the cache of a source, or build it if it is missing or damaged, or lacks an image that can be read by now.

    Args:
        size: height and width of the images in pixels.
        cache_path: folder of all caches.
        num_workers: decoding processes; 0 decodes in this process.

    Returns:
        A read-only uint8 array (N, size, size, 3), memory-mapped where possible, and by number of the item a line for
        each that could not be read and is not in the array.

    Raises:
        UserError: no image could be read, or the cache cannot be read or written.
    """
    folder = cache_path / f"{source.name}_{size}_{source.fingerprint}"
    try:
        skipped = _read_info(folder, source, size)
        if skipped is None:
            skipped = _build_cache(source, size, folder, num_workers)
        elif _can_read_any(source, size, skipped):
            print(f"images that could not be read before can be read now: decoding the images of {folder} again")
            try:
                skipped = _build_cache(source, size, folder, num_workers)
            except OSError as error:
                warn(f"the cache cannot be written again ({error}), and is used as it is")
        return _map_images(folder / "images.bin", size), skipped
    except OSError as error:
        raise UserError(
            f"cannot read or write the image cache {folder}: {error.strerror or error}; set another --cache_path"
        ) from error


def _read_info(folder: Path, source: Source, size: int) -> dict[int, str] | None:
    """Return a line for each skipped item of a complete cache, by number; None if the cache is not complete."""
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        numbers = range(len(source.items))
        skipped = {numbers[number]: line for number, line in info["skipped"]}
        count = len(numbers) - len(skipped)
        complete = (folder / "images.bin").stat().st_size == count * size * size * 3 > 0
        return skipped if complete and (info["format"], info["count"]) == (FORMAT, count) else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None


def _can_read_any(source: Source, size: int, numbers: Iterable[int]) -> bool:
    with progress(numbers, "trying skipped images again", "img") as bar:
        return any(not isinstance(try_decode(source.decode, source.items[number], size), str) for number in bar)


def _map_images(path: Path, size: int) -> np.ndarray:
    """Memory-map a file of images; read it where that fails, as on some network mounts."""
    try:
        images = np.memmap(path, np.uint8, mode="r")
    except OSError:
        images = np.fromfile(path, np.uint8)
    return images.reshape(-1, size, size, 3)


def _build_cache(source: Source, size: int, folder: Path, num_workers: int) -> dict[int, str]:
    """Write the cache, then rename it unless there is one as good by then. Returns what `_read_info` does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_builds(folder)
    building = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")
    building.mkdir()
    try:
        failures = _decode(source, size, building / "images.bin", num_workers)
        info = {"format": FORMAT, "count": len(source.items) - len(failures), "skipped": [*failures.items()]}
        (building / "info.json").write_text(json.dumps(info), encoding="utf-8")
        try:
            os.rename(building, folder)
        except OSError:  # there is one, maybe of a process that was faster
            earlier = _read_info(folder, source, size)
            if earlier is None or len(earlier) > len(failures):
                for name in CACHE_FILES:  # not the folder, in which a file manager may have put others
                    os.replace(building / name, folder / name)
    finally:
        _remove_cache(building)
    return _read_info(folder, source, size)


def _remove_cache(folder: Path) -> None:
    """Remove the files of a cache, and its folder if there are no others."""
    with suppress(OSError):  # it is missing, cannot be removed, or has other files
        for name in CACHE_FILES:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _remove_stale_builds(folder: Path) -> None:
    """Remove what killed builds of this cache left behind."""
    for leftover in folder.parent.glob(folder.name + ".building-*"):
        with suppress(OSError):  # another process removes it too
            newest = max(path.stat().st_mtime for path in (leftover, *leftover.iterdir()))
            if time.time() - newest > STALE_SECONDS:
                _remove_cache(leftover)


def _decode(source: Source, size: int, path: Path, num_workers: int) -> dict[int, str]:
    """Write the readable images of a source to a file, in order. Returns what `_read_info` does."""
    path.touch()
    image_bytes, total = size * size * 3, len(source.items)
    count, failures = 0, {}
    chunks = decode_chunks(source.decode, source.items, size, path, num_workers)
    with progress(None, f"decoding {source.name}", "img", total) as bar:
        for start, failed in zip(range(0, total, CHUNK), chunks, strict=True):
            items = min(CHUNK, total - start)
            written = items - len(failed)
            if start > count:  # unreadable images have left a gap: move the chunk to the end of the ones before it
                with open(path, "r+b") as file:
                    file.seek(start * image_bytes)
                    chunk = file.read(written * image_bytes)
                    file.seek(count * image_bytes)
                    file.write(chunk)
            count += written
            failures |= failed
            bar.update(items)
    if not count:
        raise UserError(f"none of the {total:,} images could be read; the first: {failures[0]}")
    with open(path, "r+b") as file:
        file.truncate(count * image_bytes)
        flush_to_disk(file.fileno())
    return failures
