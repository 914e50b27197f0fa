"""What a run shows and writes: the progress bar, the log, images, checkpoints and the report.

The trainer passes tensors and goes on; whatever takes time happens in a background thread.
"""

import copy
import functools
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from data_loader import Loader
from errors import Tolerate
from parameter import DISTANCES, Config
from training import checkpoint
from training.background import Background
from training.checkpoint import Name
from training.guards import MIN_SAMPLES, CollapseCheck, OverfittingCheck, image_spread
from training.log import RunLog
from training.run_folders import init_folders, lock_folders, thin_results
from utils import LINE_SECONDS, bar_options, memory_mib, write_atomically
from visuals.attention_stats import AttentionSample
from visuals.curves import read_curves
from visuals.explorer import write_explorer
from visuals.figures import CLASS_ROWS, attention_figures, sample_grid, shorten
from visuals.report import report_page

BAR = "{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
NARROW_BAR, NARROW_COLUMNS = "{n_fmt}/{total_fmt} <{remaining}{postfix}", 120  # without gammas, it fits into 80
# Where stderr is no terminal, `log` prints lines: after its entries, which have the numbers.
LINES = {"bar_format": "step {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}", "mininterval": math.inf}
POSTFIX = "{images_per_s:.0f} img/s  D {d_loss:.2f}  G {g_loss:.2f}  D(x) {d_real:.2f}  D(G(z)) {d_fake:.2f}"
REPORT_SECONDS = 60  # between two reports at least, longer where they take long: checkpoints may be seconds apart


class Recorder(AbstractContextManager):
    """Record a run from `step` on, as a context that holds the run's folders and ends when everything is written.

    Steps are finished ones. Tensors may be on any device; those passed to `checkpoint` are copied, others must not
    change afterwards.

    Args:
        step: at the start; log entries of later ones are dropped.
        machine: device and precision, for the report.
        loader: opened.

    Attributes:
        saved_step: step of the newest checkpoint that was exported; at first that of the start.
        best: step, score and protocol of the best checkpoint in the folder; {} if there is none.

    Raises:
        UserError: a folder is in use or cannot be written.
    """

    def __init__(self, config: Config, step: int, machine: str, loader: Loader):
        self.config, self.loader, self._start, self.saved_step = config, loader, step, step
        self._row_names = [shorten(name) for name in loader.classes[:CLASS_ROWS]]
        self._machine = machine
        epoch, has_augment = len(loader) // config.n_critic, config.augment != "none"
        self._overfitting = OverfittingCheck(epoch, config.holdout > 0, has_augment)
        self._collapse = CollapseCheck(has_augment)
        self._written_step = 0  # of the newest checkpoint on the disk; 0 if this process has written none
        self._report_due = -math.inf
        self._saved_at = time.monotonic()
        self._logged_at = (time.perf_counter(), step)
        self._prints_lines, self._line_due = not sys.stderr.isatty(), 0.0
        self._is_narrow = not self._prints_lines and shutil.get_terminal_size().columns < NARROW_COLUMNS
        bar = LINES if self._prints_lines else {"bar_format": NARROW_BAR if self._is_narrow else BAR}
        self._tolerate = functools.cache(Tolerate)  # one of each name, because it warns once
        with ExitStack() as stack:  # closes what is open where a later line fails
            stack.enter_context(lock_folders(config))
            init_folders(config, step, loader.skipped, len(loader.source.items))
            self.best = checkpoint.peek(config.model_folder, "best").get("best", {})
            stack.push(self._finish)  # runs when all below is closed
            self._log = stack.enter_context(RunLog(config.log_folder, step, config.use_tensorboard))
            self._background = stack.enter_context(Background(loader.device))
            self._bar = stack.enter_context(
                tqdm(
                    total=config.total_step,
                    initial=step,
                    delay=0.5,  # so that it does not appear before the first lines of the run
                    **bar_options() | bar,
                )
            )
            self._stack = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def advance(self, step: int) -> None:
        """Move the progress bar to a step."""
        self._bar.update(step - self._bar.n)

    def log(self, step: int, tensors: Mapping[str, Tensor], lr_factor: float) -> None:
        """Write a log entry: 0-d tensors, which leave the device in one transfer, learning rates, speed and memory."""
        numbers = dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))
        numbers |= {"lr/g": self.config.g_lr * lr_factor, "lr/d": self.config.d_lr * lr_factor}
        now, (then, step_then) = time.perf_counter(), self._logged_at
        numbers["images_per_s"] = (step - step_then) * self.config.batch_size / (now - then)
        numbers["memory_mib"] = memory_mib(self.loader.device)
        self._logged_at = (now, step)
        self._log.scalars(step, numbers)
        if "d_sign" in numbers:
            self._overfitting.add(step, numbers["d_sign"])
        gammas = [f"{value:.3f}" for name, value in numbers.items() if name.startswith("gamma/G_")]
        words = [POSTFIX.format_map(numbers), *(["", "gamma", *gammas] if gammas and not self._is_narrow else [])]
        self._bar.set_postfix_str(" ".join(words), refresh=False)
        if self._prints_lines and (now >= self._line_due or step == self.config.total_step):
            self._bar.refresh()
            self._line_due = now + LINE_SECONDS

    def scores(self, step: int, scores: Mapping[str, float]) -> bool:
        """Write metrics to the log. Returns whether they are the best, and becomes `best` then.

        The best have the lowest of the first of `--metrics` that is a distance; it starts anew where they are computed
        in another way than `best`.
        """
        self._log_once(step, scores)
        self._logged_at = (time.perf_counter(), step)  # images/s are of training alone
        config = self.config
        metric = next((name for name in config.metrics.split(",") if name in DISTANCES), None)
        protocol = {"metric": metric, "images": config.metric_num, "ema": config.use_ema}
        protocol["data"] = self.loader.fingerprint["checksum"]
        if metric is None or not math.isfinite(scores[metric]):
            return False
        if protocol.items() <= self.best.items() and scores[metric] >= self.best["score"]:
            return False
        self.best = protocol | {"step": step, "score": scores[metric]}
        return True

    def _log_once(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write a log entry, without the numbers that the run which is resumed at this step has written."""
        curves = read_curves(self.config.log_folder, step) if step == self._start else {}
        logged = {name: points[-1, 1] for name, points in curves.items() if points[-1, 0] == step}
        known = {
            name for name, value in numbers.items() if math.isclose(value, logged.get(name, math.nan), rel_tol=1e-6)
        }
        if new := {name: value for name, value in numbers.items() if name not in known}:
            self._log.scalars(step, new)

    def real_images(self, name: str, images: Tensor) -> None:
        """Write `{name}.png`, a grid of images (B, 3, S, S) as in `samples`."""
        with self._tolerate("sample grids"):
            sample_grid(images, row_names=self._row_names).save(self.config.sample_folder / f"{name}.png")

    def samples(self, step: int, images: Mapping[str, Tensor]) -> None:
        """Write a grid of images (B, 3, S, S) for each name, `{step}_{name}.png`; with classes, row by row.

        Logs the spread of those of "ema", beside that of real images.
        """
        self._background.submit(self._tolerate("sample grids")(self._write_samples), step, images)
        spreads = {"spread": image_spread(images["ema"]), "spread_real": self._spread_real}
        if all(map(math.isfinite, spreads.values())):
            if len(images["ema"]) >= MIN_SAMPLES:
                self._collapse.add(step, **spreads)
            self._log_once(step, spreads)

    @functools.cached_property
    def _spread_real(self) -> float:
        return image_spread(self.loader.batch(0)[0])

    def attention(self, step: int, samples: Sequence[AttentionSample]) -> None:
        """Write a figure for each attention layer, `{step}_{layer}.png`."""
        self._background.submit(self._tolerate("attention figures")(self._write_attention), step, samples)

    def explorer(self, step: int, samples: Sequence[AttentionSample]) -> None:
        """Write the interactive page of the attention maps, `{step}_explorer.html`."""
        write = self._tolerate("the explorer")(write_explorer)
        self._background.submit(write, self.config.attn_folder, self.config.version, step, samples)

    def checkpoint(self, name: Name, state: Mapping[str, Any], export: bool = True) -> None:
        """Save a copy of a state under the number of its step, or as the best one; see `checkpoint.save`."""
        if name == "best":
            state = {**state, "best": self.best}
        else:
            self._saved_at = time.monotonic()
            self.saved_step = name if export else self.saved_step
        self._background.submit(self._write_checkpoint, name, copy.deepcopy(state), export)

    def is_save_overdue(self) -> bool:
        """Return whether `--save_minutes` have passed since the last checkpoint, or since the start."""
        return 0 < self.config.save_minutes <= (time.monotonic() - self._saved_at) / 60

    def _write_samples(self, step: int, images: Mapping[str, Tensor]) -> None:
        grids = {name: sample_grid(batch, row_names=self._row_names) for name, batch in images.items()}
        self._write_pictures("samples", self.config.sample_folder, step, grids, self.config.sample_step)

    def _write_attention(self, step: int, samples: Sequence[AttentionSample]) -> None:
        figures = attention_figures(samples, step)
        self._write_pictures("attention", self.config.attn_folder, step, figures, self.config.attn_step)

    def _write_pictures(self, kind: str, folder: Path, step: int, pictures: Mapping[str, Image], interval: int) -> None:
        for name, picture in pictures.items():
            picture.save(folder / f"{step}_{name}.png")
            self._log.image(step, f"{kind}/{name}", picture)
            if self.config.keep_samples:
                thin_results(folder, f"{name}.png", interval, self.config.keep_samples, step)

    def _write_checkpoint(self, name: Name, state: Mapping[str, Any], export: bool) -> None:
        self._log.flush()  # a run that resumes here finds all log entries up to here
        config = self.config
        checkpoint.save(config.model_folder, name, state, export=export, keep_checkpoints=config.keep_checkpoints)
        if name != "best":
            self._written_step = name
            if time.monotonic() >= self._report_due and name < config.total_step:  # otherwise `_finish` writes it
                self._write_report("running")

    def _write_report(self, state: str) -> None:
        start = time.monotonic()
        path = self.config.log_folder / "report.html"
        with self._tolerate("the report"):
            page = report_page(self.config, self._machine, self.loader.classes, self._written_step, state, self.best)
            write_atomically({path: page.encode()})  # a browser may reload it at any time
        end = time.monotonic()
        self._report_due = end + max(REPORT_SECONDS, 50 * (end - start))

    def _finish(self, kind: type[BaseException] | None, *_: Any) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)  # a second Ctrl-C
        if self._written_step and not interrupted:
            self._write_report("stopped")
