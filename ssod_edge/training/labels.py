"""Labels that look wrong: confident learning on what a head says of images that it was not fitted to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssod_edge.csv_table import path_cell, write_csv
from ssod_edge.data.sources import ImageSource
from ssod_edge.data.splits import Indices
from ssod_edge.detect.regression import LinearHead

#: The table of them, in a run folder.
LABELS = "labels.csv"
HEADER = ("image", "label", "looks_like", "probability")


def unseen_probs(head: LinearHead, features: NDArray[np.float32], fitted: Indices) -> NDArray[np.float32] | None:
    """Of every image the probabilities by a fit that it was left out of, [N, M]; None where the head had no such fits.

    Args:
        head: of `fit_head`.
        features: [N, Dall] of all images.
        fitted: int64 [n], those that it was fitted to, in this order.
    """
    if head.left_out is None:
        return None
    logits = head.logits(features)
    logits[fitted] = head.left_out
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    scaled: NDArray[np.float32] = probs / probs.sum(axis=1, keepdims=True)
    return scaled


def wrong_labels(labels: Indices, probs: NDArray[np.float32]) -> Indices:
    """The images whose label looks wrong, those first that most surely look like another class.

    How many there are is the sum of the off-diagonal of the confident joint (Northcutt, Jiang and Chuang, "Confident
    learning", JAIR 70, 2021, Eq. 1): images whose probability of another class is at least the mean of it over the
    images of that class. Which these are is told by the margin, the probability of the label less the largest other
    one; that found more of the labels that were swapped on purpose than the counted images themselves.

    Args:
        labels: int64 [N], of classes that each have images.
        probs: [N, M], by fits that the images were left out of.

    Returns:
        int64 [n], places in `labels`.
    """
    thresholds = np.array([probs[labels == label, label].mean() for label in range(probs.shape[1])])
    sure = np.where(probs >= thresholds, probs, -1)
    count = int(((sure.max(axis=1) >= 0) & (sure.argmax(axis=1) != labels)).sum())
    margins = _given(probs, labels) - _others(probs, labels).max(axis=1)
    found: Indices = np.argsort(margins, kind="stable")[: min(count, int((margins < 0).sum()))]
    return found


def _given(probs: NDArray[np.float32], labels: Indices) -> NDArray[np.float32]:
    """[N]: of the label."""
    given: NDArray[np.float32] = probs[np.arange(len(labels)), labels]
    return given


def _others(probs: NDArray[np.float32], labels: Indices) -> NDArray[np.float32]:
    """[N, M]: of the other classes; -1 for the label."""
    others = probs.copy()
    others[np.arange(len(labels)), labels] = -1
    return others


def write_labels(run: Path, source: ImageSource, probs: NDArray[np.float32]) -> str:
    """Write the table of labels that look wrong into a run folder; a line for the user, empty where there are none.

    Args:
        probs: of `unseen_probs`.

    Raises:
        OutputError: the table cannot be written.
    """
    wrong = wrong_labels(source.labels, probs)
    if not len(wrong):
        return ""
    others = _others(probs, source.labels)
    rows = []
    for index in wrong.tolist():
        likely = int(others[index].argmax())
        names = source.classes[source.labels[index]], source.classes[likely]
        rows.append((path_cell(source.source(index)), *names, f"{others[index, likely]:.3f}"))
    write_csv(run / LABELS, HEADER, rows)
    look = "label looks wrong, or is" if len(wrong) == 1 else "labels look wrong, or are"
    return f"{len(wrong)} {look} hard to tell: see '{run / LABELS}', the surest first"
