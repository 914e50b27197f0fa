"""benchmarks/ablation.py: what it runs, what it writes, and that it can be stopped and continued."""

import json
import signal
import sys
from pathlib import Path

import ablation
import numpy as np
import pytest
from ablation import final_value, make_runs, table, write_figure
from conftest import log_lines, wait_for

import main
from errors import UserError

SMALL = ["--dataset=toy", "--toy_num=24", "--imsize=32", "--z_dim=16", "--g_conv_dim=8", "--d_conv_dim=8",
         "--batch_size=4", "--device=cpu", "--num_workers=0", "--log_step=1"]  # fmt: skip


def test_every_combination_is_a_run_of_each_seed():
    vary = [["attention", "full", "none"], ["augment", "none", "color,cutout"]]
    runs = make_runs(vary, [0, 7], "results", ["--total_step", "300", "--holdout", "0.2"])
    assert [(run.config.attention, run.config.augment) for run in runs[:4]] == [
        ("full", "none"), ("full", "color,cutout"), ("none", "none"), ("none", "color,cutout")]  # fmt: skip
    assert [run.config.seed for run in runs] == [0] * 4 + [7] * 4
    assert len({run.config.version for run in runs}) == 8
    assert runs[1].config.version == "attention=full,augment=color,cutout,seed=0"
    assert {run.config.model_folder.parent for run in runs} == {Path("results/models")}
    for run in runs:
        config = run.config
        assert (config.total_step, config.metric_step, config.sample_step, config.holdout) == (300, 30, 30, 0.2)
        assert (config.metrics, config.pretrained_model) == ("faces,hog", "auto")


@pytest.mark.parametrize("vary, arguments, message", [
    (["attention", "full"], [], "two or more"),
    (["attention", "full", "full"], [], "two or more"),
    (["seed", "0", "1"], [], "--vary seed"),
    (["attention", "full", "none"], ["--attention", "none"], "--vary attention"),
    (["image_path", "a/b", "c"], [], "--vary image_path"),
    (["attention", "full", "none"], ["--version", "x"], "--version"),
    (["attention", "full", "none"], ["--seed", "1"], "--seeds"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(vary, arguments, message):
    with pytest.raises(UserError, match=message):
        make_runs([vary], [0], "out", arguments)


@pytest.mark.parametrize("vary, word", [(["attention", "full", "some"], "some"), (["atention", "a", "b"], "atention")])
def test_values_that_main_refuses_are_refused_before_any_training(vary, word, capsys):
    with pytest.raises(SystemExit):
        make_runs([vary], [0], "out", [])
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


def test_table_has_means_and_ranges():
    def curves(level: float, speed: float) -> dict[str, np.ndarray]:
        steps = np.arange(1.0, 21)
        return {"faces": np.array([[10, 0.1], [20, level]]), "d_sign": np.stack([steps, steps], 1),
                "ms": np.stack([steps, speed * np.where(steps == 5, 100, 1)], 1)}  # fmt: skip

    results = {"a=1,b=2": {0: curves(0.25, 1000), 3: curves(0.75, 2000)}, "a=1,b=3": {0: curves(1, 5)}}
    assert final_value("d_sign", results["a=1,b=3"][0]["d_sign"]) == 19.5  # of the last two of 20
    assert table(results).splitlines() == [
        "| variant | seeds | face rate | r | ms per step |",
        "| --- | --- | --- | --- | --- |",
        "| a=1,b=2 | 0, 3 | 0.5 (0.25 to 0.75) | 19.5 (19.5 to 19.5) | 1,500 (1,000 to 2,000) |",
        "| a=1,b=3 | 0 | 1 | 19.5 | 5 |",
    ]


def test_a_curve_that_a_variant_lacks_is_left_out(tmp_path):
    """Such as the gap of D, without --holdout."""
    steps = np.arange(1.0, 21)
    whole = {name: np.stack([steps, steps], 1) for name in ("d_gap", "d_sign")}
    write_figure(tmp_path / "figure.png", {"a=1": {0: {"d_sign": whole["d_sign"]}}, "a=2": {0: whole}}, {})
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_stopped_and_continued(tmp_path, start_process, monkeypatch, capfd, no_report):
    """Ctrl-C saves a checkpoint; the same command, here with fewer steps, resumes there and trains the others.

    The second command runs in this process.
    """

    def train(run):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["main.py", *run.arguments])
            return main.main()

    pytest.importorskip("cv2")
    words = ["--vary", "attention", "full", "none", "--seeds", "0", "--out", "out", *SMALL, "--metric_num=12",
             "--metric_step=1000"]  # fmt: skip
    process = start_process([sys.executable, ablation.__file__, *words, "--total_step=100000"], tmp_path)
    wait_for(lambda: log_lines(tmp_path / "out/logs/attention=full,seed=0"), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on from here" in output
    (saved,) = (tmp_path / "out/models/attention=full,seed=0").glob("*_state.pth")
    total = int(saved.name.partition("_")[0]) + 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(sys, "argv", ["ablation.py", *words, f"--total_step={total}"])
    assert ablation.main() == 0
    printed = capfd.readouterr().out
    assert f"resuming from step {total - 2}" in printed
    for variant in ("attention=full", "attention=none"):
        lines = (tmp_path / f"out/logs/{variant},seed=0/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, total + 1))
    written = (tmp_path / "out/ablation.md").read_text()
    assert f"2 runs of {total:,} steps" in written and written.strip() in printed
    assert "| attention=none | 0 |" in written and "Real images: face rate" in written
    assert (tmp_path / "out/ablation.png").stat().st_size > 10_000


def test_finished_runs_are_not_trained_again(tmp_path, monkeypatch, capsys):
    words = ["--vary", "attention", "full", "none", "--seeds", "0", "--out", str(tmp_path), "--total_step", "2"]
    for run in make_runs([["attention", "full", "none"]], [0], str(tmp_path), ["--total_step", "2"]):
        for folder in run.config.folders.values():
            folder.mkdir(parents=True)
        (run.config.model_folder / "2_state.pth").touch()
        (run.config.log_folder / "metrics.jsonl").write_text('{"step": 2, "images_per_s": 8, "d_sign": 0.5}\n')
    monkeypatch.setattr(ablation, "train", None)
    monkeypatch.setattr(sys, "argv", ["ablation.py", *words])
    assert ablation.main() == 0
    assert "| attention=none | 0 | 0.5 | 8,000 |" in capsys.readouterr().out
