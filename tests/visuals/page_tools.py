"""Shared by the tests of the HTML pages: a page in a browser, and the largest error of the maps that it shows."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

webdriver = pytest.importorskip("selenium.webdriver")
ActionChains = webdriver.ActionChains
By = pytest.importorskip("selenium.webdriver.common.by").By
WebDriverWait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait


class BrowserPage:
    """User input to a page, and what it shows.

    Args:
        address: of the page.
        pointable: id of the element on which a position is chosen.
    """

    def __init__(self, browser: webdriver.Chrome, address: str, pointable: str):
        self.browser = browser
        self.command("Emulation.setFocusEmulationEnabled", enabled=True)  # a window has no focus before the first click
        browser.get(address)
        self.pointable = browser.find_element(By.ID, pointable)

    def wait_for(self, condition: Any) -> None:
        WebDriverWait(self.browser, 20, poll_frequency=0.02).until(lambda _: condition())

    def mouse(self) -> ActionChains:
        return ActionChains(self.browser, duration=0)

    def point(self, x: float, y: float) -> None:
        """Move the mouse to a position given as fractions of the element."""
        self.move_to(*self.position(self.pointable, x, y))

    def move_to(self, x: int, y: int) -> None:
        mouse = self.mouse()
        mouse.w3c_actions.pointer_action.move_to_location(x, y)
        mouse.perform()

    def position(self, element, x: float, y: float) -> tuple[int, int]:
        """Convert fractions of an element to pixels of the window."""
        box = self.browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", element)
        return round(box["x"] + x * box["width"]), round(box["y"] + y * box["height"])

    def press(self, *keys: str) -> None:
        self.mouse().send_keys(*keys).perform()

    def touch(self, *positions: tuple[float, float]) -> None:
        """Touch the element at the first position, in fractions of it, drag along the others and lift the finger."""
        for index, fractions in enumerate(positions):
            x, y = self.position(self.pointable, *fractions)
            kind = "touchMove" if index else "touchStart"
            self.command("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y, "id": 1}])
        self.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def command(self, name: str, **arguments) -> None:
        self.browser.execute_cdp_cmd(name, arguments)

    def panels(self) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, "figure")

    def pixels(self, element) -> np.ndarray:
        """Pixels of an element's canvas, (S, S, 3)."""
        canvas = element.find_element(By.TAG_NAME, "canvas")
        png = self.browser.execute_script("return arguments[0].toDataURL('image/png')", canvas).split(",")[1]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), int)

    def assert_quiet(self) -> None:
        """Check that the page has logged no error and requested nothing."""
        log = self.browser.get_log("browser")
        assert log == [], log
        names = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        assert self.browser.execute_script(names) == []


def quiet(page: BrowserPage) -> Iterator[BrowserPage]:
    """Yield a page for a fixture, and check after the test that it is quiet."""
    yield page
    page.assert_quiet()


def bound(maps: np.ndarray) -> np.ndarray:
    """Largest error of the page in each value of a map (N, M), as stated by `quantize`."""
    peaks = maps.max(axis=1, keepdims=True)
    return (2 * np.sqrt(maps / peaks) + 1 / 126) / 126 * peaks + 1e-6
