"""Tables as Parquet files, for data frames and data bases."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

from ssod_edge.csv_table import GrowingTable
from ssod_edge.errors import UsageError
from ssod_edge.files import check_output, write_atomic
from ssod_edge.names import Names
from ssod_edge.optional import load

#: Rows that are in memory at a time, and in a row group.
_ROWS = 1 << 16
#: What ends the name of the file that rows wait in.
WAITING = ".rows"
#: From the text of a cell to its value, by the column's type; an empty cell is null.
_VALUE: dict[str, Callable[[str], Any]] = {
    "string": lambda text: utf8(text),
    "int64": int,
    "double": float,
    "bool": lambda text: text == "True",
}


class ParquetTable(AbstractContextManager["ParquetTable"]):
    """A table that takes one row after the other; the file is written when the block ends, after an interrupt too.

    Until then each row waits in FILE.rows, beside it, where a kill leaves it for a later run with `resume`.

    Args:
        path: of the file.
        columns: name -> "string", "int64", "double" or "bool"; the first names what a row is about.
        resume: rows of the file, and those that wait, stay. False: they are replaced.

    Raises:
        UsageError: with `resume`, the file has other columns, or is no Parquet file; another process is writing to it.
        MissingExtraError: pyarrow is not installed.
        OutputError: it cannot be written; also from `add`, and at the end, when the rows still wait.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Mapping[str, str], resume: bool = False) -> None:
        self._parquet, self._arrow = load("pyarrow.parquet", "a Parquet file"), load("pyarrow", "a Parquet file")
        self._path, self._columns = check_output(path), columns
        self._schema = arrow_schema(columns)
        self._key = next(iter(columns))
        self._old = self._path if resume and self._path.exists() else None
        self._in_old = Names(row[self._key] for row in self._old_rows([self._key]))
        waiting = f"{os.path.realpath(self._path)}{WAITING}"
        self._waiting = GrowingTable(waiting, list(columns), plain=True, anew=not resume)

    def __exit__(self, *_: object) -> None:
        with self._waiting:
            write_atomic(self._path, self._write)
            self._waiting.remove()

    def add(self, cells: Sequence[object]) -> None:
        """A row."""
        self._waiting.add(cells)

    def rows(self) -> Iterator[dict[str, str]]:
        """The rows that are there, as text by column; not to be read while rows are added."""
        for row in self._old_rows(list(self._columns)):
            yield {name: "" if value is None else str(value) for name, value in row.items()}
        for cells in self._waiting.rows():
            if (name := utf8(cells[self._key])) not in self._in_old:
                yield {**cells, self._key: name}

    def _old_rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        if self._old is None:
            return
        try:
            with self._parquet.ParquetFile(self._old) as file:
                if file.schema_arrow.names != list(self._columns):
                    raise UsageError(
                        f"'{self._path}' is no table with these columns, so no rows can be added. Name another file"
                    )
                for batch in file.iter_batches(_ROWS, columns=columns):
                    yield from batch.to_pylist()
        except (self._arrow.ArrowException, OSError) as error:
            raise UsageError(f"'{self._path}' cannot be read as Parquet ({error}). Name another file") from error

    def _write(self, path: Path) -> None:
        with self._parquet.ParquetWriter(path, self._schema) as writer:
            if self._old is not None:
                with self._parquet.ParquetFile(self._old) as file:
                    for batch in file.iter_batches(_ROWS):
                        writer.write_table(self._arrow.Table.from_batches([batch]).cast(self._schema))
            # A kill may have come between the file and the end of those that waited.
            rows = (row for row in self._waiting.rows() if utf8(row[self._key]) not in self._in_old)
            while chunk := list(islice(rows, _ROWS)):
                values = {
                    name: [None if row[name] == "" else _VALUE[kind](row[name]) for row in chunk]
                    for name, kind in self._columns.items()
                }
                writer.write_table(self._arrow.table(values, schema=self._schema))


def arrow_schema(columns: Mapping[str, str]) -> Any:
    """Arrow's schema of columns as `ParquetTable` takes them; raises MissingExtraError without pyarrow."""
    arrow = load("pyarrow", "a Parquet file")
    kinds = {"string": arrow.string(), "int64": arrow.int64(), "double": arrow.float64(), "bool": arrow.bool_()}
    return arrow.schema([(name, kinds[kind]) for name, kind in columns.items()])


def utf8(text: str) -> str:
    """A text as a Parquet file has it: bytes of a file name that are no UTF-8 are replaced."""
    return text.encode(errors="surrogateescape").decode(errors="replace")
