"""The playground in a real browser: it shows its grids, and those are what the generator makes."""

import re

import numpy as np
import pytest
import torch
from conftest import random_generator
from page_tools import MARKUP, BrowserPage, Keys, bound
from PIL import Image

from networks.latents import slerp
from visuals.figures import overlay, to_pixels
from visuals.playground import Grid, Playground, generate_playground, grid_size, playground_page

NAMES = ["cat", "bird", "a very long name of a class, which does not fit on a phone", "horse", "automobile"]


def noise_playground(names: list[str], side: int, size: int, keys: tuple[int, ...], steps: int = 0) -> Playground:
    """Tiles of noise, and maps in which all levels are equally frequent."""
    grids, count = [], side**2 + 16 * steps
    for name in names:
        random = np.random.default_rng(len(name))
        pixels = random.integers(0, 256, (count, size, size, 3), np.uint8)
        maps = [random.random((count, number), np.float32) ** 2 for number in keys]
        grids.append(Grid(name, pixels, {f"G attn{index}": values for index, values in enumerate(maps, 1)}))
    return Playground(side, 8 if steps else 0, steps, grids)


SIDE = 16  # tiles in a row of the page without classes
PLAIN = noise_playground([""], SIDE, 32, (64, 256), 3)
(GRID,) = PLAIN.grids
TILES = GRID.pixels[: SIDE**2].reshape(SIDE, SIDE, 32, 32, 3).astype(int)
WITH_CLASSES = noise_playground(NAMES, 4, 64, (64,), 1)
CLASS_GRIDS = WITH_CLASSES.grids


class Page(BrowserPage):
    """User input to the playground, and what it shows."""

    pointable, state_name = "#grid", "playground"

    def place(self) -> tuple[float, float]:
        """Column and row of the position, in tiles."""
        return tuple(self.state()[name] for name in ("column", "row"))

    def click_tile(self, column: int, row: int) -> None:
        """Click beside the tile's center."""
        side = self.state()["side"]
        self.point((column + 0.6) / side, (row + 0.4) / side)
        self.click()
        assert self.place() == (column, row)

    def check_tile(self, grid: Grid, cell: int) -> None:
        """Compare what is shown at a tile with its image and its maps."""
        assert np.array_equal(self.pixels("#image canvas"), grid.pixels[cell])
        for index, (layer, panel) in enumerate(zip(self.state()["layers"], self.find_all("figure"), strict=True), 1):
            shown, side, maps = np.array(layer["values"]), layer["side"], grid.attention[f"G attn{index}"]
            assert (np.abs(shown - maps[cell]) <= bound(maps)[cell]).all()
            expected = overlay(Image.fromarray(grid.pixels[cell]), shown.reshape(side, side))
            assert np.abs(self.pixels(f"figure:nth-child({index}) canvas") - expected).max() <= 1
            row, column = divmod(int(shown.argmax()), side)
            text = rf"max ([\d.]+) .*\n([\d.]+) % at row {row + 1}, column {column + 1}"
            numbers = [float(number) for number in re.search(text, panel.text).groups()]
            assert numbers == pytest.approx([shown.max() * side**2, 100 * shown.max()], rel=0.01)


@pytest.fixture
def show(quiet_browser, tmp_path):
    """A function that opens the page of a playground."""
    path = tmp_path / "page.html"
    return lambda playground, *texts: Page(quiet_browser, path, playground_page(playground, *texts or ["title"]))


@torch.no_grad()
def test_a_tile_is_what_g_makes_of_its_z_between_the_corners_and_the_mean_of_its_maps():
    G, corners = random_generator("sagan", 32), torch.randn(4, 16)
    side, directions, steps, (grid,) = generate_playground(G, corners, torch.eye(16)[:3], [("", None)])
    assert [*grid.attention] == ["G attn1", "G attn2"]
    for column, row in ((0, 0), (SIDE - 1, 0), (0, SIDE - 1), (SIDE - 1, SIDE - 1), (5, 11), (11, 5)):
        top, bottom = (slerp(corners[[i]], corners[[i + 1]], SIDE)[:, column] for i in (0, 2))
        image, *maps = G(slerp(top, bottom, SIDE)[:, row], return_attention=True)
        pixels = grid.pixels[SIDE * row + column].astype(int)
        assert np.abs(pixels - to_pixels(image)[0]).max() <= 1  # rounding of other batches
        for values, attention in zip(grid.attention.values(), maps, strict=True):
            assert np.allclose(values[SIDE * row + column], attention[0].mean(0), atol=1e-6)
    assert (side, directions, steps) == (SIDE, 3, 6) and len(grid.pixels) == SIDE**2 + 3 * 2 * 6
    moved = corners[0].repeat(12, 1)  # along the second direction
    moved[:, 1] += torch.tensor([number / 2 for number in range(-6, 7) if number])
    assert np.abs(grid.pixels[SIDE**2 + 12 : SIDE**2 + 24].astype(int) - to_pixels(G(moved))).max() <= 1


@pytest.mark.parametrize("size, keys, classes, expected", [
    (32, (64, 256), 1, (16, 6)), (64, (256, 1024), 1, (16, 6)), (64, (256,), 8, (6, 1)), (128, (256, 1024), 1, (9, 2)),
    (256, (256, 1024), 1, (5, 0)),
])  # fmt: skip
def test_a_page_of_noise_stays_below_8_mb(size, keys, classes, expected):
    side, steps = grid_size(3 * size**2 + sum(keys), classes)
    assert (side, steps) == expected
    playground = noise_playground([(100 - index) * "é" for index in range(classes)], side, size, keys, steps)
    assert len(playground_page(playground, "title").encode()) < 8_000_000


@pytest.mark.browser
def test_sliders_move_the_top_left_tile_along_a_direction(show):
    page = show(PLAIN)
    page.click_tile(5, 5)
    inputs, outputs = page.find_all("#sliders input"), page.find_all("#sliders b")
    assert [len(inputs), len(outputs)] == [8, 8] and [output.text for output in outputs] == ["0"] * 8
    for direction, keys, amount in ((2, [Keys.ARROW_RIGHT], 1), (2, [Keys.END], 3), (7, [Keys.HOME], -3)):
        inputs[direction].send_keys(*keys)
        cell = SIDE**2 + 6 * direction + (amount + 3 if amount < 0 else amount + 2)
        assert page.state()["cell"] == cell and page.place() == (0, 0) and page.state()["pinned"]
        page.check_tile(GRID, cell)
        text = f"{'+' if amount > 0 else '−'}{abs(amount)}"
        assert [output.text for output in outputs] == [text if index == direction else "0" for index in range(8)]
        assert page.find("#position").text.startswith(f"top left tile, direction {direction + 1} at {text}\n")
        assert inputs[direction].accessible_name == f"direction {direction + 1}"
    inputs[7].send_keys(*[Keys.ARROW_RIGHT] * 3)  # at 0 it is the tile itself
    page.check_tile(GRID, 0)
    inputs[0].send_keys(Keys.END)
    page.click()  # it is pinned
    page.click_tile(3, 3)
    page.check_tile(GRID, SIDE * 3 + 3)
    assert [output.text for output in outputs] == ["0"] * 8

    page.pointable = "#sliders label:nth-child(4) input"
    page.touch((0.5, 0.5), (0.7, 0.5), (0.99, 0.5))
    page.check_tile(GRID, SIDE**2 + 6 * 3 + 5)

    page = show(WITH_CLASSES)  # of the other class after a switch
    page.find_all("#sliders input")[1].send_keys(Keys.END)
    page.find_all("#classes label")[2].click()
    page.wait_for(lambda: page.state()["class"] == NAMES[2])
    page.check_tile(CLASS_GRIDS[2], 16 + 3)


@pytest.mark.browser
def test_the_image_is_that_of_the_tile_or_a_blend(show):
    page = show(PLAIN)
    assert np.array_equal(page.pixels("#grid canvas"), TILES.swapaxes(1, 2).reshape(SIDE * 32, SIDE * 32, 3))
    for column, row in ((0, 0), (SIDE - 1, 0), (5, 11)):
        page.click_tile(column, row)
        page.check_tile(GRID, SIDE * row + column)
        assert page.find("#position").text.startswith(f"tile: row {row + 1}, column {column + 1} of 16 × 16\n")
        assert "as generated" in page.find("#position").text
        page.click()
    for x, y in ((0.31, 0.62), (0.97, 0.5), (0.5, 0.999), (0.001, 0.001)):
        page.point(x, y)
        place = np.array(page.place())
        assert np.abs(place - (np.array([x, y]) * SIDE - 0.5).clip(0, SIDE - 1)).max() < 0.03
        (left, top), (right, down) = place.astype(int), place % 1
        weights = np.outer([1 - down, down], [1 - right, right])[..., None, None, None]
        expected = (weights * np.pad(TILES, [(0, 1)] * 2 + [(0, 0)] * 3)[top : top + 2, left : left + 2]).sum((0, 1))
        assert np.abs(page.pixels("#image canvas") - expected).max() <= 0.51
        marker, center = page.find(".point").rect, page.position(*(place + 0.5) / SIDE)
        assert np.abs(np.array([marker["x"], marker["y"]]) + marker["width"] / 2 - center).max() <= 1.5


@pytest.mark.browser
def test_classes_are_switched_at_the_same_place(show):
    page = show(WITH_CLASSES)
    page.click_tile(2, 1)
    for index in (2, 1, 4, 2):
        page.find_all("#classes label")[index].click()
        page.wait_for(lambda index=index: page.state()["class"] == NAMES[index])
        assert page.place() == (2, 1)
        page.check_tile(CLASS_GRIDS[index], 6)
    assert np.array_equal(page.pixels("#grid canvas")[64:128, 128:192], CLASS_GRIDS[2].pixels[6])
    page.press(Keys.ARROW_RIGHT)  # the radio button has the focus
    page.wait_for(lambda: page.state()["class"] == "horse")
    assert [radio.accessible_name for radio in page.find_all("#classes input")] == NAMES

    page = show(WITH_CLASSES)  # of two quick choices the last one is shown, also if the first one is decoded after it
    page.script("""
        const [original, radios] = [Response.prototype.arrayBuffer, document.querySelectorAll("#classes input")];
        Response.prototype.arrayBuffer = async function () {
          Response.prototype.arrayBuffer = original;  // only the first one is late
          await new Promise((resolve) => setTimeout(resolve, 300));
          setTimeout(() => (window.isDecoded = true), 200);
          return original.call(this);
        };
        radios[1].click();
        radios[2].click();
    """)
    page.wait_for(lambda: page.script("return window.isDecoded"))
    assert page.state()["class"] == NAMES[2]


@pytest.mark.browser
def test_keyboard_mouse_and_touch(show):
    page = show(PLAIN)
    assert page.script("return document.activeElement.matches('#grid:focus-visible')") and page.place() == (7, 7)
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert page.place() == (7.5, 7.25)
    text = lambda: page.find("[aria-live=polite]").get_attribute("textContent")  # noqa: E731
    page.wait_for(lambda: "of 16 × 16, blend" in text())
    assert text().count("Generator attn") == 2 and "uniform at row" in text()
    page.press(Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_UP, Keys.ENTER)
    assert page.place() == (7, 7) and page.state()["pinned"]
    page.press(Keys.SPACE)
    assert not page.state()["pinned"]
    page.find("#grid").send_keys(Keys.SHIFT, Keys.ARROW_LEFT, Keys.ARROW_DOWN)
    assert page.place() == (6, 8)
    page.press(*[Keys.ARROW_UP] * 4 * SIDE)
    assert page.place() == (6, 0)  # stops at the border

    page.click_tile(4, 4)
    page.point(0.8, 0.81)
    assert page.place() == (4, 4) and page.state()["pinned"]
    page.click()
    assert not page.state()["pinned"] and page.place() == pytest.approx((12.3, 12.46), abs=0.03)
    page.press(Keys.ARROW_LEFT)
    assert page.place() == (12, 12.5)  # at a quarter of a tile again
    for positions, place in (([(0.2, 0.7)], (3, 11)), ([(0.5, 0.9), (0.6, 0.5), (0.9, 0.1)], (13.9, 1.1)),
                             ([(0.53, 0.53), (0.535, 0.535)], (8, 8))):  # fmt: skip
        page.touch(*positions)  # a tap, a drag, a tap that moves a few pixels
        assert page.place() == pytest.approx(place, abs=0.03) and page.script("return scrollY") == 0


@pytest.mark.browser
def test_layout_and_names_with_markup(show):
    bare = noise_playground([""], 4, 64, ())
    for playground, classes, layers in ((bare, 0, 0), (PLAIN, 0, 2), (WITH_CLASSES, 5, 1)):
        page = show(playground)
        page.assert_fits(1280, 700)
        page.assert_fits(320, 700)
        image, chart, labels = page.find("#image").rect, page.find("#grid").rect, page.find_all("#classes label")
        panels = page.find_all("figure")
        assert (len(labels), len(panels)) == (classes, layers)
        shown = [page.find(part).is_displayed() for part in ("#maps", "#classes", "#more-classes")]
        assert shown == [layers > 0, classes > 0, False]
        assert chart["width"] > 0.8 * 320 and image["width"] > 0.6 * 320
        assert image["y"] + image["height"] <= chart["y"] <= 700 - chart["height"]  # no finger covers the image
        assert all(panel.rect["y"] > chart["y"] + chart["height"] for panel in panels)
        assert page.find("#directions").is_displayed() == (playground is not bare)
        assert all(slider.rect["height"] >= 44 for slider in page.find_all("#sliders input"))
        page.script("document.querySelector('#directions').scrollIntoView()")
        assert page.script("return document.querySelector('#image').getBoundingClientRect().top >= 0")
        assert all(label.size["height"] >= 44 for label in labels)
    grids = [CLASS_GRIDS[0]._replace(class_name=MARKUP), *CLASS_GRIDS[1:]]
    page = show(WITH_CLASSES._replace(grids=grids), MARKUP, "", 1200)
    assert page.find("#more-classes").text == "5 of 1,200 classes are shown; --class_name selects others."
    assert page.browser.title == page.find("h1").text == MARKUP
    assert page.find("#classes span").get_attribute("textContent") == page.state()["class"] == MARKUP
    assert not page.find_all("h1 *, #classes span *")
