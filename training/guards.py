"""Notice that a run goes wrong: non-finite losses and weights, a D that remembers training images, mode collapse."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from errors import warn

LIMIT = 0.9  # Karras et al., arXiv 2006.06676, adapt the strength of their augmentation to keep r at 0.6
MIN_STEPS = 500  # with few images, an epoch is so short that r is near 1 for that long by chance
MIN_ENTRIES = 20  # a logged value is that of one batch, which may be near 1 by chance
COLLAPSE_STEPS = 2000  # at first samples are noise, then all the same blur: toy faces were below half up to step 650
MIN_SAMPLES = 8  # the spread of fewer may be below half by chance


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
        tensors = (leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
        finite = [tensor.isfinite().all().to(self._losses.device) for tensor in tensors]
        if not torch.stack(finite).all():  # synchronizes once, not once per tensor
            raise NonFiniteError("non-finite weight or optimizer state, although all losses were finite")


class OverfittingCheck:
    """Warn once when r, the mean sign of D's logits on real images, has been above `LIMIT` for an epoch.

    Args:
        epoch: steps per epoch; at least `MIN_STEPS` steps and `MIN_ENTRIES` logged values are waited for.
        has_holdout, has_augment: whether the run has these options, which are then not advised.
    """

    def __init__(self, epoch: int, has_holdout: bool, has_augment: bool):
        self._steps = max(epoch, MIN_STEPS)
        # In a run that is going, D has seen all images: none of them can be held out any more.
        new_run = "--holdout 0.05 shows it, if a new run has it from the start"
        self._test = "see d_train and d_holdout" if has_holdout else new_run
        self._remedy = "More images help" + ("" if has_augment else ", or --augment color,translation,cutout")
        self._since = self._count = 0  # step of the first of the values above the limit without a break; how many
        self._warned = False

    def add(self, step: int, r: float) -> None:
        """Take the value of a logged step."""
        self._count = self._count + 1 if r > LIMIT else 0
        if self._count == 1:
            self._since = step
        if self._count >= MIN_ENTRIES and step - self._since >= self._steps and not self._warned:
            self._warned = True
            warn(
                f"since step {self._since}, D's logits are positive on nearly all training images (mean sign {r:.2f}): "
                f"it may remember them ({self._test}), and G may get worse. {self._remedy}"
            )


@torch.no_grad()
def image_spread(images: Tensor) -> float:
    """Return the mean, over all pairs of images (B, 3, S, S) in [-1, 1], of the root-mean-square error between the two.

    It is comparable with the distances of `nearest_images`. NaN for one image.
    """
    pixels = images.flatten(1).float()
    distances = torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist")  # 0 on the diagonal
    return (distances.sum() / (len(pixels) * (len(pixels) - 1)) / pixels.shape[1] ** 0.5).item()


class CollapseCheck:
    """Warn once, from `COLLAPSE_STEPS` on, when samples differ less than half as much as real images: mode collapse.

    Args:
        has_augment: whether the run has this option, which is then not advised.
    """

    def __init__(self, has_augment: bool):
        self._augment = "" if has_augment else ", or with few images --augment color,translation,cutout"
        self._since = 0  # step of the first of the values below half without a break; 0 for none
        self._warned = False

    def add(self, step: int, spread: float, spread_real: float) -> None:
        """Take the values of a step, see `image_spread`."""
        self._since = (self._since or step) if spread < spread_real / 2 else 0
        if self._since and step >= COLLAPSE_STEPS and not self._warned:
            self._warned = True
            warn(
                f"since step {self._since}, samples differ from each other less than half as much as real images do "
                f"(spread {spread:.2f}, real {spread_real:.2f}): mode collapse, which seldom ends by itself. Restart, "
                f"or resume an earlier checkpoint (--pretrained_model), with a lower --g_lr{self._augment}"
            )
