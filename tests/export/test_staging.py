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
from ssod_edge.export import staging as staging
# It dies after its first step, whichever that is.
kill = lambda *given, **options: os.kill(os.getpid(), signal.SIGKILL)
rename = Path.rename
Path.rename = lambda self, target: (rename(self, target), kill())
staging._unlisted = staging.shutil.rmtree = kill
with staging.staged(Path(sys.argv[1])) as folder:
    (folder / "ssod.json").write_text("new")
"""


def test_a_kill_while_an_export_is_replaced_leaves_one_of_the_two(tmp_path: Path) -> None:
    with staged(tmp_path / "door") as folder:
        (folder / "ssod.json").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_PUBLISHING, str(tmp_path / "door")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "door" / "ssod.json").read_text() == "new"
    with staged(tmp_path / "door") as folder:
        (folder / "ssod.json").write_text("newer")
    assert names(tmp_path) == ["door"] and names(tmp_path / "door") == ["ssod.json"]


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
