"""A model under a name: the export in its place, and another one that takes that place while requests come."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssod_edge.runtime.export import Export
from ssod_edge.runtime.field.collect import MEGABYTES, MOST, Collector
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import Predictor, Verdict
from ssod_edge.serve.counted import Counted
from ssod_edge.serve.lane import Lane, Opened
from ssod_edge.serve.limits import Limits
from ssod_edge.spec import SPEC_NAME

if TYPE_CHECKING:
    from ssod_edge.serve.metrics import Metrics

#: How often is looked whether another export has taken the place, and how often again where it could not be opened.
LOOK_S, RETRY_S = 0.5, 5.0
#: A monitor file is written this often, also when no requests come.
FLUSH_S = 5.0


@dataclass(frozen=True)
class Keeping:
    """What is kept of what was asked.

    Attributes:
        collect: model -> a folder of `ssod_edge.runtime.field.collect.Collector`; with its budget.
        monitor: model -> a file of `ssod_edge.runtime.field.monitor.Monitor`.
    """

    collect: Mapping[str, str] = field(default_factory=dict)
    monitor: Mapping[str, str] = field(default_factory=dict)
    collect_most: int = MOST
    collect_mb: float = MEGABYTES


class Model:
    """A model that answers.

    Args:
        name: of it.
        folder: an export folder, or the run folder that holds it.
        opening: options of `ssod_edge.runtime.open.open_runner`.
        keeping: what is kept.
        limits, decoders, log: see `ssod_edge.serve.lane.Lane`.
        metrics: take every verdict.

    Attributes:
        lane: what requests go through.
        counted: its monitor, where there is one.
        since: when the export that answers was opened.
        problem: why another one that is in its place does not answer; None while all is well.

    Raises:
        UsageError, ArtifactError, MissingExtraError, EngineError, VerificationError: see `open_runner`.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        opening: Mapping[str, Any],
        keeping: Keeping,
        limits: Limits,
        decoders: ThreadPoolExecutor,
        log: Callable[[str], object],
        metrics: Metrics,
    ) -> None:
        self.name, self._folder, self._opening, self._keeping = name, folder, opening, keeping
        self._log, self._metrics = log, metrics
        self._state = self._look()
        self._tried = self._flushed = time.monotonic()
        opened = self._open()
        path = keeping.monitor.get(name)
        self.counted = None if path is None else Counted(path, opened.predictor, log)
        self.lane = Lane(name, opened, limits, decoders, log, self._watch)
        self.since = datetime.now(timezone.utc)
        self.problem: str | None = None

    def facts(self) -> dict[str, Any]:
        """What `/v1/models` says of it."""
        runner = self.lane.opened.predictor.runner
        threshold = runner.artifact.threshold
        return {
            "name": self.name,
            "version": runner.spec.version,
            "classes": list(runner.spec.classes),
            "backbone": runner.spec.backbone,
            "input_size": runner.spec.preprocess.input_size,
            "score": runner.spec.score_name,
            "threshold": None if threshold is None else threshold.value,
            "target_tpr": None if threshold is None else threshold.target_tpr,
            "artifact": runner.artifact.name,
            "engine": runner.engine,
            "precision": runner.precision,
            "since": self.since.isoformat(timespec="milliseconds"),
            "ready": self.lane.alive,
            "problem": self.problem,
        }

    async def follow(self) -> None:
        """Swap in what takes the place of the export, until it is cancelled."""
        said = ""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._look_after()
            except Exception as error:
                if str(error) != said:
                    self._log(f"error: '{self.name}': {type(error).__name__}: {error}")
                said = str(error)

    async def _look_after(self) -> None:
        now = time.monotonic()
        if self.counted is not None and now - self._flushed >= FLUSH_S:
            self._flushed = now
            await asyncio.to_thread(self.counted.flush)
        if self.lane.opened.failed:  # who asks only while it is ready would never ask again
            await asyncio.to_thread(try_out, self.lane.opened.predictor, (1,))
            self.lane.opened.failed = False
        state = await asyncio.to_thread(self._look)
        if state != self._state or (self.problem is not None and now - self._tried >= RETRY_S):
            self._tried, self._state = now, state
            await self._renew()

    async def _renew(self) -> None:
        try:
            opened = await asyncio.to_thread(self._open)
        except Exception as error:
            if self.problem is None:
                self._log(
                    f"error: '{self.name}': the export in its place cannot be opened, the one before goes on: {error}"
                )
            self.problem = "the export in its place cannot be opened; the one before answers"
            return
        if self.counted is not None:
            await asyncio.to_thread(self.counted.swap, opened.predictor)
        self.lane.swap(opened)
        self.since, self.problem = datetime.now(timezone.utc), None
        self._log(f"'{self.name}': version {opened.predictor.runner.spec.version} answers from now on")

    def stop(self) -> None:
        """End; may wait for a run of the engine."""
        self.lane.stop()
        if self.counted is not None:
            self.counted.flush()

    def _look(self) -> tuple[int, ...] | None:
        """What changes whenever an export is written: its spec is always a new file."""
        try:
            found = os.stat(Export.place(self._folder) / SPEC_NAME)
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size

    def _open(self) -> Opened:
        """The export that is in place, ready to answer at once."""
        with ExitStack() as stack:
            predictor = stack.enter_context(Predictor(open_runner(self._folder, **self._opening)))
            try_out(predictor, (1, 2))  # OpenVINO compiles one model for one image, and one for more
            if (folder := self._keeping.collect.get(self.name)) is not None:
                budget = self._keeping.collect_most, self._keeping.collect_mb
                stack.enter_context(Collector(folder, predictor, *budget, say=self._log))
            return Opened(predictor, stack.pop_all().close)

    def _watch(self, opened: Opened, verdicts: Sequence[Verdict]) -> None:
        self._metrics.count(self.name, verdicts)
        if self.counted is not None:
            self.counted.add(opened.predictor, verdicts)


def try_out(predictor: Predictor, sizes: Sequence[int]) -> None:
    """Run batches of these numbers of black images; whatever the engine raises is raised."""
    size = predictor.runner.spec.preprocess.input_size
    for images in sizes:
        predictor.runner.infer({"image": np.zeros((images, 3, size, size), np.uint8)})
