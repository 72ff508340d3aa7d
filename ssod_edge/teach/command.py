"""The commands `teach`, `history` and `rollback`: say what happens, and show what came out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ssod_edge.errors import EXIT_OK, EXIT_SOME_FAILED, UsageError
from ssod_edge.export.command import say, show
from ssod_edge.export.versions import name_of, others, prune, roll_back, size_on_disk, versions_folder
from ssod_edge.runtime.export import Export
from ssod_edge.teach.history import history
from ssod_edge.teach.teach import TeachOptions, teach
from ssod_edge.terminal import WIDE, Screen, printable, tell


def run_teach(folder: str, out: str | None, options: TeachOptions, keep: int | None = None) -> int:
    """Teach, and print a table of the new artifacts; returns the exit code: 1 if photos were left out.

    Args:
        folder, out, options: see `ssod_edge.teach.teach.teach`.
        keep: of a lesson in place, how many earlier versions stay; None keeps all.
    """
    if out is not None and keep is not None:
        raise UsageError("--keep belongs to teaching in place: leave out -o, or --keep")
    started = time.monotonic()
    done = teach(folder, out, options, say)
    show(done.spec, done.folder, started)
    if out is None:
        say(f"this is version {done.spec.version}")
        _say_kept(done.folder, keep)
    return EXIT_SOME_FAILED if done.unreadable else EXIT_OK


def run_rollback(folder: str, to: str | None = None) -> int:
    """Swap an earlier version in; see `ssod_edge.export.versions.roll_back`."""
    before, now = roll_back(folder, to)
    was = "a damaged export, which is gone" if before is None else f"version {name_of(before)}, which is kept"
    tell(printable(f"version {name_of(now)} is in use: {', '.join(now.classes)}; before, {was}"))
    return EXIT_OK


def run_history(folder: str, keep: int | None = None, as_json: bool = False) -> int:
    """Show the versions of an export, and remove the oldest beyond `keep`, the one in use not counted."""
    place = Export.place(folder)
    if keep is not None:
        _say_kept(place, keep)
    rows = history(folder)
    if as_json:
        tell(json.dumps({"versions": rows, "bytes_beside": size_on_disk(place)}, indent=2))
        return EXIT_OK
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("version", "what", "proof", "when (UTC)", "where"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "when (UTC)")
    for row in rows:
        table.add_row(*(Text(printable(text)) for text in _cells(row)), style="bold" if row["current"] else None)
    Screen(wide=WIDE).print(table)
    if keep is None:
        _say_kept(place, None)
    return EXIT_OK


def _say_kept(place: Path, keep: int | None) -> None:
    """What is kept, after the oldest was removed."""
    for name in prune(place, keep) if keep is not None else ():
        say(f"removed version {name}")
    current = Export.in_place(place)
    if names := [name_of(export.spec) for export in others(place, None if current is None else current.spec)]:
        say(
            f"kept in '{versions_folder(place)}', {size_on_disk(place) / 1e6:.1f} MB: {', '.join(names)}. "
            f"One comes back with: ssod-edge rollback {place} --to VERSION; history --keep N leaves the newest N"
        )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of `history` in words."""
    lesson = row["taught"]
    words = [f"{name} ({count} photos)" for name, count in lesson.get("photos", {}).items()]
    words += [f"without {name}" for name in lesson.get("forgotten", [])]
    where = "in use" if row["current"] else "/".join(Path(row["folder"]).parts[-2:]) if row["folder"] else "not here"
    return (row["name"], ", ".join(words) or "exported", _proof(lesson), _when(row["time"]), where)


def _when(time: str | None) -> str:
    """A time of a spec, to the minute: "2026-11-30T17:54:56+00:00" -> "2026-11-30 17:54"."""
    return "-" if time is None else time[:16].replace("T", " ")


def _proof(lesson: dict[str, Any]) -> str:
    """The figures of a lesson in short."""
    if not lesson:
        return "-"
    proof = lesson["proof"]
    before, after = proof["accuracy"]
    new = "".join(f", {name} {row['recall']:.0%}" for name, row in proof["new"].items())
    return f"others {before:.1%} -> {after:.1%}{new}"
