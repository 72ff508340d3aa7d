"""Figures of known classes: against scikit-learn, by hand, and what a temperature does to them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics

from ssod_edge.detect.classes import (
    BINS,
    MOST_IN_MATRIX,
    calibration,
    class_lines,
    classification,
    tempered_classification,
)
from ssod_edge.errors import UsageError

CLASSES = ("cat", "dog", "=cmd|' /C calc'!A0", "\u05d7\u05ea\u05d5\u05dc <b>")


def drawn(n: int = 500, classes: int = 4, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels and logits that are right in some two of three cases."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) * 2
    logits[np.arange(n), labels] += 2.5
    return labels, logits


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits)
    found: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return found


def test_figures_are_those_of_scikit_learn() -> None:
    labels, logits = drawn()
    probs = softmax(logits)
    found = classification(labels, probs, CLASSES)
    answers = probs.argmax(axis=1)
    assert found["n"] == 500
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, answers))
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, answers))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(labels, answers, average="macro"))
    assert found["confusion"] == metrics.confusion_matrix(labels, answers).tolist()
    columns = metrics.precision_recall_fscore_support(labels, answers)
    rows = [[row[key] for key in ("precision", "recall", "f1", "n")] for row in found["by_class"].values()]
    np.testing.assert_allclose(rows, np.transpose(columns))
    assert list(found["by_class"]) == list(CLASSES)
    assert json.loads(json.dumps(found, allow_nan=False)) == found, "plain values"


def test_confused_pairs_are_the_matrix_without_its_diagonal() -> None:
    labels, logits = drawn()
    found = classification(labels, softmax(logits), CLASSES)
    counts = [pair["n"] for pair in found["confused"]]
    assert counts == sorted(counts, reverse=True) and sum(counts) == len(found["mistakes"]) > 0
    first = found["confused"][0]
    row, column = CLASSES.index(first["label"]), CLASSES.index(first["class_name"])
    assert row != column and found["confusion"][row][column] == first["n"]
    assert first["share"] == first["n"] / found["by_class"][first["label"]]["n"]


def test_mistakes_are_the_wrong_answers_with_the_most_confident_first() -> None:
    probs = [[0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.95, 0.05]]
    found = classification([0, 0, 0, 1], probs, ("cat", "dog"))["mistakes"]
    assert found == [
        {"index": 3, "label": "dog", "class_name": "cat", "confidence": 0.95, "label_confidence": 0.05},
        {"index": 1, "label": "cat", "class_name": "dog", "confidence": 0.9, "label_confidence": 0.1},
        {"index": 2, "label": "cat", "class_name": "dog", "confidence": 0.7, "label_confidence": 0.3},
    ]


def test_a_class_without_images_counts_in_no_mean_and_one_without_answers_has_no_precision() -> None:
    probs = [[0.8, 0.1, 0.1], [0.7, 0.2, 0.1]]
    found = classification([0, 1], probs, ("a", "b", "c"))
    assert found["by_class"]["b"] == {"n": 1, "answered": 0, "precision": None, "recall": 0.0, "f1": 0.0}
    assert found["by_class"]["c"] == {"n": 0, "answered": 0, "precision": None, "recall": None, "f1": None}
    assert found["balanced_accuracy"] == 0.5 and found["macro_f1"] == pytest.approx(1 / 3)


def test_matrix_of_very_many_classes_is_left_out() -> None:
    names = [str(number) for number in range(MOST_IN_MATRIX + 1)]
    labels, logits = drawn(50, len(names))
    found = classification(labels, softmax(logits), names)
    assert found["confusion"] is None and sum(pair["n"] for pair in found["confused"]) == len(found["mistakes"])


def test_calibration_by_hand() -> None:
    # Two images at 0.9, one right; two at 0.6, both right.
    probs = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]]
    found = calibration([0, 1, 0, 1], probs)
    assert found["ece"] == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)
    assert found["brier"] == pytest.approx((0.02 + 2 * 0.81 + 2 * 0.16 + 2 * 0.16) / 4)
    assert len(found["bins"]) == BINS and sum(row["n"] for row in found["bins"]) == 4
    filled = [row for row in found["bins"] if row["n"]]
    assert [(row["n"], row["accuracy"]) for row in filled] == [(2, 1.0), (2, 0.5)]
    assert all(row["low"] < row["confidence"] <= row["high"] for row in filled)
    assert found["bins"][0]["confidence"] is None


def test_the_surest_answers_fall_into_the_last_bin() -> None:
    found = calibration([0, 1], [[1.0, 0.0], [0.0, 1.0]])
    assert found["bins"][-1]["n"] == 2 and found["ece"] == 0 and found["brier"] == 0


def test_ece_of_answers_drawn_from_their_own_probabilities_is_small() -> None:
    rng = np.random.default_rng(0)
    probs = softmax(rng.normal(size=(20_000, 3)) * 2)
    labels = (probs.cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    assert calibration(labels, probs)["ece"] < 0.01
    assert calibration(labels, softmax(np.log(probs) * 3))["ece"] > 0.05, "too sure"


def test_the_error_of_chance_is_that_of_answers_drawn_from_their_own_probabilities() -> None:
    rng = np.random.default_rng(1)
    probs = softmax(rng.normal(size=(200, 3)) * 2)
    drawn = [(probs.cumsum(axis=1) < rng.random((200, 1))).sum(axis=1).clip(max=2) for _ in range(40)]
    found = [calibration(labels, probs) for labels in drawn]
    chance = found[0]["ece_by_chance"]
    assert chance == pytest.approx(np.mean([row["ece"] for row in found]), rel=0.15) and chance > 0.02
    assert calibration(np.tile(drawn[0], 50), np.tile(probs, (50, 1)))["ece_by_chance"] < chance / 4


def test_a_temperature_changes_confidence_and_no_class() -> None:
    labels, logits = drawn(2000)
    plain = classification(labels, softmax(logits * 4), CLASSES)
    found = tempered_classification(labels, logits * 4, CLASSES, 4.0)
    assert found["temperature"]["value"] == 4 and found["temperature"]["classes_changed"] == 0
    for key in ("ece", "brier", "confidence", "accuracy"):
        assert found["temperature"]["before"][key] == pytest.approx(plain["calibration"][key])
    assert found["calibration"]["ece"] < found["temperature"]["before"]["ece"] / 2
    assert found["confusion"] == plain["confusion"] and found["by_class"] == plain["by_class"]


def test_the_lines_say_what_the_record_says() -> None:
    labels, logits = drawn(2000)
    found = tempered_classification(labels, logits * 4, CLASSES, 4.0)
    first, pairs, confidence = class_lines(found)
    weakest = min(CLASSES, key=lambda name: found["by_class"][name]["recall"])
    assert f"weakest: {weakest} ({100 * found['by_class'][weakest]['recall']:.0f} of 100" in first
    pair = found["confused"][0]
    assert f"{pair['label']} for {pair['class_name']} ({pair['n']} of" in pairs
    before, after = found["temperature"]["before"]["ece"], found["calibration"]["ece"]
    assert f"(ECE) {before:.1%} -> {after:.1%}" in confidence
    assert "by the temperature 4.00, which changes no verdict (" in confidence
    plain = class_lines(tempered_classification(labels, logits, CLASSES, 1.0))[-1]
    assert "->" not in plain and "temperature" not in plain


@pytest.mark.parametrize(
    ("labels", "probs", "message"),
    [
        ([], np.zeros((0, 2)), "N and M above 0"),
        ([0, 1], [[1.0, 0.0]], "labels \\[N\\]"),
        ([2], [[1.0, 0.0]], "between 0 and 1, got 2"),
        ([-1], [[1.0, 0.0]], "between 0 and 1, got -1"),
        ([0], [[np.nan, 0.0]], "NaN"),
        ([0], [[1.0]], "each of the 2 classes, got 1"),
    ],
)
def test_what_does_not_fit_is_refused(labels: Any, probs: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        classification(labels, probs, ("a", "b"))
