"""Train variants that differ in named options, each with several seeds, and compare them.

    python benchmarks/ablation.py --vary attention full none --seeds 0 1 --dataset folder --image_path photos
    python benchmarks/ablation.py --vary augment none color,translation,cutout --seeds 0 1 2 --total_step 5000

All other options are those of main.py and the same for all runs; some have other defaults here, see `DEFAULTS`. With
--vary given twice, every combination is a variant. Runs are trained one after the other, seed by seed. Ctrl-C saves a
checkpoint, and the same command goes on from there; finished runs are kept, so that seeds can be added later.

Writes to --out (./ablation): the results of each run in the usual folders and, after each run that is finished,
`ablation.md`, a table of means and ranges over the seeds, and `ablation.png`, samples of the same z side by side, and
curves. The default metrics need OpenCV only; with torch-fidelity, use --metrics kid,faces,hog.
"""

import argparse
import itertools
import math
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from errors import UserError, exit_code, handle_signals, make_output_robust, stop_signals
from parameter import Config, get_parameters, given_options
from utils import resolve_device
from visuals.curves import COLORS, import_matplotlib, read_curves, running_mean

MAIN = Path(__file__).resolve().parents[1] / "main.py"
DEFAULTS = {"total_step": 2000, "metrics": "faces,hog", "metric_num": 2000, "holdout": 0.05}
EVALUATIONS = 10  # sample grids and evaluations of the metrics in a run, by default
FOLDERS = {"sample_path": "samples", "attn_path": "attn", "model_save_path": "models", "log_path": "logs"}
OWN_OPTIONS = {"train", "seed", "version", "pretrained_model", "overwrite", *FOLDERS}
NAMES = {  # of the curves that are compared, in the table and in the figure
    "faces": "face rate",
    "hog": "HOG distance",
    "fid": "FID",
    "kid": "KID",
    "isc": "Inception score",
    "precision": "precision",
    "recall": "recall",
    "d_gap": "gap of D",
    "d_sign": "r",
    "ms": "ms per step",
}
NOTE = """\
Mean over the seeds and, in brackets, the lowest and the highest value. Gap of D: its mean logit on training images
minus that on held-out ones. r: the mean sign of its logits on training images. Both are means over the last tenth of
the steps, ms per step is a median over all, the metrics are of the last step. The samples of a seed are of the same z.
In the curves, lines are means over the seeds and bands reach from the lowest to the highest."""

Curves = Mapping[str, np.ndarray]  # points (n, 2) as (step, value) by name


class Run(NamedTuple):
    """A training: its variant, its seed, its command line and the options that this gives."""

    variant: str
    seed: int
    arguments: list[str]
    config: Config

    @property
    def is_finished(self) -> bool:
        return (self.config.model_folder / f"{self.config.total_step}_state.pth").exists()


def make_runs(vary: Sequence[Sequence[str]], seeds: Sequence[int], out: str, arguments: Sequence[str]) -> list[Run]:
    """Return all runs, seed by seed.

    Args:
        vary: the name and the values of each option that differs.
        out: the folder of the results.
        arguments: options of main.py for all runs.

    Raises:
        UserError: an option cannot be varied or given, or has fewer than two values.
        SystemExit: main.py does not allow an option or a value, which it says in one line on stderr.
    """
    given = given_options([*arguments])
    if set_here := sorted(given & OWN_OPTIONS):
        raise UserError(f"--{set_here[0]} is set for each run: use --seeds and --out")
    for name, *values in vary:
        if name in OWN_OPTIONS | given or any("/" in value for value in values):
            raise UserError(f"--vary {name}: it is an option of all runs, or differs in more than the training")
        if len({*values}) < max(2, len(values)):
            raise UserError(f"--vary {name} needs two or more different values: --vary attention full none")
    defaults = DEFAULTS | ({"total_step": get_parameters([*arguments]).total_step} if "total_step" in given else {})
    defaults |= dict.fromkeys(("metric_step", "sample_step"), max(1, defaults["total_step"] // EVALUATIONS))
    words = [f"--{name}={value}" for name, value in defaults.items() if name not in given]
    words += [*arguments, *(f"--{name}={Path(out) / folder}" for name, folder in FOLDERS.items())]
    runs = []
    for seed, values in itertools.product(seeds, itertools.product(*(values for _, *values in vary))):
        varied = [f"{name}={value}" for (name, *_), value in zip(vary, values, strict=True)]
        variant = ",".join(varied)
        own = [*(f"--{option}" for option in varied), f"--seed={seed}", f"--version={variant},seed={seed}"]
        own += ["--pretrained_model=auto"]
        runs.append(Run(variant, seed, [*words, *own], get_parameters([*words, *own])))
    return runs


def train(run: Run) -> int:
    """Run main.py until its last step, or a signal, which is passed on. Returns its exit code."""
    # In a session of its own: Ctrl-C in a terminal would reach it twice, and the second one ends it without saving.
    process = subprocess.Popen([sys.executable, str(MAIN), *run.arguments], start_new_session=True)
    with handle_signals(lambda number, _: process.send_signal(number), stop_signals()):
        return process.wait()


def read_run(run: Run) -> Curves:
    """Return the curves of `NAMES` that the run's log has."""
    curves = read_curves(run.config.log_folder, run.config.total_step)
    if "d_holdout" in curves:
        curves["d_gap"] = curves["d_train"] - curves["d_holdout"] * (0, 1)
    curves["ms"] = curves["images_per_s"] ** (1, -1) * (1, 1000 * run.config.batch_size)
    return {name: curves[name] for name in NAMES if name in curves}


def final_value(name: str, points: np.ndarray) -> float:
    """Return the value of a curve (n, 2) for the table, see `NOTE`."""
    values = points[:, 1]
    if name == "ms":
        return float(np.median(values))
    return float(values[-math.ceil(len(values) / 10) :].mean() if name in ("d_gap", "d_sign") else values[-1])


def table(results: Mapping[str, Mapping[int, Curves]]) -> str:
    """Return the table in Markdown. `results` are the curves by variant and seed."""
    all_curves = [curves for by_seed in results.values() for curves in by_seed.values()]
    shown = [name for name in NAMES if all(name in curves for curves in all_curves)]
    rows = [["variant", "seeds", *(NAMES[name] for name in shown)], ["---"] * (len(shown) + 2)]
    for variant, by_seed in results.items():
        row = [variant, ", ".join(map(str, by_seed))]
        for name in shown:
            values = [final_value(name, curves[name]) for curves in by_seed.values()]
            spread = f" ({_format(min(values))} to {_format(max(values))})" if len(values) > 1 else ""
            row.append(_format(np.mean(values)) + spread)
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _format(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_figure(
    path: Path, results: Mapping[str, Mapping[int, Curves]], grids: Mapping[tuple[str, int], Path]
) -> None:
    """Draw the sample grids, a column for each variant and a row for each seed, and below them the curves.

    Args:
        results: the curves by variant and seed.
        grids: the sample grids by variant and seed, of which some may be missing.
    """
    seeds = sorted({seed for by_seed in results.values() for seed in by_seed})
    shown = [name for name in NAMES if name != "ms" and any(name in c for s in results.values() for c in s.values())]
    rows = math.ceil(len(shown) / 2)
    heights = [len(seeds) * min(4, 10 / len(results)), 3 * rows]
    figure = import_matplotlib().figure.Figure(figsize=(10, sum(heights)), dpi=100, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    for row, seed in zip(top.subplots(len(seeds), len(results), squeeze=False), seeds, strict=True):
        for axes, variant in zip(row, results, strict=True):
            axes.axis("off")
            if (variant, seed) in grids and grids[variant, seed].exists():
                axes.set_title(f"{variant}, seed {seed}")
                axes.imshow(Image.open(grids[variant, seed]))
    for axes, name in zip(bottom.subplots(rows, 2, squeeze=False).flat, shown, strict=False):
        axes.set(title=NAMES[name], xlabel="step")
        for (variant, by_seed), color in zip(results.items(), itertools.cycle(COLORS)):
            curves = [running_mean(curves[name]) for curves in by_seed.values() if name in curves]
            if not curves:  # such as the gap of D in a run without --holdout
                continue
            steps = curves[0][:, 0]
            values = [np.interp(steps, *points.T) for points in curves]
            axes.plot(steps, np.mean(values, 0), color=color, label=variant)
            axes.fill_between(steps, np.min(values, 0), np.max(values, 0), color=color, alpha=0.2, linewidth=0)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def report(runs: Sequence[Run], out: Path, command: str) -> None:
    """Write `ablation.md` and `ablation.png` of these finished runs."""
    results: dict[str, dict[int, Curves]] = {}
    for run in runs:
        results.setdefault(run.variant, {})[run.seed] = read_run(run)
    config, device = runs[0].config, resolve_device(runs[0].config.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    curves = read_curves(config.log_folder, config.total_step)
    real = [
        f"{NAMES[name]} {curves[f'{name}_real'][-1, 1]:.3g}" for name in ("faces", "hog") if f"{name}_real" in curves
    ]
    lines = [
        "# Ablation",
        f"{len(runs)} runs of {config.total_step:,} steps at batch size {config.batch_size}, {config.model} on "
        f"{config.dataset} at {config.imsize}x{config.imsize}, torch {torch.__version__} on {machine}:",
        f"    {command}",
        table(results),
        "Real images: " + ", ".join(real) + " (HOG: of one half to the other)." if real else "",
        NOTE,
        "![samples and curves](ablation.png)",
    ]
    (out / "ablation.md").write_text("\n\n".join(filter(None, lines)) + "\n", encoding="utf-8")
    grids = {(run.variant, run.seed): run.config.sample_folder / f"{run.config.total_step}_ema.png" for run in runs}
    write_figure(out / "ablation.png", results, grids)


def main() -> int:
    """Run the command line. Returns the exit code: of the first run that did not finish, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vary", nargs="+", action="append", required=True, metavar=("NAME", "VALUE"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], metavar="SEED", help="default 0 1")
    parser.add_argument("--out", default="./ablation", help="folder of all results")
    own, arguments = parser.parse_known_args()
    runs = make_runs(own.vary, own.seeds, own.out, arguments)
    command = shlex.join(["python", "benchmarks/ablation.py", *sys.argv[1:]])
    for number, run in enumerate(runs, start=1):
        if run.is_finished:
            continue
        print(f"run {number} of {len(runs)}: {run.config.version}")
        if code := train(run):
            print("the same command goes on from here" if code > 128 else f"{run.config.version} failed")
            return code
        report([run for run in runs if run.is_finished], Path(own.out), command)
    report(runs, Path(own.out), command)
    print((Path(own.out) / "ablation.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    make_output_robust()
    try:
        sys.exit(main())
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(exit_code(error))
