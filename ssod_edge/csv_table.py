"""Tables as CSV files, for spreadsheets and programs."""

from __future__ import annotations

import codecs
import csv
import fcntl
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from ssod_edge.errors import OutputError, UsageError
from ssod_edge.files import check_output, temporary_parent, write_atomic

#: What a spreadsheet takes for the begin of a formula (https://owasp.org/www-community/attacks/CSV_Injection).
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


class CsvTable(AbstractContextManager["CsvTable"]):
    """A table that takes one row after the other, and appears whole when the block ends, after an interrupt too.

    Text stays as it is, but that no name becomes a formula: one that begins like that gets an apostrophe in front. None
    is an empty cell. The file is UTF-8; bytes of file names that are not come through. Where a name is not plain ASCII
    it begins with a byte order mark, without which Excel would take the letters for others.

    Args:
        path: of the file; an earlier one is replaced.
        header: names of the columns.

    Raises:
        UsageError, OutputError: as `ssod_edge.files.check_output`, before the first row; as `write_atomic`, at the end.
    """

    def __init__(self, path: str | os.PathLike[str], header: Sequence[str]) -> None:
        self._path = check_output(path)
        self._rows = tempfile.TemporaryFile(dir=temporary_parent())  # noqa: SIM115 (closed when the block ends)
        self._ascii = True
        self.add(header)

    def add(self, cells: Sequence[object]) -> None:
        """A row."""
        row = _row(cells)
        self._ascii = self._ascii and row.isascii()
        self._rows.write(row)

    def __exit__(self, *_: object) -> None:
        with self._rows:
            write_atomic(self._path, self._send)

    def _send(self, path: Path) -> None:
        self._rows.seek(0)
        with open(path, "wb") as file:
            file.write(b"" if self._ascii else codecs.BOM_UTF8)
            shutil.copyfileobj(self._rows, file)


class GrowingTable(AbstractContextManager["GrowingTable"]):
    """A table on the disk to which each row is added at once, and a later run goes on with it: a kill loses no row.

    It begins with a byte order mark, since nobody knows the names that will come; else its form is `CsvTable`'s. What a
    kill left of a last row is cut off. One process at a time may write to it.

    Args:
        path: of the file; made if it is not there.
        header: names of the columns.
        plain: for programs alone: a cell that a spreadsheet would take for a formula stays as it is.
        anew: rows that are there go.

    Raises:
        UsageError: the file has other columns, is no table, or another process is writing to it.
        OutputError: it cannot be written; also from `add`.
    """

    def __init__(
        self, path: str | os.PathLike[str], header: Sequence[str], plain: bool = False, anew: bool = False
    ) -> None:
        self._path, self._plain = check_output(path), plain
        try:
            self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 (closed when the block ends)
            try:
                self._begin(list(header), anew)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise self._cannot(error) from error

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def remove(self) -> None:
        """Delete the file, as the last of all."""
        self._path.unlink()

    def _begin(self, header: list[str], anew: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process is writing to '{self._path}'. Wait for it, or name another file"
            ) from None
        except OSError:
            pass  # a file system without locks
        if anew:
            self._file.truncate(0)
        start, end = codecs.BOM_UTF8 + _row(header), _end_of_rows(self._file)
        self._file.seek(0)
        # Where no row is whole, a kill may have left a part of the header.
        ours = next(self._cells(), None) == header if end else start.startswith(self._file.read(len(start)))
        if not ours:
            raise UsageError(
                f"'{self._path}' is no table with these columns, so no rows can be added. Name another file"
            )
        self._file.truncate(end)
        if not end:
            self._write(start)

    def rows(self) -> Iterator[dict[str, str]]:
        """The rows that are there, as text by column; not to be read while rows are added."""
        cells = self._cells()
        header = next(cells)
        for row in cells:
            if len(row) != len(header):
                raise UsageError(f"'{self._path}' has a row of {len(row)} cells, not {len(header)}. Name another file")
            yield dict(zip(header, row, strict=True))

    def add(self, cells: Sequence[object]) -> None:
        """A row, which is on the disk afterwards as far as a kill of this process goes."""
        try:
            self._write(_row(cells, self._plain))
        except OSError as error:
            raise self._cannot(error) from error

    def _write(self, line: bytes) -> None:
        while line:  # of a full disk a part of a row may have fitted
            line = line[self._file.write(line) :]

    def _cells(self) -> Iterator[list[str]]:
        self._file.seek(0)
        text = io.TextIOWrapper(
            io.BufferedReader(self._file), encoding="utf-8-sig", errors="surrogateescape", newline=""
        )
        try:
            yield from csv.reader(text, strict=True)
        except csv.Error as error:
            raise UsageError(f"'{self._path}' is no table ({error}). Name another file") from error
        finally:
            text.detach().detach()

    def _cannot(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write '{self._path}': {error.strerror or error}. Free some space or name another file."
        )


def _end_of_rows(file: BinaryIO) -> int:
    """Where the last whole row of a table ends: behind the last line break that is in no quotes."""
    file.seek(0)
    done = end = quotes = 0
    while block := file.read(1 << 20):
        for match in re.finditer(rb'["\n]', block):
            if match[0] == b'"':
                quotes += 1
            elif quotes % 2 == 0:
                end = done + match.end()
        done += len(block)
    return end


def _row(cells: Sequence[object], plain: bool = False) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(
        cells if plain else [_cell(cell) for cell in cells]
    )  # so that it quotes both
    return f"{line.getvalue().removesuffix(chr(13) + chr(10))}\n".encode(errors="surrogateescape")


def write_csv(path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write a whole table; see `CsvTable`."""
    with CsvTable(path, header) as table:
        for row in rows:
            table.add(row)
    return Path(path)


def path_cell(path: str) -> str:
    """A path that is no formula, and leads to the same file: `./=1.jpg` for `=1.jpg`."""
    return f"./{path}" if path.startswith(FORMULA) else path


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
