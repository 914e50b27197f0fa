"""What a run writes down: a line of numbers in `metrics.jsonl`, and the same for TensorBoard where asked for."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHUNK = 1 << 16  # bytes of the log that are parsed at once, which holds up other threads for about half a millisecond


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
            os.truncate(path, sum(len(line) for line, _ in _lines(path.read_bytes(), step)))
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
        rounded = {name: float(f"{value:.9g}") for name, value in values.items()}  # a float32 has no more digits
        self._file.write(json.dumps({"step": step, **rounded}) + "\n")
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


def read_curves(folder: Path, step: int) -> dict[str, np.ndarray]:
    """The curves in a log folder's `metrics.jsonl` up to `step`: under each name its points, (n, 2) as (step, value).

    In order, and without what is not a finite number. Lines that are no JSON objects with a step, such as a last one
    that was cut off, are left out.
    """
    tables: dict[tuple[str, ...], list[np.ndarray]] = {}  # by the names in a line: an evaluation adds some to its line
    with suppress(FileNotFoundError), open(folder / "metrics.jsonl", encoding="utf-8", errors="replace") as file:
        while lines := file.readlines(CHUNK):
            rows = [row for row in _parse(lines) if type(row.get("step")) is int and row["step"] <= step]
            for names, alike in groupby(rows, key=tuple):
                tables.setdefault(names, []).append(_table(list(alike)))
    curves: dict[str, list[np.ndarray]] = {}
    for names, blocks in tables.items():
        columns = dict(zip(names, np.concatenate(blocks).T, strict=True))
        steps = columns.pop("step")
        for name, values in columns.items():
            curves.setdefault(name, []).append(np.stack([steps, values], axis=1))
    return {name: _in_order(np.concatenate(parts)) for name, parts in curves.items()}


def _in_order(points: np.ndarray) -> np.ndarray:
    """The finite ones of points (n, 2), by step."""
    points = points[np.isfinite(points).all(axis=1)]
    return points[np.argsort(points[:, 0], kind="stable")]


def _parse(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The JSON objects in lines; all at once, which is quicker, unless one of them is damaged."""
    try:
        rows = json.loads("[" + ",".join(lines) + "]")
    except ValueError:
        rows = []
        for line in lines:
            with suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def _table(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """The values of dicts with the same keys, (rows, keys); what is not a number becomes NaN."""
    try:
        return np.fromiter(chain.from_iterable(map(dict.values, rows)), float).reshape(len(rows), -1)
    except (TypeError, ValueError, OverflowError):
        return np.array([[value if _is_number(value) else np.nan for value in row.values()] for row in rows], float)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _lines(content: bytes, step: int) -> Iterator[tuple[bytes, dict[str, float]]]:
    """The lines of metrics.jsonl of steps up to `step`, as they are and read; a line that was cut off ends them."""
    for line in content.splitlines(keepends=True):
        try:
            numbers = json.loads(line)
            if numbers["step"] > step or not line.endswith(b"\n"):
                return
        except (ValueError, KeyError, TypeError):
            return
        yield line, numbers
