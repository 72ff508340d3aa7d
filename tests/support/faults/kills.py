"""SIGKILL at any instant: what was there or what was to come is there, whole, and the next run ends well."""

from __future__ import annotations

import os
import signal
import time

from faults.children import Steps, start
from faults.damage import Rng
from faults.fault import about
from faults.operations import OperationAttempts


class Attempts(OperationAttempts):
    """Half of the kills fall on a step that writes, half on an instant."""

    def attempt(self, rng: Rng) -> str:
        operation = self.begin(rng)
        if rng.random() < 0.5:
            at = int(rng.integers(1, operation.steps + 1))
            what = f"step {at} of {operation.steps}"
            steps = Steps(operation.work, at, lambda event: os.kill(os.getpid(), signal.SIGKILL))
            with start(operation.command(), steps.watch) as child:
                code = child.ended().code
        else:
            share = rng.uniform(0, 1.05)
            what = f"{share:.3f} of {operation.lasts:.2f} s"
            with start(operation.command()) as child:
                time.sleep(share * operation.lasts)
                child.kill()
                code = child.ended().code
        with about(operation.name, f"killed at {what}"):
            found = operation.check()
            if rng.random() < 0.5:
                operation.finish()
        return f"{operation.name} {'ended' if code == 0 else found}"
