"""A lesson that is killed, runs out of space, or meets another one: the old export is whole, the new one too or absent.

The kills are few by default. Fifty, over the whole of a lesson and with more of them where it ends:

    SSOD_EDGE_KILLS=50 python -m pytest tests/teach/test_robust.py -k killed -s
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from full import full_disk
from lesson import CLASSES, run, snapshot, write_photos
from locks import holding

from ssod_edge.errors import BusyError
from ssod_edge.export.versions import kept_versions, roll_back, versions_folder
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import open_runner
from ssod_edge.spec import load_spec
from ssod_edge.teach import teach as module
from ssod_edge.teach.teach import TeachOptions, teach

KILLS = int(os.environ.get("SSOD_EDGE_KILLS", "4"))
FREELY = ("--alike", "--max-drop", "20")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), "f", 5, seed=1)


@pytest.fixture
def door(light: Path, tmp_path: Path) -> Path:
    shutil.copytree(light, tmp_path / "door")
    return tmp_path / "door"


def start(door: Path, photos: Path, *options: str) -> subprocess.Popen[str]:
    """A lesson in a process of its own."""
    command = [sys.executable, "-m", "ssod_edge", "teach", str(door), str(photos), *FREELY, *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def assert_whole(folder: Path) -> int:
    """Every file is the one that the spec lists, and an artifact opens; returns its version."""
    export = Export.at(folder)
    export.check_all()
    assert all(artifact.verification and artifact.verification["passed"] for artifact in export.spec.artifacts)
    with open_runner(folder):
        return export.spec.version


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(door: Path, photos: Path, share: float, lasts: float, *options: str) -> tuple[bool, float]:
    """Kill a lesson after this share of the time that one lasts; whether it was still at it, and how long it was."""
    begun = time.monotonic()
    with start(door, photos, *options) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(share * lasts)
        process.send_signal(signal.SIGKILL)
    return process.returncode == -signal.SIGKILL, time.monotonic() - begun


@pytest.mark.slow
def test_a_lesson_that_is_killed_at_any_instant(door: Path, photos: Path, tmp_path: Path) -> None:
    """In place and, every other time, into a new folder. Two thirds over all of it, the others where files appear."""
    original, out, rng = snapshot(door), tmp_path / "new", random.Random(24)
    shares = [rng.uniform(0, 1) if turn % 3 else rng.uniform(0.75, 1) for turn in range(KILLS)]
    lasts, found = 60.0, Counter[str]()
    for turn, share in enumerate([2.0, *shares]):
        options = ("-o", str(out)) if turn % 2 else ()
        while True:
            was_killed, took = killed(door, photos, share, lasts, *options)
            new = (out.exists() and assert_whole(out) > 1) if options else assert_whole(door) > 1
            for kept in kept_versions(door):
                assert_whole(kept.folder)
            if new and options:
                shutil.rmtree(out)
            elif new:
                roll_back(door, "1")
            assert snapshot(door) == original
            if was_killed or share > 1:
                break
            lasts = took  # the machine was busy before, and is not now: it came to the end
        if share > 1.5:
            lasts = took
        found[f"{'into a new folder' if options else 'in place'}: {'new' if new else 'old'}"] += was_killed
    print(f"\n{sum(found.values())} kills, the last lesson in {lasts:.1f} s: {dict(found)}")
    others = write_photos(tmp_path / "others", "g", 4, seed=9)
    for given, options in ((photos, ()), (others, ("-o", str(out)))):
        with start(door, given, *options) as process:
            assert process.communicate() and process.returncode == 0
    assert assert_whole(door) > 1 and assert_whole(out) > assert_whole(door)
    assert names(tmp_path) == ["door", "door.versions", "new", "others"], "what the kills left is gone"
    assert all(name[0].isdigit() for name in names(versions_folder(door)))


STEPS = """
import os, signal, sys
from pathlib import Path
from ssod_edge.export import staging, versions

left = int(sys.argv[1])

def count(step):
    def counted(*given, **options):
        global left
        result = step(*given, **options)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return counted

os.link, os.unlink, os.rmdir, os.mkdir = map(count, (os.link, os.unlink, os.rmdir, os.mkdir))
os.rename, os.replace, staging._exchange = map(count, (os.rename, os.replace, staging._exchange))
versions.roll_back(*sys.argv[2:])
"""


@pytest.mark.slow
def test_a_kill_after_each_step_of_a_rollback(door: Path, photos: Path, tmp_path: Path) -> None:
    """The same steps as those that a lesson in place ends with."""
    assert run("teach", door, photos, *FREELY).exit_code == 0
    both = {1: snapshot(kept_versions(door)[0].folder), 2: snapshot(door)}
    swapped = 0
    for step in range(1, 100):
        before = load_spec(door).version
        command = [sys.executable, "-c", STEPS, str(step), str(door), str(3 - before)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
        version = assert_whole(door)
        assert snapshot(door) == both[version]
        kept = {export.spec.version: snapshot(export.folder) for export in kept_versions(door)}
        assert {**kept, version: both[version]} == both, "neither version is lost"
        swapped += version != before
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    print(f"\n{step - 1} kills between steps, {swapped} after the swap")
    assert step > 10 and swapped > 1
    roll_back(door, str(3 - load_spec(door).version))
    assert run("history", door, "--keep", 5).exit_code == 0
    assert names(tmp_path) == ["door", "door.versions"]
    assert [name[:2] for name in names(versions_folder(door))] == ["1-", "2-"]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("most", [5_000, 150_000, 330_000, 400_000, 600_000])
def test_a_full_disk(exported: Path, photos: Path, tmp_path: Path, most: int, in_place: bool) -> None:
    """Whatever file it is that no longer fits: the spec, a detector, features, a graph of either engine."""
    shutil.copytree(exported, tmp_path / "door")
    before = snapshot(tmp_path / "door")
    with full_disk(most):
        done = run("teach", tmp_path / "door", photos, *FREELY, *([] if in_place else ["-o", tmp_path / "new"]))
    assert done.exit_code == 1 and "cannot write" in done.output and "File too large" in done.output, done.output
    assert snapshot(tmp_path / "door") == before
    assert names(tmp_path) == ["door"]


def test_two_lessons_at_once_onto_one_target(door: Path, photos: Path, tmp_path: Path) -> None:
    for target in (door, tmp_path / "new"):
        lock = tmp_path / f".{target.name}.teaching"
        with holding(lock):
            done = run("teach", door, photos, *FREELY, *([] if target == door else ["-o", target]))
            assert done.exit_code == 2 and f"'{target}' is being taught by another process" in done.output
        assert not (tmp_path / "new").exists() and assert_whole(door) == 1


def test_two_processes_at_once(door: Path, photos: Path, tmp_path: Path) -> None:
    with start(door, photos) as one, start(door, photos) as other:
        codes = sorted([one.wait(), other.wait()])
        text = one.stderr.read() + other.stderr.read()
    assert assert_whole(door) == 2 + codes.count(0) - 1, (codes, text)
    assert codes == [0, 2], text  # the second one was refused, or came when the model had learnt the photos
    assert names(tmp_path) == ["door", "door.versions"]


def test_an_export_that_changes_under_a_lesson(
    door: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody rolls it back, or exports anew: the lesson was of another model."""
    options = TeachOptions(str(photos), max_drop=20, alike=True)
    teach(door, None, TeachOptions(str(write_photos(tmp_path / "before", "g", 4, seed=9)), max_drop=20, alike=True))
    fit_lesson = module.fit_lesson

    def meanwhile(lesson):
        roll_back(door, "1")
        return fit_lesson(lesson)

    monkeypatch.setattr(module, "fit_lesson", meanwhile)
    with pytest.raises(BusyError, match="was exported, taught or rolled back meanwhile, and nothing is released"):
        teach(door, None, options)
    assert load_spec(door).classes == CLASSES and [e.spec.version for e in kept_versions(door)] == [1, 2]
    assert names(tmp_path) == ["before", "door", "door.versions"]


def test_a_target_that_holds_something_else_is_refused_before_the_work(
    door: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    done = run("teach", door, photos, "-o", tmp_path / "mine")
    assert done.exit_code == 2 and "holds other files than an export" in done.output and "features" not in done.output


@pytest.mark.parametrize("out", [(), ("-o", "other"), ("-o", "deep/er/other")])
def test_a_place_that_is_read_only_is_found_before_the_work(
    door: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, out: tuple[str, ...]
) -> None:
    monkeypatch.chdir(door.parent)
    monkeypatch.setattr("ssod_edge.export.staging.os.access", lambda path, mode: path != door.parent.resolve())
    done = run("teach", door, photos, *out)
    assert done.exit_code == 1 and done.output.startswith(f"error: cannot write into '{door.parent.resolve()}'")
