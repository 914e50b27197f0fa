"""Is it memorising? The training images that are nearest to what a generator makes."""

from typing import NamedTuple

import torch
from torch import Tensor

from data_loader import to_model_range
from utils import progress

CHUNK = 2048  # training images compared at a time


class Nearest(NamedTuple):
    """For each of K queries the M nearest training images, nearest first."""

    indices: Tensor  # (K, M), into the training images
    distances: Tensor  # (K, M): root mean square over pixels and channels, of values in [-1, 1]


def nearest_images(queries: Tensor, images: Tensor, count: int) -> Nearest:
    """Compares pixels with every training image.

    Args:
        queries: (K, 3, S, S) in [-1, 1].
        images: (N, S, S, 3) uint8, may be memory-mapped; only `CHUNK` of them are in memory as floats.
        count: M, how many to return for each query, at most N.
    """
    queries = queries.flatten(1).float()  # (K, 3 * S * S)
    best = Nearest(
        torch.zeros(len(queries), 0, dtype=torch.long, device=queries.device),
        torch.zeros(len(queries), 0, device=queries.device),
    )
    for start in progress(range(0, len(images), CHUNK), "nearest training images", "chunk"):
        chunk = to_model_range(images[start : start + CHUNK].to(queries.device)).flatten(1)
        distances = torch.cdist(queries, chunk) / queries.shape[1] ** 0.5  # (K, CHUNK)
        indices = torch.arange(start, start + len(chunk), device=queries.device).expand_as(distances)
        distances, indices = torch.cat([best.distances, distances], 1), torch.cat([best.indices, indices], 1)
        order = distances.argsort(dim=1, stable=True)[:, :count]
        best = Nearest(indices.gather(1, order), distances.gather(1, order))
    return best
