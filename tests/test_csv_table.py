"""Tables that spreadsheets and programs read: names as they are, no formulas, whole or not at all."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ssod_edge.csv_table import CsvTable, path_cell, write_csv
from ssod_edge.errors import UsageError

HEBREW = "\u05d7\u05ea\u05d5\u05dc"


def read(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_names_come_back_as_they_are(tmp_path: Path) -> None:
    names = ["<b>bold</b>", 'say "cat", or', "two\nlines", HEBREW, "a;b", "\udcff.jpg", " =1", "[red]", "it's"]
    write_csv(tmp_path / "table.csv", ("name", "n"), [(name, number) for number, name in enumerate(names)])
    assert read(tmp_path / "table.csv") == [["name", "n"], *([name, str(n)] for n, name in enumerate(names))]


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1"])
def test_a_name_never_becomes_a_formula(tmp_path: Path, name: str) -> None:
    write_csv(tmp_path / "table.csv", ("name", "score", path_cell(name)), [(name, -1.5, path_cell(name))])
    first, row = read(tmp_path / "table.csv")
    assert row == [f"'{name}", "-1.5", f"./{name}"], "a number below 0 stays one"
    assert first[2] == f"./{name}"


def test_only_what_is_not_ascii_has_a_byte_order_mark(tmp_path: Path) -> None:
    write_csv(tmp_path / "plain.csv", ("name",), [("cat",)])
    write_csv(tmp_path / "other.csv", ("name",), [(HEBREW,)])
    assert (tmp_path / "plain.csv").read_bytes() == b"name\ncat\n"
    assert (tmp_path / "other.csv").read_bytes() == b"\xef\xbb\xbfname\n" + HEBREW.encode() + b"\n"


def test_none_is_an_empty_cell(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", ("a", "b", "c"), [(None, True, 0.25)])
    assert read(tmp_path / "table.csv")[1] == ["", "True", "0.25"]


def test_an_interrupt_leaves_the_rows_that_are_done(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("earlier")
    with pytest.raises(KeyboardInterrupt), CsvTable(path, ("n",)) as table:
        table.add([1])
        assert path.read_text() == "earlier", "it appears whole"
        raise KeyboardInterrupt
    assert read(path) == [["n"], ["1"]]


def test_a_file_that_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is a folder"):
        CsvTable(tmp_path, ("n",))
