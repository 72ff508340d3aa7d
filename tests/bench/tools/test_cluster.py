"""What actors of a Ray cluster take, compared to one process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from ssod_edge.bench.tools.cluster import cpu_s, rate
from ssod_edge.errors import UsageError


def test_what_comes_before_the_first_verdict_is_no_rate() -> None:
    def counts() -> Iterator[int]:
        for wait, count in ((0.3, 1000), (0.05, 10), (0.05, 10)):
            time.sleep(wait)
            yield count

    found = rate(counts())
    assert found.start_s >= 0.3 and 20 < found.ips <= 200 and found.cpu_ms < 50


def test_all_at_once_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="all verdicts came at once"):
        rate([100])


def test_processor_time_is_that_of_the_processes_below_too() -> None:
    before = cpu_s()
    code = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint(1, flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        assert cpu_s() - before >= 0.28
        child.communicate(b"\n")
