"""The `monitor` command: what a monitor file says."""

from __future__ import annotations

import json
import math
from typing import Any

import click
import numpy as np

from ssod_edge.detect.metrics import tpr_interval
from ssod_edge.errors import EXIT_OK
from ssod_edge.runtime.field.drift import FALSE_ALARM_RATE, coarse, log_evidence, quantiles, reference, stability_index
from ssod_edge.runtime.field.monitor import Record, read_monitor
from ssod_edge.terminal import printable, tell

#: Quantiles that are shown.
_SHOWN = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def summary(record: Record) -> dict[str, Any]:
    """What a monitor file says, JSON-ready; rates are shares of 1."""
    bins, state = reference(record.threshold), record.drift
    n, weight = record.images, sum(state.recent[-1])
    found = None
    if record.lowest is not None and record.highest is not None:
        found = quantiles(record.histogram, record.lowest, record.highest, bins, _SHOWN)
    id_ends = np.interp(_SHOWN, np.cumsum(bins.id_shares)[:-1], bins.edges).tolist()
    return {
        "artifact": record.artifact,
        "backbone": record.backbone,
        "score": record.score,
        "threshold": record.threshold.value,
        "id_images": record.threshold.n,
        "images": n,
        "failed": record.failed,
        "interruptions": record.interruptions,
        "unknown": record.unknown,
        "unknown_rate": record.unknown / n if n else None,
        "unknown_rate_ci": list(tpr_interval(record.unknown, n)) if n else None,
        "expected_unknown_rate": 1 - record.threshold.target_tpr,
        "recent_images": weight,
        "recent_unknown_rate": state.recent_unknown / weight if weight else None,
        "min": record.lowest,
        "max": record.highest,
        "quantiles": None if found is None else dict(zip(map(str, _SHOWN), found, strict=True)),
        "id_quantiles": dict(zip(map(str, _SHOWN), id_ends, strict=True)),
        "stability_index": stability_index(coarse(record.histogram, bins), bins.gaps) if n else None,
        "recent_stability_index": stability_index(state.recent[-1], bins.gaps) if n else None,
        "drifted": state.drifted,
        "alarms": state.alarms,
        "alarm_at": state.alarm_at,
        "evidence": math.exp(log_evidence(state)),
        "evidence_peak": math.exp(state.peak),
        "evidence_limit": 1 / FALSE_ALARM_RATE,
        "evidence_images": state.images,
    }


def run_monitor(path: str, as_json: bool) -> int:
    """Print the summary of a monitor file; returns the exit code.

    Raises:
        UsageError: there is no such file.
        ArtifactError: it is damaged, or no monitor file.
    """
    figures = summary(read_monitor(path))
    if as_json:
        tell(json.dumps(figures, allow_nan=False))
    else:  # with a colour; what is from outside is printable
        click.echo("\n".join(_lines(figures)))
    return EXIT_OK


def _lines(figures: dict[str, Any]) -> list[str]:
    head = f"{printable(figures['artifact'])} of {printable(figures['backbone'])}, score {printable(figures['score'])}"
    lines = [f"{head}, against {figures['id_images']:,} in-distribution images"]
    times = (
        f"; a camera or stream was interrupted {figures['interruptions']:,} times" if figures["interruptions"] else ""
    )
    lines.append(f"images     {figures['images']:,}, and {figures['failed']:,} that failed{times}")
    if not figures["images"]:
        return lines
    low, high = figures["unknown_rate_ci"]
    usual = f"{figures['expected_unknown_rate']:.2%} would be usual"
    lines.append(
        f"unknown    {figures['unknown']:,}: {figures['unknown_rate']:.2%} ({low:.2%} to {high:.2%}, if the images are "
        f"independent); of the last {figures['recent_images']:.0f} or so {figures['recent_unknown_rate']:.2%}; {usual}"
    )
    columns = ["min", *(f"{100 * at:g}%" for at in _SHOWN), "max"]
    ends = [figures["min"], *figures["quantiles"].values(), figures["max"]]
    usual_ends = ["", *(f"{value:.3f}" for value in figures["id_quantiles"].values()), ""]
    lines.append("ood score  " + "".join(f"{name:>9}" for name in columns))
    lines.append("  here     " + "".join(f"{value:9.3f}" for value in ends))
    lines.append("  usual    " + "".join(f"{value:>9}" for value in usual_ends).rstrip())
    index = f"{figures['stability_index']:.3f}, lately {figures['recent_stability_index']:.3f}"
    lines.append(f"stability index (PSI) {index}; from 0.25 on a shift counts as large")
    return [*lines, _drift_line(figures)]


def _drift_line(figures: dict[str, Any]) -> str:
    word = click.style("DRIFTED", "yellow") if figures["drifted"] else click.style("no drift", "green")
    times = f"{figures['alarms']} time{'s' if figures['alarms'] > 1 else ''}"
    alarms = f"; so far {times}, last from image {figures['alarm_at']:,} on" if figures["alarms"] else ""
    evidence = f"evidence {figures['evidence']:.3g}, at most {figures['evidence_peak']:.3g}"
    if figures["alarms"]:
        evidence += f", of the {figures['evidence_images']:,} images since it last reached its limit and began anew"
    rate = 1 / figures["evidence_limit"]
    return (
        f"{word}{alarms}; {evidence}, an alarm is raised at {figures['evidence_limit']:g}: that ever happens to "
        f"in-distribution images with a probability of at most {rate:.0%}, however long one looks"
    )
