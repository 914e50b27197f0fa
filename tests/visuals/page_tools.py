"""Shared by the tests of the HTML pages: a page in a browser, and the largest error of the maps that it shows."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

webdriver = pytest.importorskip("selenium.webdriver")
Keys = webdriver.Keys
By = pytest.importorskip("selenium.webdriver.common.by").By
WebDriverWait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait
MARKUP = "</script><b>bold</b> {{data}} & <!--<script>"  # a name that has to be shown as it is


class BrowserPage:
    """User input to a page, and what it shows.

    Args:
        pointable: id of the element on which a position is chosen.
        state: the page's function that returns its state, if it has one, of which `ready` is there once it is decoded.
    """

    def __init__(self, browser: webdriver.Chrome, address: str, pointable: str, state: str = "", ready: str = ""):
        self.browser, self._state, self.ready = browser, state, ready
        self.command("Emulation.clearDeviceMetricsOverride")  # of an earlier test
        self.command("Emulation.setTouchEmulationEnabled", enabled=False)
        self.command("Emulation.setFocusEmulationEnabled", enabled=True)  # a window has no focus before the first click
        browser.get(address)
        self.pointable = self.find(f"#{pointable}")
        self.wait_until_ready()

    def state(self) -> Any:
        return self.browser.execute_script(f"return window.{self._state}()")

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: not self.ready or (self.state() or {}).get(self.ready) is not None)

    def wait_for(self, condition: Any) -> None:
        WebDriverWait(self.browser, 20, poll_frequency=0.02).until(lambda _: condition())

    def find(self, selector: str):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector: str) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def command(self, name: str, **arguments) -> None:
        self.browser.execute_cdp_cmd(name, arguments)

    def point(self, x: float, y: float, element=None) -> None:
        """Move the mouse to a position given as fractions of an element, by default the pointable one."""
        mouse = webdriver.ActionChains(self.browser, duration=0)
        mouse.w3c_actions.pointer_action.move_to_location(*self.position(element or self.pointable, x, y))
        mouse.perform()

    def position(self, element, x: float, y: float) -> tuple[int, int]:
        """Convert fractions of an element to pixels of the window."""
        box = self.browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", element)
        return round(box["x"] + x * box["width"]), round(box["y"] + y * box["height"])

    def click(self) -> None:
        """Click where the mouse is."""
        webdriver.ActionChains(self.browser, duration=0).click().perform()

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.browser, duration=0).send_keys(*keys).perform()

    def touch(self, *positions: tuple[float, float]) -> None:
        """Touch the element at the first position, in fractions of it, drag along the others and lift the finger."""
        self.command("Emulation.setTouchEmulationEnabled", enabled=True)
        for index, fractions in enumerate(positions):
            x, y = self.position(self.pointable, *fractions)
            kind = "touchMove" if index else "touchStart"
            self.command("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y, "id": 1}])
        self.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def resize(self, width: int, height: int = 800) -> None:
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                     mobile=width < 600)  # fmt: skip

    def panels(self) -> list:
        return self.find_all("figure")

    def pixels(self, element) -> np.ndarray:
        """Pixels of an element's canvas, (S, S, 3)."""
        canvas = element.find_element(By.TAG_NAME, "canvas")
        png = self.browser.execute_script("return arguments[0].toDataURL('image/png')", canvas).split(",")[1]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), int)

    def assert_fits(self, width: int) -> None:
        assert self.browser.execute_script("return document.documentElement.scrollWidth") <= width


def bound(maps: np.ndarray) -> np.ndarray:
    """Largest error of the page in each value of a map (N, M), as stated by `quantize`."""
    peaks = maps.max(axis=1, keepdims=True)
    return (2 * np.sqrt(maps / peaks) + 1 / 126) / 126 * peaks + 1e-6
