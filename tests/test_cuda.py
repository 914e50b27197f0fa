"""What only a GPU can show. Skipped without one; `make bench-gpu` runs it with one."""

import os

import pytest
import torch

from networks.attention import attend, attention_map

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic runs; torch looks at it once
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
REAL = dict(device="cuda", imsize=64, z_dim=128, g_conv_dim=64, d_conv_dim=64, batch_size=16, toy_num=64)


def losses_of(trainer, steps):
    lines = []
    for trainer.step in range(steps):
        lines.append({name: value.item() for name, value in trainer._take_step().items()})
    return lines


@pytest.fixture
def deterministic():
    """The option; torch's switch for it is taken back afterwards."""
    yield dict(deterministic=True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("options", [{}, dict(n_critic=2), dict(lr_schedule="linear", total_step=30, hflip=True)])
def test_the_recorded_step_takes_the_eager_one_s_steps(make_trainer, deterministic, precision, options):
    """To the bit: with kernels that add up in any order two runs part ways after some steps, whatever runs them."""
    options = REAL | deterministic | options | dict(precision=precision)
    eager = losses_of(make_trainer(**options, cuda_graph="false"), 20)
    graph = losses_of(make_trainer(**options, cuda_graph="true"), 20)
    assert graph == eager


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("n, d, c", [(1024, 8, 64), (256, 16, 128), (64, 32, 256), (16, 64, 512), (1024, 4, 32)])
def test_fused_attention_is_the_plain_one(n, d, c, dtype, tolerance):
    """In values and gradients, relative to their norms; the last case is that of --g_conv_dim 32."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    packed = torch.randn(8, n, 2 * d + c, device="cuda", dtype=dtype, requires_grad=True)
    query, key, value = packed.split([d, d, c], 2)
    outputs = [attend(query, key, value), attention_map(query, key).to(dtype) @ value]
    gradients = [torch.autograd.grad(out.float().square().sum(), packed)[0] for out in outputs]
    for fused, plain in (outputs, gradients):
        assert (fused - plain).float().norm() < tolerance * plain.float().norm()


def test_first_step_agrees_with_the_cpu(make_trainer):
    cpu = losses_of(make_trainer(**(REAL | {"device": "cpu"})), 1)[0]
    trainer = make_trainer(**REAL, precision="fp32", cuda_graph="false")
    reference = make_trainer(**(REAL | {"device": "cpu"}))
    reference.step = 0
    real, z = reference.loader.batch(0), torch.randn(16, 128)
    expected, actual = reference.d_step(real, z), trainer.d_step(real.cuda(), z.cuda())
    assert cpu.keys() >= expected.keys()
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
def test_a_whole_run_and_its_continuation(make_trainer, options):
    """Both are long enough to be recorded, while pictures are being written."""
    make_trainer(**REAL, total_step=6, sample_step=2, attn_step=4, **options).train()
    continued = make_trainer(**REAL, total_step=12, sample_step=2, pretrained_model="latest", **options)
    assert continued.step == 6
    assert continued.train() == 0
    assert (continued.config.sample_folder / "12_ema.png").exists()
