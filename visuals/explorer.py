"""The attention explorer: an HTML page that shows, for the pixel under the mouse, its attention map in every layer.

    page = explorer_page([AttentionSample("generated", images, {"G attn1": maps1, "G attn2": maps2})], "step 1000")
    Path("attention.html").write_text(page, encoding="utf-8")

The page is a single file and works offline. Its template is `explorer.html` in this folder.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from visuals.attention_stats import AttentionSample, grid_sides
from visuals.figures import layer_name, query_points, to_pixels
from visuals.pages import compress, compress_maps, fill_template


def write_explorer(folder: Path, version: str, step: int, samples: Sequence[AttentionSample]) -> Path:
    """Write the page of a checkpoint to `{step}_explorer.html` in `folder`, and return its path."""
    path = folder / f"{step}_explorer.html"
    path.write_text(explorer_page(samples, f"{version}, step {step}"), encoding="utf-8")
    return path


def explorer_page(samples: Sequence[AttentionSample], title: str) -> str:
    """Return the page as HTML.

    Args:
        samples: the images to choose from, with finite maps; any device and dtype.
        title: plain text.
    """
    return fill_template("explorer", title, {"images": [entry for sample in samples for entry in _entries(sample)]})


def _entries(sample: AttentionSample) -> list[dict]:
    """Return what the page's script reads, per image."""
    layers = {name: maps.detach().float().cpu().numpy() for name, maps in sample.maps.items()}  # (B, N, M)
    first = next(iter(layers.values()))
    side, _ = grid_sides(first)
    entries = []
    for index, pixels in enumerate(to_pixels(sample.images.float())):
        row, column = divmod(query_points(first[index], 1)[0], side)  # the most distinctive query
        entries.append({
            "group": sample.name,
            "class": sample.classes[index] if sample.classes else "",
            "size": pixels.shape[0],
            "pixels": compress(pixels.tobytes()),
            "query": ((column + 0.5) / side, (row + 0.5) / side),  # x and y of its center, as fractions of the image
            "layers": [_layer_entry(name, maps[index]) for name, maps in layers.items()],
        })  # fmt: skip
    return entries


def _layer_entry(name: str, maps: np.ndarray) -> dict:
    """Return what the page's script reads of a layer's maps (N, M) of one image."""
    query_side, key_side = grid_sides(maps)
    return {"name": layer_name(name), "querySide": query_side, "keySide": key_side, "data": compress_maps(maps)}
