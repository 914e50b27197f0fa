"""Save and load checkpoints.

A checkpoint is one file, `{step}_state.pth`: G, D and all else that the next step depends on. `{step}_G.pth` and
`{step}_D.pth` beside it are exports, plain state dicts that the reference reads too; a state file never needs them.

Crash safety: all three files are written under temporary names and flushed to the disk, so that a full disk changes
nothing. Then the state file is renamed, and the exports after it. A process killed before the first rename leaves the
earlier checkpoints as they were; one killed after it leaves a complete checkpoint whose exports are missing, or are
those of an earlier save of the same step. In the other order it could leave exports without a state file, which look
like weights saved by the reference.
"""

import io
import os
import re
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

PARTS = ("state", "G", "D")  # in the order in which the files are renamed
Name = int | Literal["best"]  # of a checkpoint: its step, or "best"


@dataclass(frozen=True)
class Checkpoint:
    """State dicts of G and D on the CPU, and the state that was saved with them.

    `state` is None for weights without a state file: those saved by the reference, and those of old checkpoints.
    """

    step: int
    G: dict[str, Tensor]
    D: dict[str, Tensor]
    state: dict[str, Any] | None


def save(folder: Path, name: Name, state: Mapping[str, Any], keep_checkpoints: int = 0, keep_weights: int = 0) -> None:
    """Write a checkpoint and its exports, then remove old ones.

    All but the newest `keep_checkpoints` lose their state file, if their weights are exported, and of those all but
    the newest `keep_weights` lose their exports too; 0 keeps all. Checkpoints after `name` and "best" are not removed.

    Args:
        folder: where the checkpoints are.
        name: the step, or "best", which replaces the best checkpoint so far.
        state: what the next step depends on. "G" and "D" are the state dicts to export, "step" names the step.

    Raises:
        UserError: the disk is full, or the folder cannot be written. Earlier checkpoints are intact.
    """
    temporary = {part: _path(folder, name, part).with_suffix(".tmp") for part in PARTS}
    try:
        for part, content in (("state", state), ("G", state["G"]), ("D", state["D"])):
            _write(temporary[part], content)
        for part in PARTS:
            os.replace(temporary[part], _path(folder, name, part))
        _sync_folder(folder)
        if name != "best":
            _prune(folder, name, keep_checkpoints, keep_weights)
    except OSError as error:
        raise UserError(
            f"cannot write checkpoint {name} to {folder}: {error.strerror or error}. Earlier checkpoints are intact: "
            "free space or permit writing, then resume with --pretrained_model latest"
        ) from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def load(folder: Path, wanted: str, architecture: Mapping[str, int]) -> Checkpoint:
    """Read a checkpoint to the CPU, with `weights_only=True`: code inside the files does not run.

    Args:
        folder: where the checkpoints are.
        wanted: a step, "best", or "latest", the first of `list_steps` that is not damaged.
        architecture: imsize, z_dim, g_conv_dim and d_conv_dim of the networks to load it into.

    Raises:
        UserError: there is none, it cannot be read, or it is of other networks.
    """
    names = _candidates(folder, wanted)
    for name in names:
        try:
            checkpoint = _load(folder, name)
            break
        except UserError as error:
            if name == names[-1]:
                raise
            warn(f"{error}; falling back to the previous checkpoint")
    _check_architecture(checkpoint, architecture)
    return checkpoint


def list_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder in the order in which "latest" tries them.

    Those with a state file come first, then those with weights only, each newest first.
    """
    full, weights = _full_and_weights(folder)
    return full + [step for step in weights if step not in full]


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of a process killed while it saved. No other may be writing to the folder."""
    for part in PARTS:
        for path in folder.glob(f"*_{part}.tmp"):
            path.unlink(missing_ok=True)


@contextmanager
def reraise_load_errors(name: Name) -> Iterator[None]:
    """Raise `UserError` for parts that are missing or have the wrong shape, while a checkpoint's content is used."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"checkpoint {name} is incomplete or incompatible: {_one_line(error)}") from error


def _candidates(folder: Path, wanted: str) -> list[Name]:
    """Return the checkpoints that `wanted` may mean, in the order in which to try them; `UserError` if none."""
    if wanted == "best":
        if not _path(folder, "best", "state").exists():
            raise UserError(f"--pretrained_model best: none in {folder}; a run with --metrics fid saves one")
        return ["best"]
    steps = list_steps(folder)
    if not steps:
        raise UserError(f"--pretrained_model {wanted}: no checkpoint in {folder}")
    if wanted == "latest":
        return steps
    if int(wanted) not in steps:
        newest = sorted(steps)[-12:]
        raise UserError(f"--pretrained_model {wanted}: not in {folder}; newest there: {', '.join(map(str, newest))}")
    return [int(wanted)]


def _load(folder: Path, name: Name) -> Checkpoint:
    state_path = _path(folder, name, "state")
    state = _read(state_path) if state_path.exists() else None
    networks = state or {}
    if "G" not in networks:  # weights only, or a state file of an older version, which left G and D to their own files
        networks = {part: _read(_path(folder, name, part)) for part in ("G", "D")}
    with reraise_load_errors(name):
        G, D = (_strip_dataparallel_prefix(networks[part]) for part in ("G", "D"))
        return Checkpoint(state["step"] if name == "best" else name, G, D, state)


def _check_architecture(checkpoint: Checkpoint, expected: Mapping[str, int]) -> None:
    """Raise `UserError` that names the options if the saved networks have other sizes than expected."""
    try:
        saved = {
            "imsize": 4 * 2 ** sum(bool(re.fullmatch(r"l\d+\.0\.module\.weight_bar", key)) for key in checkpoint.G),
            "z_dim": checkpoint.G["l1.0.module.weight_bar"].shape[0],
            "g_conv_dim": checkpoint.G["last.0.weight"].shape[0],
            "d_conv_dim": checkpoint.D["l1.0.module.weight_bar"].shape[0],
        }
    except (KeyError, AttributeError, IndexError) as error:
        raise UserError(f"checkpoint {checkpoint.step} does not contain SAGAN's networks: {error}") from error
    different = [f"--{name} {saved[name]} (not {expected[name]})" for name in saved if saved[name] != expected[name]]
    if different:
        raise UserError(f"checkpoint {checkpoint.step} is of another architecture: it needs {', '.join(different)}")


def _path(folder: Path, name: Name, part: str) -> Path:
    return folder / f"{name}_{part}.pth"


def _full_and_weights(folder: Path) -> tuple[list[int], list[int]]:
    """Return the steps with a state file, and those with weights of both networks, each newest first."""
    state, G, D = (files_by_step(folder, f"{part}.pth").keys() for part in PARTS)
    return sorted(state, reverse=True), sorted(G & D, reverse=True)


def _read(path: Path) -> dict[str, Any]:
    """Return the dict that a file contains; `UserError` if it is damaged."""
    try:
        if zipfile.is_zipfile(path):  # torch does not verify the checksums in its own zip files
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise ValueError(f"wrong checksum of {broken}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"it contains a {type(content).__name__}, not a dict")
    except Exception as error:  # OSError, RuntimeError, UnpicklingError, BadZipFile, EOFError, ...: all kinds of damage
        raise UserError(f"{path} is damaged or not a checkpoint: {_one_line(error)}") from error
    return content


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file and flush it to the disk."""
    buffer = io.BytesIO()  # torch.save to a file would turn a full disk's OSError into a RuntimeError
    torch.save(dict(content), buffer)
    with open(path, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk: a power failure could undo a rename otherwise."""
    if os.name == "posix":  # Windows cannot open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prune(folder: Path, newest: int, keep_checkpoints: int, keep_weights: int) -> None:
    """Remove old state files and exports up to step `newest`, see `save`."""
    full, weights = ([step for step in steps if step <= newest] for steps in _full_and_weights(folder))
    kept = full[: keep_checkpoints or None]
    for step in (set(full) - set(kept)) & set(weights):
        _path(folder, step, "state").unlink()
    if keep_weights:
        for step in [step for step in weights if step not in kept][keep_weights:]:
            for part in ("G", "D"):
                _path(folder, step, part).unlink()


def _strip_dataparallel_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the "module." that the reference's `--parallel` puts before every key."""
    if all(key.startswith("module.") for key in weights):
        return {key.removeprefix("module."): value for key, value in weights.items()}
    return weights
