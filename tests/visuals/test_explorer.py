"""The explorer page, in a real browser: what it draws is compared with the maps it was made of."""

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from visuals.attention_stats import AttentionSample
from visuals.explorer import LEVELS, explorer_page, quantise
from visuals.figures import overlay, query_points, to_pixels

SIDES = {"G attn1": 8, "G attn2": 16, "D attn1": 4}
RANDOM, PEAKED, UNIFORM, REAL = range(4)  # the samples of the page, in their order
FINEST = 16


@pytest.fixture(scope="module")
def shown() -> list[AttentionSample]:
    """Three generated images, with random, peaked and uniform maps, and a real one."""
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
def address(shown, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("page") / "attention.html"
    file.write_text(explorer_page(shown, "A title"), encoding="utf-8")
    return file.as_uri()


@pytest.fixture
def page(browser, address):
    """The page as it opens. Whatever a test does with it, it logs no error and asks for nothing beyond itself."""
    yield Page(browser, address)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []


class Page:
    """What a user does on the page, and what there is to see."""

    def __init__(self, browser: Chrome, address: str):
        self.browser = browser
        browser.get(address)
        self.stage = browser.find_element(By.ID, "stage")
        WebDriverWait(browser, 20, poll_frequency=0.02).until(lambda _: self.state()["layers"])

    def state(self) -> dict:
        return self.browser.execute_script("return window.explorer()")

    def cell(self) -> tuple[int, int]:
        """Column and row of the point, in cells of the finest layer."""
        state = self.state()
        return math.floor(state["x"] * FINEST), math.floor(state["y"] * FINEST)

    def choose(self, sample: int) -> None:
        self.browser.find_elements(By.CSS_SELECTOR, "#samples button")[sample].click()
        WebDriverWait(self.browser, 20, poll_frequency=0.02).until(lambda _: self.state()["layers"])

    def mouse(self) -> ActionChains:
        return ActionChains(self.browser, duration=0)

    def point(self, x: float, y: float) -> None:
        """Moves the mouse to a place given as shares of the image."""
        self.move_to(*self.place(self.stage, x, y))

    def move_to(self, x: int, y: int) -> None:
        mouse = self.mouse()
        mouse.w3c_actions.pointer_action.move_to_location(x, y)
        mouse.perform()

    def place(self, element, x: float, y: float) -> tuple[int, int]:
        """A place given as shares of an element, in pixels of the window."""
        box = self.browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", element)
        return round(box["x"] + x * box["width"]), round(box["y"] + y * box["height"])

    def press(self, *keys: str) -> None:
        self.mouse().send_keys(*keys).perform()

    def touch(self, *places: tuple[float, float]) -> None:
        """A finger down on the first of these shares of the image, along the others, and up."""
        for index, shares in enumerate(places):
            x, y = self.place(self.stage, *shares)
            kind = "touchMove" if index else "touchStart"
            self.command("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y, "id": 1}])
        self.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def command(self, name: str, **arguments) -> None:
        self.browser.execute_cdp_cmd(name, arguments)

    def panels(self) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, "figure")

    def pixels(self, panel) -> np.ndarray:
        """What the panel's canvas holds, (S, S, 3)."""
        canvas = panel.find_element(By.TAG_NAME, "canvas")
        png = self.browser.execute_script("return arguments[0].toDataURL('image/png')", canvas).split(",")[1]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), int)


def bound(maps: np.ndarray) -> np.ndarray:
    """How far the page may be off in each value of a map (N, N), as `quantise` promises."""
    peaks = maps.max(axis=1, keepdims=True)
    return (2 * np.sqrt(maps / peaks) + 1 / 126) / 126 * peaks + 1e-6


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 200.0])
def test_quantised_values_keep_to_the_bound(scale):
    maps = torch.softmax(scale * torch.randn(256, 256), -1).numpy()
    levels, peaks = quantise(maps)
    assert (levels.dtype, levels.max(), peaks.dtype) == (np.uint8, LEVELS, np.float32)
    assert (np.abs((levels / LEVELS) ** 2 * peaks[:, None] - maps) <= bound(maps)).all()
    assert (np.abs(levels / LEVELS - np.sqrt(maps / peaks[:, None])) <= 1 / 126 + 1e-6).all()


def test_a_row_of_zeros_stays_one():
    levels, peaks = quantise(np.zeros((16, 16), np.float32))
    assert not levels.any() and not peaks.any()


@pytest.mark.parametrize(
    "group, words",
    [
        (None, "at least one image"),
        (AttentionSample("real", torch.zeros(2, 3, 8, 8), {}), "no attention maps"),
        (AttentionSample("real", torch.zeros(2, 3, 8, 8), {"D attn1": torch.ones(1, 16, 16)}), "2 images need maps"),
        (AttentionSample("real", torch.zeros(1, 3, 8, 8), {"D attn1": torch.ones(1, 12, 12)}), "N a square"),
        (
            AttentionSample("real", torch.zeros(1, 3, 8, 8), {"D attn1": torch.full((1, 16, 16), math.nan)}),
            "not finite",
        ),
    ],
)
def test_what_does_not_fit_is_refused(group, words):
    with pytest.raises(ValueError, match=words):
        explorer_page([group] if group else [], "title")


def test_maps_of_a_network_in_bfloat16_with_gradients():
    maps = torch.full((1, 16, 16), 1 / 16, dtype=torch.bfloat16, requires_grad=True)
    assert "Discriminator attn1" in explorer_page(
        [AttentionSample("real", torch.zeros(1, 3, 8, 8), {"D attn1": maps})], "title"
    )


def test_size_at_its_worst():
    """Levels and pixels without any pattern, which nothing can compress."""
    random = np.random.default_rng(0)

    def noise(side: int) -> torch.Tensor:
        return torch.from_numpy(random.random((5, side**2, side**2), np.float32) ** 2)  # the square: levels all alike

    images = torch.from_numpy(random.random((5, 3, 64, 64), np.float32) * 2 - 1)
    of_d = {"D attn1": noise(8), "D attn2": noise(4)}
    generated = AttentionSample("generated", images, {"G attn1": noise(16), "G attn2": noise(32)} | of_d)
    assert len(explorer_page([generated, AttentionSample("real", images, of_d)], "title").encode()) < 6_000_000


@pytest.mark.parametrize("sample", [RANDOM, PEAKED, UNIFORM, REAL])
def test_panels_show_the_maps(page, shown, sample):
    group, index = (shown[0], sample) if sample < REAL else (shown[1], 0)
    image = Image.fromarray(to_pixels(group.images)[index])
    page.choose(sample)
    for inward, x, y in ((False, 0.03, 0.03), (False, 0.4, 0.72), (True, 0.4, 0.72), (True, 0.97, 0.55)):
        page.point(x, y)
        if inward != page.state()["inward"]:
            page.press("r")
        state = page.state()
        assert (state["sample"], state["inward"]) == (sample, inward)
        assert [layer["name"][0] + layer["name"][-6:] for layer in state["layers"]] == list(group.maps)
        for layer, panel, maps in zip(state["layers"], page.panels(), group.maps.values(), strict=True):
            maps, side = maps[index].numpy(), layer["side"]
            cell = int(y * side) * side + int(x * side)
            wanted, error = (maps[:, cell], bound(maps)[:, cell]) if inward else (maps[cell], bound(maps)[cell])
            values = np.array(layer["values"])
            assert layer["cell"] == cell
            assert (np.abs(values - wanted) <= error).all()
            if values.max() > 0:  # the least that a map can hold is shown as nothing
                assert np.abs(page.pixels(panel) - overlay(image, values.reshape(side, side))).max() <= 1
            if not inward:  # 1/126 of the heat scale: up to 6 of 255 in a channel
                assert np.abs(page.pixels(panel) - overlay(image, wanted.reshape(side, side))).max() <= 7


def test_what_is_on_the_screen(page, shown):
    """The ring lies around the point's cell; the brightest cell of the screen is the map's maximum."""
    page.choose(PEAKED)
    page.point(0.1, 0.9)
    panel, layer = page.panels()[0], page.state()["layers"][0]
    view = panel.find_element(By.CLASS_NAME, "view").rect
    ring = panel.find_element(By.CLASS_NAME, "ring").rect
    side = layer["side"]
    assert ring["x"] - view["x"] == pytest.approx(layer["cell"] % side * view["width"] / side, abs=1)
    assert ring["y"] - view["y"] == pytest.approx(layer["cell"] // side * view["height"] / side, abs=1)
    assert ring["width"] == pytest.approx(view["width"] / side, abs=1)
    png = panel.find_element(By.TAG_NAME, "canvas").screenshot_as_png
    screen = np.asarray(Image.open(io.BytesIO(png)).convert("RGB").resize((side, side), Image.Resampling.BOX), int)
    assert screen[..., 0].argmax() == shown[0].maps["G attn1"][PEAKED, layer["cell"]].argmax()


def test_it_opens_with_the_point_that_tells_most(page, shown):
    start = query_points(shown[0].maps["G attn1"][RANDOM].numpy(), 1)[0]
    state = page.state()
    assert (state["sample"], state["layers"][0]["cell"]) == (RANDOM, start)
    assert not state["inward"] and not state["held"]
    assert "bright cells are where it looks" in page.browser.find_element(By.TAG_NAME, "header").text


def test_words_below_a_panel(page, shown):
    page.choose(PEAKED)
    page.point(0.5, 0.5)
    layer, facts = page.state()["layers"][0], page.panels()[0].find_element(By.CLASS_NAME, "facts")
    peak = shown[0].maps["G attn1"][PEAKED, layer["cell"]].max().item()
    assert facts.text.startswith(f"{64 * peak:.0f} × an even gaze at most")
    view = page.panels()[0].find_element(By.CLASS_NAME, "view")
    page.move_to(*page.place(view, 0.03, 0.97))
    assert page.state()["layers"][0]["read"] == 56
    assert facts.text.endswith("at row 8, column 1")
    page.point(0.5, 0.5)
    assert page.state()["layers"][0]["read"] is None


def test_a_click_holds_the_point_and_another_lets_it_go(page):
    page.point(0.3, 0.3)
    page.mouse().click().perform()
    held = page.cell()
    page.point(0.8, 0.8)
    assert (page.cell(), page.state()["held"]) == (held, True)
    page.press(Keys.PAGE_DOWN)
    assert page.cell() == held  # the same place on the next image
    page.mouse().click().perform()
    assert (page.cell(), page.state()["held"]) == ((12, 12), False)
    page.point(0.1, 0.8)
    assert page.cell() == (1, 12)


def test_keyboard(page):
    assert page.browser.execute_script("return document.activeElement.matches('#stage:focus-visible')")
    assert page.stage.value_of_css_property("outline-style") == "solid"
    x, y = page.cell()
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert page.cell() == (x + 2, y + 1)
    page.press(Keys.ARROW_LEFT, Keys.ARROW_UP)
    assert page.cell() == (x + 1, y)
    page.press(*[Keys.ARROW_LEFT] * FINEST)
    assert page.cell() == (0, y)  # the border stops it
    page.press(Keys.ENTER)
    assert page.state()["held"]
    page.press(Keys.SPACE)
    assert not page.state()["held"]
    samples = []
    for key in ("2", Keys.PAGE_DOWN, Keys.PAGE_UP, "1", Keys.PAGE_UP, "9"):
        page.press(key)
        samples.append(page.state()["sample"])
    assert samples == [1, 2, 1, 0, 3, 3]
    page.press("r")
    assert page.state()["inward"]
    assert page.browser.find_element(By.CSS_SELECTOR, "input[value=in]").is_selected()
    page.press("r")
    assert not page.state()["inward"]


def test_a_screen_reader_hears_the_point(page):
    page.press(Keys.ARROW_DOWN)
    column, row = page.cell()
    spoken = page.browser.find_element(By.CSS_SELECTOR, "[aria-live=polite]")
    words = f"Point at row {row + 1}, column {column + 1} of 16. Where it looks: Generator attn1:"
    WebDriverWait(page.browser, 10).until(lambda _: spoken.get_attribute("textContent").startswith(words))
    assert "real 1" in [button.accessible_name for button in page.browser.find_elements(By.TAG_NAME, "button")]


def test_touch(page):
    page.command("Emulation.setTouchEmulationEnabled", enabled=True)
    page.touch((0.2, 0.7))
    assert (page.cell(), page.state()["held"]) == ((3, 11), True)
    page.touch((0.5, 0.5), (0.6, 0.4), (0.9, 0.1))
    assert (page.cell(), page.state()["held"]) == ((14, 1), True)
    page.touch((0.53, 0.53), (0.54, 0.54))  # a tap that trembles
    assert (page.cell(), page.state()["held"]) == ((8, 8), True)
    page.touch((0.54, 0.54))
    assert (page.cell(), page.state()["held"]) == ((8, 8), False)
    page.command("Emulation.setTouchEmulationEnabled", enabled=False)


def test_a_phone(page):
    for width, sample in ((320, RANDOM), (360, REAL), (360, RANDOM)):
        page.command("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=2, mobile=True)
        page.choose(sample)
        assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.stage.size["width"] > 0.85 * width
        assert all(panel.rect["y"] > page.stage.rect["y"] + page.stage.size["height"] for panel in page.panels())
    page.command("Emulation.clearDeviceMetricsOverride")


def test_text_stays_text(browser, tmp_path):
    text = "</script><b>bold</b> {{data}} & <!--<script>"
    file = tmp_path / "page.html"
    maps = {"D attn1": torch.full((1, 16, 16), 1 / 16)}
    file.write_text(explorer_page([AttentionSample(text, torch.zeros(1, 3, 8, 8), maps)], text), encoding="utf-8")
    page = Page(browser, file.as_uri())
    assert browser.title == browser.find_element(By.TAG_NAME, "h1").text == text
    assert browser.find_element(By.CSS_SELECTOR, "#samples h2").get_attribute("textContent") == text
    assert browser.execute_script("return document.querySelectorAll('h1 *, h2 *').length") == 0
    assert [layer["name"] for layer in page.state()["layers"]] == ["Discriminator attn1"]
    assert browser.get_log("browser") == []
