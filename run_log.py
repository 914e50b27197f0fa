"""What a run writes down: a line of numbers in `metrics.jsonl`, and the same for TensorBoard where asked for."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image


class RunLog:
    """Appends to a run's logs; lines of steps after `step`, which a continued run takes again, are dropped first.

    Args:
        folder: the run's log folder.
        step: finished steps at the start.
        use_tensorboard: write TensorBoard's event files too.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int, use_tensorboard: bool):
        path = folder / "metrics.jsonl"
        if path.exists():
            os.truncate(path, _length_up_to(step, path.read_bytes()))
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  a killed run keeps its lines
        self._writer = None
        if use_tensorboard:
            from tensorboardX import SummaryWriter  # a second to import: only for those who ask

            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl; a name's part before "/" groups its curves in TensorBoard."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Writes the lines so far through to the disk."""
        os.fsync(self._file.fileno())

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """A picture for TensorBoard."""
        if self._writer:
            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")


def _length_up_to(step: int, content: bytes) -> int:
    """How many bytes of metrics.jsonl belong to steps up to `step`; a line that was cut off ends them too."""
    length = 0
    for line in content.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                break
        except (ValueError, KeyError, TypeError):
            break
        length += len(line)
    return length
