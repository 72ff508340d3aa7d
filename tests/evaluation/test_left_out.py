"""Classes that are left out in turn: by models that have not seen them, and what is said of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ssod_edge.config import score_parts
from ssod_edge.detect.fit import FitData
from ssod_edge.detect.folds import Folds, out_of_fold_parts
from ssod_edge.errors import UsageError
from ssod_edge.evaluation import left_out
from ssod_edge.evaluation.left_out import expectation, expectation_lines, leave_out

WIDTH, N, PARTS = 8, 120, 4
NAMES = ("cat", "dog", "cup", "tree")
SCORE = "gen+mahalanobispp+residual"


def material(classes: int = 4, n: int = N) -> tuple[FitData, Folds]:
    """Cats and dogs look alike, cups and trees like nothing else."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    means = np.zeros((4, WIDTH))
    means[0, 0], means[1, :2], means[2, 3], means[3, 5] = 9, (9, 2.5), 9, 9
    plain = means[labels] + rng.normal(size=(n, WIDTH))
    z = np.concatenate([plain, plain + 0.3 * rng.normal(size=plain.shape)]).astype(np.float32)
    weight = means[:classes].astype(np.float32)
    bias = np.zeros(classes, np.float32)
    data = FitData(z, np.tile(labels, 2), z @ weight.T, weight, bias, np.zeros(2 * n, np.float32))
    heads = np.stack([weight] * PARTS), np.stack([bias] * PARTS)
    return data, Folds(np.arange(n), np.arange(n) // 4 % PARTS, *heads, np.ones(n, np.float32), 0.01)


def expect(score: str, data: FitData, folds: Folds) -> dict[str, Any]:
    names = NAMES[: len(data.bias)]
    return expectation(score, data, folds, names, out_of_fold_parts(score_parts(score), data, folds))


def test_a_class_is_judged_by_models_that_have_not_seen_it() -> None:
    data, folds = material()
    found = {left.label: left for left in leave_out(("gen", "mahalanobispp"), data, folds)}
    assert sorted(found) == [0, 1, 2, 3]
    for label, left in found.items():
        assert label not in left.taken_for and len(left.taken_for) == len(left.unknown["gen"]) == N // 4
        assert len(left.known["gen"]) == N - N // 4  # every part was left out once
    assert (found[0].taken_for == 1).mean() > 0.9 and (found[1].taken_for == 0).mean() > 0.9


def test_a_few_hundred_images_are_left_out_in_three_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_out, "VERY_FEW", 50)
    data, folds = material()
    for left in leave_out(("gen",), data, folds):
        three = [(left.label + step) % PARTS for step in range(3)]
        outside = np.isin(folds.fold, three) & (data.labels[:N] != left.label)
        assert len(left.known["gen"]) == outside.sum()


def test_many_images_are_left_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_out, "VERY_FEW", 20)
    monkeypatch.setattr(left_out, "FEW", 50)
    monkeypatch.setattr(left_out, "MOST_CLASSES", 2)
    data, folds = material()
    counted: list[int] = []
    found = list(leave_out(("gen",), data, folds, counted.append))
    assert len(found) == 2 and counted == [1, 1]
    for left in found:
        outside = (folds.fold == left.label % PARTS) & (data.labels[:N] != left.label)
        assert len(left.known["gen"]) == outside.sum()


def test_what_to_expect_names_the_hardest_class_and_what_it_is_taken_for() -> None:
    data, folds = material()
    expected = expect(SCORE, data, folds)
    new = expected["new_class"]
    assert set(new) == set(NAMES) and new["cup"]["auroc"] > 0.99 and new["cup"]["accepted"] < 0.1
    assert new["cat"]["auroc"] < new["cup"]["auroc"] and new["cat"]["taken_for"] == "dog"
    assert 0.8 < expected["disturbed"] <= 1
    first, second = expectation_lines(expected)
    hardest = min(new, key=lambda name: new[name]["auroc"])
    assert f"hardest: {hardest}, which is taken for {new[hardest]['taken_for']}" in first and "each of 4" in first
    assert second.startswith("expect of another light or camera: ")
    # A single score has no mean and deviation to be brought to.
    assert expect("knn", data, folds)["new_class"]["cup"]["auroc"] > 0.99


def test_of_two_classes_none_can_be_left_out() -> None:
    data, folds = material(classes=2)
    expected = expect("energy", data, folds)
    assert expected["new_class"] == {} and len(expectation_lines(expected)) == 1
    data, folds = material(n=4)
    with pytest.raises(UsageError, match="no class can be left out"):
        list(leave_out(("gen",), data, folds))
