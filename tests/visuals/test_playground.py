"""The playground in a real browser: what it shows is compared with what the generator makes of the same z."""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from conftest import random_generator
from page_tools import MARKUP, BrowserPage, Keys, bound
from PIL import Image

from networks.latents import slerp
from visuals import playground
from visuals.figures import overlay, to_pixels
from visuals.playground import Grid, generate_grids, grid_side, latent_grid, playground_page

SIDE = 16  # tiles in a row of the page without classes
CLASS_SIDE = 4
LONG = "a very long name of a class, which does not fit on a phone"
CLASSES = {"cat": 3, "dog": 0, LONG: 1, "horse": 4, "automobile": 2}
NAMES = [*CLASSES]


@pytest.fixture(scope="module", autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def corners() -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def G() -> torch.nn.Module:
    return random_generator("sagan", 32)


@pytest.fixture(scope="module")
def conditional_G() -> torch.nn.Module:
    return random_generator("paper", 64, 5)


@pytest.fixture(scope="module")
def grids(G, corners) -> list[Grid]:
    return generate_grids(G, corners, [("", None)])


@pytest.fixture(scope="module")
def class_grids(conditional_G, corners) -> list[Grid]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(playground, "MAX_SIDE", CLASS_SIDE)
        return generate_grids(conditional_G, corners, [*CLASSES.items()])


class Page(BrowserPage):
    """User input to the playground, and what it shows."""

    def place(self) -> tuple[float, float]:
        """Column and row of the position, in tiles."""
        state = self.state()
        return state["column"], state["row"]

    def image(self) -> np.ndarray:
        return self.pixels(self.find("#image"))

    def tiles(self) -> np.ndarray:
        """The pixels of the grid by row and column, (side, side, S, S, 3)."""
        side, size = (self.state()[name] for name in ("side", "size"))
        return self.pixels(self.pointable).reshape(side, size, side, size, 3).swapaxes(1, 2)

    def select_tile(self, column: int, row: int) -> None:
        """Click a tile, beside its center."""
        side = self.state()["side"]
        if self.state()["pinned"]:
            self.click()
        self.point((column + 0.6) / side, (row + 0.4) / side)
        self.click()
        assert self.place() == (column, row)

    def check_panels(self, grid: Grid, cell: int) -> None:
        """Compare the panels with where a tile attends, on average over all queries."""
        for layer, panel, values in zip(self.state()["layers"], self.panels(), grid.attention.values(), strict=True):
            shown, side = np.array(layer["values"]), layer["side"]
            assert (np.abs(shown - values[cell]) <= bound(values)[cell]).all()
            expected = overlay(Image.fromarray(grid.pixels[cell]), shown.reshape(side, side))
            assert np.abs(self.pixels(panel) - expected).max() <= 1
            row, column = divmod(int(shown.argmax()), side)
            text = rf"max ([\d.]+) .*\n([\d.]+) % at row {row + 1}, column {column + 1}"
            factor, percent = re.search(text, panel.text).groups()
            assert float(factor) == pytest.approx(shown.max() * side**2, rel=0.05)
            assert float(percent) == pytest.approx(100 * shown.max(), rel=0.01)


@pytest.fixture
def show(quiet_browser, tmp_path) -> Callable[..., Page]:
    """A function that opens the page of some grids."""

    def open_page(grids: Sequence[Grid], title: str = "A title") -> Page:
        (tmp_path / "page.html").write_text(playground_page(grids, title), encoding="utf-8")
        return Page(quiet_browser, (tmp_path / "page.html").as_uri(), "grid", "playground", "column")

    return open_page


def z_of(corners: torch.Tensor, side: int, column: int, row: int) -> torch.Tensor:
    """z (1, z_dim) of a tile."""
    top, bottom = (slerp(corners[i : i + 1], corners[i + 1 : i + 2], side)[:, column] for i in (0, 2))
    return slerp(top, bottom, side)[:, row]


def tiles_of(grid: Grid) -> np.ndarray:
    """The pixels of the tiles by row and column, (side, side, S, S, 3)."""
    side = math.isqrt(len(grid.pixels))
    return grid.pixels.reshape(side, side, *grid.pixels.shape[1:]).astype(int)


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
    """Up to rounding: the images are of batches of other sizes."""
    assert np.abs(actual.astype(int) - expected).max() <= 1


def test_z_is_interpolated_between_the_given_corners(corners):
    z = latent_grid(corners, 7).view(7, 7, 16)
    assert torch.allclose(z[[0, 0, 6, 6], [0, 6, 0, 6]], corners, atol=1e-5)
    for row, column in ((0, 3), (5, 0), (4, 2)):
        assert torch.allclose(z[row, column], z_of(corners, 7, column, row)[0], atol=1e-5)


def test_maps_are_means_over_all_queries(G, corners, grids):
    expected = G(latent_grid(corners, SIDE)[40:44], return_attention=True)[1:]
    assert [*grids[0].attention] == ["G attn1", "G attn2"]
    for values, attention in zip(grids[0].attention.values(), expected, strict=True):
        assert values.shape == (SIDE**2, attention.shape[2])
        assert np.allclose(values[40:44], attention.sum(1) / attention.shape[1], atol=1e-6)


def test_each_class_has_the_same_z(conditional_G, corners, class_grids):
    assert [grid.class_name for grid in class_grids] == NAMES
    z = latent_grid(corners, CLASS_SIDE)
    for grid, number in zip(class_grids, CLASSES.values(), strict=True):
        assert_near(grid.pixels, to_pixels(conditional_G(z, torch.full((16,), number))))
    assert not np.array_equal(class_grids[0].pixels, class_grids[1].pixels)


SIZES = [(32, (64, 256), 1, 16), (64, (256, 1024), 1, 16), (64, (256,), 8, 6), (128, (256, 1024), 1, 9),
         (256, (256, 1024), 1, 4)]  # fmt: skip


@pytest.mark.parametrize("size, keys, classes, side", SIZES)
def test_a_page_of_noise_stays_below_6_mb(size, keys, classes, side):
    assert grid_side(3 * size**2 + sum(keys), classes) == side
    random = np.random.default_rng(0)

    def noise(name: str) -> Grid:
        pixels = random.integers(0, 256, (side**2, size, size, 3), np.uint8)
        values = [random.random((side**2, count), np.float32) ** 2 for count in keys]  # all levels equally frequent
        return Grid(name, pixels, {f"G attn{index}": layer for index, layer in enumerate(values, start=1)})

    assert len(playground_page([noise(100 * "é") for _ in range(classes)], "title").encode()) < 6_000_000


@pytest.mark.browser
def test_the_image_is_what_g_makes_of_its_z_or_a_blend(show, G, corners, grids):
    page, tiles = show(grids), tiles_of(grids[0])
    assert np.array_equal(page.tiles(), tiles)
    for column, row in ((0, 0), (SIDE - 1, 0), (0, SIDE - 1), (5, 11), (11, 5)):
        page.select_tile(column, row)
        assert_near(page.image(), to_pixels(G(z_of(corners, SIDE, column, row)))[0])
        assert page.find("#position").text.startswith(f"tile: row {row + 1}, column {column + 1} of 16 × 16\n")
        assert "as generated" in page.find("#position").text
        page.check_panels(grids[0], SIDE * row + column)
    page.click()
    for x, y in ((0.31, 0.62), (0.97, 0.5), (0.5, 0.999), (0.001, 0.001)):
        page.point(x, y)
        place = np.array(page.place())
        assert np.abs(place - (np.array([x, y]) * SIDE - 0.5).clip(0, SIDE - 1)).max() < 0.03
        (left, top), (right, down) = place.astype(int), place % 1
        weights = np.outer([1 - down, down], [1 - right, right])[..., None, None, None]
        expected = (weights * np.pad(tiles, [(0, 1)] * 2 + [(0, 0)] * 3)[top : top + 2, left : left + 2]).sum((0, 1))
        assert np.abs(page.image() - expected).max() <= 0.51
        marker, center = page.find(".point").rect, page.position(page.pointable, *(place + 0.5) / SIDE)
        assert np.abs(np.array([marker["x"], marker["y"]]) + marker["width"] / 2 - center).max() <= 1.5


@pytest.mark.browser
def test_classes_are_switched_at_the_same_z(show, class_grids):
    page = show(class_grids)
    page.select_tile(2, 1)
    for index in (0, 2, 1, 4, 2):
        page.find_all("#classes label")[index].click()
        page.wait_for(lambda index=index: page.state()["class"] == NAMES[index])
        assert page.place() == (2, 1)
        assert np.array_equal(page.image(), class_grids[index].pixels[6])
        page.check_panels(class_grids[index], 6)
        assert np.array_equal(page.tiles(), tiles_of(class_grids[index]))
    page.press(Keys.ARROW_RIGHT)  # the radio button has the focus
    page.wait_for(lambda: page.state()["class"] == "horse")
    assert [radio.accessible_name for radio in page.find_all("#classes input")] == NAMES

    page = show(class_grids)  # of two quick choices the last one is shown, also if the first one is decoded after it
    page.browser.execute_script("""
        const [original, radios] = [Response.prototype.arrayBuffer, document.querySelectorAll("#classes input")];
        let milliseconds = 300;
        Response.prototype.arrayBuffer = async function () {
          const delay = milliseconds;
          milliseconds = 0;
          await new Promise((resolve) => setTimeout(resolve, delay));
          if (delay) setTimeout(() => (window.isDecoded = true), 200);
          return original.call(this);
        };
        radios[1].click();
        radios[2].click();
    """)
    page.wait_for(lambda: page.browser.execute_script("return window.isDecoded"))
    assert page.state()["class"] == NAMES[2]


@pytest.mark.browser
def test_keyboard_mouse_and_touch(show, grids):
    page = show(grids)
    assert page.browser.execute_script("return document.activeElement.matches('#grid:focus-visible')")
    assert page.place() == (7, 7)
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert page.place() == (7.5, 7.25)
    text = lambda: page.find("[aria-live=polite]").get_attribute("textContent")  # noqa: E731
    page.wait_for(lambda: "of 16 × 16, blend" in text())
    assert text().count("Generator attn") == 2 and "uniform at row" in text()
    page.press(Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_UP, Keys.ENTER)
    assert page.place() == (7, 7) and page.state()["pinned"]
    page.press(Keys.SPACE)
    assert not page.state()["pinned"]
    page.pointable.send_keys(Keys.SHIFT, Keys.ARROW_LEFT, Keys.ARROW_DOWN)
    assert page.place() == (6, 8)
    page.press(*[Keys.ARROW_UP] * 4 * SIDE)
    assert page.place() == (6, 0)  # stops at the border

    page.select_tile(4, 4)
    page.point(0.8, 0.81)
    assert page.place() == (4, 4) and page.state()["pinned"]
    page.click()
    assert not page.state()["pinned"] and page.place() == pytest.approx((12.3, 12.46), abs=0.03)
    page.press(Keys.ARROW_LEFT)
    assert page.place() == (12, 12.5)  # at a quarter of a tile again

    for positions, place in (([(0.2, 0.7)], (3, 11)), ([(0.5, 0.9), (0.6, 0.5), (0.9, 0.1)], (13.9, 1.1)),
                             ([(0.53, 0.53), (0.535, 0.535)], (8, 8))):  # fmt: skip
        page.touch(*positions)  # a tap, a drag, a tap that moves a few pixels
        assert page.place() == pytest.approx(place, abs=0.03) and page.browser.execute_script("return scrollY") == 0


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 1280])
def test_layout_and_names_with_markup(show, grids, class_grids, width):
    plain = [Grid("", grids[0].pixels, {})]  # of a network without classes and attention
    for shown, classes, layers in ((plain, 0, 0), (grids, 0, 2), (class_grids, 5, 1)):
        page = show(shown)
        page.resize(width, 700)
        page.assert_fits(width)
        image, chart, labels = page.find("#image").rect, page.pointable.rect, page.find_all("#classes label")
        assert (len(labels), len(page.panels()), len(page.state()["layers"])) == (classes, layers, layers)
        assert [page.find(part).is_displayed() for part in ("#maps", "#classes")] == [layers > 0, classes > 0]
        if width == 320:
            assert chart["width"] > 0.8 * width and image["width"] > 0.6 * width
            assert image["y"] + image["height"] <= chart["y"] <= 700 - chart["height"]  # no finger covers the image
            assert all(panel.rect["y"] > chart["y"] + chart["height"] for panel in page.panels())
            assert all(label.size["height"] >= 44 for label in labels)

    page = show([Grid(name, grids[0].pixels, grids[0].attention) for name in (MARKUP, "other")], MARKUP)
    assert page.browser.title == page.find("h1").text == MARKUP
    assert page.find("#classes span").get_attribute("textContent") == page.state()["class"] == MARKUP
    assert not page.find_all("h1 *, #classes span *")
