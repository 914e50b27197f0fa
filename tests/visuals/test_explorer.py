"""The explorer page in a real browser: its panels are compared with the maps that it was made from."""

import io
import math
import re

import numpy as np
import pytest
import torch
from page_tools import BrowserPage, bound, quiet
from PIL import Image

from visuals.attention_stats import AttentionSample, grid_sides
from visuals.explorer import explorer_page
from visuals.figures import overlay, query_points, to_pixels

webdriver = pytest.importorskip("selenium.webdriver")
Keys = webdriver.Keys
By = pytest.importorskip("selenium.webdriver.common.by").By
WebDriverWait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait

SIDES = {"G attn1": 8, "G attn2": 16, "D attn1": 4}
RANDOM, PEAKED, UNIFORM, REAL = range(4)  # the images of the page, in this order
FINEST = 16
POOLED = 8  # side of the grid of pooled keys, for FINEST x FINEST queries


@pytest.fixture(scope="module")
def samples() -> list[AttentionSample]:
    """Three generated images, with random, peaked and uniform maps, and a real image."""
    torch.manual_seed(0)
    maps = {
        name: torch.softmax(torch.tensor([2.0, 40.0, 0.0]).view(3, 1, 1) * torch.randn(3, side**2, side**2), -1)
        for name, side in SIDES.items()
    }
    real = {"D attn1": torch.softmax(torch.randn(1, 16, 16), -1)}
    return [
        AttentionSample("generated", torch.rand(3, 3, 32, 32) * 2 - 1, maps),
        AttentionSample("real", torch.rand(1, 3, 32, 32) * 2 - 1, real),
    ]


@pytest.fixture(scope="module")
def pooled_sample() -> AttentionSample:
    """An image whose two layers have pooled keys: one with random maps; one where each query attends to one key."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, FINEST**2, POOLED**2)
    maps = {"G attn1": torch.softmax(logits, -1), "D attn1": torch.softmax(1000 * logits, -1)}
    return AttentionSample("generated", torch.rand(1, 3, 32, 32) * 2 - 1, maps)


@pytest.fixture(scope="module")
def addresses(samples, pooled_sample, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    for name, shown in (("page", samples), ("pooled_page", [pooled_sample])):
        (folder / name).with_suffix(".html").write_text(explorer_page(shown, "A title"), encoding="utf-8")
    return {path.stem: path.as_uri() for path in folder.iterdir()}


@pytest.fixture
def page(browser, addresses):
    """The opened page; after each test, check that it has logged no error and requested nothing."""
    yield from quiet(Page(browser, addresses["page"]))


@pytest.fixture
def pooled_page(browser, addresses):
    yield from quiet(Page(browser, addresses["pooled_page"]))


class Page(BrowserPage):
    """User input to the explorer, and what it shows."""

    def __init__(self, browser: webdriver.Chrome, address: str):
        super().__init__(browser, address, "image")
        self.image = self.pointable
        self.wait_for(lambda: self.state()["layers"])

    def state(self) -> dict:
        return self.browser.execute_script("return window.explorer()")

    def cell(self) -> tuple[int, int]:
        """Column and row of the query, in cells of the finest layer."""
        state = self.state()
        return math.floor(state["x"] * FINEST), math.floor(state["y"] * FINEST)

    def select(self, image: int) -> None:
        self.browser.find_elements(By.CSS_SELECTOR, "#thumbnails button")[image].click()
        self.wait_for(lambda: self.state()["layers"])


def outline_width(parent, name: str) -> float:
    """Width of an outline as a fraction of the image or panel that it is in."""
    return parent.find_element(By.CLASS_NAME, name).size["width"] / parent.size["width"]


@pytest.mark.parametrize(
    "sample, token",
    [
        (None, "image"),
        (AttentionSample("real", torch.zeros(2, 3, 8, 8), {}), "real"),
        (AttentionSample("real", torch.zeros(2, 3, 8, 8), {"D attn1": torch.ones(1, 16, 16)}), r"\(1, 16, 16\)"),
        (AttentionSample("real", torch.zeros(1, 3, 8, 8), {"D attn1": torch.ones(1, 12, 12)}), r"\(1, 12, 12\)"),
        (AttentionSample("real", torch.zeros(1, 3, 8, 8), {"D attn1": torch.ones(1, 16, 8)}), r"\(1, 16, 8\)"),
        (AttentionSample("real", torch.zeros(1, 3, 8, 8), {"D attn1": torch.full((1, 16, 16), math.nan)}), "NaN"),
    ],
)
def test_invalid_samples_raise(sample, token):
    with pytest.raises(ValueError, match=token):
        explorer_page([sample] if sample else [], "title")


def test_bfloat16_maps_that_require_gradients_are_accepted():
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
@pytest.mark.parametrize("image", [RANDOM, PEAKED, UNIFORM, REAL])
def test_panels_show_the_maps(page, samples, image):
    sample, index = (samples[0], image) if image < REAL else (samples[1], 0)
    page.select(image)
    assert page.state()["image"] == image
    check_panels(page, sample, index)


@pytest.mark.browser
def test_panels_of_pooled_keys_show_the_maps(pooled_page, pooled_sample):
    check_panels(pooled_page, pooled_sample, 0)


def check_panels(page: Page, sample: AttentionSample, index: int) -> None:
    """Compare values and pixels of the panels with the maps of the selected image, in both directions."""
    pixels = Image.fromarray(to_pixels(sample.images)[index])
    for attended_by, x, y in ((False, 0.03, 0.03), (False, 0.4, 0.72), (True, 0.4, 0.72), (True, 0.97, 0.55)):
        page.point(x, y)
        if attended_by != page.state()["attendedBy"]:
            page.press("r")
        state = page.state()
        assert state["attendedBy"] == attended_by
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
            if not attended_by:  # 1/126 of the heat scale: up to 6 of 255 in a channel
                assert np.abs(page.pixels(panel) - overlay(pixels, expected.reshape(side, side))).max() <= 7


@pytest.mark.browser
def test_screen_shows_query_outline_and_maximum(page, samples):
    page.select(PEAKED)
    page.point(0.1, 0.9)
    panel, layer = page.panels()[0], page.state()["layers"][0]
    square = panel.find_element(By.CLASS_NAME, "square").rect
    query = panel.find_element(By.CLASS_NAME, "query").rect
    side = layer["side"]
    assert query["x"] - square["x"] == pytest.approx(layer["cell"] % side * square["width"] / side, abs=1)
    assert query["y"] - square["y"] == pytest.approx(layer["cell"] // side * square["height"] / side, abs=1)
    assert query["width"] == pytest.approx(square["width"] / side, abs=1)
    png = panel.find_element(By.TAG_NAME, "canvas").screenshot_as_png
    screen = np.asarray(Image.open(io.BytesIO(png)).convert("RGB").resize((side, side), Image.Resampling.BOX), int)
    assert screen[..., 0].argmax() == samples[0].maps["G attn1"][PEAKED, layer["cell"]].argmax()


@pytest.mark.browser
def test_screen_shows_the_only_key_that_a_query_attends_to_and_the_reverse(pooled_page, pooled_sample):
    page, attended = pooled_page, pooled_sample.maps["D attn1"][0].argmax(1)  # (256,): the key of each query
    panel = page.panels()[1]

    def bright_cells(side):
        png = panel.find_element(By.TAG_NAME, "canvas").screenshot_as_png
        screen = np.asarray(Image.open(io.BytesIO(png)).convert("RGB").resize((side, side), Image.Resampling.BOX), int)
        return set(np.flatnonzero(screen[..., 0] - screen[..., 2] > 40))  # yellow on gray

    page.browser.execute_script("document.querySelectorAll('i').forEach((outline) => (outline.style.opacity = 0))")
    query = 12 * FINEST + 5
    page.point(5.5 / FINEST, 12.5 / FINEST)
    key = attended[query].item()
    assert bright_cells(POOLED) == {key}
    page.press("r")
    page.point((key % POOLED + 0.5) / POOLED, (key // POOLED + 0.5) / POOLED)
    assert bright_cells(FINEST) == set(np.flatnonzero(attended.numpy() == key)) > {query}


@pytest.mark.browser
def test_a_pooled_key_is_selected_on_its_own_grid(pooled_page):
    page = pooled_page
    position = page.browser.find_element(By.ID, "position")
    outline = lambda parent: outline_width(parent, "query")  # noqa: E731
    square = page.panels()[0].find_element(By.CLASS_NAME, "square")
    page.point(0.53, 0.72)
    query = page.cell()
    assert position.text == "query: row 12, column 9 of 16 × 16"
    assert outline(page.image) == pytest.approx(1 / FINEST, abs=0.01) == outline(square)
    assert "16 × 16 queries, 8 × 8 keys" in page.panels()[0].text and "self" in page.panels()[0].text
    page.press("r")
    assert position.text == "key: row 6, column 5 of 8 × 8"
    assert outline(page.image) == pytest.approx(1 / POOLED, abs=0.01) == outline(square)
    page.press("r")
    assert page.cell() == query
    page.press("r", Keys.ARROW_LEFT, Keys.ARROW_DOWN)
    assert position.text == "key: row 7, column 4 of 8 × 8"
    page.point(0.28, 0.72)
    assert position.text == "key: row 6, column 3 of 8 × 8"
    assert page.cell() == (4, 11)  # the query at the pointer
    page.press(Keys.ARROW_RIGHT)
    page.press(*[Keys.ARROW_DOWN] * POOLED)
    assert page.state()["layers"][0]["cell"] == 7 * POOLED + 3


@pytest.mark.browser
def test_text_below_a_panel_of_pooled_keys(pooled_page, pooled_sample):
    page, maps = pooled_page, pooled_sample.maps["G attn1"][0]
    panel = page.panels()[0]
    facts, square = panel.find_element(By.CLASS_NAME, "facts"), panel.find_element(By.CLASS_NAME, "square")
    times_uniform = lambda: float(re.match(r"max ([\d.]+)", facts.text)[1])  # noqa: E731
    query, key = 2 * FINEST + 6, 1 * POOLED + 3
    page.point(0.4, 0.15)
    assert times_uniform() == pytest.approx(64 * maps[query].max().item(), rel=0.03)
    own = float(re.search(r"self ([\d.]+)", facts.text)[1]) / 100
    assert own == pytest.approx(maps[query, key].item(), rel=0.03)
    page.move_to(*page.position(square, 0.9, 0.1))
    assert page.state()["layers"][0]["readout"] == POOLED - 1
    assert facts.text.endswith("row 1, column 8")
    assert outline_width(square, "readout") == pytest.approx(1 / POOLED, abs=0.01)
    page.press("r")  # the pointer rests: the same place, on the grid of queries
    assert page.state()["layers"][0]["readout"] == FINEST + 14
    assert facts.text.endswith("row 2, column 15")
    assert outline_width(square, "readout") == pytest.approx(1 / FINEST, abs=0.01)
    page.point(0.4, 0.15)
    assert times_uniform() == pytest.approx(64 * maps[:, key].max().item(), rel=0.03)


@pytest.mark.browser
def test_page_opens_with_the_most_distinctive_query(page, samples):
    query = query_points(samples[0].maps["G attn1"][RANDOM].numpy(), 1)[0]
    state = page.state()
    assert (state["image"], state["layers"][0]["cell"]) == (RANDOM, query)
    assert not state["attendedBy"] and not state["pinned"]


@pytest.mark.browser
def test_text_below_a_panel(page, samples):
    page.select(PEAKED)
    page.point(0.5, 0.5)
    layer, facts = page.state()["layers"][0], page.panels()[0].find_element(By.CLASS_NAME, "facts")
    maximum = samples[0].maps["G attn1"][PEAKED, layer["cell"]].max().item()
    assert f" {64 * maximum:.0f} ×" in facts.text and f"\n{100 * maximum:.3g} %" in facts.text
    square = page.panels()[0].find_element(By.CLASS_NAME, "square")
    page.move_to(*page.position(square, 0.03, 0.97))
    assert page.state()["layers"][0]["readout"] == 56
    assert facts.text.endswith("row 8, column 1")
    page.point(0.5, 0.5)
    assert page.state()["layers"][0]["readout"] is None


@pytest.mark.browser
def test_click_pins_the_query_and_a_second_click_unpins_it(page):
    page.point(0.3, 0.3)
    page.mouse().click().perform()
    pinned = page.cell()
    page.point(0.8, 0.8)
    assert (page.cell(), page.state()["pinned"]) == (pinned, True)
    page.press(Keys.PAGE_DOWN)
    assert page.cell() == pinned  # the same position on the next image
    page.mouse().click().perform()
    assert (page.cell(), page.state()["pinned"]) == ((12, 12), False)
    page.point(0.1, 0.8)
    assert page.cell() == (1, 12)


@pytest.mark.browser
def test_radio_buttons_set_the_direction(page):
    for value, attended_by in (("in", True), ("out", False)):
        page.browser.find_element(By.CSS_SELECTOR, f"input[value={value}] + span").click()
        assert page.state()["attendedBy"] == attended_by


@pytest.mark.browser
def test_keyboard(page):
    assert page.browser.execute_script("return document.activeElement.matches('#image:focus-visible')")
    assert page.image.value_of_css_property("outline-style") == "solid"
    x, y = page.cell()
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert page.cell() == (x + 2, y + 1)
    page.press(Keys.ARROW_LEFT, Keys.ARROW_UP)
    assert page.cell() == (x + 1, y)
    page.press(*[Keys.ARROW_LEFT] * FINEST)
    assert page.cell() == (0, y)  # stops at the border
    page.press(Keys.ENTER)
    assert page.state()["pinned"]
    page.press(Keys.SPACE)
    assert not page.state()["pinned"]
    images = []
    for key in ("2", Keys.PAGE_DOWN, Keys.PAGE_UP, "1", Keys.PAGE_UP, "9"):
        page.press(key)
        images.append(page.state()["image"])
    assert images == [1, 2, 1, 0, 3, 3]
    page.press("r")
    assert page.state()["attendedBy"]
    assert page.browser.find_element(By.CSS_SELECTOR, "input[value=in]").is_selected()
    page.press("r")
    assert not page.state()["attendedBy"]


@pytest.mark.browser
def test_screen_reader_text_names_query_and_layers(page):
    page.press(Keys.ARROW_DOWN)
    column, row = page.cell()
    announcement = page.browser.find_element(By.CSS_SELECTOR, "[aria-live=polite]")
    text = lambda: announcement.get_attribute("textContent")  # noqa: E731
    WebDriverWait(page.browser, 10).until(lambda _: f"row {row + 1}, column {column + 1} of 16" in text())
    assert text().count("Generator attn") == 2 and text().count("Discriminator attn") == 1
    assert "real 1" in [button.accessible_name for button in page.browser.find_elements(By.TAG_NAME, "button")]


@pytest.mark.browser
def test_touch(page):
    page.command("Emulation.setTouchEmulationEnabled", enabled=True)
    page.touch((0.2, 0.7))
    assert (page.cell(), page.state()["pinned"]) == ((3, 11), True)
    page.touch((0.5, 0.5), (0.6, 0.4), (0.9, 0.1))
    assert (page.cell(), page.state()["pinned"]) == ((14, 1), True)
    page.touch((0.53, 0.53), (0.54, 0.54))  # a tap that moves a few pixels
    assert (page.cell(), page.state()["pinned"]) == ((8, 8), True)
    page.touch((0.54, 0.54))
    assert (page.cell(), page.state()["pinned"]) == ((8, 8), False)
    page.command("Emulation.setTouchEmulationEnabled", enabled=False)


@pytest.mark.browser
def test_layout_on_a_phone(page):
    for width, image in ((320, RANDOM), (360, REAL), (360, RANDOM)):
        page.command("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=2, mobile=True)
        page.select(image)
        assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.image.size["width"] > 0.85 * width
        assert all(panel.rect["y"] > page.image.rect["y"] + page.image.size["height"] for panel in page.panels())
    page.command("Emulation.clearDeviceMetricsOverride")


@pytest.mark.browser
def test_markup_in_names_is_shown_as_text(browser, tmp_path):
    text = "</script><b>bold</b> {{data}} & <!--<script>"
    file = tmp_path / "page.html"
    maps = {"D attn1": torch.full((1, 16, 16), 1 / 16)}
    sample = AttentionSample(text, torch.zeros(1, 3, 8, 8), maps, [text])
    file.write_text(explorer_page([sample], text), encoding="utf-8")
    page = Page(browser, file.as_uri())
    assert browser.title == browser.find_element(By.TAG_NAME, "h1").text == text
    assert browser.find_element(By.CSS_SELECTOR, "#thumbnails h2").get_attribute("textContent") == text
    assert browser.find_element(By.CSS_SELECTOR, "#position span").text == f"class: {text}"
    assert browser.execute_script("return document.querySelectorAll('h1 *, h2 *, #position span *').length") == 0
    assert [layer["name"] for layer in page.state()["layers"]] == ["Discriminator attn1"]
    assert browser.get_log("browser") == []
