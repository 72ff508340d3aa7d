"""A monitor file that outlives a swap: scores of another export begin a new one, and the old one is set aside."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from ssod_edge.errors import SsodEdgeError, UsageError
from ssod_edge.runtime.field.monitor import Monitor, Record, read_monitor
from ssod_edge.runtime.predict import Predictor, Verdict


class Counted:
    """Counts the verdicts of the export that is in use; threads may share it.

    Args:
        path: of the monitor file.
        predictor: of the export that is in use.
        log: takes a line: drift, the first problem with the file, a file that was set aside.

    Raises:
        UsageError, ArtifactError, OutputError: see `ssod_edge.runtime.field.monitor.Monitor`.
    """

    def __init__(self, path: str, predictor: Predictor, log: Callable[[str], object]) -> None:
        self._path, self._log, self._lock = path, log, threading.Lock()
        self._counted = predictor
        self._monitor: Monitor | None = self._open(predictor)

    @property
    def drifted(self) -> bool | None:
        """As of what was written last; None where it cannot be told, because the export has no threshold."""
        return None if self._monitor is None else self._monitor.drifted

    @property
    def record(self) -> Record | None:
        """What was written last; None as `drifted`."""
        return None if self._monitor is None else self._monitor.record

    def add(self, predictor: Predictor, verdicts: Sequence[Verdict]) -> None:
        """Count what an export said; of one that is no longer in use nothing is counted."""
        with self._lock:
            if predictor is self._counted and self._monitor is not None:
                for verdict in verdicts:
                    self._monitor.add(verdict)

    def swap(self, predictor: Predictor) -> None:
        """Another export is in use from now on."""
        self.flush()
        with self._lock:
            self._counted, self._monitor = predictor, None
            try:
                self._monitor = self._open(predictor)
            except SsodEdgeError as error:
                self._log(f"error: {error} The verdicts go on without the monitor.")

    def flush(self) -> None:
        """Write what has been counted."""
        with self._lock:
            if self._monitor is not None:
                self._monitor.flush()

    def _open(self, predictor: Predictor) -> Monitor:
        try:
            return Monitor(self._path, predictor, say=self._log)
        except UsageError:
            if not os.path.isfile(self._path):
                raise
            read_monitor(self._path)  # what is none is not moved
            threshold = predictor.runner.artifact.threshold
            if threshold is None or not threshold.id_quantiles:
                raise
        path = Path(self._path)
        aside = path.with_name(f"{path.stem}-{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%fZ}{path.suffix}")
        path.rename(aside)
        self._log(f"note: '{self._path}' holds scores of the export before; it is '{aside}' now, and begun anew")
        return Monitor(self._path, predictor, say=self._log)
