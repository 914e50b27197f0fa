"""The table and the figure of `ablation.py`: metrics and curves of variants, over their seeds."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from visuals.curves import import_matplotlib, running_mean, series_style
from visuals.figures import read_picture

NAMES = {  # of the curves that are compared, in the table and in the figure
    "faces": "face rate",
    "hog": "HOG distance",
    "fid": "FID",
    "kid": "KID",
    "isc": "Inception score",
    "precision": "precision",
    "recall": "recall",
    "faces_real": "face rate of real images",
    "hog_real": "HOG distance of halves of the real images",
    "d_gap": "gap of D",
    "d_sign": "r",
    "ms": "ms per step",
    "steps": "steps",
    "cpu": "images per CPU second",
}
NO_CURVE = {"faces_real", "hog_real", "ms", "steps", "cpu"}  # in the table only
NOTE = """\
Mean over the seeds and, in brackets, the lowest and the highest value, if they differ. Gap of D: its mean logit on
training images minus that on held-out ones. r: the mean sign of its logits on training images. Both are means over the
last tenth of the steps, ms per step is a median over all (runs are trained one after the other: compare it on an idle
machine only), the metrics are of the last step, against real images of the run's own size and folder: where these vary,
metrics of different variants cannot be compared. Images per CPU second: batch size times steps, n_critic not counted.
In the curves, lines are means over the seeds and bands reach from the lowest to the highest, at the steps that all
seeds have.

Runs of the same seed have the same z and order of images, unless what varies decides these, and start from the same
weights wherever these have the same name and shape."""

Curves = Mapping[str, np.ndarray]  # points (n, 2) as (step, value) by name
Results = Mapping[str, Mapping[int, Curves]]  # by variant and seed


def final_value(name: str, points: np.ndarray) -> float:
    """Return the value of a curve (n, 2) for the table, see `NOTE`."""
    values = points[:, 1]
    if name == "ms":
        return float(np.median(values))
    return float(values[-math.ceil(len(values) / 10) :].mean() if name in ("d_gap", "d_sign") else values[-1])


def names_in(results: Results) -> list[str]:
    return [name for name in NAMES if any(name in curves for seeds in results.values() for curves in seeds.values())]


def table(results: Results) -> str:
    """Return the table in Markdown; a dash where a variant has no curve, as of the gap of D without --holdout."""
    shown = names_in(results)
    rows = [["variant", "seeds", *(NAMES[name] for name in shown)], ["---"] * (len(shown) + 2)]
    for variant, by_seed in results.items():
        row = [variant, ", ".join(map(str, by_seed))]
        for name in shown:
            values = [final_value(name, curves[name]) for curves in by_seed.values() if name in curves]
            spread = f" ({_format(min(values))} to {_format(max(values))})" if len({*values}) > 1 else ""
            row.append(_format(np.mean(values)) + spread if values else "\N{EN DASH}")
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _format(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_figure(path: Path, results: Results, grids: Mapping[tuple[str, int], Path], unit: str) -> None:
    """Draw the grids, if they exist, a column for each variant and a row for each seed, and below them the curves."""
    seeds = sorted({seed for by_seed in results.values() for seed in by_seed})
    shown = [name for name in names_in(results) if name not in NO_CURVE]
    rows = math.ceil(len(shown) / 2)
    heights = [len(seeds) * min(4, 10 / len(results)), 3 * rows]
    figure = import_matplotlib().figure.Figure(figsize=(10, sum(heights)), dpi=100, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    for row, seed in zip(top.subplots(len(seeds), len(results), squeeze=False), seeds, strict=True):
        for axes, variant in zip(row, results, strict=True):
            axes.axis("off")
            if (variant, seed) in grids and (grid := read_picture(grids[variant, seed])):
                axes.set_title(f"{variant}, seed {seed}".replace(",", "\n"), fontsize="small")
                axes.imshow(grid)
    lines = {}  # by variant, for the legend
    for axes, name in itertools.zip_longest(bottom.subplots(rows, 2, squeeze=False).flat, shown):
        if name is None:  # an odd number of curves
            axes.axis("off")
            continue
        axes.set(title=NAMES[name], xlabel=unit)
        for index, (variant, by_seed) in enumerate(results.items()):
            found = [curves[name] for curves in by_seed.values() if name in curves]
            shared = set.intersection(*({*points[:, 0]} for points in found)) if found else ()
            if not shared:
                continue
            curves = [running_mean(points[np.isin(points[:, 0], [*shared])]) for points in found]
            steps, values, style = curves[0][:, 0], [points[:, 1] for points in curves], series_style(index)
            lines[variant] = axes.plot(steps, np.mean(values, 0), marker="o" if len(steps) < 20 else None, **style)[0]
            low, high = np.min(values, 0), np.max(values, 0)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
        axes.spines[["top", "right"]].set_visible(False)
    bottom.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
