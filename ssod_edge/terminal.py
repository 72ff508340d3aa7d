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


#: Seconds between two lines of progress where no bar can be drawn.
EVERY_S = 30.0


class Bars(Progress):
    """rich's bars on standard error, with further text columns; off a terminal a line every `EVERY_S` seconds.

    Args:
        columns: texts of rich's, of a task's fields.
        shown: False: neither.
        transient: whether a bar goes when it is full.
    """

    def __init__(self, *columns: str, shown: bool = True, transient: bool = True) -> None:
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._lines, self._told = shown and not on_terminal, time.monotonic()
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            *(TextColumn(column, markup=False) for column in columns),
            console=Screen(err=True, soft_wrap=True),
            transient=transient,
            disable=not (shown and on_terminal),
        )

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Of a task so many steps more are done."""
        super().advance(task_id, advance)
        self._tell(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task; see rich."""
        super().update(task_id, **changes)
        self._tell(task_id)

    @property
    def due(self) -> bool:
        """Whether it is time for a line."""
        return self._lines and time.monotonic() - self._told >= EVERY_S

    def _tell(self, task_id: TaskID) -> None:
        if not self.due:
            return
        self._told = time.monotonic()
        task = next(task for task in self.tasks if task.id == task_id)
        line = f"{task.description.strip()}: {task.completed:.0f}"
        if task.total is not None:
            line += f" of {task.total:.0f}"
        if task.fields.get("figures"):
            line += f"  {task.fields['figures']}"
        if task.time_remaining is not None:
            line += f"  {about(task.time_remaining)} left"
        tell(line, err=True)


def about(seconds: float) -> str:
    """A time in words, as roughly as one that is guessed is known: "about 40 s", "about 3 min", "about 2.5 h"."""
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


@contextlib.contextmanager
def image_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over images; the value is a function that advances it."""
    with Bars() as progress:
        task = progress.add_task(printable(what), total=total)
        yield lambda n: progress.advance(task, n)


class TrainingBar:
    """A bar for the run, and a line for each finished epoch; off a terminal lines alone.

    Args:
        config: of the run, with the number of its epochs.
        steps: batches of an epoch.
        enabled: False: nothing is shown.
        done: epochs that are finished already.
    """

    def __init__(self, config: Any, steps: int, enabled: bool = True, done: int = 0):
        self.epochs, self.steps, self.enabled = config.epochs, steps, enabled
        self.bar = Bars("{task.fields[figures]}", shown=enabled, transient=False)
        self.console = self.bar.console
        self.task = self.bar.add_task("epoch", total=steps * self.epochs, completed=steps * done, figures="")
        self.shown = 0.0

    def __enter__(self) -> TrainingBar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, epoch: int, step: int, compute_figures: Callable[[], dict[str, Any]]) -> None:
        """After a batch; `compute_figures` is called only where it is shown: five times a second, or with a line."""
        drawn = not self.bar.disable and time.monotonic() - self.shown >= 0.2
        if not drawn and not self.bar.due:
            return
        self.shown = time.monotonic()
        figures = compute_figures()
        self.bar.update(
            self.task,
            completed=epoch * self.steps + step,
            description=f"epoch {epoch + 1}/{self.epochs}",
            figures=f"loss {figures['loss']:.3f}  acc {figures['accuracy']:.1%}  {_unknowns(figures)}",
        )

    def epoch_done(self, row: dict[str, Any]) -> None:
        """After an epoch, with the row that metrics.jsonl gets."""
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
        self.bars, self.what = Bars(), what
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
