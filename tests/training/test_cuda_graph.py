"""The bookkeeping of a recorded step, on fakes of CUDA's streams and graphs; tests/test_cuda.py has the real ones."""

import contextlib

import pytest
import torch

from errors import UserError
from training.cuda_graph import WARM_UP, GraphedStep, can_capture


class FakeGraph:
    """Remembers what is recorded; a replay runs it."""

    recording = None

    def replay(self):
        self.body()


@pytest.fixture
def fake_cuda(monkeypatch):
    class Stream:
        def __init__(self, *_):
            pass

        def wait_stream(self, _):
            pass

    @contextlib.contextmanager
    def record(graph, capture_error_mode):
        FakeGraph.recording = graph
        yield
        FakeGraph.recording = None

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)


def make_step(total):
    """A step that adds its inputs to `total` in place, as CUDA does: recording alone runs nothing."""
    result = torch.zeros(())

    def step(reals, noises):
        def body():
            total.add_(reals[0].sum() + noises[0].sum())
            result.copy_(total)

        if FakeGraph.recording:
            FakeGraph.recording.body = body
        else:
            body()
        return {"total": result}

    return step


def test_every_call_is_one_step_on_its_own_inputs(fake_cuda):
    eager, recorded = torch.zeros(()), torch.zeros(())
    step, graph = make_step(eager), GraphedStep(make_step(recorded), "cuda")
    for call in range(WARM_UP + 5):
        reals, noises = [torch.full((2, 3), float(call))], [torch.randn(4)]
        assert graph(reals, noises)["total"] == step(reals, noises)["total"]
    assert graph.graph is not None


@pytest.mark.parametrize("allow_fallback", [True, False])
def test_a_recording_that_fails(fake_cuda, monkeypatch, capsys, allow_fallback):
    @contextlib.contextmanager
    def fail(graph, capture_error_mode):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "graph", fail)
    eager, recorded = torch.zeros(()), torch.zeros(())
    step, graph = make_step(eager), GraphedStep(make_step(recorded), "cuda", allow_fallback)
    outcome = contextlib.nullcontext() if allow_fallback else pytest.raises(RuntimeError)
    with outcome:
        for call in range(WARM_UP + 3):
            inputs = [torch.full((2, 3), float(call))], [torch.randn(4)]
            assert graph(*inputs)["total"] == step(*inputs)["total"]
        assert capsys.readouterr().out.count("without a CUDA graph") == 1


def test_what_cannot_be_recorded_steps_aside_with_one_line(capsys):
    gpu = torch.device("cuda")
    assert can_capture(gpu, "auto", "hinge", 1)
    assert not can_capture(gpu, "false", "hinge", 1) and not can_capture(torch.device("cpu"), "true", "hinge", 1)
    assert not capsys.readouterr().out
    assert not can_capture(gpu, "auto", "hinge", 2) and not can_capture(gpu, "auto", "wgan-gp", 1)
    assert capsys.readouterr().out.count("the step runs without a CUDA graph: ") == 2
    for impossible in (("hinge", 2), ("wgan-gp", 1)):
        with pytest.raises(UserError, match="--cuda_graph true"):
            can_capture(gpu, "true", *impossible)
