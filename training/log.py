"""The log of a run: scalars in `metrics.jsonl`, and on request scalars and images for TensorBoard."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image


class RunLog:
    """Append to a run's logs, as a context that closes them; first drop the entries after `step`.

    Args:
        folder: the run's log folder.
        step: finished steps at the start; a resumed run logs the later ones again.
        use_tensorboard: write TensorBoard's event files too.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int, use_tensorboard: bool):
        path = folder / "metrics.jsonl"
        if path.exists():
            os.truncate(path, _size_up_to(path, step))
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  a killed run keeps its entries
        self._writer = None
        if use_tensorboard:
            from tensorboardX import SummaryWriter  # takes a second to import

            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write a log entry. TensorBoard groups curves by the part of their name before "/"."""
        rounded = {name: float(f"{value:.9g}") for name, value in values.items()}  # a float32 has no more digits
        self._file.write(json.dumps({"step": step, **rounded}) + "\n")
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Force the entries so far to the disk."""
        os.fsync(self._file.fileno())

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
