"""The playground: an HTML page to walk through a grid of latent interpolations, and along directions from a corner.

    playground = generate_playground(G, z, directions, [("", None)])  # z (4, z_dim), directions (8, z_dim)
    Path("playground.html").write_text(playground_page(playground, "step 1000"), encoding="utf-8")

The four corners of the grid are given, everything between them is slerp. Sliders move the top left one along each
direction. The page is a single file and works offline. Its template is `playground.html` in this folder.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from networks.latents import latent_lines, slerp
from utils import progress
from visuals.figures import layer_name, to_pixels
from visuals.pages import compress, compress_maps, fill_template

MAX_SIDE = 16  # tiles in a row of the grid
DIRECTIONS = 8  # sliders, at most
REACH = 3.0  # z moves from -REACH to REACH along a direction
MAX_STEPS = 6  # from 0 to REACH
PAGE_BYTES = 7_700_000  # for the tiles of all classes; what else is in a page takes less than 100 kB
BATCH = 32  # images at once; an attention map of 1024 x 1024 takes 4 MiB for each


class Grid(NamedTuple):
    """The grid of one class: T = side * side tiles, row by row, then F of the top left one moved along directions."""

    class_name: str  # "" without classes
    pixels: np.ndarray  # (T + F, S, S, 3) uint8
    attention: dict[str, np.ndarray]  # "G attn1": (T + F, M) float32, the mean over all queries; by layer


class Playground(NamedTuple):
    """What the page shows: the grid of each class, all of the same z, with F = directions * 2 * steps."""

    side: int
    directions: int
    steps: int  # from 0 to either end of a direction
    grids: list[Grid]


def generate_playground(
    G: nn.Module, corners: Tensor, directions: Tensor, classes: Sequence[tuple[str, int | None]]
) -> Playground:
    """Generate the images and maps of the page.

    Args:
        G: in evaluation mode.
        corners: see `latent_grid`.
        directions: at most `DIRECTIONS`, (K, z_dim), of length 1.
        classes: name and number of each class; [("", None)] for a network without classes.
    """
    image, *maps = G(corners[:1], _labels(classes[0][1], corners[:1]), return_attention=True)
    side, steps = grid_size(image.numel() + sum(attention.shape[2] for attention in maps), len(classes))
    amounts = [REACH * step / steps for step in range(-steps, steps + 1) if step]  # at 0 it is the corner's tile
    z = torch.cat([latent_grid(corners, side), latent_lines(corners[0], directions, amounts).flatten(0, 1)])
    grids = [_generate(G, z, name, number) for name, number in classes]
    return Playground(side, len(directions) if steps else 0, steps, grids)


def grid_size(tile_bytes: int, classes: int) -> tuple[int, int]:
    """Return the tiles in a row of the grid and the steps from 0 to either end of a slider: a page below 8 MB.

    Sliders have at most a third of the tiles, and where that is not enough for a step, as at size 256, there are none.

    Args:
        tile_bytes: a tile's pixels and attention maps, before base64, which makes 4/3 of them.
        classes: how many grids the page has.
    """
    tiles = PAGE_BYTES * 3 // (4 * tile_bytes * classes)
    steps = min(MAX_STEPS, tiles // (3 * 2 * DIRECTIONS))
    return min(MAX_SIDE, math.isqrt(tiles - 2 * DIRECTIONS * steps)), steps


def latent_grid(corners: Tensor, side: int) -> Tensor:
    """Return z (side * side, z_dim), row by row: slerp along the top and the bottom row, then down each column.

    Args:
        corners: (4, z_dim): top left, top right, bottom left, bottom right.
    """
    top, bottom = slerp(corners[::2], corners[1::2], side)  # each (side, z_dim)
    return slerp(top, bottom, side).transpose(0, 1).flatten(0, 1)


def playground_page(playground: Playground, title: str, corner: str = "", all_classes: int = 0) -> str:
    """Return the page as HTML.

    Args:
        title: plain text.
        corner: what the top left corner is, plain text; "" for a sample.
        all_classes: how many there are; the page may have fewer.
    """
    side, directions, steps, grids = playground
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
    data = {"side": side, "size": grids[0].pixels.shape[1], "directions": directions, "steps": steps, "reach": REACH,
            "corner": corner, "classes": entries, "allClasses": all_classes}  # fmt: skip
    return fill_template("playground", title, data)


def _generate(G: nn.Module, z: Tensor, class_name: str, number: int | None) -> Grid:
    """Return the grid of a class, of z (T + F, z_dim)."""
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
