"""From images to batches. Every dataset is decoded once into a uint8 cache, which is memory-mapped from then on.

    loader = Loader(find_source("toy"), image_size=64, batch_size=64).open()
    real = loader.batch(1000)       # (64, 3, 64, 64) in [-1, 1], on the device

A cache is a folder with `images.bin` (uint8, N x S x S x 3) and `info.json` (the number of images, and those that could
not be read). It is written under a temporary name and renamed when complete, so that a killed build leaves no cache.
"""

import itertools
import json
import os
import shutil
import signal
import time
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.sources import Source, decode_chunk
from errors import UserError

FORMAT = 1  # version of the cache format; caches of another version are rebuilt
CHUNK = 256  # images per task of a worker
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

    Attributes, both empty before `open`:
        images: all images (N, S, S, 3) in uint8, on the GPU where they fit, otherwise memory-mapped.
        skipped: a line with name and reason for each image that could not be read.

    Raises:
        UserError: the source has fewer items than one batch.
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
        self.source, self.image_size, self.batch_size = source, image_size, batch_size
        self.cache_path, self.num_workers = Path(cache_path).expanduser(), num_workers
        self.seed, self.hflip, self.device = seed, hflip, torch.device(device)
        self.images: Tensor = torch.empty(0)
        self.skipped: list[str] = []
        self._epoch: int | None = None  # whose order and flips these are
        self._order = self._flip = torch.empty(0)
        self._staging: list[tuple[Tensor, torch.cuda.Event]] = []

    def open(self) -> "Loader":
        """Open the cache, or build it if there is none, and return self. Does nothing if it is already open.

        Raises:
            UserError: fewer images than one batch could be read, or the cache cannot be written.
        """
        if len(self.images):
            return self
        images, self.skipped = open_cache(self.source, self.image_size, self.cache_path, self.num_workers)
        _check_size(len(images), self.batch_size)
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

    def checksum(self) -> int:
        """Return a CRC32 of up to 256 images and of the number of images, to compare the data of two processes."""
        count = len(self.images)
        return zlib.crc32(self.images[:: -(-count // 256)].cpu().numpy().tobytes(), count)

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
        epoch, index = divmod(position, len(self))
        if epoch != self._epoch:
            self._shuffle(epoch)
        rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
        batch = to_model_range(self._fetch(self._order[rows][shard]))
        if self.hflip:
            batch = torch.where(self._flip[rows][shard], batch.flip(3), batch)
        return batch

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


def open_cache(source: Source, size: int, cache_path: Path, num_workers: int = 2) -> tuple[np.ndarray, list[str]]:
    """Open the cache of a source, or build it if it is missing or damaged. The arguments are those of `Loader`.

    Returns:
        A memory-mapped uint8 array (N, size, size, 3), and a line for each image that could not be read.

    Raises:
        UserError: no image could be read, or the cache cannot be written.
    """
    folder = cache_path / f"{source.name}_{size}_{source.fingerprint}"
    try:
        return _read_cache(folder, size) or _build_cache(source, size, folder, num_workers)
    except OSError as error:
        raise UserError(
            f"cannot write the image cache {folder}: {error.strerror or error}; set --cache_path to another folder"
        ) from error


def _read_cache(folder: Path, size: int) -> tuple[np.ndarray, list[str]] | None:
    """Return a complete cache, or None."""
    path = folder / "images.bin"
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        shape = (info["count"], size, size, 3)
        if info["format"] != FORMAT or path.stat().st_size != np.prod(shape, dtype=np.int64):
            return None
        return np.memmap(path, np.uint8, mode="c", shape=shape), info["skipped"]  # "c": torch warns of read-only arrays
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _build_cache(source: Source, size: int, folder: Path, num_workers: int) -> tuple[np.ndarray, list[str]]:
    """Write the cache under a temporary name, rename it, and open it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_builds(folder)
    if _read_cache(folder, size) is None:  # missing or damaged; another process may have built it meanwhile
        shutil.rmtree(folder, ignore_errors=True)
    building = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")
    building.mkdir()
    try:
        count, skipped = _decode(source, size, building / "images.bin", num_workers)
        info = {"format": FORMAT, "count": count, "skipped": skipped}
        (building / "info.json").write_text(json.dumps(info), encoding="utf-8")
        try:
            os.rename(building, folder)
        except OSError:
            if _read_cache(folder, size) is None:  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return _read_cache(folder, size)


def _remove_stale_builds(folder: Path) -> None:
    """Remove what killed builds of this cache left behind."""
    for leftover in folder.parent.glob(folder.name + ".building-*"):
        newest = max(path.stat().st_mtime for path in (leftover, *leftover.iterdir()))
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _decode(source: Source, size: int, path: Path, num_workers: int) -> tuple[int, list[str]]:
    """Write the readable images of a source to a file, in order.

    Returns:
        The number of images, and a line for each image that could not be read.
    """
    path.touch()
    image_bytes = size * size * 3
    count, skipped = 0, []
    starts = range(0, len(source.items), CHUNK)
    chunks = _decode_chunks(source, size, path, starts, num_workers)
    with tqdm(total=len(source.items), desc=f"decoding {source.name}", unit="img") as bar:
        for start, (written, failures) in zip(starts, chunks, strict=True):
            if start > count:  # unreadable images have left a gap: move the chunk to the end of the ones before it
                with open(path, "r+b") as file:
                    file.seek(start * image_bytes)
                    chunk = file.read(written * image_bytes)
                    file.seek(count * image_bytes)
                    file.write(chunk)
            count += written
            skipped += failures
            bar.update(written + len(failures))
    if not count:
        raise UserError(f"none of the {len(source.items)} images could be read; the first: {skipped[0]}")
    with open(path, "r+b") as file:
        file.truncate(count * image_bytes)
        os.fsync(file.fileno())
    return count, skipped


def _decode_chunks(
    source: Source, size: int, path: Path, starts: range, num_workers: int
) -> Iterator[tuple[int, list[str]]]:
    """Run `decode_chunk` on the chunks of `source` that start at these items, and return its results in order."""
    decode = partial(decode_chunk, source.decode, size, path)
    chunks = [source.items[start : start + CHUNK] for start in starts]
    if num_workers == 0 or len(chunks) == 1:
        yield from map(decode, starts, chunks)
        return
    # Spawned, because a fork of a process with torch's threads may deadlock. Workers ignore Ctrl-C, which reaches them
    # too: a worker that is interrupted while it sends a result blocks this process.
    with ProcessPoolExecutor(
        min(num_workers, len(chunks)),
        mp_context=get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        try:
            yield from pool.map(decode, starts, chunks)
        finally:  # an interruption must not wait for the rest, not even one while tasks are still submitted
            pool.shutdown(cancel_futures=True)


def _check_size(images: int, batch_size: int) -> None:
    if images < batch_size:
        raise UserError(f"the dataset has {images} images, fewer than one batch: set --batch_size to {images} or less")
