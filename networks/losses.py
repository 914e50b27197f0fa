"""The adversarial losses: pure functions of the discriminator's logits, and the gradient penalty of WGAN-GP.

A discriminator loss is returned as its real and its fake part, which are summed; all values are 0-d tensors.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_d_loss(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge loss (paper equation 4) of logits (B,): ``relu(1 - D(x)).mean()`` and ``relu(1 + D(G(z))).mean()``."""
    return F.relu(1 - real_logits).mean(), F.relu(1 + fake_logits).mean()


def wasserstein_d_loss(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The critic's loss of WGAN, of logits (B,): ``-D(x).mean()`` and ``D(G(z)).mean()``."""
    return -real_logits.mean(), fake_logits.mean()


def g_loss(fake_logits: Tensor) -> Tensor:
    """``-D(G(z)).mean()``, of logits (B,): the generator's side of both losses."""
    return -fake_logits.mean()


D_LOSSES = {"hinge": hinge_d_loss, "wgan-gp": wasserstein_d_loss}


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """``mean((|grad D(x)| - 1)^2)`` at x between real and fake images (Gulrajani et al., arXiv 1704.00028).

    Args:
        critic: images (B, C, H, W) to logits (B,); must allow double backward.
        real, fake: images (B, C, H, W).
        mix: (B, 1, 1, 1) in [0, 1], the share of the real image in each x.

    Returns:
        The penalty, a 0-d tensor; its gradient is finite where grad D(x) is 0 (there the norm's is taken as 0).
    """
    x = torch.lerp(fake.detach(), real, mix).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)  # (B,); subgradient 0 at 0, where sqrt would give NaN
    return (norm - 1).square().mean()
