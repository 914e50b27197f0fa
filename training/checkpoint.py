"""Save and load checkpoints.

A checkpoint is one file, `{step}_state.pth`: G, D and all else that the next step depends on. `{step}_G.pth` and
`{step}_D.pth` beside it are exports, plain state dicts that the reference reads too; a state file never needs them.
A checkpoint that is only for resuming has no exports, and is removed when it is no longer one of the newest.

Crash safety: all three files are written under temporary names and flushed to the disk, so that a full disk changes
nothing, then renamed, the state file first. A process killed between two renames leaves a complete checkpoint whose
exports are missing, or are those of an earlier save of the same step. In the other order it could leave exports without
a state file, which look like weights saved by the reference.
"""

import io
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.utils._pytree import tree_map_only

from errors import UserError, one_line, warn
from spectral import SUFFIXES
from utils import STEP, files_by_step, write_atomically

EXPORT_CONTENT, EXPORT_VERSION = "sagan-generator", "1"  # in the metadata of safetensors files
Name = int | str  # of a checkpoint: its step, as digits too, or "best"


@dataclass(frozen=True)
class Checkpoint:
    """State dicts of G and D on the CPU, and the state that was saved with them.

    `state` is None for weights without a state file, such as the reference's. `D` is None for a generator that came
    without its discriminator. `metadata` is that of a safetensors file. A new run that starts from a checkpoint
    (`is_initial`) takes the weights of G, its EMA and D, and nothing else.
    """

    step: int
    G: dict[str, Tensor]
    D: dict[str, Tensor] | None
    state: dict[str, Any] | None
    metadata: dict[str, str] | None = None
    is_initial: bool = False


def save(folder: Path, name: Name, state: Mapping[str, Any], *, export: bool = True, keep_checkpoints: int = 0) -> None:
    """Write a checkpoint, then remove old ones.

    All but the newest `keep_checkpoints` lose their state file and keep their exports; 0 keeps all. The state file also
    stays where a kill cost a checkpoint its exports, and where the checkpoint is of a later step or the best one.

    Args:
        folder: created if it is missing.
        name: the step, or "best", which replaces the best checkpoint so far.
        state: what the next step depends on, with the "step" and the state dicts to export, "G" and "D".
        export: write the exports; False for a checkpoint that is only for resuming.

    Raises:
        UserError: the disk is full, or the folder cannot be written. Earlier checkpoints are intact.
    """
    state = tree_map_only(Tensor, Tensor.cpu, {**state})  # so that the files load on machines without a GPU
    contents = {"state": state | {"exported": export}}  # renamed first
    if export:
        contents |= {"G": state["G"], "D": state["D"]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically({_path(folder, name, part): _to_bytes(content) for part, content in contents.items()})
        if name != "best":
            _prune(folder, name, keep_checkpoints)
    except OSError as error:
        reason = f"cannot write checkpoint {name} to {folder}: {error.strerror or error}"
        raise UserError(f"{reason}. Free space or permit writing, then go on with --pretrained_model auto") from error


def load(folder: Path, wanted: str | Path, *, needs_D: bool = True) -> Checkpoint:
    """Read a checkpoint to the CPU, with `weights_only=True`: code inside the files does not run.

    Args:
        wanted: a step, "best", or "latest", the first of `list_steps` that is not damaged, the best one if that is
            all there is; or the path of a `*_state.pth`, of a `*_G.pth` with its `*_D.pth` beside it, of an export, or
            of a `G.safetensors` with its `D.safetensors` beside it.
        needs_D: do not return a generator alone.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if isinstance(wanted, Path):
        return _load_file(wanted, needs_D)
    names = _candidates(folder, wanted, needs_D)
    for name in names:
        try:
            return _load_file(path_of(folder, name), needs_D)
        except UserError as error:
            if name == names[-1]:
                raise
            warn(f"{error}; falling back to the previous checkpoint")


def list_steps(folder: Path, *, needs_D: bool = True) -> list[int]:
    """Return the steps in the order of "latest": those with a state file, then those with weights; newest first."""
    full, weights = _full_and_weights(folder, needs_D)
    return full + [step for step in weights if step not in full]


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of a process killed while it saved. No other may be writing to the folder."""
    for path in folder.iterdir():
        if re.fullmatch(rf"(best|{STEP})_(state|G|D)\.pth\.tmp", path.name):
            path.unlink(missing_ok=True)


@contextmanager
def reraise_load_errors(name: Name) -> Iterator[None]:
    """Raise `UserError` for parts that are missing or have the wrong shape, while a checkpoint's content is used."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"checkpoint {name} is incomplete or incompatible: {one_line(error)}") from error


def has_state(folder: Path, name: Name) -> bool:
    """Return whether a checkpoint has its state file."""
    return _path(folder, name, "state").exists()


def has_any(folder: Path) -> bool:
    """Return whether "latest" finds a checkpoint in a folder: one of a step or, if there is none, the best one."""
    return bool(list_steps(folder)) or has_state(folder, "best")


def path_of(folder: Path, name: Name) -> Path:
    """Return the file that holds a checkpoint: its state, or the weights of G where there is none."""
    return _path(folder, name, "state" if has_state(folder, name) else "G")


def is_in(folder: Path, path: Path) -> bool:
    """Return whether a checkpoint's file is in this folder."""
    return path.resolve().parent == folder.resolve()


def peek(folder: Path, name: Name) -> dict[str, Any]:
    """Return the state of a checkpoint without reading its tensors; {} if it is missing or damaged."""
    try:
        return torch.load(_path(folder, name, "state"), map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # as in `read_dict`
        return {}


def read_dict(path: Path) -> dict[str, Any]:
    """Return the dict that a file of torch.save contains, on the CPU, read with `weights_only=True`.

    Raises:
        UserError: the file is missing, damaged or contains something else.
    """
    try:
        if zipfile.is_zipfile(path):  # torch does not verify the checksums in its own zip files
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise ValueError(f"wrong checksum of {broken}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"it contains a {type(content).__name__}, not a dict")
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}") from error
    except Exception as error:  # OSError, RuntimeError, UnpicklingError, BadZipFile, EOFError, ...: all kinds of damage
        # torch's messages are long, and advise to switch off `weights_only`.
        reason = str(error) if isinstance(error, (OSError, TypeError, ValueError)) else "torch cannot read it"
        raise UserError(f"{path} is damaged or not a checkpoint ({' '.join(reason.split())})") from error
    return content


def read_export(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights, in float32, and the metadata of a safetensors file, see `exporting.model_card`.

    Raises:
        UserError: the file is missing, damaged or not an export of this program.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  not a dict; not mapped
        weights = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
        if (metadata.get("content"), metadata.get("content_version")) != (EXPORT_CONTENT, EXPORT_VERSION):
            raise ValueError(f"its metadata does not say {EXPORT_CONTENT}, version {EXPORT_VERSION}")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or not an export of this program: {one_line(error)}") from error
    return weights, metadata


def is_folded(weights: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has plain weights in place of those of spectral norm, so cannot be trained."""
    return not any(key.endswith(SUFFIXES) for key in weights)


def _candidates(folder: Path, wanted: str, needs_D: bool) -> list[Name]:
    """Return the checkpoints that `wanted` may mean, in the order in which to try them; `UserError` if none."""
    if wanted == "best":
        if not has_state(folder, "best"):
            raise UserError(f"--pretrained_model best: none in {folder}; --metrics fid, kid or hog saves one")
        return ["best"]
    steps = list_steps(folder, needs_D=needs_D)
    if found := steps if wanted == "latest" else [step for step in steps if step == int(wanted)]:
        return found
    if wanted == "latest" and has_any(folder):
        return ["best"]
    if needs_D and (alone := [step for step in list_steps(folder, needs_D=False) if step not in steps]):
        missing = _path(folder, alone[0], "D")
        raise UserError(f"--pretrained_model {wanted}: {missing} is missing; only --train false can do without")
    if not steps:
        raise UserError(f"--pretrained_model {wanted}: no checkpoint in {folder}")
    newest = sorted(steps)[-12:]
    raise UserError(f"--pretrained_model {wanted}: not in {folder}; newest there: {', '.join(map(str, newest))}")


def _load_file(path: Path, needs_D: bool) -> Checkpoint:
    """Read a state file, a safetensors file, or weights, whose step is the number in their name, 0 without one."""
    name, _, ending = path.name.rpartition("_")
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors" and path.name != "D.safetensors":
        return _load_safetensors(path, needs_D)
    if ending == "state.pth":
        state = read_dict(path)
        with reraise_load_errors(name):
            return Checkpoint(state["step"], state["G"], state["D"], state)
    if ending != "G.pth":
        raise UserError(f"{path}: its name must end in _state.pth, _G.pth or .safetensors, and not be D.safetensors")
    D_path = path.with_name(f"{name}_D.pth")
    G, D = read_dict(path), read_dict(D_path) if _is_there(D_path, needs_D) else None
    with reraise_load_errors(name):
        for weights in filter(None, (G, D)):
            consume_prefix_in_state_dict_if_present(weights, "module.")  # of the reference's `--parallel`
    return Checkpoint(int(name) if name.isdecimal() else 0, G, D, None)


def _load_safetensors(path: Path, needs_D: bool) -> Checkpoint:
    """Read an export, which has no D, or a `G.safetensors` with the `D.safetensors` beside it."""
    (G, metadata), D, D_path = read_export(path), None, path.with_name("D.safetensors")
    if is_folded(G):
        if needs_D:
            raise UserError(f"{path} is an export, which has no discriminator; only --train false takes it")
    elif _is_there(D_path, needs_D):
        D, metadata_of_D = read_export(D_path)
        if metadata_of_D != metadata:
            raise UserError(f"{D_path} is not of the checkpoint that {path} is of")
    return Checkpoint(int(metadata["step"]), G, D, None, metadata)


def _is_there(D_path: Path, needs_D: bool) -> bool:
    """Return whether a generator's discriminator is beside it; `UserError` if it is not, but needed."""
    if needs_D and not D_path.exists():
        raise UserError(f"{D_path} is missing; only --train false can do without")
    return D_path.exists()


def _path(folder: Path, name: Name, part: str) -> Path:
    return folder / f"{name}_{part}.pth"


def _full_and_weights(folder: Path, needs_D: bool = True) -> tuple[list[int], list[int]]:
    """Return the steps with a state file, and those with exported weights, each newest first."""
    state, G, D = (files_by_step(folder, f"{part}.pth").keys() for part in ("state", "G", "D"))
    return sorted(state, reverse=True), sorted(G & D if needs_D else G, reverse=True)


def _to_bytes(content: Mapping[str, Any]) -> memoryview:
    buffer = io.BytesIO()  # torch.save to a file would turn a full disk's OSError into a RuntimeError
    torch.save(dict(content), buffer)
    return buffer.getbuffer()


def _prune(folder: Path, newest: int, keep_checkpoints: int) -> None:
    """Remove old state files up to step `newest`, see `save`."""
    full, weights = _full_and_weights(folder)
    for step in [step for step in full if step <= newest][keep_checkpoints or len(full) :]:
        if step in weights or not peek(folder, step).get("exported", True):
            _path(folder, step, "state").unlink()
