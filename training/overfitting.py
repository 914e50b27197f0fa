"""Notice that D remembers the training images."""

from errors import warn

LIMIT = 0.9  # Karras et al., arXiv 2006.06676, adapt the strength of their augmentation to keep r at 0.6
MIN_STEPS = 500  # with few images, an epoch is so short that r is near 1 for that long by chance


class OverfittingCheck:
    """Warn once when r, the mean sign of D's logits on real images, has been above `LIMIT` for an epoch.

    Args:
        epoch: steps per epoch, of which `MIN_STEPS` are counted at least.
    """

    def __init__(self, epoch: int):
        self._steps = max(epoch, MIN_STEPS)
        self._since: int | None = None  # step of the first of the values above the limit without a break
        self._warned = False

    def add(self, step: int, r: float) -> None:
        """Take the value of a logged step."""
        if r <= LIMIT:
            self._since = None
        elif self._since is None:
            self._since = step
        elif step - self._since >= self._steps and not self._warned:
            self._warned = True
            warn(
                f"since step {self._since}, D's logits are positive on nearly all training images (mean sign {r:.2f}): "
                "it may remember them, which --holdout 0.05 shows, and G may get worse. More images help, or --augment "
                "color,translation,cutout"
            )
