import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import scaling
from baseline import Baseline
from floor import Rates, Work, floors_ms
from kill import run_trials
from step import Setting, add_ratios, build_step, contenders, measure, table


def test_the_baseline_has_our_losses(make_trainer):
    """Each update from the same weights: after one, Adam has made a step of what was rounding."""
    for update in ("d_step", "g_step"):
        ours = make_trainer(imsize=64, z_dim=128, g_conv_dim=64, d_conv_dim=64)
        theirs = Baseline()
        theirs.G.load_state_dict(ours.G.state_dict())
        theirs.D.load_state_dict(ours.D.state_dict())
        inputs = [torch.randn(4, 128)] if update == "g_step" else [ours.loader.batch(0), torch.randn(4, 128)]
        stats = getattr(ours, update)(*inputs)
        for name, value in getattr(theirs, update)(*inputs).items():
            assert stats[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_contenders_by_device():
    assert [contender.name for contender in contenders(Setting("cpu", 64, 64))] == ["baseline", "ours", "ours"]
    assert len(contenders(Setting("cuda", 64, 64))) == 7
    assert len(contenders(Setting("cuda", 64, 64), "ours bf16 graph")) == 1
    assert "baseline" not in [contender.name for contender in contenders(Setting("cpu", 32, 64))]


def test_processes_are_measured_and_reported():
    records = measure(Setting("cpu", 32, 2), contenders(Setting("cpu", 32, 2)), rounds=3, warm_up=1, block=1)
    add_ratios(records, {"fp32": 1.0, "bf16": 1.0})
    expected = (
        "name device precision mode imsize batch_size ms_per_step images_per_s ratio floor_share peak_mib spread_ms"
    )
    assert set(records[0]) == set(expected.split())
    assert [record["precision"] for record in records] == ["fp32", "bf16"]
    assert all(record["ms_per_step"] > 0 and record["peak_mib"] > 0 for record in records)
    assert "ours, bf16, eager" in table(records)


def test_the_floor_is_the_longer_of_work_and_traffic():
    rates = Rates({"fp32": 1e12, "bf16": 1e15}, 1e9)
    floors = floors_ms(Work(flop=1e11, kept_bytes=10_000_000, parameters=1_000_000), rates)
    assert floors == {"fp32": pytest.approx(100), "bf16": pytest.approx((10 + 28) * 1.0)}


def test_steps_are_ours_and_on_the_same_inputs():
    first = build_step(contenders(Setting("cpu", 32, 2))[0], Setting("cpu", 32, 2))()
    second = build_step(contenders(Setting("cpu", 32, 2))[0], Setting("cpu", 32, 2))()
    assert first["d_loss"].item() == second["d_loss"].item()


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_runs_continue_bit_for_bit():
    assert run_trials(5) == (5, 5)


def test_scaling_measures_processes_together_and_side_by_side(monkeypatch, capsys):
    small = "--imsize 32 --z_dim 16 --g_conv_dim 8 --d_conv_dim 8 --num_workers 0 --device cpu"
    words = ["scaling.py", "--processes", "2", "--batch_size", "4", "--steps", "15", *small.split()]
    monkeypatch.setattr(sys, "argv", words)
    scaling.main()
    *_, row = capsys.readouterr().out.splitlines()
    processes, batch, rate, efficiency, apart = row.strip("| ").split(" | ")
    assert (processes, batch, efficiency) == ("2", "4", "100%")
    assert float(rate) > 0 and float(apart) > 0
