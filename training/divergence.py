"""Notices a run that has diverged, before anything of it is saved, and without a wait for the device at each step."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

MANY = 1000  # losses of so many steps should not be kept on the device unseen


class NonFiniteError(Exception):
    """A loss or a weight is not finite; the message says which, and after how many steps."""


class NonFiniteGuard:
    """Keeps the losses of each step on the device, and looks at them when asked to."""

    def __init__(self):
        self._losses: list[tuple[int, Tensor]] = []

    def note(self, step: int, d_loss: Tensor, g_loss: Tensor) -> None:
        """The losses of step number `step`: 0-d tensors, which are copied."""
        self._losses.append((step, torch.stack([d_loss, g_loss])))

    def check_losses(self, at_least: int = 1) -> None:
        """Waits for the device; raises `NonFiniteError` for the first step since the last check with a non-finite loss.

        Does nothing where the losses of fewer than `at_least` steps were noted since then.
        """
        if len(self._losses) < at_least:
            return
        steps, losses = zip(*self._losses, strict=True)
        self._losses = []
        for step, (d_loss, g_loss) in zip(steps, torch.stack(losses).tolist(), strict=True):
            if not (math.isfinite(d_loss) and math.isfinite(g_loss)):
                raise NonFiniteError(f"in step {step} D's loss was {d_loss:g} and G's loss {g_loss:g}")

    def check(self, step: int, *trees: Any) -> None:
        """`check_losses`, and the same for every tensor in nested dicts and lists: what is about to be saved."""
        self.check_losses()
        finite: dict[torch.device, list[Tensor]] = {}
        for tensor in iter_tensors(trees):
            finite.setdefault(tensor.device, []).append(torch.isfinite(tensor).all())
        if not all(torch.stack(flags).all() for flags in finite.values()):
            raise NonFiniteError(f"after step {step} a weight was not finite, although the losses still were")


def iter_tensors(tree: Any) -> Iterable[Tensor]:
    """Every tensor in nested dicts and sequences."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from iter_tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from iter_tensors(value)
