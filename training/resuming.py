"""Going on with an earlier run: which checkpoint is meant, what is different now, what to do after a divergence."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from parameter import Config
from training import checkpoint
from training.divergence import NonFiniteError


def load_resume_checkpoint(config: Config) -> checkpoint.Checkpoint | None:
    """The checkpoint that `--pretrained_model` asks for, None for a new run.

    Raises:
        UserError: it is not there, cannot be read, or belongs to other networks.
    """
    wanted = config.pretrained_model
    if wanted == "auto":
        wanted = "latest" if checkpoint.steps(config.model_folder) else None
    return checkpoint.load(config.model_folder, wanted, config.architecture) if wanted else None


def changed_options(saved: Mapping[str, Any], config: Config) -> list[str]:
    """How the options of a checkpoint, maybe of another version of this program, differ from those of this run."""
    current = dataclasses.asdict(config)
    changes = []
    for name in current | saved:
        if name in ("pretrained_model", "overwrite"):  # these are expected to differ
            continue
        if name not in current:
            changes.append(f"{name} {saved[name]} (no longer an option)")
        elif name not in saved:
            changes.append(f"--{name} {current[name]} (new)")
        elif current[name] != saved[name]:
            changes.append(f"--{name} {current[name]} (was {saved[name]})")
    return changes


def advice(config: Config, error: NonFiniteError) -> str:
    """What to do about a run that diverged."""
    good = checkpoint.steps(config.model_folder)
    if not good:
        return f"the run diverged: {error}. Nothing was saved; begin anew with lower --g_lr and --d_lr"
    command = config.command(pretrained_model=str(good[0]))
    return f"the run diverged: {error}. Continue from the last good checkpoint, with lower --g_lr and --d_lr: {command}"
