"""A verdict on each frame of a video, camera or stream, for `predict`, smoothed if wanted."""

from __future__ import annotations

import json
import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import numpy as np

from ssod_edge.data.pixels import read_pixels
from ssod_edge.errors import EXIT_OK, EXIT_SOME_FAILED, UsageError
from ssod_edge.runtime.field.frames import Frame, FrameReader
from ssod_edge.runtime.field.monitor import Monitor
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import Predictor, Seen, Verdict
from ssod_edge.runtime.report import (
    WORDS,
    PredictOptions,
    describe_run,
    open_collector,
    open_monitor,
    open_table,
    p_known_note,
)
from ssod_edge.runtime.runner import Array, Runner
from ssod_edge.runtime.written import FRAME_COLUMNS
from ssod_edge.sources import without_secrets
from ssod_edge.terminal import printable, tell

#: Time over which the frame rate is measured.
RATE_WINDOW_S = 1.0
#: A monitor takes one frame in this time: neighbouring frames show the same, and would count as evidence many times.
MONITOR_PERIOD_S = 1.0


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
        self._mean: dict[str, Array] = {}

    def update(self, time_s: float, outputs: dict[str, Array]) -> dict[str, Array]:
        """Take in the outputs of one frame, and return the means in their place.

        Args:
            time_s: not before that of the last frame.
            outputs: of a batch of one: "probs" [1, M] and "ood_score" [1], finite.

        Returns:
            "probs" and "ood_score" of the mean, and "logits" that rank as the mean probabilities do.
        """
        new = {name: outputs[name].astype(np.float64) for name in ("probs", "ood_score")}
        weight = -math.expm1(-max(0.0, time_s - self._time) / self._seconds)
        self._mean = {name: mean + weight * (new[name] - mean) for name, mean in (self._mean or new).items()}
        self._time = time_s
        return {**self._mean, "logits": self._mean["probs"]}


@dataclass(frozen=True)
class FrameVerdict:
    """The verdict on one frame; as JSON it is one object with the keys of `Verdict` and these.

    Attributes:
        prediction: its `image` is the name of the source.
        frame, time_s: see `ssod_edge.runtime.field.frames.Frame`.
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
    predictor: Predictor, frames: FrameReader, smoother: Smoother | None = None, monitor: Monitor | None = None
) -> Iterator[FrameVerdict]:
    """The verdict on each frame as it comes.

    Args:
        predictor: an open artifact.
        frames: where they come from.
        smoother: a new one; None judges each frame by itself, exactly as the image it is.
        monitor: takes the score of a frame by itself, of one frame in `MONITOR_PERIOD_S`.
    """
    settings, done, monitored = predictor.runner.spec.preprocess, deque[float](), -math.inf
    for frame in frames if monitor is None else _counted(frames, monitor):
        pixels = read_pixels(frame.pixels, settings)
        outputs = predictor.runner.infer({"image": pixels[None]})
        if predictor.watchers:
            (alone,) = predictor.verdicts([frames.name], outputs)
            row = {name: values[0] for name, values in outputs.items()}
            if alone.error is None:
                predictor.tell(Seen(frame.pixels, alone, pixels, row, frame.index, frame.time_s))
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


def _counted(frames: FrameReader, monitor: Monitor) -> Iterator[Frame]:
    """The frames; a monitor counts how often they stopped coming."""
    told = 0
    try:
        for frame in frames:
            monitor.add_interruptions(frames.interruptions - told)
            told = frames.interruptions
            yield frame
    finally:
        monitor.add_interruptions(frames.interruptions - told)


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
    camera, as_json = options.camera, options.as_json
    if len(sources) + (camera is not None) != 1:
        named = [f"'{without_secrets(source)}'" for source in sources]
        given = ", ".join(named + ([f"--camera {without_secrets(camera, camera=True)}"] if camera else []))
        raise UsageError(f"a video, camera or stream is taken alone, got {given}. Run predict once for each")
    smoother = None if options.smooth is None else Smoother(options.smooth)
    with (
        Predictor(open_runner(folder, **opening)) as predictor,
        open_monitor(options.monitor, predictor) as watch,
        open_collector(options, predictor) as collector,
        open_table(options, FRAME_COLUMNS) as written,
        FrameReader(sources[0] if sources else None, camera, options.realtime, _warn) as frames,
    ):
        if not predictor.runner.spec.trained:
            tell("warning: untrained weights; these verdicts mean nothing", err=True)
        table = _Table(predictor.runner.spec.classes)
        if not as_json:
            tell(table.head())
        try:
            for verdict in predict_frames(predictor, frames, smoother, watch):
                table.add(verdict)
                if written is not None:
                    written.add(verdict.to_dict())
                if as_json:
                    tell(json.dumps(verdict.to_dict(), allow_nan=False))
                else:
                    click.echo(table.row(verdict))  # with colours; what is from outside is printable
        finally:  # after Ctrl-C too
            if not as_json and (note := p_known_note(predictor.runner)):
                tell(note)
            tell(table.summary(frames, predictor.runner), err=as_json)
        if frames.problem is not None:
            tell(f"error: {printable(frames.problem)}", err=True)
    problems = any(one is not None and one.problem for one in (watch, collector))
    failed = frames.problem is not None or table.counts["failed"] or problems
    return EXIT_SOME_FAILED if failed else EXIT_OK


def _warn(line: str) -> None:
    tell(f"warning: {printable(line)}", err=True)


class _Table:
    """The rows of a stream, printed as they come, and their sum."""

    def __init__(self, classes: Sequence[str]) -> None:
        #: How many frames were known (True), unknown (False), undecided (None) and failed ("failed").
        self.counts: Counter[bool | str | None] = Counter()
        self._width = max(5, *(len(printable(name)) for name in classes))
        self._began = self._now = time.monotonic()

    def add(self, verdict: FrameVerdict) -> None:
        self.counts[verdict.prediction.known if verdict.prediction.error is None else "failed"] += 1
        self._now = time.monotonic()

    def head(self) -> str:
        name = f"{'class':{self._width}}"
        figures = f"{'confidence':>10} {'ood score':>9} {'p known':>7} {'fps':>6}"
        return f"{'frame':>7} {'time':>9}  {'verdict':12}  {name} {figures}"

    def row(self, verdict: FrameVerdict) -> str:
        prediction = verdict.prediction
        start = f"{verdict.frame:7} {verdict.time_s:8.2f}s  "
        if prediction.error is not None:
            return f"{start}{click.style('ERROR', 'red')}  {printable(prediction.error)}"
        text, style = WORDS[prediction.known]
        word = click.style(f"{text:12}", dim=True) if style == "dim" else click.style(f"{text:12}", style)
        name = f"{printable(str(prediction.class_name)):{self._width}}"
        rate = "" if verdict.fps is None else f"{verdict.fps:.1f}"
        p = "" if prediction.p_known is None else f"{prediction.p_known:.1%}"
        figures = f"{prediction.confidence:10.1%} {prediction.ood_score:9.3f} {p:>7} {rate:>6}"
        return f"{start}{word}  {name} {figures}"

    def summary(self, frames: FrameReader, runner: Runner) -> str:
        took, counts, total = self._now - self._began, self.counts, self.counts.total()
        rate = f" in {took:.1f} s ({total / took:.1f} a second)" if total else ""
        outcomes = f"{counts[True]} known, {counts[False]} unknown, {counts['failed']} failed, {frames.dropped} dropped"
        if frames.interruptions:
            outcomes += f", interrupted {_times(frames.interruptions)}, opened anew {_times(frames.reopened)}"
        count = f"{total} frame{'s' if total != 1 else ''}"
        return f"{frames.name}: {count}{rate}: {outcomes}; {describe_run(runner)}"


def _times(n: int) -> str:
    return f"{n} time{'s' if n != 1 else ''}"
