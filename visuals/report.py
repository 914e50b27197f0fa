"""report.html: a run at a glance, in one file that needs nothing else.

    page = report_page(run, step, command, datetime.now())

Shows the newest samples and, by a slider, those before them; curves of the log; the newest attention figures; the
configuration; the command that continues the run. It is made from what the run has left in its folders so far, and
whatever is missing there, or damaged, is left out.
"""

import base64
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from string import Template
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from training.log import read_curves
from utils import evenly_spaced, files_by_step
from visuals.curves import format_number, is_rough, line_chart, running_average, thin, xml_text

FRAMES = 40  # steps whose samples the slider shows
SAMPLE_WIDTH, FIGURE_WIDTH = 560, 768  # pixels, at most
SAMPLE_BYTES, FIGURE_BYTES = 4_200_000, 140_000  # of all samples together, of each figure; a third more as base64
TALLEST = 20_000  # pixels: a figure of a whole large batch; JPEG ends at 65,535
QUALITIES = (90, 80, 70, 60, 45)  # of JPEG, tried in turn


class Curve(NamedTuple):
    """A chart of the names in the log that match a pattern."""

    title: str
    pattern: str
    unit: str = ""
    note: str = ""
    labels: Mapping[str, str] = {}
    always: bool = True  # not only where something in it changes


LOSS_NOTE = "They show how the two keep each other in check, not how good the images are."
LOGIT_NOTE = "D(x) is of real images, D(G(z)) of generated ones: the closer they are, the less D tells them apart."
GAMMA_NOTE = (
    "Gamma is how much of the attention's output is added to the features; it starts at 0, and its sign does not "
    "matter, as the values can flip theirs. It does not say that attention looks far or is of use: small values can go "
    "with a large gamma, so see the maps."
)
SIGMA_NOTE = "Each layer divides its weight by it, the largest singular value. A sudden rise can announce a collapse."
CURVES = (
    Curve("Losses", "d_loss|g_loss|d_penalty", "", LOSS_NOTE, {"d_loss": "D", "g_loss": "G", "d_penalty": "penalty"}),
    Curve("Logits of D", "d_real|d_fake", "mean", LOGIT_NOTE, {"d_real": "D(x)", "d_fake": "D(G(z))"}),
    Curve("Gamma of the attention layers", "gamma/.*", "", GAMMA_NOTE),
    Curve("FID", "fid", "lower is better"),
    Curve("KID", "kid", "lower is better"),
    Curve("Precision and recall", "precision|recall"),
    Curve("Spectral norms of the generator", "sigma/G_.*", "sigma", SIGMA_NOTE),
    Curve("Spectral norms of the discriminator", "sigma/D_.*", "sigma"),
    Curve("Speed", "images_per_s", labels={"images_per_s": "images/s"}),
    Curve("Memory", "memory_mib", labels={"memory_mib": "MiB"}),
    Curve("Learning rates", "lr/.*", labels={"lr/g": "G", "lr/d": "D"}, always=False),
)
NOT_SHOWN = ("d_loss_real", "d_loss_fake")  # their sum is
FIGURES = ("G_attn1", "G_attn2", "D_attn1", "D_attn2")


@dataclass(frozen=True)
class Run:
    """What does not change in a run.

    title: its name. machine: such as "cpu in fp32". log_folder: where the page will be, which its links start from.
    options: the configuration by group; defaults: what each option would be if it had not been given.
    """

    title: str
    total_step: int
    image_size: int
    batch_size: int
    machine: str
    log_folder: Path
    sample_folder: Path
    attn_folder: Path
    options: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]


def report_page(run: Run, step: int, command: str, updated: datetime, state: str = "running") -> str:
    """The page after `step` finished steps; what the folders hold of later ones is not shown.

    Args:
        command: the command line that continues the run.
        updated: the time to show.
        state: a word or two for a run that has not done all its steps.

    Returns:
        HTML of less than 8 MB, which any encoding of Unicode can hold.
    """
    log = read_curves(run.log_folder, step)
    charts = list(_charts(log))
    frames = _frames(run.sample_folder, step)
    data = {
        "frames": frames,
        "real": picture(run.sample_folder / "real.png", SAMPLE_WIDTH, FIGURE_BYTES),
        "folder": _link(run.sample_folder, run.log_folder),
        "charts": [hover for _, hover in charts],
    }
    finished = step >= run.total_step
    return Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        title=xml_text(run.title),
        badge="finished" if finished else "unfinished",
        state="finished" if finished else xml_text(state),
        facts="".join(f"<li>{xml_text(fact)}</li>" for fact in _facts(run, step, log, updated)),
        percent=f"{100 * min(1, step / run.total_step):.2f}",
        newest=(frames[-1].get("ema") or frames[-1]["fake"]) if frames else "",
        no_samples="" if frames else "hidden",
        charts="".join(chart for chart, _ in charts),
        attention=_attention(run, step),
        options="".join(_group(title, values, run.defaults) for title, values in run.options.items()),
        command=xml_text(command),
        data=json.dumps(data).replace("<", "\\u003c"),  # so that no text in it can end the script
    )


def _facts(run: Run, step: int, log: Mapping[str, np.ndarray], updated: datetime) -> list[str]:
    """The state line, in pieces."""
    percent = min(100, math.floor(1000 * step / run.total_step) / 10)  # rounded down: 100% is the end
    size = f"{run.image_size}×{run.image_size}"
    facts = [f"step {step:,} of {run.total_step:,} ({percent:g}%)", size, f"batch {run.batch_size}"]
    facts.append(f"on {run.machine}")
    speeds = log.get("images_per_s", np.empty((0, 2)))[-20:, 1]  # the last few: a sample or a save slows some lines
    if len(speeds) and (speed := float(np.median(speeds))) > 0:
        facts.append(f"{format_number(speed)} images/s")
        if step < run.total_step:
            facts.append(f"{_duration((run.total_step - step) * run.batch_size / speed)} to go")
    return [*facts, f"updated {updated:%Y-%m-%d %H:%M}"]


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.0f} {unit}"
    return "about a minute"


def _charts(log: Mapping[str, np.ndarray]) -> Iterable[tuple[str, list]]:
    """A figure for each curve that the log has anything of, with the points to show where a pointer is."""
    known = "|".join(curve.pattern for curve in CURVES)
    others = [name.partition("/")[0] for name in log if name not in NOT_SHOWN and not re.fullmatch(known, name)]
    for curve in (*CURVES, *(Curve(name, re.escape(name) + "(/.*)?") for name in dict.fromkeys(others))):
        series = {
            curve.labels.get(name, name.rpartition("/")[2].replace("_", " ")): points
            for name, points in log.items()
            if re.fullmatch(curve.pattern, name) and len(points)
        }
        if not series or not (curve.always or any(np.ptp(points[:, 1]) for points in series.values())):
            continue
        note = f"<figcaption>{xml_text(curve.note)}</figcaption>" if curve.note else ""
        svg = line_chart(curve.title, series, y_label=curve.unit)
        hover = [_hover(name, points) for name, points in series.items()]
        yield f'<figure class="card chart"><div class="plot">{svg}<div class="cover"></div></div>{note}</figure>', hover


def _hover(name: str, points: np.ndarray) -> list:
    """What a pointer reads: [name, steps, values] of the line to be followed, which in noise is the average."""
    name, points = (f"{name}, average", running_average(points)) if is_rough(points) else (name, thin(points))
    return [name, *([float(f"{value:.7g}") for value in values] for values in points.T)]


def _frames(folder: Path, step: int) -> list[dict[str, Any]]:
    """What the slider shows, by step: {"step": ..., "fake": picture, "ema": picture}, with one of them at least."""
    files = {kind: files_by_step(folder, f"{kind}.png") for kind in ("fake", "ema")}
    chosen = evenly_spaced(sorted(number for number in set().union(*files.values()) if number <= step), FRAMES)
    limit = SAMPLE_BYTES // max(12, 2 * len(chosen))
    frames = [
        {"step": number}
        | {kind: uri for kind, paths in files.items() if (uri := picture(paths.get(number), SAMPLE_WIDTH, limit))}
        for number in chosen
    ]
    return [frame for frame in frames if len(frame) > 1]


def picture(path: Path | None, widest: int, most_bytes: int) -> str:
    """A PNG file as the URI of a JPEG at most so wide and so large; "" if it is missing or damaged."""
    if path is None:
        return ""
    try:
        with Image.open(path, formats=["PNG"]) as file:
            image = file.convert("RGB")
    except Exception:  # a damaged file can make Pillow's readers raise nearly anything
        return ""
    width = max(1, min(image.width, widest, image.width * TALLEST // image.height))
    while True:
        if width < image.width:
            image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= most_bytes or (width < 64 and quality == QUALITIES[-1]):
                return "data:image/jpeg;base64," + base64.b64encode(buffer.getbuffer()).decode()
        width = width * 2 // 3


def _attention(run: Run, step: int) -> str:
    """The section of the newest attention figures that can be read, and the link to the newest explorer."""
    link, shown = "", []
    for path in _newest_first(run.attn_folder, "explorer.html", step)[:1]:
        link = f'<a class="explorer" href="{_link(path, run.log_folder)}">Explore it point by point →</a>'
    for name in FIGURES:
        for path in _newest_first(run.attn_folder, f"{name}.png", step):
            if uri := picture(path, FIGURE_WIDTH, FIGURE_BYTES):
                shown.append(f'<a class="card" href="{_link(path, run.log_folder)}"><img src="{uri}" alt="{name}"></a>')
                break
    if not (link or shown):
        return ""
    return f'<section><h2>What the attention looks at{link}</h2><div class="board">{"".join(shown)}</div></section>'


def _newest_first(folder: Path, ending: str, step: int) -> list[Path]:
    return [path for number, path in reversed(files_by_step(folder, ending).items()) if number <= step]


def _group(title: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """A group of the configuration; what differs from its default stands out, with the default beside it."""
    rows = []
    for name, value in values.items():
        changed = name in defaults and value != defaults[name]
        default = f"<small>default {_word(defaults[name])}</small>" if changed else ""
        rows.append(f"<div{' class=changed' * changed}><dt>{xml_text(name)}</dt><dd>{_word(value)}{default}</dd></div>")
    return f'<div class="card options"><h3>{xml_text(title)}</h3><dl>{"".join(rows)}</dl></div>'


def _word(value: Any) -> str:
    """A value as the command line has it."""
    return xml_text(str(value).lower() if isinstance(value, bool) or value is None else str(value))


def _link(path: Path, start: Path) -> str:
    """The URL of a path, relative to a folder where both are on one drive."""
    try:
        return quote(os.fsencode(os.path.relpath(path, start).replace(os.sep, "/")))
    except ValueError:
        return path.resolve().as_uri()
