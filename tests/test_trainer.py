"""The training step: what it updates, its random numbers, its losses and learning rates."""

import copy

import pytest
import torch
from conftest import D_STATS, assert_same, assert_same_inputs, inputs_of

from sagan_models import SelfAttention


def test_each_step_updates_its_network_alone_and_computes_no_gradient_that_nobody_uses(make_trainer):
    trainer, dtypes = make_trainer(precision="bf16"), []
    for network in (trainer.G, trainer.D):
        network.last.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    G, D = ([*network.parameters()] for network in (trainer.G, trainer.D))

    def changed_by(step):
        before = copy.deepcopy((G, D))
        stats = step()
        assert {(value.ndim, value.dtype, value.requires_grad) for value in stats.values()} == {(0, torch.float, False)}
        return [not all(map(torch.equal, *pair)) for pair in zip(before, (G, D), strict=True)], set(stats)

    real, _ = trainer.loader.batch(0)
    assert changed_by(lambda: trainer.d_step(real, torch.randn(4, 16))) == ([False, True], D_STATS)
    assert all(parameter.grad is None for parameter in G)
    before = [parameter.grad.clone() for parameter in D]
    assert changed_by(lambda: trainer.g_step(torch.randn(4, 16))) == ([True, False], {"g_loss"})
    assert_same([parameter.grad for parameter in D], before)
    assert all(parameter.requires_grad for parameter in D) and dtypes == [torch.bfloat16] * 5


@pytest.mark.parametrize("g_lr, d_lr, betas", [(1e-4, 4e-4, (0.0, 0.9)), (3e-3, 1e-3, (0.5, 0.999))])
def test_the_step_equals_a_textbook_step(make_trainer, g_lr, d_lr, betas):
    """Two steps: the first update of Adam is the same for any betas."""
    ours, plain = (make_trainer(g_lr=g_lr, d_lr=d_lr, beta1=betas[0], beta2=betas[1]) for _ in range(2))
    for trainer in (ours, plain):  # logits of real images below 0, of others above
        trainer.D.last[0].bias.data += 0.08
    d_optimizer = torch.optim.Adam(plain.D.parameters(), d_lr, betas)
    g_optimizer = torch.optim.Adam(plain.G.parameters(), g_lr, betas)
    for real in (ours.loader.batch(0)[0], ours.loader.batch(1)[0]):
        z, z2 = torch.randn(2, 4, 16)
        stats = ours.d_step(real, z) | ours.g_step(z2)

        on_real, on_fake = plain.D(real), plain.D(plain.G(z).detach())
        losses = {"d_loss_real": torch.relu(1 - on_real).mean(), "d_loss_fake": torch.relu(1 + on_fake).mean()}
        expected = losses | {"d_fake": on_fake.mean(), "d_sign": on_real.sign().mean()}
        d_optimizer.zero_grad()
        sum(losses.values()).backward()
        d_optimizer.step()
        expected["g_loss"] = -plain.D(plain.G(z2)).mean()
        g_optimizer.zero_grad()
        expected["g_loss"].backward()
        g_optimizer.step()
        for name, loss in expected.items():
            assert stats[name].item() == pytest.approx(loss.item(), rel=1e-4)
    without_gradient = ("module.bias", "key_conv.bias")  # rounding errors, which Adam amplifies
    for name in ("G", "D"):
        for key, value in getattr(ours, name).named_parameters():
            if not (key.endswith(without_gradient) or value.numel() == 1):
                torch.testing.assert_close(value, getattr(plain, name).get_parameter(key), rtol=1e-3, atol=2e-5)


def test_a_resumed_run_has_the_rates_and_betas_of_its_options(make_trainer):
    make_trainer().train()
    options = dict(g_lr=1e-3, d_lr=2e-3, beta1=0.5, beta2=0.999)
    trainer = make_trainer(**options, pretrained_model="latest", total_step=4)
    groups = [optimizer.param_groups[0] for optimizer in (trainer.g_optimizer, trainer.d_optimizer)]
    assert [(group["lr"], group["betas"]) for group in groups] == [(1e-3, (0.5, 0.999)), (2e-3, (0.5, 0.999))]


def test_contiguous_networks_and_batches_compute_the_same(make_trainer, monkeypatch):
    """As on MPS, and on CUDA in fp32; up to rounding."""
    stats = make_trainer().train_step()
    monkeypatch.setattr("utils.conv_memory_format", lambda device, precision: torch.contiguous_format)
    trainer = make_trainer()
    tensors = [*trainer.G.parameters(), *trainer.D.parameters(), *trainer.ema.network.parameters()]
    tensors += [trainer.loader.batch(0)[0], *(sample.images for sample in trainer.previews.attention())]
    assert all(tensor.is_contiguous() for tensor in tensors)
    torch.testing.assert_close(trainer.train_step(), stats, rtol=1e-4, atol=1e-6)


def test_every_image_that_d_sees_is_augmented(make_trainer, monkeypatch):
    """Real, generated, and those of the penalty; with G's gradients through it."""
    trainer, seen, given = make_trainer(augment="color,cutout", adv_loss="wgan-gp"), [], []
    halve = lambda *arguments: seen.append(arguments) or arguments[0] * 0.5  # noqa: E731
    monkeypatch.setattr("trainer.augment", halve)
    trainer.D.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    real, z, noise = trainer.loader.batch(0)[0], torch.randn(4, 16), torch.rand(4, 2, 7)
    trainer.d_step(real, z, alpha=torch.ones(4, 1, 1, 1), aug_noise=noise)
    (shown, first_noise, policy), (fake, second_noise, _) = seen
    assert policy == ["color", "cutout"]
    assert_same([shown, first_noise, second_noise], [real, noise[:, 0], noise[:, 1]])
    assert_same(given[:2], [real * 0.5, fake * 0.5])
    torch.testing.assert_close(given[2], given[0])  # the penalty's, here at the real images
    trainer.g_step(z, aug_noise=noise[:, 0])
    assert torch.equal(given[3], seen[2][0] * 0.5) and seen[2][0].requires_grad


def test_augmentation_is_drawn_last_for_each_update(make_trainer):
    """Without it, all other numbers are the same; images change, and differ from each other."""
    plain, augmented = (inputs_of(make_trainer(augment=name, n_critic=2), 2) for name in ("none", "color,cutout"))
    for without, having in zip(plain, augmented, strict=True):
        assert_same_inputs(without, having)
        assert not any("aug_noise" in given for given in without)
        assert [given["aug_noise"].shape for given in having] == [(4, 2, 7), (4, 2, 7), (4, 7)]
    numbers = torch.cat([given["aug_noise"].flatten() for step in augmented for given in step])
    assert len(numbers.unique()) == len(numbers) and numbers.min() >= 0 and numbers.max() < 1


@pytest.mark.parametrize("adv_loss", ["hinge", "wgan-gp"])
def test_adv_loss_chooses_the_losses(make_trainer, adv_loss):
    trainer = make_trainer(adv_loss=adv_loss, total_step=4, lambda_gp=5.0)
    torch.nn.init.constant_(trainer.D.last[0].bias, 5.0)  # beyond hinge's margin
    for layer in trainer.D.modules():
        if isinstance(layer, SelfAttention):
            torch.nn.init.constant_(layer.gamma, 0.5)
    stats = trainer.d_step(trainer.loader.batch(0)[0], torch.randn(4, 16), alpha=torch.rand(4, 1, 1, 1))
    stats = {name: value.item() for name, value in stats.items()}
    assert stats["d_loss_real"] == pytest.approx(-stats["d_real"] if adv_loss == "wgan-gp" else 0, abs=1e-6)
    assert ("d_penalty" in stats) == (adv_loss == "wgan-gp") == ("d_sign" not in stats)
    total = stats["d_loss_real"] + stats["d_loss_fake"] + 5 * stats.get("d_penalty", 0)
    assert stats["d_loss"] == pytest.approx(total, rel=1e-5)
    assert trainer.train() == 0  # it checks that all weights are finite


def test_the_first_step_of_the_ema(make_trainer):
    """Its decay is ramped up from 0.1."""
    trainer = make_trainer(g_lr=0.1)
    before = [parameter.detach().clone() for parameter in trainer.G.parameters()]
    trainer.train_step()
    for old, new, ema in zip(before, trainer.G.parameters(), trainer.ema.network.parameters(), strict=True):
        torch.testing.assert_close(ema, 0.1 * old + 0.9 * new)


def test_images_and_latents_depend_on_the_seed_and_nothing_else(make_trainer):
    """Weights are drawn from torch's global generator, which `main.py` seeds and this test sets apart."""
    runs = []
    for seed in (1, 1, 2):
        trainer = make_trainer(seed=seed)
        torch.manual_seed(0)
        torch.randn(len(runs))  # the global generator must not matter
        of_D, of_G = inputs_of(trainer, 1)[0]
        runs.append((trainer.state.fixed_z, of_D["real"], of_D["z"], of_G["z"]))
    for first, again, other in zip(*runs, strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_each_update_takes_a_fresh_batch_z_and_coefficients(make_trainer):
    """Those of the penalty are uniform."""
    trainer = make_trainer(n_critic=3, adv_loss="wgan-gp")
    steps = inputs_of(trainer, 60)
    of_D = [given for *of_D, _ in steps for given in of_D]
    assert_same([given["real"] for given in of_D], [trainer.loader.batch(index)[0] for index in range(180)])
    assert len({given["z"].numpy().tobytes() for step in steps for given in step}) == 240
    alpha = torch.stack([given["alpha"] for given in of_D])
    assert alpha.shape == (180, 4, 1, 1, 1) and len(alpha.flatten().unique()) == alpha.numel()
    assert 0 <= alpha.min() < 0.01 and 0.99 < alpha.max() < 1 and abs(alpha.mean() - 0.5) < 0.05


@pytest.mark.parametrize("schedule, n_critic, expected", [
    ("linear", 1, [1, 0.9, 0.8, 0.7, 0.1]), ("exponential", 1, [1, 1, 1, 1, 0.5]),
    ("exponential", 2, [1, 1, 1, 0.5, 0.5**3])])  # fmt: skip
def test_learning_rate_schedules(make_trainer, schedule, n_critic, expected):
    """20 images and batch size 4 make an epoch of 5 batches, of which a step uses n_critic."""
    trainer = make_trainer(lr_schedule=schedule, lr_decay=0.5, n_critic=n_critic, total_step=10)
    rates = []
    while trainer.step < 10:
        trainer.train_step()
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in (trainer.g_optimizer, trainer.d_optimizer)])
    assert [rates[step] for step in (0, 1, 2, 3, 9)] == [pytest.approx([1e-4 * f, 4e-4 * f]) for f in expected]
