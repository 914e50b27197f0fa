"""Tests on an NVIDIA GPU; skipped without one. `make bench-gpu` runs them first."""

import os

import pytest
import torch

from networks.attention import attend, attention_map

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic runs; torch looks at it once
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
REAL = dict(device="cuda", imsize=64, z_dim=128, g_conv_dim=64, d_conv_dim=64, batch_size=16, toy_num=64)


def losses_of(trainer, steps):
    return [{name: value.item() for name, value in trainer.train_step().items()} for _ in range(steps)]


@pytest.fixture
def deterministic():
    """The option; torch's switch is reset afterwards."""
    yield dict(deterministic=True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("options", [{}, dict(n_critic=2), dict(adv_loss="wgan-gp"),
                                     dict(lr_schedule="linear", total_step=30, hflip=True)])  # fmt: skip
def test_the_captured_step_equals_the_eager_one(make_trainer, deterministic, precision, options):
    """Bit for bit: without deterministic kernels any two runs diverge after some steps."""
    options = REAL | deterministic | options | dict(precision=precision)
    eager = losses_of(make_trainer(**options, cuda_graph="false"), 20)
    graph = losses_of(make_trainer(**options, cuda_graph="true"), 20)
    assert graph == eager


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("n, d, c", [(1024, 8, 64), (256, 16, 128), (64, 32, 256), (16, 64, 512),
                                     (1024, 4, 32), (1024, 2, 16), (1024, 1, 8)])  # fmt: skip
def test_fused_attention_equals_the_explicit_one(n, d, c, dtype, tolerance):
    """In values and gradients, relative to their norms; the last three are of --g_conv_dim 32, 16 and 8."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    packed = torch.randn(8, n, 2 * d + c, device="cuda", dtype=dtype, requires_grad=True)
    query, key, value = packed.split([d, d, c], 2)
    outputs = [attend(query, key, value), attention_map(query, key).to(dtype) @ value]
    gradients = [torch.autograd.grad(out.float().square().sum(), packed)[0] for out in outputs]
    for fused, explicit in (outputs, gradients):
        assert (fused - explicit).float().norm() < tolerance * explicit.float().norm()


def test_the_first_step_agrees_with_the_cpu(make_trainer):
    cpu = make_trainer(**(REAL | {"device": "cpu"}))
    cuda = make_trainer(**REAL, precision="fp32", cuda_graph="false")
    real, z = cpu.loader.batch(0), torch.randn(16, 128)
    for step, inputs in (("d_step", (real, z)), ("g_step", (z,))):
        expected = getattr(cpu, step)(*inputs)
        actual = getattr(cuda, step)(*(tensor.cuda() for tensor in inputs))
        for name, value in expected.items():
            assert actual[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precision_stays_near_fp32(make_trainer, precision):
    exact = losses_of(make_trainer(**REAL, precision="fp32"), 1)[0]
    lower = losses_of(make_trainer(**REAL, precision=precision), 1)[0]
    for name, value in exact.items():
        assert lower[name] == pytest.approx(value, abs=0.05), name


def test_images_live_on_the_gpu_and_batches_are_the_cpu_s(make_trainer, monkeypatch):
    import data_loader

    cpu = make_trainer(**(REAL | {"device": "cpu"}), hflip=True)
    on_gpu = make_trainer(**REAL, hflip=True)
    assert on_gpu.loader.images.is_cuda
    monkeypatch.setattr(data_loader, "MAX_GPU_MEMORY_FRACTION", 0)
    streamed = make_trainer(**REAL, hflip=True)
    assert not streamed.loader.images.is_cuda
    for position in (0, 1, 2, 7, 3):
        expected = cpu.loader.batch(position)
        for trainer in (on_gpu, streamed):
            torch.testing.assert_close(trainer.loader.batch(position).cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, dict(adv_loss="wgan-gp")])
def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, deterministic, options):
    """Both parts are long enough to be captured, while images are written."""
    options = REAL | deterministic | dict(sample_step=2, attn_step=4) | options
    whole = make_trainer(**options, version="whole", total_step=12)
    whole.train()
    make_trainer(**options, version="parts", total_step=6).train()
    resumed = make_trainer(**options, version="parts", total_step=12, pretrained_model="latest")
    assert resumed.step == 6
    assert resumed.train() == 0
    for first, second in ((whole.G, resumed.G), (whole.D, resumed.D), (whole.ema.network, resumed.ema.network)):
        for key, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[key]), key


def test_evaluation_with_images_that_do_not_fit_on_the_gpu(make_trainer, monkeypatch):
    import data_loader
    from tester import Tester

    monkeypatch.setattr(data_loader, "MAX_GPU_MEMORY_FRACTION", 0)
    trainer = make_trainer(**REAL, total_step=2)
    trainer.train()
    assert not trainer.loader.images.is_cuda
    assert Tester(trainer.config, trainer.loader).test() == 0
