"""Pictures to look at: sample grids, and figures of what the attention looks at.

Images are tensors (B, 3, S, S) in [-1, 1]; attention maps are tensors (B, N, N), row i being what position i looks at.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from visuals.attention_stats import AttentionSample

MARKS = ((255, 75, 75), (60, 200, 255), (120, 230, 90), (255, 200, 40))  # one colour for each query point
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32)  # dark to bright
TILE, GAP, CAPTION = 144, 8, 16  # pixels
INK, FAINT, PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)


def to_pixels(images: Tensor) -> np.ndarray:
    """(B, 3, S, S) in [-1, 1] -> (B, S, S, 3) uint8."""
    return images.permute(0, 2, 3, 1).add(1).mul(127.5).round().clamp(0, 255).byte().cpu().numpy()


def sample_grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Image.Image:
    """Images (B, 3, S, S) side by side in so many columns, by default as near to a square as B allows."""
    pixels = to_pixels(images)
    count, size = pixels.shape[:2]
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = Image.new("RGB", (columns * (size + gap) + gap, rows * (size + gap) + gap))
    for index, tile in enumerate(pixels):
        row, column = divmod(index, columns)
        grid.paste(Image.fromarray(tile), (gap + column * (size + gap), gap + row * (size + gap)))
    return grid


def animation(path: Path, frames: Sequence[Image.Image], seconds: float) -> None:
    """Writes RGB pictures of one size as a GIF without end that shows each so long, and the last one a while longer."""
    palette = [frame.quantize(dither=Image.Dither.NONE) for frame in frames]  # dithered, it would be twice as large
    durations = [round(seconds * 1000)] * (len(frames) - 1) + [max(1500, round(seconds * 1000))]
    palette[0].save(path, format="GIF", save_all=True, append_images=palette[1:], duration=durations, loop=0)


def progress_frames(grids: dict[int, Path], width: int = 400) -> list[Image.Image]:
    """Sample grids by step, as pictures of one size with the step written below; damaged files are left out."""
    frames = []
    for step, path in grids.items():
        try:
            grid = Image.open(path).convert("RGB")
        except OSError:  # being written, or cut off
            continue
        height = round(grid.height * width / grid.width)
        frame = Image.new("RGB", (width, height + 24), PAPER)
        frame.paste(grid.resize((width, height), Image.Resampling.LANCZOS))
        ImageDraw.Draw(frame).text((GAP, height + 3), f"step {step:,}", INK, _font(15))
        frames.append(frame)
    return [frame for frame in frames if frame.size == frames[-1].size]  # --batch_size may have changed


def nearest_figure(samples: Tensor, neighbours: Tensor, distances: Tensor, footer: str) -> Image.Image:
    """A row for each sample: the sample, then its nearest training images with their distances.

    Args:
        samples: (K, 3, S, S) in [-1, 1].
        neighbours: (K, M, 3, S, S) in [-1, 1], nearest first.
        distances: (K, M).
        footer: what the distances mean, in lines.
    """
    side, count = 96, neighbours.shape[1]
    header, width = 34, (96 + GAP) * (1 + count) + 2 * GAP
    lines = footer.count("\n") + 1
    figure = Image.new("RGB", (width, header + len(samples) * (side + CAPTION + GAP) + 18 * lines + GAP), PAPER)
    draw = ImageDraw.Draw(figure)
    draw.text((GAP, 8), "a sample", INK, _font(14))
    draw.text((side + 3 * GAP, 8), "its nearest training images", INK, _font(14))
    for row, (sample, near, far) in enumerate(zip(samples, neighbours, distances.tolist(), strict=True)):
        top = header + row * (side + CAPTION + GAP)
        for column, pixels in enumerate(to_pixels(torch.cat([sample[None], near]))):
            left = GAP + column * (side + GAP) + GAP * (column > 0)
            tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
            figure.paste(tile, (left, top))
            if column:
                draw.text((left, top + side + 1), f"{far[column - 1]:.3f}", FAINT, _font(12))
    draw.text((GAP, figure.height - 18 * lines - 4), footer, FAINT, _font(13), spacing=4)
    return figure


def attention_figures(shown: Sequence[AttentionSample], step: int) -> dict[str, Image.Image]:
    """A figure for each attention layer, under names such as "G_attn1": of D on real images where there are any.

    Args:
        shown: what `look` found.
        step: for the titles.
    """
    layers = {layer: (group, maps) for group in shown for layer, maps in group.maps.items()}  # the last group's
    return {
        layer.replace(" ", "_"): attention_figure(
            group.images, maps, f"{layer_name(layer)} on {group.name} images after step {step}"
        )
        for layer, (group, maps) in layers.items()
    }


def layer_name(layer: str) -> str:
    """ "G attn1" in full."""
    return layer.replace("G ", "Generator ").replace("D ", "Discriminator ")


def attention_figure(images: Tensor, attention: Tensor, title: str) -> Image.Image:
    """A row for each image: the image with marked query points, then for each point what it looks at.

    Args:
        images: (B, 3, S, S) in [-1, 1].
        attention: (B, N, N), its rows summing to 1, over a grid of sqrt(N) x sqrt(N) positions.
        title: the figure's first line.
    """
    attention = attention.cpu().numpy()
    side = math.isqrt(attention.shape[1])
    queries = [query_points(maps, len(MARKS)) for maps in attention]
    header, footer = 58, 48
    width = (TILE + GAP) * (1 + len(MARKS)) + GAP
    figure = Image.new("RGB", (width, header + len(images) * (TILE + CAPTION + GAP) + footer), PAPER)
    draw = ImageDraw.Draw(figure)
    draw.text((GAP, 8), title, INK, _font(17))
    draw.text((GAP, 33), "the image", FAINT, _font(13))
    draw.text(
        (TILE + 2 * GAP, 33),
        f"what each marked point looks at, on a grid of {side} x {side} positions",
        FAINT,
        _font(13),
    )
    for row, (pixels, maps, points) in enumerate(zip(to_pixels(images), attention, queries, strict=True)):
        image = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC)
        top = header + row * (TILE + CAPTION + GAP)
        figure.paste(_mark(image, side, dict(zip(points, MARKS, strict=False))), (GAP, top))
        for column, (point, colour) in enumerate(zip(points, MARKS, strict=False), start=1):
            left = GAP + column * (TILE + GAP)
            figure.paste(_mark(overlay(image, maps[point].reshape(side, side)), side, {point: colour}), (left, top))
            draw.text((left, top + TILE + 1), f"{maps[point].max() * len(maps):.1f}x", FAINT, _font(12))
    _draw_scale(figure, (TILE + 2 * GAP, figure.height - footer + 6))
    return figure


def query_points(maps: np.ndarray, count: int) -> list[int]:
    """The positions that tell most: their maps (N, N) differ most from the average map, and they lie apart.

    Greedy: the position whose map has the largest Kullback-Leibler divergence from the mean map, then the next at least
    a quarter of the image away from all so far. Positions at the border, where the padding of the convolutions makes
    maps of their own, are left out. Returns up to `count` positions in 0 ... N-1.
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
    """A map (H, W) laid over an RGB image in colour; the image shows through in grey.

    Brightness is the square root of the share of the map's maximum: trained maps are so peaked that without it a few
    dots would be all that shows.
    """
    relative = Image.fromarray(np.sqrt(heat / heat.max()).astype(np.float32))
    relative = relative.resize(image.size, Image.Resampling.BOX)  # the cells as they are: a peak stays visible
    strength = np.asarray(relative).clip(0, 1)[..., None]  # (S, S, 1)
    grey = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    blended = 140 * grey * (1 - strength) + _colour(strength[..., 0]) * strength * (0.6 + 0.4 * grey)
    return Image.fromarray(blended.clip(0, 255).astype(np.uint8))


def _colour(strength: np.ndarray) -> np.ndarray:
    """[0, 1] to RGB of the heat scale, (..., 3)."""
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(strength, stops, HEAT[:, channel]) for channel in range(3)], axis=-1)


def _mark(image: Image.Image, side: int, points: dict[int, tuple[int, int, int]]) -> Image.Image:
    """A ring around each point's cell of the side x side grid."""
    marked = image.copy()
    draw = ImageDraw.Draw(marked)
    radius = 6
    for point, colour in points.items():
        row, column = divmod(point, side)
        x, y = (column + 0.5) * image.width / side, (row + 0.5) * image.height / side
        for grow, ink, width in ((2, (0, 0, 0), 5), (1, colour, 3)):
            draw.ellipse(
                [x - radius - grow, y - radius - grow, x + radius + grow, y + radius + grow], outline=ink, width=width
            )
    return marked


def _draw_scale(figure: Image.Image, corner: tuple[int, int]) -> None:
    """The colour scale with its meaning."""
    ramp = _colour(np.linspace(0, 1, TILE))[None].repeat(12, axis=0)
    figure.paste(Image.fromarray(ramp.astype(np.uint8)), corner)
    draw = ImageDraw.Draw(figure)
    for line, text in enumerate(
        (
            "dark: ignored; bright: the map's maximum; halfway: a quarter of it.",
            "2.0x: that maximum is twice what looking evenly at the whole image gives.",
        )
    ):
        draw.text((corner[0] + TILE + GAP, corner[1] - 3 + 16 * line), text, FAINT, _font(13))


@lru_cache
def _font(size: int) -> ImageFont.ImageFont:
    """Pillow's own, which takes a while to unpack."""
    return ImageFont.load_default(size)
