"""Spectral normalisation: divide a layer's weight by an estimate of its largest singular value.

Miyato et al., *Spectral Normalization for Generative Adversarial Networks*, arXiv 1802.05957, algorithm 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPSILON = 1e-12  # the reference's; keeps a zero vector from becoming NaN


def _normalize(vector: Tensor) -> Tensor:
    return vector / (torch.linalg.vector_norm(vector) + EPSILON)


class SpectralNorm(nn.Module):
    """Wraps a layer so that it runs with ``W / sigma(W)`` in place of its weight ``W``.

    ``W`` is seen as a matrix of ``W.shape[0]`` rows, for transposed convolutions too, as the reference has it.
    Each forward in training mode takes ``power_iterations`` steps of power iteration on the vectors u (rows) and
    v (the rest); in evaluation they stay as they are. Gradients flow through ``W`` in sigma and not through u, v.
    Sigma is computed in fp32 under autocast too.

    Several batches can go through as one: ``layer(x, sizes=[len(a), len(b)])`` with x = a and b on end gives what
    ``layer(a)`` and then ``layer(b)`` give, each with the sigma of its own power iteration. The layer has to be linear
    but for a bias, as convolutions are: then scaling a batch by 1 / sigma is scaling the weight.

    The state dict has the reference's keys: ``module.<name>_bar`` (the weight, a parameter), ``module.<name>_u`` and
    ``module.<name>_v`` (buffers here, so that no optimizer can touch them).

    Args:
        module: the layer to wrap; its parameter ``name`` is replaced.
        name: the parameter to normalise.
        power_iterations: steps of power iteration for each forward, at least 1.

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

    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, u and v."""
        return tuple(getattr(self.module, self.name + suffix) for suffix in ("_bar", "_u", "_v"))

    @torch.no_grad()
    def _power_iteration(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advances u and v by power iteration; returns this forward's own copies of them, and ``W v``.

        Copies, because a second forward before the backward moves the buffers on, and autograd needs the vectors
        that this forward used.
        """
        _, u_buffer, v_buffer = self._state()
        u = u_buffer
        for _ in range(self.power_iterations):
            v = _normalize(torch.mv(matrix.t(), u))
            product = torch.mv(matrix, v)
            u = _normalize(product)
        torch._foreach_copy_([u_buffer, v_buffer], [u, v])
        return u, v, product

    def sigma(self) -> Tensor:
        """The current estimate of the largest singular value, a 0-d tensor; u and v stay as they are."""
        weight, u, v = self._state()
        return torch.dot(u.clone(), torch.mv(weight.flatten(1), v.clone()))

    def forward(self, x: Tensor, sizes: Sequence[int] = ()) -> Tensor:
        weight = self._state()[0]
        with torch.autocast(weight.device.type, enabled=False):
            sigmas = [self._next_sigma() for _ in sizes or (1,)]
        if len(sigmas) == 1:
            weight = weight / sigmas[0]
        else:
            scale = torch.cat([(1 / sigma).expand(size) for sigma, size in zip(sigmas, sizes, strict=True)])
            x = x * scale.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        setattr(self.module, self.name, weight)
        try:
            return self.module(x)
        finally:
            delattr(self.module, self.name)  # it belongs to this forward's graph: kept, it would stop deepcopy

    def _next_sigma(self) -> Tensor:
        """Sigma of one forward, after its power iteration; differentiable in the weight."""
        if not self.training:
            return self.sigma()
        matrix = self._state()[0].flatten(1)  # (rows, columns)
        return _Sigma.apply(matrix, *self._power_iteration(matrix))


class _Sigma(torch.autograd.Function):
    """``u . (W v)``, differentiable in W, from a ``W v`` that is there already: W is read once less."""

    @staticmethod
    def forward(ctx, matrix: Tensor, u: Tensor, v: Tensor, product: Tensor) -> Tensor:
        ctx.save_for_backward(u, v)
        return torch.dot(u, product)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        u, v = ctx.saved_tensors
        return torch.outer(grad * u, v), None, None, None
