"""A bench as tables: for the terminal, and as Markdown for a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich import box
from rich.table import Table

from ssod_edge.bench.compare import Comparison
from ssod_edge.bench.environment import busy_warning, describe_cores
from ssod_edge.bench.latency import STAGES
from ssod_edge.terminal import Screen, printable

Row = dict[str, Any]
DASH = "-"
#: Title of the second table.
DEPLOYMENT = "At each artifact's own threshold, with 95% intervals"


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
    ]
    kept = [c for c in found if c.title == "p90 ms" or any(c.text(row) != DASH for row in rows)]
    if any(row["status"] != "ok" for row in rows):
        kept.append(Column("status", lambda row: str(row["status"]), left=True))
    return kept


def deployment_columns(rows: list[Row]) -> list[Column]:
    """The columns of a second table, for rows with a threshold and labelled images: what it does, with intervals."""
    sets = dict.fromkeys(name for row in rows for name in row["deployment"]["ood"])
    return [
        Column("artifact", lambda row: str(row["artifact"]), left=True),
        Column("known accepted %", lambda row: _interval(row["deployment"], "id_tpr")),
        Column("selective accuracy %", lambda row: _interval(row["deployment"], "selective_accuracy")),
        Column("AURC %", lambda row: _percent(row["deployment"]["aurc"])),
        *(Column(f"{name} accepted %", partial(_accepted, name)) for name in sets),
        Column("most rejected class %", _most_rejected),
    ]


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
    lines.append(f"{cpu['model']}, {describe_cores(cpu)}, threads {threads or 'chosen by each engine'}")
    lines.append(f"queries: {record['method']['images']}; latency from the encoded image to the verdict")
    lines.append(_data(record["data"]))
    warning = busy_warning(record["environment"])
    return [*lines, warning] if warning else lines


def print_record(record: dict[str, Any], console: Screen) -> None:
    """The table, the stages and the notes."""
    rows = record["rows"]
    console.print(_table(title(record), columns(rows), rows))
    if any(row["stages_ms"] for row in rows):
        console.print(_stages(rows))
    if deployed := [row for row in rows if row["deployment"]]:
        console.print(_table(DEPLOYMENT, deployment_columns(deployed), deployed))
    for line in notes(record):
        console.print(line, soft_wrap=True)


def markdown(record: dict[str, Any]) -> str:
    """The table and the command that reproduces it, as Markdown."""
    rows = record["rows"]
    lines = [f"**{title(record)}**", "", *_markdown_table(columns(rows), rows), ""]
    if deployed := [row for row in rows if row["deployment"]]:
        lines += [f"{DEPLOYMENT}:", "", *_markdown_table(deployment_columns(deployed), deployed), ""]
    lines += [*(f"- {_cell(line)}" for line in notes(record)), f"- `{printable(record['command'])}`"]
    return "\n".join(lines) + "\n"


def _markdown_table(used: list[Column], rows: list[Row]) -> list[str]:
    return [
        "| " + " | ".join(_cell(column.title) for column in used) + " |",
        "|" + "|".join("---" if column.left else "---:" for column in used) + "|",
        *("| " + " | ".join(_cell(column.text(row)) for column in used) + " |" for row in rows),
    ]


def print_comparison(comparison: Comparison, console: Screen) -> None:
    """What moved, or that nothing did."""
    for note in comparison.notes:
        console.print(f"note: {note}", soft_wrap=True)
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
        table.add_row(change.artifact, change.figure, *values, share, noise)
    console.print(table)


def _table(title: str, used: list[Column], rows: list[Row]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for column in used:
        heading = column.title if column.left else column.title.replace(" ", "\n", 1)
        table.add_column(heading, justify="left" if column.left else "right", no_wrap=column.left)
    for row in rows:
        style = None if row["status"] == "ok" else "red" if row["status"] == "failed" else "dim"
        table.add_row(*(column.text(row) for column in used), style=style)
    return table


def _stages(rows: list[Row]) -> Table:
    table = Table(title="Medians of the stages, ms", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("artifact", no_wrap=True)
    for name in (*STAGES, "end_to_end"):
        table.add_column(name.replace("_", " "), justify="right")
    for row in (row for row in rows if row["stages_ms"]):
        table.add_row(row["artifact"], *(_stage(row, name) for name in (*STAGES, "end_to_end")))
    return table


def _interval(figures: dict[str, Any], key: str) -> str:
    if figures[key] is None:
        return DASH
    low, high = figures[f"{key}_ci"]
    return f"{100 * figures[key]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _accepted(name: str, row: Row) -> str:
    found = row["deployment"]["ood"].get(name)
    return DASH if found is None else _interval(found, "false_accept")


def _most_rejected(row: Row) -> str:
    rates = {name: found["rate"] for name, found in row["deployment"]["rejected_by_class"].items() if found["n"]}
    worst = max(rates, key=lambda name: rates[name])
    return f"{worst} {100 * rates[worst]:.1f}"


def _data(data: dict[str, Any]) -> str:
    if data["id"] is None:
        return f"no accuracy: {data['note'] or 'no in-distribution images'}"
    sets = [data["id"], *data["ood"].values()]
    names = [f"{entry['n']} of {entry['data']}" for entry in sets]
    unreadable = sum(len(entry["unreadable"]) for entry in sets)
    text = f"accuracy ({data['protocol']}): ID {names[0]}"
    text += f"; OOD {', '.join(names[1:])}" if names[1:] else "; no OOD images (--ood NAME=DATA)"
    text += f"; agreement and flips against {data['reference']}" if data.get("reference") else ""
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
    return printable(text.replace("\n", " ")).replace("|", "\\|")
