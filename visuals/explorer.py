"""The attention explorer: an HTML page on which, for the pixel pointed at, every layer shows where that pixel looks.

    page = explorer_page([AttentionSample("generated", images, {"G attn1": maps1, "G attn2": maps2})], "step 1000")
    Path("attention.html").write_text(page, encoding="utf-8")

The page holds all that it needs and opens from disk, without a network. Its template is `explorer.html`, beside this.
"""

import base64
import html
import json
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from visuals.attention_stats import AttentionSample
from visuals.figures import HEAT, layer_name, query_points, to_pixels

LEVELS = 63  # the highest of 64 levels: six bits a cell, so that even noise of the largest maps makes a small page


def explorer_page(shown: Sequence[AttentionSample], title: str) -> str:
    """The whole page, as HTML.

    Args:
        shown: the groups of images to choose from, of one image or more each. A map's positions are a grid of
            sqrt(N) x sqrt(N), its rows sum to 1; device and dtype are free.
        title: its headline, plain text.

    Raises:
        ValueError: there is no image or no map, or maps and images do not fit.
    """
    samples = [sample for group in shown for sample in _samples(group)]
    if not samples:
        raise ValueError("the explorer needs at least one image")
    data = json.dumps({"heat": HEAT.tolist(), "levels": LEVELS, "samples": samples}, separators=(",", ":"))
    parts = {
        "title": html.escape(title),
        "data": data.replace("<", "\\u003c"),  # no "</script>" nor "<!--" can end or change the script tag it is in
    }
    template = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # one pass: a title may say {{data}}


def write_explorer(folder: Path, version: str, step: int, shown: Sequence[AttentionSample]) -> Path:
    """Writes the page of a version's checkpoint into its attention folder; returns the file, `{step}_explorer.html`."""
    path = folder / f"{step}_explorer.html"
    path.write_text(explorer_page(shown, f"{version}, step {step}"), encoding="utf-8")
    return path


def quantise(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A map (N, N) as levels (N, N) uint8 in 0 ... 63, and the maximum of each row, (N,) float32.

    A level is the nearest to ``63 * sqrt(value / the row's maximum)``, so that ``(level / 63)**2 * maximum`` is the
    value. In that square root, which is what the eye sees as brightness, the error is at most 1/126; in the value it is
    at most ``(2 * sqrt(value / maximum) + 1/126) / 126`` of the row's maximum: 1.6 % at the top, 0.006 % near zero.
    """
    peaks = maps.max(axis=1).astype(np.float32)
    relative = maps / np.where(peaks > 0, peaks, 1)[:, None]
    return np.rint(LEVELS * np.sqrt(relative.clip(0, 1))).astype(np.uint8), peaks


def _samples(group: AttentionSample) -> list[dict]:
    """What the page's script reads of each image of a group."""
    if not group.maps:
        raise ValueError(f"the {group.name} images have no attention maps")
    maps = {name: _as_grid_maps(name, layer, len(group.images)) for name, layer in group.maps.items()}
    first = next(iter(maps.values()))
    return [
        {
            "group": group.name,
            "size": pixels.shape[0],
            "pixels": _pack(pixels.tobytes()),
            "start": _start(first[index]),
            "layers": [
                {"name": layer_name(name), "side": math.isqrt(layer.shape[1]), "data": _pack(*_as_bytes(layer[index]))}
                for name, layer in maps.items()
            ],
        }
        for index, pixels in enumerate(to_pixels(group.images.float()))
    ]


def _as_grid_maps(name: str, maps: Tensor, count: int) -> np.ndarray:
    """The maps of a layer as (B, N, N) float32 on the CPU, once they are known to be maps."""
    positions = maps.shape[-1]
    if maps.shape != (count, positions, positions) or math.isqrt(positions) ** 2 != positions:
        raise ValueError(f"{name}: {count} images need maps ({count}, N, N) with N a square, not {tuple(maps.shape)}")
    values = maps.detach().float().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: its maps hold values that are not finite")
    return values


def _start(maps: np.ndarray) -> tuple[float, float]:
    """Where a look at these maps (N, N) tells most: x and y of that position's centre, as shares of the image."""
    side = math.isqrt(len(maps))
    row, column = divmod(query_points(maps, 1)[0], side)
    return (column + 0.5) / side, (row + 0.5) / side


def _as_bytes(maps: np.ndarray) -> tuple[bytes, bytes]:
    """The rows' maxima, little-endian, then the levels row by row: the order keeps the floats aligned."""
    levels, peaks = quantise(maps)
    return peaks.astype("<f4").tobytes(), levels.tobytes()


def _pack(*parts: bytes) -> str:
    """Deflated, as base64. Short matches are left out (Z_FILTERED): in noise they cost more than they save."""
    deflate = zlib.compressobj(level=9, strategy=zlib.Z_FILTERED)
    return base64.b64encode(deflate.compress(b"".join(parts)) + deflate.flush()).decode("ascii")
