"""What is refused, and how: each limit, and no word of this machine in any answer."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from colour import paint
from PIL import Image
from served import Served, eventually, files_body, say_slowly, served

from ssod_edge.serve.bodies import clean
from ssod_edge.serve.limits import Limits


@pytest.fixture
def red(tmp_path: Path) -> bytes:
    return paint(tmp_path / "red.png", "red").read_bytes()


@pytest.fixture
def server(export: Path) -> Iterator[Served]:
    with served({"m": export}, queue=4, max_mb=0.3, max_megapixels=1, body_timeout=0.5, timeout=1) as running:
        yield running


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_each_wrong_request_has_its_code(server: Served, red: bytes) -> None:
    octets = {"Content-Type": "application/octet-stream"}
    form, header = files_body({"a.png": b"no image"})
    many, _ = files_body({f"{n}.png": red for n in range(5)})
    none, _ = files_body({})
    field = form.replace(b'; filename="a.png"', b"")
    cases = [
        (server.ask(body=b"no image"), 422),
        (server.ask(body=red[:60]), 422),
        (server.ask(body=b""), 400),
        (server.ask(body=png(1001, 1000)), 413),
        (server.ask(body=b"x" * 300_001), 413),
        (server.ask(body=b"{}", headers={"Content-Type": "application/json"}), 415),
        (server.ask(body=b'{"path": "/etc/passwd"}', headers={"Content-Type": "application/json"}), 415),
        (server.ask(body=b"url=http://a", headers={"Content-Type": "application/x-www-form-urlencoded"}), 415),
        (server.ask(body=red, headers={**octets, "Content-Encoding": "gzip"}), 415),
        (server.ask("/v1/models/other/predict", red), 404),
        (server.ask("/nowhere"), 404),
        (server.ask("/v1/predict/", red), 404),
        (server.ask("/v1/predict"), 405),
        (server.ask("/v1/predict", red, method="PUT"), 405),
        (server.ask("/healthz", b"x"), 405),
        (server.ask(body=many, headers=header), 413),
        (server.ask(body=none, headers=header), 400),
        (server.ask(body=field, headers=header), 400),
        (server.ask(body=form[:-30], headers=header), 400),
        (server.ask(body=form, headers={"Content-Type": "multipart/form-data"}), 400),
        (server.ask(body=form, headers={"Content-Type": header["Content-Type"] + "; charset=undefined"}), 400),
    ]
    for answer, status in cases:
        assert (answer.status, answer.headers["content-type"]) == (status, "application/json"), answer.body
        assert list(answer.json) == ["error"] and len(answer.json["error"]) < 120
        for word in (b"/tmp", b"/etc", b"Traceback", b".py", b"ssod_edge", b"starlette", b"BytesIO", b"Error", b"0x"):
            assert word not in answer.body
    assert cases[12][0].headers["allow"] == "POST"
    answer = server.ask(body=form, headers=header)  # in a form it is the error of the image alone
    assert answer.status == 200 and answer.json["verdicts"][0]["error"].startswith("not an image")


def test_no_header_says_what_the_server_is(server: Served, red: bytes) -> None:
    for answer in (server.ask(body=red), server.ask("/nowhere"), server.ask("/healthz")):
        assert set(answer.headers) <= {
            "date", "content-length", "content-type", "cache-control", "x-content-type-options",
        }  # fmt: skip


def test_no_page_of_another_site_may_read(server: Served, red: bytes) -> None:
    origin = f"http://127.0.0.1:{server.port}"
    answer = server.ask(body=red, headers={"Origin": origin})
    assert answer.status == 200 and not any(name.startswith("access-control") for name in answer.headers)
    assert server.ask(body=red, headers={"Origin": "http://evil.example"}).status == 403
    assert server.ask("/v1/predict", method="OPTIONS").status == 405


def test_a_full_queue_says_come_again(export: Path, red: bytes) -> None:
    with served({"m": export}, queue=2, batch=1) as server, ThreadPoolExecutor(8) as clients:
        slow = say_slowly(server.service.models["m"].lane.opened.predictor.runner, 0.3)
        answers = list(clients.map(lambda _: server.ask(body=red), range(8)))
        assert sorted({answer.status for answer in answers}) == [200, 429]
        refused = [answer for answer in answers if answer.status == 429]
        assert all(answer.headers["retry-after"] == "1" for answer in refused)
        assert len(slow.runs) == 8 - len(refused) and len(refused) >= 4
        page = server.ask("/metrics").body.decode()
        assert f'ssod_edge_refused_requests_total{{reason="queue"}} {len(refused)}.0' in page
        assert eventually(lambda: server.service.models["m"].lane.inside == 0)
        assert server.ask(body=red).status == 200


def test_bodies_in_memory_are_bounded(server: Served, red: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "bodies", len(red) - 1)
    assert server.ask(body=red).status == 429 and server.service._bodies.held == 0
    monkeypatch.setattr(Limits, "bodies", len(red))
    assert server.ask(body=red).status == 200 == server.ask(body=red).status and server.service._bodies.held == 0


def test_what_waits_runs_together(export: Path, red: bytes) -> None:
    with served({"m": export}, batch=4) as server, ThreadPoolExecutor(9) as clients:
        slow = say_slowly(server.service.models["m"].lane.opened.predictor.runner, 0.2)
        assert {answer.status for answer in clients.map(lambda _: server.ask(body=red), range(9))} == {200}
        assert sum(slow.runs) == 9 and max(slow.runs) == 4 and len(slow.runs) <= 5


def test_a_request_that_takes_too_long_is_given_up(server: Served, red: bytes) -> None:
    say_slowly(server.service.models["m"].lane.opened.predictor.runner, 1.5)
    answer = server.ask(body=red)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert eventually(lambda: server.service.models["m"].lane.inside == 0)


def raw(server: Served, *parts: bytes, pause: float = 0.0) -> bytes:
    """What comes back for bytes that are sent as they are, until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        found = b""
        while chunk := connection.recv(65536):
            found += chunk
    return found


HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"


def test_a_slow_body_is_given_up(server: Served) -> None:
    found = raw(server, HEAD + b"Content-Length: 100\r\n\r\n", b"abc")
    assert found.startswith(b"HTTP/1.1 408 ") and b"connection: close" in found.lower()


def test_a_body_that_grows_beyond_the_limit_is_refused(server: Served) -> None:
    chunk = b"20000\r\n" + b"x" * 0x20000 + b"\r\n"
    found = raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk, chunk)
    assert found.startswith(b"HTTP/1.1 413 ")


def test_headers_without_end_are_cut_off(server: Served) -> None:
    began = time.monotonic()
    assert raw(server, b"GET /healthz HTTP/1.1\r\nHost: local") == b""
    assert raw(server) == b"", "a line that says nothing"
    assert time.monotonic() - began < 5
    with pytest.raises(ConnectionError):
        raw(server, *[b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 60_000, b"x" * 60_000, b"x" * 60_000, b"x"], pause=0.05)
    assert server.ask("/healthz").status == 200


def test_a_refused_body_is_read_away_so_that_the_answer_arrives(server: Served, red: bytes) -> None:
    big = HEAD + b"Content-Length: 300001\r\n\r\n" + b"x" * 300_001
    after = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(
        red
    )
    found = raw(server, big, after + red)
    assert found.startswith(b"HTTP/1.1 413 ") and b"HTTP/1.1 200 " in found


def test_nothing_of_an_image_is_kept(server: Served, red: bytes) -> None:
    lane, asked = server.service.models["m"].lane, []
    admit = lane.admit
    lane.admit = lambda images: asked.append(admit(images)) or asked[-1]  # type: ignore[func-returns-value]
    assert server.ask(body=red).status == 200
    (job,) = asked[0].jobs
    assert eventually(lambda: job.content == b"" and job.pixels is None) and job.verdict is not None


def test_requests_that_come_at_once_are_answered_in_order(server: Served, red: bytes) -> None:
    one = HEAD + b"Content-Length: %d\r\n\r\n" % len(red) + red
    wrong = HEAD + b"Content-Length: 3\r\n\r\nabc"
    last = one.replace(b"Host", b"Connection: close\r\nHost", 1)
    found = raw(server, one + wrong + one + last)
    assert re.findall(rb"HTTP/1\.1 (\d+)", found) == [b"200", b"422", b"200", b"200"]


def test_a_client_that_vanishes_costs_nothing_further(export: Path, red: bytes) -> None:
    with served({"m": export}, batch=1) as server:
        lane = server.service.models["m"].lane
        slow = say_slowly(lane.opened.predictor.runner, 0.3)
        first = threading.Thread(target=server.ask, kwargs={"body": red})
        first.start()
        assert eventually(lambda: len(slow.runs) == 1)
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(red) + red)
                count = lane.inside
                eventually(lambda count=count: lane.inside > count, 0.05)
        first.join()
        assert eventually(lambda: lane.inside == 0)
        assert len(slow.runs) == 1 and server.service._bodies.held == 0
        gone = b'ssod_edge_refused_requests_total{reason="gone"} 5.0'
        assert eventually(lambda: gone in server.ask("/metrics").body)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\nabc")
        assert server.ask(body=red).status == 200 and lane.inside == 0


def test_a_name_is_echoed_clean_and_never_opened(server: Served, red: bytes, tmp_path: Path) -> None:
    secret = paint(tmp_path / "secret.png", "blue")
    body, header = files_body({str(secret): b"", "../../etc/passwd": red})
    verdicts = server.ask(body=body, headers=header).json["verdicts"]
    assert [v["image"] for v in verdicts] == ["secret.png", "passwd"]
    assert verdicts[0]["class_name"] is None and verdicts[1]["class_name"] == "red"
    assert (
        clean("a\x1b[31m\u2028\x00.png") == "a[31m.png" and clean("C:\\x\\y.png") == "y.png" and clean("/") == "image"
    )
    assert len(clean("x" * 5000)) == 200 and json.dumps(clean("\u202e.png")) == '".png"'


def test_a_failing_engine_is_told_without_its_words(
    server: Served, red: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    runner = server.service.models["m"].lane.opened.predictor.runner
    infer = runner.infer

    def fails(_inputs: object) -> None:
        raise RuntimeError("secret of /the/machine\nand more")

    runner.infer = fails
    answer = server.ask(body=red)
    assert (answer.status, answer.json) == (503, {"error": "the model failed; the log of the server says why"})
    assert server.ask("/readyz").status == 503 and server.ask("/healthz").status == 200
    runner.infer = infer
    assert eventually(lambda: server.ask("/readyz").status == 200), "without a request"
    assert server.ask(body=red).status == 200
    lines = [line for line in capfd.readouterr().err.splitlines() if "secret" in line]
    assert lines[0] == "error: 'm' failed on 1 images: RuntimeError: secret of /the/machine and more"


def test_a_fault_of_the_server_is_one_line_of_its_log(
    server: Served, red: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server.service, "_bodies", None)
    answer = server.ask(body=red)
    assert (answer.status, answer.json) == (500, {"error": "the server failed; its log says more"})
    lines: list[str] = []
    assert eventually(lambda: bool(lines.extend(capfd.readouterr().err.splitlines()) or lines))
    assert len(lines) == 1 and lines[0].startswith("error: Exception in ASGI application: AttributeError")
