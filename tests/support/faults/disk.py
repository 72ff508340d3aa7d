"""A disk that is full or read-only: a clear error and the old files, or the new ones."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable

from faults.children import Steps, start
from faults.damage import Rng, any_of
from faults.fault import Fault, about
from faults.operations import Operation, OperationAttempts

#: What a full disk refuses; it lets go of files, and renames them.
TAKES_ROOM = ("open", "os.mkdir", "os.link", "os.symlink")

#: Why, in an error.
WORDS = ("File too large", "No space", "Read-only")


class Attempts(OperationAttempts):
    """No file grows beyond so many bytes, or from a step on nothing new can be written."""

    def attempt(self, rng: Rng) -> str:
        operation = self.begin(rng)
        what, before = _limit(rng, operation)
        with about(operation.name, what):
            with start(operation.command(), before) as child:
                ended = child.ended()
            end = ended.end()
            with about(f"exit code {ended.code}, {ended.err.strip()[-300:]}"):
                found = operation.check()
                operation.check_nothing_left()
                if rng.random() < 0.3:
                    operation.finish()
            if ended.code and not any(word in ended.err for word in WORDS):
                raise Fault(f"the error does not say why: {ended}")
        return f"{operation.name} {end}, {found}"


def _limit(rng: Rng, operation: Operation) -> tuple[str, Callable[[], object]]:
    """(what it is, a call that makes it so for this process)."""
    kind = any_of(rng, ("size", "full", "read-only"))
    if kind == "size":
        largest = max((path.stat().st_size for path in operation.work.rglob("*") if path.is_file()), default=100_000)
        most = int(rng.integers(0, largest))
        return f"no file above {most} bytes", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    at = int(rng.integers(1, operation.steps + 1))

    def refuse(event: str) -> None:
        if kind == "read-only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if event in TAKES_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    steps = Steps(operation.work, 1 if kind == "read-only" else at, refuse, ever=True)
    return f"{kind} from step {at} of {operation.steps} on", steps.watch
