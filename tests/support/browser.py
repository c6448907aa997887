# SPDX-License-Identifier: Apache-2.0
"""A real browser for pages: headless Chromium, driven by selenium."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.support.wait import WebDriverWait

# Texts with less contrast than WCAG 2.1 wants at level AA, with what they have.
_LOW_CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgba(color) {
  // The browser itself converts color(), color-mix() and names.
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
}
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
function ground(element) {
  const layers = [];
  for (let at = element; at; at = at.parentElement)
    layers.push(rgba(getComputedStyle(at).backgroundColor));
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
}
function light(color) {
  const [r, g, b] = color.map((each) => {
    const c = each / 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const unseen = ["SCRIPT", "STYLE", "NOSCRIPT", "OPTION"];
const found = new Set(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let texts = 0;
while (walker.nextNode()) {
  const node = walker.currentNode, element = node.parentElement, style = getComputedStyle(element);
  if (!node.textContent.trim() || unseen.includes(element.tagName)) continue;
  if (!element.getClientRects().length || style.visibility !== "visible") continue;
  texts++;
  const below = ground(element);
  const ink = over(rgba(element instanceof SVGElement ? style.fill : style.color), below);
  const [darker, lighter] = [light(ink), light(below)].sort((a, b) => a - b);
  const ratio = (lighter + 0.05) / (darker + 0.05), size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  if (ratio < (large ? 3 : 4.5))
    found.add(`${ratio.toFixed(2)} ${element.className}: ${node.textContent.slice(0, 40)}`);
}
return [texts, [...found]];
"""

# Elements that stick out of the window although nothing around them scrolls.
_STICKING_OUT = """
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const box = element.getBoundingClientRect();
  if (!box.width || (box.right <= innerWidth + 1 && box.left >= -1)) continue;
  let inside = getComputedStyle(element).position === "absolute";
  for (let at = element.parentElement; at && !inside; at = at.parentElement)
    inside = getComputedStyle(at).overflowX !== "visible";
  if (!inside) found.push(`${element.tagName}.${element.className} ${box.left}-${box.right}`);
}
return found;
"""


class Browser:
    """Headless Chromium with one page."""

    def __init__(self, driver: Any) -> None:
        """Take a driver of selenium, whose own types have gaps."""
        self.driver = driver

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a page from its file and wait until its program says that it is ready."""
        self.resize(width, height)
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
        )
        self.driver.get_log("browser")
        self.driver.get("about:blank")
        self.driver.get(page.absolute().as_uri())
        self.wait("return document.documentElement.dataset.ready === '1'")

    def resize(self, width: int, height: int) -> None:
        """Give the window a size, as narrow as a phone's if need be."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def run(self, script: str, *arguments: object) -> Any:
        """Run a script in the page and return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, *arguments: object, seconds: float = 60) -> None:
        """Wait until a script returns something true."""
        WebDriverWait(self.driver, seconds, poll_frequency=0.02).until(
            lambda _: self.run(script, *arguments)
        )

    def find(self, selector: str) -> Any:
        """Return the first element of a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        """Return all elements of a CSS selector."""
        return list(self.driver.find_elements("css selector", selector))

    def text(self, selector: str) -> str:
        """Return the text of an element as it is shown."""
        return str(self.find(selector).text)

    def keys(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def errors(self) -> list[str]:
        """Return what the browser has complained about since the page was opened."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
        ]

    def low_contrast(self) -> tuple[int, list[str]]:
        """Return how many texts are shown, and those with too little contrast."""
        texts, found = self.run(_LOW_CONTRAST)
        return texts, found

    def sticking_out(self) -> list[str]:
        """Return the elements that make the page wider than the window."""
        return list(self.run(_STICKING_OUT))


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start Chromium; it ends with the block."""
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    assert all(programs), "install chromium and chromium-driver: make packages-test"
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    # Chromium's sandbox refuses root; what it opens here is our own.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as scratch:
        # Chromium leaves its lock's directory behind.
        service = Service(str(programs[1]), env={**os.environ, "TMPDIR": scratch})
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield Browser(driver)
        finally:
            driver.quit()
