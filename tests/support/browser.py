"""A browser without a screen, for tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium; install the extra 'dev'")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (BROWSER and DRIVER):  # the module that imports this one is skipped
    pytest.skip(
        "needs Chromium and its driver (on Debian: apt install chromium chromium-driver)", allow_module_level=True
    )
ActionChains, Keys = webdriver.ActionChains, webdriver.Keys


@contextmanager
def browser(width: int, height: int, *logs: str) -> Iterator[Any]:
    """Chromium with a window of this size, which keeps these logs."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    # A container gives a browser neither a sandbox for root nor much shared memory.
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", dict.fromkeys(logs, "ALL"))
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER))) as found:
        yield found
