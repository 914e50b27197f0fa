"""Continue from a checkpoint: find it, compare its options and images, advise after a non-finite loss."""

import dataclasses
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from errors import warn
from parameter import Config, option_text
from training import checkpoint
from training.guards import NonFiniteError
from training.optimizers import Adam, Schedule

DATA_OPTIONS = ("dataset", "image_path", "crop_size", "toy_num", "attribute")


def load_resume_checkpoint(config: Config, classes: Sequence[str] = ()) -> checkpoint.Checkpoint | None:
    """Return the checkpoint that `--pretrained_model` names, None for a new run.

    Args:
        classes: of the training images.

    Raises:
        UserError: there is none, it cannot be read, or it is of other networks or classes.
    """
    wanted = config.pretrained_file or config.pretrained_model
    if wanted == "auto":
        wanted = "latest" if checkpoint.list_steps(config.model_folder) else None
    if wanted is None:
        return None
    saved = checkpoint.load(config.model_folder, wanted)
    checkpoint.check_architecture(saved, config.architecture)
    checkpoint.check_classes(saved, classes)
    return saved


@dataclass
class TrainingState:
    """All that the next step depends on, saved and loaded as one; random numbers and batches follow from seed and step.

    Attributes:
        step: finished steps.
        ema: the network of the EMA.
        fixed_z: latents (B, z_dim) of the sample grids.
    """

    step: int
    G: nn.Module
    D: nn.Module
    ema: nn.Module
    g_optimizer: Adam
    d_optimizer: Adam
    fixed_z: Tensor
    schedule: Schedule

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, tensors and state dicts by the names above."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        parts["schedule"] = dataclasses.asdict(self.schedule)
        return {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint; from weights alone, such as the reference's, with new optimizers and a new EMA.

        Raises:
            UserError: it is incomplete or of other networks.
        """
        self.step = saved.step
        parts = saved.state or {"G": saved.G, "D": saved.D, "ema": saved.G}
        with checkpoint.reraise_load_errors(saved.step):
            for name in ("G", "D", "ema", "g_optimizer", "d_optimizer") if saved.state else parts:
                getattr(self, name).load_state_dict(parts[name])
            if saved.state:
                self.fixed_z = saved.state["fixed_z"].to(self.fixed_z.device)
                self.schedule = self.schedule.resumed(Schedule(**saved.state["schedule"]), saved.step)


def print_resumed(saved: checkpoint.Checkpoint, config: Config) -> None:
    """Print what a run resumes from, and which options differ."""
    if saved.state is None:
        if saved.step:  # weights of step 0 are initial ones
            warn(f"checkpoint {saved.step} has weights only: optimizers and EMA are reinitialized")
        return
    changes = changed_options(saved.state["config"], config)
    print(f"resuming from step {saved.step}" + (f"; changed options: {', '.join(changes)}" if changes else ""))


def load_test_checkpoint(config: Config, given: Set[str]) -> tuple[checkpoint.Checkpoint, Config]:
    """Return the checkpoint that `--train false` evaluates, and the options with those of its networks and data.

    Options on the command line are kept; a line says which others are the checkpoint's, and which differ from it. The
    results of a file go to the `--version` that its folder is named after, unless the command line has another.

    Args:
        given: names of the options on the command line.

    Raises:
        UserError: there is none, it cannot be read, or it is of other networks than the command line says.
    """
    wanted = "latest" if config.pretrained_model in (None, "auto") else config.pretrained_model
    saved = checkpoint.load(config.model_folder, config.pretrained_file or wanted, needs_D=False)
    checkpoint.check_architecture(saved, {name: getattr(config, name) for name in config.architecture if name in given})
    with checkpoint.reraise_load_errors(saved.step):
        options = saved.state["config"] if saved.state else {}
        names = (*config.architecture, "seed", "batch_size", *DATA_OPTIONS)
        options = {name: options[name] for name in names if name in options} | checkpoint.saved_architecture(saved)
        if "dataset" in given and config.dataset != options.get("dataset"):  # its path and crop are of other images
            options = {name: value for name, value in options.items() if name not in DATA_OPTIONS[1:]}
        if config.pretrained_file:
            folders = (folder.name for folder in config.pretrained_file.absolute().parents)
            options["version"] = next((name for name in folders if name and not name.isdecimal()), config.version)
        adopted = {name: options[name] for name in options if name not in given}
        adopted = {name: value for name, value in adopted.items() if value != getattr(config, name)}
        tested = dataclasses.replace(config, **adopted)
    if adopted:
        print("from the checkpoint: " + " ".join(f"--{name} {option_text(value)}" for name, value in adopted.items()))
    different = {name: value for name, value in options.items() if name != "version" and value != getattr(tested, name)}
    if different:
        trained_with = (f"--{name} {option_text(value)}" for name, value in different.items())
        warn("the checkpoint was trained with " + " ".join(trained_with))
    return saved, tested


def warn_of_other_images(saved: Mapping[str, int] | None, current: Mapping[str, int]) -> None:
    """Print a warning if the images are not those that a checkpoint was trained with, if it says which.

    Args:
        saved, current: `Loader.identity` then and now.
    """
    if saved is None or saved == current:
        return
    if saved["images"] == current["images"]:
        warn(f"the {current['images']:,} training images are not those of the checkpoint")
    else:
        warn(f"there are {current['images']:,} training images; the checkpoint was trained with {saved['images']:,}")


def changed_options(saved: dict[str, Any], config: Config) -> list[str]:
    """List how this run's options differ from those in a checkpoint, maybe of another version of this program."""
    current = dataclasses.asdict(config)
    # The default of an option that an older version lacks is what that version did.
    saved = {field.name: field.default for field in dataclasses.fields(config)} | saved
    changes = []
    for name in current | saved:
        if name in ("pretrained_model", "overwrite", "version"):  # these are expected to differ
            continue
        if name not in current:
            changes.append(f"{name} {option_text(saved[name])} (no longer an option)")
        elif current[name] != saved[name]:
            changes.append(f"--{name} {option_text(current[name])} (was {option_text(saved[name])})")
    return changes


def non_finite_message(config: Config, error: NonFiniteError) -> str:
    """Return the error line of a run that diverged: what happened, and the command to resume with."""
    steps = checkpoint.list_steps(config.model_folder)
    if not steps:
        return f"the run diverged: {error}. No checkpoint was saved: start again with lower --g_lr and --d_lr"
    command = config.command_line(pretrained_model=str(steps[0]))
    return f"the run diverged: {error}. Resume from the last checkpoint with lower --g_lr and --d_lr: {command}"
