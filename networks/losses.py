"""Adversarial losses and the gradient penalty of WGAN-GP: pure functions of logits (B,) that return 0-d tensors.

A loss of D is returned in two parts, of real and of fake logits; their sum is minimized.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_d_loss(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge loss of D (paper equation 4): ``relu(1 - D(x)).mean()`` and ``relu(1 + D(G(z))).mean()``."""
    return F.relu(1 - real_logits).mean(), F.relu(1 + fake_logits).mean()


def wasserstein_d_loss(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of the WGAN critic: ``-D(x).mean()`` and ``D(G(z)).mean()``."""
    return -real_logits.mean(), fake_logits.mean()


def g_loss(fake_logits: Tensor) -> Tensor:
    """Loss of G under both losses of D: ``-D(G(z)).mean()``."""
    return -fake_logits.mean()


class Loss(NamedTuple):
    """The losses of D, in two parts, and of G; `has_penalty` adds the gradient penalty to D's.

    Without it, logits of real images are to be above 0 and others below, as `d_sign` is the mean sign of the former.
    """

    of_D: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    of_G: Callable[[Tensor], Tensor]
    has_penalty: bool = False


LOSSES = {"hinge": Loss(hinge_d_loss, g_loss), "wgan-gp": Loss(wasserstein_d_loss, g_loss, True)}  # by --adv_loss


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """Gradient penalty ``mean((|grad D(x)| - 1)^2)`` (Gulrajani et al., arXiv 1704.00028, equation 3).

    Args:
        critic: maps images (B, C, H, W) to logits (B,); must support double backward.
        real, fake: images (B, C, H, W).
        alpha: interpolation coefficients (B, 1, 1, 1) in [0, 1]: ``x = alpha * real + (1 - alpha) * fake``.

    Returns:
        The penalty. Its gradient is finite where grad D(x) is 0; the subgradient 0 of the norm is used there.
    """
    x = torch.lerp(fake.detach(), real, alpha).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)  # (B,); sqrt(sum of squares) gives NaN gradients at 0
    return (norm - 1).square().mean()
