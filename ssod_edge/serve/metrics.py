"""What `/metrics` says, in Prometheus's format. Labels are models' names and a few fixed words, never a client's."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssod_edge.runtime.field.fleet import device_row
from ssod_edge.runtime.field.scraped import families
from ssod_edge.runtime.predict import Verdict

if TYPE_CHECKING:
    from ssod_edge.serve.models import Model

#: Verdicts that the share of unknown ones is taken over.
RECENT = 1000
#: Seconds of a request.
BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
WORDS = {True: "known", False: "unknown", None: "no threshold"}


class Metrics:
    """Counts; threads may share it."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, Summary

        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        shared: dict[str, Any] = {"registry": self.registry}
        self._verdicts = Counter("ssod_edge_verdicts", "Images that were judged.", ("model", "verdict"), **shared)
        self._refused = Counter("ssod_edge_refused_requests", "Requests without a verdict.", ("reason",), **shared)
        self._seconds = Histogram(
            "ssod_edge_request_seconds", "From a request to its verdicts.", ("model",), buckets=BUCKETS, **shared
        )
        self._runs = Summary("ssod_edge_run_images", "Images of a run of the engine.", ("model",), **shared)
        self._lock = threading.Lock()
        self._recent: dict[str, deque[bool]] = {}

    def count(self, model: str, verdicts: Sequence[Verdict]) -> None:
        """Count what a run of the engine said."""
        if not verdicts:
            return
        self._runs.labels(model).observe(len(verdicts))
        for verdict in verdicts:
            word = "error" if verdict.error is not None else WORDS[verdict.known]
            self._verdicts.labels(model, word).inc()
        with self._lock:
            recent = self._recent.setdefault(model, deque(maxlen=RECENT))
            recent.extend(verdict.known is False for verdict in verdicts if verdict.error is None)

    def took(self, model: str, seconds: float) -> None:
        """A request was answered."""
        self._seconds.labels(model).observe(seconds)

    def refuse(self, reason: str) -> None:
        """A request was not."""
        self._refused.labels(reason).inc()

    def unknown_share(self, model: str) -> float:
        """Of the last verdicts; NaN before the first."""
        with self._lock:
            recent = self._recent.get(model)
            return sum(recent) / len(recent) if recent else float("nan")

    def watch(self, models: Mapping[str, Model]) -> None:
        """Also say what these are at, each time somebody asks."""
        self.registry.register(_States(self, models))

    def text(self) -> tuple[bytes, str]:
        """The page, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _States:
    """A collector in Prometheus's sense."""

    def __init__(self, metrics: Metrics, models: Mapping[str, Model]) -> None:
        self._metrics, self._models = metrics, models

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        def gauge(name: str, text: str, values: Mapping[str, float]) -> Any:
            family = GaugeMetricFamily(f"ssod_edge_{name}", text, labels=("model",))
            for model, value in values.items():
                family.add_metric((model,), value)
            return family

        models = self._models
        yield gauge("queue_images", "Images inside.", {name: model.lane.inside for name, model in models.items()})
        shares = {name: self._metrics.unknown_share(name) for name in models}
        yield gauge("unknown_share", f"Of the last {RECENT} verdicts.", shares)
        drifts = {name: model.counted.drifted for name, model in models.items() if model.counted is not None}
        told = {name: float(drifted) for name, drifted in drifts.items() if drifted is not None}
        yield gauge("drift", "1: the scores are no longer those of known images.", told)
        records = {name: model.counted.record for name, model in models.items() if model.counted is not None}
        yield from families({name: device_row(record) for name, record in records.items() if record is not None})
        stale = {name: float(model.problem is not None) for name, model in models.items()}
        yield gauge("stale", "1: the export in a model's place cannot be opened.", stale)
