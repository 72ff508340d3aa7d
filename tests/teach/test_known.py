"""What `monitor`, `calibrate`, `bench` and the eager engine make of an export that was taught."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from lesson import run, snapshot, write_photos

import ssod_edge
from ssod_edge.bench.compare import compare
from ssod_edge.bench.latency import Plan
from ssod_edge.bench.record import load_record
from ssod_edge.errors import UsageError
from ssod_edge.export.versions import roll_back
from ssod_edge.runtime.field.monitor import read_monitor
from ssod_edge.spec import load_spec

FREELY = ("--alike", "--max-drop", 20)


@pytest.fixture(scope="module")
def lesson(light: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that was taught f and lost a, in place, with new photos of b in `photos`. Nobody changes it."""
    root = tmp_path_factory.mktemp("known")
    shutil.copytree(light, root / "door")
    done = run("teach", root / "door", write_photos(root / "new", "fb", 5, seed=1), *FREELY, "--forget", "a")
    assert done.exit_code == 0, done.output
    return root / "door"


@pytest.fixture
def door(lesson: Path, tmp_path: Path) -> Path:
    shutil.copytree(lesson, tmp_path / "door")
    shutil.copytree(lesson.with_name("door.versions"), tmp_path / "door.versions")
    return tmp_path / "door"


def test_a_monitor_does_not_go_on_with_scores_of_another_version(door: Path, tmp_path: Path) -> None:
    photos, file = write_photos(tmp_path / "camera", "bc", 4, seed=3), tmp_path / "drift.json"
    roll_back(door, "1")
    assert run("predict", door, photos, "--monitor", file).exit_code == 0
    before = read_monitor(file)
    roll_back(door, "2")
    done = run("predict", door, photos, "--monitor", file)
    assert done.exit_code == 2 and "taught or rolled back (it is version 2 now, taught from 1)" in done.output
    assert read_monitor(file) == before
    assert run("predict", door, photos, "--monitor", tmp_path / "new.json").exit_code == 0
    assert read_monitor(tmp_path / "new.json").threshold == load_spec(door).artifacts[0].threshold
    roll_back(door, "1")
    assert run("predict", door, photos, "--monitor", file).exit_code == 0
    assert read_monitor(file).images == 2 * before.images == 16


def test_a_taught_export_is_calibrated_and_stays_what_was_taught(door: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "camera", "abcdef", 8, seed=9)
    done = run("calibrate", door, "--id", photos, "--tpr", 0.9)
    assert done.exit_code == 0, done.output
    assert "left out: 8 of 48 images, in folders that are no class of the model (a)" in done.output
    spec = load_spec(door)
    threshold = spec.artifacts[0].threshold
    assert threshold is not None and threshold.n == 40 and threshold.data == "folder 'camera', 40 images"
    assert spec.taught == load_spec(door).taught and spec.version == 2
    again = run("teach", door, write_photos(tmp_path / "g", "g", 4, seed=2), *FREELY)
    assert again.exit_code == 0, again.output
    assert "onnx-fp32: its threshold from folder 'camera', 40 images is replaced; set it again" in again.output
    threshold = load_spec(door).artifacts[0].threshold
    assert threshold is not None and threshold.target_tpr == 0.9


def test_the_photos_of_a_lesson_set_no_threshold(door: Path, lesson: Path) -> None:
    before = snapshot(door)
    done = run("calibrate", door, "--id", lesson.parent / "new")
    assert done.exit_code == 2 and "was taught with the photos of" in done.output
    assert snapshot(door) == before


@pytest.fixture(scope="module")
def run_folder(exported: Path, lesson: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, of which the taught export is the export."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(exported.parent, folder, ignore=shutil.ignore_patterns("export"))
    shutil.copytree(lesson, folder / "export")
    return folder


def test_the_checkpoint_is_not_run_for_a_taught_export(run_folder: Path) -> None:
    for folder in (run_folder, run_folder / "export", run_folder / "best.safetensors"):
        with pytest.raises(UsageError, match="was taught since .version 2."):
            ssod_edge.open(folder, engine="eager")


def test_calibrate_in_the_run_folder(run_folder: Path) -> None:
    done = run("calibrate", run_folder, "--id", load_spec(run_folder / "export").source["data"])
    assert done.exit_code == 2 and "Teach it again for these, or name new images" in done.output


def measured(folder: Path, file: Path, data: Path | None = None) -> dict[str, Any]:
    options = ["--quick", "--threads", 1, "--json", file, *(["--id", data] if data else [])]
    done = run("bench", folder, *options)
    assert done.exit_code == 0, done.output
    return load_record(file)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(0, 1, 0.01, 3, repeats=1, pair_s=0.01)
    monkeypatch.setattr("ssod_edge.bench.measurement.QUICK", plan)


def test_bench_counts_by_the_classes_of_the_taught_export(run_folder: Path, brief: None, tmp_path: Path) -> None:
    """On the run's validation images, whose labels are those of before: a was forgotten, so that b is 0 now."""
    record = measured(run_folder, tmp_path / "new.json")
    assert record["data"]["id"]["n"] == 16, "4 of 20 are of the class that was forgotten"
    (row,) = (row for row in record["rows"] if row["artifact"] == "onnx-fp32")
    assert row["top1"] >= 0.8
    (eager,) = (row for row in record["rows"] if row["artifact"] == "eager")
    assert (eager["status"], eager["error"]) == ("missing", "the export was taught, and no checkpoint has learnt that")
    assert record["export"]["class_names"] == ["b", "c", "d", "e", "f"] and record["export"]["version"] == 2


def test_bench_compares_a_taught_export_with_its_parent(light: Path, lesson: Path, brief: None, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "test", "abcdef", 3, seed=4)
    old = measured(light, tmp_path / "old.json", photos)
    done = run("bench", lesson, "--quick", "--threads", 1, "--id", photos, "--compare", tmp_path / "old.json")
    text = " ".join(done.output.split())
    assert done.exit_code == 0, done.output
    assert "the new export (version 2) was taught from the old one (version 1)" in text
    assert "classes that are new: f" in text and "classes that are no longer there: a" in text
    assert "another export" not in text
    assert "the images differ, so accuracy is not compared: name images of classes that both know" in text
    both = write_photos(tmp_path / "both", "bcde", 3, seed=4)
    before, after = (measured(folder, tmp_path / "n.json", both) for folder in (light, lesson))
    comparison = compare(before, after)
    assert not any("images differ" in note for note in comparison.notes)
    back = compare(after, before).notes
    assert "the old export (version 2) was taught from the new one (version 1)" in back
    earlier = {key: value for key, value in old["export"].items() if key not in ("class_names", "taught_from", "model")}
    assert (
        "classes: 5 -> 4" in compare({**old, "export": {**earlier}}, {**old, "export": {**earlier, "classes": 4}}).notes
    )
