import numpy as np
import pytest
import torch
from PIL import Image

from visualize import (
    GAP,
    MARKS,
    TILE,
    attention_figure,
    attention_figures,
    overlay,
    query_points,
    sample_grid,
    to_pixels,
)


def test_pixels():
    images = torch.tensor([-1.0, 0.0, 1.0, 1.5]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_pixels(images)[0, :, :, 0].tolist() == [[0, 128], [255, 255]]


@pytest.mark.parametrize("count, columns, rows", [(1, 1, 1), (4, 2, 2), (5, 3, 2), (64, 8, 8)])
def test_grid(count, columns, rows):
    images = torch.linspace(-1, 1, count).view(count, 1, 1, 1).expand(count, 3, 8, 8)
    grid = sample_grid(images, gap=2)
    assert grid.size == (columns * 10 + 2, rows * 10 + 2)
    last = count - 1
    assert grid.getpixel((2 + last % columns * 10, 2 + last // columns * 10))[0] == to_pixels(images)[last, 0, 0, 0]


def test_query_points_are_where_maps_differ_and_lie_apart():
    maps = np.full((256, 256), 1 / 256)
    for point in (40, 100, 200):
        maps[point] = np.eye(256)[point]
    points = query_points(maps, 3)
    assert set(points) == {40, 100, 200}
    rows, columns = np.divmod(query_points(np.random.default_rng(0).dirichlet(np.ones(64), 64), 4), 8)
    for i in range(4):
        for j in range(i):
            assert (rows[i] - rows[j]) ** 2 + (columns[i] - columns[j]) ** 2 >= 4


def test_query_points_leave_the_border_out():
    points = np.array(query_points(np.random.default_rng(0).dirichlet(np.ones(256), 256), 4))
    assert len(points) == 4
    assert (points // 16 >= 2).all() and (points // 16 < 14).all()
    assert (points % 16 >= 2).all() and (points % 16 < 14).all()


def test_overlay_is_bright_where_the_map_is():
    heat = np.zeros((4, 4))
    heat[1, 2] = 0.5
    shown = np.asarray(overlay(Image.new("RGB", (64, 64), (100, 100, 100)), heat), int).sum(axis=2)
    assert np.unravel_index(shown.argmax(), shown.shape)[0] // 16 == 1
    assert np.unravel_index(shown.argmax(), shown.shape)[1] // 16 == 2
    assert shown[56:, :8].std() == 0  # elsewhere the dimmed image alone


@pytest.mark.parametrize("side", [4, 8, 16, 32])
def test_figure_marks_each_point_on_the_image_and_on_its_map(side):
    torch.manual_seed(0)
    attention = torch.softmax(4 * torch.randn(2, side**2, side**2), -1)
    figure = attention_figure(torch.zeros(2, 3, 64, 64), attention, "title")
    assert figure.width == (TILE + GAP) * (1 + len(MARKS)) + GAP
    pixels = np.asarray(figure)[58 : 58 + TILE]  # the first image's row

    def has(column, colour):
        tile = pixels[:, GAP + column * (TILE + GAP) : GAP + column * (TILE + GAP) + TILE]
        return (tile == colour).all(axis=2).any()

    for index, colour in enumerate(MARKS):
        assert has(0, colour)
        assert [has(column, colour) for column in range(1, 5)] == [column == index + 1 for column in range(1, 5)]


def test_figures_are_named_by_network_and_layer():
    maps = [torch.full((1, 16, 16), 1 / 16), torch.full((1, 64, 64), 1 / 64)]
    assert list(attention_figures("D", torch.zeros(1, 3, 32, 32), maps, 5)) == ["D_attn1", "D_attn2"]
