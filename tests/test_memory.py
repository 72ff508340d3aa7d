"""Freed memory stays in the process that trains."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep what is freed")

#: Pages that the system hands out while tensors of 40 MB come and go.
COUNT = """
import resource, sys, torch
from ssod_edge.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(10_000_000)
before = faults()
for _ in range(20):
    torch.ones(10_000_000)
print(faults() - before)
"""


def test_tensors_get_the_pages_of_freed_ones() -> None:
    def faults(how: str) -> int:
        found = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
        return int(found.stdout)

    assert faults("keep") < faults("default") / 3


#: Resident pages after many small blocks are freed, and after they are given back.
TRIM = """
from ssod_edge.memory import give_back_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1])
blocks = [bytearray(100_000) for _ in range(1000)]
last = bytearray(100_000)
full = resident()
del blocks
print(give_back_freed_memory(), full - resident())
"""


def test_freed_memory_can_be_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", TRIM], capture_output=True, text=True, check=True)
    done, pages = found.stdout.split()
    assert done == "True" and int(pages) > 20_000  # of some 24,400
