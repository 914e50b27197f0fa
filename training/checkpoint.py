"""Checkpoints: written whole or not at all, found by step, checked against the networks they go into.

A checkpoint of step 500 is three files: `500_G.pth` and `500_D.pth`, plain state dicts that the reference reads too,
and `500_state.pth` with all else the next step depends on, and the checksums of the other two. The state file appears
last: where it is, all is.
"""

import hashlib
import io
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from errors import UserError, warn
from utils import files_by_step

PARTS = ("G", "D", "state")  # in the order in which the files appear


@dataclass(frozen=True)
class Checkpoint:
    """What was read: the networks' state dicts, and the state, None for weights saved by the reference."""

    step: int
    G: dict[str, Tensor]
    D: dict[str, Tensor]
    state: dict[str, Any] | None


def save(
    folder: Path,
    step: int | Literal["best"],
    G: Mapping[str, Tensor],
    D: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep_checkpoints: int = 0,
    keep_weights: int = 0,
) -> None:
    """Writes the three files of a checkpoint; each appears under its name only when all are whole and on the disk.

    "best" in place of the step writes `best_G.pth` ..., beside the numbered ones and in place of the best before.
    Older checkpoints are thinned out afterwards: all but the newest `keep_checkpoints` lose their state file, and of
    those all but the newest `keep_weights` their weights. 0 keeps all. Nothing newer than `step` is touched.

    Raises:
        UserError: the disk is full, or the folder cannot be written; what was there before is as it was.
    """
    temporary = {part: _path(folder, step, part).with_suffix(".tmp") for part in PARTS}
    try:
        digests = {part: _write(temporary[part], content) for part, content in (("G", G), ("D", D))}
        _write(temporary["state"], {**state, "sha256": digests})
        for part in PARTS:
            os.replace(temporary[part], _path(folder, step, part))
        _flush_folder(folder)
        if step != "best":
            _prune(folder, step, keep_checkpoints, keep_weights)
    except OSError as error:
        raise UserError(
            f"checkpoint {step} cannot be written to {folder}: {error.strerror or error}. The older ones are as they "
            "were: put that right, then continue with --pretrained_model latest"
        ) from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def load(folder: Path, wanted: str, architecture: Mapping[str, int]) -> Checkpoint:
    """Reads a checkpoint to the CPU. Files are read with `weights_only=True`: code inside them does not run.

    Args:
        folder: where the checkpoints are.
        wanted: a step, "best", or "latest": the newest with a state file, else the newest weights; damaged ones are
            passed over with a warning.
        architecture: the imsize, z_dim, g_conv_dim and d_conv_dim of the networks that it is for.

    Raises:
        UserError: there is none, it cannot be read, or it belongs to other networks.
    """
    found = _candidates(folder, wanted)
    for step in found:
        try:
            checkpoint = _load(folder, step)
            break
        except UserError as error:
            if step == found[-1]:
                raise
            warn(f"{error}; taking the one before it")
    _check_architecture(checkpoint, architecture)
    return checkpoint


def _candidates(folder: Path, wanted: str) -> list[int | Literal["best"]]:
    """The checkpoints that `wanted` may mean, the one to take first; a `UserError` where there is none."""
    if wanted == "best":
        if not _path(folder, "best", "state").exists():
            raise UserError(f"--pretrained_model best: none in {folder}; a run with --metrics fid keeps one")
        return ["best"]
    found = steps(folder)
    if not found:
        raise UserError(f"--pretrained_model {wanted}: there is no checkpoint in {folder}")
    if wanted == "latest":
        return found
    if int(wanted) not in found:
        raise UserError(f"--pretrained_model {wanted}: not in {folder}, which has {_list(sorted(found))}")
    return [int(wanted)]


def steps(folder: Path) -> list[int]:
    """The checkpoints in a folder, best to continue from first: the whole ones, then the weights alone, newest first.

    Weights whose state file was about to follow when the process was killed are none.
    """
    whole, unfinished, G, D = (
        files_by_step(folder, ending).keys() for ending in ("state.pth", "state.tmp", "G.pth", "D.pth")
    )
    weights = G & D
    return sorted(weights & whole, reverse=True) + sorted(weights - whole - unfinished, reverse=True)


def remove_unfinished(folder: Path) -> None:
    """Clears away what a process left that was killed while it saved. No other may be writing to the folder."""
    for step in files_by_step(folder, "state.tmp").keys() - files_by_step(folder, "state.pth").keys():
        for part in ("G", "D"):
            _path(folder, step, part).unlink(missing_ok=True)
    for part in PARTS:  # the state last: until it is gone, `steps` knows
        for path in folder.glob(f"*_{part}.tmp"):
            path.unlink(missing_ok=True)


@contextmanager
def complete(step: int | Literal["best"]) -> Iterator[None]:
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


def _path(folder: Path, step: int | Literal["best"], part: str) -> Path:
    return folder / f"{step}_{part}.pth"


def _list(steps: list[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:3], "...", *shown[-8:]])


def _load(folder: Path, step: int | Literal["best"]) -> Checkpoint:
    """The checkpoint of that step, or the best one; a `UserError` where one of its files is not what was written."""
    state_path = _path(folder, step, "state")
    state = _read(state_path) if state_path.exists() else None
    digests = (state or {}).get("sha256")
    digests = digests if isinstance(digests, dict) else {}  # an older version's state file has none
    G, D = (_read(_path(folder, step, part), digests.get(part)) for part in ("G", "D"))
    with complete(step):
        return Checkpoint(state["step"] if step == "best" else step, _strip_parallel(G), _strip_parallel(D), state)


def _read(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """The dict that a file holds, once its checksums all_equal: `sha256`, and those that a zip file has inside."""
    try:
        content = path.read_bytes()
        if sha256 not in (None, hashlib.sha256(content).hexdigest()):
            raise ValueError("it is not the file that was saved with its state file")
        if content.startswith(b"PK"):  # torch does not look at the checksums in its own zip files
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if broken := archive.testzip():
                    raise ValueError(f"wrong checksum of {broken}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the file was pickled: nothing the user can put right
            content = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # RuntimeError, UnpicklingError, BadZipFile, EOFError, ... by what is wrong with it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"checkpoint {path} is damaged or is none: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not a state dict")
    return content


def _write(path: Path, content: Mapping[str, Any]) -> str:
    """Writes a file through to the disk; returns its SHA-256."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    with open(path, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def _flush_folder(folder: Path) -> None:
    """Writes a folder's entries through to the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prune(folder: Path, newest: int, keep_checkpoints: int, keep_weights: int) -> None:
    """Thins out the checkpoints up to step `newest`, see `save`."""
    found = sorted((step for step in steps(folder) if step <= newest), reverse=True)
    whole = [step for step in found if _path(folder, step, "state").exists()]
    kept = whole[: keep_checkpoints or None]
    for step in set(whole) - set(kept):
        _path(folder, step, "state").unlink()
    if keep_weights:
        for step in [step for step in found if step not in kept][keep_weights:]:
            for part in ("G", "D"):
                _path(folder, step, part).unlink()


def _strip_parallel(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's `--parallel` puts "module." before every key."""
    if all(key.startswith("module.") for key in weights):
        return {key.removeprefix("module."): value for key, value in weights.items()}
    return weights
