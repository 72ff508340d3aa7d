"""What a model does with a class that it was not taught: each class of its own is left out in turn, and shown to it.

Features that training has not touched know nothing of the classes, so that a last layer and detectors that are fitted
without a class really have not seen it. That takes seconds a class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ssod_edge.config import DETECTORS, DetectorName, score_parts
from ssod_edge.detect.detectors import Array
from ssod_edge.detect.fit import FitData, fit
from ssod_edge.detect.folds import Folds
from ssod_edge.detect.metrics import detection_metrics
from ssod_edge.detect.regression import fit_layer
from ssod_edge.detect.side_by_side import side_by_side
from ssod_edge.detect.sums import held_out_scores, standards, sum_of
from ssod_edge.errors import UsageError

Indices = NDArray[np.int64]

#: Classes that are left out: of more, so many are drawn, seeded.
MOST_CLASSES = 10
#: Of so few images every part is left out too, one after the other; of up to so many three parts for each class, which
#: are a hundred images and more; and of more than that one.
VERY_FEW, FEW = 150, 500
#: Said of these figures where a branch has learnt every class, and they do without it.
WITHOUT_BRANCH = "these figures of new classes are of the network without its branch, which has learnt every class"
#: Share of known images that is accepted in these figures.
TPR = 0.95


@dataclass(frozen=True)
class LeftOut:
    """One class, by models that were fitted without it.

    Attributes:
        label: the class.
        known: single score -> float32 [m], of images of the other classes, which these models have not seen either.
        unknown: single score -> float32 [u], of all images of the class.
        taken_for: int64 [u], the class that each of these is given.
    """

    label: int
    known: dict[str, Array]
    unknown: dict[str, Array]
    taken_for: Indices


def leave_out(
    names: Sequence[str], data: FitData, folds: Folds, advance: Callable[[int], None] = lambda n: None
) -> Iterator[LeftOut]:
    """Leave classes out in turn; nothing where there would be fewer than two others.

    Args:
        names: of single scores.
        data: 2 n rows: the images of `folds`, in their order, and then a disturbed copy of each.
        folds: n images.
        advance: called with 1 after each class.

    Raises:
        UsageError: a detector cannot be fitted on the images that are left.
    """
    n = len(folds.images)
    labels = data.classes()[:n]
    classes = np.unique(labels)
    if len(classes) < 3:
        return
    chosen = np.sort(np.random.default_rng(0).permutation(classes)[:MOST_CLASSES])
    for left in side_by_side(partial(_fit_without, names, data, folds), chosen.tolist(), data.features.nbytes):
        yield left
        advance(1)


def _fit_without(names: Sequence[str], data: FitData, folds: Folds, label: int) -> LeftOut:
    """Of several parts of the images, the scores of the class are a mean over the models."""
    n, count = len(folds.images), len(folds.weight)
    most = count if n <= VERY_FEW else min(3 if n <= FEW else 1, count)
    labels = data.classes()[:n]
    known: list[dict[str, Array]] = []
    unknown: list[dict[str, Array]] = []
    logits: list[Array] = []
    rest, shown = np.flatnonzero(labels != label), np.flatnonzero(labels == label)
    others = np.setdiff1d(labels, [label])
    for part in ((label + step) % count for step in range(most)):
        inside, outside = rest[folds.fold[rest] != part], rest[folds.fold[rest] == part]
        numbers = np.searchsorted(others, labels[inside])
        if not len(outside) or len(np.unique(numbers)) < len(others):
            continue
        plain, disturbed = data.features[inside], data.features[n + inside]
        weight, bias = fit_layer(plain, disturbed, numbers, len(others), folds.counts[inside], folds.strength)
        fitted = replace(
            data.of(np.concatenate([inside, n + inside])).with_head(weight, bias), labels=np.tile(numbers, 2)
        )
        detectors = {name: fit(cast(DetectorName, name), fitted) for name in names if name in DETECTORS}
        for found, rows in ((known, outside), (unknown, shown)):
            z = data.features[rows]
            found.append(held_out_scores(tuple(names), detectors, (z @ weight.T + bias, data.id_logit[rows], z)))
        logits.append(data.features[shown] @ weight.T + bias)
    if not known:
        raise UsageError("no class can be left out of so few images")
    return LeftOut(
        label,
        {name: np.concatenate([found[name] for found in known]) for name in names},
        {name: np.mean([found[name] for found in unknown], axis=0) for name in names},
        others[np.mean(logits, axis=0).argmax(axis=1)],
    )


def expectation(
    score: str,
    data: FitData,
    folds: Folds,
    classes: Sequence[str],
    out_of_fold: tuple[dict[str, Array], dict[str, Array]],
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """What to expect of a score in the field, as a record for the spec and for `eval --leave-out`.

    Args:
        score: that ships; see `ssod_edge.config.score_parts`.
        data, folds: as for `leave_out`.
        classes: names in label order.
        out_of_fold: of `ssod_edge.detect.folds.out_of_fold_parts`, by the parts of the score.
        advance: as for `leave_out`.

    Returns:
        `new_class`: {class: {"images", "auroc", "accepted", "taken_for"}}, of each class that was left out: the share
        that is accepted as known, and the class that most of these images are given; `disturbed`: the share of
        disturbed known images that is still accepted, out of fold.
    """
    return judge(score, leave_out(score_parts(score), data, folds, advance), out_of_fold, classes)


def judge(
    score: str,
    left_out: Iterable[LeftOut],
    out_of_fold: tuple[dict[str, Array], dict[str, Array]],
    classes: Sequence[str],
) -> dict[str, Any]:
    """`expectation` of what is computed already: `leave_out` and `out_of_fold`, by the parts of the score at least."""
    found: dict[str, Any] = {}
    for left in left_out:
        known, unknown = (_total(score, values, left.known) for values in (left.known, left.unknown))
        threshold = np.quantile(known, TPR, method="higher")
        values, counts = np.unique(left.taken_for, return_counts=True)
        found[classes[left.label]] = {
            "images": len(unknown),
            "auroc": detection_metrics(known, unknown, bootstrap=0)["auroc"],
            "accepted": float(np.mean(unknown <= threshold)),
            "taken_for": classes[int(values[counts.argmax()])],
        }
    plain, disturbed = out_of_fold
    threshold = np.quantile(_total(score, plain, plain), TPR, method="higher")
    accepted = float(np.mean(_total(score, disturbed, plain) <= threshold))
    return {"new_class": found, "disturbed": accepted}


def expectation_lines(expected: Mapping[str, Any]) -> list[str]:
    """The same in words."""
    lines = []
    if new := expected["new_class"]:
        aurocs, accepted = ([row[key] for row in new.values()] for key in ("auroc", "accepted"))
        hardest = min(new, key=lambda name: float(new[name]["auroc"]))
        lines.append(
            f"expect of a class that was not taught, by leaving out each of {len(new)}: AUROC "
            f"{100 * np.mean(aurocs):.0f} ({100 * min(aurocs):.0f} to {100 * max(aurocs):.0f}), "
            f"{100 * np.mean(accepted):.0f} of 100 images accepted as known; hardest: {hardest}, which is taken for "
            f"{new[hardest]['taken_for']}"
        )
    lines.append(
        f"expect of another light or camera: {100 * expected['disturbed']:.0f} of 100 known images are still accepted"
    )
    return lines


def _total(score: str, parts: dict[str, Array], known: dict[str, Array]) -> Array:
    """A score of its parts' scores [n], standardised by those of known images."""
    names = score_parts(score)
    return parts[score] if len(names) == 1 else sum_of(score, {}, standards(known)).add(parts)
