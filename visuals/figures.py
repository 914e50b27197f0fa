"""Figures as Pillow images: sample grids, animations, nearest training images, attention maps.

Images are tensors (B, 3, S, S) in [-1, 1]; attention maps are (B, N, M), see `visuals/attention_stats.py`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils import to_uint8
from visuals.attention_stats import AttentionSample, grid_sides
from visuals.curves import import_matplotlib

QUERY_COLORS = ((255, 75, 75), (60, 200, 255), (120, 230, 90), (255, 200, 40))  # one per query
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32)  # dark to bright
TILE, GAP, CAPTION = 144, 8, 16  # pixels
CLASS_ROWS = 8  # rows at most of a grid with a row for each class
TEXT, MUTED, LIGHT, BACKGROUND = (30, 30, 30), (110, 110, 110), (230, 230, 230), (255, 255, 255)


def to_pixels(images: Tensor) -> np.ndarray:
    """Convert (B, 3, S, S) in [-1, 1] to (B, S, S, 3) uint8."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def sample_grid(
    images: Tensor, columns: int | None = None, row_names: Sequence[str] = (), column_names: Sequence[str] = ()
) -> Image.Image:
    """Place images (B, 3, S, S) side by side with 2 black pixels around each.

    Like torchvision's `make_grid`, which draws no border around a single image.

    Args:
        columns: images per row; by default B / R for R named rows, otherwise as near to a square as B allows.
        row_names: written at the left of the rows; see `shorten`.
        column_names: written above the columns.
    """
    pixels, gap = to_pixels(images), 2
    count, size = pixels.shape[:2]
    columns = columns or (count // len(row_names) if row_names else math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    font = _font(13)
    margin = max([0, *(GAP + math.ceil(font.getlength(name)) for name in row_names)])
    header = CAPTION + GAP if column_names else 0
    grid = Image.new("RGB", (margin + columns * (size + gap) + gap, header + rows * (size + gap) + gap))
    for index, tile in enumerate(pixels):
        row, column = divmod(index, columns)
        grid.paste(Image.fromarray(tile), (margin + gap + column * (size + gap), header + gap + row * (size + gap)))
    draw = ImageDraw.Draw(grid)
    for row, name in enumerate(row_names):
        draw.text((GAP // 2, header + gap + row * (size + gap) + size // 2), name, LIGHT, font, anchor="lm")
    for column, name in enumerate(column_names):
        draw.text((margin + gap + column * (size + gap) + size // 2, header // 2), name, LIGHT, font, anchor="mm")
    return grid


@lru_cache
def shorten(name: str) -> str:
    r"""Return a class's name as figures show it: the middle is replaced by "..." if it is wider than a tile.

    Characters that the font lacks become \u65e5 etc.: as boxes they would all look the same.
    """
    known = import_matplotlib().ft2font.FT2Font(_font_path()).get_charmap()
    name = "".join(char if char.isprintable() and ord(char) in known else ascii(char)[1:-1] for char in name)
    shown, left = name, len(name)
    while _font(12).getlength(shown) > TILE:
        left -= 1
        shown = f"{name[: (left + 1) // 2]}...{name[len(name) - left // 2 :]}"
    return shown


def save_animation(path: Path, frames: Sequence[Image.Image], seconds: float) -> None:
    """Write RGB images of one size as a looping GIF: `seconds` per frame, at least 1.5 s for the last one."""
    palette = [frame.quantize(dither=Image.Dither.NONE) for frame in frames]  # dithering would double the file size
    durations = [round(seconds * 1000)] * (len(frames) - 1) + [max(1500, round(seconds * 1000))]
    palette[0].save(path, format="GIF", save_all=True, append_images=palette[1:], duration=durations, loop=0)


def read_picture(path: Path) -> Image.Image | None:
    """Return a PNG file in RGB; None if it is missing or damaged."""
    with suppress(Exception), Image.open(path, formats=["PNG"]) as file:  # Pillow's readers raise nearly any type
        return file.convert("RGB")
    return None


def progress_frames(grids: Mapping[int, Path], width: int = 400) -> list[Image.Image]:
    """Return sample grids, given by step, scaled to one size with the step below each; skip unreadable files."""
    frames = []
    for step, path in grids.items():
        grid = read_picture(path)
        if grid is None:
            continue
        height = round(grid.height * width / grid.width)
        frame = Image.new("RGB", (width, height + 24), BACKGROUND)
        frame.paste(grid.resize((width, height), Image.Resampling.LANCZOS))
        ImageDraw.Draw(frame).text((GAP, height + 3), f"step {step:,}", TEXT, _font(15))
        frames.append(frame)
    return [frame for frame in frames if frame.size == frames[-1].size]  # --batch_size may have changed


def comparison_figure(
    images: Tensor, titles: Sequence[str], captions: Sequence[Sequence[str]], footer: str
) -> Image.Image:
    """Draw rows of images, the first of each apart from those it is compared with.

    Args:
        images: (K, M, 3, S, S).
        titles: of the columns, from the first on.
        captions: M for each row, below its images.
        footer: one or more lines.
    """
    side, header = 96, 34
    height, lines = side + CAPTION + GAP, footer.count("\n") + 1
    lefts = [GAP + column * (side + GAP) + GAP * (column > 0) for column in range(images.shape[1])]
    figure = Image.new("RGB", (lefts[-1] + side + GAP, header + len(images) * height + 18 * lines + GAP), BACKGROUND)
    draw = ImageDraw.Draw(figure)
    for left, title in zip(lefts, titles, strict=False):
        draw.text((left, 9), title, TEXT, _font(12))
    for row, names in enumerate(captions):
        top = header + row * height
        for left, pixels, name in zip(lefts, to_pixels(images[row]), names, strict=True):
            figure.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), (left, top))
            draw.text((left, top + side + 1), name, MUTED, _font(12))
    draw.text((GAP, figure.height - 18 * lines - 4), footer, MUTED, _font(13), spacing=4)
    return figure


def projection_figure(
    images: Tensor, course: Tensor, rmse: Tensor, names: Sequence[str], steps: Sequence[str], footer: str
) -> Image.Image:
    """Draw a row per image: the image, what G made of its z after some steps, and how they differ at last.

    Args:
        images: (B, 3, S, S), with `names` below.
        course: (B, K, 3, S, S), with `steps` above and rmse (B, K) below.
        footer: one or more lines.
    """
    difference = (course[:, -1] - images) / 2
    rows = torch.cat([images[:, None], course, difference[:, None]], 1)
    captions = [[name, *(f"{value:.3f}" for value in row), ""] for name, row in zip(names, rmse.tolist(), strict=True)]
    note = "Difference: half of the last image minus the first; gray is none."
    return comparison_figure(rows, ["image", *steps, "difference"], captions, f"{footer}\n{note}")


def attention_figures(samples: Sequence[AttentionSample], step: int) -> dict[str, Image.Image]:
    """Return a figure per attention layer under names such as "G_attn1"; D's are of real images if there are any."""
    layers = {layer: (sample, maps) for sample in samples for layer, maps in sample.maps.items()}  # the last sample's
    return {
        layer.replace(" ", "_"): attention_figure(
            sample.images, maps, f"{layer_name(layer)} on {sample.name} images, step {step}", sample.classes
        )
        for layer, (sample, maps) in layers.items()
    }


def layer_name(layer: str) -> str:
    """Spell out the network in a layer's name: "G attn1" becomes "Generator attn1"."""
    return layer.replace("G ", "Generator ").replace("D ", "Discriminator ")


def attention_figure(images: Tensor, attention: Tensor, title: str, classes: Sequence[str] = ()) -> Image.Image:
    """Draw a row per image: the image with its queries marked, then the attention map of each query.

    Args:
        images: (B, 3, S, S).
        attention: (B, N, M).
        classes: the name of each image's class, written below it.
    """
    attention = attention.cpu().numpy()
    keys = attention.shape[2]
    query_side, key_side = grid_sides(attention)
    if query_side == key_side:
        grid, all_keys = f"{key_side} x {key_side} positions", f"all {keys} positions"
    else:
        grid, all_keys = f"{query_side} x {query_side} queries over {key_side} x {key_side} keys", f"all {keys} keys"
    header, footer, height = 58, 48, TILE + CAPTION + GAP
    width = (TILE + GAP) * (1 + len(QUERY_COLORS)) + GAP
    figure = Image.new("RGB", (width, header + len(images) * height + footer), BACKGROUND)
    draw = ImageDraw.Draw(figure)
    draw.text((GAP, 8), title, TEXT, _font(17))
    draw.text((GAP, 33), "image with queries", MUTED, _font(13))
    draw.text((TILE + 2 * GAP, 33), f"attention map of each query ({grid})", MUTED, _font(13))
    for row, (pixels, maps) in enumerate(zip(to_pixels(images), attention, strict=True)):
        top = header + row * height
        image = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC)
        colors = dict(zip(query_points(maps, len(QUERY_COLORS)), QUERY_COLORS, strict=False))
        figure.paste(_mark_queries(image, query_side, colors), (GAP, top))
        for name in classes[row : row + 1]:
            draw.text((GAP, top + TILE + 1), shorten(name), MUTED, _font(12))
        for column, (query, color) in enumerate(colors.items(), start=1):
            left = GAP + column * (TILE + GAP)
            heatmap = overlay(image, maps[query].reshape(key_side, key_side))
            figure.paste(_mark_queries(heatmap, query_side, {query: color}), (left, top))
            draw.text((left, top + TILE + 1), f"max {maps[query].max() * keys:.1f}x uniform", MUTED, _font(12))
    _draw_legend(figure, (GAP, figure.height - footer + 6), f"1x uniform = 1/{keys}: uniform attention over {all_keys}")
    return figure


def query_points(maps: np.ndarray, count: int) -> list[int]:
    """Select distinctive queries: their maps (N, M) differ most from the mean map, and they are not close together.

    Greedy: the position whose map has the largest Kullback-Leibler divergence from the mean map, then the next at least
    a quarter of the image away from all chosen ones. Positions at the border are skipped, because the convolutions'
    padding alone makes their maps different. Returns up to `count` positions in 0 ... N-1.
    """
    side = math.isqrt(len(maps))
    maps = maps.astype(np.float64) + 1e-12
    score = (maps * np.log(maps / maps.mean(axis=0))).sum(axis=1)
    rows, columns = np.divmod(np.arange(len(maps)), side)
    margin = side // 8
    score[np.minimum.reduce([rows, columns, side - 1 - rows, side - 1 - columns]) < margin] = -np.inf
    chosen: list[int] = []
    while len(chosen) < count and np.isfinite(score).any():
        best = int(score.argmax())
        chosen.append(best)
        score[(rows - rows[best]) ** 2 + (columns - columns[best]) ** 2 < (side / 4) ** 2] = -np.inf
        score[best] = -np.inf
    return chosen


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Draw a map (H, W) in color over an RGB image in gray.

    Color is the square root of map / maximum: trained maps are so peaked that on a linear scale only a few dots show.
    """
    relative = Image.fromarray(np.sqrt(heat / heat.max()).astype(np.float32))
    relative = relative.resize(image.size, Image.Resampling.BOX)  # no smoothing: a peak of one cell stays visible
    strength = np.asarray(relative).clip(0, 1)[..., None]  # (S, S, 1)
    gray = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    blended = 140 * gray * (1 - strength) + _heat_color(strength[..., 0]) * strength * (0.6 + 0.4 * gray)
    return Image.fromarray(blended.clip(0, 255).astype(np.uint8))


def _heat_color(strength: np.ndarray) -> np.ndarray:
    """Map [0, 1] to RGB of the heat scale, (..., 3)."""
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(strength, stops, HEAT[:, channel]) for channel in range(3)], axis=-1)


def _mark_queries(image: Image.Image, side: int, colors: Mapping[int, tuple[int, int, int]]) -> Image.Image:
    """Return a copy with a ring, colored on black, around each query's cell of the side x side grid."""
    marked = image.copy()
    draw = ImageDraw.Draw(marked)
    for query, color in colors.items():
        row, column = divmod(query, side)
        x, y = (column + 0.5) * image.width / side, (row + 0.5) * image.height / side
        for radius, ink, width in ((8, (0, 0, 0), 5), (7, color, 3)):
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=ink, width=width)
    return marked


def _draw_legend(figure: Image.Image, corner: tuple[int, int], unit: str) -> None:
    """Draw the color scale, how colors are computed, and the unit of the captions."""
    left, top = corner
    ramp = _heat_color(np.linspace(0, 1, TILE))[None].repeat(12, axis=0)
    figure.paste(Image.fromarray(ramp.astype(np.uint8)), corner)
    draw = ImageDraw.Draw(figure)
    for offset, label, anchor in ((0, "0", "la"), (TILE // 2, "1/4 max", "ma"), (TILE, "max", "ra")):
        draw.text((left + offset, top + 14), label, MUTED, _font(12), anchor=anchor)
    text = f"color = sqrt(attention / max), where max is the maximum of that map\n{unit}"
    draw.text((left + TILE + GAP, top - 3), text, MUTED, _font(13), spacing=4)


@lru_cache
def _font(size: int) -> ImageFont.ImageFont:
    """Return the font that comes with Matplotlib: Pillow's own has no letters beyond ASCII."""
    return ImageFont.truetype(_font_path(), size)


def _font_path() -> str:
    return os.path.join(import_matplotlib().get_data_path(), "fonts/ttf/DejaVuSans.ttf")
