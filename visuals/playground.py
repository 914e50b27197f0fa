"""The playground: an HTML page to walk through a grid of latent interpolations.

    grids = generate_grids(G, z, [("", None)])  # z (4, z_dim)
    Path("playground.html").write_text(playground_page(grids, "step 1000"), encoding="utf-8")

The four corners of the grid are given, everything between them is slerp. The page is a single file and works offline.
Its template is `playground.html` in this folder.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from networks.latents import slerp
from utils import progress
from visuals.figures import layer_name, to_pixels
from visuals.pages import compress, compress_maps, fill_template

MAX_SIDE = 16  # tiles in a row of the grid
PAGE_BYTES = 5_700_000  # for the tiles of all classes; what else is in a page takes less than 100 kB
BATCH = 32  # images at once; an attention map of 1024 x 1024 takes 4 MiB for each


class Grid(NamedTuple):
    """The grid of one class: T = side * side tiles, row by row."""

    class_name: str  # "" without classes
    pixels: np.ndarray  # (T, S, S, 3) uint8
    attention: dict[str, np.ndarray]  # "G attn1": (T, M) float32, the mean over all queries; by layer


def generate_grids(G: nn.Module, corners: Tensor, classes: Sequence[tuple[str, int | None]]) -> list[Grid]:
    """Return the grid of each class, of the same z in each.

    Args:
        G: in evaluation mode.
        corners: see `latent_grid`.
        classes: name and number of each class; [("", None)] for a network without classes.
    """
    image, *maps = G(corners[:1], _labels(classes[0][1], corners[:1]), return_attention=True)
    tile_bytes = image.numel() + sum(attention.shape[2] for attention in maps)
    z = latent_grid(corners, grid_side(tile_bytes, len(classes)))
    return [_generate(G, z, name, number) for name, number in classes]


def grid_side(tile_bytes: int, classes: int) -> int:
    """Return the tiles in a row of the grid, at most 16: as many as keep the page below 6 MB.

    Args:
        tile_bytes: a tile's pixels and attention maps, before base64, which makes 4/3 of them.
        classes: how many grids the page has.
    """
    return min(MAX_SIDE, math.isqrt(PAGE_BYTES * 3 // (4 * tile_bytes * classes)))


def latent_grid(corners: Tensor, side: int) -> Tensor:
    """Return z (side * side, z_dim), row by row: slerp along the top and the bottom row, then down each column.

    Args:
        corners: (4, z_dim): top left, top right, bottom left, bottom right.
    """
    top, bottom = slerp(corners[::2], corners[1::2], side)  # each (side, z_dim)
    return slerp(top, bottom, side).transpose(0, 1).flatten(0, 1)


def playground_page(grids: Sequence[Grid], title: str) -> str:
    """Return the page as HTML; `title` is plain text."""
    count, size = grids[0].pixels.shape[:2]
    entries = [
        {
            "name": grid.class_name,
            "pixels": compress(grid.pixels.tobytes()),
            "layers": [
                {"name": layer_name(name), "keySide": math.isqrt(values.shape[1]), "data": compress_maps(values)}
                for name, values in grid.attention.items()
            ],
        }
        for grid in grids
    ]
    data = {"side": math.isqrt(count), "size": size, "classes": entries}
    return fill_template("playground", title, data)


def _generate(G: nn.Module, z: Tensor, class_name: str, number: int | None) -> Grid:
    """Return the grid of a class, of z (T, z_dim)."""
    pixels, means = [], []
    for batch in progress(z.split(BATCH), f"playground {class_name}".strip(), "batch"):
        images, *maps = G(batch, _labels(number, batch), return_attention=True)
        pixels.append(to_pixels(images))
        means.append([attention.mean(1).cpu().numpy() for attention in maps])  # (B, M)
    layers = {f"G attn{index}": np.concatenate(parts) for index, parts in enumerate(zip(*means, strict=True), start=1)}
    return Grid(class_name, np.concatenate(pixels), layers)


def _labels(number: int | None, z: Tensor) -> Tensor | None:
    """Return labels (B,) for z (B, z_dim), None without classes."""
    return None if number is None else torch.full((len(z),), number, device=z.device)
