"""Versions: a lesson in place keeps the one before, `history` lists them, `rollback` swaps them."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from lesson import CLASSES, run, snapshot, write_photos

import ssod_edge
from ssod_edge.export.release import release
from ssod_edge.export.versions import kept_versions, name_of, roll_back, versions_folder
from ssod_edge.files import sha256_file
from ssod_edge.spec import load_spec, save_spec

FREELY = ("--alike", "--max-drop", 20)


@pytest.fixture(scope="session")
def two_lessons(light: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that was taught f, and then g without a, in place. Nobody changes it."""
    root = tmp_path_factory.mktemp("history")
    shutil.copytree(light, root / "door")
    first = run("teach", root / "door", write_photos(root / "f", "f", 5, seed=1), *FREELY)
    assert first.exit_code == 0 and "this is version 2" in first.output, first.output
    assert "version" in first.output and "door.versions" in first.output
    second = run("teach", root / "door", write_photos(root / "g", "g", 5, seed=2), *FREELY, "--forget", "a")
    assert second.exit_code == 0 and "this is version 3" in second.output, second.output
    return root / "door"


@pytest.fixture
def door(two_lessons: Path, tmp_path: Path) -> Path:
    """A copy of it, with what is kept beside it."""
    place = tmp_path / "door"
    shutil.copytree(two_lessons, place)
    shutil.copytree(versions_folder(two_lessons), versions_folder(place))
    return place


def listed(place: Path) -> list[dict]:
    done = run("history", place, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["versions"]


def test_a_lesson_in_place_keeps_the_version_before(two_lessons: Path, light: Path) -> None:
    assert load_spec(two_lessons).classes == ("b", "c", "d", "e", "f", "g")
    kept = kept_versions(two_lessons)
    assert [export.spec.classes for export in kept] == [CLASSES, (*CLASSES, "f")]
    assert snapshot(kept[0].folder) == snapshot(light)
    assert sorted(path.name for path in two_lessons.parent.iterdir()) == ["door", "door.versions", "f", "g"]


def test_history_says_what_was_taught_and_which_one_is_in_use(two_lessons: Path) -> None:
    third, second, first = listed(two_lessons)
    assert [row["version"] for row in (first, second, third)] == [1, 2, 3]
    assert [row["current"] for row in (first, second, third)] == [False, False, True]
    assert first["taught"] == {} and second["taught"]["photos"] == {"f": 5} and third["taught"]["photos"] == {"g": 5}
    assert third["taught"]["forgotten"] == ["a"] and third["taught"]["new"] == ["g"]
    assert (second["parent"], third["parent"]) == (first["name"], second["name"])
    assert load_spec(two_lessons).source["parent_sha256"] == second["sha256"]
    text = run("history", two_lessons)
    assert text.exit_code == 0, text.output
    newest = next(line for line in text.output.splitlines() if line.startswith("3-"))
    assert "g (5 photos), without a" in newest and "in use" in newest and "others " in newest and ", g " in newest
    assert "exported" in text.output and " MB: 1-" in text.output


def test_history_of_a_copy_knows_what_is_not_there(two_lessons: Path, tmp_path: Path) -> None:
    shutil.copytree(two_lessons, tmp_path / "alone")
    third, second, first = listed(tmp_path / "alone")
    assert third["current"] and second["folder"] is None and first["folder"] is None
    assert second["taught"]["photos"] == {"f": 5} and second["classes"] is None
    done = run("rollback", tmp_path / "alone")
    assert done.exit_code == 2 and "version 2, which" in done.output and "is not kept beside" in done.output


def test_what_is_kept_comes_back_as_history_says(door: Path) -> None:
    """Also where the version that the current one was taught from is not among what is kept."""
    assert run("rollback", door, "--to", 1).exit_code == 0
    text = " ".join(run("history", door).output.split())
    assert f"One comes back with: ssod-edge rollback {door} --to VERSION" in text, text
    assert run("rollback", door, "--to", 3).exit_code == 0


def test_rollback_goes_back_and_forth(door: Path) -> None:
    (door / "notes.txt").write_text("mine")
    newest = snapshot(door)
    done = run("rollback", door)
    assert done.exit_code == 0 and "version 2-" in done.output, done.output
    assert load_spec(door).classes == (*CLASSES, "f") and (door / "notes.txt").exists()
    assert [row["version"] for row in listed(door) if row["current"]] == [2]
    assert run("rollback", door, "--to", "1").exit_code == 0
    assert load_spec(door).classes == CLASSES
    assert run("rollback", door, "--to", 3).exit_code == 0
    assert snapshot(door) == newest
    assert len(listed(door)) == 3


def test_what_is_open_goes_on_while_versions_are_swapped(exported: Path, tmp_path: Path) -> None:
    """And what opens meanwhile gets one of them whole, on every engine."""
    door = tmp_path / "door"
    shutil.copytree(exported, door)
    spec, names = load_spec(door), ("onnx-fp32", "openvino-fp32")
    save_spec(replace(spec, artifacts=tuple(map(spec.artifact, names))), door)
    (photo,) = write_photos(tmp_path / "photo", "b", 1, seed=3).glob("*/*")
    with ExitStack() as opened:
        models = [opened.enter_context(ssod_edge.open(door, artifact=name)) for name in names]
        before = [model.predict(photo) for model in models]
        photos = write_photos(tmp_path / "f", "f", 3, seed=1)
        assert run("teach", door, photos, *FREELY, "--keep", 0).exit_code == 0
        assert [model.predict(photo) for model in models] == before
    assert run("teach", door, write_photos(tmp_path / "g", "g", 3, seed=2), *FREELY).exit_code == 0
    stop = threading.Event()

    def swap() -> None:
        while not stop.wait(0.1):
            roll_back(door, "3" if load_spec(door).version == 2 else "2")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        found = []
        for turn in range(12):
            with ssod_edge.open(door, artifact=names[turn % len(names)]) as model:
                found.append(model.predict(photo).error)
                found.append(None if model.runner.spec.version in (2, 3) else "another version")
    finally:
        stop.set()
        thread.join()
    assert set(found) == {None}


def test_what_was_calibrated_comes_back_calibrated(door: Path, tmp_path: Path) -> None:
    run("rollback", door)
    photos = write_photos(tmp_path / "camera", "bcde", 10, seed=9)
    assert run("calibrate", door, "--id", photos, "--tpr", 0.8).exit_code == 0
    calibrated = load_spec(door)
    assert run("rollback", door, "--to", 3).exit_code == 0
    assert run("rollback", door).exit_code == 0, "a parent is found by its model, whatever its thresholds"
    assert load_spec(door) == calibrated
    assert [row["version"] for row in listed(door)] == [3, 2, 1]


def test_calibration_does_not_change_when_a_version_was_made(light: Path, tmp_path: Path) -> None:
    door = Path(shutil.copytree(light, tmp_path / "door"))
    for file in door.iterdir():
        os.utime(file, (1.6e9, 1.6e9))
    assert run("calibrate", door, "--id", write_photos(tmp_path / "camera", "abcde", 10, seed=9)).exit_code == 0
    assert listed(door)[0]["time"].startswith("2020-09-13")


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("3", "version 3 is in use already"),
        ("7", "version 7 is not kept beside '.*door'; kept: 1-.*, 2-.*. Name one with --to"),
    ],
)
def test_a_version_that_is_not_there(door: Path, to: str, message: str) -> None:
    before = snapshot(door)
    done = run("rollback", door, "--to", to)
    assert done.exit_code == 2 and re.search(message, done.output), done.output
    assert snapshot(door) == before


def test_an_export_that_was_never_taught(light: Path) -> None:
    (only,) = listed(light)
    assert only["version"] == 1 and only["current"] and only["taught"] == {}
    done = run("rollback", light)
    assert done.exit_code == 2 and "was not taught" in done.output
    for command in ("history", "rollback"):
        done = run(command, light.parent / "nowhere")
        assert done.exit_code == 2 and "does not exist. Give the folder of a run or an export" in done.output


def test_a_damaged_version_is_not_swapped_in(door: Path) -> None:
    second = kept_versions(door)[1].folder
    content = bytearray((second / "features.npz").read_bytes())
    content[99] ^= 1
    (second / "features.npz").write_bytes(bytes(content))
    before = snapshot(door)
    done = run("rollback", door)
    assert done.exit_code == 4 and "was changed or cut short" in done.output
    assert snapshot(door) == before


def test_a_damaged_export_is_mended_by_an_earlier_one(door: Path) -> None:
    (door / "ssod.json").write_text("{")
    assert "--to" in run("rollback", door).output
    assert [row["version"] for row in listed(door)] == [2, 1]
    done = run("rollback", door, "--to", 2)
    assert done.exit_code == 0, done.output
    assert load_spec(door).version == 2


def test_another_lesson_after_a_rollback_is_a_version_of_its_own(door: Path, tmp_path: Path) -> None:
    run("rollback", door)
    done = run("teach", door, write_photos(tmp_path / "h", "h", 5, seed=4), *FREELY)
    assert done.exit_code == 0 and "this is version 4" in done.output, done.output
    rows = listed(door)
    assert [row["version"] for row in rows] == [4, 3, 2, 1]
    assert rows[0]["parent"] == rows[1]["parent"] == rows[2]["name"]


def test_the_oldest_versions_go_and_the_one_in_use_stays(door: Path) -> None:
    names = [name_of(export.spec) for export in kept_versions(door)]
    done = run("history", door, "--keep", 1)
    assert done.exit_code == 0 and f"removed version {names[0]}" in done.output
    assert [name_of(export.spec) for export in kept_versions(door)] == names[1:]
    assert run("history", door, "--keep", 0).exit_code == 0
    assert not list(versions_folder(door).iterdir()) and load_spec(door).version == 3
    assert [row["version"] for row in listed(door)] == [3, 2, 1], "the record stays"


def test_teach_keeps_as_many_as_asked_for(light: Path, tmp_path: Path) -> None:
    shutil.copytree(light, tmp_path / "door")
    photos = write_photos(tmp_path / "f", "f", 3, seed=1)
    done = run("teach", tmp_path / "door", photos, *FREELY, "--keep", 0)
    assert done.exit_code == 0 and "removed version 1-" in done.output, done.output
    assert load_spec(tmp_path / "door").version == 2 and not kept_versions(tmp_path / "door")
    done = run("teach", tmp_path / "door", photos, "-o", tmp_path / "other", "--keep", 1)
    assert done.exit_code == 2 and "--keep belongs to teaching in place" in done.output


def test_a_kept_version_takes_no_room_of_its_own_until_the_export_changes(door: Path) -> None:
    roll_back(door, "2")
    kept = next(export for export in kept_versions(door) if export.spec.version == 2)
    assert os.path.samefile(kept.folder / "features.npz", door / "features.npz")
    assert sha256_file(kept.folder / "ssod.json") == sha256_file(door / "ssod.json")


def test_an_export_that_is_made_anew_keeps_the_lessons_of_before(door: Path, light: Path) -> None:
    taught, lines = snapshot(door), []
    with release(door, lines.append) as draft:
        shutil.copytree(light, draft.folder, dirs_exist_ok=True)
        draft.write(load_spec(light))
    assert snapshot(door) == snapshot(light) and any("the export that was there is kept in" in line for line in lines)
    assert [(row["version"], row["current"]) for row in listed(door)] == [(3, False), (2, False), (1, True)]
    assert run("rollback", door, "--to", 3).exit_code == 0
    assert snapshot(door) == taught


def test_a_lesson_that_goes_where_another_export_is_keeps_that_one(door: Path, light: Path, tmp_path: Path) -> None:
    """`teach EXPORT more/ -o taught` once more, where `taught` was meant: the first lesson is not lost."""
    taught = snapshot(door)
    done = run("teach", light, write_photos(tmp_path / "h", "h", 3, seed=1), "-o", door, *FREELY)
    assert done.exit_code == 0 and "the export that was there is kept in" in " ".join(done.output.split()), done.output
    assert load_spec(door).classes[-1] == "h" and load_spec(light).version == 1
    name = next(row["name"] for row in listed(door) if row["version"] == 3)
    assert run("rollback", door, "--to", name).exit_code == 0 and snapshot(door) == taught


def test_the_version_in_a_run_folder(exported: Path, light: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "runs" / "run"
    shutil.copytree(exported.parent, run_folder, ignore=shutil.ignore_patterns("export"))
    shutil.copytree(light, run_folder / "export")
    done = run("teach", run_folder, write_photos(tmp_path / "f", "f", 3, seed=1), *FREELY)
    assert done.exit_code == 0, done.output
    assert load_spec(run_folder / "export").version == 2 and (run_folder / "export.versions").is_dir()
    assert run("rollback", run_folder).exit_code == 0 and load_spec(run_folder / "export").version == 1
