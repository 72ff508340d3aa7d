"""The table of a study: means and deviations over seeds, in numbers and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ssod_edge.config import NEED_OOD_ROW


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds: mean and sample standard deviation (None of one seed) of accuracy and of each score's mean AUROC.

    Args:
        rows: reports of `ssod_edge.evaluation.evaluate.evaluate` with `settings` and `seed`.

    Returns:
        a row for each setting, in the order in which they came first: `settings`, `seeds`, `accuracy`, and `auroc` and
        `fpr_at_id_tpr95` by score; each figure is {"mean", "sd"}, in [0, 1].
    """
    table = []
    for label in dict.fromkeys(row["settings"] for row in rows):
        group = [row for row in rows if row["settings"] == label]
        unread = () if all(row["ood_row_trained"] for row in group) else NEED_OOD_ROW
        scores = [name for name in group[0]["mean"] if all(name in row["mean"] for row in group) and name not in unread]
        table.append(
            {
                "settings": label,
                "seeds": [row["seed"] for row in group],
                "accuracy": _spread([row["id_accuracy"] for row in group]),
                **{
                    key: {name: _spread([row["mean"][name][key] for row in group]) for name in scores}
                    for key in ("auroc", "fpr_at_id_tpr95")
                },
            }
        )
    return table


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def markdown(summary: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]], equalised: str = "") -> str:
    """The table in percent: accuracy, and each score's AUROC (and FPR), a mean over OOD sets, with deviations."""
    scores = list(dict.fromkeys(name for row in summary for name in row["auroc"]))
    lines = ["| " + " | ".join(["settings", "seeds", "accuracy", *scores]) + " |", "|---" * (3 + len(scores)) + "|"]
    for row in summary:
        cells = [row["settings"], str(len(row["seeds"])), _percent(row["accuracy"])]
        for name in scores:
            fpr = row["fpr_at_id_tpr95"].get(name)
            cells.append(_percent(row["auroc"].get(name)) + (f" ({100 * fpr['mean']:.1f})" if fpr else ""))
        lines.append("| " + " | ".join(cells) + " |")
    images = f" {equalised[0].upper()}{equalised[1:]}." if equalised else ""
    lines.append(
        f"\nIn percent: accuracy, and AUROC as a mean over OOD sets; in brackets FPR at 95% of ID accepted.{images}"
    )
    lines += [f"\nfailed: {row['settings']}, seed {row['seed']}: {row['error']}" for row in failed]
    return "\n".join(lines) + "\n"


def _percent(figure: Mapping[str, float | None] | None) -> str:
    if figure is None or figure["mean"] is None:
        return ""
    deviation = f" ± {100 * figure['sd']:.1f}" if figure["sd"] is not None else ""
    return f"{100 * figure['mean']:.1f}{deviation}"
