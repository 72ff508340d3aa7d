"""What of this machine the process may use: cores, processor time and memory, in a container too.

A container's limit on processor time does not show in the number of cores: at half a core of a host with 64, engines
would start 64 threads, which wait for each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

#: Where the system says it; tests put another tree in its place.
ROOT = Path("/")

#: A limit of memory from here on is none: version 1 of control groups writes the largest number of pages there is.
NO_LIMIT = 1 << 60

#: How long a thread of PyTorch's OpenMP runs in a circle for its next work before it sleeps. GNU's default is 300,000.
#: Where another program keeps one of two cores busy, threads that run in a circle hold up the one that they wait for:
#: six to eight times (docs/lab/results.md).
SPIN = "10000"


def available_cores() -> int:
    """Cores that this process may keep busy, at least one: those it may run on, or fewer by `cpu_quota`, rounded up."""
    quota = cpu_quota()
    return affine_cores() if quota is None else min(affine_cores(), math.ceil(quota))


def affine_cores() -> int:
    """Cores that this process may run on, whatever its share of their time is."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def engine_threads(threads: int | None) -> int | None:
    """The number of threads to start an engine with: those asked for; else, where processor time is limited to fewer
    cores than there are, as many as that allows; None leaves the choice to the engine.
    """
    if threads is None and available_cores() < affine_cores():
        return available_cores()
    return threads


def limit_threads() -> None:
    """Tell OpenMP (of PyTorch), which reads its variables when it is loaded, what `engine_threads` tells engines, and
    to let other programs have the cores while its threads wait. What is set already stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN
    threads = engine_threads(None)
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def cpu_quota() -> float | None:
    """Processor time that the control groups around this process allow, in cores (0.5: half of one's); None: all."""
    limits = []
    for folder in _groups("cpu"):
        words = _words(folder / "cpu.max")  # of version 2; the two files are version 1's
        words = words or [_word(folder / "cpu.cfs_quota_us"), _word(folder / "cpu.cfs_period_us")]
        quota, period = words if len(words) == 2 else ("", "")
        if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0:
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit_mb() -> int | None:
    """Memory that the control groups around this process allow, in MB (10**6 bytes); None: all there is."""
    found = (_word(folder / name) for folder in _groups("memory") for name in ("memory.max", "memory.limit_in_bytes"))
    limits = [int(word) for word in found if word.isdecimal() and int(word) < NO_LIMIT]
    return min(limits) // 10**6 if limits else None


def throttled_s() -> float | None:
    """Seconds for which the innermost group's processes were stopped so far because its processor time was used up;
    None where the system does not count it.
    """
    for folder in _groups("cpu"):
        try:
            lines = (folder / "cpu.stat").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        counts = dict(line.split(maxsplit=1) for line in lines if " " in line)
        if "throttled_usec" in counts:
            return round(int(counts["throttled_usec"]) / 1e6, 3)
        if "throttled_time" in counts:
            return round(int(counts["throttled_time"]) / 1e9, 3)
    return None


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control groups for a controller, innermost first: each one's limit holds."""
    for mount, mounted, version in _mounts(controller):
        path = _path_of(controller if version == 1 else "")
        if path is None:
            continue
        # The file system may be mounted from a group on, which is then the top of what can be seen.
        try:
            inner = Path(path).relative_to(mounted)
        except ValueError:
            inner = Path()
        folder = mount / inner
        for place in (folder, *folder.parents):
            yield place
            if place == mount:
                break


def _mounts(controller: str) -> Iterator[tuple[Path, str, int]]:
    """Where control groups are mounted, the group at the top there, and their version."""
    for line in _lines(ROOT / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(" "), (*after.split(" ", 2), "", "", "")[:3]
        if len(fields) < 5:
            continue
        mount = ROOT / fields[4].lstrip("/")
        if kind == "cgroup2":
            yield mount, fields[3], 2
        elif kind == "cgroup" and controller in options.split(" ")[-1].split(","):
            yield mount, fields[3], 1


def _path_of(controller: str) -> str | None:
    """This process's group in a hierarchy of version 1, or ("") in that of version 2."""
    for line in _lines(ROOT / "proc/self/cgroup"):
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if controller in names.split(","):
            return path
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    lines = _lines(path)
    return lines[0].split() if lines else []


def _word(path: Path) -> str:
    return next(iter(_words(path)), "")
