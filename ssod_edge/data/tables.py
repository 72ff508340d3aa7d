"""Data sets as a table: a .csv or .parquet file of paths and labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ssod_edge.data.layout import PARTS, choose_parts, sort_key
from ssod_edge.data.splits import Indices
from ssod_edge.errors import MissingExtraError, UsageError

#: What the columns may be called, in the order in which they are looked for; upper case counts as lower case.
PATH_COLUMNS = ("path", "image", "file", "filename")
LABEL_COLUMNS = ("label", "class")
EXPECTED_HEADER = (
    f"Expected a header with a column of paths ({', '.join(PATH_COLUMNS)}) and one of labels "
    f"({', '.join(LABEL_COLUMNS)}); further ones may be 'split' (train, val, test) and 'group'"
)


@dataclass(frozen=True)
class Row:
    """One image of a table. Attributes: the texts of its columns, empty where there is none; the place of the row."""

    path: str
    label: str
    split: str
    group: str
    place: str


class TableReader:
    """The images that a table names.

    Args:
        table: path of the .csv or .parquet file; paths in it are relative to its folder.
        part: read the rows of this `split` alone; None reads those of train and val, or all without such a column.

    Attributes:
        labels: int64 [n]; -1 where there is none.
        classes: their names, in order; empty without labels.
        given_val: positions of the rows whose `split` is val; None without any.
        group_names: the text of `group` in each row, empty where there is none; None without that column.
        untouched: what a command says of the rows of test; empty without any.

    Raises:
        UsageError: no such columns, a row that says too little or too much, a path twice, or files that are missing.
        MissingExtraError: a .parquet file, and pyarrow is not installed.
    """

    def __init__(self, table: str, part: str | None = None):
        columns, rows = _read(table)
        self._folder = os.path.dirname(table)
        self.given_val: list[int] | None = None
        self.untouched = ""
        if "split" in columns:
            rows = self._divide(table, rows, part)
        elif part is not None:
            raise UsageError(f"'{table}' has no column 'split', so it has no '{part}'")
        self.names = [row.path for row in rows]
        _check_paths(table, self._folder, rows)
        self.classes = tuple(sorted({row.label for row in rows} - {""}, key=sort_key))
        numbers = {label: number for number, label in enumerate(self.classes)}
        self.labels: Indices = np.array([numbers.get(row.label, -1) for row in rows], np.int64)
        self.group_names = tuple(row.group for row in rows) if "group" in columns else None

    def _divide(self, table: str, rows: list[Row], part: str | None) -> list[Row]:
        """The rows that are read, and which of them validate."""
        for row in rows:
            if row.split.lower() not in PARTS:
                raise UsageError(f"{row.place}: split must be train, val or test, got '{row.split}'")
        kept, self.given_val, self.untouched = choose_parts(table, [row.split for row in rows], part)
        return [rows[position] for position in kept]

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        return open(os.path.join(self._folder, self.names[index]), "rb"), -1

    def filename(self, index: int) -> str:
        return self.names[index]


def _read(table: str) -> tuple[set[str], list[Row]]:
    """The columns that there are ("path", "label", "split", "group") and the rows."""
    header, lines = _read_parquet(table) if table.lower().endswith(".parquet") else _read_csv(table)
    header = [name.strip().lower() for name in header]
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise UsageError(f"'{table}' has two columns '{twice}'")
    wanted = {"path": PATH_COLUMNS, "label": LABEL_COLUMNS, "split": ("split",), "group": ("group",)}
    found = {key: next((n for n in names if n in header), None) for key, names in wanted.items()}
    if found["path"] is None:
        raise UsageError(
            f"'{table}' has no column of paths; its first line is: {', '.join(header)[:200]}. {EXPECTED_HEADER}"
        )
    columns = {key: header.index(name) for key, name in found.items() if name is not None}
    rows = []
    for place, cells in lines:
        if len(cells) != len(header):
            raise UsageError(
                f"{place} has {len(cells)} fields, and the header {len(header)}. Put a text with a comma in quotes"
            )
        texts = {key: cells[columns[key]].strip() if key in columns else "" for key in wanted}
        if not texts["path"]:
            raise UsageError(f"{place} has no path")
        rows.append(Row(place=place, **texts))
    if not rows:
        raise UsageError(f"'{table}' names no images. {EXPECTED_HEADER}")
    return set(columns), rows


def _read_csv(table: str) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    """The header, and each further row with its place. A spreadsheet may have put semicolons or tabs for commas."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=first.count)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            rows = [(f"line {reader.line_num} of '{table}'", cells) for cells in reader if any(map(str.strip, cells))]
    except OSError as error:
        raise UsageError(f"'{table}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"'{table}' is not UTF-8 text ({error}). Save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise UsageError(
            f"'{table}', line {reader.line_num}: {error}. A quote within a quoted text is doubled"
        ) from error
    if not rows:
        raise UsageError(f"'{table}' is empty. {EXPECTED_HEADER}")
    return rows[0][1], iter(rows[1:])


def _read_parquet(table: str) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    """The columns' names, and each row with its place."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(
            f"'{table}' needs the package 'pyarrow', which is not installed. Install it with: pip install pyarrow, or "
            "save the table as .csv"
        ) from error
    try:
        columns = pyarrow.parquet.read_table(table).to_pydict()
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are one of these
        raise UsageError(f"'{table}' cannot be read as parquet ({error})") from error
    for name, values in columns.items():
        if name.strip().lower() in PATH_COLUMNS and any(not isinstance(v, (str, type(None))) for v in values):
            raise UsageError(
                f"the column '{name}' of '{table}' holds no paths. Images in the table itself: hfds/FOLDER"
            )
    rows = zip(*columns.values(), strict=True)
    return list(columns), ((f"row {n} of '{table}'", [_text(v) for v in row]) for n, row in enumerate(rows, 1))


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _check_paths(table: str, folder: str, rows: list[Row]) -> None:
    """Raises UsageError for an image that is named twice, and for files that are not there."""
    seen: dict[str, str] = {}
    for row in rows:
        path = os.path.normpath(row.path)
        if path in seen:
            raise UsageError(f"{row.place} names '{row.path}' again, after {seen[path]}. Leave one of them out")
        seen[path] = row.place
    missing = [row for row in rows if not os.path.isfile(os.path.join(folder, row.path))]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(rows)} files that '{table}' names do not exist, '{missing[0].path}' first "
            f"({missing[0].place}). Paths are relative to the folder of the table, '{Path(folder) if folder else '.'}'"
        )
