"""What `export --score auto` prints of its choice."""

from __future__ import annotations

from ssod_edge.config import DEFAULT_SCORE
from ssod_edge.detect.choice import LEVEL, MOST_COST, Choice

#: Rows of the table that is printed; the spec has all of them.
SHOWN = 15


def choice_in_brief(choice: Choice) -> str:
    """The choice in one line."""
    rows, best = choice.rows, choice.name

    def shown(name: str) -> str:
        return f"AUROC {rows[name]['mean_auroc']:.1%}, FPR {rows[name]['mean_fpr']:.1%}"

    text = f"score {best}: {shown(best)} on images made from held-out ones; of disturbed known ones it accepts "
    text += f"{rows[best]['accepted']:.1%}"
    if best != DEFAULT_SCORE:
        text += f" ({DEFAULT_SCORE}: {shown(DEFAULT_SCORE)})"
    return f"{text}; --score auto shows all {len(rows)} candidates, --score NAME takes another"


def choice_table(choice: Choice, images: int, known: str) -> list[str]:
    """The evidence in fixed columns, the best first; of the sums only some.

    Args:
        images: how many held-out images there were.
        known: what they are.
    """
    rows, best, kinds = choice.rows, choice.name, choice.kinds
    width = max(map(len, rows))
    lines = [
        f"choosing a score by {images} images of {known}: the largest regret and its kind; mean AUROC %, and FPR % at "
        "95% TPR; and the figure of each kind, what a score's regret is reckoned from"
    ]
    lines.append(
        f"{'score':<{width}} regret {'by':<9}  AUROC    FPR {' '.join(f'{kind:>9}' for kind in kinds)}    cost"
    )
    ranked = sorted(rows, key=lambda name: float(rows[name]["regret"]))
    for place, name in enumerate(ranked):
        if place >= SHOWN and "+" in name and name != best:
            continue
        row = rows[name]
        cells = [f"{100 * row['regret']:6.1f} {row['worst']:<9}"]
        cells += [f"{100 * row[key]:6.1f}" for key in ("mean_auroc", "mean_fpr")]
        cells += [f"{100 * row['figures'][kind]:9.1f}" for kind in kinds]
        note = "  <- shipped" if name == best else "  too costly" if row["cost"] > MOST_COST else ""
        lines.append(f"{name:<{width}} {' '.join(cells)} {row['cost']:7.2%}{note}")
    if len(rows) > len(lines) - 2:
        lines.append(f"{len(rows) - len(lines) + 2} sums below these are in the spec")
    lines.append(
        f"shipped: {choice.prior}, unless the largest regret of another is {100 * choice.lead:.0f} points less; then, "
        f"of those within {100 * LEVEL:.0f} point of the least, the one of fewest parts"
    )
    return lines
