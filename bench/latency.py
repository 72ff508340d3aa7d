"""Timing queries: how long a measurement lasts, in which order backends take turns, and what the samples say.

The method is MLPerf's single stream: one query at a time, each timed from the encoded image to the verdict, and the
headline is the 90th percentile at batch 1. No sample is ever left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ssod_edge.errors import UsageError

#: What a query consists of, in its order. Their sum is the end-to-end time.
STAGES = ("preprocess", "transfer", "compute", "postprocess")

#: Fewest samples from which a 99th percentile is reported.
P99_SAMPLES = 662

#: Seconds between two calls of `tick`; it runs between queries, never inside one.
TICK_SECONDS = 0.5

#: Untimed queries after each change of backend in `alternate`: they bring its weights back into the caches.
LEAD_IN = 3
#: The timed ones that follow.
BLOCK = 10

Samples = npt.NDArray[np.int64]
#: Runs one query and returns the nanoseconds that each of STAGES took.
Query = Callable[[], Sequence[int]]
Tick = Callable[[], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How long to measure. Each limit on time goes with one on the count; both must be reached.

    Attributes:
        warmup_s, warmup_queries: before each repeat, untimed.
        measure_s, measure_queries: each repeat.
        repeats: rounds in which every backend takes one turn.
        pair_s: seconds that one repeat of `alternate` lasts.
    """

    warmup_s: float = 2.0
    warmup_queries: int = 50
    measure_s: float = 10.0
    measure_queries: int = 1024
    repeats: int = 3
    pair_s: float = 10.0

    def __post_init__(self) -> None:
        for field in ("warmup_s", "warmup_queries", "measure_s", "pair_s"):
            if getattr(self, field) < 0:
                raise UsageError(f"{field} must be 0 or more, got {getattr(self, field)}")
        for field in ("measure_queries", "repeats"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} must be at least 1, got {getattr(self, field)}")


#: A look at the figures in seconds: too few samples for a p99, and more noise.
QUICK = Plan(warmup_s=0.2, warmup_queries=5, measure_s=0.5, measure_queries=16, repeats=3, pair_s=0.5)


def measure(query: Query, plan: Plan, tick: Tick) -> Samples:
    """One repeat: warm up, then time queries. `tick` is called between them every TICK_SECONDS, to redraw a bar.

    Returns:
        Nanoseconds, int64 [n, len(STAGES)], one row for each query after the warm-up.
    """
    _run(query, plan.warmup_s, plan.warmup_queries, tick)
    return np.asarray(_run(query, plan.measure_s, plan.measure_queries, tick), np.int64)


def _run(query: Query, seconds: float, queries: int, tick: Tick) -> list[Sequence[int]]:
    samples: list[Sequence[int]] = []
    start = ticked = now = time.monotonic()
    while now - start < seconds or len(samples) < queries:
        samples.append(query())
        now = time.monotonic()
        if now - ticked >= TICK_SECONDS:
            tick()
            ticked = now
    return samples


def interleave(backends: Sequence[T], repeats: int) -> Iterator[tuple[int, T]]:
    """(repeat, backend) in the order of measuring: each round has every backend once, and begins one further on.

    A drift of the machine then touches all backends alike, and none is always measured first.
    """
    for repeat in range(repeats):
        start = repeat % len(backends) if backends else 0
        for backend in (*backends[start:], *backends[:start]):
            yield repeat, backend


class Turns(NamedTuple):
    """Two calls that took turns: the median of each in ms, and the median over the rounds of first / second."""

    first_ms: float
    second_ms: float
    ratio: float


def alternate(first: Callable[[], Any], second: Callable[[], Any], seconds: float) -> Turns:
    """Time two calls that take turns in short blocks, in the order A B B A.

    Differences of one per cent are smaller than the drift between two measurements that follow each other, and a
    shared machine may be half again as slow for some seconds. A round of some tens of milliseconds sees one machine, so
    the ratio is taken in each round. There are at least two of them, and as many as fit into `seconds`.
    """
    times: tuple[list[list[int]], list[list[int]]] = ([], [])
    start = time.monotonic()
    while len(times[0]) < 2 or time.monotonic() - start < seconds:
        for turns in times:
            turns.append([])
        for which in (0, 1, 1, 0):
            call = (first, second)[which]
            for _ in range(LEAD_IN):
                call()
            for _ in range(BLOCK):
                began = time.perf_counter_ns()
                call()
                times[which][-1].append(time.perf_counter_ns() - began)
    medians = [np.median(turns, axis=1) for turns in times]
    ratio = float(np.median(medians[0] / medians[1]))
    return Turns(float(np.median(times[0])) / 1e6, float(np.median(times[1])) / 1e6, ratio)


def summarise(nanoseconds: npt.NDArray[np.int64]) -> dict[str, float | int | None]:
    """{p50, p90, p99, mean, min, max} in ms and the count n, over every sample; p99 is None under P99_SAMPLES."""
    n = int(nanoseconds.size)
    # Nearest rank: always a real sample.
    p50, p90, p99 = np.quantile(nanoseconds, (0.50, 0.90, 0.99), method="inverted_cdf").tolist()
    return {
        "p50": _ms(p50),
        "p90": _ms(p90),
        "p99": _ms(p99) if n >= P99_SAMPLES else None,
        "mean": _ms(float(nanoseconds.mean())),
        "min": _ms(float(nanoseconds.min())),
        "max": _ms(float(nanoseconds.max())),
        "n": n,
    }


def summarise_stages(samples: Samples) -> dict[str, dict[str, float | int | None]]:
    """`summarise` of each of STAGES and of "end_to_end"."""
    stages = {name: summarise(samples[:, column]) for column, name in enumerate(STAGES)}
    return {**stages, "end_to_end": summarise(samples.sum(axis=1))}


def _ms(nanoseconds: float) -> float:
    return round(nanoseconds / 1e6, 5)
