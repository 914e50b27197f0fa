"""What attention looks at: the maps of some images, and how far they reach."""

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from sagan_models import Discriminator, Generator


class Shown(NamedTuple):
    """Some images, and what each position of them looks at in each attention layer."""

    name: str  # "generated" or "real"
    images: Tensor  # (B, 3, S, S) in [-1, 1]
    maps: Mapping[str, Tensor]  # such as "G attn1": (B, N, N), A[b, i, j] being how much position i looks at j


class Reach(NamedTuple):
    """How far a layer looks, on the average over images and positions."""

    distance: float  # from a position to what it looks at, in widths of the image
    positions: float  # looked at: exp(entropy), 1 for a single one, N for an even gaze
    beyond: float  # share of the attention that goes outside the 3 x 3 neighbourhood, in [0, 1]


def look(G: Generator, D: Discriminator, z: Tensor, real: Tensor | None) -> list[Shown]:
    """The maps of both networks for generated images, and those of D for real ones, where there are any.

    Args:
        G, D: in evaluation mode, so that looking does not change them.
        z: noise (B, z_dim).
        real: images (B', 3, S, S) in [-1, 1], or None.
    """
    fake, *g_maps = G(z, return_attention=True)
    shown = [Shown("generated", fake, _named("G", g_maps) | _named("D", D(fake, return_attention=True)[1:]))]
    if real is not None:
        shown.append(Shown("real", real, _named("D", D(real, return_attention=True)[1:])))
    return shown


def reach(maps: Tensor) -> Reach:
    """How far maps (B, N, N) look, over a grid of sqrt(N) x sqrt(N) positions."""
    side = math.isqrt(maps.shape[1])
    position = torch.arange(side * side, device=maps.device)
    rows, columns = position // side, position % side
    down, right = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()  # (N, N)
    distance = (down.square() + right.square()).sqrt() / side
    beyond = (torch.maximum(down, right) > 1).float()
    entropy = torch.special.entr(maps).sum(-1)  # (B, N), in nats
    return Reach(
        *(value.mean().item() for value in ((maps * distance).sum(-1), entropy.exp(), (maps * beyond).sum(-1)))
    )


def mean_reach(batches: Iterable[Shown]) -> dict[str, tuple[int, Reach]]:
    """For each layer its side and its mean reach over batches of equal sizes."""
    sides: dict[str, int] = {}
    parts: dict[str, list[Reach]] = {}
    for batch in batches:
        for layer, maps in batch.maps.items():
            sides[layer] = math.isqrt(maps.shape[1])
            parts.setdefault(layer, []).append(reach(maps))
    return {layer: (sides[layer], Reach(*map(fmean, zip(*found, strict=True)))) for layer, found in parts.items()}


def reach_table(layers: Mapping[str, tuple[int, Reach]]) -> str:
    """What `mean_reach` found, to print: a line a layer, beside each number that of an even gaze."""
    lines = [f"{'':<10}{'grid':<10}{'mean distance':<20}{'positions looked at':<22}outside 3 x 3"]
    for layer, (side, mine) in layers.items():
        even = even_reach(side)
        lines.append(
            f"{layer:<10}{f'{side} x {side}':<10}{f'{mine.distance:.2f} of {even.distance:.2f}':<20}"
            f"{f'{mine.positions:.1f} of {even.positions:.0f}':<22}{mine.beyond:.0%} of {even.beyond:.0%}"
        )
    return "\n".join(lines)


def even_reach(side: int) -> Reach:
    """The yardstick: what `reach` says of looking evenly at all of side x side positions."""
    return reach(torch.full((1, side**2, side**2), side**-2.0))


def _named(network: str, maps: list[Tensor]) -> dict[str, Tensor]:
    return {f"{network} attn{index}": attention for index, attention in enumerate(maps, start=1)}
