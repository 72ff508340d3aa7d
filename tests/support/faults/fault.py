"""What must not happen, and how a command of the product may end."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from ssod_edge.cli import main
from ssod_edge.errors import EXIT_MISSING, EXIT_OK, EXIT_SOME_FAILED, EXIT_USAGE, EXIT_VERIFICATION

#: Exit code -> what the summary calls it.
ENDS = {
    EXIT_OK: "done",
    EXIT_SOME_FAILED: "some failed",
    EXIT_USAGE: "refused",
    EXIT_MISSING: "no engine",
    EXIT_VERIFICATION: "damage found",
}


#: Of what a command says that did not do it, or not for each artifact.
LAST_LINE = re.compile(r"[eE]rror: |[\w-]+: not calibrated: ")


class Fault(Exception):  # noqa: N818 (it is no error of the campaign)
    """What must not happen."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, and what it printed."""

    code: int
    out: str
    err: str

    def end(self) -> str:
        """How it ended, for the summary. Raises Fault unless it is one line of the project's own error."""
        text = f"exit code {self.code}\n{self.out[-500:]}\n{self.err[-1500:]}"
        if "should not happen" in self.err or "Traceback" in self.err or self.code not in ENDS:
            raise Fault(text)
        errors = re.findall(r"^[eE]rror: ", self.err, re.MULTILINE)
        last = self.err.strip().rpartition("\n")[2]
        if self.code not in (EXIT_OK, EXIT_SOME_FAILED) and (len(errors) > 1 or not LAST_LINE.match(last)):
            raise Fault(f"not one line of an error, {text}")
        if self.code == EXIT_SOME_FAILED and not self.err.strip() and not self.out.strip():
            raise Fault(f"nothing is said, {text}")
        return ENDS[self.code]


def call(*arguments: object, given: bytes | str | None = None) -> Ended:
    """Run a command of the product in this process."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=given)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise Fault(f"{arguments}: {result.exception!r} left the command line\n{result.output[-500:]}")
    return Ended(result.exit_code, result.stdout, result.stderr)


@contextlib.contextmanager
def about(*what: object) -> Iterator[None]:
    """Say of a fault what was tried."""
    try:
        yield
    except Fault as fault:
        raise Fault(f"{', '.join(map(str, what))}: {fault}") from fault


def below(folder: Path) -> dict[str, bytes]:
    """The files below a folder -> what they hold."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
