"""Statistics of attention maps: distance, entropy, non-local share.

A map is (N, M): N queries and M keys on square grids over the same image, each row summing to 1. Where keys are pooled,
a key's cell covers several queries; otherwise M = N.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class AttentionSample(NamedTuple):
    """A batch of images with its attention maps."""

    name: str  # "generated" or "real"
    images: Tensor  # (B, 3, S, S) in [-1, 1]
    maps: Mapping[str, Tensor]  # "G attn1": (B, N, M) ...; A[b, i, j] is how much query i attends to key j
    classes: Sequence[str] = ()  # the name of each image's class, if there are classes


class AttentionStats(NamedTuple):
    """Statistics of a layer's attention, averaged over images and queries.

    A key is outside the 3 x 3 neighborhood of a query if its cell covers none of these nine positions. For M = N that
    is every key more than one row or column away; the cell of a pooled key may lie partly in the neighborhood.
    """

    distance: float  # mean attention distance between centers of query and key cells, in image widths
    effective_positions: float  # effective number of attended positions, exp(entropy): 1 ... M, M if uniform
    non_local_share: float  # fraction of the attention that goes outside the 3 x 3 neighborhood, in [0, 1]


LayerStats = tuple[tuple[int, int], AttentionStats]  # the sides of the grids of queries and of keys, and the statistics


def grid_sides(maps: Tensor | np.ndarray) -> tuple[int, int]:
    """Return the sides of the grids of queries and of keys, sqrt(N) and sqrt(M), of maps (..., N, M)."""
    queries, keys = maps.shape[-2:]
    return math.isqrt(queries), math.isqrt(keys)


def attention_stats(maps: Tensor) -> AttentionStats:
    """Return the statistics of maps (B, N, M)."""
    query_side, key_side = grid_sides(maps)
    key_width = query_side / key_side  # the unit of length is the width of a query's cell
    query = torch.arange(query_side, device=maps.device) + 0.5
    key = (torch.arange(key_side, device=maps.device) + 0.5) * key_width
    offset = (query[:, None] - key).abs()  # (query_side, key_side), between centers along one axis
    down, right = offset[:, None, :, None], offset[None, :, None, :]  # broadcast to all queries and all keys
    distance = (down.square() + right.square()).sqrt().reshape(maps.shape[1:]) / query_side  # (N, M)
    is_non_local = (torch.maximum(down, right) >= 1.5 + key_width / 2).float().reshape(maps.shape[1:])
    entropy = torch.special.entr(maps).sum(-1)  # (B, N), in nats
    return AttentionStats(
        distance=(maps * distance).sum(-1).mean().item(),
        effective_positions=entropy.exp().mean().item(),
        non_local_share=(maps * is_non_local).sum(-1).mean().item(),
    )


def mean_attention_stats(batches: Iterable[AttentionSample]) -> dict[str, LayerStats]:
    """Return, by layer, the sides of its grids and its mean statistics over batches of equal size."""
    sides: dict[str, tuple[int, int]] = {}
    stats: dict[str, list[AttentionStats]] = {}
    for batch in batches:
        for layer, maps in batch.maps.items():
            sides[layer] = grid_sides(maps)
            stats.setdefault(layer, []).append(attention_stats(maps))
    return {layer: (sides[layer], AttentionStats(*map(fmean, zip(*stats[layer], strict=True)))) for layer in stats}


def uniform_attention_stats(query_side: int, key_side: int) -> AttentionStats:
    """Return the statistics of uniform attention, 1/M to each of M = key_side * key_side keys, for comparison."""
    return attention_stats(torch.full((1, query_side**2, key_side**2), key_side**-2.0))


def format_attention_stats(layers: Mapping[str, LayerStats]) -> str:
    """Format the result of `mean_attention_stats` as a table; numbers in brackets are those of uniform attention."""
    grids = {  # one side if queries and keys have the same grid
        layer: " over ".join(f"{side} x {side}" for side in dict.fromkeys(sides))
        for layer, (sides, _) in layers.items()
    }
    width = max([7, *map(len, grids.values())]) + 3
    lines = [f"{'':<10}{'grid':<{width}}{'mean distance':<20}{'effective positions':<22}outside 3 x 3"]
    for layer, (sides, stats) in layers.items():
        uniform = uniform_attention_stats(*sides)
        distance = f"{stats.distance:.2f} ({uniform.distance:.2f})"
        positions = f"{stats.effective_positions:.1f} ({uniform.effective_positions:.0f})"
        outside = f"{stats.non_local_share:.0%} ({uniform.non_local_share:.0%})"
        lines.append(f"{layer:<10}{grids[layer]:<{width}}{distance:<20}{positions:<22}{outside}")
    return "\n".join(lines)
