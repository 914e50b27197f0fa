"""Detect non-finite losses and weights before anything of them is saved."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class NonFiniteError(Exception):
    """A loss or a weight is NaN or infinite; the message names the step."""


class NonFiniteGuard:
    """Remembers the first non-finite losses of a run, on the device: a check at every step would synchronize."""

    def __init__(self, device: torch.device):
        self._losses = torch.zeros(3, device=device)  # step, d_loss, g_loss

    def add(self, step: int, stats: dict[str, Tensor]) -> None:
        """Record the losses of a step, unless an earlier step had non-finite ones."""
        losses = torch.stack([torch.full_like(self._losses[0], step), stats["d_loss"], stats["g_loss"]])
        self._losses = torch.where(self._losses.isfinite().all(), losses, self._losses)

    def check_losses(self) -> None:
        """Raise `NonFiniteError` if a loss was not finite since the start. Waits for the device."""
        if not self._losses.isfinite().all():
            step, d_loss, g_loss = self._losses.tolist()
            raise NonFiniteError(f"non-finite loss at step {step:.0f} (d_loss={d_loss:g}, g_loss={g_loss:g})")

    def check(self, state: Any) -> None:
        """`check_losses`, then check every tensor in nested dicts and lists, such as the state of a checkpoint."""
        self.check_losses()
        finite = [tensor.isfinite().all().to(self._losses.device) for tensor in iter_tensors(state)]
        if not torch.stack(finite).all():  # synchronizes once, not once per tensor
            raise NonFiniteError("non-finite weight or optimizer state, although all losses were finite")


def iter_tensors(tree: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (Mapping, list, tuple)):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from iter_tensors(value)
