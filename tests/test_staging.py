"""What an export leaves behind: nothing, whatever ended it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
