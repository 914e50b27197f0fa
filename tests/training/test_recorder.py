import json
import threading

import pytest
import torch

from training.recorder import NullRecorder, Recorder

STATS = {name: torch.tensor(value) for name, value in
         {"d_loss": 1.5, "g_loss": 0.5, "d_real": 1.0, "d_fake": -1.0, "gamma/G_attn1": 0.25}.items()}  # fmt: skip


@pytest.fixture
def recorder(make_config):
    with Recorder(make_config(), 0, torch.device("cpu"), "fp32", []) as recorder:
        yield recorder


def test_the_null_recorder_has_every_method_of_the_recorder():
    assert {name for name in dir(Recorder) if not name.startswith("_")} <= set(dir(NullRecorder))


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


def test_real_images_are_kept_when_a_run_is_resumed(make_config):
    path = make_config().sample_folder / "real.png"
    for step, value in ((0, 1.0), (3, -1.0)):
        with Recorder(make_config(), step, torch.device("cpu"), "fp32", []) as recorder:
            recorder.real_images(torch.full((2, 3, 8, 8), value))
        if step == 0:
            first = path.read_bytes()
    assert path.read_bytes() == first


def test_a_report_that_cannot_be_written_is_a_warning(recorder, make_config, capsys):
    (make_config().log_folder / "report.html").mkdir()
    recorder.checkpoint(1, {"G": {}, "D": {}, "step": 1})
    recorder._background.__exit__(None)
    assert "report.html" in capsys.readouterr().err


@pytest.mark.parametrize("minutes, overdue", [(10, [False, False, True]), (0, [False] * 3), (0.5, [False, True, True])])
def test_a_checkpoint_is_overdue_after_save_minutes(make_config, monkeypatch, minutes, overdue):
    now = 1000.0
    monkeypatch.setattr("training.recorder.time.monotonic", lambda: now)
    with Recorder(make_config(save_minutes=minutes), 0, torch.device("cpu"), "fp32", []) as recorder:
        for seconds, expected in zip((29, 31, 600), overdue, strict=True):
            now = 1000.0 + seconds
            assert recorder.is_save_overdue() == expected
