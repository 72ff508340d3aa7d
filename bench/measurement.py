"""Measuring the backends of one export: latency, the cost of the OOD row, accuracy, memory."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from ssod_edge.bench.accuracy import Collected, ImageSet, accuracy_figures, run_backends
from ssod_edge.bench.backends import EAGER, Backend, Backends
from ssod_edge.bench.environment import describe_state
from ssod_edge.bench.images import BenchImages, query_images
from ssod_edge.bench.latency import QUICK, Plan, Samples, Turns, alternate, interleave, measure
from ssod_edge.bench.memory import measure_rss
from ssod_edge.bench.plain import Pair
from ssod_edge.bench.power import PowerMeter
from ssod_edge.bench.progress import Bar
from ssod_edge.bench.query import IMAGES, ImageQuery, encode
from ssod_edge.bench.record import ROW_KEYS, SCHEMA_VERSION, latency_figures
from ssod_edge.data.named import NamedData
from ssod_edge.errors import UsageError
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.runner import Runner

#: Keys of a row that are attributes of a `Backend`.
OF_BACKEND = ("sha256", "engine", "precision", "device", "size_mb", "status", "error")


@dataclass(frozen=True)
class BenchOptions(NamedData):
    """What a bench is asked for, beside the images.

    Attributes:
        quick: seconds instead of minutes, with fewer samples and images.
        batch: images per query.
        threads: of each engine; None leaves it to them.
        plan: how long to measure; None takes the full method's, or QUICK.
    """

    quick: bool = False
    batch: int = 1
    threads: int | None = None
    plan: Plan | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")


class Measurement:
    """One bench: the backends, and what has been measured of them."""

    def __init__(
        self, export: Export, options: BenchOptions, backends: Backends, images: BenchImages, bar: Bar
    ) -> None:
        self.spec, self.options, self.backends, self.images, self.bar = export.spec, options, backends, images, bar
        self.plan = options.plan or (QUICK if options.quick else Plan())
        found, self.queries = query_images(images, export, IMAGES)
        self.files = encode(found)
        self.samples: dict[str, list[Samples]] = {}
        self.cost: dict[str, dict[str, Any] | None] = {pair.engine: None for pair in backends.pairs}
        self.collected: dict[str, Collected] = {}
        self.accuracy: dict[str, dict[str, Any]] = {}
        self.reference: str | None = None
        self.rss: dict[str, float] = {}
        self.power: dict[str, PowerMeter] = {}

    def run(self) -> None:
        """Latency first, while nothing else runs; a backend that fails takes no further part."""
        with self.bar.steps("opening", len(self.backends.working())) as step:
            for backend in self.backends.working():
                step(backend.name, 1)
                self.backends.open(backend)
        self._measure_latency()
        self._measure_cost()
        if self.images.known is not None:
            self._collect_outputs()
            self._compute_accuracy(self.images.known)
        self._measure_memory()

    def _measure_latency(self) -> None:
        queries: dict[str, ImageQuery] = {}
        names = list(self.backends.runners())
        with self.bar.steps("latency", len(names) * self.plan.repeats) as step:
            for repeat, name in interleave(names, self.plan.repeats):
                step(f"{name}, repeat {repeat + 1} of {self.plan.repeats}", 1)
                runner = self.backends.runners().get(name)
                if runner is None:
                    continue
                try:
                    query = queries.setdefault(name, ImageQuery(runner, self.files, self.options.batch))
                    with self.power.setdefault(name, PowerMeter()):
                        samples = measure(query, self.plan, self.bar.refresh)
                    self.samples.setdefault(name, []).append(samples)
                except Exception as error:
                    self.backends.named(name).fail(error)

    def _measure_cost(self) -> None:
        """The fused graph over the plain one, per engine: the ratio of times that were taken in turns."""
        with self.bar.steps("cost of unknown", len(self.backends.pairs)) as step:
            for pair in self.backends.pairs:
                step(pair.engine, 1)
                runners = self.backends.runners()
                if pair.plain not in runners or pair.fused not in runners:
                    continue
                try:
                    self.cost[pair.engine] = self._cost(pair, runners[pair.fused], runners[pair.plain])
                except Exception as error:
                    self.backends.named(pair.plain).fail(error)

    def _cost(self, pair: Pair, fused: Runner, plain: Runner) -> dict[str, Any]:
        queries = [ImageQuery(runner, self.files, self.options.batch) for runner in (fused, plain)]
        for query in queries:
            query()
        first, second = (query.compute for query in queries)
        repeats = [alternate(first, second, self.plan.pair_s) for _ in range(self.plan.repeats)]
        return cost_figures(pair.fused, pair.plain, self.options.batch, repeats)

    def _collect_outputs(self) -> None:
        with self.bar.steps("accuracy", sum(len(images.indices) for images in self.images.sets)) as step:
            for images in self.images.sets:
                tick = partial(step, images.name)
                found = run_backends(self.backends.runners(), images, self.spec.preprocess, tick)
                self.collected[images.name] = found
                for name, error in found.errors.items():
                    self.backends.named(name).fail(error)

    def _compute_accuracy(self, known: ImageSet) -> None:
        found = self.collected[known.name]
        if known.labels is None or not found.rows:
            return
        labels, runners = known.labels[found.rows], self.backends.runners()
        # A backend that failed on one set is left out of all, also as the reference.
        outputs = {
            name: {backend: outputs for backend, outputs in collected.outputs.items() if backend in runners}
            for name, collected in self.collected.items()
            if collected.rows
        }
        own = outputs.pop(known.name)
        # A device has no PyTorch: there the others are compared with the first artifact of the weights as they are.
        fp32 = [artifact.name for artifact in self.spec.artifacts if artifact.precision == "fp32"]
        self.reference = next((name for name in (EAGER, *fp32) if name in own), None)
        for name, runner in runners.items():
            threshold, classes = runner.artifact.threshold, self.spec.classes
            self.accuracy[name] = accuracy_figures(name, threshold, labels, own, outputs, self.reference, classes)

    def _measure_memory(self) -> None:
        working, options = self.backends.working(), self.options
        with self.bar.steps("memory", len(working)) as step:
            for backend in working:
                step(backend.name, 1)
                try:
                    self.rss[backend.name] = measure_rss(backend.folder, backend.name, options.batch, options.threads)
                except Exception as error:
                    backend.fail(error)

    def has_latency(self) -> bool:
        """Whether the latency of some backend has been measured to the end."""
        return any(len(samples) == self.plan.repeats for samples in self.samples.values())

    def record(self, environment: dict[str, Any], command: str) -> dict[str, Any]:
        """What was measured, JSON-ready, with the keys of `ssod_edge.bench.record.RECORD_KEYS`."""
        spec, options = self.spec, self.options
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": {**environment, "state_after": describe_state()},
            "command": command,
            "method": {"quick": options.quick, "batch": options.batch, "images": self.queries, **asdict(self.plan)},
            "export": {
                "backbone": spec.backbone,
                "input_size": spec.preprocess.input_size,
                "classes": len(spec.classes),
                "score": spec.score_name,
                "trained": spec.trained,
                "run": spec.source.get("run"),
                "class_names": list(spec.classes),
                "version": spec.version,
                "model": spec.reference_sha256,
                "taught_from": [entry["reference_sha256"] for entry in spec.lineage],
            },
            "data": self._data(),
            "cost_of_unknown": self.cost,
            "rows": [self._row(backend) for backend in self.backends.all],
        }

    def _row(self, backend: Backend) -> dict[str, Any]:
        samples = self.samples.get(backend.name, [])
        whole = len(samples) == self.plan.repeats
        latency = latency_figures(samples, self.options.batch) if whole else {}
        meter = self.power.get(backend.name)
        return {
            **dict.fromkeys(ROW_KEYS),
            "artifact": backend.name,
            **{key: getattr(backend, key) for key in OF_BACKEND},
            "batch": self.options.batch,
            **latency,
            "power": meter.figures(1000 / latency["throughput_ips"]) if meter and latency else None,
            "rss_mb": self.rss.get(backend.name),
            **self.accuracy.get(backend.name, {}),
        }

    def _data(self) -> dict[str, Any]:
        entries = {}
        for images in self.images.sets:
            found = self.collected.get(images.name, Collected())
            entries[images.name] = {
                "data": images.data,
                "fingerprint": images.source.fingerprint,
                "n": len(found.rows),
                "chosen": hashlib.sha256(images.indices.tobytes()).hexdigest(),
                "unreadable": found.unreadable,
            }
        return {
            "id": entries.pop("id", None),
            "ood": entries,
            "protocol": self.options.protocol,
            "note": self.images.note,
            "reference": self.reference,
        }


def cost_figures(fused: str, plain: str, batch: int, repeats: list[Turns]) -> dict[str, Any]:
    """One engine's entry of `cost_of_unknown`, from repeats of `latency.alternate` with the fused graph first.

    `ratio` is fused / plain, the median of `repeats`, which are in it too; `fused_ms` and `plain_ms` are medians.
    """
    ratios = [round(turns.ratio, 5) for turns in repeats]
    return {
        "fused": fused,
        "plain": plain,
        "batch": batch,
        "fused_ms": round(float(np.median([turns.first_ms for turns in repeats])), 5),
        "plain_ms": round(float(np.median([turns.second_ms for turns in repeats])), 5),
        "ratio": float(np.median(ratios)),
        "repeats": ratios,
    }
