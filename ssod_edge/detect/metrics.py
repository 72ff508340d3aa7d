"""How well a score tells in-distribution (ID) from out-of-distribution (OOD) images. Larger score = more OOD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from ssod_edge.errors import UsageError
from ssod_edge.spec import Threshold

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_TPR = 0.95

#: Bins of equal probability that `Threshold.id_quantiles` bounds, where there are images enough.
ID_BINS = 100


def detection_metrics(
    id_scores: npt.ArrayLike, ood_scores: npt.ArrayLike, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The detection metrics of one score on one ID set and one OOD set, as JSON-ready values.

    Tied scores are never separated: a threshold takes all of them or none.

    Args:
        id_scores: [n_id], finite, larger = more OOD.
        ood_scores: [n_ood], likewise.
        bootstrap: resamples for the intervals; 0 leaves `ci` empty.
        seed: of the resampling.

    Returns:
        A dict, every rate a fraction in [0, 1]:

        - auroc: P(OOD score > ID score) + P(equal) / 2.
        - aupr_in, aupr_out: average precision with ID (OOD) as the positive class.
        - fpr_at_id_tpr95: share of OOD accepted at the lowest threshold that accepts at least 95% of ID.
        - fpr_at_ood_tpr95: share of ID flagged at the highest threshold that flags at least 95% of OOD.
        - ci: metric -> [low, high], 95% percentile bootstrap, ID and OOD resampled independently.
        - tie_fraction: share of the OOD scores that are exactly equal to some ID score.
        - n_id, n_ood: numbers of images.

    Raises:
        UsageError: a set is empty, not one-dimensional, or holds NaN or infinity.
    """
    ind, ood = _scores(id_scores, "id_scores"), _scores(ood_scores, "ood_scores")
    if bootstrap < 0:
        raise UsageError(f"bootstrap must be 0 or more resamples, got {bootstrap}")
    values, ranks = np.unique(np.concatenate([ind, ood]), return_inverse=True)
    id_ranks, ood_ranks = ranks[: len(ind)], ranks[len(ind) :]
    bins = len(values)
    id_counts, ood_counts = _counts(id_ranks, bins), _counts(ood_ranks, bins)
    result: dict[str, Any] = _detection(id_counts, ood_counts)
    result["ci"] = _bootstrap(id_ranks, ood_ranks, bins, bootstrap, seed)
    result["tie_fraction"] = float(ood_counts[id_counts > 0].sum() / len(ood))
    result["n_id"], result["n_ood"] = len(ind), len(ood)
    return result


def _detection(id_counts: Counts, ood_counts: Counts) -> dict[str, float]:
    """The point metrics from the number of ID and OOD scores at each value of an ascending grid."""
    id_below, ood_below = np.cumsum(id_counts), np.cumsum(ood_counts)
    n_id, n_ood = int(id_below[-1]), int(ood_below[-1])
    at_id = np.searchsorted(id_below, _at_least(_TPR, n_id))
    # Flagged from the top: the highest value at or above which enough OOD scores lie.
    ood_above, id_above = n_ood - ood_below + ood_counts, n_id - id_below + id_counts
    at_ood = len(ood_above) - 1 - np.searchsorted(ood_above[::-1], _at_least(_TPR, n_ood))
    wins = (ood_counts * (id_below - 0.5 * id_counts)).sum()  # no `@`: BLAS threads cost more than they save here
    return {
        "auroc": float(wins / (n_id * n_ood)),
        "aupr_in": _average_precision(id_counts, id_below, ood_below),
        "aupr_out": _average_precision(ood_counts[::-1], ood_above[::-1], id_above[::-1]),
        "fpr_at_id_tpr95": float(ood_below[at_id] / n_ood),
        "fpr_at_ood_tpr95": float(id_above[at_ood] / n_id),
    }


def _average_precision(positives: Counts, true_positives: Counts, false_positives: Counts) -> float:
    """sum_k (R_k - R_{k-1}) P_k over thresholds, the most positive first."""
    taken = np.maximum(true_positives + false_positives, 1)  # a resample may leave the first values unused
    return float((positives * (true_positives / taken)).sum() / true_positives[-1])


def _bootstrap(id_ranks: Counts, ood_ranks: Counts, bins: int, resamples: int, seed: int) -> dict[str, list[float]]:
    """95% intervals. A resample is a histogram over the sorted values, so nothing is sorted again."""
    if resamples == 0:
        return {}
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(resamples):
        id_counts = _counts(id_ranks[rng.integers(0, len(id_ranks), len(id_ranks))], bins)
        ood_counts = _counts(ood_ranks[rng.integers(0, len(ood_ranks), len(ood_ranks))], bins)
        rows.append(_detection(id_counts, ood_counts))
    return {name: np.quantile([row[name] for row in rows], [0.025, 0.975]).tolist() for name in rows[0]}


def _counts(ranks: Counts, bins: int) -> Counts:
    return np.bincount(ranks, minlength=bins)


def _at_least(share: float, n: int) -> int:
    """The smallest count that is at least `share` of n; 0.95 of 20 is 19, whatever the rounding."""
    return math.ceil(round(share * n, 9))


def conformal_threshold(id_scores: npt.ArrayLike, target_tpr: float = 0.95, data: str = "") -> Threshold:
    """The threshold of `known = ood_score <= value` that keeps new ID images known with probability `target_tpr`.

    Split-conformal quantile: the ceil((n + 1) * target_tpr)-th smallest of n held-out ID scores. It holds for
    exchangeable images, on average over calibration sets, without any assumption on the score.

    Args:
        id_scores: [n], of ID images that took no part in training, from the artifact that will use it.
        target_tpr: in (0, 1).
        data: which images these are, for the record.

    Raises:
        UsageError: too few scores for the target (fewer than 19 at 0.95), or NaN or infinity among them.
    """
    scores = _scores(id_scores, "id_scores")
    n = len(scores)
    check_target_tpr(target_tpr, n)
    ordered = np.sort(scores)
    value = float(ordered[threshold_rank(n, target_tpr) - 1])
    quantiles = ordered[quantile_ranks(n, min(ID_BINS, n + 1)) - 1]
    kept = float(np.mean(scores <= value))
    return Threshold(value, target_tpr, n, data, kept, tuple(quantiles.tolist()), float(ordered[-1]))


def threshold_rank(n: int, target_tpr: float) -> int:
    """Which of n ascending scores is the conformal threshold, counted from 1: ceil((n + 1) * target_tpr)."""
    return _at_least(target_tpr, n + 1)


def more_than_chance(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> bool:
    """Whether one of two is right more often than chance gives: of what only one of them gets right, by two deviations.

    McNemar's test (Psychometrika 1947).

    Args:
        one, other: bool of the same shape, whether each answer is right.
    """
    gained, lost = float((one & ~other).sum()), float((other & ~one).sum())
    return gained - lost > 2 * math.sqrt(gained + lost)


def check_target_tpr(target_tpr: float, n: int | None = None) -> None:
    """Find out before the work whether `conformal_threshold` can reach a target.

    Args:
        target_tpr: share of ID images that must stay known.
        n: ID images that there are, if that is known yet.

    Raises:
        UsageError: the target is not in (0, 1), or n images are too few for it.
    """
    if not 0 < target_tpr < 1:
        raise UsageError(f"target_tpr must lie between 0 and 1, got {target_tpr}")
    if n is not None and _at_least(target_tpr, n + 1) > n:
        least = _at_least(target_tpr / (1 - target_tpr), 1)
        raise UsageError(
            f"a threshold at {target_tpr:.4g} true-positive rate needs at least {least} in-distribution images, "
            f"got {n}. Give more with --id DATA, train with a larger --calib-fraction, or lower --tpr."
        )


def quantile_ranks(n: int, bins: int) -> Counts:
    """Ranks, 1 to n, of the scores that divide n ID scores into bins of about the same probability.

    A new ID image's score is at most the r-th smallest of n with probability r / (n + 1).

    Args:
        n: ID scores.
        bins: at least 1, at most n + 1.

    Returns:
        int64 [bins - 1], strictly ascending.
    """
    return np.arange(1, bins, dtype=np.int64) * (n + 1) // bins


def tpr_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate of which k in n were observed.

    Raises:
        UsageError: n < 1, k outside 0..n, or level outside (0, 1).
    """
    if n < 1 or not 0 <= k <= n or not 0 < level < 1:
        raise UsageError(f"tpr_interval: expected 0 <= k <= n, n >= 1, 0 < level < 1, got k={k}, n={n}, level={level}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate, scale = k / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def deployment_metrics(
    id_scores: npt.ArrayLike,
    ood_scores: Mapping[str, npt.ArrayLike],
    threshold: Threshold,
    correct: npt.ArrayLike,
    labels: npt.ArrayLike,
    classes: Sequence[str],
) -> dict[str, Any]:
    """What shipping a score with a threshold means, where `known = score <= threshold`, as JSON-ready values.

    Args:
        id_scores: [n_id], finite, larger = more OOD.
        ood_scores: OOD set -> [n_ood], likewise; may be empty.
        threshold: fitted on other ID images than these.
        correct: bool [n_id], whether the class of each ID image is right.
        labels: int [n_id], true classes.
        classes: the names of classes 0, 1, ...

    Returns:
        - threshold: the fields of `Threshold`.
        - id_tpr (ID images known), false_reject (ID images unknown), selective_accuracy (accuracy over the known ID
          images, None where there are none), each a fraction with its interval by `tpr_interval`, `_ci`.
        - aurc, augrc: as `risk_coverage`, over the ID images.
        - rejected_by_class: class -> {rate, ci, n}, of the ID images that are unknown; None where n is 0.
        - ood: OOD set -> {false_accept (OOD images known), false_accept_ci, oscr}.

    Raises:
        UsageError: as in `detection_metrics`, a threshold that is not finite, `correct` of another length, or labels of
            another length or outside the classes.
    """
    ind = _scores(id_scores, "id_scores")
    if not math.isfinite(threshold.value):
        raise UsageError(f"threshold must be finite, got {threshold.value}")
    known, right = ind <= threshold.value, _flags(correct, len(ind))
    n, accepted = len(known), int(known.sum())
    curve = risk_coverage(ind, right)
    return {
        "threshold": {key: value for key, value in asdict(threshold).items() if not key.startswith("id_")},
        **_share("id_tpr", accepted, n),
        "false_reject": 1 - accepted / n,
        "false_reject_ci": list(tpr_interval(n - accepted, n)),
        **_share("selective_accuracy", int(right[known].sum()), accepted),
        "aurc": curve.aurc,
        "augrc": curve.augrc,
        "rejected_by_class": _rejected_by_class(~known, labels, classes),
        "ood": {
            name: {
                **_share("false_accept", int((_scores(scores, name) <= threshold.value).sum()), np.size(scores)),
                "oscr": oscr(ind, right, scores),
            }
            for name, scores in ood_scores.items()
        },
    }


def _share(name: str, k: int, n: int) -> dict[str, Any]:
    """`name`, k of n, and its interval, `name`_ci; None where n is 0."""
    return {name: k / n if n else None, f"{name}_ci": list(tpr_interval(k, n)) if n else None}


def _rejected_by_class(
    rejected: npt.NDArray[np.bool_], labels: npt.ArrayLike, classes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    index = np.asarray(labels)
    if index.shape != rejected.shape or index.min() < 0 or index.max() >= len(classes):
        raise UsageError(
            f"labels must be [{len(rejected)}] of 0 to {len(classes) - 1}, got shape {list(index.shape)}, "
            f"{index.min(initial=0)} to {index.max(initial=0)}"
        )
    totals = np.bincount(index, minlength=len(classes))
    counts = np.bincount(index[rejected], minlength=len(classes))
    return {
        name: {"rate": k / n if n else None, "ci": list(tpr_interval(k, n)) if n else None, "n": n}
        for name, k, n in zip(classes, counts.tolist(), totals.tolist(), strict=True)
    }


@dataclass(frozen=True)
class RiskCoverage:
    """Risk when only the images with the lowest scores are answered.

    Attributes:
        coverage: [n], share of images answered: 1/n, 2/n, ..., 1.
        risk: [n], share of wrong answers among those answered.
        aurc: area under risk over coverage: the mean of `risk` (Geifman and El-Yaniv).
        augrc: area under the share of all images that are answered wrongly (Traub et al.), trapezoidal from 0.
    """

    coverage: Floats
    risk: Floats
    aurc: float
    augrc: float


def risk_coverage(scores: npt.ArrayLike, correct: npt.ArrayLike) -> RiskCoverage:
    """The risk-coverage curve of a score. Images of equal score count as answered in random order (the mean).

    Args:
        scores: [n], finite, larger = more OOD, so answered later.
        correct: bool [n]; an OOD image is never correct.

    Raises:
        UsageError: as in `detection_metrics`, or `correct` of another length.
    """
    values = _scores(scores, "scores")
    wrong = ~_flags(correct, len(values))
    n = len(values)
    _, ranks, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    errors = np.concatenate([[0], np.cumsum(np.bincount(ranks, weights=wrong))])
    answered = np.arange(1, n + 1)
    mistakes = np.interp(answered, ends, errors)
    risk = mistakes / answered
    augrc = (mistakes.sum() - mistakes[-1] / 2) / n**2
    return RiskCoverage(answered / n, risk, float(risk.mean()), float(augrc))


def oscr(id_scores: npt.ArrayLike, correct: npt.ArrayLike, ood_scores: npt.ArrayLike) -> float:
    """Area under the open-set classification rate: P(ID image is right and scores below an OOD image), ties half.

    Raises:
        UsageError: as in `detection_metrics`, or `correct` of another length.
    """
    ind, ood = _scores(id_scores, "id_scores"), np.sort(_scores(ood_scores, "ood_scores"))
    right = ind[_flags(correct, len(ind))]
    at_or_below = np.searchsorted(ood, right, side="right") + np.searchsorted(ood, right, side="left")
    return float((len(right) - at_or_below.sum() / (2 * len(ood))) / len(ind))


def _scores(values: npt.ArrayLike, name: str) -> Floats:
    scores = np.asarray(values, np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise UsageError(f"{name} must be one-dimensional with at least one value, got shape {list(scores.shape)}")
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise UsageError(
            f"{name}: {bad.size} of {scores.size} values are NaN or infinite, the first at index {bad[0]}. "
            "The model or the artifact that made them is broken."
        )
    return scores


def _flags(values: npt.ArrayLike, n: int) -> npt.NDArray[np.bool_]:
    flags = np.asarray(values)
    if flags.dtype != np.bool_ or flags.shape != (n,):
        raise UsageError(f"correct must be bool of shape [{n}], got {flags.dtype} {list(flags.shape)}")
    return flags
