"""How much memory an artifact needs, measured in a process of its own.

Run as `python -m ssod_edge.bench.memory '{"folder": ..., "artifact": ...}'`; prints one number.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from ssod_edge.errors import EngineError

#: Runs of the engine before the peak is read: buffers are allocated in the first ones.
RUNS = 5
TIMEOUT_S = 300


def measure_rss(folder: Path, artifact: str, batch: int, threads: int | None) -> float:
    """Peak resident memory in MB (10**6 bytes) that loading and running an artifact adds to a Python process.

    The engine's library counts; Python, numpy and this package do not. It is opened by
    `ssod_edge.bench.backends.open_backend`, and runs `batch` images at a time.

    Raises:
        EngineError: the process failed; the message ends with its last line.
    """
    request = json.dumps({"folder": str(folder), "artifact": artifact, "batch": batch, "threads": threads})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ssod_edge.bench.memory", request], capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"measuring the memory of '{artifact}' took more than {TIMEOUT_S} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EngineError(f"the memory of '{artifact}' could not be measured: {lines[-1]}")
    return float(done.stdout.strip().splitlines()[-1])


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes."""
    try:
        # getrusage would count the process that started this one, if that was larger.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(request: str) -> None:
    """Open, run, and print the growth of the peak in MB."""
    from ssod_edge.bench.backends import open_backend

    wanted = json.loads(request)
    before = peak_rss()
    with open_backend(Path(wanted["folder"]), wanted["artifact"], wanted["threads"]) as runner:
        size = runner.spec.preprocess.input_size
        pixels = np.zeros((wanted["batch"], 3, size, size), np.uint8)
        for _ in range(RUNS):
            runner.infer({"image": pixels})
        print(round((peak_rss() - before) / 1e6, 1))


if __name__ == "__main__":
    main(sys.argv[1])
