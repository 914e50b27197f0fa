import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import loop
import scaling
import step
from baseline import Baseline
from class_accuracy import accuracy, train_classifier
from floor import Rates, Work, floors_ms, step_work
from kill import run_trials
from step import Contender, Setting, add_ratios, build_step, contenders, measure, serve, table

from data_loader import to_model_range

SMALL = Setting("cpu", 32, 2)
BLOCK = 4


@pytest.mark.slow
def test_baseline_losses_equal_those_of_the_trainer(make_trainer):
    """Each update starts from the same weights: one step of Adam turns rounding errors into differences of the lr."""
    for update in ("d_step", "g_step"):
        trainer, baseline = make_trainer(imsize=64, z_dim=128, g_conv_dim=64, d_conv_dim=64), Baseline()
        baseline.G.load_state_dict(trainer.G.state_dict())
        baseline.D.load_state_dict(trainer.D.state_dict())
        z = torch.randn(4, 128)
        inputs = [z] if update == "g_step" else [trainer.loader.batch(0), z]
        stats = getattr(trainer, update)(*inputs)
        expected = getattr(baseline, update)(*inputs)
        assert expected
        for name, value in expected.items():
            assert stats[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_contenders_by_device():
    assert [contender.name for contender in contenders(Setting("cpu", 64, 64))] == ["baseline", "ours", "ours"]
    assert len(contenders(Setting("cuda", 64, 64))) == 7
    assert contenders(Setting("cuda", 64, 64), "ours bf16 graph") == [Contender("ours", "bf16", "graph")]
    assert "baseline" not in [contender.name for contender in contenders(Setting("cpu", 32, 64))]


class FakeContender:
    """A contender with a simulated clock whose step takes 5 s right after waiting for a request, otherwise 1 s.

    It is the step function and this process's end of the pipe.
    """

    def __init__(self, rounds: int):
        self.now, self.cold = 0.0, True
        self.requests, self.sent = [True] * rounds + [False], []

    def recv(self) -> bool:
        self.cold = True
        return self.requests.pop(0)

    def send(self, message: object) -> None:
        self.sent.append(message)

    def __call__(self) -> None:
        self.now += 5 if self.cold else 1
        self.cold = False


def test_the_step_after_waiting_for_other_contenders_is_not_counted(monkeypatch):
    fake = FakeContender(rounds=3)
    monkeypatch.setattr(step, "build_step", lambda contender, setting: fake)
    monkeypatch.setattr(step.time, "perf_counter", lambda: fake.now)
    serve(fake, Contender("baseline", "fp32", "eager"), SMALL, warm_up=2, block=BLOCK)
    ready, *blocks, memory = fake.sent
    assert (ready, blocks) == ("ready", [[1000.0] * (BLOCK - 1)] * 3)
    assert memory > 0


class FakeGPU:
    """Memory for three contenders, and a multiprocessing context whose processes die where theirs is not free."""

    def __init__(self, sizes: dict[str, int]):
        self.sizes, self.free = sizes, 3

    def Pipe(self):
        return (end := FakePipe()), end

    def Process(self, target, args, daemon):
        pipe, contender, *_ = args
        pipe.gpu, pipe.size, pipe.mode = self, self.sizes[contender.mode], contender.mode
        return SimpleNamespace(start=pipe.start, join=lambda: None)


class FakePipe:
    def start(self) -> None:
        self.alive = self.size <= self.gpu.free
        self.gpu.free -= self.size * self.alive
        self.answer = "ready"

    def close(self) -> None:
        pass

    def send(self, more: bool) -> None:
        self.answer = [self.size * 10.0] * 3 if more else 1.0
        self.gpu.free += 0 if more else self.size

    def recv(self) -> object:
        if not self.alive:
            raise EOFError
        return self.answer


def test_a_contender_without_memory_is_measured_later_or_named(monkeypatch, capsys):
    """In the first turn a and b fit, in the second c alone; d never does."""
    gpu = FakeGPU({"a": 1, "b": 2, "c": 3, "d": 4})
    monkeypatch.setattr(step.multiprocessing, "get_context", lambda method: gpu)
    records = measure(SMALL, [Contender("ours", "bf16", mode) for mode in "dabc"], rounds=2, warm_up=1, block=4)
    assert [(record["mode"], record["ms_per_step"]) for record in records] == [("a", 10), ("b", 20), ("c", 30)]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("ours bf16 d: not measured")


def test_work_is_that_of_a_part_of_the_batch_where_the_whole_does_not_fit(monkeypatch):
    def step_work(take_step):
        if take_step.batch_size > 16:
            raise torch.OutOfMemoryError
        return Work(flop=10.0 * take_step.batch_size, saved_bytes=take_step.batch_size, parameters=7)

    monkeypatch.setattr(step, "build_step", lambda contender, setting: setting)
    monkeypatch.setattr(step, "step_work", step_work)
    assert step.count_work(Setting("cuda", 64, 64)) == Work(flop=640.0, saved_bytes=64, parameters=7)


@pytest.mark.slow
def test_contenders_are_measured_in_processes_and_tabulated(monkeypatch):
    counted = []
    monkeypatch.setattr(
        step.statistics, "quantiles", lambda times, n: counted.append(times) or [1.0, statistics.median(times), 3.0]
    )
    records = measure(SMALL, contenders(SMALL), rounds=2, warm_up=1, block=BLOCK)
    assert [len(times) for times in counted] == [2 * (BLOCK - 1)] * 2
    assert [record["ms_per_step"] for record in records] == [statistics.median(times) for times in counted]
    assert [record["precision"] for record in records] == ["fp32", "bf16"]
    assert all(record["iqr_ms"] == 2 and record["peak_mib"] > 0 and record["device"] == "cpu" for record in records)
    assert all(record["images_per_s"] == pytest.approx(2000 / record["ms_per_step"]) for record in records)
    add_ratios(records, {"fp32": 1.0, "bf16": 1.0})
    assert len(table(records).splitlines()) == 2 + len(records)


def test_speedup_and_floor_fraction():
    timed = {"iqr_ms": 0.0, "images_per_s": 1.0, "peak_mib": 1.0}
    records = [
        {**Contender("baseline", "fp32", "eager")._asdict(), **timed, "ms_per_step": 8.0},
        {**Contender("ours", "bf16", "graph")._asdict(), **timed, "ms_per_step": 2.0},
    ]
    add_ratios(records, {"fp32": 2.0, "bf16": 1.0})
    assert [record["speedup"] for record in records] == [1, 4]
    assert [record["floor_fraction"] for record in records] == [0.25, 0.5]
    assert [row.split(" | ")[3:5] for row in table(records).splitlines()[2:]] == [["1.00", "25%"], ["4.00", "50%"]]


def test_floor_is_the_longer_of_compute_and_memory_traffic():
    rates = Rates({"fp32": 1e12, "bf16": 1e15}, 1e9)
    floors = floors_ms(Work(flop=1e11, saved_bytes=10_000_000, parameters=1_000_000), rates)
    assert floors == {"fp32": pytest.approx(100), "bf16": pytest.approx((10 + 28) * 1.0)}


def test_work_of_a_convolution():
    layer, x = torch.nn.Conv2d(2, 3, 1, bias=False), torch.randn(4, 2, 8, 8, requires_grad=True)
    work = step_work(lambda: layer(x).sum().backward())
    product = 2 * 4 * 8 * 8 * 2 * 3
    assert work.flop == 3 * product  # forward, gradient of the input, gradient of the weight
    assert (work.saved_bytes, work.parameters) == (x.nbytes, 2 * 3)


def test_contenders_take_the_same_step():
    """On the same inputs and weights: the loss of each differs from that of the first by rounding only."""
    losses = [build_step(contender, SMALL)()["d_loss"].item() for contender in contenders(SMALL)]
    again = build_step(contenders(SMALL)[0], SMALL)()["d_loss"].item()
    assert losses[0] == again
    assert losses == pytest.approx([again] * len(losses), rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_runs_end_bit_for_bit_like_an_uninterrupted_one():
    assert run_trials(3) == (3, 3)


@pytest.mark.slow
def test_loop_measures_whole_runs(make_config):
    config = make_config(g_conv_dim=8, d_conv_dim=8)
    times = loop.measure(config, steps=2, run_steps=5, rounds=2)
    assert list(times) == ["steps only", "with data", "whole run"]
    assert all(ms > 0 for ms in times.values())
    assert (config.model_folder / "15_state.pth").exists()  # a warm-up run and one per round, resumed in turn


@pytest.mark.slow
@pytest.mark.distributed
def test_scaling_compares_ranks_with_independent_runs(monkeypatch, capsys):
    small = "--imsize 32 --z_dim 16 --g_conv_dim 8 --d_conv_dim 8 --num_workers 0 --device cpu"
    words = ["scaling.py", "--processes", "2", "--batch_size", "4", "--steps", "15", *small.split()]
    monkeypatch.setattr(sys, "argv", words)
    scaling.main()
    *_, row = capsys.readouterr().out.splitlines()
    processes, batch, rate, efficiency, independent = row.strip("| ").split(" | ")
    assert (processes, batch, efficiency) == ("2", "4", "100%")
    assert float(rate) > 0 and float(independent) > 0


@pytest.mark.slow
def test_a_classifier_names_the_classes_of_toy_faces_and_not_those_of_shuffled_labels(make_trainer):
    trainer = make_trainer(model="paper", conditional=True, imsize=64, toy_num=600)
    images, labels = trainer.loader.images, trainer.loader.labels
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    found = {}
    for name, given in (("own", labels), ("shuffled", shuffled)):
        classifier = train_classifier(images[100:], given[100:], 3, steps=60)
        found[name] = accuracy(classifier, to_model_range(images[:100]), given[:100])
    assert found["own"] > 0.7 and found["shuffled"] < 0.5, found
