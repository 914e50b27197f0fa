import pytest
import torch

from networks.losses import LOSSES, gradient_penalty

REAL, FAKE = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 0.5])


@pytest.mark.parametrize("name, real, fake", [("hinge", (0 + 0.5 + 2) / 3, (0 + 1 + 1.5) / 3), ("wgan-gp", -0.5, -0.5)])
def test_losses(name, real, fake):
    assert [loss.item() for loss in LOSSES[name].of_D(REAL, FAKE)] == pytest.approx([real, fake])
    assert LOSSES[name].of_G(FAKE).item() == pytest.approx(0.5)
    assert LOSSES[name].has_penalty == (name == "wgan-gp")


def test_penalty_is_taken_between_real_and_fake():
    """Of a critic whose gradient at x is x."""
    real, fake, alpha = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.rand(4, 1, 1, 1)
    penalty = gradient_penalty(lambda x: x.square().sum((1, 2, 3)) / 2, real, fake, alpha)
    lengths = (alpha * real + (1 - alpha) * fake).flatten(1).norm(dim=1)
    torch.testing.assert_close(penalty, (lengths - 1).square().mean())


def test_penalty_has_finite_gradients_where_the_critic_is_flat():
    scale, images = torch.zeros(1, requires_grad=True), torch.randn(2, 3, 4, 4)
    penalty = gradient_penalty(lambda x: (scale * x).sum((1, 2, 3)), images, images, torch.rand(2, 1, 1, 1))
    penalty.backward()
    assert penalty.item() == pytest.approx(1) and scale.grad.isfinite().all()
