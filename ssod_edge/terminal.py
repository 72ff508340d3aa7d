"""What goes to a terminal and comes from one: progress, text that cannot harm it, standard input."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from ssod_edge.errors import UsageError

#: Columns of what is printed where no terminal says how many: one line stays one.
WIDE = 100_000


class Screen(Console):
    """rich's console, for which text is what it says: names from outside are neither markup nor control characters.

    Style goes in as a `Text`, whose words went through `printable`.

    Args:
        err: standard error.
        wide: columns where standard output is no terminal; None is 80, or what COLUMNS says.
    """

    def __init__(self, err: bool = False, wide: int | None = None, **options: Any) -> None:
        if wide is not None and not sys.stdout.isatty():
            options["width"] = wide
        super().__init__(stderr=err, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable_lines(text), **options)


def tell(text: str, err: bool = False) -> None:
    """Print a line, or several, without characters that a terminal would obey."""
    click.echo(printable_lines(text), err=err)


def bars(*columns: str, shown: bool = True, transient: bool = True) -> Progress:
    """rich's bars on standard error, with further text columns; off a terminal, or if not `shown`, nothing."""
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *(TextColumn(column, markup=False) for column in columns),
        console=Screen(err=True, soft_wrap=True),
        transient=transient,
        disable=not (shown and on_terminal),
    )


@contextlib.contextmanager
def image_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over images; the value is a function that advances it."""
    with bars() as progress:
        task = progress.add_task(printable(what), total=total)
        yield lambda n: progress.advance(task, n)


class TrainingBar:
    """A bar for the epoch that runs, and a line for each finished one. Off a terminal: the lines alone."""

    def __init__(self, config: Any, steps: int, enabled: bool = True):
        self.epochs, self.steps, self.enabled = config.epochs, steps, enabled
        self.bar = bars("{task.fields[figures]}", shown=enabled, transient=False)
        self.console = self.bar.console
        self.task = self.bar.add_task("epoch", total=steps, figures="")
        self.shown = 0.0

    def __enter__(self) -> TrainingBar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, epoch: int, step: int, compute_figures: Callable[[], dict[str, Any]]) -> None:
        """After a batch; `compute_figures` is called only when the bar is drawn, five times a second."""
        if self.bar.disable or time.monotonic() - self.shown < 0.2:
            return
        self.shown = time.monotonic()
        figures = compute_figures()
        self.bar.update(
            self.task,
            completed=step,
            description=f"epoch {epoch + 1}/{self.epochs}",
            figures=f"loss {figures['loss']:.3f}  acc {figures['accuracy']:.1%}  {_unknowns(figures)}",
        )

    def epoch_done(self, row: dict[str, Any]) -> None:
        """After an epoch, with the row that metrics.jsonl gets."""
        self.bar.reset(self.task, total=self.steps)
        if self.enabled:
            self.console.print(
                f"epoch {row['epoch']}/{self.epochs}  loss {row['loss']:.3f}  acc {row['accuracy']:.1%}  "
                f"val {row['val_accuracy']:.1%}  {_unknowns(row)}  {row['images_per_second']:.0f} images/s"
            )


def _unknowns(figures: dict[str, Any]) -> str:
    """What the OOD loss was taken over, where it was: made outliers, patches, or both."""
    parts = []
    if figures["outlier_loss"]:
        parts.append(f"outliers {figures['outlier_loss']:.3f}")
    shares = [figures[f"{kind}_patches"] for kind in ("id", "ood", "ignored")]
    if any(shares):
        parts.append("patches ID {:.0%} OOD {:.0%} ignored {:.0%}".format(*shares))
    return "  ".join(parts) or "no OOD loss"


class PhaseBars:
    """A bar for each phase of a longer work that runs, nested ones too. A context manager; any thread may report."""

    def __init__(self, what: str):
        self.bars, self.what = bars(), what
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> PhaseBars:
        self.bars.start()
        self.bars.add_task(self.what, total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def start(self, phase: str, steps: int) -> None:
        """A phase of so many steps begins."""
        self.tasks[phase] = self.bars.add_task(f"  {phase}", total=steps)

    def advance(self, phase: str) -> None:
        """One of its steps is done."""
        if phase in self.tasks:
            self.bars.advance(self.tasks[phase])

    def finish(self, phase: str) -> None:
        """It ends, perhaps before its last step."""
        if phase in self.tasks:
            self.bars.remove_task(self.tasks.pop(phase))


def standard_input() -> Iterator[str]:
    """The lines of standard input, which is not touched before the first is drawn.

    Raises:
        UsageError: it is closed, or holds no lines of text.
    """
    if sys.stdin is None:
        raise UsageError("'-' was given, and standard input is closed")
    for line in sys.stdin.buffer:
        if b"\0" in line:
            raise UsageError(
                "'-' stands for a list of names, one a line, and standard input holds a picture or other bytes. Name "
                "the file instead; a list in UTF-16, or of find -print0, is none either"
            )
        yield os.fsdecode(line)


def printable(text: str) -> str:
    """For one line of a terminal: bytes that are not UTF-8 are replaced, control and line characters escaped."""
    return "".join(_printable_character(character) for character in text)


def printable_lines(text: str) -> str:
    """`printable`, of text whose line ends are meant."""
    return "\n".join(map(printable, text.split("\n")))


#: They turn the order of what stands around them, so that a name reads as another.
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _printable_character(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Cs":  # a surrogate stands for a byte that is not UTF-8
        return "\ufffd"
    return (
        character.encode("unicode_escape").decode() if kind in ("Cc", "Zl", "Zp") or character in _TURNS else character
    )
