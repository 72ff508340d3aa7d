"""What an evaluation comes to, on a screen: how many of 100 images are called known, without abbreviations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from ssod_edge.data.disturbances import STRENGTHS
from ssod_edge.detect.classes import pair_line
from ssod_edge.evaluation.known_report import class_table
from ssod_edge.evaluation.report import expected_lines, left_out_table, negatives_line
from ssod_edge.terminal import Screen, printable

Report = Mapping[str, Any]


def print_summary(report: Report) -> None:
    """The report of `ssod_edge.evaluation.evaluate.evaluate` in short; `report.print_details` shows the rest."""
    console = Screen()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    say(
        f"{report['run']}  ({report['backbone']}, {report['input_size']} px, protocol {report['protocol']}: "
        f"{report['equalised']})"
    )
    accuracy = (f"{100 * report['id_accuracy']:.1f} of 100", "bold")
    images = printable(f" of the {report['n_id']} known images get the right class ({report['id_data']})")
    console.print(Text.assemble(accuracy, images), soft_wrap=True)
    console.print(class_table(report["classification"]))
    if line := pair_line(report["classification"]):
        say(printable(line))
    if report["deployment"] or report["ood_data"]:
        console.print(_called_known(report))
        for line in _explained(report):
            say(line)
    if not report["ood_data"]:
        say("No unknown images were given; add some with --ood NAME=DATA")
    if "negatives" in report:
        say(negatives_line(report["negatives"]))
    if "leave_out" in report:
        console.print(left_out_table(report["leave_out"]))
        for line in expected_lines(report["leave_out"]):
            say(line)
    say("--details shows every score, the confusion matrix, the wrong answers and each kind of disturbance")


def _called_known(report: Report) -> Table:
    """A row for known images, one for them in each strength of disturbance, and one for each set of unknown ones."""
    row = _deployed(report, report["default_score"])
    table = Table(title="How many are called known", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("images of", overflow="fold")
    for title in ("number", "of 100", "(95% interval)", "AUROC %"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_row("known classes", str(report["n_id"]), *_of_100(row["id_tpr"], row["id_tpr_ci"]), "")
    for strength in STRENGTHS if report["shift"] and report["deployment"] else ():
        rows = _disturbed(report, strength)
        mean = float(np.mean([found["accepted"] for found in rows]))
        table.add_row(f"the same, disturbed ({strength})", str(rows[0]["n"]), f"{100 * mean:.1f}", "", "")
    auroc = {found["ood"]: found for found in report["results"] if found["score"] == report["default_score"]}
    for name, figure in auroc.items():
        found = row["ood"].get(name, {"false_accept": None, "false_accept_ci": None})
        accepted = _of_100(found["false_accept"], found["false_accept_ci"])
        table.add_row(
            Text(printable(f"unknown: {name}")), str(figure["n_ood"]), *accepted, f"{100 * figure['auroc']:.1f}"
        )
    return table


def _explained(report: Report) -> Iterator[str]:
    """What the figures of the table mean, in sentences."""
    name = report["default_score"]
    if threshold := _deployed(report, name)["threshold"]:
        yield (
            f"Of known images {100 * threshold['target_tpr']:.3g} of 100 were asked for; {threshold['n']} held-out "
            "images set the threshold. Of unknown images fewer are better"
        )
    else:
        yield "There is no threshold, so nothing is called known or unknown: too few held-out images, or none"
    if report["ood_data"]:
        yield "AUROC: how often an unknown image has a higher score than a known one. 50% is guessing, 100% perfect"
        yield from _best_other(report)
    if report["shift"] and report["deployment"]:
        kinds = {
            strength: min(_disturbed(report, strength), key=lambda found: float(found["accepted"]))
            for strength in STRENGTHS
        }
        worst = ", ".join(f"{found['kind']} ({s}: {100 * found['accepted']:.1f})" for s, found in kinds.items())
        count = len(_disturbed(report, STRENGTHS[0]))
        yield f"Disturbed: the mean over {count} kinds of light, blur, noise and the like; worst: {worst}"
    if report["ships"] == name:
        yield f"The score is {name}: what the export ships, or would ship by default"
    else:
        yield f"The score is {name} as long as there is no export. `ssod-edge export` would " + (
            "choose one by held-out images" if report["ships"] == "auto" else f"ship {report['ships']}"
        )


def _deployed(report: Report, name: str) -> Mapping[str, Any]:
    """What a score does at its threshold; of a report without thresholds, the same shape without figures."""
    nothing: dict[str, Any] = {"threshold": None, "id_tpr": None, "id_tpr_ci": None, "ood": {}}
    found: Mapping[str, Any] = (report["deployment"] or {}).get(name, nothing)
    return found


def _best_other(report: Report) -> Iterator[str]:
    """The best of the scores that cost nothing, beside the one that ships."""
    own = report["default_score"]
    deployed = report["deployment"] or {}
    names = [n for n in report["mean"] if n != own and n in deployed and n not in report.get("baselines", {})]
    if names:
        best = max(names, key=lambda n: float(report["mean"][n]["auroc"]))
        accepted = ", ".join(
            f"{100 * found['false_accept']:.1f} of {printable(ood)}"
            for ood, found in report["deployment"][best]["ood"].items()
        )
        yield f"The best score that needs no fitting, {best}, would call {accepted} known"


def _disturbed(report: Report, strength: str) -> list[Mapping[str, Any]]:
    return [row for row in report["shift"] if row["strength"] == strength]


def _of_100(rate: float | None, ci: tuple[float, float] | None) -> tuple[str, str]:
    if rate is None or ci is None:
        return "-", ""
    return f"{100 * rate:.1f}", f"{100 * ci[0]:.1f}-{100 * ci[1]:.1f}"
