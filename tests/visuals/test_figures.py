import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.utils import make_grid

from visuals import figures
from visuals.attention_stats import AttentionSample
from visuals.figures import CAPTION, GAP, QUERY_COLORS, TILE, attention_figure, sample_grid


@pytest.mark.parametrize("count, given, columns", [(4, None, 2), (5, None, 3), (64, None, 8), (10, 5, 5)])
def test_grid_equals_torchvision_s(count, given, columns):
    """By default it is nearly square. Names are at the left of its rows and above its columns."""
    images = torch.rand(count, 3, 32, 32) * 2.2 - 1.1
    pixels = (127.5 * (images + 1)).round().clamp(0, 255).byte()
    expected = make_grid(pixels, nrow=columns, padding=2).permute(1, 2, 0).numpy()
    assert np.array_equal(sample_grid(images, columns=given), expected)
    assert sample_grid(images[:1]).size == (36, 36)
    if given:
        named = np.asarray(sample_grid(images, row_names=["", "dog"], column_names=["-2", "", "0", "", "+2"]))
        header, margin = np.subtract(named.shape, expected.shape)[:2]
        assert header > 12 and np.array_equal(named[header:, margin:], expected)
        assert named[header + 36 :, :margin].any() and not named[: header + 36, :margin].any()
        titles = [named[:header, margin + 2 + 34 * column :][:, :32].any() for column in range(columns)]
        assert titles == [True, False, True, False, True]


@pytest.mark.parametrize("keys", [256, 64])
def test_query_points_are_distinctive_and_keep_their_distance_to_each_other_and_to_the_border(keys):
    maps = np.full((256, keys), 1 / keys)
    for point in (40, 100, 200):
        maps[point] = np.eye(keys)[point * keys // 256]
    assert set(figures.query_points(maps, 3)) == {40, 100, 200}
    points = figures.query_points(np.random.default_rng(0).dirichlet(np.ones(keys), 256), 4)
    places = np.stack(np.divmod(points, 16), axis=1)
    assert len(points) == 4 and places.min() >= 2 and places.max() < 14
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    assert distances[~np.eye(4, dtype=bool)].min() >= 4


@pytest.mark.parametrize("side, key_side", [(4, 4), (16, 16), (16, 8), (32, 8)])
def test_figure_marks_each_query_on_the_image_and_on_its_map(side, key_side, monkeypatch):
    """Each of four queries attends to one key: its map is bright there, M times uniform."""
    texts, middle, keys = [], (np.arange(2) * 2 + 1) * side // 4, key_side**2
    queries = [row * side + column for row in middle for column in middle]
    attention = torch.full((2, side**2, keys), 1 / keys)
    attention[1, queries] = torch.eye(keys)[:4]
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, *_, **__: texts.append(text))
    figure = attention_figure(torch.zeros(2, 3, 64, 64), attention, "title")
    row = np.asarray(figure, int)[58 + TILE + CAPTION + GAP :][:TILE]  # of the second image
    image, *maps = (row[:, left : left + TILE] for left in range(GAP, figure.width, TILE + GAP))
    found = {}
    for index, color in enumerate(QUERY_COLORS):
        places = [np.argwhere((tile == color).all(axis=2)) for tile in (image, maps[index])]
        assert not any((maps[other] == color).all(axis=2).any() for other in range(4) if other != index)
        (y, x), on_map = (place.mean(axis=0) * side / TILE for place in places)
        assert on_map == pytest.approx([y, x], abs=0.02 * side) and (y % 1, x % 1) == pytest.approx((0.5, 0.5), abs=0.2)
        cells = maps[index].sum(axis=2).reshape(key_side, TILE // key_side, key_side, -1).mean(axis=(1, 3))
        found[int(y) * side + int(x)] = cells.argmax()
    assert found == {query: key for key, query in enumerate(queries)}
    assert {f"max {keys}.0x uniform", "max 1.0x uniform"} <= set(texts) and f"1x uniform = 1/{keys}:" in texts[-1]


def test_figures_show_maps_of_g_on_generated_and_of_d_on_real_images_and_the_class_of_each():
    maps = torch.full((2, 16, 16), 1 / 16)
    black, white = -torch.ones(2, 3, 32, 32), torch.ones(2, 3, 32, 32)
    generated = AttentionSample("generated", black, {"G attn1": maps, "D attn1": maps, "D attn2": maps})
    real = AttentionSample("real", white, {"D attn1": maps, "D attn2": maps}, ["", "dog"])
    without, drawn = (figures.attention_figures(samples, 5) for samples in ([generated], [generated, real]))
    assert list(without) == list(drawn) == ["G_attn1", "D_attn1", "D_attn2"]
    brightness = {name: np.asarray(figure)[60:200, 10:140].mean() for name, figure in drawn.items()}
    assert brightness["G_attn1"] < 60 < 200 < brightness["D_attn2"]
    plain = figures.attention_figures([real._replace(classes=[])], 5)["D_attn1"]
    rows, columns = np.nonzero((np.asarray(plain) != drawn["D_attn1"]).any(axis=2))
    below = 58 + TILE + CAPTION + GAP + TILE  # the second image
    assert below <= rows.min() and rows.max() < below + CAPTION and columns.max() < GAP + TILE
    assert figures.shorten("Größe, x" * 2) == "Größe, x" * 2 and figures.shorten("犬\n") == "\\u72ac\\n"
    for letter, most in (("i", 50), ("W", 15)):
        start, dots, end = figures.shorten(letter * 60).partition("...")
        assert dots and 0 <= len(start) - len(end) <= 1 and most / 2 < len(start + end) <= most


def test_progress_is_animated_without_damaged_grids_and_other_sizes(tmp_path):
    colors = {1: (9, 9, 9), 2: (200, 30, 40), 30: (30, 200, 40), 31: (30, 40, 200)}
    for step, size in ((1, (40, 80)), (2, (64, 64)), (30, (32, 32)), (31, (32, 32))):
        Image.new("RGB", size, colors[step]).save(tmp_path / f"{step}.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "4.png").write_bytes(whole[:50])
    (tmp_path / "5.png").write_bytes(whole[:36] + b"\0IDAT" + whole[41:])  # of length 0: a SyntaxError of Pillow's
    frames = figures.progress_frames({step: tmp_path / f"{step}.png" for step in (1, 2, 4, 5, 30, 31)}, width=100)
    assert all(frame.size == (100, 124) for frame in frames) and figures.progress_frames({}) == []
    figures.save_animation(tmp_path / "a.gif", frames, seconds=0.2)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (3, 0)
        for index, step in enumerate((2, 30, 31)):
            gif.seek(index)
            assert np.abs(np.subtract(gif.convert("RGB").getpixel((50, 50)), colors[step])).max() <= 8
            assert gif.info["duration"] == (1500 if index == 2 else 200)


def test_comparison_figure_has_the_images_in_rows():
    samples, near = torch.full((2, 1, 3, 16, 16), -1.0), torch.ones(2, 4, 3, 16, 16)
    captions = [["", *"abcd"], [""] * 5]
    figure = figures.comparison_figure(torch.cat([samples, near], 1), ["a", "b"], captions, "a line\nand another")
    figure = np.asarray(figure)
    for row in range(2):
        middle = 34 + row * (96 + CAPTION + GAP) + 48
        assert (figure[middle, GAP + 48] == 0).all()
        assert (figure[middle, GAP + (96 + GAP) * 4 + GAP + 48] == 255).all()


def test_projection_figure_ends_with_the_halved_difference():
    images, course = torch.full((1, 3, 8, 8), -0.5), torch.tensor([0.0, 0.5]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 8, 8)
    figure = figures.projection_figure(images, course, torch.rand(1, 2), ["a.jpg"], ["start", "end"], "near")
    figure = np.asarray(figure)
    colors = [figure[34 + 48, GAP + 48 + (96 + GAP) * column + GAP * (column > 0)] for column in range(4)]
    assert [color.tolist() for color in colors] == [[64] * 3, [128] * 3, [191] * 3, [191] * 3]
