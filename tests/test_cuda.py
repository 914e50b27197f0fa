"""Tests on an NVIDIA GPU; skipped without one. `make bench-gpu` runs them first."""

import contextlib
import copy
import io
import json
import math
import os
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
from networks.attention import attend, attention_map
from networks.losses import gradient_penalty
from training.background import Background
from training.resuming import load_test_checkpoint
from visuals.figures import sample_grid

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic runs; torch looks at it once
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
REAL = dict(device="cuda", imsize=64, z_dim=128, g_conv_dim=64, d_conv_dim=64, batch_size=16, toy_num=64)
PAPER = dict(model="paper", g_conv_dim=16, d_conv_dim=16)
BUSY = 2**30  # clock cycles, about half a second


def tensors_of(state):
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def losses_of(trainer, steps):
    return [{name: value.item() for name, value in trainer.train_step().items()} for _ in range(steps)]


def penalty_gradients(D, *inputs):
    """Through explicit attention maps, as in `Trainer.d_step`."""
    gradient_penalty(lambda images: D(images, return_attention=True)[0], *inputs).backward()
    return {name: parameter.grad for name, parameter in D.named_parameters()}


def run_in_a_process(function, *arguments):
    """Return a function's result from a process of its own: some errors end all use of CUDA in theirs."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def losses_of_runs(configs, steps):
    return [losses_of(build_trainer(config), steps) for config in configs]


def losses_and_output_of_a_failed_capture(config, steps):
    """Those of a run whose updates read a value back, which cannot be captured."""
    trainer = build_trainer(config)
    updates = trainer.updates.step

    def read_back(inputs):
        stats = updates(inputs)
        stats["d_loss"].item()
        return stats

    trainer.updates.step = read_back
    with contextlib.redirect_stdout(io.StringIO()) as out:
        losses = losses_of(trainer, steps)
    return losses, out.getvalue()


@pytest.fixture
def deterministic():
    """The option; torch's switch is reset afterwards."""
    yield dict(deterministic=True)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["fp32", "tf32", "bf16"])
def precision(request):
    if request.param != "fp32" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    return request.param


@pytest.mark.parametrize("options", [{}, dict(n_critic=2), dict(adv_loss="wgan-gp"),
                                     dict(lr_schedule="linear", total_step=30, hflip=True),
                                     PAPER, PAPER | dict(adv_loss="wgan-gp", conditional=True),
                                     dict(augment="color,translation,cutout")])  # fmt: skip
def test_the_captured_step_equals_the_eager_one(make_trainer, deterministic, precision, options):
    """Bit for bit: without deterministic kernels any two runs diverge after some steps."""
    options = REAL | deterministic | options | dict(precision=precision)
    eager = losses_of(make_trainer(**options, cuda_graph="false"), 20)
    graph = losses_of(make_trainer(**options, cuda_graph="true"), 20)
    assert graph == eager


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sagan", "paper"])
def test_other_widths_take_captured_steps(make_config, precision, model):
    """Narrow slices of the projections are not aligned as the attention kernel needs."""
    configs = [
        make_config(**(REAL | dict(model=model, g_conv_dim=width, d_conv_dim=width)), precision=precision,
                    cuda_graph=graph, deterministic=True)
        for graph in ("true", "false") for width in (8, 24, 40)
    ]  # fmt: skip
    losses = run_in_a_process(losses_of_runs, configs, 5)
    assert losses[:3] == losses[3:]
    assert all(math.isfinite(value) for run in losses for step in run for value in step.values())


@pytest.mark.slow
def test_a_failed_capture_says_why_and_continues_eagerly(make_config):
    options = REAL | dict(deterministic=True)
    losses, out = run_in_a_process(losses_and_output_of_a_failed_capture, make_config(**options), 6)
    (line,) = out.splitlines()
    assert line.startswith("CUDA graph disabled") and "not permitted when stream is capturing" in line
    assert [losses] == run_in_a_process(losses_of_runs, [make_config(**options, cuda_graph="false")], 6)


def test_work_in_the_background_may_overlap_a_capture(make_trainer, deterministic):
    """Grids are drawn all the time; the capture does not end before two of them are finished."""
    options = REAL | deterministic
    expected = losses_of(make_trainer(**options, cuda_graph="false"), 6)
    trainer = make_trainer(**options, cuda_graph="true")
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
    assert losses == expected
    assert overlapped == [True, True]


def test_a_checkpoint_loads_on_a_machine_without_a_gpu(make_trainer):
    trainer = make_trainer(**REAL, total_step=1)
    trainer.train()
    for path in trainer.config.model_folder.glob("*.pth"):
        content = torch.load(path, weights_only=True)  # to the devices in the file
        assert {tensor.device.type for tensor in tensors_of(content)} == {"cpu"}


def test_a_checkpoint_is_the_state_of_its_step_and_does_not_wait_for_later_ones(make_trainer):
    """The state is copied after half a second of other work on the GPU, and before two seconds and two steps."""
    trainer = make_trainer(**REAL, cuda_graph="true")
    losses_of(trainer, 5)
    state, saved = trainer.state.state_dict(), []
    expected = [tensor.cpu() for tensor in tensors_of(state)]

    def save(copied):
        saved.extend(tensor.cpu() for tensor in tensors_of(copied))

    with Background(trainer.device) as background:
        torch.cuda._sleep(BUSY)
        background.submit(save, copy.deepcopy(state))
        torch.cuda._sleep(4 * BUSY)
        later = torch.cuda.current_stream().record_event()
        for _ in range(2):
            trainer.train_step()
    assert not later.query()
    assert len(saved) == len(expected) > 100
    assert all(torch.equal(copied, tensor) for copied, tensor in zip(saved, expected, strict=True))
    assert any(not torch.equal(now.cpu(), tensor) for now, tensor in zip(tensors_of(state), expected, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("n, m, d, c", [(1024, 1024, 8, 64), (256, 256, 16, 128), (64, 64, 32, 256), (16, 16, 64, 512),
                                        (1024, 1024, 4, 32), (1024, 1024, 2, 16), (1024, 1024, 1, 8),
                                        (1024, 256, 8, 32), (1024, 256, 16, 64), (1024, 256, 32, 128),
                                        (1024, 256, 2, 8), (1024, 256, 1, 4)])  # fmt: skip
@pytest.mark.parametrize("channels_last", [True, False])
def test_fused_attention_equals_the_explicit_one(monkeypatch, channels_last, n, m, d, c, dtype, tolerance):
    """In values and gradients, relative to their norms; three of narrow networks, five of pooled keys."""
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    monkeypatch.setattr(attention, "FUSED", attention.FUSED[:1])  # without the fallback
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    shape = (8, n, 2 * d + c) if channels_last else (8, 2 * d + c, n)
    projected = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
    query, key, value = (projected if channels_last else projected.transpose(1, 2)).split([d, d, c], 2)
    key, value = key[:, :m], value[:, :m]
    outputs = [attend(query, key, value), attention_map(query, key).to(dtype) @ value]
    gradients = [torch.autograd.grad(out.float().square().sum(), projected)[0] for out in outputs]
    for fused, explicit in (outputs, gradients):
        assert (fused - explicit).float().norm() < tolerance * explicit.float().norm()


@pytest.mark.parametrize("options", [{}, PAPER])
def test_the_first_step_agrees_with_the_cpu(make_trainer, options):
    options = REAL | options
    cpu = make_trainer(**(options | {"device": "cpu"}))
    cuda = make_trainer(**options, precision="fp32", cuda_graph="false")
    (real, _), z = cpu.loader.batch(0), torch.randn(16, 128)
    for step, inputs in (("d_step", (real, z)), ("g_step", (z,))):
        expected = getattr(cpu, step)(*inputs)
        actual = getattr(cuda, step)(*(tensor.cuda() for tensor in inputs))
        for name, value in expected.items():
            assert actual[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("options", [{}, PAPER])
def test_gradients_of_the_penalty_agree_with_the_cpu(make_trainer, options):
    """They are second derivatives; gamma is not 0, so that attention takes part."""
    torch.manual_seed(0)
    inputs = (torch.rand(16, 3, 64, 64), torch.rand(16, 3, 64, 64), torch.rand(16, 1, 1, 1))
    gradients = []
    for device in ("cpu", "cuda"):
        trainer = make_trainer(**(REAL | options | dict(device=device)), precision="fp32")
        for name, parameter in trainer.D.named_parameters():
            if "gamma" in name:
                torch.nn.init.constant_(parameter, 0.5)
        gradients.append(penalty_gradients(trainer.D, *(tensor.to(trainer.device) for tensor in inputs)))
    cpu, cuda = gradients
    for name, expected in cpu.items():
        if not name.endswith("bias"):  # the penalty depends on biases through the attention maps and ReLUs only
            assert (cuda[name].cpu() - expected).norm() < 1e-3 * expected.norm(), name


@pytest.mark.parametrize("precision", ["tf32", "bf16"], indirect=True)
@pytest.mark.parametrize("options", [{}, PAPER])
def test_lower_precision_stays_near_fp32(make_trainer, options, precision):
    options = REAL | options
    exact = losses_of(make_trainer(**options, precision="fp32"), 1)[0]
    lower = losses_of(make_trainer(**options, precision=precision), 1)[0]
    for name, value in exact.items():
        assert lower[name] == pytest.approx(value, abs=0.05), name


@pytest.mark.parametrize("precision", ["tf32", "bf16"], indirect=True)
@pytest.mark.parametrize("options", [{}, PAPER])
def test_a_run_resumes_in_another_precision(make_trainer, options, precision):
    """With another memory format: fused Adam refuses moments that do not have that of their parameter."""
    options = REAL | options
    make_trainer(**options, total_step=2, precision="fp32").train()
    for step, changed in ((8, precision), (14, "fp32")):
        trainer = make_trainer(**options, total_step=step, precision=changed, pretrained_model="latest")
        assert trainer.train() == 0


def test_images_live_on_the_gpu_and_batches_are_the_cpu_s(make_trainer, monkeypatch):
    cpu = make_trainer(**(REAL | {"device": "cpu"}), hflip=True)
    on_gpu = make_trainer(**REAL, hflip=True)
    assert on_gpu.loader.images.is_cuda
    monkeypatch.setattr(data_loader, "MAX_GPU_MEMORY_FRACTION", 0)
    streamed = make_trainer(**REAL, hflip=True)
    assert not streamed.loader.images.is_cuda
    for position in (0, 1, 2, 7, 3):
        expected, _ = cpu.loader.batch(position)
        for trainer in (on_gpu, streamed):
            torch.testing.assert_close(trainer.loader.batch(position)[0].cpu(), expected, rtol=0, atol=1e-6)


def test_streamed_images_train_as_resident_ones_do(make_trainer, deterministic, monkeypatch):
    """Two batches per step, and no step waits for the one before."""
    options = REAL | deterministic | dict(n_critic=2, hflip=True)
    trainers = [make_trainer(**options)]
    monkeypatch.setattr(data_loader, "MAX_GPU_MEMORY_FRACTION", 0)
    trainers.append(make_trainer(**options))
    assert [trainer.loader.images.is_cuda for trainer in trainers] == [True, False]
    for trainer in trainers:
        for _ in range(12):
            trainer.train_step()
    assert_same_weights(*trainers)


@pytest.mark.parametrize("options", [{}, dict(adv_loss="wgan-gp"), PAPER])
def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, deterministic, options):
    """Both parts are long enough to be captured, while images are written."""
    options = REAL | deterministic | dict(sample_step=2, attn_step=4) | options
    whole = make_trainer(**options, version="whole", total_step=12)
    whole.train()
    make_trainer(**options, version="parts", total_step=6).train()
    resumed = make_trainer(**options, version="parts", total_step=12, pretrained_model="latest")
    assert resumed.step == 6
    assert resumed.train() == 0
    assert resumed.updates.graph is not None
    assert_same_weights(whole, resumed)


def test_metrics_leave_training_unchanged(make_trainer, deterministic, small_extractor):
    """Before the capture, right before it, and after it."""
    options = REAL | deterministic | dict(total_step=8)
    metrics = dict(metrics="fid,kid,isc,prc", metric_step=1, metric_num=32)
    trainers = [make_trainer(**options, version="plain"), make_trainer(**options, **metrics, version="measured")]
    for trainer in trainers:
        assert trainer.train() == 0
    assert_same_weights(*trainers)
    entries = log(trainers[1].config.log_folder, "fid")
    assert len(entries) == 8 and all(math.isfinite(entry["fid"]) for entry in entries)


@pytest.mark.parametrize("fraction", [0.5, 0])
def test_evaluation_agrees_with_the_cpu(make_trainer, make_config, small_extractor, monkeypatch, fraction):
    """With the training images on the GPU, and where they do not fit there."""
    monkeypatch.setattr(data_loader, "MAX_GPU_MEMORY_FRACTION", fraction)
    monkeypatch.setattr(tester, "SUMMARY_IMAGES", 32)
    trainer = make_trainer(**REAL, total_step=2)
    trainer.train()
    assert trainer.loader.images.is_cuda == (fraction > 0)
    found = []
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        config = make_config(**(REAL | dict(device=device.type)), metrics="fid,kid,isc,prc", metric_num=48)
        saved, _ = load_test_checkpoint(config, set(vars(config)))
        tested = tester.Tester(config, main.make_loader(config, device).open(), saved, device)
        assert tested.test() == 0
        numbers = [json.loads((tested.folder / f"{name}.json").read_text()) for name in ("metrics", "attention")]
        pictures = [np.asarray(Image.open(tested.folder / f"{name}.png"), int) for name in ("grid", "interpolation")]
        assert (tested.folder / "nearest.png").exists()
        found.append((numbers, pictures))
    (((metrics, layers), pictures), ((cpu_metrics, cpu_layers), cpu_pictures)) = found
    for name in ("fid", "kid", "precision", "recall"):
        assert metrics[name] == pytest.approx(cpu_metrics[name], rel=1e-2, abs=1e-3), name
    for layer, stats in layers.items():
        assert stats["distance"] == pytest.approx(cpu_layers[layer]["distance"], rel=1e-3), layer
    for picture, expected in zip(pictures, cpu_pictures, strict=True):
        assert np.abs(picture - expected).max() <= 1  # of 256 levels
