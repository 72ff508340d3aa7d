"""`monitor http://...`: a fleet from the pages of figures of its servers, with the figures of their files."""

from __future__ import annotations

import json
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from click.testing import CliRunner
from colour import COLOURS, paint
from served import served

from ssod_edge.cli import main
from ssod_edge.runtime.field.scraped import MOST, VARIABLE
from ssod_edge.serve.guard import VARIABLE as SERVERS
from ssod_edge.serve.models import Keeping


def command(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["monitor", *words], catch_exceptions=False)
    return done.exit_code, done.stdout, done.stderr


def test_a_server_says_what_its_files_say(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "0123456789abcdef0123"
    monkeypatch.setenv(VARIABLE, token)
    headers = {"Authorization": f"Bearer {token}"}
    pictures = [paint(tmp_path / f"{name}.png", name).read_bytes() for name in COLOURS]
    files = {name: str(tmp_path / f"{name}.json") for name in ("a", "b")}
    with served({"a": export, "b": export}, token=token, keeping=Keeping({}, files)) as server:
        for picture in pictures:
            assert server.ask("/v1/models/a/predict", picture, headers=headers).status == 200
        for model in server.service.models.values():
            assert model.counted is not None
            model.counted.flush()
        address = f"http://127.0.0.1:{server.port}"
        code, out, _ = command(address, "--json")
        assert code == 0
        scraped = json.loads(out)
        assert command(f"{address}/metrics", "--json")[1] == out.replace(address, f"{address}/metrics")
        code, out, _ = command(address)
        assert code == 0 and "2 devices, 4 images" in out
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            gone = f"http://127.0.0.1:{closed.getsockname()[1]}"
            code, out, error = command(address, gone, "--json")
        assert code == 1 and f"'{gone}' does not answer" in error
        assert list(json.loads(out)["problems"]) == [gone]
        assert json.loads(out)["log10_evidence_limit"] == pytest.approx(2.477, abs=1e-3), "it counts for the limit"
        monkeypatch.delenv(VARIABLE)
        code, _, error = command(address)
        assert code == 1 and "Unauthorized" in error
    read = json.loads(command(*files.values(), "--json")[1])
    assert read["devices"][0]["images"] == 4 and read["devices"][0]["unknown"] > 0
    for one, other in zip(scraped["devices"], read["devices"], strict=True):
        assert one["device"] == f"{address} {Path(other['device']).stem}"
        assert {**one, "device": ""} == {**other, "device": ""}
    assert {**scraped["together"], "stability_index": None} == {**read["together"], "stability_index": None}


def test_both_sides_name_one_variable() -> None:
    assert VARIABLE == SERVERS


PAGES = {
    "/none": b"# nothing\n",
    "/half": b'ssod_edge_monitor_images{model="m"} 3\n',
    "/lies": b"".join(
        b'ssod_edge_monitor_%s{model="m"} %d\n' % pair
        for pair in ((b"images", 1), (b"unknown", 2), (b"failed", 0), (b"alarms", 0))
    ),
    "/text": b"<html>{{{",
    "/far": b"",
    "/long": b"# x\n" * (MOST // 4 + 9),
}


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        page = PAGES[self.path]
        self.send_response(302 if self.path == "/far" else 200)
        self.send_header("Location", "http://127.0.0.1:9/")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none", "monitors nothing"),
        ("/half", "something else than the figures"),
        ("/lies", "something else than the figures"),
        ("/text", "something else than the figures"),
        ("/far", "Found"),
        ("/long", "monitors nothing"),
    ],
)
def test_pages_of_others(path: str, message: str) -> None:
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.handle_request, daemon=True).start()
        code, out, error = command(f"http://127.0.0.1:{server.server_port}{path}")
    assert code == 1 and message in error and not out
