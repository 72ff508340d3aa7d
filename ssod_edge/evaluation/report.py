"""All of an evaluation on the terminal: what is told apart, what shipping it means, and what the peers cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ssod_edge.data.disturbances import STRENGTHS
from ssod_edge.evaluation.known_report import known_tables
from ssod_edge.evaluation.left_out import WITHOUT_BRANCH, expectation_lines
from ssod_edge.terminal import Screen, printable

Report = Mapping[str, Any]


def print_details(report: Report) -> None:
    """The report of `ssod_edge.evaluation.evaluate.evaluate` as tables; figures in percent, the best score first."""
    console = Screen()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    console.print(
        f"{report['run']}  ({report['backbone']}, {report['input_size']} px, protocol {report['protocol']}: "
        f"{report['equalised']})"
    )
    accuracy = (f"{100 * report['id_accuracy']:.2f}%", "bold")
    console.print(
        Text.assemble("ID accuracy ", accuracy, printable(f" on {report['n_id']} images of {report['id_data']}"))
    )
    for part in known_tables(report):
        say(part) if isinstance(part, str) else console.print(part)
    names = sorted(report["mean"], key=lambda name: -report["mean"][name]["auroc"])
    if names:
        console.print(_detection(report, names))
    else:
        console.print("No OOD set was given; add some with --ood NAME=DATA")
    if "negatives" in report:
        say(negatives_line(report["negatives"]))
    if report["deployment"]:
        console.print(_deployment(report, names or list(report["deployment"])))
        say(_shipped(report))
    if report["shift"]:
        console.print(_shift(report))
        say(_worst_shift(report))
    if "leave_out" in report:
        console.print(left_out_table(report["leave_out"]))
        for line in expected_lines(report["leave_out"]):
            say(line)
    if "baselines" in report:
        console.print(_costs(report, names))
        setup = report["baselines_setup"]
        fitted = f", fitted on {setup['fit_data']}" if setup["fit_data"] else ""
        say(
            f"The network itself: {setup['network_ms_per_image']:.3g} ms an image ({setup['device']}, batches of "
            f"{setup['batch_size']}). + is a detector of {setup['library']}{fitted}"
        )
        for name, cost in report["baselines"].items():
            if cost["error"]:
                say(f"{name} failed: {cost['error']}")
    name = report["default_score"]
    if report["ships"] == "auto":
        say(f"* {name} stands here as long as there is no export: `ssod-edge export` chooses one by held-out images")
    elif report["ships"] != name:
        say(f"* {name} stands here as long as there is no export: `ssod-edge export` would ship {report['ships']}")
    else:
        say(f"* {name}: the score that the run's export ships; without an export, what it would ship by default")
    if names and not report["ood_row_trained"]:
        console.print("`ssod` is constant, and `posterior` ranks as `msp`: the OOD row of this model was not trained")


def _detection(report: Report, names: list[str]) -> Table:
    """A row for each score, a column for each OOD set."""
    table = _table("AUROC % (FPR % at 95% ID accepted), larger AUROC is better", "score")
    for ood in report["ood_data"]:
        table.add_column(ood, justify="right")
    table.add_column("mean", justify="right")
    rows = {(row["ood"], row["score"]): row for row in report["results"]}
    for name in names:
        cells = [*(rows[ood, name] for ood in report["ood_data"]), report["mean"][name]]
        table.add_row(_marked(report, name), *(_both(row) for row in cells))
    return table


def negatives_line(found: Mapping[str, Any]) -> str:
    return (
        f"negatives: {found['held_out']} of '{found['data']}' that were held out; {found['learnt_from']} others were "
        f"learnt from, and {found['chosen_by']} are there to choose a score by"
    )


def _deployment(report: Report, names: list[str]) -> Table:
    """What each score does at its own threshold, without the intervals."""
    threshold = report["deployment"][names[0]]["threshold"]
    title = f"At the threshold for {threshold['target_tpr']:.0%} of {threshold['n']} calibration images, %"
    table = _table(title, "score")
    for title in ("TPR", "sel. acc.", "AURC", "AUGRC", *(f"false accept {ood}" for ood in report["ood_data"])):
        table.add_column(title, justify="right")
    if report["ood_data"]:
        table.add_column("OSCR mean", justify="right")
    for name in names:
        row = report["deployment"][name]
        sets = list(row["ood"].values())
        cells = [*(row[key] for key in ("id_tpr", "selective_accuracy", "aurc", "augrc"))]
        cells += [found["false_accept"] for found in sets]
        if sets:
            cells.append(sum(found["oscr"] for found in sets) / len(sets))
        table.add_row(_marked(report, name), *map(_percent, cells))
    return table


def _shipped(report: Report) -> str:
    """The default score's rates with their intervals, and the three classes that it rejects most."""
    name = report["default_score"]
    row = report["deployment"][name]
    rates = [("ID", row["id_tpr"], row["id_tpr_ci"])]
    rates += [(ood, found["false_accept"], found["false_accept_ci"]) for ood, found in row["ood"].items()]
    accepted = ", ".join(f"{_interval(rate, ci)} of {images}" for images, rate, ci in rates)
    found = row["rejected_by_class"]
    worst = sorted((c for c in found if found[c]["n"]), key=lambda c: -found[c]["rate"])[:3]
    rejected = ", ".join(f"{c} {_interval(found[c]['rate'], found[c]['ci'])}" for c in worst)
    return f"{name} accepts {accepted}; it rejects most of the classes {rejected}"


def _shift(report: Report) -> Table:
    """A row for each kind of shift, and first the same images without one."""
    rows = {(row["kind"], row["strength"]): row for row in report["shift"]}
    first = report["shift"][0]
    title = f"{first['n']} known images, disturbed: accepted at that threshold, and accuracy, %"
    table = _table(title, "kind")
    for strength in STRENGTHS:
        for title in (f"{strength}: accepted", "accuracy"):
            table.add_column(title, justify="right")
    table.add_row(first["kind"], _percent(first["accepted"]), _percent(first["accuracy"]), "", "")
    for kind in dict.fromkeys(kind for kind, _ in [*rows][1:]):
        cells = [rows[kind, strength][key] for strength in STRENGTHS for key in ("accepted", "accuracy")]
        table.add_row(kind, *map(_percent, cells))
    return table


def _worst_shift(report: Report) -> str:
    """The kind of either strength of which the fewest are accepted, and the one that costs most accuracy."""
    accepted, lost = [], []
    for strength in STRENGTHS:
        rows = [row for row in report["shift"] if row["strength"] == strength]
        if rows[0]["accepted"] is not None:
            row = min(rows, key=lambda row: row["accepted"])
            accepted.append(f"{_interval(row['accepted'], row['accepted_ci'])} of {strength} {row['kind']}")
        row = max(rows, key=lambda row: row["accuracy_drop"])
        lost.append(f"{100 * row['accuracy_drop']:.1f} points under {strength} {row['kind']}")
    words = f"Worst: {report['default_score']} accepts {' and '.join(accepted)}; a" if accepted else "Worst: a"
    text = f"{words}ccuracy falls by {' and '.join(lost)}"
    if accepted and (found := report["deployment"][report["default_score"]]["ood"]):
        unknown = ", ".join(f"{_percent(row['false_accept'])}% of {ood}" for ood, row in found.items())
        text += f". At that threshold it accepts {unknown}"
    return text


def left_out_table(found: Report) -> Table:
    """A row for each class that was left out, then their mean and the worst of each column."""
    title = f"Classes left out in turn, by {found['score']} at 95% of the others, %"
    table = _table(title, "class")
    for title in ("images", "AUROC", "accepted"):
        table.add_column(title, justify="right")
    table.add_column("taken for")
    for name, row in found["new_class"].items():
        figures = (_percent(row[key]) for key in ("auroc", "accepted"))
        table.add_row(name, str(row["images"]), *figures, row["taken_for"])
    table.add_section()
    for name in ("mean", "worst"):
        table.add_row(name, "", *(_percent(found[name][key]) for key in ("auroc", "accepted")), "")
    return table


def expected_lines(found: Report) -> list[str]:
    """What to expect in the field, in words."""
    lines = expectation_lines(found)
    if found["other_photos"] is None:
        lines.append(f"expect of other photos: of {found['score']} once there is an export (ssod-edge export)")
    for name, row in (found["other_photos"] or {}).items():
        accepted = "" if row["accepted"] is None else f", {100 * row['accepted']:.0f} of 100 are accepted as known"
        lines.append(f"expect of photos such as '{name}': AUROC {100 * row['auroc']:.0f}{accepted}")
    if found["stand_in"]:
        lines.append(
            "These figures of new classes are a stand-in: the features of this network have learnt every class, that "
            "which is left out too, and find one that is really new less often. To know, train without a class "
            "(DATA@LIST) and give it to eval as --ood"
        )
    if found["without_branch"]:
        lines.append(WITHOUT_BRANCH)
    return lines


def _costs(report: Report, names: list[str]) -> Table:
    """What each detector of the library costs, beside what it brings."""
    table = _table("What the detectors cost", "detector")
    for title in ("AUROC %", "FPR % at 95% ID", "FPR % at 95% OOD", "ms an image", "network again", "MB", "fitted on"):
        table.add_column(title, justify="right")
    costs = report["baselines"]
    working = [name for name in costs if not costs[name]["error"]]
    for name in sorted(working, key=lambda name: names.index(name) if name in names else 0):
        mean = report["mean"].get(name, {})
        cost = costs[name]
        passes = [
            f"{cost[key]} {way}" for key, way in (("forward_passes", "fw"), ("backward_passes", "bw")) if cost[key]
        ]
        carried = " kept" if cost["stored_images"] else ""
        table.add_row(
            f"{name} +",
            *(_percent(mean.get(key)) for key in ("auroc", "fpr_at_id_tpr95", "fpr_at_ood_tpr95")),
            f"{cost['ms_per_image']:.3f}",
            ", ".join(passes) or "-",
            f"{cost['state_mb']:.2f}",
            f"{cost['fit_images']}{carried}" if cost["fit_images"] else "-",
        )
    return table


def _table(title: str, first: str) -> Table:
    """Without lines between its columns, so that eight of them fit on 80 characters."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    return table


def _marked(report: Report, name: str) -> str:
    """A score's name in a table. A sum is "shipped": its own name would leave no room for the figures."""
    if name == report["default_score"]:
        return "shipped *" if "+" in name else f"{name} *"
    return f"{name} +" if name in report.get("baselines", {}) else name


def _both(row: Mapping[str, float]) -> str:
    return f"{100 * row['auroc']:.1f} ({100 * row['fpr_at_id_tpr95']:.1f})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _interval(value: float, ci: tuple[float, float]) -> str:
    return f"{100 * value:.1f}% ({100 * ci[0]:.1f}-{100 * ci[1]:.1f})"
