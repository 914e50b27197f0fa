"""Tests on an NVIDIA GPU; skipped without one. `make bench-gpu` runs them first."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from conftest import assert_same_weights, build_trainer, log
from PIL import Image
from torch.utils._pytree import tree_leaves

import data_loader
import main
import tester
from networks import attention
from networks.losses import gradient_penalty
from training.background import Background
from training.resuming import load_test_checkpoint
from visuals.figures import sample_grid

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic runs; torch looks at it once
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
OLD = pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="too old")
LOWER = [pytest.param(precision, marks=OLD) for precision in ("tf32", "bf16")]
REAL = dict(device="cuda", imsize=64, z_dim=128, g_conv_dim=64, d_conv_dim=64, batch_size=16, toy_num=64)
EXACT = REAL | dict(deterministic=True)
PAPER = dict(model="paper", g_conv_dim=16, d_conv_dim=16)
BUSY = 2**30  # clock cycles, about half a second


def tensors_of(state):
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def losses_of(trainer, steps):
    return [{name: value.item() for name, value in trainer.train_step().items()} for _ in range(steps)]


def losses_and_output_of_a_failed_capture(config, steps):
    """Eager losses, those of a run whose updates read a value back, which cannot be captured, and what it prints."""
    eager = losses_of(build_trainer(dataclasses.replace(config, cuda_graph="false")), steps)
    trainer = build_trainer(config)
    updates = trainer.updates.step

    def read_back(inputs):
        stats = updates(inputs)
        stats["d_loss"].item()
        return stats

    trainer.updates.step = read_back
    with contextlib.redirect_stdout(io.StringIO()) as out:
        losses = losses_of(trainer, steps)
    return eager, losses, out.getvalue()


@pytest.mark.parametrize("precision", ["fp32", *LOWER])
@pytest.mark.parametrize("options", [
    {}, dict(n_critic=2), dict(adv_loss="wgan-gp"), dict(lr_schedule="linear", total_step=30, hflip=True), PAPER,
    PAPER | dict(adv_loss="wgan-gp", conditional=True), dict(augment="color,translation,cutout"),
    # narrow slices of the projections, which are not aligned as the attention kernel needs
    *(model | dict(g_conv_dim=width, d_conv_dim=width) for model in ({}, PAPER) for width in (8, 24, 40)),
])  # fmt: skip
def test_the_captured_step_equals_the_eager_one(make_trainer, precision, options):
    """Bit for bit: without deterministic kernels any two runs diverge after some steps."""
    options = EXACT | options | dict(precision=precision)
    eager, graph = (losses_of(make_trainer(**options, cuda_graph=graph), 20) for graph in ("false", "true"))
    assert graph == eager and all(math.isfinite(value) for step in graph for value in step.values())


@pytest.mark.slow
def test_a_failed_capture_says_why_and_continues_eagerly(make_config):
    """In a process of its own: some errors end all use of CUDA in theirs."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        eager, losses, out = pool.submit(losses_and_output_of_a_failed_capture, make_config(**EXACT), 6).result()
    assert re.fullmatch("CUDA graph disabled.*not permitted when stream is capturing.*\n", out) and losses == eager


def test_work_in_the_background_may_overlap_a_capture(make_trainer):
    """Grids are drawn all the time; the capture does not end before two of them are finished."""
    expected = losses_of(make_trainer(**EXACT, cuda_graph="false"), 6)
    trainer = make_trainer(**EXACT, cuda_graph="true")
    (images, _), updates = trainer.loader.batch(0), trainer.updates.step
    drawn, stop, overlapped = threading.Event(), threading.Event(), []

    def draw():
        while not stop.is_set():
            sample_grid(images)
            drawn.set()

    def wait_for_grids(inputs):
        stats = updates(inputs)
        if torch.cuda.is_current_stream_capturing():
            for _ in range(2):  # the first may have been begun before
                drawn.clear()
                overlapped.append(drawn.wait(60))
        return stats

    trainer.updates.step = wait_for_grids
    with Background(trainer.device) as background:
        background.submit(draw)
        try:
            losses = losses_of(trainer, 6)
        finally:
            stop.set()
    assert losses == expected and overlapped == [True, True]


def test_a_checkpoint_is_the_state_of_its_step_and_does_not_wait_for_later_ones(make_trainer):
    """The state is copied after half a second of other work on the GPU, and before two seconds and two steps."""
    trainer = make_trainer(**REAL, cuda_graph="true")
    losses_of(trainer, 5)
    state, saved = trainer.state.state_dict(), []
    expected = [tensor.cpu() for tensor in tensors_of(state)]
    with Background(trainer.device) as background:
        torch.cuda._sleep(BUSY)
        background.submit(lambda copied: saved.extend(map(torch.Tensor.cpu, tensors_of(copied))), copy.deepcopy(state))
        torch.cuda._sleep(4 * BUSY)
        later = torch.cuda.current_stream().record_event()
        for _ in range(2):
            trainer.train_step()
    assert not later.query()
    assert len(expected) > 100 and all(map(torch.equal, saved, expected)) and len(saved) == len(expected)
    assert any(not torch.equal(now.cpu(), tensor) for now, tensor in zip(tensors_of(state), expected, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), pytest.param(torch.bfloat16, 3e-2, marks=OLD)])
@pytest.mark.parametrize("n, m, d, c", [
    (1024, 1024, 8, 64), (256, 256, 16, 128), (64, 64, 32, 256), (16, 16, 64, 512), (1024, 1024, 4, 32),
    (1024, 1024, 2, 16), (1024, 1024, 1, 8),  # narrow networks; with pooled keys:
    (1024, 256, 8, 32), (1024, 256, 16, 64), (1024, 256, 32, 128), (1024, 256, 2, 8), (1024, 256, 1, 4),
])  # fmt: skip
@pytest.mark.parametrize("channels_last", [True, False])
def test_fused_attention_equals_the_explicit_one(monkeypatch, channels_last, n, m, d, c, dtype, tolerance):
    """In values and gradients, relative to their norms. From capability 8.0 on, an fp32 product of the fused kernel is
    three of TF32, with sums rounded towards 0: simulated gradients differ by up to 5e-5, with one by more than 1e-3."""
    monkeypatch.setattr(attention, "FUSED", attention.FUSED[:1])  # without the fallback
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    shape = (8, n, 2 * d + c) if channels_last else (8, 2 * d + c, n)
    projected = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
    query, key, value = (projected if channels_last else projected.transpose(1, 2)).split([d, d, c], 2)
    key, value = key[:, :m], value[:, :m]
    outputs = [attention.attend(query, key, value), attention.attention_map(query, key).to(dtype) @ value]
    gradients = [torch.autograd.grad(out.float().square().sum(), projected)[0] for out in outputs]
    for fused, explicit in (outputs, gradients):
        assert (fused - explicit).float().norm() < tolerance * explicit.float().norm()


@pytest.mark.parametrize("options", [{}, PAPER])
def test_the_first_step_agrees_with_the_cpu(make_trainer, options):
    cpu, cuda = (make_trainer(**(REAL | options | dict(device=device)), precision="fp32", cuda_graph="false")
                 for device in ("cpu", "cuda"))  # fmt: skip
    (real, _), z = cpu.loader.batch(0), torch.randn(16, 128)
    # D differs in g_step: Adam's first step has the sign of each gradient, also of those that are 0 but for rounding.
    for step, inputs, tolerance in (("d_step", (real, z), 1e-4), ("g_step", (z,), 1e-3)):
        stats = getattr(cpu, step)(*inputs), getattr(cuda, step)(*(tensor.cuda() for tensor in inputs))
        expected, actual = ({name: value.item() for name, value in part.items()} for part in stats)
        assert actual == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("options", [{}, PAPER])
def test_gradients_of_the_penalty_agree_with_the_cpu(make_trainer, options):
    """Second derivatives, through explicit maps as in `Trainer.d_step`. Gamma is not 0: attention takes part."""
    torch.manual_seed(0)
    inputs = (torch.rand(16, 3, 64, 64), torch.rand(16, 3, 64, 64), torch.rand(16, 1, 1, 1))
    gradients = []
    for device in ("cpu", "cuda"):
        D = make_trainer(**(REAL | options | dict(device=device)), precision="fp32").D
        for layer in (layer for layer in D.modules() if hasattr(layer, "gamma")):
            torch.nn.init.constant_(layer.gamma, 0.5)
        on_device = (tensor.to(device) for tensor in inputs)
        gradient_penalty(lambda images, D=D: D(images, return_attention=True)[0], *on_device).backward()
        gradients.append({name: parameter.grad for name, parameter in D.named_parameters()})
    for name, expected in gradients[0].items():
        if not name.endswith("bias"):  # the penalty depends on biases through the attention maps and ReLUs only
            assert (gradients[1][name].cpu() - expected).norm() < 1e-3 * expected.norm(), name


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("options", [{}, PAPER])
def test_lower_precision_stays_near_fp32_and_resumes_from_it(make_trainer, options, precision):
    """With another memory format: fused Adam refuses moments that do not have that of their parameter."""
    options = REAL | options
    exact, lower = (losses_of(make_trainer(**options, precision=name), 1)[0] for name in ("fp32", precision))
    assert lower == pytest.approx(exact, abs=0.05)
    make_trainer(**options, total_step=2, precision="fp32").train()
    for step, changed in ((8, precision), (14, "fp32")):
        trainer = make_trainer(**options, total_step=step, precision=changed, pretrained_model="latest")
        assert trainer.train() == 0


def test_images_on_the_gpu_and_streamed_ones_give_the_cpu_s_batches_and_the_same_training(make_trainer, monkeypatch):
    """Two batches per step, and no step waits for the one before."""
    options = EXACT | dict(n_critic=2, hflip=True)
    cpu = make_trainer(**(options | dict(device="cpu")))
    trainers = [make_trainer(**options)]
    monkeypatch.setattr(data_loader, "MAX_GPU_MEMORY_FRACTION", 0)
    trainers.append(make_trainer(**options))
    assert [trainer.loader.images.is_cuda for trainer in trainers] == [True, False]
    for position in (0, 1, 2, 7, 3):
        expected, _ = cpu.loader.batch(position)
        for trainer in trainers:
            torch.testing.assert_close(trainer.loader.batch(position)[0].cpu(), expected, rtol=0, atol=1e-6)
    for trainer in trainers:
        for _ in range(12):
            trainer.train_step()
    assert_same_weights(*trainers)


@pytest.mark.parametrize("options", [{}, dict(adv_loss="wgan-gp"), PAPER])
def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, options):
    """Both parts are long enough to be captured, while images are written. The files load without a GPU."""
    options = EXACT | dict(sample_step=2, attn_step=4) | options
    whole = make_trainer(**options, version="whole", total_step=12)
    whole.train()
    for path in whole.config.model_folder.glob("*.pth"):
        assert {tensor.device.type for tensor in tensors_of(torch.load(path, weights_only=True))} == {"cpu"}
    make_trainer(**options, version="parts", total_step=6).train()
    resumed = make_trainer(**options, version="parts", total_step=12, pretrained_model="latest")
    assert resumed.step == 6 and resumed.train() == 0 and resumed.updates.graph is not None
    assert_same_weights(whole, resumed)


def test_metrics_leave_training_unchanged(make_trainer, small_extractor):
    """Before the capture, right before it, and after it."""
    options = EXACT | dict(total_step=8)
    metrics = dict(metrics="fid,kid,isc,prc", metric_step=1, metric_num=32)
    trainers = [make_trainer(**options, version="plain"), make_trainer(**options, **metrics, version="measured")]
    assert [trainer.train() for trainer in trainers] == [0, 0]
    assert_same_weights(*trainers)
    assert [math.isfinite(entry["fid"]) for entry in log(trainers[1].config.log_folder, "fid")] == [True] * 8


@pytest.mark.parametrize("fraction", [0.5, 0])
def test_evaluation_agrees_with_the_cpu(make_trainer, make_config, small_extractor, monkeypatch, fraction):
    """With the training images on the GPU, and where they do not fit there."""
    monkeypatch.setattr(data_loader, "MAX_GPU_MEMORY_FRACTION", fraction)
    monkeypatch.setattr(tester, "SUMMARY_IMAGES", 32)
    trainer = make_trainer(**REAL, total_step=2)
    assert trainer.train() == 0 and trainer.loader.images.is_cuda == (fraction > 0)
    found = []
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        config = make_config(**(REAL | dict(device=device.type)), metrics="fid,kid,isc,prc", metric_num=48)
        saved, _ = load_test_checkpoint(config, set(vars(config)))
        tested = tester.Tester(config, main.make_loader(config, device).open(), saved, device)
        assert tested.test() == 0 and (tested.folder / "nearest.png").exists()
        numbers = [json.loads((tested.folder / f"{name}.json").read_text()) for name in ("metrics", "attention")]
        pictures = [np.asarray(Image.open(tested.folder / f"{name}.png"), int) for name in ("grid", "interpolation")]
        found.append((*numbers, pictures))
    (metrics, layers, pictures), (cpu_metrics, cpu_layers, cpu_pictures) = found
    for name in ("fid", "kid", "precision", "recall"):
        assert metrics[name] == pytest.approx(cpu_metrics[name], rel=1e-2, abs=1e-3), name
    for layer, stats in layers.items():
        assert stats["distance"] == pytest.approx(cpu_layers[layer]["distance"], rel=1e-3), layer
    for picture, expected in zip(pictures, cpu_pictures, strict=True):
        assert np.abs(picture - expected).max() <= 1  # of 256 levels
