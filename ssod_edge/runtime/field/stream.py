"""Video files, cameras and network streams: a verdict a frame, for `predict`. Needs OpenCV, the extra `video`."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from ssod_edge.data.pixels import load_image, preprocess
from ssod_edge.errors import EXIT_OK, EXIT_SOME_FAILED, ImageError, OutputError, UsageError
from ssod_edge.runtime.field.monitor import Monitor
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import Predictor, Verdict
from ssod_edge.runtime.report import WORDS, PredictOptions, describe_run, open_monitor
from ssod_edge.runtime.runner import Array, Runner, import_failed
from ssod_edge.terminal import printable

VIDEO_SUFFIXES = frozenset((".avi", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"))
_URL = re.compile(r"(rtsps?|rtmp|https?|udp|tcp)://", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/]*@")

#: Frames of a file that are decoded ahead of the engine.
AHEAD = 2
#: Time over which the frame rate is measured.
RATE_WINDOW_S = 1.0
#: A file that ends before this share of the frames it announces is cut short. Less is usual: where a container does
#: not count its frames, the number is the length times a nominal rate.
COMPLETE = 0.9
#: A network stream that gives nothing for this long has stopped.
TIMEOUT_MS = 10_000
#: A monitor takes one frame in this time: neighbouring frames show the same, and would count as evidence many times.
MONITOR_PERIOD_S = 1.0
#: How long a reader that is asked to end may take: a camera may be waiting for light.
CLOSE_TIMEOUT_S = 2.0


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


class FrameReader:
    """The frames of a video file, a camera or a network stream, read on a thread. A context manager and an iterator.

    Of a live source only the newest frame waits: one that comes while another still waits replaces it, so that a
    verdict is never on old news. Of a file every frame comes, a few of them decoded ahead. The iteration ends when the
    source does; `problem` then says if that was too early.

    Args:
        source: a file, or an rtsp, rtmp, http(s), udp or tcp address.
        camera: instead of `source`: the number of a camera, its device file, or a GStreamer pipeline (with a "!").
        realtime: play a file at its own speed, as if it were live.

    Attributes:
        name: what to call the source; the user and password of an address are left out.
        live: whether frames are dropped rather than late.
        dropped: how many have been so far.
        problem: why the source ended early; None while it goes on, and at the end of a whole file.

    Raises:
        MissingExtraError: OpenCV is not installed.
        UsageError: there is no such file or camera.
        ImageError: it cannot be read as a video, or the address gives none; while iterating, a frame is unreadable.
    """

    def __init__(self, source: str | None = None, camera: str | None = None, realtime: bool = False) -> None:
        self._cv2 = _opencv()
        if (source is None) == (camera is None):
            raise UsageError("give either a video or a camera")
        if camera is not None:
            self.name = f"camera {camera}"
            self._capture = _open_camera(self._cv2, camera)
        else:
            self.name = _USER.sub("", str(source))
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
        self._failure: ImageError | None = None
        self._start: float | None = None
        self._thread = threading.Thread(target=self._read, name="frames", daemon=True)
        self._thread.start()

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading and release the source."""
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
        count = 0
        try:
            for frame in self._frames():
                count += 1
                if not self._offer(frame):
                    return
            if not self._ended:
                self.problem = self._early_end(count)
        except self._cv2.error as error:  # the thread that iterates raises it
            self._failure = ImageError(f"frame {count} of {self.name} cannot be read: {error}")
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _frames(self) -> Iterator[Frame]:
        start, last, index = 0.0, -1.0, 0
        while not self._ended:
            read, pixels = self._capture.read()
            if not read:
                return
            now = time.monotonic()
            start = start or now
            last = now - start if self._endless else self._position(last)
            yield Frame(index, last, self._cv2.cvtColor(pixels, self._cv2.COLOR_BGR2RGB))
            index += 1

    def _position(self, last: float) -> float:
        """Time of the frame that was just read, in seconds; where the file does not say, the nominal period goes on."""
        position = self._capture.get(self._cv2.CAP_PROP_POS_MSEC) / 1000
        if math.isfinite(position) and position > last and position >= 0:
            return float(position)
        return max(0.0, last + self._period) if last >= 0 else 0.0

    def _offer(self, frame: Frame) -> bool:
        """Hand a frame over; False once nobody wants one."""
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
            if self._ended:
                return False
            self._waiting.append(frame)
            self._changed.notify_all()
            return True

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
    try:
        import cv2
    except ImportError as error:
        raise import_failed("cv2", error) from error
    return cv2


def _open_camera(cv2: Any, camera: str) -> Any:
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
        raise UsageError(f"camera '{camera}' cannot be opened: {fix}")
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # where the driver can: the newest frame is the one that counts
    return capture


def _open_source(cv2: Any, source: str, name: str) -> Any:
    if _URL.match(source):
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
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        raise ImageError(
            f"'{source}' cannot be read as a video: it is empty, cut short, or in a format unknown to OpenCV"
        )
    return capture


class Smoother:
    """An exponential mean over time of the probabilities and of the OOD score.

    Frames at times t_0 < t_1 < ... with outputs x_0, x_1, ... have the means

        m_0 = x_0,    m_k = m_(k-1) + (1 - exp(-(t_k - t_(k-1)) / seconds)) * (x_k - m_(k-1))

    so that a frame's weight falls to 1/e after `seconds`, whatever the frame rate and however many frames were
    dropped. Class and confidence are those of the mean probabilities, and `known` that of the mean score: one odd frame
    turns neither. The threshold is that of single images, whose scores spread more than their means do.

    Args:
        seconds: above 0.

    Raises:
        UsageError: seconds that are not above 0.
    """

    def __init__(self, seconds: float) -> None:
        if not (math.isfinite(seconds) and seconds > 0):
            raise UsageError(f"--smooth must be a number of seconds above 0, got {seconds}")
        self._seconds = seconds
        self._time = 0.0
        self._mean: dict[str, Array] | None = None

    def update(self, time_s: float, outputs: dict[str, Array]) -> dict[str, Array]:
        """Take in the outputs of one frame, and return the means in their place.

        Args:
            time_s: not before that of the last frame.
            outputs: of a batch of one: "probs" [1, M] and "ood_score" [1], finite.

        Returns:
            "probs" and "ood_score" of the mean, and "logits" that rank as the mean probabilities do.
        """
        new = {name: outputs[name].astype(np.float64) for name in ("probs", "ood_score")}
        if self._mean is None:
            self._mean = new
        else:
            weight = -math.expm1(-max(0.0, time_s - self._time) / self._seconds)
            self._mean = {name: mean + weight * (new[name] - mean) for name, mean in self._mean.items()}
        self._time = time_s
        return {**self._mean, "logits": self._mean["probs"]}


@dataclass(frozen=True)
class FrameVerdict:
    """The verdict on one frame; as JSON it is one object with the keys of `Verdict` and these.

    Attributes:
        prediction: its `image` is the name of the source.
        frame, time_s: see `Frame`.
        fps: verdicts a second, over the last second; None for the first one.
    """

    prediction: Verdict
    frame: int
    time_s: float
    fps: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        rest = {"frame": self.frame, "time_s": round(self.time_s, 4), "fps": self.fps and round(self.fps, 2)}
        return {**self.prediction.to_dict(), **rest}


def predict_frames(
    predictor: Predictor, frames: FrameReader, smooth: float | None = None, monitor: Monitor | None = None
) -> Iterator[FrameVerdict]:
    """The verdict on each frame as it comes.

    Args:
        predictor: an open artifact.
        frames: where they come from.
        smooth: seconds of `Smoother`; None judges each frame by itself, exactly as the image it is.
        monitor: takes the score of a frame by itself, of one frame in `MONITOR_PERIOD_S`.

    Raises:
        UsageError: `smooth` is not above 0.
    """
    smoother = None if smooth is None else Smoother(smooth)
    return _verdicts(predictor, frames, smoother, monitor)


def _verdicts(
    predictor: Predictor, frames: FrameReader, smoother: Smoother | None, monitor: Monitor | None
) -> Iterator[FrameVerdict]:
    settings, done, monitored = predictor.runner.spec.preprocess, deque[float](), -math.inf
    for frame in frames:
        outputs = predictor.runner.infer({"image": preprocess(load_image(frame.pixels), settings)[None]})
        if monitor is not None and frame.time_s - monitored >= MONITOR_PERIOD_S:
            score, monitored = float(outputs["ood_score"][0]), frame.time_s
            monitor.add_score(score if math.isfinite(score) else None)
        if smoother is not None and all(np.isfinite(outputs[name]).all() for name in ("probs", "ood_score")):
            outputs = smoother.update(frame.time_s, outputs)
        (prediction,) = predictor.verdicts([frames.name], outputs)
        done.append(time.monotonic())
        while len(done) > 2 and done[-1] - done[1] > RATE_WINDOW_S:
            done.popleft()
        span = done[-1] - done[0]
        yield FrameVerdict(prediction, frame.index, frame.time_s, (len(done) - 1) / span if span > 0 else None)


def run_stream(folder: str, sources: Sequence[str], options: PredictOptions, **opening: Any) -> int:
    """Print the verdict on each frame of a video, camera or stream; returns the exit code: 1 if it ended too early.

    Args:
        folder: an export folder, or the run folder that holds it.
        sources: one video file or address, or none if there is a camera.
        options: as JSON, the summary goes to standard error.
        opening: options of `ssod_edge.runtime.open.open_runner`.

    Raises:
        UsageError: more than one source, or images beside it.
    """
    if sys.stdout is None:
        raise OutputError("standard output is closed, so the verdicts have nowhere to go. Redirect it to a file.")
    camera, as_json = options.camera, options.as_json
    if len(sources) + (camera is not None) != 1:
        given = ", ".join([f"'{source}'" for source in sources] + ([f"--camera {camera}"] if camera else []))
        raise UsageError(f"a video, camera or stream is taken alone, got {given}. Run predict once for each")
    if options.smooth is not None:
        Smoother(options.smooth)  # before anything is opened
    with (
        Predictor(open_runner(folder, **opening)) as predictor,
        open_monitor(options.monitor, predictor) as watch,
        FrameReader(sources[0] if sources else None, camera, options.realtime) as frames,
    ):
        if not predictor.runner.spec.trained:
            click.echo("warning: untrained weights; these verdicts mean nothing", err=True)
        table = _Table(predictor.runner.spec.classes)
        if not as_json:
            click.echo(table.head())
        try:
            for verdict in predict_frames(predictor, frames, options.smooth, watch):
                table.add(verdict)
                click.echo(json.dumps(verdict.to_dict(), allow_nan=False) if as_json else table.row(verdict))
        finally:  # after Ctrl-C too
            click.echo(printable(table.summary(frames, predictor.runner)), err=as_json)
        if frames.problem is not None:
            click.echo(f"error: {printable(frames.problem)}", err=True)
    failed = frames.problem is not None or table.failed or (watch is not None and watch.problem)
    return EXIT_SOME_FAILED if failed else EXIT_OK


class _Table:
    """The rows of a stream, printed as they come, and their sum."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.frames = self.known = self.unknown = self.failed = 0
        self._width = max(5, *(len(printable(name)) for name in classes))
        self._began = self._now = time.monotonic()

    def add(self, verdict: FrameVerdict) -> None:
        prediction = verdict.prediction
        self.frames += 1
        self.known += prediction.known is True
        self.unknown += prediction.known is False
        self.failed += prediction.error is not None
        self._now = time.monotonic()

    def head(self) -> str:
        name = f"{'class':{self._width}}"
        return f"{'frame':>7} {'time':>9}  {'verdict':12}  {name} {'confidence':>10} {'ood score':>9} {'fps':>6}"

    def row(self, verdict: FrameVerdict) -> str:
        prediction = verdict.prediction
        start = f"{verdict.frame:7} {verdict.time_s:8.2f}s  "
        if prediction.error is not None:
            return f"{start}{click.style('ERROR', 'red')}  {printable(prediction.error)}"
        text, style = WORDS[prediction.known]
        word = click.style(f"{text:12}", dim=True) if style == "dim" else click.style(f"{text:12}", style)
        name = f"{printable(str(prediction.class_name)):{self._width}}"
        rate = "" if verdict.fps is None else f"{verdict.fps:.1f}"
        return f"{start}{word}  {name} {prediction.confidence:10.1%} {prediction.ood_score:9.3f} {rate:>6}"

    def summary(self, frames: FrameReader, runner: Runner) -> str:
        took = self._now - self._began
        rate = f" in {took:.1f} s ({self.frames / took:.1f} a second)" if self.frames else ""
        counts = f"{self.known} known, {self.unknown} unknown, {self.failed} failed, {frames.dropped} dropped"
        count = f"{self.frames} frame{'s' if self.frames != 1 else ''}"
        return f"{frames.name}: {count}{rate}: {counts}; {describe_run(runner)}"
