"""Notice that D remembers the training images."""

from errors import warn

LIMIT = 0.9  # Karras et al., arXiv 2006.06676, adapt the strength of their augmentation to keep r at 0.6
MIN_STEPS = 500  # with few images, an epoch is so short that r is near 1 for that long by chance
MIN_ENTRIES = 20  # a logged value is that of one batch, which may be near 1 by chance


class OverfittingCheck:
    """Warn once when r, the mean sign of D's logits on real images, has been above `LIMIT` for an epoch.

    Args:
        epoch: steps per epoch, of which `MIN_STEPS`, and `MIN_ENTRIES` values, are counted at least.
        has_holdout, has_augment: whether the run has these options, which are then not advised.
    """

    def __init__(self, epoch: int, has_holdout: bool, has_augment: bool):
        self._steps = max(epoch, MIN_STEPS)
        # In a run that is going, D has seen all images: none of them can be held out any more.
        self._test = (
            "see d_train and d_holdout"
            if has_holdout
            else "--holdout 0.05 shows it, if a new run has it from the start"
        )
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
