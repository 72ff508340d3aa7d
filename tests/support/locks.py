"""A process that holds the lock of some work."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_HOLD = """
import sys, time
from pathlib import Path
from ssod_edge.files import claim
path, until = map(Path, sys.argv[1:])
with claim(path, "the work is done"):
    print("held", flush=True)
    while not until.exists():
        time.sleep(0.05)
"""


@contextlib.contextmanager
def holding(path: Path, until: Path = Path("/nonexistent")) -> Iterator[subprocess.Popen[str]]:
    """Another process has claimed `path`; it lets go when there is a file `until`, and at the end of the block."""
    command = [sys.executable, "-c", _HOLD, str(path), str(until)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()
