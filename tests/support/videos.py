"""Real videos, whole and cut, and servers of them: what OpenCV writes, remuxed where a container needs it."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

cv2 = __import__("pytest").importorskip("cv2", reason="needs the extra 'video'")

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220), "grey": (60, 60, 60)}
RATE = 25


def pictures(n: int, seed: int = 0) -> list[np.ndarray]:
    """RGB [30, 40, 3], no two alike, and red, green or blue in turn."""
    rng = np.random.default_rng(seed)
    order = ["red", "green", "blue"]
    return [np.clip(rng.normal(COLOURS[order[i % 3]], 40, (30, 40, 3)), 0, 255).astype(np.uint8) for i in range(n)]


def plain(*names: str) -> list[np.ndarray]:
    return [np.full((30, 40, 3), COLOURS[name], np.uint8) for name in names]


def write_video(path: Path, frames: Sequence[np.ndarray], codec: str = "FFV1", rate: float = RATE) -> Path:
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), rate, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def jpeg(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()


# Containers


def _element(name: str, *content: bytes) -> bytes:
    data = b"".join(content)
    return bytes.fromhex(name) + struct.pack(">Q", 1 << 56 | len(data)) + data


def _number(name: str, value: int) -> bytes:
    return _element(name, struct.pack(">I", value))


def write_matroska(path: Path, times: Sequence[float], length: float | None) -> Path:
    """Motion JPEG whose frames come at these seconds; with no length it is a live recording, whose end is open."""
    header = _element("1A45DFA3", _element("4282", b"matroska"), _number("4287", 4), _number("4285", 2))
    duration = _element("4489", struct.pack(">d", length * 1000)) if length is not None else b""
    info = _element("1549A966", _number("2AD7B1", 1_000_000), duration)
    size = _element("E0", _number("B0", 40), _number("BA", 30))
    nominal = _number("23E383", 10**9 // RATE)  # of nanoseconds between frames
    numbers = _number("D7", 1), _number("73C5", 1), _number("83", 1)
    track = _element("AE", *numbers, nominal, _element("86", b"V_MJPEG"), size)
    clusters = [
        _element("1F43B675", _number("E7", round(1000 * time_s)), _element("A3", b"\x81\0\0\x80", jpeg(pixels)))
        for time_s, pixels in zip(times, pictures(len(times)), strict=True)
    ]
    segment = _element("18538067", info, _element("1654AE6B", track), *clusters)
    if length is None:
        segment = segment[:4] + b"\x01" + b"\xff" * 7 + segment[12:]
    path.write_bytes(header + segment)
    return path


def fast_start(path: Path) -> Path:
    """Put an MP4 file's index before its frames, as for the web, so that it can be opened when it is cut."""
    content, boxes, start = path.read_bytes(), [], 0
    while start < len(content):
        size = int.from_bytes(content[start : start + 4], "big")
        boxes.append(content[start : start + size])
        start += size
    index = bytearray(next(box for box in boxes if box[4:8] == b"moov"))
    table = index.index(b"stco") + 8
    for entry in range(int.from_bytes(index[table : table + 4], "big")):
        at = table + 4 + 4 * entry
        index[at : at + 4] = (int.from_bytes(index[at : at + 4], "big") + len(index)).to_bytes(4, "big")
    path.write_bytes(boxes[0] + bytes(index) + b"".join(box for box in boxes[1:] if box[4:8] != b"moov"))
    return path


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


# An RTSP server


class Rtsp:
    """A camera on rtsp://: MPEG transport packets in RTP, over the one TCP connection, which ends after a while.

    Attributes:
        seconds: how long each connection gives frames in turn; then connections are refused.
        stalls: a connection stays open when its frames end, and says no more.
        opened: connections that asked for frames.
    """

    def __init__(self, video: Path, seconds: Sequence[float], stalls: bool = False) -> None:
        self.seconds, self.opened, self.stalls = list(seconds), 0, stalls
        self._video = video.read_bytes()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"rtsp://user:SECRET@127.0.0.1:{self._socket.getsockname()[1]}/live"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # which wakes who waits for a connection
        self._socket.close()

    def _serve(self) -> None:
        while self.seconds:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, suppress(OSError):  # the reader has gone
                if self._answer(connection):
                    self.opened += 1
                    self._send(connection, time.monotonic() + self.seconds.pop(0))
                    while self.stalls and connection.recv(1000):
                        pass
        self._socket.close()

    def _answer(self, connection: socket.socket) -> bool:
        """Talk until frames are asked for; whether they are."""
        media = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"
        more = {
            "OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n\r\n",
            "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Length: {len(media)}\r\n\r\n{media}",
            "SETUP": "Session: 1\r\nTransport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n\r\n",
            "PLAY": "Session: 1\r\n\r\n",
        }
        with connection.makefile("r", newline="\r\n") as lines:
            while line := lines.readline():
                method, sequence = line.split()[0], "0"
                while (line := lines.readline()).strip():
                    if line.lower().startswith("cseq:"):
                        sequence = line.split(":")[1].strip()
                answer = more.get(method, "\r\n")
                connection.sendall(f"RTSP/1.0 200 OK\r\nCSeq: {sequence}\r\n{answer}".encode())
                if method == "PLAY":
                    return True
        return False

    def _send(self, connection: socket.socket, end: float) -> None:
        size, number = 7 * 188, 0
        while time.monotonic() < end:
            for start in range(0, len(self._video), size):
                payload = self._video[start : start + size]
                head = struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, number * 900, 1)
                connection.sendall(b"$\0" + struct.pack(">H", len(head) + len(payload)) + head + payload)
                number += 1
                time.sleep(0.005)
                if time.monotonic() > end:
                    return


@contextmanager
def rtsp_camera(video: Path, seconds: Sequence[float], stalls: bool = False) -> Iterator[Rtsp]:
    server = Rtsp(video, seconds, stalls)
    try:
        yield server
    finally:
        server.close()
