"""Inputs of generators: latent vectors z, drawn, interpolated and moved along directions, and class labels."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectral import fold_spectral_norm


def sample_z(seed: int, count: int, z_dim: int, device: torch.device | str) -> Tensor:
    """Draw z from N(0, I), (count, z_dim). Drawn on the CPU, so that every device gets the same numbers."""
    return torch.randn(count, z_dim, generator=torch.Generator().manual_seed(seed)).to(device)


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


def latent_directions(first_layer: nn.Module, count: int) -> Tensor:
    """Return the directions in z that change the output of G's first layer most, (count, z_dim), the strongest first.

    SeFa (Shen & Zhou, arXiv 2007.06600): with the layer as x = A z + b, the eigenvectors of A^T A that have the largest
    eigenvalues; no training. Of the two signs, that with a positive largest component.

    Args:
        first_layer: `nn.Linear` or `nn.ConvTranspose2d` of a 1x1 input, with or without spectral norm.
        count: at most z_dim.
    """
    (layer,) = fold_spectral_norm(nn.Sequential(copy.deepcopy(first_layer)))
    rows = layer.weight.t() if isinstance(layer, nn.Linear) else layer.weight.flatten(1)  # A^T (z_dim, outputs)
    rows = rows.detach().cpu().double()
    vectors = torch.linalg.eigh(rows @ rows.t()).eigenvectors.flip(1)[:, :count].t()  # eigenvalues are in rising order
    signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    return (signs * vectors).float().to(layer.weight.device)


def latent_lines(z: Tensor, directions: Tensor, amounts: Sequence[float]) -> Tensor:
    """Return z (z_dim,) plus each of A amounts of each of K directions (K, z_dim): (K, A, z_dim)."""
    return z + torch.tensor(amounts, device=z.device)[:, None] * directions[:, None]
