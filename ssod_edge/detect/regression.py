"""A last layer by regression on features that do not change: logistic regression, its strength by cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ssod_edge.detect.side_by_side import fitting, side_by_side

Array = NDArray[np.float32]
Labels = NDArray[np.int64]

#: Inverse weights of the L2 penalty on standardised features that are tried.
STRENGTHS = (1e-3, 3e-3, 1e-2, 3e-2)
#: Parts that images are divided into to leave each out once; of few images more, because each is missed more.
FOLDS, MOST_FOLDS, FEW = 4, 10, 1000
ITERATIONS = 300
#: Least deviation of a feature that is divided by: some are the same for every image.
LEAST_DEVIATION = 1e-6


@dataclass(frozen=True)
class LinearHead:
    """A last layer.

    Attributes:
        weight: float32 [M, Dall], of the features as they are: that they were standardised is folded in.
        bias: float32 [M].
        strength: of `STRENGTHS`.
        losses: strength -> mean log loss of images that were left out of the fit; empty where none was.
        accuracy: share of images that are classified rightly when left out of the fit; NaN where none was.
        fold: int64 [n], the part that each image is of; empty where none was left out.
        fold_weight, fold_bias: float32 [K, M, Dall] and [K, M], of the fits of that strength without each part.
        left_out: float32 [n, M], log probabilities of the images when left out of the fit; None where none was.
    """

    weight: Array
    bias: Array
    strength: float
    losses: dict[float, float]
    accuracy: float
    fold: Labels
    fold_weight: Array
    fold_bias: Array
    left_out: Array | None = None

    def logits(self, features: Array) -> Array:
        """[n, Dall] -> float32 [n, M]."""
        values: Array = features @ self.weight.T + self.bias
        return values


def fit_head(
    plain: Array,
    disturbed: Array,
    labels: Labels,
    classes: int,
    weights: Array | None = None,
    groups: Labels | None = None,
    strengths: Sequence[float] = STRENGTHS,
) -> LinearHead:
    """Fit on images and a disturbed copy of each, which stay together in every fold.

    Args:
        plain, disturbed: features [n, Dall].
        labels: [n], of `classes` classes, each of which has images.
        classes: M.
        weights: [n], how much an image counts; None: all the same.
        groups: [n]; images of one group are left out together. None: each is its own.
        strengths: ascending, to choose from by the loss of left-out images.
    """

    def fit_inside(strength: float, inside: NDArray[np.intp]) -> tuple[Array, Array]:
        counts = None if weights is None else weights[inside]
        return fit_layer(plain[inside], disturbed[inside], labels[inside], classes, counts, strength)

    losses: dict[float, float] = {}
    accuracies: dict[float, float] = {}
    heads: dict[float, list[tuple[Array, Array]]] = {}
    left_out: dict[float, Array] = {}
    parts = parts_by_class(labels, classes, np.arange(len(labels)) if groups is None else groups)
    for strength in strengths if parts else ():
        insides = [inside for inside, _ in parts]
        heads[strength] = list(side_by_side(partial(fit_inside, strength), insides, 2 * plain.nbytes))
        found = np.zeros((len(labels), classes))
        for (_, outside), (weight, bias) in zip(parts, heads[strength], strict=True):
            found[outside] = plain[outside] @ weight.T + bias
        found -= found.max(axis=1, keepdims=True)
        log_probs = found - np.log(np.exp(found).sum(axis=1, keepdims=True))
        losses[strength] = float(-np.average(log_probs[np.arange(len(labels)), labels], weights=weights))
        left_out[strength] = log_probs.astype(np.float32)
        accuracies[strength] = float((found.argmax(axis=1) == labels).mean())
        if losses[strength] > min(losses.values()):
            break  # convex in the strength, but for noise
    strength = min(losses, key=losses.__getitem__) if losses else strengths[min(1, len(strengths) - 1)]
    head = fit_layer(plain, disturbed, labels, classes, weights, strength)
    fold = np.zeros(len(labels) if parts else 0, np.int64)
    for number, (_, outside) in enumerate(parts):
        fold[outside] = number
    fits = heads.get(strength, [])
    fold_weight, fold_bias = (
        np.array([fit[i] for fit in fits], np.float32).reshape(-1, *head[i].shape) for i in (0, 1)
    )
    accuracy = accuracies.get(strength, float("nan"))
    return LinearHead(*head, strength, losses, accuracy, fold, fold_weight, fold_bias, left_out.get(strength))


def parts_by_class(labels: Labels, classes: int, groups: Labels) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """(images that are fitted to, images that are left out) of each fold; none where a fit would lack a class."""
    from sklearn.model_selection import StratifiedGroupKFold

    most = MOST_FOLDS if len(labels) <= FEW else FOLDS
    count = min(most, *(len(np.unique(groups[labels == label])) for label in range(classes)))
    if count < 2:
        return []
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=0)
    parts = list(folds.split(labels, labels, groups))
    return parts if all(len(np.unique(labels[inside])) == classes for inside, _ in parts) else []


def fit_layer(
    plain: Array, disturbed: Array, labels: Labels, classes: int, weights: Array | None, strength: float
) -> tuple[Array, Array]:
    """Weight [M, Dall] and bias [M] of one fit; arguments as for `fit_head`, and one of `STRENGTHS`."""
    from sklearn.linear_model import LogisticRegression

    z, y = np.concatenate([plain, disturbed]), np.tile(labels, 2)
    mean, deviation = z.mean(axis=0), np.maximum(z.std(axis=0), LEAST_DEVIATION)
    model = LogisticRegression(C=strength, max_iter=ITERATIONS, tol=1e-3)
    with fitting():  # products of few rows: with two threads it takes three times as long
        model.fit((z - mean) / deviation, y, None if weights is None else np.tile(weights, 2))
    rows, intercept = model.coef_, model.intercept_
    if classes == 2:  # one row, of the second class against the first
        rows, intercept = np.concatenate([-rows, rows]) / 2, np.concatenate([-intercept, intercept]) / 2
    weight = rows / deviation
    return weight.astype(np.float32), (intercept - weight @ mean).astype(np.float32)
