import io
import re
import shutil
import threading
import time

import pytest
import torch
from conftest import log, wait_for

from training import checkpoint
from training.recorder import Recorder
from visuals.attention_stats import AttentionSample

STATS = {name: torch.tensor(value) for name, value in
         {"d_loss": 1.5, "g_loss": 0.5, "d_real": 1.0, "d_fake": -1.0, "d_sign": 0.5,
          "gamma/G_attn1": 0.25}.items()}  # fmt: skip
STATE = {"G": {}, "D": {}, "ema": {}}


@pytest.fixture
def start(make_config, toy):
    """A function that starts the recorder of a run of toy faces at step 0."""
    return lambda **options: Recorder(make_config(**options), 0, "cpu in fp32", toy())


def test_a_checkpoint_is_a_copy_of_the_state_and_written_after_an_error_too(start, monkeypatch):
    """Training goes on while it is written."""
    gate, save = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given, **options: gate.wait() and save(*given, **options))
    weights = {"weight": torch.zeros(2)}
    with pytest.raises(ZeroDivisionError), start() as recorder:
        recorder.checkpoint(1, STATE | {"G": weights, "ema": weights, "step": 1})
        weights["weight"].add_(1)
        gate.set()
        wait_for((recorder.config.log_folder / "report.html").exists)
        raise ZeroDivisionError
    state = torch.load(recorder.config.model_folder / "1_state.pth", weights_only=True)
    assert state["G"]["weight"].tolist() == state["ema"]["weight"].tolist() == [0, 0]
    assert "stopped" in (recorder.config.log_folder / "report.html").read_text()


def test_results_that_cannot_be_written_cost_a_warning_each_and_no_checkpoint(start, capsys):
    images = torch.zeros(2, 3, 32, 32)
    sample = AttentionSample("generated", images, {"G attn1": torch.full((2, 64, 64), 1 / 64)})
    with start(total_step=2) as recorder:
        config = recorder.config
        for folder in (config.sample_folder, config.attn_folder):
            shutil.rmtree(folder)
            folder.touch()  # a file
        (config.log_folder / "report.html").mkdir()
        for step in (1, 2):
            recorder.samples(step, {"ema": images})
            recorder.attention(step, [sample])
            recorder.explorer(step, [sample])
            recorder.checkpoint(step, STATE | {"step": step})
    assert (config.model_folder / "2_state.pth").exists()
    names = "sample grids|attention figures|the explorer|the report"
    assert len({*re.findall(names, err := capsys.readouterr().err)}) == err.count("warning: ") == 4


@pytest.mark.parametrize("augment", ["none", "cutout"])
def test_samples_that_are_alike_are_one_warning(start, capsys, augment):
    with start(augment=augment) as recorder:
        for step in (1900, 2000, 2100):
            recorder.samples(step, {"ema": torch.zeros(8, 3, 32, 32)})
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "mode collapse" in line]
    assert "since step 1900," in line and ("--augment" in line) == (augment == "none")


@pytest.mark.parametrize("is_terminal, columns", [(True, 160), (True, 80), (False, 80)])
def test_progress_is_a_bar_in_a_terminal_and_else_whole_lines(start, monkeypatch, is_terminal, columns):
    """The lines are ten seconds apart. A narrow terminal has no room for the bar and the gammas."""
    err, now = io.StringIO(), 1000.0
    monkeypatch.setenv("COLUMNS", str(columns))
    err.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr("training.recorder.time.perf_counter", lambda: now)
    with start(total_step=40) as recorder:
        time.sleep(0.6 if is_terminal else 0)  # the bar does not appear before
        for step in range(1, 41):
            now += 3
            recorder.advance(step)
            if step % 2 == 0:
                recorder.log(step, STATS, 1)
    text, steps = err.getvalue(), (2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 40)
    is_narrow = is_terminal and columns == 80
    assert ("\r" in text) == is_terminal and ("|" in text) == (is_terminal and not is_narrow)
    for number in ("D 1.50", "G 0.50", "D(x) 1.00", "D(G(z)) -1.00", " 1 img/s", *["gamma 0.250"] * (not is_narrow)):
        assert number in text.splitlines()[-1]
    assert is_terminal or re.findall(r"^step (\d+)/40 .*\n", text, re.M) == [*map(str, steps)]


@pytest.mark.parametrize("minutes, overdue", [(10, [False, False, True]), (0, [False] * 3), (0.5, [False, True, True])])
def test_a_checkpoint_is_overdue_after_save_minutes(start, monkeypatch, minutes, overdue):
    now = 1000.0
    monkeypatch.setattr("training.recorder.time.monotonic", lambda: now)
    with start(save_minutes=minutes) as recorder:
        for seconds, expected in zip((29, 31, 600), overdue, strict=True):
            now = 1000.0 + seconds
            assert recorder.is_save_overdue() == expected
        recorder.checkpoint(1, STATE | {"step": 1})
        assert not recorder.is_save_overdue()


def test_numbers_of_a_resumed_step_are_logged_once(start):
    with start() as recorder:
        for numbers in ({"hog": 3.0}, {"hog": 3.0, "faces": 0.5}, {"hog": 2.0, "faces": 0.5}, {"hog": 2.0}):
            recorder._log_once(0, numbers)
    entries = [{"hog": 3.0}, {"faces": 0.5}, {"hog": 2.0}]
    assert log(recorder.config.log_folder) == [{"step": 0} | numbers for numbers in entries]
