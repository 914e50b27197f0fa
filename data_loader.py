"""From images to batches. Every dataset is decoded once into a uint8 cache, which is memory-mapped from then on.

    loader = Loader(find_source("toy"), image_size=64, batch_size=64).open()
    real = loader.batch(1000)       # (64, 3, 64, 64) in [-1, 1], on the device

A cache is a folder with `images.bin` (uint8, N x S x S x 3) and `info.json` (the number of images, and which could not
be read). It is written under a temporary name and renamed when complete, so that a killed build leaves no cache.
"""

import itertools
import json
import os
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.decoding import CHUNK, decode_chunks, try_decode
from datasets.sources import Source
from errors import UserError, warn
from utils import flush_to_disk, progress

FORMAT = 2  # version of the cache format; caches of another version are rebuilt, except whole ones of version 1
STALE_SECONDS = 3600  # a build that has written nothing for this long is dead
MAX_GPU_MEMORY_FRACTION = 0.5  # of the free GPU memory, for the images


class Loader:
    """Batches of real images, each a function of (seed, position), so that a checkpoint needs no loader state.

    `len(loader)` is the number of batches per epoch; the last partial batch is dropped.

    Args:
        source: the images.
        image_size: height and width of the batches in pixels.
        batch_size: images per batch.
        cache_path: folder of the caches.
        num_workers: decoding processes while the cache is built; 0 decodes in this process.
        seed: determines the order of the images and which are flipped.
        hflip: flip half of the images horizontally.
        device: where the batches are returned.

    Attributes, of which all but `classes` are empty before `open`:
        classes: the names of the classes; empty if the source has no labels.
        images: all images (N, S, S, 3) in uint8, on the GPU where they fit, otherwise memory-mapped.
        labels: the class of each image, (N,) int64 below `len(classes)`, on the device.
        skipped: a line with name and reason for each image that could not be read.

    Raises:
        UserError: the source has fewer items than one batch, or fewer than two classes of two images.
    """

    def __init__(
        self,
        source: Source,
        image_size: int = 64,
        batch_size: int = 64,
        *,
        cache_path: str = "./cache",
        num_workers: int = 2,
        seed: int = 0,
        hflip: bool = False,
        device: str | torch.device = "cpu",
    ):
        _check_size(len(source.items), batch_size)
        if source.labels:
            source.labels.check()
        self.source, self.image_size, self.batch_size = source, image_size, batch_size
        self.cache_path, self.num_workers = Path(os.path.expanduser(cache_path)), num_workers
        self.seed, self.hflip, self.device = seed, hflip, torch.device(device)
        self.classes = source.labels.classes if source.labels else ()
        self.images: Tensor = torch.empty(0)
        self.labels: Tensor = torch.empty(0, dtype=torch.long)
        self.skipped: list[str] = []
        self._epoch: int | None = None  # whose order and flips these are
        self._order = self._flip = torch.empty(0)
        self._staging: list[tuple[Tensor, torch.cuda.Event]] = []

    def open(self) -> "Loader":
        """Open the cache, or build it if there is none, and return self. Does nothing if it is already open.

        Raises:
            UserError: fewer images than one batch, or than two of a class, could be read, or the cache cannot be read
                or written.
        """
        if len(self.images):
            return self
        images, skipped = open_cache(self.source, self.image_size, self.cache_path, self.num_workers)
        self.skipped = list(skipped.values())
        _check_size(len(images), self.batch_size)
        if self.source.labels:
            labels = self.source.labels.without(skipped)
            labels.check()
            self.labels = torch.tensor(labels.numbers, device=self.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the array is read-only; nothing writes to it
            self.images = torch.from_numpy(images)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if self.images.nbytes < MAX_GPU_MEMORY_FRACTION * free:
                self.images = self.images.to(self.device)
            else:
                shape = (self.batch_size, *self.images.shape[1:])
                pinned = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
                self._staging = [(buffer, torch.cuda.Event()) for buffer in pinned]
        return self

    @cached_property
    def identity(self) -> dict[str, int]:
        """Number of images, and a CRC32 of up to 256 of them and of all labels, to compare data of runs or ranks."""
        count = len(self.images)
        checksum = zlib.crc32(self.images[:: -(-count // 256)].cpu().numpy().tobytes(), count)
        return {"images": count, "checksum": zlib.crc32(self.labels.cpu().numpy().tobytes(), checksum)}

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over the batches from position 0 on, without end."""
        return map(self.batch, itertools.count())

    def batch(self, position: int, shard: slice = slice(None)) -> Tensor:
        """Return batch number `position`, counted from the start of training.

        Args:
            shard: the rows of the batch to return.

        Returns:
            (B, 3, S, S) float32 in [-1, 1], channels last in memory.
        """
        rows = self._rows(position)
        batch = to_model_range(self._fetch(self._order[rows][shard]))
        if self.hflip:
            batch = torch.where(self._flip[rows][shard], batch.flip(3), batch)
        return batch

    def batch_labels(self, position: int, shard: slice = slice(None)) -> Tensor:
        """Return the labels (B,) of the images that `batch` returns, if there are classes."""
        rows = self._rows(position)
        return self.labels[self._order[rows][shard].to(self.device)]

    def images_of_class(self, label: int, count: int) -> Tensor:
        """Return the first images of a class, at most `count`: (B, 3, S, S) float32 in [-1, 1], on the device."""
        rows = (self.labels == label).nonzero()[:count, 0]
        return to_model_range(self.images[rows.to(self.images.device)].to(self.device))

    def _rows(self, position: int) -> slice:
        """Return the rows of a batch in the order of its epoch, which is drawn first if it is another one."""
        epoch, index = divmod(position, len(self))
        if epoch != self._epoch:
            self._shuffle(epoch)
        return slice(index * self.batch_size, (index + 1) * self.batch_size)

    def _fetch(self, rows: Tensor) -> Tensor:
        """Return the images of these rows, (B, S, S, 3) uint8, on the device."""
        if not self._staging:
            return self.images[rows].to(self.device)
        # Two pinned buffers in turn: one is filled while the GPU still copies from the other.
        self._staging.reverse()
        buffer, copied = self._staging[0]
        copied.synchronize()
        buffer = buffer[: len(rows)]
        torch.index_select(self.images, 0, rows, out=buffer)
        batch = buffer.to(self.device, non_blocking=True)
        copied.record()
        return batch

    def _shuffle(self, epoch: int) -> None:
        """Draw the order of an epoch and its flips."""
        random = np.random.default_rng([self.seed, epoch])
        count = len(self.images)
        self._order = torch.from_numpy(random.permutation(count)).to(self.images.device)
        self._flip = torch.from_numpy(random.random(count) < 0.5).view(-1, 1, 1, 1).to(self.device)
        self._epoch = epoch


def to_model_range(pixels: Tensor) -> Tensor:
    """Convert (B, S, S, 3) uint8 to (B, 3, S, S) float32 in [-1, 1], channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def open_cache(source: Source, size: int, cache_path: Path, num_workers: int = 2) -> tuple[np.ndarray, dict[int, str]]:
    """Open the cache of a source, or build it if it is missing or damaged. The arguments are those of `Loader`.

    A cache is built again when an image that could not be read before can be read now.

    Returns:
        A read-only uint8 array (N, size, size, 3), memory-mapped where possible, and by number of the item a line for
        each image that could not be read and is not in the array.

    Raises:
        UserError: no image could be read, or the cache cannot be read or written.
    """
    folder = cache_path / f"{source.name}_{size}_{source.fingerprint}"
    try:
        skipped = _read_info(folder, source, size)
        if skipped is None:
            skipped = _build_cache(source, size, folder, num_workers)
        elif _can_read_one(source, size, [source.items[number] for number in skipped]):
            print(f"images that could not be read before can be read now: decoding the images of {folder} again")
            try:
                skipped = _build_cache(source, size, folder, num_workers)
            except OSError as error:
                warn(f"the cache cannot be written again ({error}), and is used as it is")
        return _map_images(folder / "images.bin", size), skipped
    except OSError as error:
        raise UserError(
            f"cannot read or write the image cache {folder}: {error.strerror or error}; set --cache_path to another "
            "folder"
        ) from error


def _read_info(folder: Path, source: Source, size: int) -> dict[int, str] | None:
    """Return a line that says why, by number, for each skipped item of a complete cache; None if it is not complete."""
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        numbers = range(len(source.items))
        skipped = {numbers[number]: line for number, line in info["skipped"]}
        # Version 1 had no numbers of items; without skipped ones it is the same.
        known = info["format"] == FORMAT or (info["format"] == 1 and not skipped)
        count = len(numbers) - len(skipped)
        stored = (folder / "images.bin").stat().st_size
        return skipped if known and info["count"] == count and stored == count * size * size * 3 > 0 else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None


def _can_read_one(source: Source, size: int, items: list) -> bool:
    with progress(items, "trying skipped images again", "img") as bar:
        return any(not isinstance(try_decode(source.decode, item, size), str) for item in bar)


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
        earlier = _read_info(folder, source, size)
        if earlier is None or len(earlier) > len(failures):
            _remove_cache(folder)
        try:
            os.rename(building, folder)
        except OSError:
            if _read_info(folder, source, size) is None:  # otherwise another process was faster
                raise
    finally:
        _remove_cache(building)
    return _read_info(folder, source, size)


def _remove_cache(folder: Path) -> None:
    """Remove the files of a cache, and its folder if there are no others."""
    with suppress(OSError):  # it is missing, cannot be removed, or has other files
        for name in ("images.bin", "info.json"):
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
    """Write the readable images of a source to a file, in order.

    Returns:
        A line by number of the item for each that could not be read.
    """
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


def _check_size(images: int, batch_size: int) -> None:
    if images < batch_size:
        raise UserError(f"the dataset has {images} images, fewer than one batch: set --batch_size to {images} or less")
