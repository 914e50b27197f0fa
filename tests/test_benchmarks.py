"""benchmarks/: each script runs in its smallest form, and what the figures are computed by is right."""

import json
import re
import shlex
import sys
import time

import class_accuracy
import data
import loop
import pytest
import scaling
import step
import torch
from baseline import Baseline
from conftest import run_main, train_in
from floor import Rates, Work, floors_ms, step_work
from kill import run_trials
from step import Contender, Setting, add_ratios, build_step, time_block

SMALL = "--imsize 32 --z_dim 16 --g_conv_dim 8 --d_conv_dim 8 --num_workers 0 --device cpu"


def output_of(folder, script, words):
    """Run a script with these words in a folder; return the lines that it prints."""
    code, out, err = run_main(folder, *shlex.split(words), program=script)
    assert not code, (code, err)
    return out.splitlines()


@pytest.mark.parametrize("update", ["d_step", "g_step"])
def test_baseline_losses_equal_those_of_the_trainer(make_trainer, update):
    trainer, baseline = make_trainer(imsize=64), Baseline(z_dim=16, conv_dim=8)
    baseline.G.load_state_dict(trainer.G.state_dict())
    baseline.D.load_state_dict(trainer.D.state_dict())
    inputs = {"z": torch.randn(4, 16)} | ({"real": trainer.loader.batch(0)[0]} if update == "d_step" else {})
    stats, expected = getattr(trainer, update)(**inputs), getattr(baseline, update)(**inputs)
    for name in {*expected, "d_loss" if update == "d_step" else "g_loss"}:
        assert stats[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name


def test_contenders_take_the_same_step_and_the_first_after_waiting_is_not_counted():
    contenders = [Contender("ours", precision, "eager") for precision in ("fp32", "fp32", "bf16")]
    fp32, again, bf16 = (build_step(each, Setting("cpu", "sagan", 32, 2))()["d_loss"].item() for each in contenders)
    assert fp32 == again == pytest.approx(bf16, rel=0.02) and fp32 != bf16
    seconds = [0.5, 0, 0, 0]
    times = time_block(lambda: time.sleep(seconds.pop(0)), 4, "cpu")
    assert len(times) == 3 and max(times) < 400


@pytest.mark.slow
def test_step_measures_contenders(tmp_path):
    assert run_main(tmp_path, *shlex.split("--device cpu --model sagan,paper --imsize 256"), program=step)[0] == 2
    words = "--device cpu --imsize 32 --batch_size 4 --rounds 1 --only 'ours fp32' --json"
    lines = output_of(tmp_path, step, f"{words} {tmp_path}/a")
    assert "cpu, sagan, 32x32, batch 4: 2 GFLOP per step" in lines
    (record,) = json.loads((tmp_path / "a").read_text())
    assert record["batch_size"] == 4 and record["speedup"] is None and record["peak_mib"] > 0
    assert lines[-1].startswith(f"| this repository, fp32, eager | {record['ms_per_step']:.2f} (")


def test_speedup_work_and_floor():
    """The floor is the longer of compute and memory traffic, which is half in bf16 but for seven passes of Adam."""
    floors = floors_ms(Work(1e11, saved_bytes=10**7, parameters=10**6), Rates({"fp32": 1e12, "bf16": 1e15}, 1e9))
    assert floors == {"fp32": pytest.approx(100), "bf16": pytest.approx(10 + 28)}
    records = [{"name": "baseline", "precision": "fp32", "ms_per_step": 400.0},
               {"name": "ours", "precision": "bf16", "ms_per_step": 76.0}]  # fmt: skip
    add_ratios(records, floors)
    ratios = [record[name] for record in records for name in ("speedup", "floor_fraction")]
    assert ratios == pytest.approx([1, 0.25, 400 / 76, 0.5])
    # Forward, and gradients of inputs and weights. The memory of the first x is free for the next: it counts again.
    layer = torch.nn.Conv2d(2, 3, 1, bias=False)
    work = step_work(lambda: [layer(torch.zeros(4, 2, 8, 8, requires_grad=True)).sum().backward() for _ in range(9)])
    assert work == Work(9 * 3 * (2 * 4 * 8 * 8 * 2 * 3), saved_bytes=9 * 4 * (4 * 2 * 8 * 8), parameters=2 * 3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_runs_end_bit_for_bit_like_an_uninterrupted_one():
    assert run_trials(1) == (1, 1)


@pytest.mark.slow
@pytest.mark.distributed
def test_data_loop_and_scaling_measure(make_config, no_report, tmp_path):
    lines = output_of(tmp_path, data, "--images 100 --imsize 32 --batch_size 4 --num_workers 0")
    numbers = [float(re.search(r"  ([\d.]+) (images/s|ms)", line)[1]) for line in lines if line.strip()]
    assert len(numbers) == 4 and all(number > 0 for number in numbers)
    times = loop.measure(config := make_config(), steps=2, run_steps=5, rounds=2)
    assert list(times) == ["steps only", "with data", "whole run"] and all(ms > 0 for ms in times.values())
    assert (config.model_folder / "15_state.pth").exists()  # a warm-up run and one per round, resumed in turn
    *_, row = output_of(tmp_path, scaling, f"--processes 2 --batch_size 4 --steps 15 {SMALL}")
    assert re.fullmatch(r"\| 2 \| 4 \| [\d.]*[1-9][\d.]* \| 100% \| [\d.]*[1-9][\d.]* \|", row)


@pytest.mark.slow
def test_a_classifier_names_the_classes_of_real_faces_only(tmp_path):
    words = f"--dataset=toy --toy_num=600 --model=paper --conditional=true --total_step=1 --batch_size=4 {SMALL}"
    train_in(tmp_path, *words.replace("32", "64").split())
    lines = output_of(tmp_path, class_accuracy, "--device cpu --num_samples 10")
    real, *generated, mean = (float(re.fullmatch(r".*\S +([\d.]+)%", line)[1]) for line in lines[-5:])
    assert real > 70 and len(generated) == 3 and mean == pytest.approx(100 / 3, abs=0.1)  # the same for each class
