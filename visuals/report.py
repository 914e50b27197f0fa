"""report.html: the progress of a run in one file, without network access.

    page = report_page(config, "cpu in fp32", classes, step, "running", best)

Shows samples by step, the curves of the log, the newest attention figures, the configuration and the command that
resumes the run. Reads the run's result folders; files that are missing or damaged are left out.
"""

import base64
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field
from datetime import datetime, timedelta
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from datasets.labels import join_names
from parameter import Config, option_groups, option_text
from utils import evenly_spaced, files_by_step
from visuals.curves import line_chart, read_curves
from visuals.figures import read_picture
from visuals.pages import escape

FRAMES = 30  # steps whose samples the slider shows
SAMPLE_SIZE, FIGURE_SIZE = (720, 560), (768, 1200)  # pixels, at most
PICTURE_BYTES = 70_000  # of a JPEG if possible; 4/3 of it as base64
QUALITIES = (85, 70, 50, 20)  # of JPEG, tried in turn; at 20 a grid of pure noise takes 81 kB

LOSS_NOTE = "GAN losses do not track image quality."
LOGIT_NOTE = "d_real is the mean of D(x), d_fake of D(G(z)): the closer they are, the less D separates real and fake."
SIGN_NOTE = (
    "Mean sign of D(x) on the training images of a batch (r in arXiv 2006.06676). Near 1 for long: D may remember "
    "them, or is only far ahead; --holdout tells which."
)
SPREAD_NOTE = (
    "Mean RMSE of pixels in [-1, 1] over all pairs of the EMA generator's samples, and of real images: once it falls "
    "below half of these, the samples have become alike (mode collapse), as they also are in the first steps."
)
HOLDOUT_NOTE = (
    "Mean of D(x) on training images, of a batch that comes next, and on images that are held out (--holdout). The gap "
    "is overfitting of D."
)
HOG_NOTE = "hog_real is of two halves of the real images: about twice what images as good as real would get."
GAMMA_NOTE = (
    "Gamma scales the attention output that is added to the features; it is learned, from 0. Its sign has no meaning, "
    "as the attention output can have either sign. A large gamma does not imply non-local attention: see the maps."
)
SIGMA_NOTE = "Largest singular value of each layer's weight before normalization. A jump often precedes collapse."
CHARTS = (  # title, pattern of the names in the log, y label, note
    ("Losses", "d_loss|g_loss|d_penalty", "", LOSS_NOTE),
    ("Logits of D", "d_real|d_fake", "mean", LOGIT_NOTE),
    ("Logits of D on training and held-out images", "d_train|d_holdout", "mean", HOLDOUT_NOTE),
    ("Sign of D on training images", "d_sign", "", SIGN_NOTE),
    ("Spread of the samples", "spread|spread_real", "RMSE", SPREAD_NOTE),
    ("Gamma of the attention layers", "gamma/.*", "", GAMMA_NOTE),
    ("FID", "fid", "lower is better", ""),
    ("KID", "kid", "lower is better", ""),
    ("Inception score", "isc", "higher is better", ""),
    ("Precision and recall", "precision|recall", "", ""),
    ("Face rate", "faces|faces_real", "", ""),
    ("Fréchet distance of HOG features", "hog|hog_real", "lower is better", HOG_NOTE),
    ("Spectral norms of G", "sigma/G_.*", "", SIGMA_NOTE),
    ("Spectral norms of D", "sigma/D_.*", "", ""),
    ("Speed", "images_per_s", "images/s", ""),
    ("Memory", "memory_mib", "MiB", ""),
    ("Learning rates", "lr/.*", "", ""),
)
NOT_SHOWN = ("d_loss_real", "d_loss_fake", "kid_std", "isc_std", "f_score")  # all other names have a chart


def report_page(
    config: Config, machine: str, classes: Sequence[str], step: int, state: str, best: Mapping[str, Any]
) -> str:
    """Return the page after `step` finished steps, as HTML of less than 8 MB; files of later steps are ignored.

    Args:
        machine: device and precision, such as "cpu in fp32".
        state: "running", or why the run ended before its last step.
        best: "step", "metric" and "score" of the best checkpoint; {} if there is none.
    """
    log = read_curves(config.log_folder, step)
    best = best if best.get("step", 0) <= step else {}  # it is later where the run was resumed from an earlier step
    data = {
        "frames": _frames(config.sample_folder, step),
        "real": picture(config.sample_folder / "real.png", SAMPLE_SIZE),
        "folder": _link(config.sample_folder, config.log_folder),
    }
    finished = step >= config.total_step
    is_running = state == "running" and not finished
    percent = min(100, math.floor(1000 * step / config.total_step) / 10)  # rounded down: 100% is the end
    facts = [f"step {step:,} of {config.total_step:,} ({percent:g}%)", f"{config.imsize}×{config.imsize}"]
    facts += [f"batch {config.batch_size}", f"on {machine}"]
    facts += [f"classes {join_names(classes)}"] if classes else []
    facts += _speed(config, step, log, is_running)
    if best:
        facts.append(f"best checkpoint: step {best['step']:,}, {best['metric']} {best['score']:.4g}")
    return Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(config.version),
        state="finished" if finished else escape(state),
        facts="".join(f"<li>{escape(fact)}</li>" for fact in [*facts, f"updated {datetime.now():%Y-%m-%d %H:%M}"]),
        step=step,
        total=config.total_step,
        resume=_prose("Train further, with a higher --total_step" if finished else "Resume this run"),
        charts="".join(_charts(log, best)),
        attention=_attention(config, step),
        options="".join(_option_group(config, title, fields) for title, fields in option_groups().items()),
        # While the run goes on, newer checkpoints follow that of this page.
        command=_prose(config.command_line(pretrained_model="latest" if is_running else str(step))),
        data=json.dumps(data),  # URLs and numbers: no text in it can end the script
    )


def _speed(config: Config, step: int, log: Mapping[str, np.ndarray], is_running: bool) -> list[str]:
    """Return images per second and, while the run goes on, the time that is left."""
    if "images_per_s" not in log:
        return []
    speed = float(np.median(log["images_per_s"][-20:, 1]))  # samples and checkpoints slow some entries
    facts = [f"{speed:,.1f} images/s"]
    if is_running and speed > 0:
        minutes = (config.total_step - step) * config.batch_size / speed / 60
        facts.append(f"ETA {timedelta(minutes=round(minutes))}")
    return facts


def _charts(log: Mapping[str, np.ndarray], best: Mapping[str, Any]) -> Iterator[str]:
    """Yield a figure for each chart with names in the log, and one per prefix for names that no chart knows.

    That of the metric which decides on the best checkpoint marks its step.
    """
    known = "|".join([pattern for _, pattern, *_ in CHARTS] + [*NOT_SHOWN])
    prefixes = dict.fromkeys(name.partition("/")[0] for name in log if not re.fullmatch(known, name))
    others = [(prefix, re.escape(prefix) + "(/.*)?", "", "") for prefix in prefixes]
    for title, pattern, y_label, note in [*CHARTS, *others]:
        series = {name.rpartition("/")[2]: log[name] for name in log if re.fullmatch(pattern, name)}
        if series:
            caption = f"<figcaption>{_prose(note)}</figcaption>" if note else ""
            mark = best["step"] if best.get("metric") in series else None
            chart = line_chart(title, series, y_label=y_label, mark=mark)
            yield f'<figure class="card chart">{chart}{caption}</figure>'


def _frames(folder: Path, step: int) -> list[dict[str, Any]]:
    """Return what the slider shows, {"step": ..., "fake": data URI, "ema": data URI}, with one of the two at least."""
    files = {kind: files_by_step(folder, f"{kind}.png") for kind in ("fake", "ema")}
    frames = []
    for number in evenly_spaced(sorted(key for key in set().union(*files.values()) if key <= step), FRAMES):
        pictures = {kind: picture(paths[number], SAMPLE_SIZE) for kind, paths in files.items() if number in paths}
        if any(pictures.values()):
            frames.append({"step": number, **pictures})
    return frames


def picture(path: Path, size: tuple[int, int]) -> str:
    """Return a PNG file as the data URI of a JPEG of at most `size` pixels; "" if it is missing or damaged."""
    image = read_picture(path)
    if image is None:
        return ""
    image.thumbnail(size, Image.Resampling.LANCZOS)
    for quality in QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= PICTURE_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getbuffer()).decode()


def _attention(config: Config, step: int) -> str:
    """Return the section of each layer's newest attention figure and of the newest explorer."""
    explorer = _newest(config.attn_folder, "explorer.html", step)
    link = f'<a href="{_link(explorer, config.log_folder)}">Open interactive viewer →</a>' if explorer else ""
    endings = {path.name.partition("_")[2] for path in config.attn_folder.glob("*_attn*.png")}
    cards = []
    for ending in sorted(endings, key=lambda ending: (not ending.startswith("G_"), ending)):  # the generator first
        path = _newest(config.attn_folder, ending, step)
        if path and (uri := picture(path, FIGURE_SIZE)):
            href = _link(path, config.log_folder)
            cards.append(f'<a class="card" href="{href}"><img src="{uri}" alt="{escape(path.stem)}"></a>')
    if not (link or cards):
        return ""
    return f'<section><h2>Attention maps{link}</h2><div class="board">{"".join(cards)}</div></section>'


def _newest(folder: Path, ending: str, step: int) -> Path | None:
    paths = [path for number, path in files_by_step(folder, ending).items() if number <= step]
    return paths[-1] if paths else None


def _option_group(config: Config, title: str, fields: Sequence[Field]) -> str:
    """Return a group of the configuration; options that differ from their default are marked and show it."""
    rows = []
    for field in fields:
        value, changed = getattr(config, field.name), getattr(config, field.name) != field.default
        default = f"<small>default {escape(option_text(field.default))}</small>" if changed else ""
        text = escape(option_text(value))
        rows.append(f"<div{' class=changed' * changed}><dt>{field.name}</dt><dd>{text}{default}</dd></div>")
    return f'<div class="card options"><h3>{title}</h3><dl>{"".join(rows)}</dl></div>'


def _prose(text: str) -> str:
    """Escape text for HTML. Browsers would break an option between its dashes."""
    return re.sub(r"--\w+", r'<span class="option">\g<0></span>', escape(text))


def _link(path: Path, start: Path) -> str:
    """Return the URL of a path, relative to a folder unless they are on different drives."""
    try:
        return quote(os.fsencode(os.path.relpath(path, start).replace(os.sep, "/")))
    except ValueError:
        return path.resolve().as_uri()
