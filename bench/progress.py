"""A progress bar that is redrawn between queries only: a thread that draws would be measured with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ssod_edge.terminal import Screen, printable


class Bar(Progress):
    """One bar for each part of a bench. Off a terminal, or without a console, nothing is shown.

    Args:
        console: where to draw.
        check: called before each redraw; may raise, to end the bench.
    """

    def __init__(self, console: Screen | None, check: Callable[[], None]) -> None:
        self._check = check
        super().__init__(
            TextColumn("{task.description:<16}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[item]}", markup=False),
            console=console,
            auto_refresh=False,
            disable=console is None or not console.is_terminal,
        )

    def refresh(self) -> None:
        """Redraw now."""
        self._check()
        super().refresh()

    @contextmanager
    def steps(self, part: str, total: int) -> Iterator[Callable[[str, int], None]]:
        """A bar for one part. Call what it yields with the item that begins and how many more items that makes."""
        task = self.add_task(part, total=total, item="")
        yield lambda item, count: self.update(task, advance=count, item=printable(item), refresh=True)
        self.update(task, item="", refresh=True)
