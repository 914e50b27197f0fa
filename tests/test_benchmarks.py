import json
import re
import statistics
import sys
from types import SimpleNamespace

import data
import loop
import pytest
import scaling
import step
import torch
from baseline import Baseline
from class_accuracy import accuracy, train_classifier
from floor import Rates, Work, floors_ms, step_work
from kill import run_trials
from step import Contender, Setting, add_ratios, build_step, contenders, measure, serve, table

from data_loader import to_model_range

SMALL = Setting("cpu", "sagan", 32, 2)
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
    on_cpu, on_cuda = Setting("cpu", "sagan", 64, 64), Setting("cuda", "sagan", 64, 64)
    assert [contender.name for contender in contenders(on_cpu)] == ["baseline", "ours", "ours"]
    assert len(contenders(on_cuda)) == 7
    assert contenders(on_cuda, "ours bf16 graph") == [Contender("ours", "bf16", "graph")]
    for other in (on_cpu._replace(imsize=32), on_cpu._replace(model="paper")):
        assert [contender.name for contender in contenders(other)] == ["ours", "ours"]


def parse(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["step.py", "--device", "cpu", *words])
    return step.parse_arguments()


def test_every_model_is_measured_at_every_size(monkeypatch):
    assert parse(monkeypatch).settings == [Setting("cpu", "sagan", 64, 64)]
    assert parse(monkeypatch, "--model", "sagan,paper", "--imsize", "64,128", "--batch_size", "2").settings == [
        Setting("cpu", model, imsize, 2) for model in ("sagan", "paper") for imsize in (64, 128)
    ]


@pytest.mark.parametrize("words", [["--model", "dcgan"], ["--model", "sagan,paper", "--imsize", "32"]])
def test_what_cannot_be_measured_is_rejected_before_anything_is(monkeypatch, capsys, words):
    with pytest.raises(SystemExit):
        parse(monkeypatch, *words)
    assert "--model" in capsys.readouterr().err.splitlines()[-1]


def test_records_and_headings_name_the_model(monkeypatch, capsys, tmp_path):
    """Of two models; neither is built or timed."""
    path = tmp_path / "results.json"
    timed = {"ms_per_step": 1.0, "iqr_ms": 0.0, "images_per_s": 1.0, "peak_mib": 1.0}
    monkeypatch.setattr(step, "machine_rates", lambda *_: Rates({"fp32": 1e12, "bf16": 1e12}, 1e9))
    monkeypatch.setattr(step, "count_work", lambda setting: Work(flop=2e9, saved_bytes=1, parameters=1))
    monkeypatch.setattr(
        step, "measure", lambda setting, found, *_: [setting._asdict() | one._asdict() | timed for one in found]
    )
    words = ["step.py", "--device", "cpu", "--model", "paper,sagan", "--batch_size", "16", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    step.main()
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cpu, ")]
    assert headings == [f"cpu, {model}, 64x64, batch 16: 2 GFLOP per step" for model in ("paper", "sagan")]
    records = json.loads(path.read_text())
    assert [record["model"] for record in records] == ["paper"] * 2 + ["sagan"] * 3
    assert [record["speedup"] for record in records] == [None] * 2 + [1.0] * 3


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
    assert step.count_work(Setting("cuda", "sagan", 64, 64)) == Work(flop=640.0, saved_bytes=64, parameters=7)


@pytest.mark.slow
def test_a_contender_is_measured_in_a_process_and_tabulated(monkeypatch):
    """Several in turn are those of the tests above."""
    counted = []
    monkeypatch.setattr(
        step.statistics, "quantiles", lambda times, n: counted.append(times) or [1.0, statistics.median(times), 3.0]
    )
    records = measure(SMALL, contenders(SMALL, "bf16"), rounds=2, warm_up=1, block=BLOCK)
    assert [len(times) for times in counted] == [2 * (BLOCK - 1)]
    assert [record["ms_per_step"] for record in records] == [statistics.median(times) for times in counted]
    assert [record["precision"] for record in records] == ["bf16"]
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


def test_memory_that_is_used_again_counts_again():
    layer = torch.nn.Conv2d(2, 3, 1, bias=False)

    def take_step():
        for _ in range(20):  # the memory of the first x is free for the next
            layer(torch.zeros(4, 2, 8, 8)).sum().backward()

    assert step_work(take_step).saved_bytes == 20 * 4 * 4 * 2 * 8 * 8


def test_work_of_a_step_of_the_paper_s_networks(make_trainer):
    """Matrix FLOP of 1 image counted by hand; d is the width, convolutions with resampling have 4x4 kernels."""
    d, z_dim = 8, 16
    trainer = make_trainer(model="paper", imsize=64, batch_size=2, z_dim=z_dim, g_conv_dim=d, d_conv_dim=d)
    z = torch.randn(2, z_dim)
    work = step_work(lambda: trainer.updates([trainer.loader.batch(0)], [z, z], []))

    def convolution(kernel, inputs, outputs, size):
        return 2 * kernel**2 * inputs * outputs * size**2

    def attention(channels):  # 1x1 convolutions, and the products of queries and keys, of maps and values
        widths = (channels // 8, channels // 8, channels // 2, channels // 2)
        projections = sum(convolution(1, channels, width, 32) for width in widths)
        return projections, 2 * 1024 * 256 * (channels // 8 + channels // 2)

    g_first, d_first = 2 * z_dim * 16 * d * 4 * 4, convolution(3, 3, d, 64) + convolution(1, 3, d, 32)
    g_projections, g_products = attention(2 * d)
    d_projections, d_products = attention(d)
    G = g_first + convolution(3, d, 3, 64) + g_projections
    for inputs, outputs, size in ((16, 8, 4), (8, 4, 8), (4, 2, 16), (2, 1, 32)):
        G += convolution(4, inputs * d, outputs * d, size) + convolution(1, inputs * d, outputs * d, size)
        G += convolution(3, outputs * d, outputs * d, 2 * size)
    D = d_first + convolution(4, d, d, 32) + d_projections + 2 * 16 * d
    for inputs, outputs, size in ((1, 2, 32), (2, 4, 16), (4, 8, 8)):
        D += convolution(3, inputs * d, outputs * d, size) + convolution(1, inputs * d, outputs * d, size // 2)
        D += convolution(4, outputs * d, outputs * d, size // 2)
    D += convolution(3, 8 * d, 16 * d, 4) + convolution(3, 16 * d, 16 * d, 4) + convolution(1, 8 * d, 16 * d, 4)

    # A backward has the FLOP of the forward for the gradients of the inputs, and again for those of the weights.
    update_of_D = G + g_products + 2 * (3 * (D + d_products) - d_first)  # real and fake; no gradients of the images
    update_of_G = 3 * (G + g_products) - g_first + 2 * D + 3 * d_products  # none of z, none of D's weights
    assert work.flop == 2 * (update_of_D + update_of_G)


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
def test_loop_measures_whole_runs(make_config, no_report):
    config = make_config(g_conv_dim=8, d_conv_dim=8)
    times = loop.measure(config, steps=2, run_steps=5, rounds=2)
    assert list(times) == ["steps only", "with data", "whole run"]
    assert all(ms > 0 for ms in times.values())
    assert (config.model_folder / "15_state.pth").exists()  # a warm-up run and one per round, resumed in turn


def test_data_measures_decoding_opening_and_batches(monkeypatch, capsys):
    monkeypatch.setattr(data, "BATCHES", 5)
    words = "data.py --images 300 --imsize 32 --batch_size 4 --num_workers 0"
    monkeypatch.setattr(sys, "argv", words.split())
    data.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    numbers = [float(re.search(r"  ([\d.]+) (images/s|ms)", line)[1]) for line in lines]
    assert len(numbers) == 4 and all(number > 0 for number in numbers)


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
