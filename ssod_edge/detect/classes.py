"""How well known classes are told apart, and what the confidence is worth: plain records, ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ssod_edge.errors import UsageError

Floats = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]

#: Bins of confidence, of equal width (Guo et al., "On calibration of modern neural networks", 2017).
BINS = 15
#: Of answers, to find the calibration error that comes of chance.
DRAWS = 50
#: Classes up to which the confusion matrix is written out; of more, the pairs that were confused are enough.
MOST_IN_MATRIX = 100


def classification(labels: npt.ArrayLike, probs: npt.ArrayLike, classes: Sequence[str]) -> dict[str, Any]:
    """What a classifier makes of images of known classes. The likeliest class is its answer.

    Args:
        labels: int [N], true classes, each from 0 to M - 1.
        probs: [N, M], probabilities of the classes.
        classes: the M names.

    Returns:
        - n; accuracy; balanced_accuracy: the mean recall, and macro_f1: the mean F1, of classes that have images.
        - by_class: class -> {n (images of it), answered (images that got its name), precision, recall, f1}; None where
          it would be a share of nothing: precision of a class that no image got, recall and F1 of one without images.
        - confusion: [M][M] counts, a row for each true class, a column for each answer; None of more than
          `MOST_IN_MATRIX` classes.
        - confused: {label, class_name, n, share} of each pair that was confused, the most frequent first; `share` is
          that of the images of the class `label`.
        - calibration: of `calibration`.
        - mistakes: {index (place in `labels`), label, class_name (the answer), confidence, label_confidence (what the
          true class gets)} of each wrong answer, the most confident first.

    Raises:
        UsageError: shapes that do not fit, no image, a label outside the classes, or a probability that is not finite.
    """
    y, p = _checked(labels, probs)
    if p.shape[1] != len(classes):
        raise UsageError(f"probs must have a column for each of the {len(classes)} classes, got {p.shape[1]}")
    answers = p.argmax(axis=1)
    n, answered, right = (np.bincount(part, minlength=len(classes)) for part in (y, answers, y[answers == y]))
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, and becomes None
        precision, recall, f1 = right / answered, right / n, np.where(n > 0, 2 * right / (n + answered), np.nan)
    columns = (n.tolist(), answered.tolist(), _optional(precision), _optional(recall), _optional(f1))
    keys = ("n", "answered", "precision", "recall", "f1")
    return {
        "n": len(y),
        "accuracy": float((answers == y).mean()),
        "balanced_accuracy": float(recall[n > 0].mean()),
        "macro_f1": float(f1[n > 0].mean()),
        "by_class": {name: dict(zip(keys, row, strict=True)) for name, *row in zip(classes, *columns, strict=True)},
        "confusion": _matrix(y, answers, len(classes)) if len(classes) <= MOST_IN_MATRIX else None,
        "confused": _confused(y, answers, classes),
        "calibration": calibration(y, p),
        "mistakes": _mistakes(y, p, classes),
    }


def calibration(labels: npt.ArrayLike, probs: npt.ArrayLike) -> dict[str, Any]:
    """Whether images of a confidence of 80% are right in 80 of 100 cases.

    Args, and errors: as of `classification`.

    Returns:
        - ece: expected calibration error: how far confidence and accuracy lie apart in a bin, mean over the images.
        - ece_by_chance: what answers of exactly these confidences would show on so many images, mean of `DRAWS` draws:
          an error of about that much is none.
        - brier: mean over the images of the sum over the classes of (p - 1 if it is the true one else p)^2, in [0, 2].
        - confidence, accuracy: means over all images.
        - bins: {low, high, n, confidence, accuracy} of each of the `BINS` bins of confidence, (low, high]; means are
          None where n is 0.
    """
    y, p = _checked(labels, probs)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y
    edges = np.linspace(0, 1, BINS + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, BINS - 1)
    n = np.bincount(place, minlength=BINS)

    def gap(right: npt.NDArray[np.bool_]) -> float:
        return float(np.abs(np.bincount(place, weights=confidence - right, minlength=BINS)).sum() / len(y))

    rng = np.random.default_rng(0)
    sums = [np.bincount(place, weights=values, minlength=BINS) for values in (confidence, right)]
    with np.errstate(invalid="ignore"):
        means = [_optional(total / n) for total in sums]
    columns = (edges[:-1].tolist(), edges[1:].tolist(), n.tolist(), *means)
    keys = ("low", "high", "n", "confidence", "accuracy")
    return {
        "ece": gap(right),
        "ece_by_chance": float(np.mean([gap(rng.random(len(y)) < confidence) for _ in range(DRAWS)])),
        "brier": float((np.einsum("nm,nm->n", p, p) - 2 * p[np.arange(len(y)), y] + 1).mean()),
        "confidence": float(confidence.mean()),
        "accuracy": float(right.mean()),
        "bins": [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)],
    }


def tempered_classification(
    labels: npt.ArrayLike, logits: npt.ArrayLike, classes: Sequence[str], temperature: float
) -> dict[str, Any]:
    """`classification` by probs = softmax(logits / temperature), and what the temperature does.

    Args:
        labels, classes: as of `classification`.
        logits: [N, M].
        temperature: above 0.

    Returns:
        What `classification` returns, and `temperature`: {value, before (`calibration` at a temperature of 1),
        classes_changed (images that have another likeliest class than by their logits: 0, and a score never knows the
        temperature)}.
    """
    x = np.asarray(logits, np.float64)
    probs = _softmax(x / temperature)
    return {
        **classification(labels, probs, classes),
        "temperature": {
            "value": float(temperature),
            "before": calibration(labels, _softmax(x)),
            "classes_changed": int((probs.argmax(axis=1) != x.argmax(axis=1)).sum()),
        },
    }


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: Floats = powers / powers.sum(axis=1, keepdims=True)
    return found


def _checked(labels: npt.ArrayLike, probs: npt.ArrayLike) -> tuple[Labels, Floats]:
    y, p = np.asarray(labels), np.asarray(probs, np.float64)
    if y.ndim != 1 or p.ndim != 2 or len(y) != len(p) or not p.size:
        raise UsageError(f"expected labels [N] and probs [N, M], N and M above 0, got {list(y.shape)}, {list(p.shape)}")
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise UsageError(f"labels must lie between 0 and {p.shape[1] - 1}, got {y.min()} to {y.max()}")
    if not np.isfinite(p).all():
        raise UsageError("probs holds NaN or infinity")
    return y.astype(np.int64), p


def _optional(values: Floats) -> list[float | None]:
    """With None for NaN, which is a share of nothing."""
    return [None if np.isnan(value) else float(value) for value in values]


def _matrix(y: Labels, answers: Labels, classes: int) -> list[list[int]]:
    counts = np.bincount(y * classes + answers, minlength=classes**2)
    found: list[list[int]] = counts.reshape(classes, classes).tolist()
    return found


def _confused(y: Labels, answers: Labels, classes: Sequence[str]) -> list[dict[str, Any]]:
    wrong, of_class = answers != y, np.bincount(y)
    pairs, counts = np.unique(y[wrong] * len(classes) + answers[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rows, columns = np.divmod(pairs[order], len(classes))
    return [
        {"label": classes[i], "class_name": classes[j], "n": n, "share": n / int(of_class[i])}
        for i, j, n in zip(rows.tolist(), columns.tolist(), counts[order].tolist(), strict=True)
    ]


def _mistakes(y: Labels, p: Floats, classes: Sequence[str]) -> list[dict[str, Any]]:
    answers, confidence = p.argmax(axis=1), p.max(axis=1)
    wrong = np.flatnonzero(answers != y)
    return [
        {
            "index": index,
            "label": classes[y[index]],
            "class_name": classes[answers[index]],
            "confidence": float(confidence[index]),
            "label_confidence": float(p[index, y[index]]),
        }
        for index in wrong[np.argsort(-confidence[wrong], kind="stable")].tolist()
    ]


def class_lines(found: Mapping[str, Any]) -> list[str]:
    """What `tempered_classification` found, in words: the weakest classes, the pairs, and the confidence."""
    rows = {name: row for name, row in found["by_class"].items() if row["n"]}
    weakest = sorted(rows, key=lambda name: rows[name]["recall"])[:3]
    named = ", ".join(f"{name} ({100 * rows[name]['recall']:.0f} of 100 images are found)" for name in weakest)
    balanced, f1 = found["balanced_accuracy"], found["macro_f1"]
    lines = [f"classes: balanced accuracy {balanced:.1%}, mean F1 {f1:.1%}; weakest: {named}"]
    return [*lines, *filter(None, [pair_line(found)]), _confidence_line(found)]


def pair_line(found: Mapping[str, Any]) -> str:
    """Which classes were taken for which others, of what `classification` found; empty where none was."""
    rows = found["by_class"]
    pairs = [
        f"{pair['label']} for {pair['class_name']} ({pair['n']} of {rows[pair['label']]['n']})"
        for pair in found["confused"][:3]
    ]
    return f"most often taken: {', '.join(pairs)}" if pairs else ""


def _confidence_line(found: Mapping[str, Any]) -> str:
    after, temperature = found["calibration"], found["temperature"]
    gap = (
        f"mean confidence {after['confidence']:.1%}, accuracy {after['accuracy']:.1%}; with {found['n']} images chance "
        f"alone makes an ECE of {after['ece_by_chance']:.1%}"
    )
    if temperature["value"] == 1:
        return f"confidence: calibration error (ECE) {after['ece']:.1%}, Brier score {after['brier']:.3f} ({gap})"
    before, changed = temperature["before"], temperature["classes_changed"]
    return (
        f"confidence: calibration error (ECE) {before['ece']:.1%} -> {after['ece']:.1%}, Brier score "
        f"{before['brier']:.3f} -> {after['brier']:.3f} by the temperature {temperature['value']:.2f}, which changes "
        f"{changed or 'no'} verdict{'s' if changed > 1 else ''} ({gap})"
    )
