"""Decode the items of a source into a file of uint8 images, in this process or in several.

Worker processes import this module, so it must not import torch.
"""

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from errors import UserError, stop_signals

CHUNK = 256  # items per task of a worker

Decode = Callable[[Any, int], Image.Image]


def try_decode(decode: Decode, item: Any, size: int) -> Image.Image | str:
    """Return the image of an item, or a line with its name and the reason if it cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of very large images and damaged EXIF data; neither matters here
        try:
            image = decode(item, size)
            if (found := (image.mode, *image.size)) != ("RGB", size, size):
                raise ValueError(f"decoded to {found}, not to ('RGB', {size}, {size})")
            return image
        except Exception as error:  # Pillow's readers raise nearly any type for a damaged file
            line = f"{item}: {type(error).__name__}: {error}".replace("\n", "\\n")
            return line.encode("utf-8", "backslashreplace").decode()


def decode_chunk(decode: Decode, size: int, path: Path, first: int, items: Sequence) -> dict[int, str]:
    """Decode some items into a file of uint8 images (size, size, 3), starting at image number `first` of the file.

    Worker processes run this. It writes to the file itself, because sending the pixels to another process is slower.

    Returns:
        A line with name and reason by number of the item, counted from `first`, for each that cannot be read; the
        images after it take its place in the file.
    """
    images, failures = [], {}
    for number, item in enumerate(items, first):
        if isinstance(image := try_decode(decode, item, size), str):
            failures[number] = image
        else:
            images.append(np.asarray(image))
    with open(path, "r+b") as file:
        file.seek(first * size * size * 3)
        file.writelines(images)
    return failures


def decode_chunks(decode: Decode, items: Sequence, size: int, path: Path, num_workers: int) -> Iterator[dict[int, str]]:
    """Run `decode_chunk` on each `CHUNK` items, and return its results in order.

    Raises:
        UserError: a worker process was killed, or none can be started.
    """
    starts = range(0, len(items), CHUNK)
    task = partial(decode_chunk, decode, size, path)
    chunks = [items[start : start + CHUNK] for start in starts]
    if num_workers == 0 or len(chunks) == 1:
        yield from map(task, starts, chunks)
        return
    others = {*active_children()}
    with _starting_processes():  # multiprocessing's resource tracker
        # Spawned, because a fork of a process with torch's threads may deadlock. Windows has no pools of more than 61.
        pool = ProcessPoolExecutor(min(num_workers, len(chunks), 61), get_context("spawn"), initializer=start_worker)
    with pool:
        try:
            with _starting_processes():
                futures = [pool.submit(task, *chunk) for chunk in zip(starts, chunks, strict=True)]
            for future in futures:  # not pool.map: it cancels futures, and a pool with killed workers then prints that
                yield future.result()
        except BaseException as error:  # an interruption must not wait for the rest, not even for the current chunks
            for worker in {*active_children()} - others:
                worker.kill()
            if isinstance(error, BrokenProcessPool):
                advice = "perhaps for lack of memory: use fewer --num_workers (0: none)"
                raise UserError(f"a process that decodes images was killed, {advice}") from error
            raise


@contextmanager
def _starting_processes() -> Iterator[None]:
    """Block the signals that end a run for the processes that are started inside: this process ends them.

    Ctrl-C and schedulers signal all processes. Windows has no such blocking.
    """
    blocks = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals()) if blocks else ()
    try:
        yield
    except OSError as error:
        raise UserError(f"no processes to decode images can be started ({error}): use --num_workers 0") from error
    finally:
        if blocks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker() -> None:
    """Prepare a worker process: it ends when its parent process dies."""
    for number in stop_signals():  # on Windows, where they are not blocked
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)
