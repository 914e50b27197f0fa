"""Faces drawn by Pillow: data for a first run, with ties across the image that attention can find.

Every face is symmetric; its two eyes share a colour, its brows share the hair's. Face `index` of `seed` is the same
picture everywhere, at any size.
"""

import colorsys

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 2  # drawn larger, then reduced: smooth edges


def draw_face(seed: int, index: int, size: int) -> Image.Image:
    """An RGB Pillow image of size x size pixels, a pure function of its arguments."""
    random = np.random.default_rng([seed, index])
    canvas = size * SUPERSAMPLING
    image = Image.new("RGB", (canvas, canvas), _colour(random, (0, 1), (0.1, 0.5), (0.3, 0.9)))
    draw = ImageDraw.Draw(image)

    middle = random.uniform(0.45, 0.55)  # the axis of symmetry
    skin_tone = (random.uniform(0.04, 0.1), random.uniform(0.3, 0.6), random.uniform(0.5, 0.98))
    skin, shade = _rgb(*skin_tone), _rgb(skin_tone[0], skin_tone[1], skin_tone[2] * 0.8)
    hair = _colour(random, (0, 0.13), (0.3, 0.9), (0.1, 0.8))
    iris = _colour(random, (0, 1), (0.6, 1), (0.4, 0.9))
    half_width, half_height = random.uniform(0.23, 0.29), random.uniform(0.31, 0.37)
    chin = 0.54 + half_height

    def ellipse(x: float, y: float, rx: float, ry: float, fill: tuple[int, int, int]) -> None:
        draw.ellipse([(x - rx) * canvas, (y - ry) * canvas, (x + rx) * canvas, (y + ry) * canvas], fill=fill)

    def pair(dx: float, y: float, rx: float, ry: float, fill: tuple[int, int, int]) -> None:
        ellipse(middle - dx, y, rx, ry, fill)
        ellipse(middle + dx, y, rx, ry, fill)

    # Behind the face: long or short hair, neck, shirt.
    hair_length = random.choice([0.0, 0.2, 0.42])
    ellipse(middle, 0.42, half_width * 1.22, half_height * 1.05, hair)
    if hair_length:
        draw.rectangle(
            [
                (middle - half_width * 1.22) * canvas,
                0.42 * canvas,
                (middle + half_width * 1.22) * canvas,
                (0.42 + hair_length) * canvas,
            ],
            fill=hair,
        )
    draw.rectangle([(middle - 0.1) * canvas, 0.7 * canvas, (middle + 0.1) * canvas, canvas], fill=shade)
    ellipse(middle, 1.08, 0.42, 0.17, _colour(random, (0, 1), (0.4, 1), (0.3, 0.9)))

    # The face, with a fringe cut by its own outline.
    ellipse(middle, 0.54, half_width, half_height, skin)
    pair(half_width, 0.55, 0.035, 0.06, skin)
    fringe = random.uniform(0.22, 0.34)
    draw.chord(
        [
            (middle - half_width) * canvas,
            (0.54 - half_height) * canvas,
            (middle + half_width) * canvas,
            (0.54 - half_height + 2 * fringe) * canvas,
        ],
        180,
        360,
        fill=hair,
    )

    eye_dx, eye_y, eye_size = random.uniform(0.095, 0.125), random.uniform(0.48, 0.52), random.uniform(0.04, 0.055)
    pair(eye_dx, eye_y, eye_size * 1.25, eye_size, (250, 250, 250))
    pair(eye_dx, eye_y, eye_size * 0.8, eye_size * 0.8, iris)
    pair(eye_dx, eye_y, eye_size * 0.35, eye_size * 0.35, (15, 15, 20))
    pair(eye_dx, eye_y - eye_size - 0.035, eye_size * 1.3, 0.014, hair)  # brows

    ellipse(middle, 0.62, 0.028, 0.045, shade)  # nose
    smile, lips = random.uniform(0.02, 0.06), _colour(random, (0.94, 1), (0.5, 0.8), (0.5, 0.85))
    mouth_width = random.uniform(0.07, 0.12)
    draw.chord(
        [
            (middle - mouth_width) * canvas,
            (chin - 0.16 - smile) * canvas,
            (middle + mouth_width) * canvas,
            (chin - 0.16 + smile) * canvas,
        ],
        0,
        180,
        fill=lips,
    )
    return image.resize((size, size), Image.Resampling.BOX)


def _colour(random: np.random.Generator, hue: tuple, saturation: tuple, value: tuple) -> tuple[int, int, int]:
    """An RGB colour drawn from ranges of hue, saturation and value, each in [0, 1]."""
    return _rgb(*(random.uniform(*limits) for limits in (hue, saturation, value)))


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
