"""Checkpoints: written whole or not at all, found by step, checked against the networks they go into.

A checkpoint of step 500 is three files: `500_G.pth` and `500_D.pth`, plain state dicts that the reference reads too,
and `500_state.pth` with all else the next step depends on. The state file is written last: where it is, all is.
"""

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """What was read: the networks' state dicts, and the state, None for weights saved by the reference."""

    step: int
    G: dict[str, Tensor]
    D: dict[str, Tensor]
    state: dict[str, Any] | None


def save(folder: Path, step: int, G: Mapping[str, Tensor], D: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes the three files of a checkpoint; each appears under its name only when it is whole and on the disk.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    for part, content in (("G", G), ("D", D), ("state", state)):
        path = _path(folder, step, part)
        temporary = path.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def load(folder: Path, wanted: str, architecture: Mapping[str, int]) -> Checkpoint:
    """Reads a checkpoint to the CPU. Files are read with `weights_only=True`: code inside them does not run.

    Args:
        folder: where the checkpoints are.
        wanted: a step, or "latest": the newest with a state file, else the newest weights.
        architecture: the imsize, z_dim, g_conv_dim and d_conv_dim of the networks that it is for.

    Raises:
        UserError: there is none, it cannot be read, or it belongs to other networks.
    """
    step = _find(folder, wanted)
    state_path = _path(folder, step, "state")
    checkpoint = Checkpoint(
        step,
        _strip_parallel(_read(_path(folder, step, "G"))),
        _strip_parallel(_read(_path(folder, step, "D"))),
        _read(state_path) if state_path.exists() else None,
    )
    _check_architecture(checkpoint, architecture)
    return checkpoint


@contextmanager
def complete(step: int) -> Iterator[None]:
    """Around the use of what was loaded: turns the errors of missing or misshapen parts into a `UserError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"checkpoint {step} is not complete: {type(error).__name__}: {reason[:200]}") from error


def _check_architecture(checkpoint: Checkpoint, expected: Mapping[str, int]) -> None:
    """Compares the sizes of the saved networks with those expected; names the options that differ."""
    try:
        saved = {
            "imsize": 4 * 2 ** sum(bool(re.fullmatch(r"l\d+\.0\.module\.weight_bar", key)) for key in checkpoint.G),
            "z_dim": checkpoint.G["l1.0.module.weight_bar"].shape[0],
            "g_conv_dim": checkpoint.G["last.0.weight"].shape[0],
            "d_conv_dim": checkpoint.D["l1.0.module.weight_bar"].shape[0],
        }
    except (KeyError, AttributeError, IndexError) as error:
        raise UserError(f"checkpoint {checkpoint.step} does not hold SAGAN's networks: {error}") from error
    different = [
        f"--{name} {saved[name]} (this run: {expected[name]})" for name in saved if saved[name] != expected[name]
    ]
    if different:
        raise UserError(f"checkpoint {checkpoint.step} was trained with another network: {', '.join(different)}")


def _path(folder: Path, step: int, part: str) -> Path:
    return folder / f"{step}_{part}.pth"


def _find(folder: Path, wanted: str) -> int:
    """The step that is meant by a step or "latest"."""
    found = {
        part: {
            int(path.name.split("_")[0])
            for path in folder.glob(f"*_{part}.pth")
            if re.fullmatch(rf"\d+_{part}\.pth", path.name)
        }
        for part in ("G", "D", "state")
    }
    steps = found["G"] & found["D"]
    if not steps:
        raise UserError(f"--pretrained_model {wanted}: there is no checkpoint in {folder}")
    if wanted == "latest":
        return max(steps & found["state"] or steps)
    if int(wanted) not in steps:
        raise UserError(f"--pretrained_model {wanted}: not in {folder}, which has {_list(sorted(steps))}")
    return int(wanted)


def _list(steps: list[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:3], "...", *shown[-8:]])


def _read(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the file was pickled: nothing the user can put right
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... by what is wrong with the file
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} is damaged or is none: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not a state dict")
    return content


def _strip_parallel(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's `--parallel` puts "module." before every key."""
    if all(key.startswith("module.") for key in weights):
        return {key.removeprefix("module."): value for key, value in weights.items()}
    return weights
