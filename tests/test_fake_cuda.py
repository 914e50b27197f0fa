"""Training steps on fake CUDA tensors, which have shapes and devices and no values: a tensor on the wrong device is an
error without a GPU. The engine of autograd needs one, so there are no backwards."""

from contextlib import suppress
from unittest import mock

import pytest
import torch
from conftest import build_trainer
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from data_loader import Loader

# What `torch.cuda` says of the GPU.
GPU = dict(device_count=lambda: 1, set_device=lambda _: None, get_device_capability=lambda _: (9, 0),
           is_bf16_supported=lambda: True, mem_get_info=lambda _: (2**40, 2**40))  # fmt: skip
PAPER, AUGMENT = dict(model="paper", imsize=64), dict(augment="color,translation,cutout")


class FakeTensors(FakeTensorMode):
    def __deepcopy__(self, memo):
        return self  # the EMA's network is a copy


class CpuGenerator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


def move(network, device, memory_format):
    """`nn.Module.to` cannot move fake parameters."""
    for layer in network.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            layer.register_parameter(name, torch.nn.Parameter(parameter.to(device)))
        for name, buffer in layer.named_buffers(recurse=False):
            layer.register_buffer(name, buffer.to(device))
    return network


@pytest.fixture
def fake_gpu(monkeypatch):
    for name, function in GPU.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch, "Generator", CpuGenerator)
    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, x, create_graph: (loss * x,))  # of the penalty
    monkeypatch.setattr("trainer.Adam", mock.Mock())
    monkeypatch.setattr(Loader, "fingerprint", {"checksum": 0, "held_out_checksum": 0})  # of values
    with FakeTensors():
        yield


@pytest.mark.parametrize("options", [
    dict(precision="fp32"), dict(attention="none") | AUGMENT, dict(adv_loss="wgan-gp", hflip=True), PAPER,
    dict(precision="fp32", adv_loss="wgan-gp", conditional=True, n_critic=2) | PAPER | AUGMENT,
    dict(attention="none", conditional=True) | PAPER,
], ids=lambda options: " ".join(map(str, options.values())))  # fmt: skip
def test_no_tensor_of_a_step_is_on_the_cpu(make_config, fake_gpu, options):
    """Nor of what is shown of the networks; in bf16 where the options do not say fp32."""
    trainer = build_trainer(make_config(device="cuda", cuda_graph="false", holdout=0.2, **options))
    shown = trainer.train_step() | trainer.previews.samples() | trainer.previews.scalars(1)
    assert {tensor.device for tensor in shown.values()} == {torch.device("cuda", 0)}
    with suppress(DataDependentOutputException):  # the names of the classes
        trainer.previews.attention()
