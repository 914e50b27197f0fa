"""The captured step on a CPU, with fakes of CUDA's streams and graphs; tests/test_cuda.py has real ones."""

import contextlib
from unittest import mock

import pytest
import torch
from conftest import assert_same_weights
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
                # neither a view nor changed in place
                if isinstance(static, torch.Tensor) and static.data_ptr() != new.data_ptr():
                    static.copy_(new)


class Capture(TorchDispatchMode):
    """Record operations, and undo their effects at the end. As in CUDA, no value may be read, nor random ones drawn."""

    def __init__(self, graph, capture_error_mode):
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if {Tag.data_dependent_output, Tag.dynamic_output_shape, Tag.nondeterministic_seeded} & {*function.tags}:
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
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture
def fake_cuda(monkeypatch):
    for name in ("Stream", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)


@pytest.mark.parametrize("options", [{}, dict(precision="bf16", n_critic=2), dict(adv_loss="wgan-gp"),
                                     dict(lr_schedule="linear", total_step=8, beta1=0.5),
                                     dict(model="paper", imsize=64, conditional=True, n_critic=2),
                                     dict(augment="color,translation,cutout")])  # fmt: skip
def test_the_updates_of_the_trainer_can_be_captured(fake_cuda, make_trainer, options):
    """Bit for bit the eager ones: they work in place, on tensors alone, and draw no random numbers."""
    eager, captured = trainers = [make_trainer(**options) for _ in range(2)]
    captured.updates = GraphedStep(captured.updates, "cuda", fallback=False)
    for trainer in trainers:
        for optimizer in (trainer.g_optimizer, trainer.d_optimizer):
            optimizer.param_groups[0]["lr"] = torch.tensor(optimizer.param_groups[0]["lr"])  # as on CUDA
    for _ in range(WARM_UP + 4):
        expected, actual = eager.train_step(), captured.train_step()
        assert expected == actual
    assert captured.updates.graph is not None
    assert_same_weights(*trainers)


@pytest.mark.parametrize("read", [torch.Tensor.item, bool, torch.nonzero, torch.bernoulli])
@pytest.mark.parametrize("fallback", [True, False])
def test_a_failed_capture_falls_back_to_eager_or_raises(fake_cuda, capsys, fallback, read):
    """What is printed is the first of the errors, which says what is not permitted."""

    def step(inputs):
        total.add_(inputs[0]["z"])
        read(total * 0)
        return {"total": total.clone()}

    total, graphed = torch.zeros(()), GraphedStep(step, "cuda", fallback)
    with contextlib.nullcontext() if fallback else pytest.raises(RuntimeError):
        results = [graphed([{"z": torch.ones(())}])["total"] for _ in range(WARM_UP + 3)]
        assert results == [*range(1, WARM_UP + 4)]
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("CUDA graph disabled") and "not permitted when stream is capturing" in line


@pytest.mark.parametrize("device, option, size, captures, printed", [
    ("cuda", "auto", 1, True, 0), ("cuda", "true", 1, True, 0), ("cuda", "false", 1, False, 0),
    ("cpu", "auto", 1, False, 0), ("cuda", "auto", 2, False, 1), ("cuda", "false", 2, False, 0),
    ("cuda", "true", 2, None, 0), ("cpu", "true", 1, None, 0),
])  # fmt: skip
def test_only_a_single_process_on_cuda_captures(capsys, device, option, size, captures, printed):
    with pytest.raises(UserError) if captures is None else contextlib.nullcontext():
        assert can_capture(torch.device(device), option, size) == captures
    assert capsys.readouterr().out.count("CUDA graph") == printed
