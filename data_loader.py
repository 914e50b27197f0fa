"""Images to batches: every source is decoded once into a uint8 cache, which is opened at once ever after.

    loader = get_loader(find_source("toy"), image_size=64, batch_size=64)
    real = loader.batch(1000)       # (64, 3, 64, 64) in [-1, 1], on the device

A cache is a folder, written under a temporary name and renamed when it is whole, so that a killed build leaves none:
`images.bin` (uint8, N x S x S x 3) and `info.json` (what it holds, and which images could not be read).
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.sources import Source, decode_chunk
from errors import UserError

FORMAT = 1  # of a cache; others are rebuilt
CHUNK = 256  # images that a worker decodes at a time
STALE_SECONDS = 3600  # a build that has written nothing for so long is dead
MAX_GPU_MEMORY_FRACTION = 0.5  # of the GPU's free memory that the images may take


def get_loader(
    source: Source,
    image_size: int = 64,
    batch_size: int = 64,
    *,
    cache_path: str = "./cache",
    num_workers: int = 2,
    seed: int = 0,
    hflip: bool = False,
    device: str | torch.device = "cpu",
) -> "Loader":
    """A `Loader` over `source`; decodes nothing yet.

    Raises:
        UserError: the source has fewer images than a batch.
    """
    _check_size(len(source.items), batch_size)
    return Loader(source, image_size, batch_size, cache_path, num_workers, seed, hflip, torch.device(device))


class Loader:
    """Batches of real images, each a function of (seed, position): nothing to save, nothing to restore.

    `len(loader)` is the number of batches in an epoch; the last partial batch is dropped. The cache is opened, or
    built, when the images are first needed.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        batch_size: int,
        cache_path: str,
        num_workers: int,
        seed: int,
        hflip: bool,
        device: torch.device,
    ):
        self.source, self.image_size, self.batch_size = source, image_size, batch_size
        self.cache_path, self.num_workers = Path(cache_path).expanduser(), num_workers
        self.seed, self.hflip, self.device = seed, hflip, device
        self._epoch = None
        self._staged = 0
        self._order = self._flip = torch.empty(0)

    @property
    def images(self) -> Tensor:
        """All images (N, S, S, 3) in uint8, on the GPU where they fit, else memory-mapped."""
        return self._cache[0]

    @property
    def skipped(self) -> list[str]:
        """Images that could not be read: one line each, name and reason."""
        return self._cache[1]

    def checksum(self) -> int:
        """A number that tells one set of images, in one order, from another: of up to 256 of them, and how many."""
        count = len(self.images)
        return zlib.crc32(self.images[:: -(-count // 256)].cpu().numpy().tobytes(), count)

    @cached_property
    def _cache(self) -> tuple[Tensor, list[str]]:
        images, skipped = open_cache(self.source, self.image_size, self.cache_path, self.num_workers)
        _check_size(len(images), self.batch_size)
        images = torch.from_numpy(images)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if images.nbytes < MAX_GPU_MEMORY_FRACTION * free:
                images = images.to(self.device)
        return images, skipped

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """All batches from position 0 on, without end."""
        return map(self.batch, itertools.count())

    def batch(self, position: int, part: slice = slice(None)) -> Tensor:
        """Batch number `position` since the start of training: (B, 3, S, S) float32 in [-1, 1], channels last.

        `part` of it, if that is all this process needs.
        """
        epoch, index = divmod(position, len(self))
        if epoch != self._epoch:
            self._shuffle(epoch)
        rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
        batch = to_model_range(self._fetch(self._order[rows][part]))
        if self.hflip:
            batch = torch.where(self._flip[rows][part], batch.flip(3), batch)
        return batch

    def _fetch(self, rows: Tensor) -> Tensor:
        """The images of these rows, (B, S, S, 3) uint8, on the device."""
        if self.images.is_cuda or self.device.type != "cuda":
            return self.images[rows].to(self.device)
        # Two pinned buffers in turn: one is filled while the GPU still copies from the other.
        self._staged += 1
        buffer, copied = self._staging[self._staged % 2]
        copied.synchronize()
        buffer = buffer[: len(rows)]
        torch.index_select(self.images, 0, rows, out=buffer)
        batch = buffer.to(self.device, non_blocking=True)
        copied.record()
        return batch

    @cached_property
    def _staging(self) -> list[tuple[Tensor, torch.cuda.Event]]:
        shape = (self.batch_size, self.image_size, self.image_size, 3)
        return [(torch.empty(shape, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]

    def _shuffle(self, epoch: int) -> None:
        """Draws the order of an epoch and its flips."""
        random = np.random.default_rng([self.seed, epoch])
        count = len(self.images)
        self._order = torch.from_numpy(random.permutation(count)).to(self.images.device)
        self._flip = torch.from_numpy(random.random(count) < 0.5).view(-1, 1, 1, 1).to(self.device)
        self._epoch = epoch


def to_model_range(pixels: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32 in [-1, 1], channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def open_cache(source: Source, size: int, cache_path: Path, num_workers: int = 2) -> tuple[np.ndarray, list[str]]:
    """The decoded images of a source, from its cache, which is built first where it is missing or damaged.

    Args:
        source: where the images come from.
        size: height and width to decode to.
        cache_path: the folder that holds the caches; made where missing.
        num_workers: decoding processes; 0 decodes in this one.

    Returns:
        A memory-mapped uint8 array (N, size, size, 3), and a line for each image that could not be read.

    Raises:
        UserError: not one image could be read, or the cache cannot be written.
    """
    folder = cache_path / f"{source.name}_{size}_{source.fingerprint}"
    cached = _read_cache(folder, size)
    if cached is None:
        try:
            _build_cache(source, size, folder, num_workers)
        except OSError as error:
            raise UserError(
                f"cannot write the image cache {folder}: {error.strerror or error}; --cache_path puts it elsewhere"
            ) from error
        cached = _read_cache(folder, size)
    return cached


def _read_cache(folder: Path, size: int) -> tuple[np.ndarray, list[str]] | None:
    """A whole cache, or None."""
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        if info.pop("digest") != _digest(info) or info["format"] != FORMAT:
            return None
        shape = (info["count"], size, size, 3)
        if (folder / "images.bin").stat().st_size != np.prod(shape, dtype=np.int64):
            return None
        images = np.memmap(folder / "images.bin", dtype=np.uint8, mode="c", shape=shape)  # "c": torch wants it writable
        return images, info["skipped"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest(info: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(info).encode()).hexdigest()


def _build_cache(source: Source, size: int, folder: Path, num_workers: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_builds(folder)
    if _read_cache(folder, size) is None:  # damaged, or not there; by now another process may have built it
        shutil.rmtree(folder, ignore_errors=True)
    building = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")
    building.mkdir()
    try:
        path = building / "images.bin"
        path.touch()
        starts = range(0, len(source.items), CHUNK)
        counts: list[int] = []
        skipped: list[str] = []
        with tqdm(total=len(source.items), desc=f"decoding {source.name}", unit="img") as bar:
            for start, (count, failures) in zip(
                starts, _decode_all(source, size, path, starts, num_workers), strict=True
            ):
                counts.append(count)
                skipped += failures
                bar.update(len(source.items[start : start + CHUNK]))
        count = sum(counts)
        if not count:
            raise UserError(f"none of the {len(source.items)} images could be read; the first: {skipped[0]}")
        with open(path, "r+b") as file:
            _close_gaps(file, starts, counts, size * size * 3)
            os.fsync(file.fileno())
        info = {"format": FORMAT, "count": count, "skipped": skipped}
        (building / "info.json").write_text(json.dumps(info | {"digest": _digest(info)}), encoding="utf-8")
        try:
            os.rename(building, folder)
        except OSError:
            if _read_cache(folder, size) is None:  # else another process was faster, and may be reading it already
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_stale_builds(folder: Path) -> None:
    """Clears away what killed builds of this cache left behind."""
    for leftover in folder.parent.glob(folder.name + ".building-*"):
        newest = max(path.stat().st_mtime for path in (leftover, *leftover.iterdir()))
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _decode_all(
    source: Source, size: int, path: Path, starts: Sequence[int], num_workers: int
) -> Iterator[tuple[int, list[str]]]:
    """Runs `decode_chunk` on the chunks of `source` that begin at these items, each to where it begins in the file."""
    decode = partial(decode_chunk, source.decode, size, path)
    chunks = [source.items[start : start + CHUNK] for start in starts]
    if num_workers == 0 or len(chunks) == 1:
        yield from map(decode, starts, chunks)
        return
    # Spawned everywhere: forking a process that already runs torch's threads may deadlock. Deaf to Ctrl-C, which
    # reaches the workers too: one that is cut off in the middle of an answer hangs this process.
    with ProcessPoolExecutor(
        min(num_workers, len(chunks)),
        mp_context=get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        yield from pool.map(decode, starts, chunks)


def _close_gaps(file: BinaryIO, starts: Sequence[int], counts: Sequence[int], image_bytes: int) -> None:
    """Moves each chunk of a file of images up to the end of the one before it, and cuts off what is left.

    Chunk i has `counts[i]` images from number `starts[i]` on; the rest of it could not be read.
    """
    end = 0
    for start, count in zip(starts, counts, strict=True):
        if start > end:
            file.seek(start * image_bytes)
            chunk = file.read(count * image_bytes)
            file.seek(end * image_bytes)
            file.write(chunk)
        end += count
    file.truncate(end * image_bytes)


def _check_size(images: int, batch_size: int) -> None:
    if images < batch_size:
        raise UserError(
            f"the data set has {images} images, fewer than one batch: --batch_size must be {images} or less"
        )
