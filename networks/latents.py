"""Inputs of generators: latent vectors z, drawn from a seed and interpolated, and class labels beside them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_z(seed: int, count: int, z_dim: int, device: torch.device | str, truncation: float | None = None) -> Tensor:
    """Draw z from N(0, I), (count, z_dim). Drawn on the CPU, so that every device gets the same numbers.

    Args:
        truncation: redraw every component outside [-truncation, truncation] (the truncation trick; Brock et al., arXiv
            1809.11096, section 3.1): images closer to the mean image, with less variety. None does not truncate.
    """
    rng = torch.Generator().manual_seed(seed)
    if truncation is None:
        return torch.randn(count, z_dim, generator=rng).to(device)
    z = torch.empty(count, z_dim)
    return torch.nn.init.trunc_normal_(z, a=-truncation, b=truncation, generator=rng).to(device)


def check_labels(labels: Tensor | None, num_classes: int) -> None:
    """Raise `ValueError` for labels without classes, and for classes without labels."""
    if (labels is not None) != (num_classes > 0):
        raise ValueError("labels are needed by networks with num_classes > 0, and only by them")


def class_rows(z: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return z (R * K, z_dim) and labels (R * K,) of a grid with a row for each of R classes.

    The K columns are the first of z (B, z_dim), the same in each row.
    """
    z = z[: class_columns(len(classes), len(z))]
    return z.repeat(len(classes), 1), torch.tensor(classes, device=z.device).repeat_interleave(len(z))


def class_columns(rows: int, available: int) -> int:
    """Return the images in each of so many rows of a grid: at least 8, if so many are available."""
    return min(available, max(8, 32 // rows))


def classes_in_turn(classes: Sequence[int], count: int) -> Tensor:
    """Return labels (count,): these classes in turn."""
    return torch.tensor(classes)[torch.arange(count) % len(classes)]


def slerp(start: Tensor, end: Tensor, count: int) -> Tensor:
    """Spherical linear interpolation between pairs of latents; lengths are interpolated linearly.

    Vectors on the straight line between two latents are shorter than almost any that G was trained on (White,
    *Sampling Generative Networks*, arXiv 1609.04468).

    Args:
        start, end: (B, z_dim), non-zero.
        count: number of latents per pair, both ends included; at least 2.

    Returns:
        (B, count, z_dim).
    """
    start_length, end_length = start.norm(dim=1, keepdim=True), end.norm(dim=1, keepdim=True)  # (B, 1)
    start, end = start / start_length, end / end_length
    angle = (start * end).sum(1, keepdim=True).clamp(-1, 1).acos()[..., None]  # (B, 1, 1)
    t = torch.linspace(0, 1, count, device=start.device)[None, :, None]  # (1, count, 1)
    direction = torch.sin((1 - t) * angle) * start[:, None] + torch.sin(t * angle) * end[:, None]
    direction = torch.where(angle < 1e-4, start[:, None], direction / torch.sin(angle))  # 0 / 0 where both are equal
    return direction * torch.lerp(start_length[:, None], end_length[:, None], t)
