"""What `predict` leaves on the disk beside its output: verdicts as a table, and copies of the images by verdict."""

from __future__ import annotations

import posixpath
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ssod_edge.csv_table import CsvTable, GrowingTable, path_cell
from ssod_edge.data.layout import same_name
from ssod_edge.data.pixels import Stored
from ssod_edge.errors import SsodEdgeError, UsageError
from ssod_edge.files import copy_into, make_directory, temporary_folder, write_bytes
from ssod_edge.names import Names
from ssod_edge.parquet_table import ParquetTable, utf8
from ssod_edge.runtime.predict import Seen, Verdict

#: Columns of the table; of a video with those of `FRAME_COLUMNS` after them.
COLUMNS = tuple(field.name for field in fields(Verdict))
FRAME_COLUMNS = ("frame", "time_s", "fps")


def column_types(more: Sequence[str] = ()) -> dict[str, str]:
    """Column -> its type, as `ssod_edge.parquet_table.arrow_schema` takes it, of a verdict and of columns beside it."""
    kinds = {str: "string", int: "int64", float: "double", bool: "bool"}
    hints = {name: (get_args(hint) or (hint,))[0] for name, hint in get_type_hints(Verdict).items()}
    hints |= {"frame": int, "time_s": float, "fps": float}
    return {name: kinds[hints[name]] for name in (*COLUMNS, *more)}


#: The folder of images that are unknown.
UNKNOWN = "unknown"


class VerdictTable(AbstractContextManager["VerdictTable"]):
    """A CSV or Parquet file of verdicts, with the keys of a JSON line as columns; it appears whole when the block ends.

    Args:
        path: of the file.
        more: columns beside those of a verdict.
        resume: rows go to the disk at once, and those that are there stay.
        parquet: of this kind.

    Raises:
        UsageError, OutputError: see `ssod_edge.csv_table.CsvTable`, and `GrowingTable` with `resume`.
        MissingExtraError: see `ssod_edge.parquet_table.ParquetTable`.
    """

    def __init__(self, path: str, more: Sequence[str] = (), resume: bool = False, parquet: bool = False) -> None:
        self._path, self._columns, self._done = path, (*COLUMNS, *more), Names()
        self._cell = utf8 if parquet else path_cell
        self._table: CsvTable | GrowingTable | ParquetTable
        if parquet:
            self._table = ParquetTable(path, column_types(more), resume)
        else:
            self._table = GrowingTable(path, self._columns) if resume else CsvTable(path, self._columns)

    def __exit__(self, *exception: Any) -> None:
        self._table.__exit__(*exception)

    def resume(self, model: Mapping[str, object]) -> int:
        """Look up the images that have rows already, for `is_done`; returns how many rows there are.

        Args:
            model: what the rows' `engine`, `precision` and `threshold` must be.

        Raises:
            UsageError: they are verdicts of another model.
        """
        self._done = Names(self._names(model))
        return len(self._done)

    def is_done(self, image: str) -> bool:
        """Whether an image has a row already."""
        return self._cell(image) in self._done

    def _names(self, model: Mapping[str, object]) -> Iterator[str]:
        for row in () if isinstance(self._table, CsvTable) else self._table.rows():
            for column, value in model.items():
                if row[column] != ("" if value is None else str(value)):
                    raise UsageError(
                        f"'{self._path}' holds verdicts of another model: {column} {row[column] or 'none'}, not "
                        f"{value}. Name another file"
                    )
            yield row["image"]

    def add(self, verdict: Mapping[str, Any]) -> None:
        """A row, of what `to_dict` gives."""
        row = {**verdict, "image": self._cell(str(verdict["image"]))}
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

    def add(self, seen: Seen) -> None:
        """Copy an image by its verdict; without a threshold by its class."""
        verdict, source = seen.verdict, seen.source
        if verdict.class_name is None:
            return
        name = UNKNOWN if verdict.known is False else self._names[verdict.class_name]
        try:
            folder = make_directory(self._folder / name)
            if isinstance(source, Stored):
                with temporary_folder() as place:
                    copy_into(write_bytes(Path(place, posixpath.basename(source.name)), source.read()), folder)
            else:
                copy_into(Path(verdict.image), folder)
        except (OSError, SsodEdgeError) as error:
            self.failed += 1
            reason = getattr(error, "strerror", None) or error
            self._say(f"error: '{verdict.image}' is not copied to '{self._folder / name}': {reason}")
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
