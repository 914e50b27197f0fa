"""Continue from a checkpoint: find it, compare its options and images, advise after a non-finite loss."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from datasets.labels import join_names
from errors import UserError, warn
from parameter import Config, option_text
from spectral import fold_spectral_norm
from training import checkpoint
from training.guards import NonFiniteError
from training.models import build_networks, recognize
from training.optimizers import Adam

DATA_OPTIONS = ("dataset", "image_path", "crop_size", "toy_num", "attribute")


def load_resume_checkpoint(config: Config) -> checkpoint.Checkpoint | None:
    """Return the checkpoint that `--pretrained_model` or, for a new run, `--init_from` names; None without one.

    Raises:
        UserError: there is none, it cannot be read, or it is of other networks.
    """
    wanted = config.pretrained_file or config.pretrained_model
    is_new = wanted is None or (wanted == "auto" and not checkpoint.has_any(config.model_folder))
    if is_new:
        if config.init_from is None:
            return None
        wanted = Path(os.path.expanduser(config.init_from))
        wanted = wanted / "G.safetensors" if wanted.is_dir() else wanted
        if not wanted.is_file():
            raise UserError(
                f"--init_from {config.init_from}: there is no {wanted}; it takes a {{step}}_state.pth, "
                "a {step}_G.pth with its D beside it, or a folder with G.safetensors and D.safetensors"
            )
        if config.overwrite and checkpoint.is_in(config.model_folder, wanted):
            raise UserError(f"--overwrite true would delete {wanted}: move it, or choose another --version")
    saved = checkpoint.load(config.model_folder, "latest" if wanted == "auto" else wanted)
    saved = dataclasses.replace(saved, is_initial=is_new)
    check_architecture(saved, config.architecture)
    if checkpoint.is_folded(saved.G):
        raise UserError(f"checkpoint {saved.step} has spectral norm folded in; only --train false takes it")
    return saved


class TestNetworks(NamedTuple):
    """Networks to evaluate, on the CPU in evaluation mode."""

    G: nn.Module
    D: nn.Module | None
    classes: tuple[str, ...]
    is_ema: bool  # whether G has the EMA weights


def load_test_networks(saved: checkpoint.Checkpoint, config: Config) -> TestNetworks:
    """Return the networks of a checkpoint, with `--use_ema` the EMA generator.

    Raises:
        UserError: it is incomplete, or has weights that are not finite.
    """
    classes = saved_classes(saved)
    is_ema = saved.metadata["ema"] == "true" if saved.metadata else config.use_ema and saved.state is not None
    G, D = build_networks(config, len(classes))
    if checkpoint.is_folded(saved.G):
        fold_spectral_norm(G)
    with checkpoint.reraise_load_errors(saved.step):
        G.load_state_dict(saved.state["ema"] if saved.state and is_ema else saved.G)
        if saved.D is not None:
            D.load_state_dict(saved.D)
    D = D.eval() if saved.D is not None else None
    if not all(tensor.isfinite().all() for network in (G, D) if network for tensor in network.state_dict().values()):
        raise UserError(f"checkpoint {saved.step} has weights that are NaN or Inf: use an earlier one")
    return TestNetworks(G.eval(), D, classes, is_ema)


def saved_architecture(saved: checkpoint.Checkpoint) -> dict[str, int | str | bool]:
    """Return the options that decide the shapes of a checkpoint's networks; without D, all but d_conv_dim.

    Raises:
        UserError: these are none of `MODELS`.
    """
    model, sizes = _generator_sizes(saved)
    attention = "full" if sizes["has_attention"] else "none"
    options = {"model": model, "conditional": sizes["num_classes"] > 0, "attention": attention}
    options |= {"imsize": sizes["image_size"], "z_dim": sizes["z_dim"], "g_conv_dim": sizes["conv_dim"]}
    if saved.D is not None:
        with checkpoint.reraise_load_errors(saved.step):
            options["d_conv_dim"] = recognize("discriminator", saved.D)[1]["conv_dim"]
    return options


def saved_classes(saved: checkpoint.Checkpoint) -> tuple[str, ...]:
    """Return the names of a checkpoint's classes, of weights without a state file "0", "1", ...; () if it has none."""
    if saved.metadata:
        return tuple(json.loads(saved.metadata["classes"]))
    names = saved.state["classes"] if saved.state else map(str, range(_generator_sizes(saved)[1]["num_classes"]))
    return tuple(names)


def check_classes(saved: checkpoint.Checkpoint, classes: Sequence[str]) -> None:
    """Raise `UserError` that says which if the classes of the training images are not those of a checkpoint."""
    theirs = saved_classes(saved)
    if not (saved.state or saved.metadata) and len(theirs) == len(classes):  # their names are not known
        return
    only = [("the checkpoint has", [name for name in theirs if name not in classes])]
    only += [("the images have", [name for name in classes if name not in theirs])]
    if different := [f"only {which} {join_names(names)}" for which, names in only if names]:
        raise UserError(f"checkpoint {saved.step} is of other classes than the images: {'; '.join(different)}")
    if theirs != tuple(classes):  # such as those of toy and of folders with their names
        raise UserError(f"checkpoint {saved.step} has the classes in another order: {join_names(theirs)}")


def check_architecture(saved: checkpoint.Checkpoint, expected: Mapping[str, int | str | bool]) -> None:
    """Raise `UserError` that names the options if the saved networks have other sizes than expected, by name."""
    different = [
        f"--{name} {option_text(value)} (not {option_text(expected[name])})"
        for name, value in saved_architecture(saved).items()
        if name in expected and value != expected[name]
    ]
    if different:
        raise UserError(f"checkpoint {saved.step} is of another architecture: it needs {', '.join(different)}")


def _generator_sizes(saved: checkpoint.Checkpoint) -> tuple[str, dict[str, Any]]:
    with checkpoint.reraise_load_errors(saved.step):
        return recognize("generator", saved.G)


@dataclass
class TrainingState:
    """All that the next step depends on, saved and loaded as one. Random numbers and batches follow from the step."""

    step: int  # finished ones
    G: nn.Module
    D: nn.Module
    ema: nn.Module  # the network
    g_optimizer: Adam
    d_optimizer: Adam
    fixed_z: Tensor  # (B, z_dim), latents of the sample grids
    lr_factor: float = 1.0  # of both learning rates in the next step

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, tensors and state dicts by the names above."""
        return {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in vars(self).items()}

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint, or start from its weights; `UserError` if it does not fit.

        Weights alone get new optimizers and EMA.
        """
        self.step = 0 if saved.is_initial else saved.step
        parts = saved.state or {"G": saved.G, "D": saved.D, "ema": saved.G}
        is_resumed = saved.state is not None and not saved.is_initial
        with checkpoint.reraise_load_errors(saved.step):
            for name in ("G", "D", "ema", *(("g_optimizer", "d_optimizer") if is_resumed else ())):
                getattr(self, name).load_state_dict(parts[name])
            if is_resumed:
                self.fixed_z = saved.state["fixed_z"].to(self.fixed_z.device)
                self.lr_factor = saved.state.get("lr_factor") or 1.0  # 0 at the end of a linear schedule: starts anew


def print_differences(saved: checkpoint.Checkpoint, config: Config, data: Mapping[str, float]) -> None:
    """Print what a run resumes or starts from, and which options and images differ; `data` is `Loader.fingerprint`."""
    warn_of_trained_holdout(saved, data)
    if saved.is_initial:
        print(f"starting from the weights of {config.init_from} (step {saved.step})")
        return
    if saved.state is None and (saved.step or config.pretrained_file):  # not initial weights, "0"
        warn(f"{config.pretrained_file or 'the checkpoint'} has weights only, taken as those of step {saved.step}: "
             "optimizers and EMA are reinitialized")  # fmt: skip
    elif saved.state is not None:
        changes = changed_options(saved.state["config"], config)
        print(f"resuming from step {saved.step}" + (f"; changed options: {', '.join(changes)}" if changes else ""))
        warn_of_other_images(saved, data)
    if saved.step >= config.total_step:
        warn(f"there is nothing to train: step {saved.step} is not below --total_step {config.total_step}")


def load_test_checkpoint(config: Config, given: Set[str]) -> tuple[checkpoint.Checkpoint, Config]:
    """Return the checkpoint that `--train false` evaluates, and the options with those of its networks and data.

    Options on the command line, whose names are `given`, are kept; a line says which others are the checkpoint's, and
    which differ from it. The results of a file go to the `--version` that its folder is named after.

    Raises:
        UserError: there is none, it cannot be read, or it is of other networks than the command line says.
    """
    wanted = "latest" if config.pretrained_model in (None, "auto") else config.pretrained_model
    saved = checkpoint.load(config.model_folder, config.pretrained_file or wanted, needs_D=False)
    check_architecture(saved, {name: getattr(config, name) for name in config.architecture if name in given})
    with checkpoint.reraise_load_errors(saved.step):
        options = _options_for_test(saved, config, given)
        different = {name: value for name, value in options.items() if value != getattr(config, name)}
        adopted = {name: value for name, value in different.items() if name not in given}
        tested = dataclasses.replace(config, **adopted)
    if adopted:
        print("from the checkpoint: " + _command_line(adopted))
    # A seed or a batch size of one's own changes which images are shown, not what they are.
    expected = {*adopted, "version", "seed", "batch_size"}
    if kept := {name: value for name, value in different.items() if name not in expected}:
        warn("the checkpoint was trained with " + _command_line(kept))
    return saved, tested


def _options_for_test(saved: checkpoint.Checkpoint, config: Config, given: Set[str]) -> dict[str, Any]:
    """Return what a checkpoint says of the options of an evaluation."""
    trained = saved.state["config"] if saved.state else {}
    if saved.metadata and saved.metadata["dataset"]:
        trained = {"dataset": saved.metadata["dataset"]}
    # Held-out images are compared with a projection only; the other results are of all images.
    data = (*DATA_OPTIONS, "holdout") if config.project else DATA_OPTIONS
    names = (*config.architecture, "seed", "batch_size", *data)
    options = {name: trained[name] for name in names if name in trained} | saved_architecture(saved)
    if "dataset" in given and config.dataset != options.get("dataset"):  # its path and crop are of other images
        options = {name: value for name, value in options.items() if name not in data[1:]}
    if saved.metadata:
        options["use_ema"] = saved.metadata["ema"] == "true"
    if config.pretrained_file:
        folders = [folder.name for folder in Path(os.path.abspath(config.pretrained_file)).parents]
        is_export = config.pretrained_file.suffix == ".safetensors" and folders[0].isdecimal()  # in <version>/<step>
        options["version"] = folders[is_export] or config.version
    return options


def _command_line(options: Mapping[str, Any]) -> str:
    return " ".join(f"--{name} {option_text(value)}" for name, value in options.items())


def warn_of_other_images(saved: checkpoint.Checkpoint, current: Mapping[str, float]) -> None:
    """Print a warning if a checkpoint was trained on other images than those with this `Loader.fingerprint`.

    Of weights alone that is not known.
    """
    data = saved.state["data"] if saved.state else current
    if data["images"] != current["images"]:
        warn(f"the dataset has {current['images']:,} images; it had {data['images']:,} when the checkpoint was saved")
    elif data["checksum"] != current["checksum"]:
        warn(f"the {current['images']:,} images are not those of the checkpoint")


def is_holdout_trained(saved: checkpoint.Checkpoint, current: Mapping[str, float]) -> bool:
    """Return whether a checkpoint was, or may have been, trained on images that are held out now.

    Added images are no reason: which of the others are held out does not depend on them. `current` is
    `Loader.fingerprint`. That of weights alone is not known; that of older versions has no "seed" or "holdout", and a
    run for which this is true saves its own without "seed".
    """
    data = saved.state["data"] if saved.state else {}
    same = {key: data.get(key) == value for key, value in current.items()}
    is_of_others = saved.is_initial and not (same["images"] and same["checksum"])
    if is_of_others or not (saved.state or saved.step):  # weights of step 0 are initial ones
        return False
    renamed = same["images"] and same["holdout"] and not same["held_out_checksum"]
    return current["holdout"] > 0 and (not same["seed"] or current["holdout"] > data["holdout"] or renamed)


def warn_of_trained_holdout(saved: checkpoint.Checkpoint, current: Mapping[str, float]) -> None:
    """Print a warning if `is_holdout_trained`."""
    if is_holdout_trained(saved, current):
        warn(
            "the checkpoint may have been trained on images that are held out now (--holdout, --seed or file names are "
            "not those of the checkpoint, or it is of an older version): do not trust what is said of held-out images"
        )


def changed_options(saved: dict[str, Any], config: Config) -> list[str]:
    """List how this run's options differ from those in a checkpoint, maybe of another version of this program."""
    # The default of an option that an older version lacks is what that version did.
    saved = {field.name: field.default for field in dataclasses.fields(config)} | saved
    changes = []
    for name, value in saved.items():
        if name in ("pretrained_model", "init_from", "overwrite", "version"):  # these are expected to differ
            continue
        if not hasattr(config, name):
            if value is not None:
                changes.append(f"{name} {option_text(value)} (no longer an option)")
        elif (current := getattr(config, name)) != value:
            changes.append(f"--{name} {option_text(current)} (was {option_text(value)})")
    return changes


def non_finite_message(config: Config, error: NonFiniteError) -> str:
    """Return the error line of a run that diverged: what happened, and the command to resume with."""
    advice = "No checkpoint was saved: start again with --overwrite true and lower --g_lr and --d_lr"
    if steps := checkpoint.list_steps(config.model_folder):
        command = config.command_line(pretrained_model=str(steps[0]))
        advice = f"Resume from the last checkpoint with lower --g_lr and --d_lr: {command}"
    return f"the run diverged: {error}. {advice}"
