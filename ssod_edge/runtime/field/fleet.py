"""The monitors of many devices in one table, with a promise about false alarms that holds for all of them together.

A device's test is ever alarmed by in-distribution images with a probability of at most 1%, so that of a hundred devices
one is. Here a device counts as drifted when its evidence reached K times that limit, K being the number of devices: by
Ville's inequality that ever happens to one with a probability of at most 1% / K, and so to any of them with at most 1%.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from ssod_edge.detect.metrics import tpr_interval
from ssod_edge.errors import EXIT_OK, UsageError
from ssod_edge.files import real_path
from ssod_edge.runtime.field.drift import FALSE_ALARM_RATE, coarse, reference, stability_index
from ssod_edge.runtime.field.monitor import Record, read_monitor
from ssod_edge.runtime.field.summary import summary
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


def fleet_summary(records: Mapping[str, Record]) -> dict[str, Any]:
    """What several monitor files say, JSON-ready; rates are shares of 1.

    Args:
        records: by the name of the device.

    Returns:
        `devices`, a row for each, with `log10_evidence` (the most that there ever was) and `fleet_drifted`; `together`,
        the sums, and where all monitors are of one artifact the stability index of all images; `log10_evidence_limit`.
    """
    limit = math.log(len(records) / FALSE_ALARM_RATE)
    devices = []
    for name, record in records.items():
        figures = summary(record)
        peak = record.drift.whole.peak
        row = {"device": name, **{key: figures[key] for key in ROW}}
        devices.append({**row, "log10_evidence": peak / math.log(10), "fleet_drifted": peak >= limit})
    images, unknown, failed = (sum(row[key] for row in devices) for key in ("images", "unknown", "failed"))
    together: dict[str, Any] = {
        "devices": len(devices),
        "images": images,
        "failed": failed,
        "unknown": unknown,
        "unknown_rate": unknown / images if images else None,
        "unknown_rate_ci": list(tpr_interval(unknown, images)) if images else None,
        "fleet_drifted": sum(row["fleet_drifted"] for row in devices),
        "stability_index": None,
    }
    first = next(iter(records.values()))
    if images and len({record.identity for record in records.values()}) == 1:
        bins = reference(first.threshold)
        histogram = np.sum([record.histogram for record in records.values()], axis=0)
        together["stability_index"] = stability_index(coarse(histogram.tolist(), bins), bins.gaps)
    return {
        "devices": devices,
        "together": together,
        "log10_evidence_limit": limit / math.log(10),
        "false_alarm_rate": FALSE_ALARM_RATE,
    }


def run_fleet(paths: Sequence[str], as_json: bool) -> int:
    """Print what several monitor files say; returns the exit code.

    Raises:
        UsageError: there is no such file, or one is given twice.
        ArtifactError: one is damaged, or no monitor file.
    """
    real = [real_path(path) for path in paths]
    if twice := sorted({path for path, place in zip(paths, real, strict=True) if real.count(place) > 1}):
        raise UsageError(f"'{twice[0]}' is given twice, and its images would count twice")
    found = fleet_summary({path: read_monitor(path) for path in paths})
    if as_json:
        tell(json.dumps(found, allow_nan=False))
        return EXIT_OK
    table = Table(box=None, pad_edge=False)
    table.add_column("device", overflow="fold")
    for heading in ("images", "failed", "unknown", "usual", "lately", "PSI", "evidence", "drift"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found["devices"]:
        table.add_row(*_cells(row))
    Screen(wide=200).print(table)
    tell("\n".join(_together(found)))
    return EXIT_OK


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
