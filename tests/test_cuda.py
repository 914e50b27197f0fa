"""What only a GPU can show. Skipped without one; `make bench-gpu` runs it with one."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
REAL = dict(device="cuda", imsize=64, z_dim=128, g_conv_dim=64, d_conv_dim=64, batch_size=16, toy_num=64)


def losses_of(trainer, steps):
    lines = []
    for trainer.step in range(steps):
        lines.append({name: value.item() for name, value in trainer._take_step().items()})
    return lines


@pytest.mark.parametrize("options", [{}, dict(n_critic=2), dict(lr_schedule="linear", total_step=30, hflip=True)])
def test_the_recorded_step_takes_the_eager_one_s_steps(make_trainer, options):
    eager = losses_of(make_trainer(**REAL, precision="fp32", cuda_graph="false", **options), 20)
    graph = losses_of(make_trainer(**REAL, precision="fp32", cuda_graph="true", **options), 20)
    for step, (expected, actual) in enumerate(zip(eager, graph, strict=True)):
        for name, value in expected.items():
            # Kernels add up in any order: what differs in the last bit grows with the steps.
            assert actual[name] == pytest.approx(value, rel=1e-4 * (1 + step), abs=1e-4 * (1 + step)), (step, name)


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
    monkeypatch.setattr(data_loader, "DEVICE_SHARE", 0)
    streamed = make_trainer(**REAL, hflip=True)
    assert not streamed.loader.images.is_cuda
    for position in (0, 1, 2, 7, 3):
        expected = cpu.loader.batch(position)
        for trainer in (on_gpu, streamed):
            torch.testing.assert_close(trainer.loader.batch(position).cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, dict(adv_loss="wgan-gp")])
def test_a_whole_run_and_its_continuation(make_trainer, options):
    make_trainer(**REAL, total_step=6, sample_step=2, attn_step=4, **options).train()
    continued = make_trainer(**REAL, total_step=9, pretrained_model="latest", **options)
    assert continued.step == 6
    assert continued.train() == 0
    assert (continued.config.sample_folder / "9_ema.png").exists()
