"""The captured step on a CPU, with fakes of CUDA's streams and graphs; tests/test_cuda.py has real ones."""

import contextlib

import pytest
import torch
from torch import Tag
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from errors import UserError
from training.cuda_graph import WARM_UP, GraphedStep, can_capture


class FakeGraph:
    """Operations on the CPU, which a replay runs again on the same memory: nothing else of the step runs again."""

    def __init__(self):
        self.operations = []

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.operations:
            for static, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if (
                    isinstance(static, torch.Tensor) and static.data_ptr() != new.data_ptr()
                ):  # neither view nor in place
                    static.copy_(new)


class Capture(TorchDispatchMode):
    """Record operations, and undo their effects at the end. As in CUDA, no value may be read, nor random ones drawn."""

    FORBIDDEN = (Tag.data_dependent_output, Tag.dynamic_output_shape, Tag.nondeterministic_seeded)

    def __init__(self, graph, capture_error_mode):
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not set(self.FORBIDDEN).isdisjoint(function.tags):
            raise RuntimeError(f"{function}: operation not permitted when stream is capturing\nmore")
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = function(*args, **kwargs)
        self.graph.operations.append((function, args, kwargs, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, before in self.before.values():
            storage.copy_(before)
        if error[0]:  # so does torch
            try:
                raise RuntimeError("operation failed due to a previous error during capture")
            finally:
                raise RuntimeError("still capturing")


@pytest.fixture
def fake_cuda(monkeypatch):
    class Stream:
        def __init__(self, *_):
            pass

        def wait_stream(self, _):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)


def make_step(read=lambda value: value):
    """A step that adds its inputs to a total in place, and reads the total with a function."""
    total = torch.zeros(())

    def step(real, z, mix):
        total.add_(real[0].sum() + z[0].sum() + sum(mix))
        read(total)
        return {"total": total.clone()}

    return step


def inputs(call):
    real = torch.full((2, 3, 4, 4), float(call)).contiguous(memory_format=torch.channels_last)
    return [real], [torch.randn(4)], [torch.rand(())]


def test_every_call_is_one_step_on_its_own_inputs(fake_cuda):
    step, graphed = make_step(), GraphedStep(make_step(), "cuda")
    results = []
    for call in range(WARM_UP + 5):
        given = inputs(call)
        results.append(graphed(*given)["total"])
        assert results[-1] == step(*given)["total"]
    assert all(result is results[-1] for result in results[WARM_UP:])
    assert graphed.inputs[0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{}, dict(precision="bf16", n_critic=2), dict(adv_loss="wgan-gp"),
                                     dict(lr_schedule="linear", total_step=8, beta1=0.5),
                                     dict(model="paper", imsize=64, conditional=True, n_critic=2),
                                     dict(augment="color,translation,cutout")])  # fmt: skip
def test_the_updates_of_the_trainer_can_be_captured(fake_cuda, make_trainer, options):
    """Bit for bit the eager ones: they work in place, on tensors alone, and draw no random numbers."""
    trainers = [make_trainer(**options) for _ in range(2)]
    eager, captured = trainers
    captured.updates = GraphedStep(captured._updates, "cuda", fallback=False)
    for trainer in trainers:
        for optimizer in (trainer.g_optimizer, trainer.d_optimizer):
            optimizer.param_groups[0]["lr"] = torch.tensor(optimizer.param_groups[0]["lr"])  # as on CUDA
    for _ in range(WARM_UP + 4):
        expected, actual = eager.train_step(), captured.train_step()
        assert {name: value.item() for name, value in expected.items()} == {
            name: value.item() for name, value in actual.items()
        }
    assert len(captured.updates.graph.operations) > 300
    for name in ("G", "D"):
        expected, actual = (getattr(trainer, name).state_dict() for trainer in trainers)
        for key, value in expected.items():
            assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("read", [torch.Tensor.item, bool, torch.nonzero, torch.bernoulli])
@pytest.mark.parametrize("fallback", [True, False])
def test_a_failed_capture_falls_back_to_eager_or_raises(fake_cuda, capsys, fallback, read):
    """What is printed is the first of the errors, which says what is not permitted."""
    step = make_step()
    graphed = GraphedStep(make_step(lambda value: read(value * 0)), "cuda", fallback)
    with contextlib.nullcontext() if fallback else pytest.raises(RuntimeError):
        for call in range(WARM_UP + 3):
            given = inputs(call)
            assert graphed(*given)["total"] == step(*given)["total"]
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("CUDA graph disabled") and line.endswith("not permitted when stream is capturing")


def test_only_a_single_process_on_cuda_captures(capsys):
    gpu = torch.device("cuda")
    assert can_capture(gpu, "auto", 1) and can_capture(gpu, "true", 1)
    assert not can_capture(gpu, "false", 1) and not can_capture(torch.device("cpu"), "auto", 1)
    assert not capsys.readouterr().out
    assert not can_capture(gpu, "auto", 2)
    assert capsys.readouterr().out.count("CUDA graph") == 1
    with pytest.raises(UserError, match="--cuda_graph"):
        can_capture(gpu, "true", 2)
    with pytest.raises(UserError, match="this run is on cpu"):
        can_capture(torch.device("cpu"), "true", 1)
