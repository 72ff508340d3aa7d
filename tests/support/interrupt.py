"""Ctrl-C while a command is at its images."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def interrupt_while_reading(folder: Path, *arguments: str | Path) -> tuple[int, str]:
    """Run `ssod-edge` with these arguments and press Ctrl-C once a file of the folder is open; (exit code, stderr)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ssod_edge", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not _reads(process.pid, folder):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never read an image"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def _reads(session: int, folder: Path) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked
            if os.getsid(int(process.name)) == session:
                names = [os.readlink(handle) for handle in (process / "fd").iterdir()]
                if any(name.startswith(f"{folder}/") for name in names):
                    return True
    return False
