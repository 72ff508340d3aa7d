"""The choice of `export --score auto`: the best score on held-out images and images made from them, at little cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ssod_edge.config import DEFAULT_SCORE, DETECTORS, NEED_OOD_ROW, SCORES, DetectorName
from ssod_edge.detect.detectors import Array, Detector
from ssod_edge.detect.fit import FitData, Labels, fit
from ssod_edge.detect.metrics import detection_metrics
from ssod_edge.detect.sums import FittedScore, part_scores, spreads, sum_of
from ssod_edge.errors import UsageError

#: What a network says of n images: logits [n, M], id_logit [n] and features [n, D], all float32.
Outputs = tuple[Array, ...]

#: What a score may add to the network's multiply-adds, as a share.
MOST_COST = 0.01
#: Detectors that are no candidates: they lead on made images and fall behind on classes that were never taught.
NOT_CHOSEN = ("ash", "scale")
#: A kind that is not made: held-out images that the network gets wrong. Made images are far from the known classes;
#: these are what comes closest to a class that looks like one of them (docs/detection.md).
MISTAKEN = "mistaken"
#: Fewer of them say nothing.
LEAST_MISTAKES = 20
#: Parts of the sums that are candidates: one score of each family, two or more of them together.
PARTS = ("ssod", "energy", "knn", "vim", "mahalanobis", "rmd")
#: Candidates whose figure is this near to the best are level: of 2,000 images, a difference of a point is noise.
LEVEL = 0.01
#: A score is chosen without being asked for from so many training images, and so many held-out ones, on: with fewer,
#: chance chooses.
LEAST_UNASKED = 200


def chooses_unasked(outliers: Sequence[str], training: int, choices: int) -> bool:
    """Whether an export that names no score, and has none beside it, chooses one.

    Without made outliers in training nothing is chosen unasked: a network that was taught by its classes alone may give
    unknown images scores so close to the threshold that the best of them by AUROC does not hold there
    (docs/detection.md).
    """
    return bool(outliers) and min(training, choices) >= LEAST_UNASKED


@dataclass(frozen=True)
class Choice:
    """The score that does best.

    Attributes:
        name: see `ssod_edge.config.score_parts`.
        state: what the graph needs to compute it; None for those of the logits.
        rows: the figures of every candidate.
        kinds: that it was measured by.
        mistaken: held-out images that the network gets wrong.
    """

    name: str
    state: FittedScore | None
    rows: dict[str, dict[str, Any]]
    kinds: tuple[str, ...]
    mistaken: int


def choose(candidates: Candidates, known: Outputs, labels: Labels, made: Mapping[str, Outputs], network: int) -> Choice:
    """The candidate that does best over the kinds of images that no class describes.

    What counts is AUROC and the share of them that is rejected where 95% of the held-out images are accepted, half
    each: a device runs at the one threshold, and a mean over all of them, which AUROC is, may hide what it does.

    A candidate that adds more than `MOST_COST` to the network's multiply-adds is measured and not taken. Of those that
    are level (`LEVEL`) the sum of most parts wins: what one part does not see in images that nobody made, another may.

    Args:
        candidates: all of them.
        known: of in-distribution images that were not trained on, and that no threshold is fitted to.
        labels: int64 [n], their classes, -1 where there is none.
        made: kind -> of images made from them.
        network: multiply-adds of the network, for one image.
    """
    scores = candidates.scores(*known)
    pairs = {kind: (scores, candidates.scores(*outputs)) for kind, outputs in made.items()}
    right = known[0].argmax(1) == labels
    wrong = ~right & (labels >= 0)
    if wrong.sum() >= LEAST_MISTAKES and right.any():
        answered, missed = ({name: values[part] for name, values in scores.items()} for part in (right, wrong))
        pairs[MISTAKEN] = answered, missed
    states = {name: candidates.state(name) for name in scores}
    costs = {name: state.multiply_adds / network if state else 0.0 for name, state in states.items()}
    rows = {name: {**_figures(name, pairs), "cost": costs[name]} for name in scores}
    best = _best(rows)
    return Choice(best, states[best], rows, tuple(pairs), int(wrong.sum()))


def fit_all(data: FitData, fp32_holds: Callable[[Detector], bool], say: Callable[[str], None]) -> dict[str, Detector]:
    """Every detector that can be fitted, and that fp32 holds on held-out images; the others are named."""
    fitted = {}
    for name in (name for name in DETECTORS if name not in NOT_CHOSEN):
        try:
            detector = fit(cast(DetectorName, name), data)
            if not fp32_holds(detector):
                raise UsageError("fp32 does not hold it, because the features hardly vary within the classes")
        except UsageError as error:
            say(f"no candidate: {name}: {error}")
        else:
            fitted[name] = detector
    return fitted


def _figures(name: str, pairs: dict[str, tuple[dict[str, Array], dict[str, Array]]]) -> dict[str, Any]:
    """Of one candidate: `auroc` and `fpr` (at 95% of known images) by kind, their means, and `figure`, to choose by."""
    found = {
        kind: detection_metrics(known[name], unknown[name], bootstrap=0) for kind, (known, unknown) in pairs.items()
    }
    auroc = {kind: metrics["auroc"] for kind, metrics in found.items()}
    fpr = {kind: metrics["fpr_at_id_tpr95"] for kind, metrics in found.items()}
    mean_auroc, mean_fpr = (float(np.mean(list(values.values()))) for values in (auroc, fpr))
    figure = (mean_auroc + 1 - mean_fpr) / 2
    return {"figure": figure, "mean_auroc": mean_auroc, "mean_fpr": mean_fpr, "auroc": auroc, "fpr": fpr}


def _best(rows: dict[str, dict[str, Any]]) -> str:
    """The candidate to take, by its `figure`, its `cost` and the parts in its name."""
    allowed = {name: row for name, row in rows.items() if row["cost"] <= MOST_COST}
    level = max(row["figure"] for row in allowed.values()) - LEVEL
    return max(
        (name for name, row in allowed.items() if row["figure"] >= level),
        key=lambda name: (name.count("+"), allowed[name]["figure"], -allowed[name]["cost"]),
    )


class Candidates:
    """Every score that may be chosen: those of the logits, the detectors, and the sums of `PARTS`.

    The default comes first: of single scores that are equal it wins.

    Args:
        detectors: of `fit_all`.
        data: what they were fitted on.
        ood_row: whether it was trained; those that read it are candidates only then.
    """

    def __init__(self, detectors: dict[str, Detector], data: FitData, ood_row: bool) -> None:
        free = sorted(SCORES, key=lambda name: name != DEFAULT_SCORE)
        free = [name for name in free if name not in NEED_OOD_ROW or ood_row]
        self.detectors = detectors
        self.singles = (*free, *detectors)
        self.spread = spreads(self.singles, detectors, data)
        parts = [name for name in PARTS if name in self.singles and self.spread[name] > 0]
        self.sums = {
            "+".join(names): names
            for count in range(2, len(parts) + 1)
            for names in itertools.combinations(parts, count)
        }

    def scores(self, logits: Array, id_logit: Array, features: Array) -> dict[str, Array]:
        """All of them for n images, float32 [n] each, of their outputs."""
        found = part_scores(self.singles, self.detectors, features, logits, id_logit)
        for name, parts in self.sums.items():
            total = sum(found[part].astype(np.float64) / self.spread[part] for part in parts)
            found[name] = np.asarray(total, np.float32)
        return found

    def state(self, name: str) -> FittedScore | None:
        """What the graph needs to compute a score; None for those of the logits."""
        return sum_of(name, self.detectors, self.spread) if name in self.sums else self.detectors.get(name)
