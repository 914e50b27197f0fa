"""The explorer page in a real browser: its panels are compared with the maps that it was made from."""

import re

import numpy as np
import pytest
import torch
from page_tools import MARKUP, BrowserPage, Keys, bound
from PIL import Image

from visuals.attention_stats import AttentionSample, grid_sides
from visuals.explorer import explorer_page
from visuals.figures import overlay, query_points, to_pixels
from visuals.pages import LEVELS, quantize

FINEST, POOLED = 16, 8  # sides of the grids of queries and of pooled keys
torch.manual_seed(0)
SCALES = torch.tensor([2.0, 40.0, 0.0]).view(3, 1, 1)  # random, peaked and uniform maps
MAPS = torch.softmax(3 * torch.randn(1, FINEST**2, POOLED**2), -1)
SAMPLES = [
    AttentionSample("generated", torch.rand(3, 3, 32, 32) * 2 - 1, {
        name: torch.softmax(SCALES * torch.randn(3, side**2, side**2), -1)
        for name, side in (("G attn1", 8), ("G attn2", FINEST), ("D attn1", 4))
    }),
    AttentionSample("real", torch.rand(1, 3, 32, 32) * 2 - 1, {"D attn1": torch.softmax(torch.randn(1, 16, 16), -1)}),
    AttentionSample("pooled", torch.rand(1, 3, 32, 32) * 2 - 1, {"G attn1": MAPS}),
]  # fmt: skip


class Page(BrowserPage):
    """User input to the explorer, and what it shows."""

    pointable, state_name = "#image", "explorer"

    def cell(self) -> tuple[int, int]:
        """Column and row of the query, in cells of the finest layer."""
        return tuple(int(self.state()[axis] * FINEST) for axis in "xy")

    def select(self, image: int) -> None:
        self.find_all("#thumbnails button")[image].click()
        self.wait_until_decoded()


@pytest.fixture
def show(quiet_browser, tmp_path):
    """A function that opens the page of some samples."""
    return lambda samples, title="title": Page(quiet_browser, tmp_path / "page.html", explorer_page(samples, title))


def test_quantization_error_is_within_the_bound():
    for scale in (0.0, 1.0, 10.0, 200.0):
        maps = torch.softmax(scale * torch.randn(256, 256), -1).numpy()
        levels, maxima = quantize(maps)
        assert (levels.dtype, levels.max(), maxima.dtype) == (np.uint8, LEVELS, np.float32)
        assert (np.abs((levels / LEVELS) ** 2 * maxima[:, None] - maps) <= bound(maps)).all()
        assert (np.abs(levels / LEVELS - np.sqrt(maps / maxima[:, None])) <= 1 / 126 + 1e-6).all()
    assert not any(part.any() for part in quantize(np.zeros((16, 16), np.float32)))


@pytest.mark.parametrize("size, g_sides, d_sides", [
    (64, [(16, 16), (32, 32)], [(8, 8), (4, 4)]), (128, [(32, 16)], [(32, 16)])
])  # fmt: skip
def test_page_of_incompressible_noise_stays_below_6_mb(size, g_sides, d_sides):
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.random((5, 3, size, size), np.float32) * 2 - 1).bfloat16()
    g_maps, d_maps = ({  # squared: levels are uniform
        f"{network} attn{queries}": torch.from_numpy(random.random((5, queries**2, keys**2), np.float32) ** 2)
        for queries, keys in sides
    } for network, sides in (("G", g_sides), ("D", d_sides)))  # fmt: skip
    d_maps["D attn4"] = torch.rand(5, 16, 16).bfloat16().requires_grad_()  # of any dtype
    samples = [AttentionSample("generated", images, g_maps | d_maps), AttentionSample("real", images, d_maps)]
    assert len(explorer_page(samples, "title").encode()) < 6_000_000


@pytest.mark.browser
def test_panels_show_the_maps(show):
    page = show(SAMPLES)
    query = query_points(SAMPLES[0].maps["G attn1"][0].numpy(), 1)[0]  # the most distinctive one
    assert (page.state()["image"], page.state()["layers"][0]["cell"]) == (0, query)
    for number, (sample, index) in enumerate((one, i) for one in SAMPLES for i in range(len(one.images))):
        page.select(number)
        check_panels(page, sample, index)


def check_panels(page: Page, sample: AttentionSample, index: int) -> None:
    """Compare values and pixels of the panels with the maps of the selected image, in both directions."""
    image = Image.fromarray(to_pixels(sample.images)[index])
    for attended_by, x, y in ((False, 0.03, 0.03), (False, 0.4, 0.72), (True, 0.4, 0.72), (True, 0.97, 0.55)):
        page.point(x, y)
        if attended_by != page.state()["attendedBy"]:
            page.press("r")
        layers = page.state()["layers"]
        assert [layer["name"][0] + layer["name"][-6:] for layer in layers] == list(sample.maps)
        for number, (layer, maps) in enumerate(zip(layers, sample.maps.values(), strict=True), start=1):
            maps = np.stack([maps[index], bound(maps[index].numpy())])
            expected, errors = maps.swapaxes(1, 2) if attended_by else maps
            selected_side, side = grid_sides(expected)
            cell = int(y * selected_side) * selected_side + int(x * selected_side)
            values, panel = np.array(layer["values"]), f"figure:nth-child({number})"
            assert (layer["selectedSide"], layer["cell"], layer["side"]) == (selected_side, cell, side)
            assert (np.abs(values - expected[cell]) <= errors[cell]).all()
            if values.max() > 0:  # a column may be all zeros after quantization
                shown = page.pixels(panel + " canvas")
                assert np.abs(shown - overlay(image, values.reshape(side, side))).max() <= 1
            outline, square, canvas = (page.find(f"{panel} {name}").rect for name in (".query", ".square", "canvas"))
            assert canvas == square
            for axis, length, place in (("x", "width", cell % selected_side), ("y", "height", cell // selected_side)):
                width = square[length] / selected_side
                assert outline[axis] - square[axis] == pytest.approx(place * width, abs=1)
                assert outline[length] == pytest.approx(width, abs=1)


@pytest.mark.browser
def test_texts_of_pooled_keys(show):
    """The selected query or key, and the values that a panel names, each on its own grid."""
    page, maps = show(SAMPLES[2:]), MAPS[0]
    position, panel, facts = page.find("#position"), page.find("figure"), page.find(".facts")
    query, key = 2 * FINEST + 6, 1 * POOLED + 3
    page.point(0.4, 0.15)
    assert position.text == "query: row 3, column 7 of 16 × 16" and "16 × 16 queries, 8 × 8 keys" in panel.text
    factor, own = re.match(r"max ([\d.]+)[^$]*self ([\d.]+)", facts.text).groups()
    assert float(factor) == pytest.approx(64 * maps[query].max().item(), rel=0.03)
    assert float(own) == pytest.approx(100 * maps[query, key].item(), rel=0.03)
    page.point(0.9, 0.1, "figure .square")
    assert page.state()["layers"][0]["readout"] == POOLED - 1 and facts.text.endswith("row 1, column 8")
    page.press("r")  # the pointer rests: the same place, on the grid of queries
    assert page.state()["layers"][0]["readout"] == FINEST + 14 and facts.text.endswith("row 2, column 15")
    page.point(0.4, 0.15)
    assert page.state()["layers"][0]["readout"] is None and position.text == "key: row 2, column 4 of 8 × 8"
    assert float(re.match(r"max ([\d.]+)", facts.text)[1]) == pytest.approx(64 * maps[:, key].max().item(), rel=0.03)
    page.press("r")
    assert page.cell() == (6, 2)  # the query at the pointer
    page.press("r", Keys.ARROW_LEFT, *[Keys.ARROW_DOWN] * POOLED)
    assert position.text == "key: row 8, column 3 of 8 × 8"  # stops at the border


@pytest.mark.browser
def test_keyboard_mouse_and_touch(show):
    page = show(SAMPLES)
    assert page.script("return document.activeElement.matches('#image:focus-visible')")
    x, y = page.cell()
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert page.cell() == (x + 2, y + 1)
    text = lambda: page.find("[aria-live=polite]").get_attribute("textContent")  # noqa: E731
    page.wait_for(lambda: f"row {y + 2}, column {x + 3} of 16" in text())
    assert text().count("Generator attn") == 2 and text().count("Discriminator attn") == 1
    page.press(Keys.ARROW_UP, *[Keys.ARROW_LEFT] * FINEST)
    assert page.cell() == (0, y)  # stops at the border
    for key, name, value in (
        (Keys.ENTER, "pinned", True), (Keys.SPACE, "pinned", False), ("2", "image", 1), (Keys.PAGE_DOWN, "image", 2),
        (Keys.PAGE_UP, "image", 1), ("1", "image", 0), (Keys.PAGE_UP, "image", 4), ("9", "image", 4),
    ):  # fmt: skip
        page.press(key)
        assert page.state()[name] == value
    for value, attended_by in (("in", True), ("out", False)):
        page.find(f"input[value={value}] + span").click()
        assert page.state()["attendedBy"] == attended_by

    page.select(0)
    page.point(0.3, 0.3)
    page.click()
    page.point(0.8, 0.8)
    page.press(Keys.PAGE_DOWN)
    assert (page.cell(), page.state()["pinned"]) == ((4, 4), True)  # the same position on the next image
    page.click()
    assert (page.cell(), page.state()["pinned"]) == ((12, 12), False)
    for positions, cell, pinned in (
        ([(0.2, 0.7)], (3, 11), True), ([(0.5, 0.5), (0.6, 0.4), (0.9, 0.1)], (14, 1), True),
        ([(0.53, 0.53)], (8, 8), True), ([(0.54, 0.54)], (8, 8), False),
    ):  # fmt: skip
        page.touch(*positions)
        assert (page.cell(), page.state()["pinned"]) == (cell, pinned)


@pytest.mark.browser
def test_layout_and_names_with_markup(show):
    page = show([SAMPLES[0]._replace(name=MARKUP, classes=[MARKUP] * 3)], MARKUP)
    page.assert_fits(1280)
    page.assert_fits(320)
    image = page.find("#image").rect
    assert image["width"] > 0.85 * 320
    assert all(panel.rect["y"] > image["y"] + image["height"] for panel in page.find_all("figure"))
    assert page.browser.title == page.find("h1").text == MARKUP
    assert page.find("#thumbnails h2").get_attribute("textContent") == MARKUP
    assert page.find("#position span").text == f"class: {MARKUP}"
    assert not page.find_all("h1 *, h2 *, #position span *")
