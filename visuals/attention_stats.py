"""What attention looks at: the maps of some images, and how far they reach."""

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from sagan_models import Discriminator, Generator


class AttentionSample(NamedTuple):
    """Some images, and what each position of them looks at in each attention layer."""

    name: str  # "generated" or "real"
    images: Tensor  # (B, 3, S, S) in [-1, 1]
    maps: Mapping[str, Tensor]  # such as "G attn1": (B, N, N), A[b, i, j] being how much position i looks at j


class AttentionStats(NamedTuple):
    """How far a layer looks, on the average over images and positions."""

    distance: float  # from a position to what it looks at, in widths of the image
    effective_positions: float  # looked at: exp(entropy), 1 for a single one, N for an even gaze
    non_local_share: float  # share of the attention that goes outside the 3 x 3 neighbourhood, in [0, 1]


def collect_attention(G: Generator, D: Discriminator, z: Tensor, real: Tensor | None) -> list[AttentionSample]:
    """The maps of both networks for generated images, and those of D for real ones, where there are any.

    Args:
        G, D: in evaluation mode, so that looking does not change them.
        z: noise (B, z_dim).
        real: images (B', 3, S, S) in [-1, 1], or None.
    """
    fake, *g_maps = G(z, return_attention=True)
    shown = [AttentionSample("generated", fake, _named("G", g_maps) | _named("D", D(fake, return_attention=True)[1:]))]
    if real is not None:
        shown.append(AttentionSample("real", real, _named("D", D(real, return_attention=True)[1:])))
    return shown


def attention_stats(maps: Tensor) -> AttentionStats:
    """How far maps (B, N, N) look, over a grid of sqrt(N) x sqrt(N) positions."""
    side = math.isqrt(maps.shape[1])
    position = torch.arange(side * side, device=maps.device)
    rows, columns = position // side, position % side
    down, right = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()  # (N, N)
    distance = (down.square() + right.square()).sqrt() / side
    beyond = (torch.maximum(down, right) > 1).float()
    entropy = torch.special.entr(maps).sum(-1)  # (B, N), in nats
    return AttentionStats(
        *(value.mean().item() for value in ((maps * distance).sum(-1), entropy.exp(), (maps * beyond).sum(-1)))
    )


def mean_attention_stats(batches: Iterable[AttentionSample]) -> dict[str, tuple[int, AttentionStats]]:
    """For each layer its side and its mean reach over batches of equal sizes."""
    sides: dict[str, int] = {}
    parts: dict[str, list[AttentionStats]] = {}
    for batch in batches:
        for layer, maps in batch.maps.items():
            sides[layer] = math.isqrt(maps.shape[1])
            parts.setdefault(layer, []).append(attention_stats(maps))
    return {
        layer: (sides[layer], AttentionStats(*map(fmean, zip(*found, strict=True)))) for layer, found in parts.items()
    }


def format_attention_stats(layers: Mapping[str, tuple[int, AttentionStats]]) -> str:
    """What `mean_attention_stats` found, to print: a line a layer, beside each number that of an even gaze."""
    lines = [f"{'':<10}{'grid':<10}{'mean distance':<20}{'positions looked at':<22}outside 3 x 3"]
    for layer, (side, mine) in layers.items():
        even = uniform_attention_stats(side)
        outside = f"{mine.non_local_share:.0%} of {even.non_local_share:.0%}"
        positions = f"{mine.effective_positions:.1f} of {even.effective_positions:.0f}"
        distance = f"{mine.distance:.2f} of {even.distance:.2f}"
        lines.append(f"{layer:<10}{f'{side} x {side}':<10}{distance:<20}{positions:<22}{outside}")
    return "\n".join(lines)


def uniform_attention_stats(side: int) -> AttentionStats:
    """The yardstick: what `reach` says of looking evenly at all of side x side positions."""
    return attention_stats(torch.full((1, side**2, side**2), side**-2.0))


def _named(network: str, maps: list[Tensor]) -> dict[str, Tensor]:
    return {f"{network} attn{index}": attention for index, attention in enumerate(maps, start=1)}
