"""The choice of `export --score auto`: the best score on held-out images and images made from them, at little cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ssod_edge.config import (
    AUTO_SCORE,
    DEFAULT_SCORE,
    DETECTORS,
    NEED_OOD_ROW,
    PRIOR_SCORE,
    SCORES,
    UNTOUCHED_SCORE,
    DetectorName,
    prior_score,
    score_parts,
)
from ssod_edge.data.images import LEAST_IMAGES
from ssod_edge.detect.detectors import Array, Detector
from ssod_edge.detect.fit import FitData, Labels, fit
from ssod_edge.detect.metrics import detection_metrics
from ssod_edge.detect.sums import FittedScore, Outputs, held_out_scores, standards, sum_of
from ssod_edge.errors import UsageError

#: What a score may add to the network's multiply-adds, as a share.
MOST_COST = 0.01
#: A kind that is not made: held-out images that the network gets wrong. Made images are far from the known classes;
#: these are what comes closest to a class that looks like one of them (docs/lab/detection.md).
MISTAKEN = "mistaken"
#: Fewer of them say nothing.
LEAST_MISTAKES = 20
#: A kind of the other sign: known images as another camera or light would give them, which are to be accepted.
DISTURBED = "disturbed"
#: A kind that is not made: images of a known class, by models that were fitted without it.
LEFT_OUT = "left out"
#: Parts of the sums that are candidates: one that the logits are in (ViM's energy, too) and one distance, and the OOD
#: row where it was trained.
LOGIT_PARTS = ("gen", "energy", "maxlogit", "vim")
DISTANCES = ("mahalanobispp", "rmdpp", "knn", "vim", "residual", "mahalanobis", "rmd")
#: Candidates whose regret is this near to the least are level: of 2,000 images, a difference of a point is noise.
LEVEL = 0.01
#: Of n held-out images, half of which are made into each kind, a figure has a standard error of about 0.4 / sqrt(n).
#: The worst of some ten regrets is off by more than twice that: the prior gives way to a lead of this / sqrt(n).
LEAD = 1.0
#: A score is chosen without being asked for from so many training images, and so many held-out ones, on: with fewer,
#: chance chooses.
LEAST_UNASKED = 200


def chooses_unasked(outliers: Sequence[str], training: int, choices: int) -> bool:
    """Whether an export that names no score, and has none beside it, chooses one.

    Without made outliers in training nothing is chosen unasked: a network that was taught by its classes alone may give
    unknown images scores so close to the threshold that the best of them by AUROC does not hold there
    (docs/lab/detection.md).
    """
    return bool(outliers) and min(training, choices) >= LEAST_UNASKED


def unasked_score(outliers: Sequence[str], training: int, choices: int, tuned: str = "") -> str:
    """What an export ships that names no score and has none beside it: "auto", or a score by name.

    Args:
        outliers: kinds of made images that the network was trained to reject.
        training: how many training images are at hand.
        choices: how many held-out ones, apart from those of the thresholds.
        tuned: of the run.
    """
    if chooses_unasked(outliers, training, choices):
        return AUTO_SCORE
    return prior_score(tuned) if training >= LEAST_IMAGES and choices else DEFAULT_SCORE


@dataclass(frozen=True)
class Choice:
    """The score that does best.

    Attributes:
        name: see `ssod_edge.config.score_parts`.
        state: what the graph needs to compute it; None for those of the logits.
        rows: the figures of every candidate.
        kinds: that it was measured by.
        mistaken: held-out images that the network gets wrong.
        lead: by how much less the regret of another has to be than that of `prior`.
        prior: what ships without a lead.
    """

    name: str
    state: FittedScore | None
    rows: dict[str, dict[str, Any]]
    kinds: tuple[str, ...]
    mistaken: int
    lead: float
    prior: str


@dataclass(frozen=True)
class Known:
    """Of n known images that no candidate has seen, and that no threshold is fitted to.

    Attributes:
        logits: float32 [n, M].
        labels: int64 [n], -1 where there is none.
        parts: single score -> float32 [n].
        disturbed: single score -> float32 [n], of the images as another camera or light would give them.
        left_out: for each class that was left out, by models that were fitted without it: single score -> float32 [m],
            of images of the others, and single score -> float32 [u], of its own.
    """

    logits: Array
    labels: Labels
    parts: Mapping[str, Array]
    disturbed: Mapping[str, Array]
    left_out: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]] = ()


def choose(
    candidates: Candidates, known: Known, made: Mapping[str, Outputs], network: int, prior: str = PRIOR_SCORE
) -> Choice:
    """The candidate that never does much worse than another, whatever kind of image is shown.

    A candidate's figure on a kind is the mean of its AUROC and the share of the kind that is rejected where 95% of the
    held-out images are accepted: a device runs at the one threshold, and a mean over all of them, which AUROC is, may
    hide what it does. On disturbed known images, which are to be accepted, it is the mean of 1 - AUROC and of the share
    that is. A candidate's regret on a kind is the best figure of a candidate, less its own; the one with the least
    worst regret is taken. A mean over the kinds would let many easy ones outvote the one that goes wrong.

    It is the prior unless another's regret is less by more than chance makes it (`LEAD`), and then, of those that
    are level (`LEVEL`), the one of fewest parts. A candidate that adds more than `MOST_COST` to the network's
    multiply-adds is measured and not taken.

    Args:
        candidates: all of them.
        known: what they are measured on.
        made: kind -> of images that no class describes.
        network: multiply-adds of the network, for one image.
        prior: see `ssod_edge.config.prior_score`.
    """
    scores = candidates.with_sums(known.parts)
    pairs = {kind: [(scores, candidates.scores(*outputs))] for kind, outputs in made.items()}
    right = known.logits.argmax(1) == known.labels
    wrong = ~right & (known.labels >= 0)
    if wrong.sum() >= LEAST_MISTAKES and right.any():
        answered, missed = ({name: values[part] for name, values in scores.items()} for part in (right, wrong))
        pairs[MISTAKEN] = [(answered, missed)]
    for parts in known.left_out:
        without = Candidates(candidates.detectors, parts[0])  # its own mean and deviation of each part
        pairs.setdefault(LEFT_OUT, []).append((without.with_sums(parts[0]), without.with_sums(parts[1])))
    shifted = candidates.with_sums(known.disturbed)
    states = {name: candidates.state(name) for name in scores}
    rows = {name: _measured(name, pairs, scores[name], shifted) for name in scores}
    for name, row in rows.items():
        state = states[name]
        row["cost"] = state.multiply_adds / network if state else 0.0
    lead = max(LEVEL, LEAD / float(np.sqrt(len(right))))
    best = best_of(rows, lead, prior)
    return Choice(best, states[best], rows, (*pairs, DISTURBED), int(wrong.sum()), lead, prior)


def fit_all(data: FitData, fp32_holds: Callable[[Detector], bool], say: Callable[[str], None]) -> dict[str, Detector]:
    """Every detector that can be fitted, and that fp32 holds on held-out images; the others are named."""
    fitted = {}
    for name in DETECTORS:
        try:
            detector = fit(cast(DetectorName, name), data)
            if not fp32_holds(detector):
                raise UsageError("fp32 does not hold it, because the features hardly vary within the classes")
        except UsageError as error:
            say(f"no candidate: {name}: {error}")
        else:
            fitted[name] = detector
    return fitted


def _measured(
    name: str,
    pairs: Mapping[str, list[tuple[dict[str, Array], dict[str, Array]]]],
    known: Array,
    shifted: dict[str, Array],
) -> dict[str, Any]:
    """Of one candidate: `auroc` and `fpr` (at 95% of known images) by kind, their means, `accepted` of disturbed known
    images, and `figures` by kind.
    """
    found = {
        kind: [detection_metrics(inside[name], unknown[name], bootstrap=0) for inside, unknown in sets]
        for kind, sets in pairs.items()
    }
    auroc, fpr = (
        {kind: float(np.mean([metrics[key] for metrics in rows])) for kind, rows in found.items()}
        for key in ("auroc", "fpr_at_id_tpr95")
    )
    figures = {kind: (auroc[kind] + 1 - fpr[kind]) / 2 for kind in found}
    accepted = float(np.mean(shifted[name] <= np.quantile(known, 0.95, method="higher")))
    # As of the other kinds, and turned round: a score that tells disturbed known images apart does wrong.
    figures[DISTURBED] = (1 - detection_metrics(known, shifted[name], bootstrap=0)["auroc"] + accepted) / 2
    mean_auroc, mean_fpr = (float(np.mean(list(values.values()))) for values in (auroc, fpr))
    means = {"mean_auroc": mean_auroc, "mean_fpr": mean_fpr}
    return {"figures": figures, **means, "auroc": auroc, "fpr": fpr, "accepted": accepted}


def best_of(rows: dict[str, dict[str, Any]], lead: float, prior: str = PRIOR_SCORE) -> str:
    """The candidate to take, by its `figures`, its `cost` and its name; every row gets its `regret`, the worst of all
    kinds, and `worst`, that kind.
    """
    allowed = {name: row for name, row in rows.items() if row["cost"] <= MOST_COST}
    best = {
        kind: max(row["figures"][kind] for row in allowed.values()) for kind in next(iter(rows.values()))["figures"]
    }
    for row in rows.values():
        row["worst"] = max(best, key=lambda kind: best[kind] - row["figures"][kind])
        row["regret"] = best[row["worst"]] - row["figures"][row["worst"]]
    least = min(row["regret"] for row in allowed.values())
    if prior in allowed and allowed[prior]["regret"] <= least + lead:
        return prior
    return min(
        (name for name, row in allowed.items() if row["regret"] <= least + LEVEL),
        key=lambda name: (name.count("+"), allowed[name]["regret"], allowed[name]["cost"]),
    )


def single_scores(detectors: Mapping[str, Detector], ood_row: bool) -> tuple[str, ...]:
    """Names of the candidates that are no sums. The default comes first: of scores that are equal it wins.

    Args:
        detectors: of `fit_all`.
        ood_row: whether it was trained; those that read it are candidates only then.
    """
    free = sorted(SCORES, key=lambda name: name != DEFAULT_SCORE)
    return (*(name for name in free if name not in NEED_OOD_ROW or ood_row), *detectors)


class Candidates:
    """Every score that may be chosen: those of the logits, the detectors, and sums of the parts that go together.

    Args:
        detectors: of `fit_all`.
        known: single score (`single_scores`) -> float32 [n], of held-out known images, which parts of sums are
            standardised by.
    """

    def __init__(self, detectors: dict[str, Detector], known: Mapping[str, Array]) -> None:
        self.detectors = detectors
        self.singles = tuple(known)
        self.standards = standards(known)
        pairs: list[tuple[str, ...]] = [(one, other) for one in LOGIT_PARTS for other in DISTANCES if one != other]
        pairs.append(score_parts(UNTOUCHED_SCORE))
        sums = [*pairs, *(("ssod", *rest) for rest in (*((distance,) for distance in DISTANCES), *pairs))]
        usable = {name for name in self.singles if self.standards[name][1] > 0}
        self.sums = {
            "+".join(parts): sum_of("+".join(parts), detectors, self.standards)
            for parts in sums
            if usable.issuperset(parts)
        }

    def scores(self, logits: Array, id_logit: Array, features: Array) -> dict[str, Array]:
        """All of them for n images, float32 [n] each, of their outputs."""
        return self.with_sums(held_out_scores(self.singles, self.detectors, (logits, id_logit, features)))

    def with_sums(self, parts: Mapping[str, Array]) -> dict[str, Array]:
        """Single scores of n images, float32 [n] each, and their sums."""
        return dict(parts) | {name: total.add(parts) for name, total in self.sums.items()}

    def state(self, name: str) -> FittedScore | None:
        """What the graph needs to compute a score; None for those of the logits."""
        return self.sums.get(name) or self.detectors.get(name)
