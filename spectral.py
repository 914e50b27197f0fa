"""Spectral normalization: divide a layer's weight by an estimate of its largest singular value.

Miyato et al., *Spectral Normalization for Generative Adversarial Networks*, arXiv 1802.05957, algorithm 1.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

EPSILON = 1e-12  # the reference's; keeps a zero vector from becoming NaN
SUFFIXES = ("_bar", "_u", "_v")  # of the names of the weight and its two vectors

Layer = TypeVar("Layer", bound=nn.Module)


def _normalize(vector: Tensor) -> Tensor:
    return vector / (torch.linalg.vector_norm(vector) + EPSILON)


class SpectralNorm(nn.Module):
    """Wrap a layer so that it runs with ``W / sigma`` in place of its weight ``W``; sigma is computed in fp32.

    ``W`` is seen as a matrix of ``W.shape[0]`` rows, for transposed convolutions too, as in the reference. A forward in
    training mode first takes ``power_iterations`` steps of power iteration on the vectors u (rows) and v (columns); in
    evaluation mode they do not change. Sigma is ``u . (W v)``, with gradients through W and not through u and v.

    The state dict has the reference's keys: ``module.<name>_bar`` (the weight, a parameter), ``module.<name>_u`` and
    ``module.<name>_v`` (buffers, so that no optimizer can update them).

    Args:
        module: the layer to wrap; its parameter ``name`` is replaced.
        name: the parameter to normalize.
        power_iterations: steps per forward, at least 1.

    Raises:
        ValueError: ``power_iterations`` is less than 1.
    """

    def __init__(self, module: nn.Module, name: str = "weight", power_iterations: int = 1):
        super().__init__()
        if power_iterations < 1:
            raise ValueError(f"power_iterations must be at least 1, got {power_iterations}")
        self.module = module
        self.name = name
        self.power_iterations = power_iterations

        weight = getattr(module, name)
        rows, columns = weight.shape[0], weight[0].numel()
        del module._parameters[name]
        module.register_parameter(name + "_bar", nn.Parameter(weight.detach()))
        module.register_buffer(name + "_u", _normalize(torch.randn(rows)))
        module.register_buffer(name + "_v", _normalize(torch.randn(columns)))

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer with its weight divided by sigma."""
        weight, _, _ = self._weight_u_v()
        with torch.autocast(weight.device.type, enabled=False):
            if self.training:
                self._power_iteration()
            setattr(self.module, self.name, weight / self.sigma())
        try:
            return self.module(x)
        finally:
            delattr(self.module, self.name)  # it belongs to this forward's graph, which deepcopy cannot copy

    def sigma(self) -> Tensor:
        """Return the current estimate of the largest singular value, a 0-d tensor with a gradient to the weight."""
        weight, u, v = self._weight_u_v()
        # Copies: a second forward before the backward changes the buffers, and autograd needs this forward's vectors.
        u, v = u.clone(), v.clone()
        return torch.dot(u, torch.mv(weight.flatten(1), v))

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """Return the layer with the plain weight ``W / sigma`` of evaluation mode. It is no longer of use in here."""
        plain = nn.Parameter(self._weight_u_v()[0] / self.sigma())
        for suffix in SUFFIXES:
            delattr(self.module, self.name + suffix)
        self.module.register_parameter(self.name, plain)
        return self.module

    @torch.no_grad()
    def _power_iteration(self) -> None:
        """Update u and v in place."""
        weight, u, v = self._weight_u_v()
        matrix = weight.flatten(1)  # (rows, columns)
        for _ in range(self.power_iterations):
            v.copy_(_normalize(torch.mv(matrix.t(), u)))
            u.copy_(_normalize(torch.mv(matrix, v)))

    def _weight_u_v(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(getattr(self.module, self.name + suffix) for suffix in SUFFIXES)


def fold_spectral_norm(network: nn.Module) -> nn.Module:
    """Replace each `SpectralNorm` in a network by its `folded` layer, in place; for evaluation only. Returns it."""
    return replace_layers(network, SpectralNorm, SpectralNorm.folded)


def replace_layers(network: nn.Module, kind: type[Layer], replacement: Callable[[Layer], nn.Module]) -> nn.Module:
    """Replace each layer of a kind in a network by a function of it, in place. Returns the network."""
    for parent in [*network.modules()]:
        for name, layer in [*parent.named_children()]:
            if isinstance(layer, kind):
                setattr(parent, name, replacement(layer))
    return network
