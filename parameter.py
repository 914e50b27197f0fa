"""The options of the program: name, default, allowed values and meaning of each. `python main.py --help` prints them.

    config = get_parameters()                               # from the command line
    config = Config(dataset="toy", batch_size=16)           # in code

Options are parsed and checked once, before any work, into a frozen `Config`. Nothing heavy is imported here, so that
`--help` and errors in the command line appear at once.
"""

import argparse
import dataclasses
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

from errors import UserError, warn


class Constraint(NamedTuple):
    """The allowed values of an option: a check, and its description for error messages and --help."""

    check: Callable[[Any], bool]
    description: str


def one_of(*choices: Any) -> Constraint:
    return Constraint(lambda value: value in choices, "one of " + ", ".join(map(str, choices)))


def at_least(limit: float) -> Constraint:
    return Constraint(lambda value: value >= limit, f"at least {limit}")


def between(low: int, high: int) -> Constraint:
    return Constraint(lambda value: low <= value <= high, f"from {low} to {high}")


def matches(pattern: str, description: str) -> Constraint:
    return Constraint(lambda value: re.fullmatch(pattern, value) is not None, description)


def subset_of(*choices: str) -> Constraint:
    description = f"one or more of {', '.join(choices)}, separated by commas"
    return Constraint(lambda value: set(value.split(",")) <= {*choices}, description)


BOOLEAN = Constraint(lambda value: isinstance(value, bool), "true or false")
POSITIVE = Constraint(lambda value: value > 0, "greater than 0")
FRACTION = Constraint(lambda value: 0 <= value < 1, "at least 0 and less than 1")
DECAY = Constraint(lambda value: 0 < value <= 1, "greater than 0 and at most 1")
EPOCHS = Constraint(lambda value: 0 < value <= 1e6, "greater than 0 and at most 1000000")
SEED = Constraint(lambda value: 0 <= value < 2**63, "at least 0 and less than 2^63")
DISTANCES = ("fid", "kid", "hog")  # the lower the better
METRICS = subset_of("fid", "kid", "isc", "prc", "faces", "hog")
POLICIES = subset_of("color", "translation", "cutout")
AUGMENTATIONS = Constraint(lambda value: value == "none" or POLICIES.check(value), f"none, or {POLICIES.description}")
WIDTH = Constraint(lambda value: 0 < value <= 1024 and value % 8 == 0, "a multiple of 8 from 8 to 1024")
DATASET = one_of("celeb", "lsun", "cifar10", "folder", "toy")
DEVICE = matches(r"auto|cpu|cuda(:\d{1,3})?|mps", "auto, cpu, cuda, cuda:N or mps")
FILE_ENDINGS = (".pth", ".safetensors")
CHECKPOINT = Constraint(
    lambda value: re.fullmatch(r"[0-9]+|latest|auto|best", value) or value.endswith(FILE_ENDINGS),
    "a step, latest, auto, best, or the path of a .pth or .safetensors file",
)
PATH = matches(r"[^\0]+", "a path")
ATTRIBUTE = matches(r"[^\0\r\n]{1,100}", "a name of up to 100 characters")
COMMA_LISTS = (METRICS, AUGMENTATIONS)
LIST = matches(r"[^,]+(,[^,]+)*", "one or more names, separated by commas")
EXPORT_PATH = "./exports"  # default of export.py
NAME = matches(r"(?!\.{1,2}$)[^/\\\0]{1,100}", "a folder name of up to 100 characters")


def option(default: Any, help: str, constraint: Constraint = BOOLEAN, group: str | None = None) -> Any:
    """Return a field of `Config` that is also a command-line option. `group` starts a group of options."""
    return dataclasses.field(default=default, metadata={"help": help, "constraint": constraint, "group": group})


@dataclass(frozen=True)
class Config:
    """The options of one run. Raises `UserError` for a value that is not allowed."""

    model: str = option(
        "sagan", "networks; sagan: the reference's; paper: the ResNets of the paper", one_of("sagan", "paper"),
        group="Network",
    )  # fmt: skip
    imsize: int = option(64, "height and width of the images in pixels", one_of(32, 64, 128, 256))
    z_dim: int = option(128, "length of the latent vector z", between(2, 8192))
    g_conv_dim: int = option(
        64,
        "channels of the generator's last hidden layer; earlier layers have more (paper at 32: all have four times as "
        "many)",
        WIDTH,
    )
    d_conv_dim: int = option(
        64,
        "channels of the discriminator's first layer; later layers have more (paper at 32: all have twice as many)",
        WIDTH,
    )

    attention: str = option(
        "full", "full: networks with their attention layers; none: without them", one_of("full", "none")
    )
    conditional: bool = option(
        False, "train on the classes of the images, with --model paper: the classes of cifar10, the folders directly "
        "below --image_path of folder, an --attribute of celeb, the hair length of toy"
    )  # fmt: skip

    train: bool = option(True, "train; false: evaluate a checkpoint", group="Training")
    adv_loss: str = option("hinge", "adversarial loss; hinge: the paper's", one_of("hinge", "wgan-gp"))
    lambda_gp: float = option(10.0, "weight of the gradient penalty of wgan-gp", at_least(0))
    total_step: int = option(1_000_000, "train up to this step; a step is one generator update", at_least(1))
    batch_size: int = option(64, "images per batch, over all processes", at_least(1))
    n_critic: int = option(1, "discriminator updates per generator update", between(1, 1000))
    d_iters: int = option(5, "ignored, as in the reference; use --n_critic", at_least(1))
    g_lr: float = option(0.0001, "Adam learning rate of the generator", POSITIVE)
    d_lr: float = option(0.0004, "Adam learning rate of the discriminator", POSITIVE)
    lr_schedule: str = option(
        "constant",
        "learning rate schedule; exponential: times --lr_decay after each epoch; linear: to 0 at --total_step",
        one_of("constant", "exponential", "linear"),
    )
    lr_decay: float = option(0.95, "factor per epoch of --lr_schedule exponential", DECAY)
    beta1: float = option(0.0, "Adam beta1", FRACTION)
    beta2: float = option(0.9, "Adam beta2", FRACTION)
    augment: str = option(
        "none", "DiffAugment, for few images: random changes of every image that D sees", AUGMENTATIONS
    )
    ema_decay: float = option(
        0.999, "decay of the EMA generator; (1 + step) / (10 + step) while that is smaller", FRACTION
    )
    seed: int = option(0, "seed of weights, z, shuffling, flips, held-out images and toy faces", SEED)
    pretrained_model: str | None = option(
        None,
        "checkpoint to resume from or evaluate; best: see --metrics; auto: latest, else a new run; a file: of any run",
        CHECKPOINT,
    )
    init_from: str | None = option(
        None,
        "weights that a new run starts from, at step 0: a checkpoint's file, or a folder with G.safetensors and "
        "D.safetensors; ignored when resuming",
        PATH,
    )

    dataset: str = option("celeb", "training images; toy: drawn faces, no files needed", DATASET, group="Data")
    image_path: str = option("./data", "folder with the images", PATH)
    download: bool = option(False, "download celeb or cifar10 to --image_path if it is not there")
    crop_size: int | None = option(
        None, "side of the center crop (celeb, folder); None: 160 for celeb, the shorter side for folder", at_least(1)
    )
    attribute: str | None = option(
        None, "with --conditional true, the attribute of celeb whose presence is the class, such as Smiling", ATTRIBUTE
    )
    holdout: float = option(
        0.0, "about this fraction of the images is kept from training, to see whether D remembers the others", FRACTION
    )
    hflip: bool = option(False, "flip each image horizontally with probability 0.5")
    toy_num: int = option(10_000, "number of toy faces", at_least(1))
    cache_path: str = option("./cache", "folder for decoded images", PATH)
    num_workers: int = option(2, "processes that decode images into the cache", between(0, 256))

    device: str = option("auto", "device to run on; auto: cuda if available, else cpu", DEVICE, group="Machine")
    precision: str = option(
        "auto",
        "of training; auto: bf16 on GPUs of compute capability >= 8.0, else fp32; --train false uses fp32",
        one_of("auto", "fp32", "tf32", "bf16"),
    )
    cuda_graph: str = option(
        "auto", "capture the training step in a CUDA graph; auto falls back to eager", one_of("auto", "true", "false")
    )
    deterministic: bool = option(False, "use deterministic CUDA algorithms; may be slower")
    parallel: bool = option(False, "start one process per visible GPU, as torchrun does; they share each batch")
    tune_malloc: bool = option(True, "on a CPU under Linux, let malloc keep freed memory for the next step; faster")

    use_ema: bool = option(True, "evaluate the EMA generator; false: the non-EMA generator", group="Evaluation")
    num_samples: int = option(
        64,
        "number of sample images, with --conditional true of each class, that --train false writes",
        between(1, 1_000_000),
    )
    class_name: str | None = option(None, "with --train false, the classes to generate; None: all", LIST)
    project: str | None = option(
        None, "with --train false, an image: find the nearest z, for projection.png and a corner of the playground",
        PATH,
    )  # fmt: skip
    metrics: str | None = option(
        None,
        "FID, KID, Inception score, precision and recall, face rate, distance of HOG features; also during training, "
        "which keeps the checkpoint with the lowest of the first that is a distance (fid, kid, hog) as the best",
        METRICS,
    )
    metric_step: int = option(10_000, "steps between evaluations of --metrics during training", at_least(1))
    metric_num: int = option(10_000, "number of generated images per evaluation", between(10, 1_000_000))

    version: str = option("sagan_celeb", "name of the run; a subfolder of each folder below", NAME, group="Results")
    sample_path: str = option("./samples", "folder for sample grids", PATH)
    attn_path: str = option("./attn", "folder for attention figures", PATH)
    model_save_path: str = option("./models", "folder for checkpoints", PATH)
    log_path: str = option("./logs", "folder for the report, the options, metrics.jsonl and TensorBoard files", PATH)
    use_tensorboard: bool = option(False, "also write TensorBoard files")
    log_step: int = option(10, "steps between log entries", at_least(1))
    sample_step: int = option(100, "steps between sample grids", at_least(1))
    attn_step: int = option(1000, "steps between attention figures", at_least(1))
    g_num: int = option(
        5,
        "images per attention figure, rows of interpolations; in training, and of real images, at most --batch_size",
        at_least(1),
    )
    keep_samples: int = option(
        500,
        "keep at most so many sample grids and attention figures, evenly spaced over the steps; 0: all",
        at_least(0),
    )
    model_save_step: float = option(1.0, "epochs between checkpoints", EPOCHS)
    min_save_step: int = option(1000, "fewest steps between these checkpoints, for small datasets", at_least(1))
    save_minutes: float = option(
        10.0, "also save a checkpoint, for resuming only, after this many minutes; 0: never", at_least(0)
    )
    keep_checkpoints: int = option(
        3, "number of newest checkpoints to keep in full, of older ones only the weights; 0: all", at_least(0)
    )
    overwrite: bool = option(False, "delete earlier results of this --version; when resuming, those of later steps")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, constraint = getattr(self, field.name), field.metadata["constraint"]
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{field.name} must be a finite number, not {value}")
            if value is not None and not constraint.check(value):
                raise UserError(f"--{field.name} must be {constraint.description}, not {value}")
        if self.model == "paper" and self.imsize not in (32, 64, 128):
            raise UserError(f"--model paper has networks for --imsize 32, 64 and 128, not {self.imsize}")
        if self.model != "paper" and self.conditional:
            raise UserError(f"--conditional true needs --model paper: the networks of {self.model} have no classes")
        for name in ("project", "class_name"):
            if self.train and getattr(self, name):
                raise UserError(f"--{name} is for --train false, for a trained generator")
        if self.attribute and self.train and not (self.conditional and self.dataset == "celeb"):
            raise UserError("--attribute is for --conditional true with --dataset celeb")

    @property
    def has_attention(self) -> bool:
        return self.attention == "full"

    @property
    def pretrained_file(self) -> Path | None:
        """The path that `--pretrained_model` is; None if it names a checkpoint of this run."""
        is_file = self.pretrained_model is not None and self.pretrained_model.endswith(FILE_ENDINGS)
        return Path(os.path.expanduser(self.pretrained_model)) if is_file else None

    @property
    def sample_folder(self) -> Path:
        return Path(os.path.expanduser(self.sample_path)) / self.version

    @property
    def attn_folder(self) -> Path:
        return Path(os.path.expanduser(self.attn_path)) / self.version

    @property
    def model_folder(self) -> Path:
        return Path(os.path.expanduser(self.model_save_path)) / self.version

    @property
    def log_folder(self) -> Path:
        return Path(os.path.expanduser(self.log_path)) / self.version

    def test_folder(self, step: int) -> Path:
        """Return where `--train false` writes for a checkpoint."""
        return self.sample_folder / f"test_{step}"

    @property
    def folders(self) -> list[Path]:
        """Folders of the run's results."""
        return [self.sample_folder, self.attn_folder, self.model_folder, self.log_folder]

    @property
    def output_folders(self) -> list[Path]:
        """Folders that runs with any --version write to."""
        others = (Path(os.path.expanduser(path)) for path in (self.cache_path, EXPORT_PATH))
        return [*(folder.parent for folder in self.folders), *others]

    @property
    def architecture(self) -> dict[str, int | str | bool]:
        """Options that decide the shapes of the weights; a checkpoint loads only if they are all equal."""
        names = ("model", "imsize", "z_dim", "g_conv_dim", "d_conv_dim", "attention", "conditional")
        return {name: getattr(self, name) for name in names}

    @property
    def checksum(self) -> int:
        """A CRC32 of what must be equal on all machines: not where images are, nor how they get into the cache."""
        options = {name: value for name, value in vars(self).items() if not name.endswith("_path")}
        return zlib.crc32(repr(options | {"num_workers": 0, "download": False}).encode())

    def summary(self) -> str:
        """Return all options by group, a few lines that a run prints at its start."""
        wrapper = textwrap.TextWrapper(
            width=120, subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False
        )
        lines = []
        for title, fields in option_groups().items():
            values = (f"{field.name}={option_text(getattr(self, field.name))}" for field in fields)
            lines.append(wrapper.fill(f"{title:<12}{' '.join(values)}"))
        return "\n".join(lines)

    def command_line(self, **changes: Any) -> str:
        """Return the command that runs this configuration with `changes`; options at their defaults are left out.

        --overwrite is left out as well: running the command again must not delete the results.
        """
        changed = dataclasses.replace(self, overwrite=False, **changes)
        words = ["python"]
        if "LOCAL_WORLD_SIZE" in os.environ and not self.parallel:  # torchrun sets it
            words = ["torchrun", "--nproc_per_node=" + os.environ["LOCAL_WORLD_SIZE"]]
            if (machines := os.environ.get("GROUP_WORLD_SIZE", "1")) != "1":
                endpoint = os.environ["MASTER_ADDR"]  # of one of the machines; the port is torchrun's default
                words += ["--nnodes=" + machines, "--rdzv_backend=c10d", "--rdzv_endpoint=" + endpoint]
        script = Path(sys.argv[0])
        words.append(str(script.with_name("main.py")) if script.name in ("main.py", "export.py") else "main.py")
        for field in dataclasses.fields(changed):
            if (value := getattr(changed, field.name)) != field.default:
                text = option_text(value)
                words += [f"--{field.name}={text}"] if text.startswith("-") else [f"--{field.name}", text]
        return shlex.join(words) if sys.platform != "win32" else subprocess.list2cmdline(words)


def option_groups() -> dict[str, list[dataclasses.Field]]:
    """Return the options by the title of their group, in order."""
    groups: dict[str, list[dataclasses.Field]] = {}
    for field in dataclasses.fields(Config):
        if field.metadata["group"]:
            group = groups.setdefault(field.metadata["group"], [])
        group.append(field)
    return groups


def get_parameters(argv: list[str] | None = None, program: str = "main.py") -> Config:
    """Parse and check the command line.

    Args:
        argv: the arguments after the program's name; None takes those of this process.
        program: whose --help the error lines name.

    Raises:
        SystemExit: with code 2 and one line on stderr for an invalid option; with code 0 after --help.
    """
    parser = _make_parser(program)
    given = vars(parser.parse_args(argv))
    try:
        os.getcwd()  # without it, torch cannot be loaded
        config = Config(**given)
    except FileNotFoundError:
        parser.error("the current folder was deleted: change to another one")
    except UserError as error:
        parser.error(str(error))
    if "d_iters" in given:
        warn(f"--d_iters is ignored, as in the reference; the ratio of updates is that of --n_critic {config.n_critic}")
    return config


def given_options(argv: list[str] | None = None, program: str = "main.py") -> set[str]:
    """Return the names of the options that a valid command line gives; the arguments are those of `get_parameters`."""
    return set(vars(_make_parser(program).parse_args(argv)))


def _make_parser(program: str) -> "Parser":
    parser = Parser(program, "Train a self-attention GAN (arXiv 1805.08318). Results are written to ./samples,\n"
                             "./attn, ./models and ./logs, in a subfolder for each --version.")  # fmt: skip
    parser.argument_default = argparse.SUPPRESS
    for title, fields in option_groups().items():
        group = parser.add_argument_group(title)
        for field in fields:
            kind = next(iter(get_args(field.type)), field.type)  # T of `T | None`
            parse = comma_list if field.metadata["constraint"] in COMMA_LISTS else boolean if kind is bool else kind
            allowed = f"{field.metadata['constraint'].description}; default {option_text(field.default)}"
            group.add_argument("--" + field.name, type=parse, metavar="", help=f"{field.metadata['help']} ({allowed})")
    return parser


class Parser(argparse.ArgumentParser):
    """The parser of a program, given by its path, whose errors are one line."""

    def __init__(self, program: str, description: str):
        super().__init__(f"python {program}", "%(prog)s [--option value] ...", description, allow_abbrev=False)
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(self, message: str) -> NoReturn:
        """Exit with one line instead of the usage and a line."""
        self.exit(2, f"error: {message.removeprefix('argument ')} (see {self.prog} --help)\n")


def boolean(text: str) -> bool:
    """Parse a value of the command line."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be true or false (or 1/0, yes/no), not '{text}'")
    return words[text.lower()]


def comma_list(text: str) -> str:
    """Parse a list of the command line: without blanks around its commas."""
    return ",".join(map(str.strip, text.split(",")))


def option_text(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
