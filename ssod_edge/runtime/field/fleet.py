"""The monitors of many devices in one table, with a promise about false alarms that holds for all of them together.

A device's test is ever alarmed by in-distribution images with a probability of at most 1%, so that of a hundred devices
one is. Here a device counts as drifted when its evidence reached K times that limit, K being the number of devices: by
Ville's inequality that ever happens to one with a probability of at most 1% / K, and so to any of them with at most 1%.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from rich.table import Table

from ssod_edge.detect.metrics import tpr_interval
from ssod_edge.errors import EXIT_OK, EXIT_SOME_FAILED, ServerError, UsageError
from ssod_edge.files import real_path
from ssod_edge.runtime.field.drift import FALSE_ALARM_RATE, coarse, reference, stability_index
from ssod_edge.runtime.field.monitor import Record, read_monitor
from ssod_edge.runtime.field.scraped import is_served, scrape
from ssod_edge.runtime.field.summary import summary
from ssod_edge.sources import without_secrets
from ssod_edge.terminal import Screen, printable, tell

#: Of a device's own summary, what stands in its row.
ROW: tuple[str, ...] = (
    "artifact",
    "backbone",
    "score",
    "images",
    "failed",
    "unknown",
    "unknown_rate",
    "unknown_rate_ci",
)
ROW += ("expected_unknown_rate", "recent_unknown_rate", "stability_index", "drifted", "alarms")


def device_row(record: Record) -> dict[str, Any]:
    """What the table says of one device: figures of its summary, and `log10_evidence`, the most that there ever was."""
    figures = summary(record)
    return {**{key: figures[key] for key in ROW}, "log10_evidence": record.drift.whole.peak / math.log(10)}


def fleet_summary(
    devices: Mapping[str, Record | Mapping[str, Any]], problems: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What the monitors of several devices say, JSON-ready; rates are shares of 1.

    Args:
        devices: by name, what its file holds, or its `device_row`.
        problems: why nothing is known of others; they count for the limit as if it were.

    Returns:
        `devices`, a row for each, with `fleet_drifted`; `together`, the sums, and where all are files of one artifact
        the stability index of all images; `log10_evidence_limit`; `problems`.
    """
    problems = problems or {}
    limit = math.log10((len(devices) + len(problems)) / FALSE_ALARM_RATE)
    rows = []
    for name, device in devices.items():
        row = device_row(device) if isinstance(device, Record) else device
        rows.append({"device": name, **row, "fleet_drifted": row["log10_evidence"] >= limit})
    images, unknown, failed = (sum(row[key] for row in rows) for key in ("images", "unknown", "failed"))
    together: dict[str, Any] = {
        "devices": len(rows),
        "images": images,
        "failed": failed,
        "unknown": unknown,
        "unknown_rate": unknown / images if images else None,
        "unknown_rate_ci": list(tpr_interval(unknown, images)) if images else None,
        "fleet_drifted": sum(row["fleet_drifted"] for row in rows),
        "stability_index": _index([device for device in devices.values() if isinstance(device, Record)], len(devices)),
    }
    return {
        "devices": rows,
        "together": together,
        "log10_evidence_limit": limit,
        "false_alarm_rate": FALSE_ALARM_RATE,
        "problems": dict(problems),
    }


def _index(records: Sequence[Record], devices: int) -> float | None:
    """The stability index of all images; None unless all devices came as files, of one artifact."""
    if len(records) < devices or len({record.identity for record in records}) != 1:
        return None
    bins = reference(records[0].threshold)
    histogram = np.sum([record.histogram for record in records], axis=0)
    return stability_index(coarse(histogram.tolist(), bins), bins.gaps) if histogram.sum() else None


def run_fleet(places: Sequence[str], as_json: bool) -> int:
    """Print what several monitors say; returns the exit code, which is 1 where a server does not answer.

    Args:
        places: monitor files, and addresses of servers, each with a row for each model that it monitors.

    Raises:
        UsageError: there is no such file, or a place is given twice.
        ArtifactError: a file is damaged, or no monitor file.
        ServerError: no server answers, and there is no file.
        MissingExtraError: see `ssod_edge.runtime.field.scraped.scrape`.
    """
    real = [place if is_served(place) else str(real_path(place)) for place in places]
    if twice := sorted({place for place, path in zip(places, real, strict=True) if real.count(path) > 1}):
        raise UsageError(f"'{without_secrets(twice[0])}' is given twice, and its images would count twice")
    devices: dict[str, Record | Mapping[str, Any]] = {}
    problems: dict[str, str] = {}
    with ThreadPoolExecutor(16) as pool:
        waiting = {place: pool.submit(scrape, place) for place in places if is_served(place)}
    for place in places:
        if place not in waiting:
            devices[place] = read_monitor(place)
            continue
        try:
            devices |= {f"{without_secrets(place)} {model}": row for model, row in waiting[place].result().items()}
        except ServerError as error:
            problems[without_secrets(place)] = str(error)
    if not devices:
        raise ServerError(next(iter(problems.values())))
    found = fleet_summary(devices, problems)
    if as_json:
        tell(json.dumps(found, allow_nan=False))
    else:
        _print(found)
    for problem in problems.values():
        tell(f"error: {problem}", err=True)
    return EXIT_SOME_FAILED if problems else EXIT_OK


def _print(found: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("device", overflow="fold")
    for heading in ("images", "failed", "unknown", "usual", "lately", "PSI", "evidence", "drift"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found["devices"]:
        table.add_row(*_cells(row))
    Screen(wide=200).print(table)
    tell("\n".join(_together(found)))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    word = "DRIFTED" if row["fleet_drifted"] else "alarm" if row["alarms"] else "no"
    index = "-" if row["stability_index"] is None else f"{row['stability_index']:.3f}"
    rates = map(share, (row["unknown_rate"], row["expected_unknown_rate"], row["recent_unknown_rate"]))
    evidence = f"1e{row['log10_evidence']:.1f}"
    return printable(row["device"]), f"{row['images']:,}", f"{row['failed']:,}", *rates, index, evidence, word


def _together(found: dict[str, Any]) -> list[str]:
    all_of, devices = found["together"], found["devices"]
    lines = [f"together   {all_of['devices']:,} devices, {all_of['images']:,} images, {all_of['failed']:,} that failed"]
    if all_of["images"]:
        low, high = all_of["unknown_rate_ci"]
        index = all_of["stability_index"]
        shape = "" if index is None else f"; stability index (PSI) {index:.3f}"
        lines.append(
            f"unknown    {all_of['unknown']:,}: {all_of['unknown_rate']:.2%} ({low:.2%} to {high:.2%}, if the images "
            f"are independent){shape}"
        )
    rate, limit = found["false_alarm_rate"], f"1e{found['log10_evidence_limit']:.1f}"
    lines.append(
        f"drifted    {all_of['fleet_drifted']:,} of {len(devices):,}, whose evidence reached {limit}: of devices that "
        f"see in-distribution images any ever does so with a probability of at most {rate:.0%}. 'alarm' is a device's "
        f"own, which has {rate:.0%} for each device"
    )
    return lines
