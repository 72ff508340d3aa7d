"""Frames of video files, cameras and network streams, read on a thread. Needs OpenCV, the extra `video`."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ssod_edge.errors import ImageError, UsageError
from ssod_edge.files import unicode_path
from ssod_edge.json_reader import is_unicode
from ssod_edge.optional import load

VIDEO_SUFFIXES = frozenset((".avi", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"))
_URL = re.compile(r"(rtsps?|rtmps?|rtp|srt|https?|udp|tcp)://", re.IGNORECASE)
#: In an address: all up to the last "@" if there is a ":" before it, for a password may hold a "/" and an "@".
_USER = re.compile(r"(?<=://)([^\s\"'/:@]*@|[^\s\"']*:[^\s\"']*@)")
_QUERY = re.compile(r"(?<=[?#])[^\s\"']+")
#: In a pipeline: a property whose name says that it is a secret, with its value, which may stand in quotes.
_SECRET = re.compile(
    r"\b([\w-]*(?:user|pw|pass|secret|token|key|auth|cookie|credential)[\w-]*\s*=\s*)(\"[^\"]*\"|'[^']*'|[^\s!]+)",
    re.IGNORECASE,
)

#: Frames of a file that are decoded ahead of the engine.
AHEAD = 2
#: A file that ends before this share of the frames it announces is cut short. Less is usual: where a container does
#: not count its frames, the number is the length times a nominal rate.
COMPLETE = 0.9
#: A network stream that gives nothing for this long has stopped.
TIMEOUT_MS = 10_000
#: How long a reader that is asked to end may take: a camera may be waiting for light.
CLOSE_TIMEOUT_S = 2.0


def without_secrets(source: str) -> str:
    """What to call an address or a pipeline: no user, no password, no query string, no property that is a secret."""
    if "://" in source:
        source = _QUERY.sub("...", _USER.sub("", source))
    return _SECRET.sub(r"\1...", source) if "!" in source else source


def is_stream(argument: str) -> bool:
    """Whether an argument of `predict` is a video file or the address of a stream, by its name."""
    return _URL.match(argument) is not None or Path(argument).suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Frame:
    """One frame of a source.

    Attributes:
        index: its number in the source, from 0; those that were dropped count.
        time_s: of a file, its time in the video; of a live source, when it came, since the first one.
        pixels: uint8 [H, W, 3], RGB.
    """

    index: int
    time_s: float
    pixels: npt.NDArray[np.uint8]


class FrameReader(AbstractContextManager["FrameReader"]):
    """The frames of a video file, a camera or a network stream, read on a thread. A context manager and an iterator.

    Of a live source only the newest frame waits: one that comes while another still waits replaces it, so that a
    verdict is never on old news. Of a file every frame comes, a few of them decoded ahead. The iteration ends when the
    source does; `problem` then says if that was too early.

    Args:
        source: a file, or an rtsp, rtmp, http(s), udp or tcp address.
        camera: instead of `source`: the number of a camera, its device file, or a GStreamer pipeline (with a "!").
        realtime: play a file at its own speed, as if it were live.

    Attributes:
        name: what to call the source; the user and password of an address are left out, also within a pipeline.
        live: whether frames are dropped rather than late.
        dropped: how many have been so far.
        problem: why the source ended early; None while it goes on, and at the end of a whole file.

    Raises:
        MissingExtraError: OpenCV is not installed.
        UsageError: there is no such file or camera, or the camera is an address.
        ImageError: it cannot be read as a video, or the address gives none; while iterating, a frame is unreadable.
            Whatever else goes wrong while reading (such as a MemoryError) is raised while iterating, as it is.
    """

    def __init__(self, source: str | None = None, camera: str | None = None, realtime: bool = False) -> None:
        self._cv2 = _opencv()
        if (source is None) == (camera is None):
            raise UsageError("give either a video or a camera")
        if camera is not None:
            self.name = f"camera {without_secrets(camera)}"
            self._capture = _open_camera(self._cv2, camera)
        else:
            self.name = without_secrets(str(source)) if _URL.match(str(source)) else str(source)
            self._capture = _open_source(self._cv2, str(source), self.name)
        self._announced = int(max(0, self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT)))
        # An address may also be that of a whole file, which does not run away.
        self._endless = camera is not None or (_URL.match(str(source)) is not None and self._announced == 0)
        self._paced = realtime and not self._endless
        self.live = self._endless or self._paced
        rate = self._capture.get(self._cv2.CAP_PROP_FPS)
        self._period = 1 / rate if 0 < rate < 1000 else 0.0
        self.dropped = 0
        self.problem: str | None = None
        self._waiting: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._failure: Exception | None = None
        self._start: float | None = None
        self._thread = threading.Thread(target=self._read, name="frames", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():  # a read that hangs still uses it
            self._capture.release()

    def __iter__(self) -> Iterator[Frame]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    break
                frame = self._waiting.popleft()
                self._changed.notify_all()
            yield frame
        if self._failure is not None:
            raise self._failure

    def _read(self) -> None:
        count, start, time_s = 0, 0.0, -1.0
        try:
            while not self._ended:
                read, pixels = self._capture.read()
                if not read:
                    self.problem = None if self._ended else self._early_end(count)
                    return
                now = time.monotonic()
                start = start or now
                time_s = now - start if self._endless else self._position(time_s)
                self._offer(Frame(count, time_s, self._cv2.cvtColor(pixels, self._cv2.COLOR_BGR2RGB)))
                count += 1
        except self._cv2.error as error:  # the thread that iterates raises it, as it does any other
            self._failure = ImageError(f"frame {count} of {self.name} cannot be read: {error}")
        except Exception as error:
            self._failure = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _position(self, last: float) -> float:
        """Time of the frame that was just read, in seconds; where the file does not say, the nominal period goes on."""
        position = self._capture.get(self._cv2.CAP_PROP_POS_MSEC) / 1000
        if math.isfinite(position) and position > last and position >= 0:
            return float(position)
        return max(0.0, last + self._period) if last >= 0 else 0.0

    def _offer(self, frame: Frame) -> None:
        """Hand a frame over, as long as somebody wants one."""
        with self._changed:
            if self._paced:
                if self._start is None:
                    self._start = time.monotonic() - frame.time_s
                while not self._ended and (early := self._start + frame.time_s - time.monotonic()) > 0:
                    self._changed.wait(early)
            if self.live and self._waiting:
                self._waiting.clear()
                self.dropped += 1
            self._changed.wait_for(lambda: self._ended or len(self._waiting) < AHEAD)
            if not self._ended:
                self._waiting.append(frame)
                self._changed.notify_all()

    def _early_end(self, count: int) -> str | None:
        if self._endless:
            return f"{self.name} stopped after {count} frames: it was unplugged, switched off, or the connection broke"
        if count == 0:
            return f"'{self.name}' holds no frame that can be decoded"
        if count < COMPLETE * self._announced:
            return f"'{self.name}' ends after {count} of {self._announced} frames: it is cut short or damaged"
        return None


def _opencv() -> Any:
    # What goes wrong is said here, once; OpenCV and FFmpeg would say it in ten lines.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    return load("cv2")


def _open_camera(cv2: Any, camera: str) -> Any:
    if _URL.match(camera):
        raise UsageError(
            f"'{without_secrets(camera)}' is an address and no camera: give it in the place of IMAGE, without --camera"
        )
    if not is_unicode(camera):
        raise UsageError(
            f"camera '{without_secrets(camera)}' is no number, device file or pipeline: its name is not UTF-8"
        )
    if "!" in camera:
        capture = cv2.VideoCapture(camera, cv2.CAP_GSTREAMER)
        fix = "this OpenCV has no GStreamer (that of pip has none, that of JetPack has), or the pipeline is wrong"
    else:
        capture = cv2.VideoCapture(int(camera) if camera.isdecimal() else camera)
        device = f"/dev/video{camera}" if camera.isdecimal() else camera
        found = ", ".join(sorted(str(path) for path in Path("/dev").glob("video*"))) or "no camera"
        fix = f"this machine has: {found}"
        if os.path.exists(device):
            fix = f"'{device}' is in use, is no camera, or your user is not in the group 'video'"
    if not capture.isOpened():
        raise UsageError(f"camera '{without_secrets(camera)}' cannot be opened: {fix}")
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # where the driver can: the newest frame is the one that counts
    return capture


def _open_source(cv2: Any, source: str, name: str) -> Any:
    if _URL.match(source):
        if not is_unicode(source):
            raise UsageError(f"the address '{name}' is not UTF-8. Write other characters as %XX")
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, TIMEOUT_MS]
        capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, limits)
        if not capture.isOpened():
            raise ImageError(
                f"no video came from '{name}' within {TIMEOUT_MS // 1000} s. Check the address, the user and password "
                "in it, and that this machine reaches it"
            )
        return capture
    if not os.path.isfile(source):
        what = "is not a file" if os.path.lexists(source) else "does not exist"
        raise UsageError(f"the video '{source}' {what}")
    with unicode_path(source) as path:
        capture = cv2.VideoCapture(path)
    if not capture.isOpened():
        raise ImageError(
            f"'{source}' cannot be read as a video: it is empty, cut short, or in a format unknown to OpenCV"
        )
    return capture
