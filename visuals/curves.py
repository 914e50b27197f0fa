"""Training curves: read from a run's `metrics.jsonl`, drawn as SVG.

    curves = read_curves(Path("logs/sagan_celeb"), step=20000)
    svg = line_chart("Losses", {"D": curves["d_loss"], "G": curves["g_loss"]})

Matplotlib draws; it is imported with the first chart, as that takes 0.2 to 0.5 s.
"""

import io
import json
import logging
import math
import os
import re
import sys
from array import array
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import ModuleType

import numpy as np

WIDTH, PLOT_HEIGHT, LEFT, BOTTOM, MARGIN, ROW = 460, 180, 62, 30, 14, 19  # points; a row is a line of the legend
STRETCHES = 200  # a series is downsampled to the lowest and highest point of so many parts of it
DOTS_UP_TO = 40  # a series of so few points has them drawn as dots too
NOISY = 6  # a series whose total variation exceeds this many times its range is noise around a mean
# Okabe and Ito's color-blind safe blue, vermilion, green and purple, with a contrast of 3:1 on white and on #171b21.
# The next four series have the same colors dashed; of more, those that change least are gray.
COLORS, GRAY = ("#1f82c9", "#d55e00", "#009e73", "#c770a1"), "#8c8c8c"
NAMED = 2 * len(COLORS)  # series with a color at most
TEXT_COLOR = "#010203"  # a marker that becomes currentColor
RC = {
    "font.sans-serif": "DejaVu Sans",  # comes with Matplotlib
    "font.size": 11,
    "svg.fonttype": "none",  # text, not outlines
    "text.parse_math": False,
} | dict.fromkeys(("axes.edgecolor", "grid.color", "text.color", "xtick.color", "ytick.color"), TEXT_COLOR)
# CanvasText contrasts with the background that a browser gives the file, light or dark. Most fonts are narrower than
# DejaVu Sans, in which the text is laid out: there is room for larger text on phones.
STYLE = """<style>.line-chart{color-scheme:light dark;color:CanvasText}
.line-chart text{font-family:system-ui,sans-serif!important}
@media (max-width:440px){.line-chart text{font-size:13px!important}}</style>"""


def read_curves(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Read the entries of a log folder's `metrics.jsonl` up to `step`.

    Returns:
        The points of each name, (n, 2) as (step, value), by step; only finite ones, names without any are left out.
        Lines that are no JSON object of numbers with a step, such as one that was cut off, are skipped.
    """
    # A table for each set of names: some entries have metrics too. 100,000 entries of 25 names take 0.75 s of CPU time,
    # of which json takes 0.5 s; a list of points for each name took 1.8 s.
    tables: dict[tuple[str, ...], array] = {}
    with suppress(FileNotFoundError), open(folder / "metrics.jsonl", encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
                if entry["step"] <= step:
                    tables.setdefault(tuple(entry), array("d")).extend(array("d", entry.values()))
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
    columns = {names: np.asarray(values).reshape(-1, len(names)).T for names, values in tables.items()}
    curves = {}
    for name in dict.fromkeys(chain(*tables)):
        rows = [table[[names.index("step"), names.index(name)]] for names, table in columns.items() if name in names]
        points = np.concatenate(rows, axis=1).T
        points = points[np.isfinite(points[:, 1])]
        if name != "step" and len(points):
            curves[name] = points[points[:, 0].argsort(kind="stable")]
    return curves


def import_matplotlib() -> ModuleType:
    """Return matplotlib with its `figure`, which needs no backend."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home that cannot be written
    if "ipykernel" not in sys.modules:  # programs that a notebook starts inherit its backend, and may not have it
        os.environ.pop("MPLBACKEND", None)
    import matplotlib.figure

    return matplotlib


def line_chart(title: str, series: Mapping[str, np.ndarray], *, y_label: str = "", mark: int | None = None) -> str:
    """Draw lines over the steps as an SVG element, which is a valid file of its own too.

    Long series are downsampled such that spikes survive; noisy ones are drawn faint, with a running mean on top. Of
    more than `NAMED` series, those that change least are gray and have no name. The background is transparent, text has
    the color of the page around it. Takes about 25 ms.

    Args:
        series: finite points (n, 2) of each line, n > 0, by step.
        y_label: at the top right.
        mark: a step that gets a dotted vertical line.
    """
    matplotlib = import_matplotlib()
    ranges = {name: np.ptp(points[:, 1]) for name, points in series.items()}
    others = sorted(ranges, key=ranges.get, reverse=True)[NAMED:]
    named = {name: points for name, points in series.items() if name not in others}
    labels = [f"{name}  {_format(points[-1, 1])}" for name, points in named.items()]
    labels += [f"{len(others)} others"] if others else []
    columns = max(1, 60 // (max(map(len, labels)) + 5))
    height = ROW * (2.2 + math.ceil(len(labels) / columns)) + PLOT_HEIGHT + BOTTOM
    left, svg = MARGIN / WIDTH, io.StringIO()
    with matplotlib.rc_context(RC | {"svg.hashsalt": f"{title} {labels}"}):  # the salt makes ids unique on a page
        figure = matplotlib.figure.Figure(figsize=(WIDTH / 72, height / 72))
        axes = figure.add_axes((LEFT / WIDTH, BOTTOM / height, 1 - (LEFT + 2 * MARGIN) / WIDTH, PLOT_HEIGHT / height))
        gray = [axes.plot(*_downsample(series[name]).T, color=GRAY, linewidth=0.7)[0] for name in others]
        lines = [_plot(axes, points, index) for index, points in enumerate(named.values())] + gray[:1]
        if mark is not None:
            axes.axvline(mark, color=GRAY, linestyle=":")
        axes.margins(x=0.02)
        ends = [step for points in series.values() for step in points[[0, -1], 0]]
        if min(ends) == max(ends):  # no fractions of a step around it
            axes.set_xlim(ends[0] - 1, ends[0] + 1)
        axes.locator_params(nbins=6)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.set_major_formatter("{x:,.7g}")
        axes.yaxis.set_major_formatter("{x:,.7g}")
        axes.tick_params(length=0, pad=6)
        axes.grid(axis="y", alpha=0.15)
        axes.spines[["left", "top", "right"]].set_visible(False)
        figure.text(left, 1 - 20 / height, title, weight="bold", size=12)
        figure.text(1 - left, 1 - 20 / height, y_label, ha="right")
        figure.text(left, 15.1 / height, "step")  # on the baseline of the tick labels
        place = {"loc": "upper left", "bbox_to_anchor": (left, 1 - 34 / height), "borderaxespad": 0, "borderpad": 0}
        figure.legend(lines, labels, ncols=columns, frameon=False, **place)
        figure.savefig(svg, format="svg", transparent=True, metadata={"Title": title, "Date": None})
    return _embeddable(svg.getvalue())


def series_style(index: int) -> dict[str, str]:
    """Return Matplotlib's color and line style of a series by its number: dashed when all colors are used."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": "-" if index < len(COLORS) else "--"}


def _plot(axes, points: np.ndarray, index: int):
    """Plot a series. Returns the line that the legend shows."""
    style, shown = series_style(index), _downsample(points)
    if len(points) <= DOTS_UP_TO:
        return axes.plot(*shown.T, marker="o", markersize=3.5, **style)[0]
    if np.abs(np.diff(shown[:, 1])).sum() <= NOISY * np.ptp(shown[:, 1]):
        return axes.plot(*shown.T, **style)[0]
    axes.plot(*shown.T, linewidth=0.8, alpha=0.4, **style)
    return axes.plot(*running_mean(points).T, zorder=3, **style)[0]


def _downsample(points: np.ndarray) -> np.ndarray:
    """Return the first, the last, and of each stretch the lowest and the highest of the points (n, 2)."""
    count = len(points)
    if count <= 2 * STRETCHES:
        return points
    size = math.ceil(count / STRETCHES)
    index = np.arange(STRETCHES * size).clip(max=count - 1).reshape(STRETCHES, size)
    y, row = points[index, 1], np.arange(STRETCHES)
    return points[np.unique([*index[row, y.argmin(1)], *index[row, y.argmax(1)], 0, count - 1])]


def running_mean(points: np.ndarray) -> np.ndarray:
    """Return means over a fortieth of the points (n, 2), at most 2 * STRETCHES of them."""
    width = max(1, len(points) // 40)
    sums = np.cumsum(np.insert(points, 0, 0, axis=0), axis=0)
    means = (sums[width:] - sums[:-width]) / width
    return means[:: math.ceil(len(means) / (2 * STRETCHES))]


def _format(value: float) -> str:
    """Format a number with up to 4 significant digits and no exponent."""
    return np.format_float_positional(value, 4, fractional=False, trim="-").replace("-", "\N{MINUS SIGN}")


def _embeddable(svg: str) -> str:
    """Remove what does not belong into a page: the XML header, metadata, the fixed size and ids that repeat."""
    svg = re.sub("<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub("<style.*?</style>", STYLE, svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'class="line-chart" role="img"', svg, count=1)
    return re.sub('<g id="[^"]*"', "<g", svg).replace(TEXT_COLOR, "currentColor")
