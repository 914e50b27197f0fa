"""Procedurally drawn toy faces: data for a first run, with long-range dependencies for attention to learn.

Every face is symmetric; its two eyes have one color, and its brows have the color of the hair.
"""

import colorsys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 2  # faces are drawn at twice the size and reduced, for smooth edges
HAIR_LENGTHS = {"short": 0.0, "medium": 0.2, "long": 0.42}  # the classes; below the middle of the head


class Traits(NamedTuple):
    """What a face is drawn from first: colors in RGB, lengths and positions in image widths."""

    background: tuple[int, int, int]
    middle: float  # the axis of symmetry
    skin_tone: tuple[float, float, float]  # hue, saturation, value
    hair: tuple[int, int, int]
    iris: tuple[int, int, int]
    half_width: float
    half_height: float
    hair_length: float  # one of HAIR_LENGTHS


def hair_length(seed: int, index: int) -> str:
    """Return the name of the hair length, a key of `HAIR_LENGTHS`, of face number `index` of a seed."""
    length = _draw_traits(np.random.default_rng([seed, index])).hair_length
    return next(name for name, value in HAIR_LENGTHS.items() if value == length)


def draw_face(seed: int, index: int, size: int) -> Image.Image:
    """Draw face number `index` of a seed as an RGB Pillow image of size x size pixels.

    The result depends only on the arguments, and is the same face at every size. The function is long because the parts
    draw their random numbers from one generator in turn: their order determines the pixels.
    """
    random = np.random.default_rng([seed, index])
    background, middle, skin_tone, hair, iris, half_width, half_height, length = _draw_traits(random)
    canvas = size * SUPERSAMPLING
    image = Image.new("RGB", (canvas, canvas), background)
    draw = ImageDraw.Draw(image)
    skin, shade = _rgb(*skin_tone), _rgb(skin_tone[0], skin_tone[1], skin_tone[2] * 0.8)
    chin = 0.54 + half_height

    def box(left: float, top: float, right: float, bottom: float) -> list[float]:
        return [left * canvas, top * canvas, right * canvas, bottom * canvas]

    def ellipse(x: float, y: float, rx: float, ry: float, fill: tuple[int, int, int]) -> None:
        draw.ellipse(box(x - rx, y - ry, x + rx, y + ry), fill=fill)

    def pair(dx: float, y: float, rx: float, ry: float, fill: tuple[int, int, int]) -> None:
        ellipse(middle - dx, y, rx, ry, fill)
        ellipse(middle + dx, y, rx, ry, fill)

    # Behind the face: long or short hair, neck, shirt.
    ellipse(middle, 0.42, half_width * 1.22, half_height * 1.05, hair)
    if length:
        draw.rectangle(box(middle - half_width * 1.22, 0.42, middle + half_width * 1.22, 0.42 + length), fill=hair)
    draw.rectangle(box(middle - 0.1, 0.7, middle + 0.1, 1), fill=shade)
    ellipse(middle, 1.08, 0.42, 0.17, _color(random, (0, 1), (0.4, 1), (0.3, 0.9)))

    # The face, and a fringe within its outline.
    ellipse(middle, 0.54, half_width, half_height, skin)
    pair(half_width, 0.55, 0.035, 0.06, skin)
    fringe = random.uniform(0.22, 0.34)
    top = 0.54 - half_height
    draw.chord(box(middle - half_width, top, middle + half_width, top + 2 * fringe), 180, 360, fill=hair)

    eye_dx, eye_y, eye_size = random.uniform(0.095, 0.125), random.uniform(0.48, 0.52), random.uniform(0.04, 0.055)
    pair(eye_dx, eye_y, eye_size * 1.25, eye_size, (250, 250, 250))
    pair(eye_dx, eye_y, eye_size * 0.8, eye_size * 0.8, iris)
    pair(eye_dx, eye_y, eye_size * 0.35, eye_size * 0.35, (15, 15, 20))
    pair(eye_dx, eye_y - eye_size - 0.035, eye_size * 1.3, 0.014, hair)  # brows

    ellipse(middle, 0.62, 0.028, 0.045, shade)  # nose
    smile, lips = random.uniform(0.02, 0.06), _color(random, (0.94, 1), (0.5, 0.8), (0.5, 0.85))
    mouth_width = random.uniform(0.07, 0.12)
    mouth = box(middle - mouth_width, chin - 0.16 - smile, middle + mouth_width, chin - 0.16 + smile)
    draw.chord(mouth, 0, 180, fill=lips)
    return image.resize((size, size), Image.Resampling.BOX)


def _draw_traits(random: np.random.Generator) -> Traits:
    return Traits(
        background=_color(random, (0, 1), (0.1, 0.5), (0.3, 0.9)),
        middle=random.uniform(0.45, 0.55),
        skin_tone=(random.uniform(0.04, 0.1), random.uniform(0.3, 0.6), random.uniform(0.5, 0.98)),
        hair=_color(random, (0, 0.13), (0.3, 0.9), (0.1, 0.8)),
        iris=_color(random, (0, 1), (0.6, 1), (0.4, 0.9)),
        half_width=random.uniform(0.23, 0.29),
        half_height=random.uniform(0.31, 0.37),
        hair_length=random.choice([*HAIR_LENGTHS.values()]),
    )


def _color(random: np.random.Generator, hue: tuple, saturation: tuple, value: tuple) -> tuple[int, int, int]:
    """Draw an RGB color from ranges of hue, saturation and value, each within [0, 1]."""
    return _rgb(*(random.uniform(*limits) for limits in (hue, saturation, value)))


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
