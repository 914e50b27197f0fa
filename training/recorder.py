"""What a run shows and leaves behind: the progress bar, the log, pictures, checkpoints.

The trainer hands over tensors and goes on; whatever takes time is done in the background.
"""

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from parameter import Config, option_groups
from training import checkpoint
from training.background import Background
from training.log import RunLog
from utils import clone_tensors, memory_mib, refresh_seconds
from visuals.attention_stats import AttentionSample
from visuals.explorer import write_explorer
from visuals.figures import attention_figures, sample_grid
from visuals.report import Run, report_page

BAR = "{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
POSTFIX = (
    "{images_per_s:.0f} img/s  D {d_loss:.2f}  G {g_loss:.2f}  D(x) {d_real:.2f}  D(G(z)) {d_fake:.2f}  "
    "gamma {gamma/G_attn1:.3f} {gamma/G_attn2:.3f}"
)
REPORT_SECONDS = 60  # between two reports at least, more where they take long: checkpoints may come every few seconds


class Recorder:
    """Records a run from `step` on; used as a context, at whose end all is written.

    Every method takes the number of finished steps first. Tensors may be on any device and may change afterwards only
    where the method says that it copies them.
    """

    def __init__(self, config: Config, step: int, device: torch.device, precision: str):
        self.config, self.device = config, device
        self._run = _run(config, f"{device} in {precision}")
        self._saved: int | None = None  # the newest checkpoint of this process
        self._report_due = -math.inf
        self._logged_at = (time.perf_counter(), step)
        self._stack = ExitStack()
        self._log = self._stack.enter_context(RunLog(config.log_folder, step, config.use_tensorboard))
        self._background = self._stack.enter_context(Background())
        self._bar = self._stack.enter_context(
            tqdm(
                total=config.total_step,
                initial=step,
                bar_format=BAR,
                dynamic_ncols=True,
                mininterval=refresh_seconds(),
            )
        )

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._stack.__exit__(kind, *error)
        at_once = kind is not None and not issubclass(kind, Exception)  # a second Ctrl-C
        if self._saved and not at_once:
            self._write_report("stopped")

    def advance(self, step: int) -> None:
        """Moves the progress bar on to a step."""
        self._bar.update(step - self._bar.n)

    def log(self, step: int, values: Mapping[str, Tensor], others: Mapping[str, float]) -> None:
        """A line of numbers: of 0-d tensors, which leave the device here in one transfer, and others."""
        numbers = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) | others
        now, (then, step_then) = time.perf_counter(), self._logged_at
        numbers["images_per_s"] = (step - step_then) * self.config.batch_size / (now - then)
        numbers["memory_mib"] = memory_mib(self.device)
        self._logged_at = (now, step)
        self._log.scalars(step, numbers)
        self._bar.set_postfix_str(POSTFIX.format_map(numbers), refresh=False)

    def samples(self, step: int, name: str, images: Tensor) -> None:
        """A grid of images (B, 3, S, S), `{step}_{name}.png`."""
        self._background.submit(self._write_samples, step, name, images)

    def attention(self, step: int, shown: Sequence[AttentionSample]) -> None:
        """A figure for each attention layer."""
        self._background.submit(self._write_attention, step, shown)

    def explorer(self, step: int, shown: Sequence[AttentionSample]) -> None:
        """A page on which every layer can be explored, `{step}_explorer.html`."""
        self._background.submit(write_explorer, self.config.attn_folder, self.config.version, step, shown)

    def checkpoint(
        self, name: int | Literal["best"], G: Mapping[str, Any], D: Mapping[str, Any], state: Mapping[str, Any]
    ) -> None:
        """A checkpoint of copies of these state dicts, under the number of its step or as the best one."""
        self._background.submit(self._write_checkpoint, name, *clone_tensors([G, D, state]))

    def _write_checkpoint(
        self, name: int | Literal["best"], G: Mapping[str, Any], D: Mapping[str, Any], state: Mapping[str, Any]
    ) -> None:
        self._log.flush()  # a run that continues from here has all lines up to here
        keep = self.config.keep_checkpoints, self.config.keep_weights
        checkpoint.save(self.config.model_folder, name, G, D, state, *keep)
        if name != "best":
            self._saved = name
            if time.monotonic() >= self._report_due:
                self._write_report("running")

    def _write_report(self, state: str) -> None:
        """The report of the run up to its newest checkpoint."""
        began = time.monotonic()
        command = self.config.command(pretrained_model=str(self._saved))
        page = report_page(self._run, self._saved, command, datetime.now(), state)
        path = self.config.log_folder / "report.html"
        path.with_suffix(".tmp").write_text(page, encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)  # whoever has it open may reload it at any time
        ended = time.monotonic()
        self._report_due = ended + max(REPORT_SECONDS, 50 * (ended - began))

    def _write_samples(self, step: int, name: str, images: Tensor) -> None:
        grid = sample_grid(images)
        grid.save(self.config.sample_folder / f"{step}_{name}.png")
        self._log.image(step, f"samples/{name}", grid)

    def _write_attention(self, step: int, shown: Sequence[AttentionSample]) -> None:
        for name, figure in attention_figures(shown, step).items():
            figure.save(self.config.attn_folder / f"{step}_{name}.png")
            self._log.image(step, f"attention/{name}", figure)


def _run(config: Config, machine: str) -> Run:
    """What the report says of a run at any step."""
    options = {
        title: {field.name: getattr(config, field.name) for field in fields}
        for title, fields in option_groups().items()
    }
    return Run(
        title=config.version,
        total_step=config.total_step,
        image_size=config.imsize,
        batch_size=config.batch_size,
        machine=machine,
        log_folder=config.log_folder,
        sample_folder=config.sample_folder,
        attn_folder=config.attn_folder,
        options=options,
        defaults={field.name: field.default for field in dataclasses.fields(config)},
    )
