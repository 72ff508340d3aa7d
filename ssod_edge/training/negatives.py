"""What negatives teach: the OOD row by regression on kept features; or where they come in the batches of a loop."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ssod_edge.data.negatives import Negatives
from ssod_edge.data.splits import Indices
from ssod_edge.detect.metrics import detection_metrics
from ssod_edge.detect.regression import Array, fit_head, fit_layer
from ssod_edge.terminal import image_bar
from ssod_edge.training.features import Features, features_of
from ssod_edge.training.session import Session, say


@dataclass(frozen=True)
class FittedRow:
    """What the OOD row was fitted to.

    Attributes:
        facts: for the run: the strength, how many images there were, and the AUROC of s between validation images and
            negatives that were not learnt from (the part to choose by).
        fold_row, fold_bias: float32 [K, D] and [K], of fits without each part of the known images.
    """

    facts: dict[str, Any]
    fold_row: Array
    fold_bias: Array


def fit_row(session: Session, images: Indices, fold: Indices) -> FittedRow | None:
    """Fit the OOD row of a model whose features are kept, as they are now; None without negatives.

    s = w_ood z + b_ood is the log odds of "known" by logistic regression: known images and a disturbed copy of each
    against the negatives of the part to learn from and their copies, both sides of the same weight in all. The strength
    of its penalty is chosen by cross-validation, as that of the classes is.

    Args:
        images: known ones to fit to.
        fold: int64 [n], the part of each of them that is left out together; of another length where there are none.

    Raises:
        ImageError: an image cannot be read.
    """
    negatives, model = session.negatives, session.model
    if negatives is None:
        return None
    started, runs, workers = time.monotonic(), session.run.parent, session.config.workers
    known = features_of(model, session.source, runs, workers)
    with image_bar("negatives", len(negatives.source)) as advance:
        unknown = features_of(model, negatives.source, runs, workers, advance)
    taught = negatives.parts["train"]
    head = fit_head(*_two_classes(known, images, unknown, taught))
    row, bias = _row(head.weight, head.bias)
    without = []
    for part in range(fold.max(initial=-1) + 1) if len(fold) == len(images) else ():
        plain, disturbed, labels, _, weights = _two_classes(known, images[fold != part], unknown, taught)
        without.append(_row(*fit_layer(plain, disturbed, labels, 2, weights, head.strength)))
    with torch.no_grad():
        model.ood.weight.copy_(torch.from_numpy(row)[None])
        model.ood.bias.fill_(float(bias))
    val, choice = known.plain[session.splits.val], unknown.plain[negatives.parts["choice"]]
    auroc = float(detection_metrics(-(val @ row + bias), -(choice @ row + bias), bootstrap=0)["auroc"])
    say(
        f"OOD row: AUROC {auroc:.1%} between {len(val)} validation images and {len(choice)} negatives "
        f"that it did not learn from ({time.monotonic() - started:.0f} s)"
    )
    facts = {"strength": head.strength, "known": len(images), "negatives": len(taught), "auroc": auroc}
    rows = np.array([one for one, _ in without], np.float32).reshape(-1, len(row))
    return FittedRow(facts, rows, np.array([one for _, one in without], np.float32))


def _two_classes(
    known: Features, images: Indices, unknown: Features, taught: Indices
) -> tuple[Array, Array, Indices, int, Array]:
    """Arguments of `fit_head`: negatives are class 0, known images class 1."""
    labels = np.repeat(np.array([1, 0]), [len(images), len(taught)])
    weights = (len(labels) / 2 / np.bincount(labels))[labels].astype(np.float32)
    plain, disturbed = (
        np.concatenate([one[images], other[taught]])
        for one, other in ((known.plain, unknown.plain), (known.disturbed, unknown.disturbed))
    )
    return plain, disturbed, labels, 2, weights


def _row(weight: Array, bias: Array) -> tuple[Array, float]:
    """The log odds of class 1, [D] and a number."""
    return weight[1] - weight[0], float(bias[1] - bias[0])


def draw_negatives(negatives: Negatives, first: int, steps: int, count: int, seed: tuple[int, int]) -> Indices:
    """Which negatives each step of an epoch shows, int64 [steps, count]: all in a seeded order, over and over.

    Args:
        negatives: their part to learn from is drawn from.
        first: their first index in `ssod_edge.data.negatives.WithNegatives`.
        steps, count: batches of the epoch, and negatives in each.
        seed: of the order.
    """
    order = np.random.default_rng((*seed, 1)).permutation(negatives.parts["train"])
    return first + np.resize(order, (steps, count))
