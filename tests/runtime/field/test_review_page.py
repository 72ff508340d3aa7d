"""The page's server: who gets in, what it gives, steps, two at once, kills, and the end."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from collected import write_collected
from PIL import Image

from ssod_edge.cli import main
from ssod_edge.errors import OutputError
from ssod_edge.runtime.field import review_draft, review_page
from ssod_edge.runtime.field.review_draft import Draft
from ssod_edge.runtime.field.review_page import MOST, Server

pytest.importorskip("sklearn", reason="needs the extra 'teach'")

SEVEN = [f"07-{n:03}.jpg" for n in range(6)]
TEN = [f"10-{n:03}.jpg" for n in range(4)]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "kept"
    write_collected(folder, {7: 6, 10: 4, 3: 1}, scale=10)
    return folder


@pytest.fixture
def collected(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "kept"))


@pytest.fixture
def server(collected: Path) -> Iterator[Server]:
    with Server(Draft(collected, collected / "classes"), 0) as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield made
        made.shutdown()


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply, reply.read()


def get(server: Server, path: str, **headers: str) -> tuple[HTTPResponse, bytes]:
    return ask(server.server_address[1], "GET", f"/{server.token}/{path}", None, **headers)


def post(server: Server, path: str, value: Any) -> tuple[int, dict[str, Any]]:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    reply, content = ask(server.server_address[1], "POST", f"/{server.token}/{path}", body)
    return reply.status, json.loads(content)


def step(server: Server, do: str, name: str | None = None, files: list[str] | None = None, changes: int | None = None):
    current = server.draft.changes if changes is None else changes
    return post(server, "step", {"changes": current, "step": {"do": do, "name": name, "files": files or []}})


def test_it_listens_to_this_machine_alone(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", server.server_address[1]), timeout=5):
        pass


def test_the_page_needs_nothing_else(server: Server) -> None:
    reply, content = get(server, "")
    assert reply.status == 200 and reply.headers["Content-Type"] == "text/html; charset=utf-8"
    assert (
        "default-src 'none'" in reply.headers["Content-Security-Policy"]
        and reply.headers["Cache-Control"] == "no-store"
    )
    assert not re.search(rb"https?://|@import|<link[^>]+stylesheet|<script[^>]+src", content)


@pytest.mark.parametrize("path", ["", "state", "thumb/07-000.jpg", "image/07-000.jpg", "step", "finish", "none"])
def test_without_the_token_nobody_gets_anything(server: Server, path: str, collected: Path) -> None:
    port = server.server_address[1]
    for before in (
        "/",
        "//",
        "/x/",
        f"/{server.token[:-1]}/",
        f"/{server.token}x/",
        f"/?token={server.token}/",
        "/\u00e9/",
    ):
        for method in ("GET", "POST"):
            where = f"{before}{path}".encode("latin-1").decode("latin-1")
            body = b'{"changes": 0}' if method == "POST" else None
            with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
                length = f"Content-Length: {len(body)}\r\n" if body else ""
                head = f"{method} {where} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{length}\r\n"
                line.sendall(head.encode("latin-1") + (body or b""))
                assert line.makefile("rb").read().split(b"\r\n")[0] == b"HTTP/1.0 403 Forbidden"
    assert not server.finished.is_set() and not (collected / "classes").exists()


def test_the_host_must_be_this_server(server: Server) -> None:
    port = server.server_address[1]
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        f"127.0.0.1:{port + 1}",
        f"127.0.0.1.x:{port}",
        "",
    ):
        assert get(server, "state", Host=host)[0].status == 403
        reply, _ = ask(port, "POST", f"/{server.token}/finish", b'{"changes": 0}', Host=host)
        assert reply.status == 403
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert get(server, "state", Host=host)[0].status == 200
    assert not server.finished.is_set()


def test_the_token_is_new_each_time(collected: Path) -> None:
    with Server(Draft(collected, collected), 0) as one, Server(Draft(collected, collected), 0) as other:
        assert one.token != other.token and len(one.token) >= 32


def test_pictures(server: Server, collected: Path) -> None:
    for kind, side in (("thumb", 360), ("image", 480)):
        reply, content = get(server, f"{kind}/07-000.jpg")
        assert reply.headers["Content-Type"] == "image/jpeg"
        assert Image.open(io.BytesIO(content)).size == (side, side)
    turned = Image.new("RGB", (800, 100))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(collected / "07-001.jpg", exif=exif)
    assert Image.open(io.BytesIO(get(server, "thumb/07-001.jpg")[1])).size == (45, 360), "upright and whole"
    (collected / "07-002.jpg").write_bytes(b"no picture")
    (collected / "07-003.jpg").unlink()
    for name in ("07-002.jpg", "07-003.jpg"):
        assert get(server, f"thumb/{name}")[0].status == 404


@pytest.mark.parametrize(
    "path",
    ["../../../../etc/passwd", "..%2F..%2Fsecret.jpg", "%2Fetc%2Fpasswd", "collected.jsonl", "../secret.jpg", "", "%00",
     "07-000.jpg/../../secret.jpg", "./07-000.jpg", "07-000.jpg?x", "secret.jpg", "link.jpg"],
)  # fmt: skip
def test_no_path_leads_out(server: Server, collected: Path, path: str) -> None:
    shutil.copy(collected / "07-000.jpg", collected.parent / "secret.jpg")
    (collected / "link.jpg").symlink_to(collected.parent / "secret.jpg")  # after the page was opened
    for kind in ("thumb", "image"):
        assert get(server, f"{kind}/{path}")[0].status == 404
    assert step(server, "class", "mug", [path])[0] == 400


def test_the_state(server: Server) -> None:
    state = json.loads(get(server, "state")[1])
    assert [(pile["kind"], pile["name"], len(pile["files"])) for pile in state["piles"]] == [
        ("group", "group-01", 6), ("group", "group-02", 4), ("group", "singles", 1),
    ]  # fmt: skip
    assert state["piles"][0]["said"] == "4 unknown; likeliest: 2 cup, 2 plate"
    assert state["images"]["07-002.jpg"]["class_name"] == "fork" and state["images"]["07-002.jpg"]["known"] is True
    assert "descriptor" not in state["images"]["07-002.jpg"]
    assert (state["known"], state["given"], state["undo"]) == (["cup", "fork", "plate"], [], False)


def test_steps_undo_and_the_end(server: Server, collected: Path) -> None:
    code, state = step(server, "class", "cafe\u0301", SEVEN)
    assert code == 200 and state["given"] == ["caf\u00e9"] and state["undo"]
    assert step(server, "discard", None, TEN)[0] == 200
    code, state = step(server, "undo")
    assert code == 200 and state["touched"] == TEN and state["changes"] == 3
    assert not (collected / "classes").exists(), "nothing is moved before the end"
    code, answer = post(server, "finish", {"changes": 3})
    assert code == 200 and answer["report"][0] == "caf\u00e9: 6 images" and server.report == answer["report"]
    assert server.finished.wait(5)
    assert sorted(path.name for path in (collected / "classes" / "caf\u00e9").iterdir()) == SEVEN
    assert step(server, "undo")[0] == 409 and post(server, "finish", {"changes": 3})[0] == 409


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"{}", b'{"changes": "0"}', b'{"changes": 0}',
     b'{"changes": 0, "x": 1}',
     b'{"changes": 0, "step": {"do": "rm", "name": null, "files": []}}', b'{"changes": 0, "step": {"do": "class"}}',
     b'{"changes": 0, "step": {"do": "class", "name": 7, "files": ["07-000.jpg"]}}',
     b'{"changes": 0, "step": {"do": "class", "name": "a/b", "files": ["07-000.jpg"]}}',
     b'{"changes": 0, "step": {"do": "class", "name": "mug", "files": "07-000.jpg"}}',
     b'{"changes": 0, "step": {"do": "class", "name": "mug", "files": [["07-000.jpg"]]}}',
     b'{"changes": 0, "step": {"do": "undo"}}', b'{"changes": 0, "changes": 0}', b"[" * 100_000],
)  # fmt: skip
def test_what_is_no_step_is_refused(server: Server, collected: Path, body: bytes) -> None:
    code, answer = post(server, "step", body)
    assert code == 400 and answer["error"]
    assert server.draft.changes == 0 and not (collected / "draft.jsonl").exists()


def test_requests_that_are_too_long_or_of_another_kind(server: Server) -> None:
    port, where = server.server_address[1], f"/{server.token}/step"
    for length in (str(MOST + 1), "-1", "x", ""):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
            line.sendall(
                f"POST {where} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {length}\r\n\r\n".encode()
            )
            assert line.makefile("rb").read().split(b"\r\n")[0] == b"HTTP/1.0 413 Request Entity Too Large"
    assert post(server, "none", {})[0] == 404 and get(server, "step")[0].status == 404
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD"):
        assert ask(port, method, where)[0].status == 501


def test_a_page_that_is_out_of_date_is_told(server: Server) -> None:
    assert step(server, "class", "mug", SEVEN, changes=0)[0] == 200
    code, answer = step(server, "discard", None, SEVEN, changes=0)
    assert code == 409 and "another page" in answer["error"]
    assert post(server, "finish", {"changes": 0})[0] == 409 and not server.finished.is_set()


def test_many_at_once(server: Server) -> None:
    """Of steps that were meant for the same state one is taken."""
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(step(server, "class", "mug", SEVEN, 0)[0])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200] + [409] * 7


def test_a_full_disk_at_the_end_can_be_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    step(server, "class", "mug", SEVEN)

    def full(*_: object) -> None:
        raise OutputError("cannot write 'mug': no space left on device")

    monkeypatch.setattr(review_draft, "carry_out", full)
    code, answer = post(server, "finish", {"changes": 1})
    assert code == 500 and "no space" in answer["error"] and not server.finished.is_set()
    monkeypatch.undo()
    assert post(server, "finish", {"changes": 1})[0] == 200


def start(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], str, int]:
    """The command itself, its token and port."""
    command = [sys.executable, "-m", "ssod_edge", "review", str(folder), "--no-browser", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://127.0.0.1:(\d+)/([\w-]+)/", line):
            return process, found[2], int(found[1])
    raise AssertionError(process.communicate())


def take(port: int, token: str, changes: int, do: str, name: str | None, files: list[str]) -> int:
    body = json.dumps({"changes": changes, "step": {"do": do, "name": name, "files": files}}).encode()
    return ask(port, "POST", f"/{token}/step", body)[0].status


def test_killed_interrupted_and_finished(collected: Path, tmp_path: Path) -> None:
    process, token, port = start(collected)
    assert take(port, token, 0, "class", "mug", SEVEN) == 200
    second = CliRunner().invoke(main, ["review", str(collected), "--no-browser"])
    assert second.exit_code == 2 and "is being reviewed by another process" in second.stderr
    second = CliRunner().invoke(main, ["review", str(collected), "--folders"])
    assert second.exit_code == 2 and "is being reviewed by another process" in second.stderr
    process.kill()
    process.communicate(timeout=60)

    process, token, port = start(collected, "--out", str(tmp_path / "out"))
    changes = json.loads(ask(port, "GET", f"/{token}/state")[1])["changes"]
    assert take(port, token, changes, "discard", None, TEN) == 200
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "The draft is kept" in stderr and stderr.endswith("interrupted\n")
    assert not (tmp_path / "out").exists() and len(list(collected.glob("*.jpg"))) == 11

    process, token, port = start(collected, "--out", str(tmp_path / "out"), "--port", str(port))
    reply, content = ask(port, "POST", f"/{token}/finish", b'{"changes": 2}')
    stdout, stderr = process.communicate(timeout=60)
    assert reply.status == 200 and process.returncode == 0, stderr
    assert stdout.splitlines() == json.loads(content)["report"]
    assert stdout.startswith("mug: 6 images\n4 discarded, 1 undecided")
    assert sorted(path.name for path in (tmp_path / "out" / "mug").iterdir()) == SEVEN
    assert sorted(path.name for path in collected.iterdir()) == ["03-000.jpg", "collected.jsonl", "decisions.jsonl"]


def test_ctrl_c_with_nothing_decided_leaves_nothing(collected: Path) -> None:
    before = sorted(collected.iterdir())
    process, _, _ = start(collected)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "draft is kept" not in stderr
    assert sorted(collected.iterdir()) == before


def test_errors(collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def review(*arguments: str | Path) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["review", *map(str, arguments), "--no-browser"])
        return done.exit_code, done.stderr

    assert review(tmp_path / "none")[0] == 2
    (tmp_path / "empty").mkdir()
    assert "holds no collected images" in review(tmp_path / "empty")[1]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, message = review(collected, "--port", str(port))
    assert code == 2 and f"cannot listen on 127.0.0.1:{port}" in message and "Give another --port" in message
    monkeypatch.setitem(sys.modules, "sklearn", None)
    code, message = review(collected)
    assert code == 3 and "pip install 'ssod-edge[teach]'" in message


def test_a_browser_is_opened_where_there_is_a_screen(collected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    class Ended(Server):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.finished.set()

    monkeypatch.setattr(review_page, "Server", Ended)
    monkeypatch.setattr(review_page.webbrowser, "open", opened.append)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert CliRunner().invoke(main, ["review", str(collected)]).exit_code == 0 and not opened
    monkeypatch.setenv("DISPLAY", ":0")
    done = CliRunner().invoke(main, ["review", str(collected)])
    assert len(opened) == 1 and f"Review at {opened[0]}" in done.stdout
    CliRunner().invoke(main, ["review", str(collected), "--no-browser"])
    assert len(opened) == 1
