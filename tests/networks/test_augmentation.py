"""Every augmentation against a plain computation of one image at a time, written after the paper's own code."""

import math

import numpy as np
import pytest
import torch

from networks.augmentation import RANDOM_NUMBERS, augment

SIZE = 16
MOST = 2  # pixels that an image of this size moves


def example(count):
    """Images and random numbers."""
    random = torch.Generator().manual_seed(3)
    shapes = (count, 3, SIZE, SIZE), (count, RANDOM_NUMBERS)
    images, u = (torch.rand(shape, generator=random, dtype=torch.float64) for shape in shapes)
    return images * 2 - 1, u


def color(image, u):
    image = image + u[0] - 0.5
    gray = image.mean(axis=0, keepdims=True)
    image = (image - gray) * 2 * u[1] + gray
    return (image - image.mean()) * (u[2] + 0.5) + image.mean()


def translation(image, u):
    down, right = (math.floor(number * (2 * MOST + 1)) - MOST for number in u[3:5])
    moved = np.zeros_like(image)
    for y in range(SIZE):
        for x in range(SIZE):
            if 0 <= y - down < SIZE and 0 <= x - right < SIZE:
                moved[:, y, x] = image[:, y - down, x - right]
    return moved


def cutout(image, u):
    row, column = (math.floor(number * (SIZE + 1)) for number in u[5:7])
    cut = image.copy()
    cut[:, max(0, row - SIZE // 4) : row + SIZE // 4, max(0, column - SIZE // 4) : column + SIZE // 4] = 0
    return cut


PLAIN = {"color": color, "translation": translation, "cutout": cutout}


@pytest.mark.parametrize("policy", [("color",), ("translation",), ("cutout",), tuple(PLAIN)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_batch_equals_the_images_one_at_a_time(policy, memory_format):
    images, u = example(40)
    changed = augment(images.contiguous(memory_format=memory_format), u, policy)
    for index, image in enumerate(images.numpy()):
        for name in policy:
            image = PLAIN[name](image, u[index].numpy())
        np.testing.assert_allclose(changed[index].numpy(), image, atol=1e-12)
    assert changed.is_contiguous(memory_format=memory_format)


def test_gradients_are_exact_twice():
    images, u = example(1)
    small = images[:, :, :8, :8].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, u, tuple(PLAIN)), small)
    assert torch.autograd.gradgradcheck(lambda x: augment(x.square(), u, tuple(PLAIN)), small)


def test_the_largest_number_below_1_is_within_the_image():
    images = torch.rand(1, 3, 256, 256)
    u = torch.full((1, RANDOM_NUMBERS), np.nextafter(np.float32(1), np.float32(0)))
    assert augment(images, u, ["translation"])[0, :, 32:, 32:].equal(images[0, :, :-32, :-32])
    assert torch.isfinite(augment(images, u, tuple(PLAIN))).all()
