import pytest
import torch

from networks.losses import g_loss, gradient_penalty, hinge_d_loss, wasserstein_d_loss
from sagan_models import Discriminator

REAL, FAKE = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 0.5])


def test_hinge():
    real, fake = hinge_d_loss(REAL, FAKE)
    assert real.item() == pytest.approx((0 + 0.5 + 2) / 3)
    assert fake.item() == pytest.approx((0 + 1 + 1.5) / 3)


def test_wasserstein():
    real, fake = wasserstein_d_loss(REAL, FAKE)
    assert real.item() == pytest.approx(-0.5)
    assert fake.item() == pytest.approx(-0.5)


def test_generator_loss():
    assert g_loss(FAKE).item() == pytest.approx(0.5)


@pytest.mark.parametrize("slope, expected", [(1.0, 0.0), (3.0, 4.0)])
def test_penalty_of_a_linear_critic_is_known(slope, expected):
    direction = torch.randn(3, 8, 8)
    direction *= slope / direction.norm()
    real, fake = torch.randn(2, 4, 3, 8, 8)
    penalty = gradient_penalty(lambda x: (x * direction).sum((1, 2, 3)), real, fake, torch.rand(4, 1, 1, 1))
    assert penalty.item() == pytest.approx(expected, abs=1e-5)


def test_penalty_is_taken_between_real_and_fake():
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.square().sum((1, 2, 3))

    real, fake = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    gradient_penalty(critic, real, fake, torch.tensor([0.25, 1.0]).view(2, 1, 1, 1))
    assert torch.equal(seen[0][:, 0, 0, 0], torch.tensor([0.25, 1.0]))


def test_penalty_has_finite_gradients_where_the_critic_is_flat():
    scale = torch.zeros(1, requires_grad=True)
    images = torch.randn(2, 3, 4, 4)
    penalty = gradient_penalty(lambda x: (scale * x).sum((1, 2, 3)), images, images, torch.rand(2, 1, 1, 1))
    penalty.backward()
    assert penalty.item() == pytest.approx(1)
    assert torch.isfinite(scale.grad).all()


def test_penalty_reaches_every_weight_of_the_discriminator():
    D = Discriminator(32, 8)
    torch.nn.init.constant_(D.attn1.gamma, 0.5)
    torch.nn.init.constant_(D.attn2.gamma, 0.5)
    real, fake = torch.randn(2, 2, 3, 32, 32)
    critic = lambda x: D(x, return_attention=True)[0]  # noqa: E731
    gradient_penalty(critic, real, fake, torch.rand(2, 1, 1, 1)).backward()
    for name, parameter in D.named_parameters():
        if "weight" in name or "gamma" in name:
            assert parameter.grad.abs().sum() > 0, name
