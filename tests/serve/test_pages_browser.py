"""The page of `/docs` in a real browser: it describes the API, and asks it, with a token too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import browser
from colour import paint
from served import eventually, served

TOKEN = "a-token-of-some-length"


@pytest.mark.parametrize("token", [None, TOKEN])
def test_the_page_describes_and_asks(export: Path, tmp_path: Path, token: str | None) -> None:
    red, grey = paint(tmp_path / "red.png", "red"), paint(tmp_path / "grey.png", "grey")
    with served({"a": export, "b": export}, token=token) as server, browser(900, 900, "browser") as driver:

        def text(name: str) -> str:
            return str(driver.find_element("id", name).text)

        driver.get(f"http://127.0.0.1:{server.port}/docs")
        assert eventually(lambda: "POST /v1/models/{name}/predict" in text("pages") and "p_known" in text("pages"))
        if token is not None:
            driver.find_element("id", "token").send_keys(f"{token}\t")
        assert eventually(lambda: text("path").split() == ["/v1/models/a/predict", "/v1/models/b/predict"])
        driver.find_element("id", "files").send_keys(f"{red}\n{grey}")
        driver.find_element("css selector", "button").click()
        assert eventually(lambda: text("answer").startswith("200"))
        verdicts = json.loads(text("answer").partition("\n")[2])["verdicts"]
        assert [(v["image"], v["known"]) for v in verdicts] == [("red.png", True), ("grey.png", False)]
        refused = [entry["message"] for entry in driver.get_log("browser") if "401" not in entry["message"]]
        assert refused == [], "no error, and nothing that the policy forbids"
