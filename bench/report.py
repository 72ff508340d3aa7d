"""A bench as tables: for the terminal, and as Markdown for a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ssod_edge.bench.compare import Comparison
from ssod_edge.bench.environment import busy_warning
from ssod_edge.bench.latency import STAGES

Row = dict[str, Any]
DASH = "-"


@dataclass(frozen=True)
class Column:
    """A column: its heading, and what stands in it for a row of the record."""

    title: str
    text: Callable[[Row], str]
    left: bool = False


def columns(rows: list[Row]) -> list[Column]:
    """The table's columns; those that no row has a figure for are left out, except the headline's."""
    found = [
        Column("artifact", lambda row: str(row["artifact"]), left=True),
        Column("runs in", lambda row: row["precision"] or DASH, left=True),
        Column("p50 ms", lambda row: _latency(row, "p50")),
        Column("p90 ms", lambda row: _latency(row, "p90")),
        Column("p99 ms", lambda row: _latency(row, "p99")),
        Column("compute p50 ms", lambda row: _stage(row, "compute")),
        Column("images/s", lambda row: _number(row["throughput_ips"], 0)),
        Column("size MB", lambda row: _number(row["size_mb"], 1)),
        Column("RSS MB", lambda row: _number(row["rss_mb"], 0)),
        Column("mJ/image", lambda row: _number((row["power"] or {}).get("mj_per_image"), 1)),
        Column("top-1 %", lambda row: _percent(row["top1"])),
        Column("agree %", lambda row: _percent(row["agreement"])),
        Column("AUROC %", lambda row: _percent(row["auroc"])),
        Column("FPR95 %", lambda row: _percent(row["fpr_at_id_tpr95"])),
        Column("flips", lambda row: _number(row["decision_flips"], 0)),
        Column("false accept %", lambda row: _percent(row["false_accept"])),
        Column("false reject %", lambda row: _percent(row["false_reject"])),
    ]
    kept = [c for c in found if c.title == "p90 ms" or any(c.text(row) != DASH for row in rows)]
    if any(row["status"] != "ok" for row in rows):
        kept.append(Column("status", lambda row: str(row["status"]), left=True))
    return kept


def title(record: dict[str, Any]) -> str:
    """What the table is about."""
    export, method = record["export"], record["method"]
    weights = "" if export["trained"] else ", untrained weights"
    quick = ", quick" if method["quick"] else ""
    return f"{export['backbone']} at {export['input_size']} px, batch {method['batch']}{weights}{quick}"


def notes(record: dict[str, Any]) -> list[str]:
    """What a reader must know beside the table: why rows have no figures, the cost of "unknown", the images."""
    lines = [f"{row['artifact']} {row['status']}: {row['error']}" for row in record["rows"] if row["error"]]
    for engine, cost in record["cost_of_unknown"].items():
        if cost is not None:
            repeats = ", ".join(f"{ratio:.3f}" for ratio in cost["repeats"])
            lines.append(
                f"cost of knowing unknown on {engine}: {cost['ratio']:.3f} x the plain classifier "
                f"({cost['fused_ms']:.3f} / {cost['plain_ms']:.3f} ms; repeats {repeats})"
            )
    cpu, threads = record["environment"]["cpu"], record["environment"]["threads"]
    lines.append(f"{cpu['model']}, {cpu['usable_cores']} cores, threads {threads or 'chosen by each engine'}")
    lines.append(f"queries: {record['method']['images']}; latency from the encoded image to the verdict")
    lines.append(_data(record["data"]))
    warning = busy_warning(record["environment"])
    return [*lines, warning] if warning else lines


def print_record(record: dict[str, Any], console: Console) -> None:
    """The table, the stages and the notes."""
    rows = record["rows"]
    table = Table(title=title(record), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for column in columns(rows):
        heading = column.title if column.left else column.title.replace(" ", "\n", 1)
        table.add_column(heading, justify="left" if column.left else "right", no_wrap=column.left)
    for row in rows:
        style = None if row["status"] == "ok" else "red" if row["status"] == "failed" else "dim"
        table.add_row(*(escape(column.text(row)) for column in columns(rows)), style=style)
    console.print(table)
    if any(row["stages_ms"] for row in rows):
        console.print(_stages(rows))
    for line in notes(record):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def markdown(record: dict[str, Any]) -> str:
    """The table and the command that reproduces it, as Markdown."""
    used = columns(record["rows"])
    lines = [
        f"**{title(record)}**",
        "",
        "| " + " | ".join(column.title for column in used) + " |",
        "|" + "|".join("---" if column.left else "---:" for column in used) + "|",
        *("| " + " | ".join(_cell(column.text(row)) for column in used) + " |" for row in record["rows"]),
        "",
        *(f"- {_cell(line)}" for line in notes(record)),
        f"- `{record['command']}`",
    ]
    return "\n".join(lines) + "\n"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """What moved, or that nothing did."""
    for note in comparison.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if not comparison.changes:
        console.print("Nothing moved beyond the noise.")
        return
    table = Table(title="Moved beyond the noise", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for heading in ("artifact", "figure", "old", "new", "change", "noise"):
        table.add_column(heading, justify="left" if heading in ("artifact", "figure") else "right")
    for change in comparison.changes:
        share = f"{change.new / change.old - 1:+.1%}" if change.old else DASH
        values = (f"{value:.4g}" for value in (change.old, change.new))
        noise = f"{change.noise:.2g}" if change.noise > 1e-6 else "0"
        table.add_row(escape(change.artifact), change.figure, *values, share, noise)
    console.print(table)


def _stages(rows: list[Row]) -> Table:
    table = Table(title="Medians of the stages, ms", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("artifact", no_wrap=True)
    for name in (*STAGES, "end_to_end"):
        table.add_column(name.replace("_", " "), justify="right")
    for row in (row for row in rows if row["stages_ms"]):
        table.add_row(escape(row["artifact"]), *(_stage(row, name) for name in (*STAGES, "end_to_end")))
    return table


def _data(data: dict[str, Any]) -> str:
    if data["id"] is None:
        return f"no accuracy: {data['note'] or 'no in-distribution images'}"
    sets = [data["id"], *data["ood"].values()]
    names = [f"{entry['n']} of {entry['data']}" for entry in sets]
    unreadable = sum(len(entry["unreadable"]) for entry in sets)
    text = f"accuracy ({data['protocol']}): ID {names[0]}"
    text += f"; OOD {', '.join(names[1:])}" if names[1:] else "; no OOD images (--ood NAME=DATA)"
    return text + (f"; {unreadable} could not be read" if unreadable else "")


def _latency(row: Row, key: str) -> str:
    return _number((row["latency_ms"] or {}).get(key), 2)


def _stage(row: Row, name: str) -> str:
    return _number(((row["stages_ms"] or {}).get(name) or {}).get("p50"), 2)


def _number(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.2f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
