"""The exponential moving average (EMA) of a generator's weights."""

import copy

import torch
from torch import nn


class EMA:
    """Exponential moving average of a generator, `network`: it makes better images than the newest weights.

    It is always in evaluation mode. Weights and BatchNorm statistics are averaged. Counters are copied, and so are the
    singular vectors of spectral norm, because the mean of unit vectors is not a unit vector. The decay is
    ``(1 + step) / (10 + step)`` up to `decay`, so that the average does not lag behind in the first steps.
    """

    def __init__(self, source: nn.Module, decay: float):
        self.decay = decay
        self.network = copy.deepcopy(source).requires_grad_(False).eval()
        ours, theirs = self.network.state_dict(), source.state_dict()  # share memory with the networks
        vectors = [key for key in ours if key.endswith(("_u", "_v"))]
        counters = [key for key in ours if key.endswith("num_batches_tracked")]
        averaged = [key for key in ours if key not in (*vectors, *counters)]
        self._averaged, self._vectors, self._counters = (
            ([ours[key] for key in keys], [theirs[key] for key in keys]) for keys in (averaged, vectors, counters)
        )

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the source's weights after a generator update; `step` counts the updates before it."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._averaged, 1 - decay)
        torch._foreach_copy_(*self._vectors)
        torch._foreach_copy_(*self._counters)  # apart: one kernel on CUDA only if all tensors have the same type
