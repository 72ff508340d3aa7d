"""What negatives teach: the OOD row by regression on kept features; or where they come in the batches of a loop."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from ssod_edge.data.negatives import Negatives
from ssod_edge.data.splits import Indices
from ssod_edge.detect.metrics import detection_metrics
from ssod_edge.terminal import image_bar
from ssod_edge.training.features import features_of
from ssod_edge.training.regression import fit_head
from ssod_edge.training.session import Session, say


def fit_row(session: Session) -> dict[str, Any]:
    """Fit the OOD row of a model whose features are kept, as they are now; nothing without negatives.

    s = w_ood z + b_ood is the log odds of "known" by logistic regression: training images and a disturbed copy of each
    against the negatives of the part to learn from and their copies, both sides of the same weight in all. The strength
    of its penalty is chosen by cross-validation, as that of the classes is.

    Returns:
        for the run: `row`, with the strength, how many images there were, and the AUROC of s between validation
        images and negatives that were not learnt from (the part to choose by).

    Raises:
        ImageError: an image cannot be read.
    """
    negatives, model = session.negatives, session.model
    if negatives is None:
        return {}
    started, runs, workers = time.monotonic(), session.run.parent, session.config.workers
    known = features_of(model, session.source, runs, workers)
    with image_bar("negatives", len(negatives.source)) as advance:
        unknown = features_of(model, negatives.source, runs, workers, advance)
    train, taught = session.splits.train, negatives.parts["train"]
    labels = np.repeat(np.array([1, 0]), [len(train), len(taught)])
    weights = (len(labels) / 2 / np.bincount(labels))[labels].astype(np.float32)
    plain, disturbed = (
        np.concatenate([one[train], other[taught]])
        for one, other in ((known.plain, unknown.plain), (known.disturbed, unknown.disturbed))
    )
    head = fit_head(plain, disturbed, labels, 2, weights)
    row, bias = head.weight[1] - head.weight[0], head.bias[1] - head.bias[0]
    with torch.no_grad():
        model.ood.weight.copy_(torch.from_numpy(row)[None])
        model.ood.bias.fill_(float(bias))
    val, choice = known.plain[session.splits.val], unknown.plain[negatives.parts["choice"]]
    auroc = float(detection_metrics(-(val @ row + bias), -(choice @ row + bias), bootstrap=0)["auroc"])
    say(
        f"OOD row: AUROC {auroc:.1%} between {len(val)} validation images and {len(choice)} negatives "
        f"that it did not learn from ({time.monotonic() - started:.0f} s)"
    )
    return {"row": {"strength": head.strength, "known": len(train), "negatives": len(taught), "auroc": auroc}}


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
