"""Line charts as SVG text, for a page or as a file of their own.

    Path("gamma.svg").write_text(line_chart("Gamma", {"G attn1": [(10, 0.0), (20, 0.1)]}), encoding="utf-8")

A chart brings its own style, light or dark as the reader's system is, and grows and shrinks with the space it is given.
"""

import html
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Points = Sequence[tuple[float, float]] | np.ndarray  # pairs (x, y), or an array (n, 2)

WIDTH, PLOT_HEIGHT, MARGIN = 480, 150, 14  # units of the view box: a chart of this width has them as pixels
LETTER = 8.7  # about the width of a letter where the style makes them large, on a phone
MOST_POINTS = 400  # of a series: more would not be seen at this width
DOTS_UP_TO = 40  # a series of so few points shows each as a dot
ROUGH = 6  # a series that goes up and down this many times its range is noise, in which only an average can be seen
# Blue, orange, green, purple, brown, light blue, light brown, grey, as (on light paper, on dark paper). With each kind
# of colour blindness (Machado 2009) the first four are at least 30 apart in CIELAB, all 18; all 3:1 against the paper.
COLOURS = (
    ("#004aba", "#2899f4"),
    ("#e16311", "#e88b50"),
    ("#00a274", "#41f7c0"),
    ("#8a2170", "#a66c9d"),
    ("#644a00", "#edd34b"),
    ("#7e93b6", "#aae3ff"),
    ("#925940", "#d29c7e"),
    ("#636363", "#aaadb3"),
)
# Light first, for readers of SVG that know no media queries. One style for all charts: on a page they share it.
STYLE = """.line-chart{font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
@media (max-width:440px){.line-chart{font-size:15px}}
.line-chart .paper{fill:#fff}
.line-chart text{fill:#4a515c}
.line-chart .title,.line-chart .latest{fill:#16191d;font-weight:600}
.line-chart .grid{stroke:#8892a0;stroke-opacity:.25}
.line-chart .zero{stroke:#8892a0;stroke-opacity:.8}
.line-chart .line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.line-chart .rough{stroke-width:1;stroke-opacity:.45}
.line-chart .dots{stroke-width:5.5}
.line-chart .more{stroke-dasharray:5 4}
@media (prefers-color-scheme:dark){
.line-chart .paper{fill:#171b21}
.line-chart text{fill:#a9b2be}
.line-chart .title,.line-chart .latest{fill:#eef1f5}
}
"""


class Axis(NamedTuple):
    """What an axis shows: from `low` to `high`, with grid lines at `ticks`, whose texts are `labels`."""

    low: float
    high: float
    ticks: list[float]
    labels: list[str]

    def place(self, values: np.ndarray, start: float, end: float) -> np.ndarray:
        """Where values lie between start (that of `low`) and end."""
        return start + (np.asarray(values, float) - self.low) / (self.high - self.low) * (end - start)


def line_chart(title: str, series: Mapping[str, Points], *, x_label: str = "step", y_label: str = "") -> str:
    """An SVG of lines over a common x.

    A line of more than 400 points is drawn from the extremes of 200 stretches of it, so that no spike is lost. Where it
    is noise it is drawn faint, and its running average on top of it.

    Args:
        title: the first line.
        series: the points (x, y) of each line under its name, in any order. What is not finite, or beyond 1e100, is
            left out. The first eight lines have colours of their own; the next ones have them dashed.
        x_label, y_label: what x and y are.

    Returns:
        The text of an SVG element, also good as a file of its own. Its `data-plot` holds the plot area's left, top,
        right and bottom, and the x at its left and right.
    """
    lines = {name: clean(points) for name, points in series.items()}
    every = np.concatenate([np.empty((0, 2)), *lines.values()])
    x_axis, y_axis = make_axis(every[:, 0]), make_axis(every[:, 1], to_ticks=True)
    legend, top = _legend(lines)
    x_label = _shorten(x_label, 10)  # to the left of the ticks' labels
    left = MARGIN + LETTER * max(map(len, [*y_axis.labels, x_label]))
    right, bottom = WIDTH - MARGIN - 6, top + PLOT_HEIGHT
    area = (left, top, right, bottom)
    plot = " ".join(f"{value:.10g}" for value in (*area, x_axis.low, x_axis.high))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 30:.0f}" class="line-chart" '
        f'role="img" data-plot="{plot}"><title>{xml_text(title)}</title><style>{STYLE}{_colours()}</style>',
        '<rect class="paper" width="100%" height="100%" rx="8"/>',
        _text(MARGIN, 26, _shorten(title, 46 - min(20, len(y_label))), "title"),
        _text(right, 26, _shorten(y_label, 20), anchor="end"),
        *legend,
        *_grid(x_axis, y_axis, area),
        _text(left - 14, bottom + 20, x_label, anchor="end"),
    ]
    drawn = [_draw(points, index, x_axis, y_axis, area) for index, points in enumerate(lines.values())]
    if not len(every):
        parts.append(_text((left + right) / 2, (top + bottom) / 2, "nothing yet", anchor="middle"))
    parts += [line for line, _ in drawn] + [average for _, average in drawn]  # no average lies under another's noise
    return "".join(parts) + "</svg>"


def clean(points: Points) -> np.ndarray:
    """Points as an array (n, 2), by growing x, without those that are not finite or beyond 1e100."""
    array = np.asarray(points, float).reshape(-1, 2)
    sizes = np.abs(array)
    kept = (sizes <= 1e100).all(axis=1)
    array = np.where(sizes < 1e-100, 0, array)  # so that no span is too small to be divided by
    array = array if kept.all() else array[kept]
    return array if (array[1:, 0] >= array[:-1, 0]).all() else array[np.argsort(array[:, 0], kind="stable")]


def thin(points: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """At most `most` of the points (n, 2): the lowest and the highest of each stretch, and the first and the last."""
    if len(points) <= most:
        return points
    edges = np.linspace(0, len(points), most // 2, dtype=int)
    kept = {0, len(points) - 1}
    for start, end in itertools.pairwise(edges):
        stretch = points[start:end, 1]
        kept |= {start + int(stretch.argmin()), start + int(stretch.argmax())}
    return points[sorted(kept)]


def is_rough(points: np.ndarray) -> bool:
    """Whether a line through the points (n, 2), as it would be drawn, is too rough to be followed."""
    shown = thin(points)[:, 1]
    return len(points) > DOTS_UP_TO and bool(np.abs(np.diff(shown)).sum() > ROUGH * np.ptp(shown))


def running_average(points: np.ndarray, most: int = 160) -> np.ndarray:
    """Averages of y over a fortieth of the points (n, 2), at up to `most` of them, from the first to the last."""
    count = len(points)
    reach = count // 80
    centres = np.unique(np.linspace(0, count - 1, most).astype(int))
    sums = np.concatenate([[0.0], np.cumsum(points[:, 1])])
    starts, ends = np.maximum(centres - reach, 0), np.minimum(centres + reach + 1, count)
    return np.stack([points[centres, 0], (sums[ends] - sums[starts]) / (ends - starts)], axis=1)


def make_axis(values: np.ndarray, to_ticks: bool = False) -> Axis:
    """An axis on which all values (n,) lie; `to_ticks` makes it begin and end at ticks.

    It goes on to 0 where that costs less than half of it. Ticks are at multiples of 1, 2 or 5 times a power of ten.
    """
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size:
        low, high = (low - size / 10, high + size / 10) if size else (-1.0, 1.0)
    elif 0 < low < high / 2:
        low = 0.0
    elif low / 2 < high < 0:
        high = 0.0
    step = tick_step((high - low) / 5)
    first, last = low / step, high / step
    first, last = (math.floor(first), math.ceil(last)) if to_ticks else (math.ceil(first), math.floor(last))
    ticks = [index * step for index in range(first, last + 1)]
    if to_ticks:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    return Axis(low, high, ticks, tick_labels(ticks, step))


def tick_step(least: float) -> float:
    """The smallest of ..., 0.5, 1, 2, 5, 10, ... that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def tick_labels(ticks: Sequence[float], step: float) -> list[str]:
    """Short texts, all in one unit and with as many decimals as the step between them has."""
    size = max(map(abs, ticks), default=0)
    scale, unit = _unit(size)
    decimals = max(0, -math.floor(math.log10(step / scale) + 1e-9))
    if decimals > 9:  # tiny steps far from 0
        return [format_number(tick, 12) for tick in ticks]
    return ["0" if not tick else _minus(f"{tick / scale:.{decimals}f}{unit}") for tick in ticks]


def format_number(value: float, digits: int = 3) -> str:
    """A number for people, with that many digits: 0.0123, 1.23, 123, 1230, 20k, 1.5M, 2e-7."""
    if not math.isfinite(value):
        return str(value)
    scale, unit = _unit(abs(value))
    text = f"{value / scale:.{digits}g}"
    if "e" in text:  # 999.9k, which rounds up to the next unit, and whole numbers of more digits
        text = f"{value / scale:.0f}"
    return _minus(text + unit)


def _unit(size: float) -> tuple[float, str]:
    """What to divide numbers of that size by, and what to write behind them."""
    if size and not 1e-4 <= size < 1e12:
        power = math.floor(math.log10(size))
        return 10.0**power, f"e{power}"
    return next(((scale, unit) for least, scale, unit in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
                 if size >= least), (1.0, ""))  # fmt: skip


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}") if text.strip("-0.") else text.lstrip("-")


def xml_text(text: str) -> str:
    """Text for XML or HTML: escaped; what neither can hold (control characters, lone surrogates) becomes U+FFFD."""
    return html.escape(re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\N{REPLACEMENT CHARACTER}", text))


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    if not text:
        return ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{xml_text(text)}</text>'


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _colours() -> str:
    """The style of the colours."""
    light, dark = (
        "".join(f".line-chart .s{index}{{stroke:{colour}}}\n" for index, colour in enumerate(colours))
        for colours in zip(*COLOURS, strict=True)
    )
    return f"{light}@media (prefers-color-scheme:dark){{\n{dark}}}"


def _series(index: int) -> str:
    """The style's classes for the colour of a series, from 0."""
    return f"s{index % len(COLOURS)}" + (" more" if index >= len(COLOURS) else "")


def _legend(lines: Mapping[str, np.ndarray]) -> tuple[list[str], float]:
    """Names with their colours and latest values, in rows; and the height at which the plot may begin."""
    parts, x, y = [], MARGIN, 50
    for index, (name, points) in enumerate(lines.items()):
        name = _shorten(name, 28)
        latest = format_number(points[-1, 1]) if len(points) else ""
        width = 26 + LETTER * len(f"{name} {latest}")
        if x > MARGIN and x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + 20
        parts.append(f'<path class="line {_series(index)}" stroke-width="3" d="M{x},{y - 4.5}h14"/>')
        parts.append(f'<text x="{x + 20}" y="{y}">{xml_text(name)} <tspan class="latest">{latest}</tspan></text>')
        x += width + 8
    return parts, y + 18 if lines else 44


def _grid(x_axis: Axis, y_axis: Axis, area: tuple[float, float, float, float]) -> list[str]:
    """Lines at the ticks of y, the texts of both axes."""
    left, top, right, bottom = area
    parts = []
    for value, label, y in zip(y_axis.ticks, y_axis.labels, y_axis.place(y_axis.ticks, bottom, top), strict=True):
        parts.append(f'<path class="{"grid" if value else "zero"}" d="M{left:.1f},{y:.1f}H{right}"/>')
        parts.append(_text(left - 7, y + 4.5, label, anchor="end"))
    for label, x in zip(x_axis.labels, x_axis.place(x_axis.ticks, left, right), strict=True):
        parts.append(f'<path class="zero" d="M{x:.1f},{bottom}v4"/>' + _text(x, bottom + 20, label, anchor="middle"))
    return parts


def _draw(
    points: np.ndarray, index: int, x_axis: Axis, y_axis: Axis, area: tuple[float, float, float, float]
) -> tuple[str, str]:
    """The paths of a series (n, 2): of its points, and of its running average where it is rough."""
    left, top, right, bottom = area

    def path(points: np.ndarray, kind: str, dots: bool = False) -> str:
        places = zip(x_axis.place(points[:, 0], left, right), y_axis.place(points[:, 1], bottom, top), strict=True)
        pairs = [f"{x:.1f},{y:.1f}" for x, y in places]
        d = "".join(f"M{pair}h0" for pair in pairs) if dots else "M" + " ".join(pairs)
        return f'<path class="line {kind} {_series(index)}" d="{d}"/>'

    if not len(points):
        return "", ""
    rough = is_rough(points)
    line = path(thin(points), "rough" if rough else "")
    if len(points) <= DOTS_UP_TO:
        line += path(points, "dots", dots=True)
    return line, path(running_average(points), "average") if rough else ""
