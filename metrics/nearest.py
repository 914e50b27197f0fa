"""Training images nearest to generated ones in pixel space: a check for memorization."""

from typing import NamedTuple

import torch
from torch import Tensor

from data_loader import to_model_range
from utils import progress

CHUNK = 2048  # training images compared at a time


class Nearest(NamedTuple):
    """The M nearest training images of each of K queries, nearest first."""

    indices: Tensor  # (K, M), into the training images
    distances: Tensor  # (K, M), root-mean-square error over pixels and channels, of values in [-1, 1]
    mirrored: Tensor  # (K, M), whether it is the mirror image that is so near


def nearest_images(queries: Tensor, images: Tensor, count: int) -> Nearest:
    """Compare each query with every training image and with its mirror image, which `--hflip true` trains on too.

    Args:
        queries: (K, 3, S, S) in [-1, 1].
        images: (N, S, S, 3) uint8, may be memory-mapped; only `CHUNK` of them are in memory as floats.
        count: M, number of neighbors to return for each query; N if that is less.
    """
    both = torch.cat([queries, queries.flip(3)]).flatten(1).float()  # (2 * K, 3 * S * S)
    distances = []  # (2 * K, CHUNK) each
    for start in progress(range(0, len(images), CHUNK), "nearest training images", "chunk"):
        chunk = to_model_range(images[start : start + CHUNK].to(queries.device)).flatten(1)
        distances.append(torch.cdist(both, chunk) / chunk.shape[1] ** 0.5)
    nearer, mirrored = torch.cat(distances, 1).unflatten(0, (2, -1)).min(0)  # (K, N)
    nearest = nearer.topk(min(count, len(images)), largest=False)
    return Nearest(nearest.indices, nearest.values, mirrored.gather(1, nearest.indices).bool())
