"""Attention maps of both networks, and statistics of them: distance, entropy, non-local share."""

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from sagan_models import Discriminator, Generator


class AttentionSample(NamedTuple):
    """A batch of images with its attention maps."""

    name: str  # "generated" or "real"
    images: Tensor  # (B, 3, S, S) in [-1, 1]
    maps: Mapping[str, Tensor]  # "G attn1": (B, N, N) ...; A[b, i, j] is how much query i attends to position j


class AttentionStats(NamedTuple):
    """Statistics of a layer's attention, averaged over images and queries."""

    distance: float  # mean attention distance, in image widths
    effective_positions: float  # effective number of attended positions, exp(entropy): 1 ... N, N if uniform
    non_local_share: float  # fraction of the attention that goes outside the 3 x 3 neighborhood, in [0, 1]


def collect_attention(G: Generator, D: Discriminator | None, z: Tensor, real: Tensor | None) -> list[AttentionSample]:
    """Return the maps of G and D on generated images and, if given, those of D on real images.

    Args:
        G, D: in evaluation mode, because a forward in training mode changes their buffers; D may be missing.
        z: (B, z_dim).
        real: (B', 3, S, S) in [-1, 1], or None.
    """
    fake, *g_maps = G(z, return_attention=True)
    if D is None:
        return [AttentionSample("generated", fake, _name_layers("G", g_maps))]
    d_maps = D(fake, return_attention=True)[1:]
    samples = [AttentionSample("generated", fake, _name_layers("G", g_maps) | _name_layers("D", d_maps))]
    if real is not None:
        samples.append(AttentionSample("real", real, _name_layers("D", D(real, return_attention=True)[1:])))
    return samples


def attention_stats(maps: Tensor) -> AttentionStats:
    """Return the statistics of maps (B, N, N) over a grid of sqrt(N) x sqrt(N) positions."""
    side = math.isqrt(maps.shape[1])
    position = torch.arange(side * side, device=maps.device)
    rows, columns = position // side, position % side
    down, right = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()  # (N, N)
    distance = (down.square() + right.square()).sqrt() / side
    is_non_local = (torch.maximum(down, right) > 1).float()
    entropy = torch.special.entr(maps).sum(-1)  # (B, N), in nats
    return AttentionStats(
        distance=(maps * distance).sum(-1).mean().item(),
        effective_positions=entropy.exp().mean().item(),
        non_local_share=(maps * is_non_local).sum(-1).mean().item(),
    )


def mean_attention_stats(batches: Iterable[AttentionSample]) -> dict[str, tuple[int, AttentionStats]]:
    """Return, by layer, the side of its grid and its mean statistics over batches of equal size."""
    sides: dict[str, int] = {}
    stats: dict[str, list[AttentionStats]] = {}
    for batch in batches:
        for layer, maps in batch.maps.items():
            sides[layer] = math.isqrt(maps.shape[1])
            stats.setdefault(layer, []).append(attention_stats(maps))
    return {layer: (sides[layer], AttentionStats(*map(fmean, zip(*stats[layer], strict=True)))) for layer in stats}


def uniform_attention_stats(side: int) -> AttentionStats:
    """Return the statistics of uniform attention, 1/N to each of N = side * side positions, for comparison."""
    return attention_stats(torch.full((1, side**2, side**2), side**-2.0))


def format_attention_stats(layers: Mapping[str, tuple[int, AttentionStats]]) -> str:
    """Format the result of `mean_attention_stats` as a table; numbers in brackets are those of uniform attention."""
    lines = [f"{'':<10}{'grid':<10}{'mean distance':<20}{'effective positions':<22}outside 3 x 3"]
    for layer, (side, stats) in layers.items():
        uniform = uniform_attention_stats(side)
        distance = f"{stats.distance:.2f} ({uniform.distance:.2f})"
        positions = f"{stats.effective_positions:.1f} ({uniform.effective_positions:.0f})"
        outside = f"{stats.non_local_share:.0%} ({uniform.non_local_share:.0%})"
        lines.append(f"{layer:<10}{f'{side} x {side}':<10}{distance:<20}{positions:<22}{outside}")
    return "\n".join(lines)


def _name_layers(network: str, maps: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"{network} attn{index}": attention for index, attention in enumerate(maps, start=1)}
