"""Latency: statistics by hand, when a measurement ends, and who is measured when."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
from colour import SIZE
from PIL import Image

from ssod_edge.bench.latency import (
    BLOCK,
    LEAD_IN,
    P99_SAMPLES,
    QUICK,
    STAGES,
    Plan,
    Turns,
    alternate,
    interleave,
    measure,
    summarise,
    summarise_stages,
)
from ssod_edge.bench.measurement import cost_figures
from ssod_edge.bench.query import ImageQuery, classify, encode
from ssod_edge.bench.record import latency_figures
from ssod_edge.errors import UsageError
from ssod_edge.runtime.open import open_runner


@pytest.mark.parametrize(
    ("n", "median", "ninetieth"),
    [(1, 1, 1), (2, 1, 2), (9, 5, 9), (10, 5, 9), (11, 6, 10), (12, 6, 11), (700, 350, 630)],
)
def test_quantiles_are_real_samples_by_nearest_rank(n: int, median: int, ninetieth: int) -> None:
    summary = summarise(np.random.default_rng(0).permutation(np.arange(1, n + 1)) * 1_000_000)
    assert (summary["p50"], summary["p90"]) == (median, ninetieth)
    assert summary["p99"] == (None if n < P99_SAMPLES else 693)


def test_summary_by_hand() -> None:
    milliseconds = np.array([4, 1, 3, 2, 10]) * 1_000_000
    assert summarise(milliseconds) == {
        "p50": 3.0, "p90": 10.0, "p99": None, "mean": 4.0, "min": 1.0, "max": 10.0, "n": 5,
    }  # fmt: skip


@pytest.mark.parametrize(("n", "reported"), [(P99_SAMPLES - 1, False), (P99_SAMPLES, True)])
def test_p99_needs_662_samples(n: int, reported: bool) -> None:
    assert P99_SAMPLES == 662
    summary = summarise(np.arange(1, n + 1) * 1_000_000)
    assert summary["p99"] == (math.ceil(0.99 * n) if reported else None)


def test_outliers_are_kept() -> None:
    milliseconds = np.full(1000, 1_000_000)
    milliseconds[500] = 10_000_000_000
    summary = summarise(milliseconds)
    assert (summary["max"], summary["n"], summary["p50"], summary["p99"]) == (10_000.0, 1000, 1.0, 1.0)
    assert summary["mean"] == pytest.approx(10.999)


def test_stages_and_their_sum() -> None:
    samples = np.array([[1, 0, 5, 1], [2, 0, 6, 1], [3, 0, 4, 1]]) * 1_000_000
    stages = summarise_stages(samples)
    assert list(stages) == [*STAGES, "end_to_end"]
    assert [stages[name]["p50"] for name in stages] == [2.0, 0.0, 5.0, 1.0, 8.0]
    assert stages["end_to_end"]["max"] == 9.0


def test_latency_figures_of_repeats() -> None:
    repeats = [np.tile(np.array([[1, 0, k, 1]]) * 1_000_000, (n, 1)) for k, n in ((2, 300), (4, 300), (3, 400))]
    figures = latency_figures(repeats, batch=8)
    assert figures["repeats_ms"] == {"p50": [4.0, 6.0, 5.0], "p90": [4.0, 6.0, 5.0], "compute_p50": [2.0, 4.0, 3.0]}
    assert (figures["latency_ms"]["n"], figures["latency_ms"]["p50"], figures["latency_ms"]["p99"]) == (1000, 5.0, 6.0)
    assert figures["throughput_ips"] == 1600.0  # 8 images in 5 ms on average


class Clock:
    """A query that takes a fixed time on a clock of its own, and counts itself."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.calls, self.ticks = seconds, 0.0, 0, [0.0]

    def __call__(self) -> tuple[int, int, int, int]:
        self.calls += 1
        self.now += self.seconds
        return (self.calls, 0, 0, 0)

    def tick(self) -> None:
        self.ticks.append(self.now)


@pytest.mark.parametrize(
    ("seconds", "warmup", "measured"),
    [(0.125, 50, 1024), (0.001, 2000, 10_000), (0.03125, 64, 1024)],
    ids=["slow: the counts decide", "fast: the times decide", "both"],
)
def test_both_limits_must_be_reached(
    seconds: float, warmup: int, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(seconds)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    samples = measure(clock, Plan(), clock.tick)
    assert samples.shape == (pytest.approx(measured, abs=1), len(STAGES))
    assert samples[0, 0] == pytest.approx(warmup + 1, abs=1), "the warm-up is not among the samples"
    assert len(samples) + samples[0, 0] - 1 == clock.calls, "no query is dropped"


def test_the_method_is_the_default() -> None:
    assert Plan() == Plan(warmup_s=2, warmup_queries=50, measure_s=10, measure_queries=1024, repeats=3)
    assert QUICK.repeats == 3


def test_ticks_come_between_queries_and_not_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.01)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    measure(clock, Plan(), clock.tick)
    gaps = np.diff(clock.ticks)
    assert 20 <= len(gaps) <= 24
    assert gaps.min() >= 0.49


def test_backends_take_turns() -> None:
    assert list(interleave("abc", 3)) == [
        (0, "a"), (0, "b"), (0, "c"),
        (1, "b"), (1, "c"), (1, "a"),
        (2, "c"), (2, "a"), (2, "b"),
    ]  # fmt: skip
    assert list(interleave("", 3)) == []
    assert list(interleave("a", 2)) == [(0, "a"), (1, "a")]


def test_a_pair_alternates_in_short_blocks() -> None:
    calls: list[str] = []
    turns = alternate(lambda: calls.append("a"), lambda: calls.append("b"), seconds=0)
    block = LEAD_IN + BLOCK
    assert "".join(calls) == ("a" * block + "b" * 2 * block + "a" * block) * 2
    assert 0 < turns.first_ms < 1 and 0 < turns.second_ms < 1


def test_a_pair_tells_a_slower_one() -> None:
    turns = alternate(lambda: time.sleep(0.004), lambda: time.sleep(0.001), seconds=0)
    assert 1.5 < turns.ratio < 12 and 1.5 < turns.first_ms / turns.second_ms < 12  # 4 where nothing else runs


def test_a_machine_that_slows_down_moves_both_of_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0, 0

    def work(nanoseconds: int) -> None:
        nonlocal now, calls
        # From about the middle on, and within a round, the machine is three times as slow.
        now, calls = now + nanoseconds * (3 if calls > 29 * (LEAD_IN + BLOCK) else 1), calls + 1

    monkeypatch.setattr(time, "perf_counter_ns", lambda: now)
    monkeypatch.setattr(time, "monotonic", lambda: now / 1e9)
    turns = alternate(lambda: work(1_020_000), lambda: work(1_000_000), seconds=1.5)
    assert turns.first_ms / turns.second_ms < 0.8  # one median falls on either side of the border
    assert turns.ratio == pytest.approx(1.02)


def test_cost_is_the_median_of_the_repeats_ratios() -> None:
    repeats = [Turns(2.0, 2.0, 1.0), Turns(4.4, 4.0, 1.2), Turns(3.03, 3.0, 1.01)]
    cost = cost_figures("onnx-fp32", "plain-onnx-fp32", 1, repeats)
    assert cost["repeats"] == [1.0, 1.2, 1.01]
    assert (cost["ratio"], cost["fused_ms"], cost["plain_ms"]) == (1.01, 3.03, 3.0)


@pytest.mark.parametrize("field", ["measure_queries", "repeats"])
def test_a_plan_must_measure_something(field: str) -> None:
    with pytest.raises(UsageError, match=f"{field} must be at least 1, got 0"):
        Plan(**{field: 0})
    with pytest.raises(UsageError, match="warmup_s must be 0 or more"):
        Plan(warmup_s=-1)


def test_a_query_is_the_whole_way_from_file_to_verdict(export: Path) -> None:
    files = encode([Image.new("RGB", (50, 40), colour) for colour in ("red", "lime")])
    with open_runner(export) as runner:
        query = ImageQuery(runner, files, batch=3)
        preprocessing, transfer, compute, postprocessing = query()
        assert min(preprocessing, compute, postprocessing) > 0
        assert transfer == 0
        assert query.pixels.shape == (3, 3, SIZE, SIZE)
        assert [int(image.mean((1, 2)).argmax()) for image in query.pixels] == [0, 1, 0], "the files come in turn"
        assert query.compute()["logits"].argmax(1).tolist() == [0, 1, 0]
        with pytest.raises(UsageError, match="at least one image"):
            ImageQuery(runner, [], 1)


def test_a_plain_verdict_is_class_and_confidence() -> None:
    outputs = {"logits": np.array([[0.0, 2.0], [3.0, 1.0]]), "probs": np.array([[0.1, 0.9], [0.8, 0.2]])}
    assert classify(outputs) == [(1, 0.9), (0, 0.8)]
