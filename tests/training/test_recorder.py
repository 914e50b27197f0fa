import io
import json
import shutil
import threading

import pytest
import torch

from training.recorder import Recorder
from visuals.attention_stats import AttentionSample

STATS = {name: torch.tensor(value) for name, value in
         {"d_loss": 1.5, "g_loss": 0.5, "d_real": 1.0, "d_fake": -1.0, "gamma/G_attn1": 0.25}.items()}  # fmt: skip


@pytest.fixture
def recorder(make_config):
    with Recorder(make_config(), 0, torch.device("cpu"), "fp32", [], 20) as recorder:
        yield recorder


def test_a_checkpoint_is_a_copy_of_the_state(recorder, make_config):
    """Training goes on while it is written."""
    gate = threading.Event()
    recorder._background.submit(gate.wait)
    weights = {"weight": torch.zeros(2)}
    recorder.checkpoint(1, {"G": weights, "D": {}, "ema": weights, "step": 1})
    weights["weight"].add_(1)
    gate.set()
    recorder._background.__exit__(None)
    state = torch.load(make_config().model_folder / "1_state.pth", weights_only=True)
    assert state["G"]["weight"].tolist() == state["ema"]["weight"].tolist() == [0, 0]
    assert recorder.saved_step == 1


def test_a_log_entry_has_tensors_and_other_numbers(recorder, make_config):
    recorder.log(1, STATS, {"lr/g": 0.1})
    (line,) = (make_config().log_folder / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["d_loss"] == 1.5 and entry["lr/g"] == 0.1 and entry["step"] == 1
    assert entry["images_per_s"] > 0 and entry["memory_mib"] > 0


def test_a_report_that_cannot_be_written_is_a_warning(recorder, make_config, capsys):
    (make_config().log_folder / "report.html").mkdir()
    recorder.checkpoint(1, {"G": {}, "D": {}, "step": 1})
    recorder._background.__exit__(None)
    assert "report.html" in capsys.readouterr().err


def remove(folder):
    shutil.rmtree(folder)


def replace_by_a_file(folder):
    shutil.rmtree(folder)
    folder.touch()


@pytest.mark.parametrize("damage", [remove, replace_by_a_file])
def test_a_result_folder_that_somebody_removes_costs_no_checkpoint(make_config, capsys, damage):
    """It is made again, or there is a warning for each kind of result; the run goes on."""
    config = make_config(total_step=2)
    images = torch.zeros(2, 3, 32, 32)
    sample = AttentionSample("generated", images, {"G attn1": torch.full((2, 64, 64), 1 / 64)})
    with Recorder(config, 0, torch.device("cpu"), "fp32", [], 20) as recorder:
        for folder in (config.sample_folder, config.attn_folder, config.log_folder):
            damage(folder)
        for step in (1, 2):
            recorder.log(step, STATS, {})
            recorder.samples(step, {"fake": images})
            recorder.attention(step, [sample])
            recorder.checkpoint(step, {"G": {}, "D": {}, "step": step})
        recorder.explorer(2, [sample])
    assert (config.model_folder / "2_state.pth").exists()
    results = ("sample_path/sagan_celeb/2_fake.png", "attn_path/sagan_celeb/2_G_attn1.png",
               "attn_path/sagan_celeb/2_explorer.html", "log_path/sagan_celeb/report.html",
               "log_path/sagan_celeb/metrics.jsonl")  # fmt: skip
    root = config.sample_folder.parent.parent
    assert all((root / name).exists() == (damage is remove) for name in results)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == (0 if damage is remove else len(results))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, is_terminal", [(io.StringIO, False), (Terminal, True)])
def test_without_a_terminal_progress_is_whole_lines_ten_seconds_apart(make_config, monkeypatch, stream, is_terminal):
    err, now = stream(), 1000.0
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr("training.recorder.time.perf_counter", lambda: now)
    with Recorder(make_config(total_step=40), 0, torch.device("cpu"), "fp32", [], 20) as recorder:
        recorder._bar.delay = 0 if is_terminal else 0.5
        for step in range(1, 41):
            now += 3
            recorder.advance(step)
            if step % 2 == 0:
                recorder.log(step, STATS, {})
    text = err.getvalue()
    if is_terminal:
        assert "\r" in text and "|" in text
        return
    assert "\r" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/40" for step in (2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 40)]
    for number in ("D 1.50", "G 0.50", "D(x) 1.00", "D(G(z)) -1.00", "gamma 0.250", "img/s"):
        assert number in lines[-1]


@pytest.mark.parametrize("minutes, overdue", [(10, [False, False, True]), (0, [False] * 3), (0.5, [False, True, True])])
def test_a_checkpoint_is_overdue_after_save_minutes(make_config, monkeypatch, minutes, overdue):
    now = 1000.0
    monkeypatch.setattr("training.recorder.time.monotonic", lambda: now)
    with Recorder(make_config(save_minutes=minutes), 0, torch.device("cpu"), "fp32", [], 20) as recorder:
        for seconds, expected in zip((29, 31, 600), overdue, strict=True):
            now = 1000.0 + seconds
            assert recorder.is_save_overdue() == expected
