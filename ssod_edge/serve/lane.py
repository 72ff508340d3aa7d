"""The way of an image through the server: decoded on a thread, judged with others by one engine thread a model.

What is counted is touched by the event loop alone, so that nothing of it needs a lock. An image that was admitted goes
all the way, also where its client has gone: then each station passes it on without work.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from ssod_edge.data.pixels import FORMATS, read_pixels
from ssod_edge.errors import ImageError
from ssod_edge.runtime.predict import Pixels, Predictor, Seen, Verdict
from ssod_edge.serve.limits import Limits, RefusedError, busy

#: What a verdict calls an image whose own error is not for clients' eyes.
UNREADABLE = "it cannot be read"


@dataclass(eq=False)
class Opened:
    """An open export.

    Attributes:
        predictor: of it.
        close: releases it.
        pending: its images that are inside.
        retired: another one has taken its place; it is closed after its last image.
        failed: its last run failed.
    """

    predictor: Predictor
    close: Callable[[], object]
    pending: int = 0
    retired: bool = False
    failed: bool = False


@dataclass(eq=False)
class Asked:
    """The images of one request.

    Attributes:
        answer: their verdicts in order, once all are there; or None, where the engine failed.
        gone: nobody waits for them any more.
    """

    answer: asyncio.Future[list[Verdict] | None]
    jobs: list[Job] = field(default_factory=list)
    left: int = 0
    gone: bool = False


@dataclass(eq=False)
class Job:
    """One image of a request; `error` says why it could not be read, `too_large` that it has too many pixels."""

    asked: Asked
    opened: Opened
    name: str
    content: bytes
    pixels: Pixels | None = None
    warning: str | None = None
    error: str | None = None
    too_large: bool = False
    verdict: Verdict | None = None


class Lane:
    """The queue of one model, and the thread that runs its engine.

    Args:
        name: of the model.
        opened: what answers; `swap` puts another one in its place.
        limits: of the queue, the batches and the pixels.
        decoders: the threads that decode, shared with other models.
        log: takes a line.
        watch: called on the engine thread with each verdict and what gave it, after the answers went out.

    Attributes:
        inside: images that were admitted and have not left.
    """

    def __init__(
        self,
        name: str,
        opened: Opened,
        limits: Limits,
        decoders: ThreadPoolExecutor,
        log: Callable[[str], object],
        watch: Callable[[Opened, Sequence[Verdict]], object] | None = None,
    ) -> None:
        self.name, self.opened, self.limits = name, opened, limits
        self._decoders, self._log, self._watch = decoders, log, watch
        self.inside = 0
        self._ready: deque[Job] = deque()
        self._changed = threading.Condition()
        self._ends = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name=f"engine {name}", daemon=True)

    # On the event loop

    def start(self) -> None:
        """Begin; call it on the event loop that requests come on."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End after the run that is under way; what waits is dropped. May wait for that run."""
        with self._changed:
            self._ends = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self.opened.close()

    @property
    def alive(self) -> bool:
        """Whether verdicts can be expected."""
        return self._thread.is_alive() and not self.opened.failed

    def check_room(self, images: int = 1) -> None:
        """Raises RefusedError where so many images more do not fit."""
        if images > self.limits.queue:
            most = f"at most {self.limits.queue} images a request"
            raise RefusedError(413, "images", f"{most}, got {images}")
        if self.inside + images > self.limits.queue:
            raise busy()

    def admit(self, images: Sequence[tuple[str, bytes]]) -> Asked:
        """Send the images of a request, each with its name, on their way.

        Raises:
            RefusedError: they do not fit.
        """
        self.check_room(len(images))
        asked = Asked(asyncio.get_running_loop().create_future(), left=len(images))
        asked.jobs = [Job(asked, self.opened, name, content) for name, content in images]
        self.inside += len(images)
        self.opened.pending += len(images)
        for job in asked.jobs:
            self._decoders.submit(self._decode, job)
        return asked

    def swap(self, opened: Opened) -> None:
        """Let another export answer from the next request on."""
        before, self.opened = self.opened, opened
        before.retired = True
        self._close_if_done(before)

    def _leave(self, jobs: Sequence[Job]) -> None:
        """These have their verdicts, or will get none."""
        self.inside -= len(jobs)
        for job in jobs:
            job.opened.pending -= 1
            job.asked.left -= 1
            if not job.asked.left and not job.asked.answer.done():
                verdicts = [job.verdict for job in job.asked.jobs if job.verdict is not None]
                job.asked.answer.set_result(verdicts if len(verdicts) == len(job.asked.jobs) else None)
        self._close_if_done(jobs[0].opened)

    def _close_if_done(self, opened: Opened) -> None:
        if opened.retired and not opened.pending:
            self._decoders.submit(opened.close)

    # On a decoding thread

    def _decode(self, job: Job) -> None:
        if not job.asked.gone:
            try:
                settings = job.opened.predictor.runner.spec.preprocess
                self._check_pixels(job)
                if job.error is None:
                    damage: list[str] = []
                    job.pixels = read_pixels(job.content, settings, damaged=damage.append)
                    job.warning = damage[0] if damage else None
            except ImageError as error:
                job.error = in_public(str(error))
            except Exception as error:
                self._log(f"error: an image could not be decoded: {type(error).__name__}: {error}")
                job.error = UNREADABLE
        with self._changed:
            self._ready.append(job)
            self._changed.notify()

    def _check_pixels(self, job: Job) -> None:
        """Look at the size before anything is decoded."""
        with suppress(Exception), Image.open(io.BytesIO(job.content), formats=FORMATS) as image:
            if image.width * image.height > self.limits.pixels:
                job.error = f"too many pixels (the limit is {self.limits.pixels})"
                job.too_large = True

    # On the engine thread

    def _work(self) -> None:
        while jobs := self._take():
            try:
                verdicts = self._judge(jobs)
                jobs[0].opened.failed = False
            except Exception as error:
                verdicts = []
                jobs[0].opened.failed = True
                self._log(f"error: '{self.name}' failed on {len(jobs)} images: {type(error).__name__}: {error}")
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._leave, jobs)
            try:
                self._tell(jobs, verdicts)
            except Exception as error:
                self._log(f"error: '{self.name}': {type(error).__name__}: {error}")
            for job in jobs:  # a request and its images hold each other, and go when Python next looks for such
                job.content, job.pixels = b"", None

    def _take(self) -> list[Job]:
        """The next run: what is ready, of one export; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ends)
            until = time.monotonic() + self.limits.wait_ms / 1000
            while not self._ends and len(self._ready) < min(self.limits.batch, self.inside):  # others are on their way
                if (left := until - time.monotonic()) <= 0 or not self._changed.wait(left):
                    break
            jobs: list[Job] = []
            while not self._ends and self._ready and len(jobs) < self.limits.batch:
                if jobs and self._ready[0].opened is not jobs[0].opened:
                    break
                jobs.append(self._ready.popleft())
            return jobs

    def _judge(self, jobs: Sequence[Job]) -> list[tuple[Job, dict[str, Any]]]:
        """Give each job its verdict; returns those that were run, with the outputs of each."""
        predictor = jobs[0].opened.predictor
        run: list[tuple[Job, dict[str, Any]]] = []
        if alive := [job for job in jobs if job.pixels is not None and not job.asked.gone]:
            pixels = np.stack([job.pixels for job in alive if job.pixels is not None])
            outputs = predictor.runner.infer({"image": pixels})
            run = [(job, {name: values[row] for name, values in outputs.items()}) for row, job in enumerate(alive)]
            found = predictor.verdicts([""] * len(alive), outputs, [(None, job.warning) for job in alive])
            for job, verdict in zip(alive, found, strict=True):
                error = None if verdict.error is None else "the model has no finite answer for it"
                job.verdict = replace(verdict, image=job.name, error=error)
        for job in jobs:
            if job.error is not None:
                verdict = predictor.verdicts([""], {}, [(job.error, None)])[0]
                job.verdict = replace(verdict, image=job.name)
        return run

    def _tell(self, jobs: Sequence[Job], run: Sequence[tuple[Job, dict[str, Any]]]) -> None:
        """Let those see it who watch."""
        opened = jobs[0].opened
        if self._watch is not None:
            self._watch(opened, [job.verdict for job in jobs if job.verdict is not None])
        if opened.predictor.watchers:
            for job, outputs in run:
                if job.verdict is not None and job.verdict.error is None and job.pixels is not None:
                    opened.predictor.tell(Seen(job.content, job.verdict, job.pixels, outputs))


def in_public(error: str) -> str:
    """Why an image could not be read, without what libraries said of it."""
    reason = error.removeprefix("image bytes: ")
    if "pip install" in reason:
        return "a kind of picture that this server does not read; send JPEG or PNG"
    for known in ("damaged or unsupported image data", "damaged image data"):
        if reason.startswith(known):
            return known
    return reason
