"""Too little memory: a clear error, and what was there stays."""

from __future__ import annotations

import resource
from pathlib import Path

from PIL import Image

from faults import templates
from faults.children import import_all, start
from faults.damage import Rng, any_of
from faults.fault import Fault, about
from faults.operations import Operation, make_templates, operations

#: Megabytes that a process may take beside what it takes at its start.
LEAST, MOST = 8, 400


class LargePhotos(Operation):
    """Pictures of 36 million pixels among small ones; they cannot be read where memory is short, and the others can."""

    name = "predict of large photos"

    def prepare(self) -> None:
        self.work.mkdir()
        for name in ("1.jpg", "2.png", "3.bmp"):
            Image.new("RGB", (6000, 6000) if name[0] != "1" else (9000, 9000), (200, 30, 30)).save(self.work / name)
        Image.new("RGB", (60, 60), (200, 30, 30)).save(self.work / "4.png")

    def command(self) -> tuple[object, ...]:
        return (
            "predict",
            templates.colours(self.folder),
            self.work,
            "--engine",
            "onnxruntime",
            "--json",
            "--threads",
            1,
        )

    def check(self) -> str:
        return "new"


class Attempts:
    """An operation in a process that gets no more address space than so much."""

    def __init__(self, folder: Path):
        import_all(folder)
        make_templates(folder)
        self._operations = [LargePhotos(folder), *operations(folder)]

    def attempt(self, rng: Rng) -> str:
        operation = self._operations[0] if rng.random() < 0.3 else any_of(rng, self._operations)
        most = int(rng.integers(LEAST, MOST))
        with about(operation.name, f"{most} MB"):
            operation.measure()
            operation.fresh()
            with start(operation.command(), lambda: _limit(most)) as child:
                ended = child.ended()
            if ended.code < 0:
                raise Fault(f"killed by signal {-ended.code}\n{ended.err[-1500:]}")
            end = ended.end()
            operation.check()
            operation.check_nothing_left()
            if ended.code and "memory" not in (ended.err + ended.out).lower():
                raise Fault(f"the error does not say why: {ended.err[-1000:]}{ended.out[-500:]}")
        return f"{operation.name} {end}"


def _limit(megabytes: int) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (megabytes << 20),) * 2)
