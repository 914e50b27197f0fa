"""Every option of the program: its default, its meaning, its limits. `python main.py --help` prints this file.

Options are parsed and checked once, before any work, into a frozen `Config`. Nothing heavy is imported here, so that
`--help` and a mistyped option answer at once.
"""

import argparse
import dataclasses
import math
import os
import re
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from errors import UserError, warn

METRICS = ("fid", "kid", "isc", "prc", "faces")


class Rule(NamedTuple):
    """What a value must be: the test, and the words for it that errors and --help use."""

    holds: Callable[[Any], bool]
    words: str


def one_of(*choices: Any) -> Rule:
    return Rule(lambda value: value in choices, "one of " + ", ".join(map(str, choices)))


def at_least(limit: float) -> Rule:
    return Rule(lambda value: value >= limit, f"at least {limit}")


def between(low: int, high: int) -> Rule:
    return Rule(lambda value: low <= value <= high, f"from {low} to {high}")


def matches(pattern: str, words: str) -> Rule:
    return Rule(lambda value: re.fullmatch(pattern, value) is not None, words)


def subset_of(*choices: str) -> Rule:
    return Rule(
        lambda value: set(value.split(",")) <= {*choices}, "one or more of " + ", ".join(choices) + ", with commas"
    )


POSITIVE = Rule(lambda value: value > 0, "more than 0")
FRACTION = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
DECAY = Rule(lambda value: 0 < value <= 1, "more than 0 and at most 1")
EPOCHS = Rule(lambda value: 0 < value <= 1e6, "more than 0 and at most 1000000")
SEED = Rule(lambda value: 0 <= value < 2**63, "at least 0 and below 2^63")
WIDTH = Rule(lambda value: 0 < value <= 1024 and value % 8 == 0, "a multiple of 8 from 8 to 1024")
PATH = matches(r"[^\0]+", "a path")


def option(default: Any, help: str, rule: Rule | None = None, group: str | None = None) -> Any:
    """A field of `Config` and an option of the command line. `group` opens a group, which later options join."""
    return dataclasses.field(default=default, metadata={"help": help, "rule": rule, "group": group})


@dataclass(frozen=True)
class Config:
    """The resolved options of one run. Raises `UserError` for a value that breaks its rule."""

    model: str = option("sagan", "the network to train", one_of("sagan"), group="Network")
    imsize: int = option(64, "height and width of the images in pixels", one_of(32, 64, 128, 256))
    z_dim: int = option(128, "length of the noise vector z", between(1, 8192))
    g_conv_dim: int = option(64, "width of the generator's last block", WIDTH)
    d_conv_dim: int = option(64, "width of the discriminator's first block", WIDTH)

    train: bool = option(True, "train; false evaluates a checkpoint instead", group="Training")
    adv_loss: str = option("hinge", "the adversarial loss", one_of("hinge", "wgan-gp"))
    lambda_gp: float = option(10.0, "weight of the gradient penalty of wgan-gp", at_least(0))
    total_step: int = option(1_000_000, "train until this many generator updates are done", at_least(1))
    batch_size: int = option(64, "images in a batch", at_least(1))
    n_critic: int = option(1, "discriminator updates for each generator update", between(1, 1000))
    d_iters: int = option(
        5, "does nothing, as in the reference; accepted for old command lines, see --n_critic", at_least(1)
    )
    g_lr: float = option(0.0001, "Adam's learning rate for the generator", POSITIVE)
    d_lr: float = option(0.0004, "Adam's learning rate for the discriminator", POSITIVE)
    lr_schedule: str = option(
        "constant",
        "learning rates over time: constant, times --lr_decay after each epoch, or linearly to 0 at --total_step",
        one_of("constant", "exponential", "linear"),
    )
    lr_decay: float = option(0.95, "factor for each epoch under --lr_schedule exponential", DECAY)
    beta1: float = option(0.0, "Adam's beta1", FRACTION)
    beta2: float = option(0.9, "Adam's beta2", FRACTION)
    ema_decay: float = option(0.999, "decay of the averaged generator, ramped up over the first steps", FRACTION)
    seed: int = option(0, "seed of weights, noise, shuffling and toy faces", SEED)
    pretrained_model: str | None = option(
        None,
        "continue from this checkpoint; auto is the latest if there is one, else a new run; best has the lowest FID",
        matches(r"[0-9]+|latest|auto|best", "a step, 'latest', 'auto' or 'best'"),
    )

    dataset: str = option(
        "celeb",
        "what to train on; toy draws faces and needs no files",
        one_of("celeb", "lsun", "cifar10", "folder", "toy"),
        group="Data",
    )
    image_path: str = option("./data", "where the images are", PATH)
    download: bool = option(False, "fetch celeb or cifar10 into --image_path where it is not there")
    crop_size: int | None = option(
        None,
        "side of the centre square cut from celeb and folder images; None is 160 for celeb, the largest for folder",
        at_least(1),
    )
    hflip: bool = option(False, "mirror half of the images at random")
    toy_num: int = option(10_000, "how many toy faces to draw", at_least(1))
    cache_path: str = option("./cache", "where decoded images are kept", PATH)
    num_workers: int = option(2, "processes that decode images while the cache is built", between(0, 256))

    device: str = option(
        "auto",
        "what to train on",
        matches(r"auto|cpu|cuda(:\d{1,3})?|mps", "auto, cpu, cuda, cuda:N or mps"),
        group="Machine",
    )
    precision: str = option(
        "auto",
        "arithmetic of the networks: auto is bf16 on a GPU that has it, fp32 elsewhere",
        one_of("auto", "fp32", "tf32", "bf16"),
    )
    cuda_graph: str = option(
        "auto",
        "on CUDA, replay the step as one recorded graph; auto steps aside where that cannot be done",
        one_of("auto", "true", "false"),
    )
    deterministic: bool = option(
        False, "on CUDA, only operations whose results can be repeated bit for bit, as they always can on a CPU"
    )
    parallel: bool = option(False, "start a process for each visible GPU, which share each batch; see also torchrun")
    tune_malloc: bool = option(True, "on a CPU under Linux, keep freed memory for the next step: faster")

    use_ema: bool = option(True, "evaluate the averaged generator; false takes the raw one", group="Evaluation")
    num_samples: int = option(64, "single images that --train false writes", between(1, 1_000_000))
    truncation: float | None = option(
        None, "--train false draws noise anew beyond this: images nearer to the average one, less varied", POSITIVE
    )
    metrics: str | None = option(
        None,
        "measures of generated images, in --train false and while training: FID, KID, Inception score, precision and "
        "recall, share with a face",
        subset_of(*METRICS),
    )
    metric_step: int = option(10_000, "steps between two evaluations while training", at_least(1))
    metric_num: int = option(10_000, "generated images that are measured", between(10, 1_000_000))
    feature_extractor: str | None = option(
        None,
        "a TorchScript file that you trust, in Inception's place: uint8 images (B, 3, S, S) to features (B, F)",
        PATH,
    )

    version: str = option(
        "sagan_celeb",
        "name of the run: a folder in each of the paths below",
        matches(r"(?!\.{1,2}$)[^/\\\0]{1,100}", "a folder's name, of up to 100 letters"),
        group="Results",
    )
    sample_path: str = option("./samples", "where sample grids go", PATH)
    attn_path: str = option("./attn", "where attention figures go", PATH)
    model_save_path: str = option("./models", "where checkpoints go", PATH)
    log_path: str = option("./logs", "where config.json, metrics.jsonl and TensorBoard's files go", PATH)
    use_tensorboard: bool = option(False, "write TensorBoard's files too")
    log_step: int = option(10, "steps between two lines of the log", at_least(1))
    sample_step: int = option(100, "steps between two sample grids", at_least(1))
    attn_step: int = option(1000, "steps between two sets of attention figures", at_least(1))
    g_num: int = option(5, "images in an attention figure, at most a batch", at_least(1))
    model_save_step: float = option(1.0, "epochs between two checkpoints", EPOCHS)
    save_minutes: float = option(10.0, "minutes after which there is a checkpoint in any case; 0 is never", at_least(0))
    keep_checkpoints: int = option(
        3, "this many of the newest checkpoints stay whole, older ones keep their weights; 0 is all", at_least(0)
    )
    keep_weights: int = option(0, "this many of the newest of those older weights stay; 0 is all", at_least(0))
    overwrite: bool = option(False, "start anew over the results of an earlier run of this version, which are removed")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), field.metadata["rule"]
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{field.name} must be a finite number, not {value}")
            if value is not None and rule and not rule.holds(value):
                raise UserError(f"--{field.name} must be {rule.words}, not {value}")

    def _folder(self, path: str) -> Path:
        return Path(path).expanduser() / self.version

    @property
    def sample_folder(self) -> Path:
        return self._folder(self.sample_path)

    @property
    def attn_folder(self) -> Path:
        return self._folder(self.attn_path)

    @property
    def model_folder(self) -> Path:
        return self._folder(self.model_save_path)

    @property
    def log_folder(self) -> Path:
        return self._folder(self.log_path)

    @property
    def folders(self) -> dict[str, Path]:
        """Where the run's results go, by what they are."""
        return {
            "samples": self.sample_folder,
            "attention": self.attn_folder,
            "checkpoints": self.model_folder,
            "logs": self.log_folder,
        }

    @property
    def architecture(self) -> dict[str, int]:
        """The options that decide the shapes of the weights: a checkpoint fits where these all_equal."""
        return {name: getattr(self, name) for name in ("imsize", "z_dim", "g_conv_dim", "d_conv_dim")}

    def summary(self) -> str:
        """All options by group, a few lines to print at the start of a run."""
        lines = []
        for title, fields in option_groups().items():
            # A no-break space keeps a name and its value on one line.
            text = "   ".join(f"{field.name}\N{NO-BREAK SPACE}{getattr(self, field.name)}" for field in fields)
            lines += textwrap.wrap(
                text,
                width=100,
                initial_indent=f"{title:<12}",
                subsequent_indent=" " * 12,
                break_long_words=False,
                break_on_hyphens=False,
            )
        return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")

    def command_line(self, **changes: Any) -> str:
        """The command line that gives this configuration with `changes`; options at their defaults are left out.

        So is --overwrite: a command that is given again must not remove what the run has done since. Where torchrun
        started this process, it does so again.
        """
        changed = dataclasses.replace(self, overwrite=False, **changes)
        one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        # --parallel starts torchrun by itself, on this machine.
        words = [*(["python"] if self.parallel and one_machine else _launcher()), "main.py"]
        for field in dataclasses.fields(changed):
            value = getattr(changed, field.name)
            if value != field.default:
                words += ["--" + field.name, str(value).lower() if isinstance(value, bool) else str(value)]
        return shlex.join(words)


def _launcher() -> list[str]:
    """What started this process: python, or torchrun, which says so in the environment."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment:
        return ["python"]
    words = ["torchrun", f"--nproc_per_node={environment['LOCAL_WORLD_SIZE']}"]
    if environment["TORCHELASTIC_MAX_RESTARTS"] != "0":
        words.append(f"--max_restarts={environment['TORCHELASTIC_MAX_RESTARTS']}")
    if environment["GROUP_WORLD_SIZE"] != "1":  # where they meet is not known here
        words += [f"--nnodes={environment['GROUP_WORLD_SIZE']}", "..."]
    return words


def option_groups() -> dict[str, list[dataclasses.Field]]:
    """The options under their groups' titles, in order."""
    groups: dict[str, list[dataclasses.Field]] = {}
    for field in dataclasses.fields(Config):
        if field.metadata["group"]:
            group = groups.setdefault(field.metadata["group"], [])
        group.append(field)
    return groups


def get_parameters(argv: list[str] | None = None) -> Config:
    """Parses and checks the command line.

    Args:
        argv: the words after the program's name; None takes those of this process.

    Returns:
        The frozen configuration.

    Raises:
        SystemExit: with code 2 and one line on stderr for a bad option; with code 0 after --help.
    """
    parser = _Parser(
        usage="python main.py [--option value] ...",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train a self-attention GAN (arXiv 1805.08318). Results are left in ./samples, ./attn, "
        "./models and ./logs, in a folder for each --version.",
    )
    for title, fields in option_groups().items():
        group = parser.add_argument_group(title)
        for field in fields:
            parse, rule = _parser_for(field.type), field.metadata["rule"]
            limits = f"{rule.words}; " if rule and rule is not PATH else "true or false; " if parse is _boolean else ""
            group.add_argument(
                "--" + field.name,
                type=parse,
                metavar="",
                help=f"{field.metadata['help']} ({limits}default {field.default})",
            )
    given = vars(parser.parse_args(argv))
    try:
        config = Config(**given)
    except UserError as error:
        parser.error(str(error))
    if "d_iters" in given:
        warn(
            "--d_iters does nothing, here as in the reference; --n_critic sets the discriminator updates for each "
            f"generator update, and stays at {config.n_critic}"
        )
    return config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's page of usage."""
        self.exit(2, f"error: {message.removeprefix('argument ')} (python main.py --help lists the options)\n")


def _parser_for(annotation: Any) -> Callable[[str], Any]:
    """What turns an option's text into its type."""
    if annotation is bool:
        return _boolean
    return next(kind for kind in (int, float, str) if kind in (annotation, *getattr(annotation, "__args__", ())))


def _boolean(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be true or false (or 1/0, yes/no), not '{text}'")
    return words[text.lower()]
