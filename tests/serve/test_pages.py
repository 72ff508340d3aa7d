"""The description of the API: it is whole, needs no other site, and holds against requests that nobody thought of."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from served import Served, served

from ssod_edge.runtime.predict import Verdict
from ssod_edge.serve.pages import MODEL, VERDICT


@pytest.fixture(scope="module")
def server(export_template: Path) -> Iterator[Served]:
    with served({"m": export_template}, body_timeout=0.5) as running:
        yield running


def test_the_description_has_the_fields_that_are_answered(server: Served) -> None:
    assert list(VERDICT["properties"]) == [field.name for field in fields(Verdict)]
    assert list(MODEL["properties"]) == list(server.ask("/v1/models").json["models"][0])
    described = server.ask("/openapi.json").json
    assert set(described["paths"]) == {
        "/v1/predict", "/v1/models/{name}/predict", "/v1/models", "/healthz", "/readyz", "/metrics",
    }  # fmt: skip


def test_the_page_needs_no_other_site(server: Served) -> None:
    answer = server.ask("/docs")
    assert answer.status == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(rb"https?://|//[a-z]|src=|@import", answer.body)
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_token_is_described(export_template: Path) -> None:
    with served({"m": export_template}, token="a-token-of-some-length") as server:
        described = server.ask("/openapi.json").json
        secured = [path for path, found in described["paths"].items() for o in found.values() if "security" in o]
        assert [server.ask(path.format(name="m")).status for path in described["paths"]] == [
            401 if path in secured else 200 for path in described["paths"]
        ]


def test_requests_that_nobody_thought_of(server: Served, tmp_path: Path) -> None:
    """Of each page a few dozen, right ones and wrong ones: the answer is one that the description allows."""
    checks = (
        "not_a_server_error,response_schema_conformance,status_code_conformance,content_type_conformance,"
        "unsupported_method"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"),
            f"http://127.0.0.1:{server.port}/openapi.json",
            *("--phases", "coverage,fuzzing", "--mode", "all", "--max-examples", "10", "--seed", "0"),
            *("--checks", checks, "--request-timeout", "10", "--no-color", "--generation-database", "none"),
        ],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Tested: 6" in done.stdout and server.ask("/readyz").status == 200
