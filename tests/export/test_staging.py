"""What an export leaves behind: nothing, whatever ended it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ssod_edge.export.staging import staged

KILLED = """
import os, signal, sys
from pathlib import Path
from ssod_edge.export.staging import staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "model.onnx").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".door.settings").mkdir()  # somebody's own
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "door")], check=False)
    left = [name for name in names(tmp_path) if name != ".door.settings"]
    assert len(left) == 1
    with staged(tmp_path / "other"):
        assert left[0] in names(tmp_path)
    with staged(tmp_path / "door"):
        assert left[0] not in names(tmp_path)
    assert names(tmp_path) == [".door.settings", "door", "other"]


def test_what_another_export_is_filling_stays(tmp_path: Path) -> None:
    with staged(tmp_path / "door") as first:
        (first / "model.onnx").touch()
        with staged(tmp_path / "door") as second:
            assert (first / "model.onnx").exists() and second != first


@pytest.mark.parametrize("umask", [0o077, 0o002])
@pytest.mark.parametrize("swap", [True, False])
def test_a_new_folder_follows_the_umask_and_an_earlier_one_keeps_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int, swap: bool
) -> None:
    if not swap:
        monkeypatch.setattr("ssod_edge.export.staging._exchange", lambda one, other: False)
    door, earlier = tmp_path / "door", os.umask(umask)
    try:
        for expected in (0o777 & ~umask, 0o750):
            with staged(door) as folder:
                (folder / "ssod.json").touch()
            assert door.stat().st_mode & 0o777 == expected
            door.chmod(0o750)
    finally:
        os.umask(earlier)
    assert names(tmp_path) == ["door"]


KILLED_WHILE_PUBLISHING = """
import os, signal, sys
from pathlib import Path
from ssod_edge.export import staging
place, step, swap = sys.argv[1:]
if swap == "False":
    staging._exchange = lambda one, other: False
def dying(step):
    def run(*given, **options):
        found = step(*given, **options)
        os.kill(os.getpid(), signal.SIGKILL)
        return found
    return run
with staging.staged(Path(place)) as folder:
    (folder / "ssod.json").write_text("new")
    if step == "rename":
        Path.rename = dying(Path.rename)
    elif step == "rmtree":
        staging.shutil.rmtree = dying(lambda *given, **options: None)
    else:
        setattr(staging, step, dying(getattr(staging, step)))
"""


@pytest.mark.parametrize(
    ("step", "swap", "found"),
    [
        ("_unlisted", True, "old"), ("_link", True, "old"), ("_exchange", True, "new"), ("rmtree", True, "new"),
        ("_link", False, "old"), ("rename", False, None), ("rmtree", False, "new"),
    ],
)  # fmt: skip
def test_a_kill_while_an_export_is_replaced_leaves_one_of_the_two_and_every_file_of_the_user(
    tmp_path: Path, step: str, swap: bool, found: str | None
) -> None:
    door = tmp_path / "door"
    with staged(door) as folder:
        (folder / "ssod.json").write_text("old")
    (door / "notes.txt").write_text("mine")
    (door / "photos" / "deep").mkdir(parents=True)
    (door / "photos" / "deep" / "a.txt").write_text("mine too")
    (door / "photos" / "link").symlink_to("nowhere")
    command = [sys.executable, "-c", KILLED_WHILE_PUBLISHING, str(door), step, str(swap)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    if found is not None:
        assert (door / "ssod.json").read_text() == found and (door / "notes.txt").read_text() == "mine"
    with staged(door) as folder:
        (folder / "ssod.json").write_text("newer")
    assert names(tmp_path) == ["door"] and names(door) == ["notes.txt", "photos", "ssod.json"]
    assert (door / "ssod.json").read_text() == "newer" and (door / "notes.txt").read_text() == "mine"
    assert (door / "photos" / "deep" / "a.txt").read_text() == "mine too"
    assert os.readlink(door / "photos" / "link") == "nowhere"


@pytest.mark.parametrize("can_swap", [True, False])
def test_an_export_replaces_another_and_takes_over_foreign_files(
    tmp_path: Path, can_swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_swap:  # an NFS, for example
        monkeypatch.setattr("ssod_edge.export.staging.RENAME_EXCHANGE", 1 << 30)  # an unknown flag: EINVAL
    for text in ("old", "new"):
        with staged(tmp_path / "door") as folder:
            (folder / "ssod.json").write_text(text)
        (tmp_path / "door" / "notes.txt").touch()
    assert (tmp_path / "door" / "ssod.json").read_text() == "new"
    assert names(tmp_path) == ["door"] and names(tmp_path / "door") == ["notes.txt", "ssod.json"]
