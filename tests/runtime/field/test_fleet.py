"""Monitors of many devices together, and the promise about false alarms that holds for all of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from colour import edit_spec

import ssod_edge
from ssod_edge.cli import main
from ssod_edge.detect.metrics import conformal_threshold
from ssod_edge.runtime.field.drift import CALM, FALSE_ALARM_RATE, advance, log_evidence, new_state, reference
from ssod_edge.runtime.field.fleet import fleet_summary
from ssod_edge.runtime.field.monitor import Monitor, Record, read_monitor

RNG = np.random.default_rng(1)
THRESHOLD = conformal_threshold(RNG.normal(size=500))
BINS = reference(THRESHOLD)


def record_of(scores: np.ndarray) -> Record:
    """A monitor that saw these."""
    state = advance(new_state(len(BINS.gaps)), scores.tolist(), THRESHOLD.value, BINS, 0)
    histogram = np.bincount(np.searchsorted(BINS.edges, scores), minlength=len(BINS.id_shares))
    return Record(
        artifact="a", backbone="b", score="energy", identity="i", threshold=THRESHOLD, images=len(scores),
        unknown=int((scores > THRESHOLD.value).sum()), lowest=float(scores.min()), highest=float(scores.max()),
        histogram=tuple(histogram.tolist()), drift=state,
    )  # fmt: skip


def test_false_alarms_of_a_fleet_are_as_rare_as_stated() -> None:
    """40 fleets of 25 devices with 200 images each, and ID scores of their own: 1% of the fleets at most."""
    rng = np.random.default_rng(2)
    limit, fleets = math.log(25 / FALSE_ALARM_RATE), 0
    for _ in range(40):
        threshold = conformal_threshold(rng.normal(size=100))
        bins = reference(threshold)
        peaks = [
            advance(new_state(len(bins.gaps)), rng.normal(size=200).tolist(), threshold.value, bins, 0).whole.peak
            for _ in range(25)
        ]
        fleets += max(peaks) >= limit
    assert fleets <= 3, "P(more than 3 of 40 | 1%) < 0.1%"


def test_the_evidence_that_never_begins_anew_is_a_martingale_beyond_an_alarm_too() -> None:
    each = [*BINS.cuts.tolist(), 9.0]  # a score in each bin
    for shift, images in ((0.1, 0), (0.1, 300), (1.5, 400)):
        stream = np.random.default_rng(0).normal(shift, size=images).tolist()
        state = advance(new_state(len(BINS.gaps)), stream, THRESHOLD.value, BINS, 0)
        assert (state.alarms > 0) == (shift > 1) and sum(state.whole.counts) == images
        chances = (BINS.gaps + np.array(state.whole.counts)) / (BINS.gaps.sum() + images)
        after = [log_evidence(advance(state, [score], THRESHOLD.value, BINS, images).whole) for score in each]
        before = log_evidence(state.whole)
        assert chances @ np.exp(np.array(after) - before) == pytest.approx(1, rel=1e-9)
    assert state.whole.peak > math.log(1e6), "evidence goes on growing"


def test_until_the_first_alarm_it_is_the_devices_own() -> None:
    state = advance(new_state(len(BINS.gaps)), RNG.normal(size=700).tolist(), THRESHOLD.value, BINS, 0)
    assert state.alarms == 0
    assert state.whole.counts == state.counts and state.whole.peak == pytest.approx(state.peak)
    np.testing.assert_allclose(state.whole.log_stakes, state.log_stakes)


def test_one_device_of_fifty_has_drifted() -> None:
    rng = np.random.default_rng(3)
    records = {f"camera-{number}": record_of(rng.normal(size=300)) for number in range(49)}
    records["dusty"] = record_of(np.concatenate([rng.normal(size=100), rng.normal(1.2, size=200)]))
    found = fleet_summary(records)
    assert [row["device"] for row in found["devices"] if row["fleet_drifted"]] == ["dusty"]
    together = found["together"]
    assert together["images"] == 50 * 300 and together["fleet_drifted"] == 1
    assert together["unknown"] == sum(record.unknown for record in records.values())
    assert together["unknown_rate_ci"][0] < together["unknown_rate"] < together["unknown_rate_ci"][1]
    assert found["log10_evidence_limit"] == pytest.approx(math.log10(50 / FALSE_ALARM_RATE))
    assert together["stability_index"] < 0.1
    other = {**records, "another": replace(records["dusty"], identity="j")}
    assert fleet_summary(other)["together"]["stability_index"] is None


def test_a_drift_that_is_over_still_counts() -> None:
    rng = np.random.default_rng(4)
    back = record_of(np.concatenate([rng.normal(2, size=300), rng.normal(size=CALM + 400)]))
    found = fleet_summary({"a": back, "b": record_of(rng.normal(size=50))})
    assert not found["devices"][0]["drifted"] and found["devices"][0]["fleet_drifted"]


@pytest.fixture
def files(export: Path, tmp_path: Path) -> list[str]:
    """Monitors of two devices with one export."""
    edit_spec(export, lambda s: replace(s, artifacts=tuple(replace(a, threshold=THRESHOLD) for a in s.artifacts)))
    paths = [str(tmp_path / f"{name}.json") for name in ("hall", "yard")]
    with ssod_edge.open(export) as model:
        for path, scores in zip(paths, (RNG.normal(size=120), RNG.normal(3, size=80)), strict=True):
            with Monitor(path, model) as monitor:
                for score in scores.tolist():
                    monitor.add_score(score)
    return paths


def command(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["monitor", *words])
    return done.exit_code, done.stdout, done.stderr


def test_a_table_of_several_files(files: list[str]) -> None:
    code, out, _ = command(*files)
    lines = out.splitlines()
    assert code == 0 and "hall.json" in lines[1] and lines[1].rstrip().endswith("no")
    assert "yard.json" in lines[2] and lines[2].rstrip().endswith("DRIFTED")
    assert "2 devices, 200 images" in out and "drifted    1 of 2" in out and "PSI" in out
    found = json.loads(command(*files, "--json")[1])
    assert [row["images"] for row in found["devices"]] == [120, 80] and found["together"]["fleet_drifted"] == 1
    assert len(command(files[0])[1].splitlines()) > 5, "of one file it is the former page"


def test_devices_without_an_image(export: Path, files: list[str], tmp_path: Path) -> None:
    empty = [str(tmp_path / f"{name}.json") for name in ("c", "d")]
    with ssod_edge.open(export) as model:
        for path in empty:
            with Monitor(path, model):
                pass
    assert command(*empty)[0] == 0 and "2 devices, 0 images" in command(*empty)[1]
    assert command(*files, empty[0])[0] == 0


def test_what_cannot_be_merged_is_told(files: list[str], tmp_path: Path) -> None:
    code, _, error = command(files[0], files[1], str(tmp_path / "." / "hall.json"))
    assert code == 2 and "is given twice" in error
    code, _, error = command(files[0], "none.json")
    assert code == 2 and "'none.json' does not exist" in error
    (tmp_path / "bad.json").write_text("{}")
    assert command(files[0], str(tmp_path / "bad.json"))[0] == 4


def test_a_file_of_a_release_without_it_begins_here(files: list[str]) -> None:
    path = Path(files[0])
    values = json.loads(path.read_text())
    del values["drift"]["whole"]
    path.write_text(json.dumps(values))
    record = read_monitor(path)
    assert record.images == 120 and sum(record.drift.whole.counts) == 0 and record.drift.whole.peak == 0
