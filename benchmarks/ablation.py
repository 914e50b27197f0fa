"""Train variants that differ in named options, each with several seeds, and compare them.

    python benchmarks/ablation.py --vary attention full none --seeds 0 1 --dataset folder --image_path photos
    python benchmarks/ablation.py --vary augment none color,translation,cutout --seeds 0 1 2 --total_step 5000

All other options are those of main.py and the same for all runs; some have other defaults here, see `DEFAULTS`. With
--vary given twice, every combination is a variant; --vary g_lr+d_lr 1e-4+4e-4 2e-4+2e-4 changes two options together.
Runs are trained one after the other, seed by seed. Ctrl-C saves a checkpoint, and the same command goes on from there.
Finished runs are kept, so that seeds, values and, with a constant learning rate, steps can be added later; runs in
--out that have other options or images are refused.

    python benchmarks/ablation.py --minutes 60 --vary batch_size 16 64 --vary n_critic 1 2 --seeds 0 1

--minutes, in place of --total_step, gives all runs the same CPU time, without that of evaluations. The CPU time of a
step is measured before the first run of a variant and kept in --out. Variants whose options do not change it, such as
learning rates, have the same number of steps.

Writes to --out (./ablation): the results of each run in the usual folders and, after each run that is finished,
`ablation_<names of what varies>.md`, a table of means and ranges over the seeds, and `.png`, samples of the same z side
by side, and curves. The default metric, hog, needs OpenCV only; with torch-fidelity, add kid, and for faces, faces.
"""

import ctypes
import io
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablation_report import NAMES, NOTE, Curves, table, write_figure

from errors import UserError, exit_code, handle_signals, make_output_robust, stop_signals
from main import make_loader
from parameter import NAME, Config, Parser, get_parameters, given_options, option_text
from training import checkpoint
from training.models import build_networks
from training.resuming import changed_options
from training.run_folders import lock_folders
from utils import check_writable, setup_device, write_atomically
from visuals.curves import read_curves

PROGRAM = "benchmarks/ablation.py"
CPU, LIBC = torch.device("cpu"), ctypes.CDLL(None) if sys.platform == "linux" else None
MAIN = Path(__file__).resolve().parents[1] / "main.py"
DEFAULTS = {"total_step": 2000, "metrics": "hog", "metric_num": 2000, "holdout": 0.05}
EVALUATIONS = 10  # sample grids and evaluations of the metrics in a run, by default
FOLDERS = {"sample_path": "samples", "attn_path": "attn", "model_save_path": "models", "log_path": "logs"}
OWN_OPTIONS = {"train", "seed", "version", "pretrained_model", "init_from", "overwrite", *FOLDERS}
# A run in --out may differ in these from what is asked for: where files are, how images get into the cache (not which).
NOT_COMPARED = {*FOLDERS, "cache_path", "download", "num_workers"}
LENGTH = {"total_step", "metric_step", "sample_step"}  # with a constant learning rate, these too
# With --minutes: variants that differ in these only have the same number of steps, from one measurement.
SAME_COST = {*NOT_COMPARED, *OWN_OPTIONS, *LENGTH, "metrics", "metric_num", "num_samples", "g_lr", "d_lr",
             "lr_schedule", "lr_decay", "beta1", "beta2", "ema_decay"}  # fmt: skip
HEADER = ("model", "imsize", "dataset", "batch_size")  # of the report, even if they are main.py's defaults


class Run(NamedTuple):
    """A training: its variant, its seed, its command line and the options that this gives."""

    variant: str
    seed: int
    arguments: list[str]
    config: Config
    minutes: float | None = None  # of CPU time, in place of a number of steps

    @property
    def is_finished(self) -> bool:
        return (self.config.model_folder / f"{self.config.total_step}_state.pth").exists()


def make_runs(vary: Sequence[Sequence[str]], seeds: Sequence[int], out: str, arguments: list[str]) -> list[Run]:
    """Return all runs, seed by seed.

    Args:
        vary: see `read_axes`.
        arguments: options of main.py for all runs.

    Raises:
        UserError: an option cannot be varied or given, or has fewer than two values.
        SystemExit: main.py does not allow an option or a value, which is said in one line on stderr.
    """
    given = given_options(arguments, PROGRAM)
    if set_here := sorted(given & OWN_OPTIONS):
        raise UserError(f"--{set_here[0]} is set for each run: use --seeds and --out")
    axes = read_axes(vary, given)
    names = [name for group, _ in axes for name in group]
    words = [f"--{name}={value}" for name, value in DEFAULTS.items() if name not in given]
    every = max(1, get_parameters([*words, *arguments], PROGRAM).total_step // EVALUATIONS)
    words += [f"--{name}={every}" for name in ("metric_step", "sample_step") if name not in given]
    words += [*arguments, "--pretrained_model=auto"]
    words += [f"--{name}={Path(out) / folder}" for name, folder in FOLDERS.items()]
    runs = []
    for seed, values in itertools.product(dict.fromkeys(seeds), itertools.product(*(values for _, values in axes))):
        varied = [f"{name}={value}" for name, value in zip(names, itertools.chain(*values), strict=True)]
        variant = ",".join(varied)
        if not NAME.check(version := f"{variant},seed={seed}"):
            raise UserError(f"--vary {' '.join(names)}: results are named {version}, which must be {NAME.description}")
        own = [*words, *(f"--{option}" for option in varied), f"--seed={seed}", f"--version={version}"]
        runs.append(Run(variant, seed, own, get_parameters(own, PROGRAM)))
    for group, values in axes:
        if len({tuple(getattr(run.config, name) for name in group) for run in runs}) < max(2, len(values)):
            raise UserError(f"--vary {'+'.join(group)} needs two or more different values: --vary attention full none")
    return runs


def read_axes(vary: Sequence[Sequence[str]], given: Set[str]) -> list[tuple[list[str], list[list[str]]]]:
    """Return the names of the options that each --vary changes, and the values that it gives them together.

    Args:
        vary: name and values of each; names and values are joined by "+" where several change at once.
        given: names of the options that are the same for all runs.
    """
    axes = [(joined.split("+"), [value.split("+") if "+" in joined else [value] for value in values])
            for joined, *values in vary]  # fmt: skip
    names = [name for group, _ in axes for name in group]
    for name in names:
        if name not in Config.__dataclass_fields__:
            raise UserError(f"--vary {name}: there is no such option of main.py")
        if name in OWN_OPTIONS:
            raise UserError(f"--vary {name}: it is set for each run; use --seeds and --out")
        if name in given or names.count(name) > 1:
            raise UserError(f"--vary {name}: it is given twice, by --vary and by --{name} or a second --vary")
    for group, values in axes:
        if wrong := ["+".join(value) for value in values if len(value) != len(group)]:
            raise UserError(f"--vary {'+'.join(group)}: {wrong[0]} must have {len(group)} values, joined by +")
    return axes


def limit_minutes(runs: Sequence[Run], minutes: float, out: Path, given: Set[str]) -> list[Run]:
    """Return the runs with the steps that take so much CPU time; `given` names the options that are given or vary.

    Raises:
        UserError: the minutes or another option do not allow it; and see `seconds_per_step`.
    """
    if not 0 < minutes < math.inf:
        raise UserError(f"--minutes must be greater than 0, not {minutes:g}")
    if "total_step" in given:
        raise UserError("--minutes and --total_step exclude each other")
    if sys.platform == "win32" or any(setup_device(run.config.device).type != "cpu" for run in runs):
        raise UserError("--minutes is CPU time: it needs --device cpu, on Linux or macOS")
    limited = []
    for run in runs:
        steps = max(1, round(60 * minutes / seconds_per_step(run, min(20, 6 * minutes), out)))
        every = max(1, steps // EVALUATIONS)
        values = {"total_step": steps, "metric_step": every, "sample_step": every}
        arguments = run.arguments + [f"--{name}={values[name]}" for name in LENGTH - given]
        limited.append(run._replace(arguments=arguments, config=get_parameters(arguments, PROGRAM), minutes=minutes))
    return limited


def seconds_per_step(run: Run, at_least: float, out: Path) -> float:
    """Return the CPU time of a step, as --out has it of this variant or one of the same cost, or measured and kept.

    It is the difference of a short training and one that takes `at_least` more seconds, by that of their steps.

    Raises:
        UserError: this variant was measured with other options.
        SystemExit: the training failed or was stopped; with its exit code.
    """
    own, same = out / "minutes" / f"{run.variant}.json", {name: getattr(run.config, name) for name in SAME_COST}
    for path in sorted(own.parent.glob("*.json"), key=lambda path: path != own):
        saved = json.loads(path.read_bytes())
        if not (changes := changed_options(saved["config"] | same, run.config)):
            break
        if path == own:
            raise UserError(f"{run.variant} in --out has other options, choose another --out: {', '.join(changes)}")
    else:
        print(f"measuring the CPU time of a step of {run.variant}")
        make_loader(run.config, CPU).open()  # so that the images are in the cache
        base, steps = cpu_seconds(run, 5), 10
        while (spent := cpu_seconds(run, 5 + steps) - base) < at_least:
            steps = min(10 * steps, math.ceil(1.2 * steps * at_least / max(spent, 1e-9)))
        saved = {"seconds": spent / steps, "config": vars(run.config)}
    if not own.exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        write_atomically({own: json.dumps(saved).encode()})
    return saved["seconds"]


def cpu_seconds(run: Run, steps: int) -> float:
    """Return the CPU time of some steps, the start, and what is due at the end but the metrics."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {"total_step": steps, "metrics": None, "save_minutes": 0.0, **dict.fromkeys(FOLDERS, folder)}
        changes |= dict.fromkeys(("sample_step", "attn_step", "min_save_step"), 10**9)
        _, _, *words = shlex.split(run.config.command_line(**changes))  # after "python main.py"
        before = os.times()
        code = train(run._replace(arguments=words))
        after = os.times()
    if code:
        sys.exit(code)
    return sum(after[2:4]) - sum(before[2:4])  # of child processes and theirs, that of the system included


def check_run(run: Run) -> None:
    """Check, before any training, that what --out has of a run is of these options and images.

    Raises:
        UserError: it is not, or is of later steps, or another process writes to it, or its log is incomplete.
    """
    config, folder = run.config, run.config.model_folder
    if not checkpoint.list_steps(folder):
        return
    try:
        with lock_folders(config):
            state = checkpoint.load(folder, str(config.total_step) if run.is_finished else "latest").state
    except UserError as error:
        raise UserError(str(error).replace("--version", "--out")) from error
    if state is None:  # weights of step 0
        return
    is_exact = config.lr_schedule == "constant" and state["config"]["total_step"] != config.total_step
    same = {name: getattr(config, name) for name in NOT_COMPARED | (LENGTH if is_exact else set())}
    if changes := changed_options(state["config"] | same, config):
        raise UserError(f"{config.version} in --out has other options, choose another --out: {', '.join(changes)}")
    if (newest := max(checkpoint.list_steps(folder))) > config.total_step:
        longer = "more --minutes" if run.minutes else f"--total_step {newest}"
        raise UserError(f"{config.version} in --out is at step {newest}: use {longer}, or another --out")
    if make_loader(config, CPU).open().fingerprint != state["data"]:
        raise UserError(f"{config.version} in --out was trained on other images: choose another --out")
    if run.is_finished:
        read_run(run)


def share_weights(runs: Sequence[Run]) -> None:
    """Write what the runs of a seed that are not started start from: checkpoints of step 0.

    Weights are those that main.py would draw, or of an earlier run where it has some of the same name and shape.
    """
    pool: dict[tuple, torch.Tensor] = {}
    for run in sorted(runs, key=lambda run: not checkpoint.list_steps(run.config.model_folder)):
        config, folder = run.config, run.config.model_folder
        if 0 in (steps := checkpoint.list_steps(folder)):
            start = checkpoint.load(folder, "0")
            networks = {"G": start.G, "D": start.D}
        else:
            classes = make_loader(config, CPU).classes if config.conditional else ()
            torch.manual_seed(config.seed)
            G, D = build_networks(config, len(classes))
            networks = {"G": G.state_dict(), "D": D.state_dict()}
        contents = {}
        for part, own in networks.items():
            weights = {key: pool.setdefault((part, key, value.shape), value) for key, value in own.items()}
            torch.save(weights, buffer := io.BytesIO())
            contents[folder / f"0_{part}.pth"] = buffer.getbuffer()
        if not steps:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(contents)


def train(run: Run) -> int:
    """Run main.py until its last step, or a signal, which is passed on. Returns its exit code, as a shell has it."""
    # In a session of its own: Ctrl-C in a terminal would reach it twice, and the second one ends it without saving.
    # PR_SET_PDEATHSIG, 1: when this process is killed, the system sends it SIGTERM, which saves a checkpoint.
    options = {"start_new_session": True, "preexec_fn": LIBC and (lambda: LIBC.prctl(1, signal.SIGTERM))}
    process, received = subprocess.Popen([sys.executable, str(MAIN), *run.arguments], **options), []

    def receive(number: int, _: object) -> None:
        received.append(number)
        process.send_signal(number)

    with handle_signals(receive, stop_signals()):
        code = process.wait()
    return 128 - code if code < 0 else code or (128 + received[0] if received else 0)


def read_run(run: Run) -> Curves:
    """Return the curves of `NAMES` that a finished run's log has; `UserError` if it lacks one at the last step."""
    config, last = run.config, run.config.total_step
    curves = read_curves(config.log_folder, last)
    metrics = ["precision" if name == "prc" else name for name in (config.metrics or "").split(",") if name]
    if lacks := [name for name in ("images_per_s", *metrics) if name not in curves or curves[name][-1, 0] != last]:
        again = f"to train again, remove {config.model_folder}"
        raise UserError(f"{config.log_folder}/metrics.jsonl has no {lacks[0]} of step {last}: {again}")
    if "d_holdout" in curves:
        curves["d_gap"] = curves["d_train"] - curves["d_holdout"] * (0, 1)
    curves["ms"] = curves["images_per_s"] ** (1, -1) * (1, 1000 * config.batch_size)
    if run.minutes:
        del curves["ms"]  # it depends on the batch size, and on what else the machine does
        curves["steps"] = np.array([[last, last]])
        curves["cpu"] = curves["steps"] * (1, config.batch_size / (60 * run.minutes))
    scale = (run.minutes / last if run.minutes else 1, 1)
    return {name: curves[name] * scale for name in NAMES if name in curves}


def report(runs: Sequence[Run], path: Path, command: str) -> None:
    """Write `path` with the endings .md and .png: of these finished runs."""
    results: dict[str, dict[int, Curves]] = {}
    for run in runs:
        results.setdefault(run.variant, {})[run.seed] = read_run(run)
    shared = [
        f"{name} {option_text(value)}"
        for name, value in vars(runs[0].config).items()
        if name not in OWN_OPTIONS and (name in HEADER or value != getattr(Config, name))
        if all(getattr(run.config, name) == value for run in runs)
    ]
    devices = {setup_device(run.config.device) for run in runs}
    names = {torch.cuda.get_device_name(device) if device.type == "cuda" else device.type for device in devices}
    length = f" of {runs[0].minutes:g} CPU minutes each" if runs[0].minutes else ""
    machine = f"torch {torch.__version__} on {' and '.join(sorted(names))}"
    lines = [
        "# Ablation",
        f"{len(runs)} runs{length}, all with {', '.join(shared)}; written by {machine}:",
        f"    {command}",
        table(results),
        NOTE,
        f"![samples and curves]({path.name}.png)",
    ]
    path.with_suffix(".md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    grids = {(run.variant, run.seed): run.config.sample_folder / f"{run.config.total_step}_ema.png" for run in runs}
    write_figure(path.with_suffix(".png"), results, grids, "CPU minutes" if runs[0].minutes else "step")


def main() -> int:
    """Run the command line. Returns the exit code: of the first run that did not finish, or 0."""
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--vary", nargs="+", action="append", required=True, metavar=("NAME", "VALUE"),
                        help="an option of main.py and the values to compare")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], metavar="SEED", help="default 0 1")
    parser.add_argument("--minutes", type=float, help="CPU time of the steps of a run, in place of --total_step")
    parser.add_argument("--out", default="./ablation", help="folder of all results")
    own, arguments = parser.parse_known_args()
    if not own.out:
        raise UserError("--out must be a folder")
    out = Path(os.path.expanduser(own.out))
    check_writable(out)
    runs = make_runs(own.vary, own.seeds, own.out, arguments)
    names = [name for joined, *_ in own.vary for name in joined.split("+")]
    if own.minutes is not None:
        runs = limit_minutes(runs, own.minutes, out, given_options(arguments, PROGRAM) | {*names})
    for run in runs:
        check_run(run)
    path = out / f"ablation_{'_'.join(names)}"
    command = shlex.join(["python", PROGRAM, *sys.argv[1:]])
    for number, run in enumerate(runs, start=1):
        if run.is_finished:
            continue
        print(f"run {number} of {len(runs)}: {run.config.version}")
        share_weights([other for other in runs if other.seed == run.seed])
        if code := train(run):
            print("the same command goes on from here" if code > 128 else f"{run.config.version} failed")
            return code
        report([other for other in runs if other.is_finished or other is run], path, command)
    report(runs, path, command)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    make_output_robust()
    try:
        sys.exit(main())
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(exit_code(error))
