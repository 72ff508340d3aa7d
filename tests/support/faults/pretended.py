"""A part for the test of the campaign itself: its seeds end as they are told to."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from faults.damage import Rng
from faults.fault import Fault


class Attempts:
    """Ends well, with a fault, with an error, as a crash, and never; by the file `next` in the folder."""

    def __init__(self, folder: Path):
        self._next = folder / "next"

    def attempt(self, rng: Rng) -> str:
        told = self._next.read_text()
        if told == "fault":
            raise Fault("something is wrong")
        if told == "error":
            raise ValueError("the campaign is wrong")
        if told == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if told == "hang":
            time.sleep(100)
        return f"{told} {rng.integers(1000)}"
