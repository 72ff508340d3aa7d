"""The terminal's view of the known images: each class, what it is taken for, and the most confident mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ssod_edge.detect.classes import class_lines
from ssod_edge.detect.confidence import explain_p_known
from ssod_edge.terminal import printable

#: Classes in the table of classes, the worst first, and in the confusion matrix; mistakes that are listed.
MOST_CLASSES, MOST_IN_MATRIX, MOST_MISTAKES = 20, 12, 10


def known_tables(report: Mapping[str, Any]) -> Iterator[Table | str]:
    """Tables, and lines of text, of the parts `classification` and `deployment` of a report."""
    found = report["classification"]
    yield class_table(found)
    if found["confusion"] is not None and len(found["by_class"]) <= MOST_IN_MATRIX:
        yield _matrix(found)
    yield from map(printable, class_lines(found))
    if found["mistakes"]:
        yield _mistakes(found["mistakes"])
        if found["mistakes"][0]["p_known"] is not None:
            yield explain_p_known(report["deployment"][report["default_score"]]["threshold"]["target_tpr"])


def class_table(found: Mapping[str, Any]) -> Table:
    """A row for each class, that of the lowest F1 first."""
    rows = sorted(found["by_class"].items(), key=lambda item: 2 if item[1]["f1"] is None else item[1]["f1"])
    shown = "" if len(rows) <= MOST_CLASSES else f", the worst {MOST_CLASSES} of {len(rows)}"
    table = _table(f"Known classes{shown}, %", "class")
    for title in ("images", "recall", "precision", "F1"):
        table.add_column(title, justify="right")
    table.add_column("most often taken for", overflow="fold")
    taken_for: dict[str, str] = {}
    for pair in found["confused"]:
        taken_for.setdefault(pair["label"], f"{pair['class_name']} ({pair['n']})")
    for name, row in rows[:MOST_CLASSES]:
        figures = (_percent(row[key]) for key in ("recall", "precision", "f1"))
        table.add_row(_name(name), str(row["n"]), *figures, _name(taken_for.get(name, "")))
    return table


def _matrix(found: Mapping[str, Any]) -> Table:
    """A row for each class, a column for each answer; the columns are numbered as the rows are."""
    table = _table("Confusion matrix: images of the class of a row that got the class of a column", "class")
    names = list(found["by_class"])
    for number in range(1, len(names) + 1):
        table.add_column(str(number), justify="right")
    for number, (name, counts) in enumerate(zip(names, found["confusion"], strict=True), 1):
        cells = [
            Text(str(count) if count else ".", "bold" if column == number else "" if count else "dim")
            for column, count in enumerate(counts, 1)
        ]
        table.add_row(_name(f"{number} {name}"), *cells)
    return table


def _mistakes(mistakes: list[Mapping[str, Any]]) -> Table:
    """The first of the list, which are the most confident."""
    shown = "" if len(mistakes) <= MOST_MISTAKES else f" ({MOST_MISTAKES} of {len(mistakes)})"
    table = _table(f"Wrong answers, the most confident first{shown}", "image")
    for title in ("is", "was taken for"):
        table.add_column(title, overflow="fold")
    for title in ("confidence", "ood score", "p known"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict")
    words = {True: "KNOWN", False: "UNKNOWN", None: "-"}
    for row in mistakes[:MOST_MISTAKES]:
        figures = f"{row['confidence']:.1%}", f"{row['ood_score']:.3f}", _percent(row["p_known"])
        table.add_row(*(_name(row[key]) for key in ("image", "label", "class_name")), *figures, words[row["known"]])
    return table


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    return table


def _name(text: str) -> Text:
    """As it is: no markup, and nothing that moves the cursor."""
    return Text(printable(text))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
