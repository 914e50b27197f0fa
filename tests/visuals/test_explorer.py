"""The explorer page in a real browser: its panels are compared with the maps that it was made from."""

import io
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from page_tools import MARKUP, BrowserPage, Keys, bound
from PIL import Image

from visuals.attention_stats import AttentionSample, grid_sides
from visuals.explorer import explorer_page
from visuals.figures import overlay, query_points, to_pixels

SIDES = {"G attn1": 8, "G attn2": 16, "D attn1": 4}
FINEST = 16
POOLED = 8  # side of the grid of pooled keys, for FINEST x FINEST queries


@pytest.fixture(scope="module")
def samples() -> list[AttentionSample]:
    """Three generated images, with random, peaked and uniform maps, and a real image."""
    torch.manual_seed(0)
    scale = torch.tensor([2.0, 40.0, 0.0]).view(3, 1, 1)
    maps = {name: torch.softmax(scale * torch.randn(3, side**2, side**2), -1) for name, side in SIDES.items()}
    real = {"D attn1": torch.softmax(torch.randn(1, 16, 16), -1)}
    return [
        AttentionSample("generated", torch.rand(3, 3, 32, 32) * 2 - 1, maps),
        AttentionSample("real", torch.rand(1, 3, 32, 32) * 2 - 1, real),
    ]


@pytest.fixture(scope="module")
def pooled() -> AttentionSample:
    """An image whose two layers have pooled keys: one with random maps; one where each query attends to one key."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, FINEST**2, POOLED**2)
    maps = {"G attn1": torch.softmax(logits, -1), "D attn1": torch.softmax(1000 * logits, -1)}
    return AttentionSample("generated", torch.rand(1, 3, 32, 32) * 2 - 1, maps)


class Page(BrowserPage):
    """User input to the explorer, and what it shows."""

    def cell(self) -> tuple[int, int]:
        """Column and row of the query, in cells of the finest layer."""
        state = self.state()
        return math.floor(state["x"] * FINEST), math.floor(state["y"] * FINEST)

    def select(self, image: int) -> None:
        self.find_all("#thumbnails button")[image].click()
        self.wait_until_ready()


@pytest.fixture
def show(quiet_browser, tmp_path) -> Callable[..., Page]:
    """A function that opens the page of some samples."""

    def open_page(samples: Sequence[AttentionSample], title: str = "A title") -> Page:
        (tmp_path / "page.html").write_text(explorer_page(samples, title), encoding="utf-8")
        return Page(quiet_browser, (tmp_path / "page.html").as_uri(), "image", "explorer", "layers")

    return open_page


def test_maps_of_any_dtype_are_accepted_with_gradients():
    maps = torch.full((1, 16, 16), 1 / 16, dtype=torch.bfloat16, requires_grad=True)
    page = explorer_page([AttentionSample("real", torch.zeros(1, 3, 8, 8), {"D attn1": maps})], "title")
    assert "Discriminator attn1" in page


def test_page_of_incompressible_noise_stays_below_6_mb():
    random = np.random.default_rng(0)

    def noise(query_side: int, key_side: int) -> torch.Tensor:
        values = random.random((5, query_side**2, key_side**2), np.float32) ** 2  # squared: levels are uniform
        return torch.from_numpy(values)

    def page_size(image_size: int, g_maps: dict, d_maps: dict) -> int:
        images = torch.from_numpy(random.random((5, 3, image_size, image_size), np.float32) * 2 - 1)
        samples = [AttentionSample("generated", images, g_maps | d_maps), AttentionSample("real", images, d_maps)]
        return len(explorer_page(samples, "title").encode())

    g_maps = {"G attn1": noise(16, 16), "G attn2": noise(32, 32)}
    assert page_size(64, g_maps, {"D attn1": noise(8, 8), "D attn2": noise(4, 4)}) < 6_000_000
    assert page_size(128, {"G attn1": noise(32, 16)}, {"D attn1": noise(32, 16)}) < 6_000_000


@pytest.mark.browser
def test_panels_show_the_maps(show, samples, pooled):
    """In both directions: values, pixels of the canvas, and what is on the screen at which place."""
    page = show(samples)
    query = query_points(samples[0].maps["G attn1"][0].numpy(), 1)[0]  # the most distinctive one
    assert (page.state()["image"], page.state()["layers"][0]["cell"]) == (0, query)
    for number, (sample, index) in enumerate([*((samples[0], index) for index in range(3)), (samples[1], 0)]):
        page.select(number)
        check_panels(page, sample, index)
    page = show([pooled])
    check_panels(page, pooled, 0)

    attended = pooled.maps["D attn1"][0].argmax(1).numpy()  # (256,): the key of each query
    page.browser.execute_script("document.querySelectorAll('i').forEach((outline) => (outline.style.opacity = 0))")
    page.press("r")
    query = 12 * FINEST + 5
    page.point(5.5 / FINEST, 12.5 / FINEST)
    key = attended[query]
    assert bright_cells(page.panels()[1], POOLED) == {key}
    page.press("r")
    page.point((key % POOLED + 0.5) / POOLED, (key // POOLED + 0.5) / POOLED)
    assert bright_cells(page.panels()[1], FINEST) == set(np.flatnonzero(attended == key)) > {query}


def check_panels(page: Page, sample: AttentionSample, index: int) -> None:
    """Compare values and pixels of the panels with the maps of the selected image, in both directions."""
    pixels = Image.fromarray(to_pixels(sample.images)[index])
    for attended_by, x, y in ((False, 0.03, 0.03), (False, 0.4, 0.72), (True, 0.4, 0.72), (True, 0.97, 0.55)):
        page.point(x, y)
        if attended_by != page.state()["attendedBy"]:
            page.press("r")
        state = page.state()
        assert [layer["name"][0] + layer["name"][-6:] for layer in state["layers"]] == list(sample.maps)
        for layer, panel, maps in zip(state["layers"], page.panels(), sample.maps.values(), strict=True):
            maps = maps[index].numpy()
            query_side, key_side = grid_sides(maps)
            selected_side, side = (key_side, query_side) if attended_by else (query_side, key_side)
            cell = int(y * selected_side) * selected_side + int(x * selected_side)
            expected, error = (maps[:, cell], bound(maps)[:, cell]) if attended_by else (maps[cell], bound(maps)[cell])
            values = np.array(layer["values"])
            assert (layer["selectedSide"], layer["cell"], layer["side"]) == (selected_side, cell, side)
            assert (np.abs(values - expected) <= error).all()
            if values.max() > 0:  # a column may be all zeros after quantization
                assert np.abs(page.pixels(panel) - overlay(pixels, values.reshape(side, side))).max() <= 1
            outline, square = panel.find_element("class name", "query").rect, panel.find_element("class name", "square")
            for axis, length, place in (("x", "width", cell % selected_side), ("y", "height", cell // selected_side)):
                width = square.rect[length] / selected_side
                assert outline[axis] - square.rect[axis] == pytest.approx(place * width, abs=1)
                assert outline[length] == pytest.approx(width, abs=1)


def bright_cells(panel, side: int) -> set[int]:
    """The cells of a panel that are yellow on the screen, not gray."""
    png = panel.find_element("tag name", "canvas").screenshot_as_png
    screen = np.asarray(Image.open(io.BytesIO(png)).convert("RGB").resize((side, side), Image.Resampling.BOX), int)
    return set(np.flatnonzero(screen[..., 0] - screen[..., 2] > 40))


@pytest.mark.browser
def test_texts_of_pooled_keys(show, pooled):
    """The selected query or key, and the values that a panel names, each on its own grid."""
    page, maps = show([pooled]), pooled.maps["G attn1"][0]
    position, panel = page.find("#position"), page.panels()[0]
    facts, square = panel.find_element("class name", "facts"), panel.find_element("class name", "square")
    times_uniform = lambda: float(re.match(r"max ([\d.]+)", facts.text)[1])  # noqa: E731
    query, key = 2 * FINEST + 6, 1 * POOLED + 3
    page.point(0.4, 0.15)
    assert position.text == "query: row 3, column 7 of 16 × 16"
    assert "16 × 16 queries, 8 × 8 keys" in panel.text
    assert times_uniform() == pytest.approx(64 * maps[query].max().item(), rel=0.03)
    own = float(re.search(r"self ([\d.]+)", facts.text)[1]) / 100
    assert own == pytest.approx(maps[query, key].item(), rel=0.03)
    page.point(0.9, 0.1, square)
    assert page.state()["layers"][0]["readout"] == POOLED - 1 and facts.text.endswith("row 1, column 8")
    page.press("r")  # the pointer rests: the same place, on the grid of queries
    assert page.state()["layers"][0]["readout"] == FINEST + 14 and facts.text.endswith("row 2, column 15")
    page.point(0.4, 0.15)
    assert page.state()["layers"][0]["readout"] is None
    assert position.text == "key: row 2, column 4 of 8 × 8"
    assert times_uniform() == pytest.approx(64 * maps[:, key].max().item(), rel=0.03)
    page.press("r")
    assert page.cell() == (6, 2)  # the query at the pointer
    page.press("r", Keys.ARROW_LEFT, *[Keys.ARROW_DOWN] * POOLED)
    assert position.text == "key: row 8, column 3 of 8 × 8"  # stops at the border


@pytest.mark.browser
def test_keyboard_mouse_and_touch(show, samples):
    page = show(samples)
    assert page.browser.execute_script("return document.activeElement.matches('#image:focus-visible')")
    x, y = page.cell()
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert page.cell() == (x + 2, y + 1)
    text = lambda: page.find("[aria-live=polite]").get_attribute("textContent")  # noqa: E731
    page.wait_for(lambda: f"row {y + 2}, column {x + 3} of 16" in text())
    assert text().count("Generator attn") == 2 and text().count("Discriminator attn") == 1
    page.press(Keys.ARROW_UP, *[Keys.ARROW_LEFT] * FINEST)
    assert page.cell() == (0, y)  # stops at the border
    for key, pinned in ((Keys.ENTER, True), (Keys.SPACE, False)):
        page.press(key)
        assert page.state()["pinned"] == pinned
    images = []
    for key in ("2", Keys.PAGE_DOWN, Keys.PAGE_UP, "1", Keys.PAGE_UP, "9"):
        page.press(key)
        images.append(page.state()["image"])
    assert images == [1, 2, 1, 0, 3, 3]
    for value, attended_by in (("in", True), ("out", False)):
        page.find(f"input[value={value}] + span").click()
        assert page.state()["attendedBy"] == attended_by

    page.select(0)
    page.point(0.3, 0.3)
    page.click()
    pinned = page.cell()
    page.point(0.8, 0.8)
    page.press(Keys.PAGE_DOWN)
    assert (page.cell(), page.state()["pinned"]) == (pinned, True)  # the same position on the next image
    page.click()
    assert (page.cell(), page.state()["pinned"]) == ((12, 12), False)

    page.touch((0.2, 0.7))
    assert (page.cell(), page.state()["pinned"]) == ((3, 11), True)
    page.touch((0.5, 0.5), (0.6, 0.4), (0.9, 0.1))
    assert (page.cell(), page.state()["pinned"]) == ((14, 1), True)
    for positions, pinned in (([(0.53, 0.53), (0.54, 0.54)], True), ([(0.54, 0.54)], False)):  # the first one trembles
        page.touch(*positions)
        assert (page.cell(), page.state()["pinned"]) == ((8, 8), pinned)


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 1280])
def test_layout_and_names_with_markup(show, width):
    maps = {name: torch.full((1, side**2, side**2), side**-2.0) for name, side in SIDES.items()}
    page = show([AttentionSample(MARKUP, torch.zeros(1, 3, 32, 32), maps, [MARKUP])], MARKUP)
    page.resize(width)
    page.assert_fits(width)
    if width == 320:
        assert page.pointable.size["width"] > 0.85 * width
        assert all(
            panel.rect["y"] > page.pointable.rect["y"] + page.pointable.size["height"] for panel in page.panels()
        )
    assert page.browser.title == page.find("h1").text == MARKUP
    assert page.find("#thumbnails h2").get_attribute("textContent") == MARKUP
    assert page.find("#position span").text == f"class: {MARKUP}"
    assert not page.find_all("h1 *, h2 *, #position span *")
