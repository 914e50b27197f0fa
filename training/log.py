"""The log of a run: scalars in `metrics.jsonl`, and on request scalars and images for TensorBoard."""

import json
import os
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import numpy as np
from PIL import Image

from errors import Tolerate
from utils import flush_to_disk


class RunLog(AbstractContextManager):
    """Append to a run's logs, as a context that closes them; first drop the entries after `step`.

    A failed write costs the entry: a warning.

    Args:
        step: finished steps at the start; a resumed run logs the later ones again.
        use_tensorboard: write TensorBoard's event files too.

    Raises:
        OSError: the folder cannot be written at the start.
    """

    def __init__(self, folder: Path, step: int, use_tensorboard: bool):
        path, self._tolerate = folder / "metrics.jsonl", Tolerate("log entries")
        if path.exists():
            os.truncate(path, _size_up_to(path, step))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  a killed run keeps its entries
        self._writer = None
        if use_tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)  # marks later entries
            # An error would end tensorboardX's thread, and `add_scalar` would wait for it without end.
            with suppress(AttributeError):  # names that are its own, which another release may change
                events, tolerate = self._writer.file_writer.event_writer._ev_writer, Tolerate("TensorBoard's files")
                events.write_event, events.flush = tolerate(events.write_event), tolerate(events.flush)
                events.close = tolerate(events.close)

    def __exit__(self, *_: object) -> None:
        self._file.close()
        with self._tolerate:
            if self._writer:
                self._writer.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write a log entry. TensorBoard groups curves by the part of their name before "/"."""
        rounded = {name: float(f"{value:.9g}") for name, value in values.items()}  # a float32 has no more digits
        with self._tolerate:
            self._append((json.dumps({"step": step, **rounded}) + "\n").encode())
        with self._tolerate:
            for name, value in values.items() if self._writer else ():
                self._writer.add_scalar(name, value, step)

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(size)  # part of an entry would hide all that follow it
            raise

    def flush(self) -> None:
        """Force the entries so far to the disk."""
        with self._tolerate:
            flush_to_disk(self._file.fileno())

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Write an image, to TensorBoard only."""
        if self._writer:
            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")


def _size_up_to(path: Path, step: int) -> int:
    """Return the bytes of the leading entries up to `step`; a damaged or incomplete line ends them."""
    size = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):
                break
            size += len(line)
    return size
