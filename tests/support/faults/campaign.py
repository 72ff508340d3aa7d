"""Running a part: one worker process tries seed after seed, and a crash or a hang of it is a fault of that seed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

#: Part -> seconds that one attempt may take. Each is a module of this package.
PARTS = {"images": 30, "artifacts": 120, "archives": 60, "kills": 120, "disk": 120, "threads": 120, "memory": 120}
#: Those of the first group open engines in the worker itself, the others fork it.
GROUPS = {part: "opens" if part in ("images", "artifacts", "archives") else "forks" for part in PARTS}
#: Part -> its share of the time: a kill takes seconds, a picture milliseconds.
SHARES = {"images": 1, "artifacts": 2, "archives": 1, "kills": 4, "disk": 3, "threads": 2, "memory": 1}
#: Seeds of one campaign.
MOST = 100_000
#: Seconds that a worker takes to make what it damages.
START_S = 300
#: Characters of what a worker printed that a fault shows.
SHOWN = 2000


@dataclass
class Tally:
    """What became of a part's attempts: how they ended, counted; seed -> what was wrong."""

    part: str
    ends: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    def line(self) -> str:
        """The summary."""
        tried = self.ends.total() + len(self.faults)
        ends = ", ".join(f"{count:,} {end}" for end, count in self.ends.most_common())
        again = f": --part {self.part}" + "".join(f" --only {seed}" for seed in self.faults)
        found = f"{len(self.faults)} faults{again if self.faults else ''}"
        return f"{self.part}: {tried:,} tried in {self.seconds:.0f} s ({ends or 'none ended well'}); {found}"


class Worker:
    """A process that tries seeds of parts, see `faults.worker`."""

    def __init__(self, folder: Path):
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        support = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, [support, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.worker", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment, start_new_session=True,
        )  # fmt: skip

    def begin(self, part: str) -> None:
        """Make what a part damages."""
        answer = self._ask(part, START_S)
        if "end" not in answer:
            raise RuntimeError(f"the part '{part}' cannot begin: {answer}")

    def attempt(self, seed: int, limit_s: float) -> dict[str, str]:
        """{"end": how it ended} or {"fault": what was wrong}; {"dead": ...} where the process did not live through."""
        return self._ask(str(seed), limit_s)

    def _ask(self, line: str, limit_s: float) -> dict[str, str]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            self._process.send_signal(signal.SIGABRT)  # it prints where each thread is
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            return {"dead": f"no end after {limit_s} s\n{self._said()}"}
        answer = self._process.stdout.readline()
        if not answer:
            return {"dead": f"the process died ({self._process.wait()})\n{self._said()}"}
        return dict(json.loads(answer))

    def _said(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - SHOWN))
        return self._log.read().decode(errors="replace")

    def close(self) -> None:
        """End it, and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._log.close()


class Campaign(contextlib.AbstractContextManager["Campaign"]):
    """Parts in turn; those of one group share a worker, which has imported what they need.

    Args:
        folder: an existing one; what is made in it serves all parts.
    """

    def __init__(self, folder: Path):
        self._folder, self._group = folder, ""
        self._worker: Worker | None = None

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None

    def _begin(self, part: str) -> Worker:
        """A worker that is ready for the part."""
        if self._worker is None or self._group != GROUPS[part]:
            self._end()
            self._worker, self._group = Worker(self._folder), GROUPS[part]
        self._worker.begin(part)
        return self._worker

    def run(self, part: str, seeds: Iterable[int], seconds: float) -> Tally:
        """Try seeds until they or the seconds are used up; one is always tried."""
        tally, worker = Tally(part), self._begin(part)
        begun = time.monotonic()
        for seed in seeds:
            answer = worker.attempt(seed, PARTS[part])
            if "end" in answer:
                tally.ends[answer["end"]] += 1
            else:
                tally.faults[seed] = answer.get("fault") or answer["dead"]
            if "dead" in answer:
                self._end()
                worker = self._begin(part)
            if time.monotonic() - begun > seconds:
                break
        tally.seconds = time.monotonic() - begun
        return tally


def seeds_of(seed: int) -> Iterable[int]:
    """Those of the campaign of a number: no two campaigns share one."""
    return range(seed * MOST, (seed + 1) * MOST)
