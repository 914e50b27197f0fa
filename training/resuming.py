"""Resume a run: find its checkpoint, compare its options, advise after a non-finite loss."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from parameter import Config
from training import checkpoint
from training.divergence import NonFiniteError


def load_resume_checkpoint(config: Config) -> checkpoint.Checkpoint | None:
    """Return the checkpoint that `--pretrained_model` names, None for a new run.

    Raises:
        UserError: there is none, it cannot be read, or it is of other networks.
    """
    wanted = config.pretrained_model
    if wanted == "auto":
        wanted = "latest" if checkpoint.list_steps(config.model_folder) else None
    return checkpoint.load(config.model_folder, wanted, config.architecture) if wanted else None


def changed_options(saved: Mapping[str, Any], config: Config) -> list[str]:
    """List how this run's options differ from those in a checkpoint, maybe of another version of this program."""
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


def non_finite_message(config: Config, error: NonFiniteError) -> str:
    """Return the error line of a run that diverged: what happened, and the command to resume with."""
    steps = checkpoint.list_steps(config.model_folder)
    if not steps:
        return f"the run diverged: {error}. No checkpoint was saved: start again with lower --g_lr and --d_lr"
    command = config.command_line(pretrained_model=str(steps[0]))
    return f"the run diverged: {error}. Resume from the last checkpoint with lower --g_lr and --d_lr: {command}"
