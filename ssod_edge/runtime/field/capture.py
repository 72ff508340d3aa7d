"""Opening what has frames: video files, cameras and addresses. Needs OpenCV, the extra `video`."""

from __future__ import annotations

import base64
import codecs
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ssod_edge.config import IMAGE_SUFFIXES
from ssod_edge.data.pixels import is_picture
from ssod_edge.errors import ImageError, SsodEdgeError, UsageError
from ssod_edge.files import unicode_path
from ssod_edge.json_reader import is_unicode
from ssod_edge.optional import load
from ssod_edge.sources import without_secrets

#: What a file is taken for by its name alone, so that an error can say what is wrong with the video.
VIDEO_SUFFIXES = frozenset(
    (
        *(".3g2", ".3gp", ".asf", ".avi", ".divx", ".f4v", ".flv", ".h264", ".h265", ".hevc", ".m2ts", ".m2v", ".m3u8"),
        *(".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob"),
        *(".webm", ".wmv"),
    )
)
_URL = re.compile(r"(rtsps?|rtmps?|rtp|srt|https?|udp|tcp)://", re.IGNORECASE)
_HTTP = re.compile(r"https?://", re.IGNORECASE)
#: FFmpeg takes these for pictures made of letters, for karaoke, or an archive of JPEG files for a video.
_NO_VIDEOS = frozenset(
    (".tar", ".tgz", ".gz", ".ans", ".art", ".asc", ".cdg", ".diz", ".ice", ".idf", ".nfo", ".txt", ".vt")
)
#: Lists of addresses, whose own length says nothing of the stream.
_LISTS = ("mpegurl", "dash+xml")

#: A network stream that gives nothing for this long has stopped.
TIMEOUT_MS = 10_000
#: How long a server may take to say how long a video is.
ANSWER_TIMEOUT_S = 5.0


def is_stream(argument: str) -> bool:
    """Whether an argument of `predict` is a video file or the address of a stream, by its name."""
    return is_url(argument) or Path(argument).suffix.lower() in VIDEO_SUFFIXES


def is_url(source: str) -> bool:
    """Whether a source is an address of a kind that is read."""
    return _URL.match(source) is not None


def holds_video(path: str) -> bool:
    """Whether a file whose name does not tell can be decoded as a video, of two frames at least: it is tried.

    What is named as a picture, begins as one or is plain text is none; a playlist that begins with #EXTM3U is.
    """
    if Path(path).suffix.lower() in IMAGE_SUFFIXES | _NO_VIDEOS or not os.path.isfile(path):
        return False
    try:
        if _is_text(path) or is_picture(path):
            return False
        capture = open_source(opencv(), path, path)
    except (SsodEdgeError, OSError):  # reading it as an image says what is wrong
        return False
    try:
        return bool(capture.read()[0] and capture.read()[0])
    finally:
        capture.release()


def _is_text(path: str) -> bool:
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(b"#EXTM3U"):
        return False
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False


def opencv() -> Any:
    """The module.

    Raises:
        MissingExtraError, EngineError: see `ssod_edge.optional.load`.
    """
    # What goes wrong is said here, once; OpenCV and FFmpeg would say it in ten lines.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    return load("cv2", "a video or a camera")


@dataclass(frozen=True)
class Source:
    """A file, an address or a camera.

    Attributes:
        name: what to call it.
        open: gives a new capture of it, or raises what `open_camera` and `open_source` do.
        file: its path, where it is one.
        address: where it is one.
    """

    name: str
    open: Callable[[], Any]
    file: str | None = None
    address: str | None = None

    @property
    def is_camera(self) -> bool:
        return self.file is None and self.address is None

    def nature(self, announced: int) -> tuple[bool, bool]:
        """Whether it has no end that is known beforehand, and whether it is tried again where its frames end.

        Args:
            announced: frames that its capture announces; 0 is none.
        """
        if self.address is None:
            return self.is_camera, self.is_camera
        if announced:
            return False, False
        if _HTTP.match(self.address) is None:
            return True, True
        answer = ask(self.address)
        return not answer.whole, answer.camera


def find_source(source: str | None, camera: str | None) -> Source:
    """The source that is meant by a file or address, or by a camera; nothing is opened yet.

    Raises:
        MissingExtraError, EngineError: see `ssod_edge.optional.load`.
        UsageError: both are given, or none.
    """
    cv2 = opencv()
    if camera is not None and source is None:
        return Source(f"camera {without_secrets(camera, camera=True)}", partial(open_camera, cv2, camera))
    if source is None or camera is not None:
        raise UsageError("give either a video or a camera")
    if not is_url(source):
        return Source(source, partial(open_source, cv2, source, source), file=source)
    name = without_secrets(source)
    return Source(name, partial(open_source, cv2, source, name), address=source)


def open_camera(cv2: Any, camera: str) -> Any:
    """A capture of a camera: its number, its device file, or a GStreamer pipeline (with a "!").

    Raises:
        UsageError: it cannot be opened, or is an address.
    """
    name = without_secrets(camera, camera=True)
    if is_url(camera):
        raise UsageError(f"'{name}' is an address and no camera: give it in the place of IMAGE, without --camera")
    if not is_unicode(camera):
        raise UsageError(f"camera '{name}' is no number, device file or pipeline: its name is not UTF-8")
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
        raise UsageError(f"camera '{name}' cannot be opened: {fix}")
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # where the driver can: the newest frame is the one that counts
    return capture


def open_source(cv2: Any, source: str, name: str) -> Any:
    """A capture of a file or an address.

    Args:
        cv2: the module.
        source: the file or address.
        name: what to call it.

    Raises:
        UsageError: there is no such file, or the address is not UTF-8.
        ImageError: no video comes from it.
    """
    if is_url(source):
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
        raise UsageError(f"the video '{name}' {what}")
    with unicode_path(source) as path:
        capture = cv2.VideoCapture(path)
    if not capture.isOpened():
        raise ImageError(
            f"'{name}' cannot be read as a video: it is empty, cut short, or in a format unknown to OpenCV"
        )
    return capture


@dataclass(frozen=True)
class Answer:
    """What a web server says of what it sends.

    Attributes:
        whole: a file of a known length.
        camera: pictures that replace each other, which is how network cameras send Motion JPEG; or it did not answer,
            as a camera may that allows one connection, or asks for the password in another way.
    """

    whole: bool = False
    camera: bool = False


def ask(address: str) -> Answer:
    """What a web server says of an http(s) address from which frames come."""
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    scheme, rest = address.split("://", 1)
    user, at, _ = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")
    try:
        request = Request(f"{scheme}://{rest[len(user) + len(at) :]}")
        if at:
            coded = base64.b64encode(unquote(user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {coded}")  # no other host gets it
        with urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
            kind, length = answer.headers.get_content_type(), answer.headers.get("Content-Length", "")
    except (OSError, ValueError, HTTPException):
        return Answer(camera=True)
    camera = kind.startswith("multipart/")
    path = re.split(r"[?#]", rest, maxsplit=1)[0].lower()
    playlist = kind.endswith(_LISTS) or path.endswith((".m3u8", ".m3u", ".mpd"))
    return Answer(length.isdecimal() and int(length) > 0 and not camera and not playlist, camera)
