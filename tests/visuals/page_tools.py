"""Shared by the tests of the HTML pages: a page in a browser, and the largest error of the maps that it shows."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

webdriver = pytest.importorskip("selenium.webdriver")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait
ActionChains, Keys = webdriver.ActionChains, webdriver.Keys
MARKUP = "</script><b>bold</b> {{data}} & <!--<script>"  # a name that has to be shown as it is


class BrowserPage:
    """A page that is written and opened, user input to it, and what it shows. Selectors are those of CSS."""

    pointable = "body"  # on which a position is chosen
    state_name = "none"  # of the function that returns the page's state, if it has one; `layers` are there once decoded

    def __init__(self, browser: webdriver.Chrome, path: Path, text: str):
        path.write_text(text, encoding="utf-8")
        self.browser, self.script, self.actions = browser, browser.execute_script, ActionChains(browser, duration=0)
        self.command("Emulation.clearDeviceMetricsOverride")  # of an earlier test
        self.command("Emulation.setTouchEmulationEnabled", enabled=False)
        self.command("Emulation.setFocusEmulationEnabled", enabled=True)  # a window has no focus before the first click
        browser.get(path.absolute().as_uri())
        self.wait_until_decoded()

    def wait_until_decoded(self) -> None:
        self.wait_for(lambda: self.state_name == "none" or (self.state() or {}).get("layers") is not None)

    def state(self) -> dict:
        return self.script(f"return {self.state_name}()")

    def wait_for(self, condition) -> None:
        WebDriverWait(self.browser, 20, poll_frequency=0.02).until(lambda _: condition())

    def find(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def find_all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def command(self, name: str, **arguments) -> None:
        self.browser.execute_cdp_cmd(name, arguments)

    def point(self, x: float, y: float, selector: str = "") -> None:
        """Move the mouse to a position given as fractions of an element, by default the pointable one."""
        self.actions.w3c_actions.pointer_action.move_to_location(*self.position(x, y, selector))
        self.actions.perform()

    def position(self, x: float, y: float, selector: str = "") -> tuple[int, int]:
        """Convert fractions of an element to pixels of the window."""
        element = self.find(selector or self.pointable)
        box = self.script("return arguments[0].getBoundingClientRect().toJSON()", element)
        return round(box["x"] + x * box["width"]), round(box["y"] + y * box["height"])

    def click(self) -> None:
        """Click where the mouse is."""
        self.actions.click().perform()

    def press(self, *keys: str) -> None:
        self.actions.send_keys(*keys).perform()

    def touch(self, *positions: tuple[float, float]) -> None:
        """Touch the element at the first position, in fractions of it, drag along the others and lift the finger."""
        self.command("Emulation.setTouchEmulationEnabled", enabled=True)
        for kind, fractions in zip(["touchStart"] + ["touchMove"] * len(positions), positions, strict=False):
            point = dict(zip("xy", self.position(*fractions), strict=True), id=1)
            self.command("Input.dispatchTouchEvent", type=kind, touchPoints=[point])
        self.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def pixels(self, selector: str) -> np.ndarray:
        """Pixels of a canvas, (S, S, 3)."""
        png = self.script("return arguments[0].toDataURL('image/png')", self.find(selector)).split(",")[1]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), int)

    def assert_fits(self, width: int, height: int = 800) -> None:
        """Resize the window: nothing is wider than it."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        assert self.script("return document.documentElement.scrollWidth") <= width


def bound(maps: np.ndarray) -> np.ndarray:
    """Largest error of the page in each value of a map (N, M), as stated by `quantize`."""
    peaks = maps.max(axis=1, keepdims=True)
    return (2 * np.sqrt(maps / peaks) + 1 / 126) / 126 * peaks + 1e-6
