"""Projection: the z whose generated image is nearest to a given image, by gradient descent on z.

found = project(G, D, photos, z)    # photos (B, 3, S, S) in [-1, 1], z (N, z_dim) to start from
images = G(found.z, found.labels)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils import progress

SHOWN_STEPS = (0, 25, 100, 500)  # whose images are returned; the last is the number of steps
LEARNING_RATE = 0.05  # of Adam; falls linearly to 0 over the second half of the steps
CHUNK = 32  # images at once of those to start from


class Projection(NamedTuple):
    """The z nearest to each of B images, and how they were found."""

    z: Tensor  # (B, z_dim)
    labels: Tensor | None  # (B,), None without classes
    images: Tensor  # (B, K, 3, S, S), generated after each of the K `SHOWN_STEPS`
    rmse: Tensor  # (B, K), root-mean-square error of these, over pixels and channels, of values in [-1, 1]


def project(G: nn.Module, D: nn.Module | None, targets: Tensor, z: Tensor, labels: Tensor | None = None) -> Projection:
    """Find the z nearest to each image: Adam on z, from the nearest of those given on; no random numbers.

    The distance is that of pixels and of features of D (see `_distances`); pixels alone make the images blurred. A
    penalty keeps the length of z near the square root of z_dim, which that of nearly all z in training was.

    Args:
        G, D: in evaluation mode; without D, the distance is that of pixels.
        targets: (B, 3, S, S) in [-1, 1].
        z, labels: what to start from, (N, z_dim), and (N,) for conditional networks. An image's class is that of the z
            from which it starts.
    """
    steps = SHOWN_STEPS[-1]
    with torch.no_grad():
        wanted = _layers(D, targets)
        nearest = _nearest(G, D, wanted, z, labels)
    z, labels = z[nearest].clone().requires_grad_(), None if labels is None else labels[nearest]
    optimizer = torch.optim.Adam([z], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 - 2 * step / steps))
    shown = []
    for step in progress(range(steps + 1), "projection", "step"):
        with torch.enable_grad():
            images = G(z, labels)
            penalty = (z.norm(dim=1) / z.shape[1] ** 0.5 - 1) ** 2
            loss = (_distances(_layers(D, images), wanted) + penalty).sum()
        if step in SHOWN_STEPS:
            shown.append(images.detach())
        if step < steps:
            (z.grad,) = torch.autograd.grad(loss, z)
            optimizer.step()
            schedule.step()
    course = torch.stack(shown, 1)
    return Projection(z.detach(), labels, course, (course - targets[:, None]).square().flatten(2).mean(2).sqrt())


def describe(rmse: Tensor) -> str:
    """Return in words how near a photo's projection came to it, and those of held-out images: their RMSE, (B,)."""
    first, others = rmse.split([1, len(rmse) - 1])
    compared = "no held-out images to compare with, see --holdout"
    if len(others):
        compared = f"of held-out images {others.mean():.3f} ({others.min():.3f} to {others.max():.3f})"
    return f"RMSE {first.item():.3f} of pixels in [-1, 1]; {compared}"


def _nearest(G: nn.Module, D: nn.Module | None, wanted: Sequence[Tensor], z: Tensor, labels: Tensor | None) -> Tensor:
    """Return the index of the z whose image is nearest to each of the wanted ones, (B,)."""
    distances = []  # (B, CHUNK)
    for rows in torch.arange(len(z)).split(CHUNK):
        layers = _layers(D, G(z[rows], None if labels is None else labels[rows]))
        images = zip(*(layer.split(1) for layer in wanted), strict=True)
        distances.append(torch.stack([_distances(layers, image) for image in images]))
    return torch.cat(distances, 1).argmin(1)


def _layers(D: nn.Module | None, images: Tensor) -> list[Tensor]:
    """Return images (B, 3, S, S) and the feature maps of D's blocks and attention layers, (B, C, H, W) each."""
    layers = [images]
    for name, block in D.named_children() if D else ():
        if name[-1].isdigit():  # not the layers behind the last feature map
            out = block(layers[-1])
            layers.append(out[0] if isinstance(out, tuple) else out)
    return layers


def _distances(layers: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return distances (B,) by what `_layers` returns: the mean square of the pixels' differences, plus the mean over
    D's layers of that of the features' differences, relative to the mean square of the wanted features."""
    pixels, *features = [(one - other).square().flatten(1).mean(1) for one, other in zip(layers, wanted, strict=True)]
    relative = [value / other.square().flatten(1).mean(1) for value, other in zip(features, wanted[1:], strict=True)]
    return pixels + sum(relative) / max(len(relative), 1)
