"""Frames of video files, cameras and network streams, read on a thread. Needs OpenCV, the extra `video`."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ssod_edge.errors import ImageError, SsodEdgeError
from ssod_edge.runtime.field import capture
from ssod_edge.runtime.field.capture import find_source, opencv
from ssod_edge.runtime.field.container import is_cut
from ssod_edge.runtime.field.retries import REREADS, Retries

#: Frames of a file that are decoded ahead of the engine.
AHEAD = 2
#: A file that ends before this share of its length is cut short, whatever its container says. Less is usual: sound
#: may outlast the pictures.
COMPLETE = 0.9
#: How long a reader that is asked to end may take: a camera may be waiting for light.
CLOSE_TIMEOUT_S = 2.0

Result = TypeVar("Result")


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

    A live source that gives no frame is tried again, as `ssod_edge.runtime.field.retries` says; not so an http(s)
    address of other than Motion JPEG pictures, whose end may be that of a file. An http(s) address that states a length
    is read as a file is.

    Args:
        source: a file, or an rtsp, rtmp, http(s), udp or tcp address.
        camera: instead of `source`: the number of a camera, its device file, or a GStreamer pipeline (with a "!").
        realtime: play a file at its own speed, as if it were live.
        say: takes a line when a live source gives no frame, and when it does again. None says nothing.

    Attributes:
        name: what to call the source; the user and password of an address are left out, also within a pipeline.
        live: whether frames are dropped rather than late.
        dropped: how many have been so far.
        interruptions: how often a live source has given no frame for a while so far.
        reopened: how often it was opened anew.
        problem: why the source ended early; None while it goes on, and at the end of a whole file.

    Raises:
        MissingExtraError: OpenCV is not installed.
        UsageError: there is no such file or camera, or the camera is an address.
        ImageError: it cannot be read as a video, or the address gives none; while iterating, a frame is unreadable.
            Whatever else goes wrong while reading (such as a MemoryError) is raised while iterating, as it is.
    """

    def __init__(
        self,
        source: str | None = None,
        camera: str | None = None,
        realtime: bool = False,
        say: Callable[[str], Any] | None = None,
    ) -> None:
        self._cv2, self._source = opencv(), find_source(source, camera)
        self.name = self._source.name
        self._capture = _interruptible(self._source.open)
        self._announced = int(max(0, self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT)))
        self._endless, retried = self._source.nature(self._announced)
        self._retries = Retries(self.name, REREADS if self._source.is_camera else 0, say) if retried else None
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
        self._longest_gap = 0.0
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

    @property
    def interruptions(self) -> int:
        return self._retries.interruptions if self._retries is not None else 0

    @property
    def reopened(self) -> int:
        return self._retries.reopened if self._retries is not None else 0

    def _read(self) -> None:
        count, start, time_s = 0, 0.0, -1.0
        try:
            while not self._ended:
                began = time.monotonic()
                read, pixels = self._capture.read()
                now = time.monotonic()
                if not read or self._stalled(now - began):
                    if self._again():
                        continue
                    self.problem = None if self._ended else self._early_end(count, time_s)
                    return
                if self._retries is not None:
                    self._retries.has_frame()
                start, before = start or now, time_s
                time_s = now - start if self._endless else self._position(time_s)
                self._longest_gap = max(self._longest_gap, time_s - before) if count else 0.0
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

    def _stalled(self, took: float) -> bool:
        """Whether a read of a stream ran into its time limit; what it gives then was on its way before."""
        return self._endless and self._source.address is not None and took >= capture.TIMEOUT_MS / 1000

    def _again(self) -> bool:
        """After a failed read: wait, and open the source anew where reading on does not help; whether to read again."""
        if self._ended or self._retries is None or (pause := self._retries.pause()) is None:
            return False
        with self._changed:
            if self._changed.wait_for(lambda: self._ended, pause):
                return False
        if self._retries.opens_anew:
            self._capture.release()  # what is released reads nothing, so that the next try follows
            try:
                self._capture = self._source.open()
            except (SsodEdgeError, self._cv2.error):
                return True
            self._retries.was_opened()
        return True

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

    def _early_end(self, count: int, last: float) -> str | None:
        """What is wrong with an end after so many frames, the last one at this time."""
        if self._endless:
            after = f"{count} frames" if self._retries is None else f"{count} frames, and was tried again in vain"
            return f"{self.name} stopped after {after}: it was unplugged, switched off, or the connection broke"
        if count == 0:
            return f"'{self.name}' holds no frame that can be decoded"
        if count >= self._announced > 0 or not self._is_short(count, last):
            return None
        length = f", at {last:.1f} of {self._announced * self._period:.1f} s" if self._announced else ""
        of = f" of {self._announced}" if self._announced else ""
        return f"'{self.name}' ends after {count}{of} frames: it is cut short or damaged{length}"

    def _is_short(self, count: int, last: float) -> bool:
        """Whether a file ended before its end.

        Where a container does not count its frames, OpenCV announces its length times a nominal rate, and with pauses
        between the frames there are fewer. So the time of the last one counts too. It stands for as long as the longest
        of the frames before it may have: of slides the last one has no frame after it that would tell.
        """
        if self._source.file is not None:
            with suppress(OSError):  # it may be gone by now
                if (found := is_cut(self._source.file)) is not None:
                    return found
        end = last + max(self._period, self._longest_gap)
        return max(count, end / self._period if self._period else 0) < COMPLETE * self._announced


def _interruptible(work: Callable[[], Result]) -> Result:
    """What a call returns that waits in C++, where no Ctrl-C is heard: it runs on a thread, which may be left alone."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="opening", daemon=True).start()
    return future.result()
