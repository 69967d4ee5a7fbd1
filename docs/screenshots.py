"""Makes the pictures of docs/report.md from a sweep's records, in headless Chromium:

    python -m docs.screenshots runs/NAME

It needs Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import base64
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from orchestrator.config import TrackingConfig
from orchestrator.summary import Summary
from orchestrator.tracking import Target

WIDTH_PX = 1280
_SECTIONS = {
    "report_ranking.png": ("header", "#ranking"),
    "report_curves.png": ("#curves", "#curves"),
    "report_parameters.png": ("#effects", "#effects"),
    "report_collapse.png": ("#collapse", "#collapse"),
}
"""First and last element of each picture."""
_MAX_HEIGHT_PX = 1500
_MAX_BYTES = 300_000
_MARGIN_PX = 14


@contextmanager
def chromium(*arguments: str) -> Iterator[Any]:
    """A headless Chromium without a network. Raises LookupError if it or its driver is not installed."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        raise LookupError("no chromium with chromedriver on this machine")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--window-size={WIDTH_PX},900",
        *arguments,
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


def wait_for_drawing(browser: Any, axis: str = "step", timeout_s: float = 240.0) -> None:
    """Return when the last chart of the open report is drawn over `axis`."""
    from selenium.webdriver.support.ui import WebDriverWait

    drawn = "return document.documentElement.dataset.drawn"
    WebDriverWait(browser, timeout_s, 0.1).until(lambda found: found.execute_script(drawn) == axis)


def _picture(browser: Any, first: str, last: str) -> bytes:
    """The part of the page from one element to another, as PNG."""
    edges = "return [arguments[0], arguments[1]].map((name) => document.querySelector(name).getBoundingClientRect())"
    top, bottom = browser.execute_script(edges, first, last)
    height = min(bottom["bottom"] - top["top"] + 2 * _MARGIN_PX, _MAX_HEIGHT_PX)
    clip = {"x": 0, "y": top["top"] - _MARGIN_PX, "width": WIDTH_PX, "height": height, "scale": 1}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    image = Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")
    small = io.BytesIO()
    image.quantize(255, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def main(folder: Path) -> None:
    """Write the pictures of the report of a sweep beside this file."""
    summary = Summary.of(folder, Target.of(TrackingConfig()))
    with tempfile.TemporaryDirectory() as temporary, chromium() as browser:
        shutil.copy(summary.write_report(), f"{temporary}/report.html")
        browser.get(f"file://{temporary}/report.html")
        wait_for_drawing(browser)
        browser.execute_script("scrollTo(0, 0)")
        for name, (first, last) in _SECTIONS.items():
            content = _picture(browser, first, last)
            if len(content) > _MAX_BYTES:
                raise ValueError(f"{name}: {len(content)} bytes, more than {_MAX_BYTES}")
            Path(__file__).with_name(name).write_bytes(content)
            print(f"{name}: {len(content)} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
