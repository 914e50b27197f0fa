"""The bookkeeping around a captured step, with fakes of CUDA's streams and graphs; tests/test_cuda.py has real ones."""

import contextlib

import pytest
import torch

from errors import UserError
from training.cuda_graph import WARM_UP, GraphedStep, can_capture


class FakeGraph:
    """Remembers what is captured; a replay runs it."""

    capturing = None

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
    def capture(graph, capture_error_mode):
        FakeGraph.capturing = graph
        yield
        FakeGraph.capturing = None

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)


def make_step(total):
    """A step that adds its inputs to `total` in place; as with CUDA, capturing executes nothing."""
    result = torch.zeros(())

    def step(real, z, mix):
        def body():
            total.add_(real[0].sum() + z[0].sum() + sum(mix))
            result.copy_(total)

        if FakeGraph.capturing:
            FakeGraph.capturing.body = body
        else:
            body()
        return {"total": result}

    return step


def inputs(call):
    return [torch.full((2, 3), float(call))], [torch.randn(4)], [torch.rand(())]


def test_every_call_is_one_step_on_its_own_inputs(fake_cuda):
    eager, captured = torch.zeros(()), torch.zeros(())
    step, graphed = make_step(eager), GraphedStep(make_step(captured), "cuda")
    for call in range(WARM_UP + 5):
        given = inputs(call)
        assert graphed(*given)["total"] == step(*given)["total"]
    assert graphed.graph is not None


@pytest.mark.parametrize("fallback", [True, False])
def test_a_failed_capture_falls_back_to_eager_or_raises(fake_cuda, monkeypatch, capsys, fallback):
    @contextlib.contextmanager
    def fail(graph, capture_error_mode):
        try:
            raise RuntimeError("not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("capture_end")  # as torch does on leaving a failed capture
        yield

    monkeypatch.setattr(torch.cuda, "graph", fail)
    eager, captured = torch.zeros(()), torch.zeros(())
    step, graphed = make_step(eager), GraphedStep(make_step(captured), "cuda", fallback)
    with contextlib.nullcontext() if fallback else pytest.raises(RuntimeError):
        for call in range(WARM_UP + 3):
            given = inputs(call)
            assert graphed(*given)["total"] == step(*given)["total"]
        out = capsys.readouterr().out
        assert out.count("CUDA graph") == 1 and "not permitted" in out


def test_only_a_single_process_on_cuda_captures(capsys):
    gpu = torch.device("cuda")
    assert can_capture(gpu, "auto", 1) and can_capture(gpu, "true", 1)
    assert not can_capture(gpu, "false", 1) and not can_capture(torch.device("cpu"), "true", 1)
    assert not capsys.readouterr().out
    assert not can_capture(gpu, "auto", 2)
    assert capsys.readouterr().out.count("CUDA graph") == 1
    with pytest.raises(UserError, match="--cuda_graph"):
        can_capture(gpu, "true", 2)
