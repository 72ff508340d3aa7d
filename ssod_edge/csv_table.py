"""Tables as CSV files, for spreadsheets and programs."""

from __future__ import annotations

import codecs
import csv
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

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
        line = io.StringIO()
        csv.writer(line, lineterminator="\r\n").writerow([_cell(cell) for cell in cells])  # so that it quotes both
        text = line.getvalue().removesuffix("\r\n") + "\n"
        self._ascii = self._ascii and text.isascii()
        self._rows.write(text.encode(errors="surrogateescape"))

    def __exit__(self, *_: object) -> None:
        with self._rows:
            write_atomic(self._path, self._send)

    def _send(self, path: Path) -> None:
        self._rows.seek(0)
        with open(path, "wb") as file:
            file.write(b"" if self._ascii else codecs.BOM_UTF8)
            shutil.copyfileobj(self._rows, file)


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
