"""Commands in processes that are forked from one that has imported everything, so that thousands can be killed."""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from faults.fault import Ended, Fault

#: What commands import; none of it starts a thread, which a fork would lose.
LIGHT = ("onnx", "onnxruntime", "openvino", "colour", "ssod_edge.cli", "ssod_edge.export.deploy",
         "ssod_edge.export.command", "ssod_edge.runtime.field.stream", "ssod_edge.runtime.field.review",
         "ssod_edge.runtime.calibrate", "ssod_edge.runtime.report", "ssod_edge.teach.command")  # fmt: skip
HEAVY = ("torch", "timm", "safetensors.torch", "sklearn.linear_model", "ssod_edge.training.loop",
         "ssod_edge.evaluation.evaluate", "ssod_edge.export.graph.build", "ssod_edge.teach.teach")  # fmt: skip


def import_all(folder: Path) -> None:
    """Import what children need; where the campaign in this folder is short, they train nothing."""
    for name in LIGHT if is_short(folder) else (*LIGHT, *HEAVY):
        importlib.import_module(name)


def is_short(folder: Path) -> bool:
    """Whether only what takes less than a second is tried."""
    return (folder / "short").exists()


@dataclass
class Child:
    """A process at work. Attributes: its id; the ends of the pipes that it prints into."""

    pid: int
    out: int
    err: int

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            self.kill()
            os.waitpid(self.pid, 0)
        os.close(self.out)
        os.close(self.err)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def ended(self, limit_s: float = 100) -> Ended:
        """Wait for its end; the code is below 0 where a signal ended it. Raises Fault after the limit."""
        said, open_ends, until = {self.out: b"", self.err: b""}, {self.out, self.err}, time.monotonic() + limit_s
        while open_ends:
            ready = select.select(list(open_ends), [], [], max(0, until - time.monotonic()))[0]
            if not ready:
                raise Fault(f"no end after {limit_s} s: {said[self.err].decode(errors='replace')[-1000:]}")
            for end in ready:
                block = os.read(end, 1 << 16)
                said[end] += block
                if not block:
                    open_ends.remove(end)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Ended(code, *(said[end].decode(errors="replace") for end in (self.out, self.err)))


def start(work: Callable[[], object] | tuple[object, ...], before: Callable[[], object] | None = None) -> Child:
    """Fork a process.

    Args:
        work: a function, or the arguments of a command of the product.
        before: is called first, in the new process.
    """
    out, err = os.pipe(), os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(out[1])
        os.close(err[1])
        return Child(pid, out[0], err[0])
    code = 70
    try:
        for (read, write), number in ((out, 1), (err, 2)):
            os.close(read)
            os.dup2(write, number)
            os.close(write)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        if before is not None:
            before()
        code = _code(work)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def _code(work: Callable[[], object] | tuple[object, ...]) -> int:
    if callable(work):
        work()
        return 0
    from ssod_edge.cli import main

    try:
        main.main([str(argument) for argument in work], prog_name="ssod-edge")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1 if error.code else 0
    return 0


def done(work: Callable[[], object] | tuple[object, ...]) -> Ended:
    """Run something to its end; Fault unless it ends well."""
    with start(work) as child:
        ended = child.ended()
    if ended.code != 0:
        raise Fault(f"{work} ends with {ended.code}: {ended.err[-2000:]}")
    return ended


class Steps:
    """Counts what a process writes: files that it opens to write, renames, links, removes, folders; and meets one.

    Args:
        folder: what lies elsewhere does not count.
        at: the number of the step, from 1 on, before which `meet` is called.
        meet: it may end the process, or raise what the step then raises; it is called with the kind of step.
        ever: at every later step too.
        report: a descriptor that gets the count when the process ends well, see `counted`.
    """

    KINDS = ("open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate")

    def __init__(self, folder: Path, at: int, meet: Callable[[str], object], ever: bool = False):
        self.count, self._at, self._meet, self._ever = 0, at, meet, ever
        self._folder = str(folder)

    def watch(self) -> None:
        """From here on; there is no end of it in this process."""
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in self.KINDS or not self._is_write(event, arguments):
            return
        path = arguments[0]
        text = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
        if text.startswith("/") and not text.startswith(self._folder):
            return
        self.count += 1
        if self.count == self._at or (self._ever and self.count > self._at):
            self._meet(event)

    @staticmethod
    def _is_write(event: str, arguments: tuple[object, ...]) -> bool:
        if event != "open":
            return True
        flags = arguments[2] if len(arguments) > 2 else 0
        return (
            isinstance(flags, int)
            and bool(flags & (os.O_WRONLY | os.O_RDWR))
            and isinstance(arguments[0], (str, bytes))
        )


def counted(work: tuple[object, ...], folder: Path) -> tuple[Ended, int, float]:
    """Run a command to its end: how it ended, how many steps it took, and how many seconds."""
    steps, begun = Steps(folder, 0, lambda event: None), time.monotonic()
    read, write = os.pipe()

    def then() -> None:
        code = _code(work)
        os.write(write, b"%d" % steps.count)
        if code:
            raise SystemExit(code)

    with start(then, steps.watch) as child:
        os.close(write)
        ended = child.ended()
    count = os.read(read, 20)
    os.close(read)
    if ended.code != 0:
        raise Fault(f"{work} ends with {ended.code}: {ended.err[-2000:]}")
    return ended, int(count), time.monotonic() - begun
