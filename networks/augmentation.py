"""DiffAugment: random, differentiable changes of every image that D sees (Zhao et al., arXiv 2006.10738).

    noise = torch.rand(len(images), RANDOM_NUMBERS)
    changed = augment(images, noise, ("color", "translation", "cutout"))

The random numbers are arguments, because a captured step may not draw any.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RANDOM_NUMBERS = 7  # per image: three of color, two of translation, two of cutout


def augment(images: Tensor, aug_noise: Tensor, policy: Sequence[str]) -> Tensor:
    """Change each image of a batch in its own way.

    Args:
        images: (B, C, S, S) in [-1, 1]; the results may leave this range.
        aug_noise: uniform random numbers in [0, 1), (B, 7).
        policy: some of `POLICIES`, applied in the order of `POLICIES`.

    Returns:
        (B, C, S, S), with gradients to the images.
    """
    changed = images.contiguous()  # the operations on pixels are several times faster than in channels last
    for name, (change, columns) in POLICIES.items():
        if name in policy:
            changed = change(changed, *(column.view(-1, 1, 1, 1) for column in aug_noise[:, columns].unbind(1)))
    return torch.empty_like(images).copy_(changed)


def _color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Add -0.5 to 0.5, scale distances from gray by 0 to 2, and those from the image's mean by 0.5 to 1.5."""
    images = images + (brightness - 0.5)
    images = torch.lerp(images.mean(1, keepdim=True), images, 2 * saturation)
    return torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast + 0.5)


def _translation(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Move by up to an eighth of the side in whole pixels; zeros move in."""
    size = images.shape[-1]
    most = size // 8
    padded = F.pad(images, (most, most, most, most)).flatten(2)
    pixel = torch.arange(size, device=images.device)
    # 0 to 2 * most pixels of the padding are left out, each with the same probability.
    start_row, start_column = (2 * most - (u * (2 * most + 1)).long() for u in (down, right))
    index = (start_row + pixel.view(-1, 1)) * (size + 2 * most) + (start_column + pixel)  # (B, 1, S, S)
    return padded.take_along_dim(index.flatten(2), 2).view_as(images)


def _cutout(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Set a square of half the side to 0, around a position that may be at the border."""
    size = images.shape[-1]
    pixel = torch.arange(size, device=images.device)
    distances = (axis - (u * (size + 1)).long() for axis, u in ((pixel.view(-1, 1), row), (pixel, column)))
    cut = [(distance >= -(size // 4)) & (distance < size // 4) for distance in distances]
    return images.masked_fill(cut[0] & cut[1], 0)


POLICIES: dict[str, tuple[Callable[..., Tensor], slice]] = {  # with the columns of random numbers of each
    "color": (_color, slice(0, 3)),
    "translation": (_translation, slice(3, 5)),
    "cutout": (_cutout, slice(5, 7)),
}
