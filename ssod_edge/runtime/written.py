"""What `predict` leaves on the disk beside its output: verdicts as a table, and copies of the images by verdict."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

from ssod_edge.csv_table import CsvTable, GrowingTable, path_cell
from ssod_edge.data.layout import same_name
from ssod_edge.errors import UsageError
from ssod_edge.files import copy_into, make_directory
from ssod_edge.runtime.predict import Verdict

#: Columns of the table; of a video with those of `FRAME_COLUMNS` after them.
COLUMNS = tuple(field.name for field in fields(Verdict))
FRAME_COLUMNS = ("frame", "time_s", "fps")
#: The folder of images that are unknown.
UNKNOWN = "unknown"


class VerdictTable(AbstractContextManager["VerdictTable"]):
    """A CSV file of verdicts, with the keys of a JSON line as columns; it appears whole when the block ends.

    Args:
        path: of the file.
        more: columns beside those of a verdict.
        resume: rows go to the disk at once, and those that are there stay.

    Raises:
        UsageError, OutputError: see `ssod_edge.csv_table.CsvTable`, and `GrowingTable` with `resume`.
    """

    def __init__(self, path: str, more: Sequence[str] = (), resume: bool = False) -> None:
        self._path, self._columns = path, (*COLUMNS, *more)
        self._table = GrowingTable(path, self._columns) if resume else CsvTable(path, self._columns)

    def __exit__(self, *exception: Any) -> None:
        self._table.__exit__(*exception)

    def done(self, model: Mapping[str, object]) -> set[str]:
        """The images that have rows already, as their cells are written; none but with `resume`.

        Args:
            model: what the rows' `engine`, `precision` and `threshold` must be.

        Raises:
            UsageError: they are verdicts of another model.
        """
        found: set[str] = set()
        for row in self._table.rows() if isinstance(self._table, GrowingTable) else ():
            for column, value in model.items():
                if row[column] != ("" if value is None else str(value)):
                    raise UsageError(
                        f"'{self._path}' holds verdicts of another model: {column} {row[column] or 'none'}, not "
                        f"{value}. Name another file"
                    )
            found.add(row["image"])
        return found

    def add(self, verdict: Mapping[str, Any]) -> None:
        """A row, of what `to_dict` gives."""
        row = {**verdict, "image": path_cell(str(verdict["image"]))}
        self._table.add([row[column] for column in self._columns])


class Sorter:
    """Copies images into DIR/CLASS, and unknown ones into DIR/unknown. An image that is there already is left alone.

    Args:
        folder: DIR, which is made.
        classes: of the model.
        say: gets a line for each image that cannot be copied.

    Attributes:
        failed: how many could not be copied.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(self, folder: str, classes: Iterable[str], say: Callable[[str], object]) -> None:
        self.failed = 0
        self._folder, self._say = make_directory(folder), say
        self._names = folder_names(classes, taken=(UNKNOWN,))
        self._counts: Counter[str] = Counter()

    def add(self, verdict: Verdict) -> None:
        """Copy the image of a verdict; one without a verdict has no place. Without a threshold its class is."""
        if verdict.error is not None or verdict.class_name is None:
            return
        name = UNKNOWN if verdict.known is False else self._names[verdict.class_name]
        try:
            copy_into(Path(verdict.image), make_directory(self._folder / name))
        except OSError as error:
            self.failed += 1
            self._say(f"error: '{verdict.image}' is not copied to '{self._folder / name}': {error.strerror or error}")
        else:
            self._counts[name] += 1

    def summary(self) -> str:
        """How many images lie where."""
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self._counts.items())) or "nothing"
        return f"sorted into '{self._folder}': {counts}"


def folder_names(classes: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """Class -> the name of a folder of its own: its name, where that is one, and is not taken."""
    used, names = set(map(same_name, taken)), {}
    for name in classes:
        free = file_part(name)
        while same_name(free) in used:
            free = f"class-{free}"
        used.add(same_name(free))
        names[name] = free
    return names


def file_part(name: str, most: int = 100) -> str:
    """A name as a part of a file's: no separators, no control characters, no leading dot, at most so many bytes."""
    text = "".join("_" if c == "/" or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in name)
    text = text.encode()[:most].decode(errors="ignore").strip()
    return f"_{text[1:]}" if text.startswith(".") else text or "_"
