"""Cameras and streams that fail for a while, or for good; videos over HTTP, which have an end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from click.testing import CliRunner
from servers import serving
from videos import cv2, fast_start, jpeg, pictures, plain, rtsp_camera, write_matroska, write_video

from ssod_edge.cli import main
from ssod_edge.runtime.field import capture, retries
from ssod_edge.runtime.field.capture import Answer, ask
from ssod_edge.runtime.field.frames import FrameReader
from ssod_edge.runtime.field.retries import Retries


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


class Server(BaseHTTPRequestHandler):
    """What it serves is a function of the handler, by path."""

    pages: ClassVar[dict[str, Callable[[BaseHTTPRequestHandler], None]]] = {}

    def do_GET(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the reader has gone
            self.pages[self.path.split("?")[0]](self)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """The address of the server."""
    Server.pages = {}
    with serving(Server) as address:
        yield address


def send(
    content: bytes, kind: str = "video/unknown", length: int | None = None
) -> Callable[[BaseHTTPRequestHandler], None]:
    """A page; its length is not said where it is 0."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        if length != 0:
            handler.send_header("Content-Length", str(length or len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return page


class Camera:
    """Motion JPEG over HTTP. Each connection gives so many frames; for None it is refused."""

    def __init__(self, *frames: int | None) -> None:
        self._frames = iter(frames)
        self._asked = False

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.headers.get("User-Agent", "").startswith("Python"):  # what it is: not a connection for frames
            count: int | None = 0
        else:
            count = next(self._frames, None)
        if count is None:
            return handler.send_error(503)
        handler.send_response(200)
        handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        handler.end_headers()
        for pixels in plain("red", "grey") * (count // 2):
            picture = jpeg(pixels)
            handler.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture))
            handler.wfile.write(picture + b"\r\n")
            time.sleep(0.02)


# Videos over HTTP


@pytest.mark.parametrize("name", ["a.ts", "a.mpg", "a.m2v", "a.mjpeg", "live.mkv", "a.mkv", "a.avi", "a.mp4", "a.flv"])
def test_a_file_over_http_is_read_from_first_to_last_frame(server: str, tmp_path: Path, name: str) -> None:
    codecs = {".ts": "MPG2", ".mpg": "MPG1", ".m2v": "MPG2", ".mjpeg": "MJPG", ".mkv": "FFV1", ".avi": "MJPG"}
    if name == "live.mkv":
        path = write_matroska(tmp_path / name, [i / 25 for i in range(20)], None)
    else:
        path = write_video(tmp_path / name, pictures(20), {**codecs, ".mp4": "mp4v", ".flv": "FLV1"}[Path(name).suffix])
    if name == "a.mp4":
        fast_start(path)
    Server.pages["/video"] = send(path.read_bytes())
    with FrameReader(f"{server}/video?token=SECRET") as reader:
        indices = []
        for frame in reader:
            time.sleep(0.01)  # slower than they come
            indices.append(frame.index)
        assert (reader.live, reader.dropped, reader.problem, reader.interruptions) == (False, 0, None, 0)
    assert indices == list(range(20))


def test_a_stream_over_http_that_states_no_length_is_live(export: Path, server: str, tmp_path: Path) -> None:
    """Its end may be that of a file, so that it is not opened anew."""
    Server.pages["/live"] = send(write_video(tmp_path / "a.ts", pictures(20), "MPG2").read_bytes(), length=0)
    code, out, err = run(export, f"{server}/live", "--json")
    assert code == 1 and 0 < len(out.splitlines()) <= 20
    assert f"error: {server}/live stopped after 20 frames: it was unplugged" in err and "again" not in err


def test_a_playlist_over_http_is_as_long_as_its_parts(server: str, tmp_path: Path) -> None:
    part = write_video(tmp_path / "a.ts", pictures(10), "MPG2").read_bytes()
    Server.pages["/0.ts"] = Server.pages["/1.ts"] = send(part, "video/mp2t")
    parts = "#EXTINF:0.4,\n0.ts\n#EXT-X-DISCONTINUITY\n#EXTINF:0.4,\n1.ts\n#EXT-X-ENDLIST\n"
    head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n"
    Server.pages["/a.m3u8"] = send((head + parts).encode(), "application/vnd.apple.mpegurl")
    with FrameReader(f"{server}/a.m3u8") as reader:
        assert len(list(reader)) == 20 and (reader.live, reader.problem) == (False, None)


def test_a_file_over_http_that_breaks_off_is_cut_short(server: str, tmp_path: Path) -> None:
    content = write_video(tmp_path / "a.mkv", pictures(40)).read_bytes()
    Server.pages["/a"] = send(content[: len(content) // 2], length=len(content))
    with FrameReader(f"{server}/a") as reader:
        assert 5 < len(list(reader)) < 36
    assert "of 40 frames: it is cut short or damaged" in str(reader.problem)


@pytest.mark.parametrize(
    ("kind", "length", "answer"),
    [
        ("video/mp2t", 4, Answer(whole=True)),
        ("video/mp2t", 0, Answer()),
        ("multipart/x-mixed-replace; boundary=x", 0, Answer(camera=True)),
        ("multipart/x-mixed-replace; boundary=x", 4, Answer(camera=True)),
        ("application/vnd.apple.mpegurl", 4, Answer()),
        ("Application/X-MpegURL", 4, Answer()),
        ("application/dash+xml", 4, Answer()),
    ],
)
def test_what_a_server_says_of_a_stream(server: str, kind: str, length: int, answer: Answer) -> None:
    Server.pages["/a"] = send(b"1234", kind, length)
    assert ask(f"{server}/a") == answer
    Server.pages["/a.m3u8"] = Server.pages["/a"]
    assert not ask(f"{server}/a.m3u8?x=1").whole, "the length is that of the list"


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/a", "http://[/a", "http://127.0.0.1:x/a", "http://h h/\n"])
def test_what_does_not_answer_is_taken_for_a_camera(address: str) -> None:
    assert ask(address) == Answer(camera=True)


def test_the_password_goes_to_the_server_and_no_further(server: str) -> None:
    seen: dict[str, str | None] = {}

    def moved(handler: BaseHTTPRequestHandler) -> None:
        seen["first"] = handler.headers.get("Authorization")
        handler.send_response(302)
        handler.send_header("Location", f"{server}/then")
        handler.end_headers()

    def then(handler: BaseHTTPRequestHandler) -> None:
        seen["then"] = handler.headers.get("Authorization")
        send(b"1234")(handler)

    Server.pages = {"/first": moved, "/then": then}
    assert ask(f"{server}/first".replace("://", "://user:a%20b@")) == Answer(whole=True)
    assert seen == {"first": "Basic dXNlcjphIGI=", "then": None}


# Sources that fail for a while


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PAUSES_S", (0.05, 0.1, 0.2, 0.4))


@pytest.mark.usefixtures("quick")
def test_an_rtsp_camera_is_opened_anew(tmp_path: Path) -> None:
    """A server of real RTSP, of which the first two connections end after a second each, and then all is refused."""
    video, said = write_video(tmp_path / "a.ts", pictures(100), "MPG2"), list[str]()
    with rtsp_camera(video, [1.0, 1.0]) as camera, FrameReader(camera.address, say=said.append) as reader:
        frames = list(reader)
        assert reader.live and camera.opened == 2
    assert (reader.interruptions, reader.reopened) == (2, 1)
    assert [frame.index for frame in frames] == sorted({frame.index for frame in frames})
    times = [frame.time_s for frame in frames]
    assert times == sorted(times) and times[-1] > 1.2, "the time goes on after the first connection"
    assert "stopped after" in str(reader.problem) and "tried again in vain" in str(reader.problem)
    assert len(said) == 2 and "gives no frame; it is tried up to 4 times again" in said[0]
    assert "gives frames again, after 0." in said[1]
    assert "SECRET" not in f"{said}{reader.problem}{reader.name}"


@pytest.mark.usefixtures("quick")
def test_an_rtsp_camera_that_falls_silent_is_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a cable is pulled: the connection stays. FFmpeg hands out its last frames, each after the time limit."""
    monkeypatch.setattr(capture, "TIMEOUT_MS", 1500)
    video = write_video(tmp_path / "a.ts", pictures(100), "MPG2")
    with rtsp_camera(video, [1.0, 1.0], stalls=True) as camera, FrameReader(camera.address) as reader:
        times = [frame.time_s for frame in reader]
    assert reader.reopened == 1 and camera.opened == 2
    waits = [wait for wait in np.diff(times) if wait > 1]
    assert len(waits) == 1 and waits[0] < 2.9, "one time limit, and not one for each of those frames"


def test_an_interrupt_ends_the_opening_at_once(export: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"rtsp://127.0.0.1:{mute.getsockname()[1]}/a"
        command = [sys.executable, "-m", "ssod_edge", "predict", str(export), address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        connection, _ = mute.accept()
        with connection:
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n") and time.monotonic() - began < 3


@pytest.mark.usefixtures("quick")
def test_a_camera_over_http_comes_back(export: Path, server: str, tmp_path: Path) -> None:
    """And when it is gone for good, all that was judged until then is there."""
    Server.pages["/live"] = Camera(20, None, None, 20)
    csv, drift = tmp_path / "a.csv", tmp_path / "drift.json"
    options = ("--csv", csv, "--monitor", drift, "--collect", tmp_path / "kept")
    code, out, err = run(export, f"{server}/live", "--json", *options)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and f"error: {server}/live stopped after 40 frames, and was tried again in vain" in err
    assert rows[-1]["frame"] >= 38 and len(csv.read_text().splitlines()) == len(rows) + 1
    assert err.count("warning: ") == 2 and "interrupted 2 times, opened anew 1 time;" in err
    assert list((tmp_path / "kept").glob("*.jpg"))
    shown = CliRunner().invoke(main, ["monitor", str(drift), "--json"])
    assert json.loads(shown.stdout)["interruptions"] == 2
    assert "interrupted 2 times" in CliRunner().invoke(main, ["monitor", str(drift)]).stdout


class Device:
    """A stand-in for a camera at this machine: gives what it is told to, over all the times it is opened."""

    def __init__(self, reads: list[bool], opens: list[bool]) -> None:
        self._reads, self._opens, self.opened = reads, opens, 0

    def __call__(self, *_: object) -> Device:
        self.opened += 1
        self._open = self._opens.pop(0) if self._opens else False
        return self

    def isOpened(self) -> bool:  # noqa: N802  # as OpenCV calls it
        return self._open

    def read(self) -> tuple[bool, np.ndarray | None]:
        time.sleep(0.002)
        if not self._open or not (self._reads.pop(0) if self._reads else False):
            return False, None
        return True, np.zeros((30, 40, 3), np.uint8)

    def get(self, _: int) -> float:
        return -1.0

    def set(self, *_: object) -> bool:
        return True

    def release(self) -> None:
        self._open = False


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("reads", "opens", "frames", "reopened", "interruptions"),
    [
        ([True] * 5 + [False] + [True] * 5, [True], 10, 0, 2),
        ([True] * 5 + [False] * 2 + [True] * 5, [True], 10, 0, 2),
        ([False] * 2 + [True] * 5, [True], 5, 0, 2),
        ([True] * 5 + [False] * 3 + [True] * 5, [True, True], 10, 1, 2),
        ([True] * 5 + [False] * 3 + [True] * 5, [True, False, True], 10, 1, 2),
        ([True] * 5, [True], 5, 0, 1),
        ([], [True], 0, 0, 1),
    ],
    ids=["one read", "two reads", "the first reads", "opened", "opened later", "gone", "never there"],
)
def test_a_camera_is_read_again_and_then_opened_anew(
    monkeypatch: pytest.MonkeyPatch,
    reads: list[bool],
    opens: list[bool],
    frames: int,
    reopened: int,
    interruptions: int,
) -> None:
    device = Device(reads, opens)
    monkeypatch.setattr(cv2, "VideoCapture", device)
    monkeypatch.setattr(retries, "STEADY_S", 0.0)
    with FrameReader(camera="0") as reader:
        count = len(list(reader)) + reader.dropped
    assert (count, reader.interruptions, reader.reopened) == (frames, interruptions, reopened)
    assert f"camera 0 stopped after {frames} frames, and was tried again in vain" in str(reader.problem)


@pytest.mark.usefixtures("quick")
def test_a_source_that_fails_again_and_again_comes_to_an_end(server: str) -> None:
    """Each connection gives some frames; the tries are over, since none of them lasted."""
    Server.pages["/live"] = Camera(*[10] * 50)
    with FrameReader(f"{server}/live") as reader:
        list(reader)
    assert reader.reopened == 4 and "stopped after 50 frames" in str(reader.problem)


def test_an_error_of_the_driver_while_it_is_opened_is_a_failed_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PAUSES_S", (0.01,) * 4)
    device, calls = Device([True] * 3, [True]), [0]

    def broken(*arguments: object) -> Device:
        calls[0] += 1
        if calls[0] > 1:
            raise cv2.error("no such device")
        return device(*arguments)

    monkeypatch.setattr(cv2, "VideoCapture", broken)
    with FrameReader(camera="0") as reader:
        list(reader)
    assert calls[0] == 3 and "stopped after 3 frames" in str(reader.problem)


def test_tries_are_there_again_once_a_source_is_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr(retries.time, "monotonic", lambda: now[0])
    tries = Retries("x", 2, said.append)
    found = []
    while (pause := tries.pause()) is not None:
        found.append((pause, tries.opens_anew))
    assert [pause for pause, _ in found] == sorted(retries.PAUSES_S) and 30 <= sum(retries.PAUSES_S) < 31
    assert [anew for _, anew in found] == [False] * 2 + [True] * 5
    tries.was_opened()
    now[0] = retries.STEADY_S - 1
    tries.has_frame()
    assert tries.pause() is None, "it was not open for long"
    tries.has_frame()
    now[0] += 1
    tries.has_frame()
    assert tries.pause() == retries.PAUSES_S[0]
    assert tries.interruptions == 3 and len(said) == 2, "what follows within a minute is only counted"
    tries.has_frame()
    now[0] += retries.QUIET_S
    tries.pause()
    assert len(said) == 3


def test_an_interrupt_ends_the_tries_at_once(export: Path, server: str, tmp_path: Path) -> None:
    Server.pages["/live"] = Camera(20)
    command = [sys.executable, "-m", "ssod_edge", "predict", str(export), f"{server}/live", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "gives no frame" in process.stderr.readline()
    time.sleep(1.5)  # in one of the longer pauses
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 3
    assert len(out.splitlines()) > 5 and "interrupted 1 time, opened anew 0 times" in err and "Traceback" not in err
