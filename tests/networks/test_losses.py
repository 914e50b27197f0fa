import pytest
import torch

from networks.losses import LOSSES, gradient_penalty

REAL, FAKE = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 0.5])


@pytest.mark.parametrize("name, real, fake", [("hinge", (0 + 0.5 + 2) / 3, (0 + 1 + 1.5) / 3), ("wgan-gp", -0.5, -0.5)])
def test_losses(name, real, fake):
    assert [loss.item() for loss in LOSSES[name].of_D(REAL, FAKE)] == pytest.approx([real, fake])
    assert LOSSES[name].of_G(FAKE).item() == pytest.approx(0.5)
    assert LOSSES[name].has_penalty == (name == "wgan-gp")


@pytest.mark.parametrize("slope, expected", [(1.0, 0.0), (3.0, 4.0)])
def test_penalty_of_a_linear_critic_is_known(slope, expected):
    direction = torch.randn(3, 8, 8)
    direction *= slope / direction.norm()
    real, fake = torch.randn(2, 4, 3, 8, 8)
    penalty = gradient_penalty(lambda x: (x * direction).sum((1, 2, 3)), real, fake, torch.rand(4, 1, 1, 1))
    assert penalty.item() == pytest.approx(expected, abs=1e-5)


def test_penalty_is_taken_between_real_and_fake():
    seen, alpha = [], torch.tensor([0.25, 1.0]).view(2, 1, 1, 1)
    real, fake = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    gradient_penalty(lambda x: seen.append(x.detach()) or x.square().sum((1, 2, 3)), real, fake, alpha)
    assert torch.equal(seen[0], alpha.expand(2, 3, 4, 4))


def test_penalty_has_finite_gradients_where_the_critic_is_flat():
    scale, images = torch.zeros(1, requires_grad=True), torch.randn(2, 3, 4, 4)
    penalty = gradient_penalty(lambda x: (scale * x).sum((1, 2, 3)), images, images, torch.rand(2, 1, 1, 1))
    penalty.backward()
    assert penalty.item() == pytest.approx(1)
    assert torch.isfinite(scale.grad).all()
