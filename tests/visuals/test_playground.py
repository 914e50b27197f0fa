"""The playground in a real browser: what it shows is compared with what the generator makes of the same z."""

import math

import numpy as np
import pytest
import torch
from page_tools import BrowserPage, bound, quiet
from PIL import Image

from networks import paper_models
from networks.latents import slerp
from sagan_models import Generator
from visuals import playground
from visuals.figures import overlay, to_pixels
from visuals.playground import Grid, generate_grids, grid_side, latent_grid, playground_page

webdriver = pytest.importorskip("selenium.webdriver")
Keys = webdriver.Keys
By = pytest.importorskip("selenium.webdriver.common.by").By

SIDE = 16  # tiles in a row of the page without classes
CLASS_SIDE = 4
CLASSES = {
    "cat": 3,
    "dog": 0,
    "a very long name of a class, which does not fit on a phone": 1,
    "horse": 4,
    "automobile": 2,
}
NAMES = [*CLASSES]


def randomize(G: torch.nn.Module) -> torch.nn.Module:
    """Give attention a weight, and each class a scale of its own, all of which are the same at first. Returns G."""
    for layer in G.modules():
        if isinstance(layer, torch.nn.Embedding):
            torch.nn.init.normal_(layer.weight)
        if hasattr(layer, "gamma"):
            torch.nn.init.constant_(layer.gamma, 0.5)
    return G.eval()


@pytest.fixture(scope="module", autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def corners() -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def G() -> Generator:
    torch.manual_seed(0)
    return randomize(Generator(32, 16, 8))


@pytest.fixture(scope="module")
def conditional_G() -> paper_models.Generator:
    torch.manual_seed(0)
    return randomize(paper_models.Generator(64, 16, 8, num_classes=5))


@pytest.fixture(scope="module")
def grids(G, corners) -> list[Grid]:
    return generate_grids(G, corners, [("", None)])


@pytest.fixture(scope="module")
def class_grids(conditional_G, corners) -> list[Grid]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(playground, "MAX_SIDE", CLASS_SIDE)
        return generate_grids(conditional_G, corners, [*CLASSES.items()])


@pytest.fixture(scope="module")
def plain_grids(corners) -> list[Grid]:
    return generate_grids(Generator(32, 16, 8, has_attention=False).eval(), corners, [("", None)])


@pytest.fixture(scope="module")
def addresses(grids, class_grids, plain_grids, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    pages = {"page": grids, "class_page": class_grids, "plain_page": plain_grids}
    for name, shown in pages.items():
        (folder / f"{name}.html").write_text(playground_page(shown, "A title", [4, 0, 7, 2]), encoding="utf-8")
    return {path.stem: path.as_uri() for path in folder.iterdir()}


@pytest.fixture
def page(browser, addresses):
    """The opened page; after each test, check that it has logged no error and requested nothing."""
    yield from quiet(Page(browser, addresses["page"]))


@pytest.fixture
def class_page(browser, addresses):
    yield from quiet(Page(browser, addresses["class_page"]))


@pytest.fixture
def plain_page(browser, addresses):
    """Of a network without attention."""
    yield from quiet(Page(browser, addresses["plain_page"]))


class Page(BrowserPage):
    """User input to the playground, and what it shows."""

    def __init__(self, browser: webdriver.Chrome, address: str):
        super().__init__(browser, address, "grid")
        self.wait_for(self.state)

    def state(self) -> dict:
        return self.browser.execute_script("return window.playground()")

    def place(self) -> tuple[float, float]:
        """Column and row of the position, in tiles."""
        state = self.state()
        return state["column"], state["row"]

    def find(self, selector: str):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def image(self) -> np.ndarray:
        return self.pixels(self.find("#image"))

    def select_tile(self, column: int, row: int) -> None:
        """Click a tile, beside its center."""
        side = self.state()["side"]
        if self.state()["pinned"]:
            self.mouse().click().perform()
        self.point((column + 0.6) / side, (row + 0.4) / side)
        self.mouse().click().perform()

    def choose_class(self, index: int) -> None:
        self.browser.find_elements(By.CSS_SELECTOR, "#classes label")[index].click()
        self.wait_for(lambda: self.state()["class"] == NAMES[index])


def z_of(corners: torch.Tensor, side: int, column: int, row: int) -> torch.Tensor:
    """z (1, z_dim) of a tile."""
    top, bottom = (slerp(corners[i : i + 1], corners[i + 1 : i + 2], side)[:, column] for i in (0, 2))
    return slerp(top, bottom, side)[:, row]


def tiles_of(grids: Grid) -> np.ndarray:
    """The pixels of the tiles by row and column, (side, side, S, S, 3)."""
    side = math.isqrt(len(grids.pixels))
    return grids.pixels.reshape(side, side, *grids.pixels.shape[1:]).astype(int)


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
    """Up to rounding: the images are of batches of other sizes."""
    assert np.abs(actual.astype(int) - expected).max() <= 1


def test_z_is_spherically_interpolated_between_the_corners():
    z = latent_grid(torch.randn(4, 64), 7)
    z0, z1, z2, z3 = z[[0, 6, 42, 48]].numpy()

    def between(start, end, t):
        lengths = np.linalg.norm(start), np.linalg.norm(end)
        angle = np.arccos(start @ end / (lengths[0] * lengths[1]))
        units = np.sin((1 - t) * angle) * start / lengths[0] + np.sin(t * angle) * end / lengths[1]
        return units / np.sin(angle) * ((1 - t) * lengths[0] + t * lengths[1])

    for row in range(7):
        for column in range(7):
            expected = between(between(z0, z1, column / 6), between(z2, z3, column / 6), row / 6)
            assert np.abs(z[7 * row + column].numpy() - expected).max() < 1e-4


def test_the_corners_are_the_given_z(corners):
    assert torch.allclose(latent_grid(corners, 5)[[0, 4, 20, 24]], corners, atol=1e-5)


def test_maps_are_means_over_all_queries(G, corners, grids):
    z = latent_grid(corners, SIDE)
    expected = G(z[40:44], return_attention=True)[1:]
    assert [*grids[0].attention] == ["G attn1", "G attn2"]
    for values, attention in zip(grids[0].attention.values(), expected, strict=True):
        assert values.shape == (SIDE**2, attention.shape[2])
        assert np.allclose(values[40:44], attention.sum(1) / attention.shape[1], atol=1e-6)
        assert np.allclose(values.sum(1), 1, atol=1e-4)


def test_each_class_has_the_same_z(conditional_G, corners, class_grids):
    assert [tiles.class_name for tiles in class_grids] == NAMES
    z = latent_grid(corners, CLASS_SIDE)
    for tiles, number in zip(class_grids, CLASSES.values(), strict=True):
        assert_near(tiles.pixels, to_pixels(conditional_G(z, torch.full((16,), number))))
    assert not np.array_equal(class_grids[0].pixels, class_grids[1].pixels)


SIZES = [(32, (64, 256), 1, 16), (64, (256, 1024), 1, 16), (64, (256,), 1, 16), (64, (256,), 8, 6),
         (128, (256, 1024), 1, 9), (128, (256,), 8, 3), (256, (256, 1024), 1, 4)]  # fmt: skip


@pytest.mark.parametrize("size, keys, classes, side", SIZES)
def test_a_page_of_noise_stays_below_6_mb(size, keys, classes, side):
    assert grid_side(3 * size**2 + sum(keys), classes) == side
    random = np.random.default_rng(0)

    def noise(name: str) -> Grid:
        pixels = random.integers(0, 256, (side**2, size, size, 3), np.uint8)
        values = [random.random((side**2, count), np.float32) ** 2 for count in keys]  # all levels equally frequent
        return Grid(name, pixels, {f"G attn{index}": layer for index, layer in enumerate(values, start=1)})

    page = playground_page([noise(100 * "é") for _ in range(classes)], "title", [0, 1, 2, 3])
    assert len(page.encode()) < 6_000_000


@pytest.mark.browser
def test_the_tile_under_the_pointer_is_what_g_makes_of_its_z(page, G, corners):
    for column, row in ((0, 0), (SIDE - 1, 0), (0, SIDE - 1), (SIDE - 1, SIDE - 1), (5, 11), (11, 5)):
        page.select_tile(column, row)
        assert page.place() == (column, row)
        assert_near(page.image(), to_pixels(G(z_of(corners, SIDE, column, row)))[0])
        assert page.find("#position").text.startswith(f"tile: row {row + 1}, column {column + 1} of 16 × 16\n")
        assert "as generated" in page.find("#position").text


@pytest.mark.browser
def test_the_grid_shows_every_tile_at_its_place(page, grids):
    shown = page.pixels(page.pointable).reshape(SIDE, 32, SIDE, 32, 3).swapaxes(1, 2)
    assert np.array_equal(shown, tiles_of(grids[0]))


@pytest.mark.browser
def test_halfway_between_tiles_is_their_mean(page, grids):
    tiles = tiles_of(grids[0])
    page.select_tile(6, 9)
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.place() == (6.5, 9)
    assert np.abs(page.image() - (tiles[9, 6] + tiles[9, 7]) / 2).max() <= 0.5
    assert "blend" in page.find("#position").text
    page.press(Keys.ARROW_UP, Keys.ARROW_UP)
    assert page.place() == (6.5, 8.5)
    assert np.abs(page.image() - tiles[8:10, 6:8].mean((0, 1))).max() <= 0.5


@pytest.mark.browser
def test_the_image_is_the_blend_at_the_pointer(page, grids):
    tiles = tiles_of(grids[0])
    for x, y in ((0.31, 0.62), (0.97, 0.5), (0.5, 0.999), (0.001, 0.001)):
        page.point(x, y)
        place = np.array(page.place())
        assert np.abs(place - (np.array([x, y]) * SIDE - 0.5).clip(0, SIDE - 1)).max() < 0.03
        (left, top), (right, down) = place.astype(int), place % 1
        weights = np.outer([1 - down, down], [1 - right, right])[..., None, None, None]
        expected = (weights * np.pad(tiles, [(0, 1)] * 2 + [(0, 0)] * 3)[top : top + 2, left : left + 2]).sum((0, 1))
        assert np.abs(page.image() - expected).max() <= 0.51
        marker = page.find(".point").rect
        shown = page.position(page.pointable, *(place + 0.5) / SIDE)
        assert np.abs(np.array([marker["x"], marker["y"]]) + marker["width"] / 2 - shown).max() <= 1.5


@pytest.mark.browser
def test_panels_show_where_the_nearest_tile_attends(page, grids):
    page.point(7.8 / SIDE, 3.3 / SIDE)  # in the tile of column 7, row 3
    cell = 3 * SIDE + 7
    layers = page.state()["layers"]
    assert [layer["name"] for layer in layers] == ["Generator attn1", "Generator attn2"]
    for layer, panel, values in zip(layers, page.panels(), grids[0].attention.values(), strict=True):
        shown, side = np.array(layer["values"]), layer["side"]
        assert (np.abs(shown - values[cell]) <= bound(values)[cell]).all()
        expected = overlay(Image.fromarray(grids[0].pixels[cell]), shown.reshape(side, side))
        assert np.abs(page.pixels(panel) - expected).max() <= 1
        row, column = divmod(int(shown.argmax()), side)
        assert f"{100 * shown.max():.3g} % at row {row + 1}, column {column + 1}" in panel.text
        assert f"max {shown.max() * side**2:.2g}"[:5] in panel.text


@pytest.mark.browser
def test_a_click_pins_a_tile_and_a_second_click_unpins_it(page):
    page.point(0.3, 0.3)
    page.mouse().click().perform()
    assert page.state()["pinned"] and page.place() == (4, 4)
    page.point(0.8, 0.8)
    assert page.place() == (4, 4)
    page.mouse().click().perform()
    assert not page.state()["pinned"] and page.place() == pytest.approx((12.3, 12.3), abs=0.03)


@pytest.mark.browser
def test_keyboard(page):
    assert page.browser.execute_script("return document.activeElement.matches('#grid:focus-visible')")
    assert page.pointable.value_of_css_property("outline-style") == "solid"
    assert page.place() == (7, 7)
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert page.place() == (7.5, 7.25)
    page.press(Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_UP)
    assert page.place() == (7.25, 6.75)
    page.press(Keys.ENTER)
    assert page.place() == (7, 7) and page.state()["pinned"]
    page.press(Keys.SPACE)
    assert not page.state()["pinned"]
    page.mouse().key_down(Keys.SHIFT).send_keys(Keys.ARROW_LEFT, Keys.ARROW_DOWN).key_up(Keys.SHIFT).perform()
    assert page.place() == (6, 8)
    page.press(*[Keys.ARROW_UP] * 4 * SIDE)
    assert page.place() == (6, 0)  # stops at the border
    page.point(0.8, 0.81)
    page.press(Keys.ARROW_LEFT)
    assert page.place() == (12, 12.5)  # at a quarter of a tile again


@pytest.mark.browser
def test_touch(page, grids):
    page.command("Emulation.setTouchEmulationEnabled", enabled=True)
    scrolled = lambda: page.browser.execute_script("return window.scrollY")  # noqa: E731
    page.touch((0.2, 0.7))
    assert page.place() == (3, 11)
    assert np.array_equal(page.image(), tiles_of(grids[0])[11, 3])
    page.touch((0.5, 0.9), (0.6, 0.5), (0.9, 0.1))
    assert page.place() == pytest.approx((13.9, 1.1), abs=0.03) and scrolled() == 0
    page.touch((0.53, 0.53), (0.535, 0.535))  # a tap that moves a few pixels
    assert page.place() == (8, 8)
    page.command("Emulation.setTouchEmulationEnabled", enabled=False)


@pytest.mark.browser
def test_classes_are_switched_at_the_same_z(class_page, conditional_G, corners, class_grids):
    page = class_page
    page.select_tile(2, 1)
    z = z_of(corners, CLASS_SIDE, 2, 1)
    for index in (0, 2, 1, 4, 2):
        page.choose_class(index)
        assert page.place() == (2, 1)
        assert_near(page.image(), to_pixels(conditional_G(z, torch.tensor([CLASSES[NAMES[index]]])))[0])
        values, attended = class_grids[index].attention["G attn1"], np.array(page.state()["layers"][0]["values"])
        assert (np.abs(attended - values[6]) <= bound(values)[6]).all()
        expected = overlay(Image.fromarray(class_grids[index].pixels[6]), attended.reshape(16, 16))
        assert np.abs(page.pixels(page.panels()[0]) - expected).max() <= 1
        shown = page.pixels(page.pointable).reshape(CLASS_SIDE, 64, CLASS_SIDE, 64, 3).swapaxes(1, 2)
        assert np.array_equal(shown, tiles_of(class_grids[index]))


@pytest.mark.browser
def test_classes_are_switched_by_keys(class_page):
    first = class_page.find("#classes input")
    class_page.browser.execute_script("arguments[0].focus()", first)
    class_page.press(Keys.ARROW_RIGHT)
    class_page.wait_for(lambda: class_page.state()["class"] == "dog")
    assert class_page.find(":focus-visible + span").value_of_css_property("outline-style") == "solid"
    names = [radio.accessible_name for radio in class_page.browser.find_elements(By.CSS_SELECTOR, "#classes input")]
    assert names == NAMES


@pytest.mark.browser
def test_the_last_of_two_quick_choices_is_shown(class_page):
    """Also if the first one is decoded after it."""
    class_page.browser.execute_script("""
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
    class_page.wait_for(lambda: class_page.state()["class"] == NAMES[2])
    class_page.wait_for(lambda: class_page.browser.execute_script("return window.isDecoded"))
    assert class_page.state()["class"] == NAMES[2]


@pytest.mark.browser
def test_without_classes_and_attention_there_is_neither_switch_nor_map(plain_page, plain_grids):
    plain_page.select_tile(4, 4)
    assert np.array_equal(plain_page.image(), tiles_of(plain_grids[0])[4, 4])
    assert plain_page.state()["layers"] == [] and plain_page.panels() == []
    hidden = ("#maps", "#about-maps", "#classes")
    assert not any(plain_page.find(selector).is_displayed() for selector in hidden)


@pytest.mark.browser
def test_screen_reader_text_names_tile_and_layers(page):
    page.press(Keys.ARROW_DOWN)
    text = lambda: page.find("[aria-live=polite]").get_attribute("textContent")  # noqa: E731
    page.wait_for(lambda: "row 8, column 8 of 16 × 16, blend" in text())
    assert text().count("Generator attn") == 2 and "uniform at row" in text()
    assert "row 8, column 8" in page.find("#image canvas").accessible_name
    assert "arrow keys" in page.pointable.accessible_name


@pytest.mark.browser
def test_the_page_names_the_samples_at_the_corners(page):
    assert "samples 4, 0, 7, 2 of" in page.find("footer").text
    assert "averaged over all queries" in page.find("footer").text


@pytest.mark.browser
@pytest.mark.parametrize("name", ["page", "class_page", "plain_page"])
def test_layout_on_a_phone(request, name):
    page = request.getfixturevalue(name)
    for width in (320, 360):
        page.command("Emulation.setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=2, mobile=True)
        assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
        image, chart = page.find("#image").rect, page.pointable.rect
        assert chart["width"] > 0.8 * width and image["width"] > 0.6 * width
        assert chart["y"] >= image["y"] + image["height"]  # a finger on the grid does not cover the image
        assert chart["y"] + chart["height"] <= 700
        assert all(panel.rect["y"] > chart["y"] + chart["height"] for panel in page.panels())
        labels = page.browser.find_elements(By.CSS_SELECTOR, "#classes label")
        assert len(labels) == len(NAMES) * (name == "class_page")
        assert all(label.size["height"] >= 44 for label in labels)
    page.command("Emulation.clearDeviceMetricsOverride")


@pytest.mark.browser
def test_markup_in_names_is_shown_as_text(browser, grids, tmp_path):
    text = "</script><b>bold</b> {{data}} & <!--<script>"
    file = tmp_path / "page.html"
    shown = [Grid(name, grids[0].pixels, grids[0].attention) for name in (text, "other")]
    file.write_text(playground_page(shown, text, [0, 1, 2, 3]), encoding="utf-8")
    page = Page(browser, file.as_uri())
    assert browser.title == page.find("h1").text == text
    assert page.find("#classes span").get_attribute("textContent") == page.state()["class"] == text
    assert browser.execute_script("return document.querySelectorAll('h1 *, #classes span *').length") == 0
    page.assert_quiet()
