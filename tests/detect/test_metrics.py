"""Detection metrics against scikit-learn, against hand-counted cases, and under what must not change them."""

from __future__ import annotations

import itertools
import json
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from ssod_edge.detect.metrics import (
    conformal_threshold,
    deployment_metrics,
    detection_metrics,
    oscr,
    risk_coverage,
    tpr_interval,
)
from ssod_edge.errors import UsageError
from ssod_edge.spec import Threshold

POINT = ("auroc", "aupr_in", "aupr_out", "fpr_at_id_tpr95", "fpr_at_ood_tpr95")
#: Few distinct values, so that ties within and across the two sets are the rule.
TIED = st.lists(st.integers(-3, 3).map(lambda k: k / 2), min_size=1, max_size=60)


def sklearn_metrics(ind: np.ndarray, ood: np.ndarray) -> dict[str, float]:
    score, is_ood = np.concatenate([ind, ood]), np.repeat([0, 1], [len(ind), len(ood)])

    def fpr95(label: np.ndarray, values: np.ndarray) -> float:
        fpr, tpr, _ = roc_curve(label, values, drop_intermediate=False)
        return float(fpr[np.argmax(tpr >= 0.95)])

    return {
        "auroc": roc_auc_score(is_ood, score),
        "aupr_in": average_precision_score(1 - is_ood, -score),
        "aupr_out": average_precision_score(is_ood, score),
        "fpr_at_id_tpr95": fpr95(1 - is_ood, -score),
        "fpr_at_ood_tpr95": fpr95(is_ood, score),
    }


# ---------------------------------------------------------------- detection_metrics


@settings(max_examples=150, deadline=None)
@given(TIED, TIED)
def test_metrics_are_scikit_learns_with_ties(ind: list[float], ood: list[float]) -> None:
    found = detection_metrics(ind, ood, bootstrap=0)
    for name, expected in sklearn_metrics(np.array(ind), np.array(ood)).items():
        assert found[name] == pytest.approx(expected, abs=1e-12), name


@pytest.mark.parametrize(("n_id", "n_ood"), [(1, 1), (1, 500), (500, 1), (1000, 700)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_metrics_are_scikit_learns_on_continuous_scores(n_id: int, n_ood: int, dtype: type) -> None:
    rng = np.random.default_rng(n_id)
    ind, ood = rng.normal(0, 1, n_id).astype(dtype), rng.normal(1, 2, n_ood).astype(dtype)
    found = detection_metrics(ind, ood, bootstrap=0)
    for name, expected in sklearn_metrics(ind, ood).items():
        assert found[name] == pytest.approx(expected, abs=1e-12), name


def test_a_case_counted_by_hand() -> None:
    found = detection_metrics([1, 2, 3, 4], [3, 5], bootstrap=0)
    assert found["auroc"] == (2 + 0.5 + 4) / 8  # 3 beats 1 and 2, ties with 3; 5 beats all
    # Accepting from below: 1 -> 1/1, 2 -> 2/2, 3 -> 3/4 (with the tied OOD), 4 -> 4/5.
    assert found["aupr_in"] == pytest.approx((1 + 1 + 3 / 4 + 4 / 5) / 4)
    # Flagging from above: 5 -> 1/1; 4 -> 1/2 adds no recall; 3 -> 2/4.
    assert found["aupr_out"] == pytest.approx((1 + 2 / 4) / 2)
    assert found["fpr_at_id_tpr95"] == 1 / 2
    assert found["fpr_at_ood_tpr95"] == 2 / 4
    assert found["tie_fraction"] == 1 / 2
    assert (found["n_id"], found["n_ood"], found["ci"]) == (4, 2, {})


def test_the_two_meanings_of_fpr95_differ() -> None:
    ind = np.arange(100.0)  # 95% of them lie at or below 94
    ood = np.concatenate([np.full(10, 50.0), np.full(90, 200.0)])  # 95% of them lie at or above 50
    found = detection_metrics(ind, ood, bootstrap=0)
    assert found["fpr_at_id_tpr95"] == 0.10
    assert found["fpr_at_ood_tpr95"] == 0.50


def test_perfect_inverted_and_constant_scores() -> None:
    low, high = np.arange(30.0), np.arange(100.0, 120.0)
    assert [detection_metrics(low, high, 0)[name] for name in POINT] == [1, 1, 1, 0, 0]
    inverted = detection_metrics(high, low, 0)
    assert [inverted[name] for name in ("auroc", "fpr_at_id_tpr95", "fpr_at_ood_tpr95")] == [0, 1, 1]
    constant = detection_metrics(np.zeros(30), np.zeros(10), 0)
    assert [constant[name] for name in POINT] == [0.5, 0.75, 0.25, 1, 1]
    assert constant["tie_fraction"] == 1


@settings(max_examples=100, deadline=None)
@given(TIED, TIED)
def test_only_the_order_counts(ind: list[float], ood: list[float]) -> None:
    before = detection_metrics(ind, ood, bootstrap=20)
    after = detection_metrics(np.exp(np.array(ind) * 3) + 7, np.exp(np.array(ood) * 3) + 7, bootstrap=20)
    assert before == after


@settings(max_examples=100, deadline=None)
@given(TIED, TIED)
def test_swapping_the_sets_and_the_sign_swaps_the_roles(ind: list[float], ood: list[float]) -> None:
    one = detection_metrics(ind, ood, bootstrap=0)
    two = detection_metrics(-np.array(ood), -np.array(ind), bootstrap=0)
    assert one["auroc"] == pytest.approx(two["auroc"], abs=1e-12)
    assert one["aupr_in"] == pytest.approx(two["aupr_out"], abs=1e-12)
    assert one["fpr_at_id_tpr95"] == pytest.approx(two["fpr_at_ood_tpr95"], abs=1e-12)


def test_the_order_of_the_images_does_not_count() -> None:
    rng = np.random.default_rng(0)
    ind, ood = rng.normal(size=50), rng.normal(1, 1, 40)
    assert detection_metrics(ind, ood, 0) == detection_metrics(rng.permutation(ind), rng.permutation(ood), 0)


def test_tie_fraction_sees_a_score_of_low_precision() -> None:
    rng = np.random.default_rng(0)
    ind, ood = rng.normal(10, 1, 2000), rng.normal(12, 1, 2000)
    assert detection_metrics(ind, ood, 0)["tie_fraction"] == 0
    assert detection_metrics(ind.astype(np.float16), ood.astype(np.float16), 0)["tie_fraction"] > 0.5
    assert detection_metrics([1, 1, 1], [2, 2], 0)["tie_fraction"] == 0  # ties within a set lose nothing


def test_intervals_hold_the_estimate_and_shrink_with_n() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (100, 2500):
        found = detection_metrics(rng.normal(size=n), rng.normal(1, 1, n), bootstrap=500)
        assert set(found["ci"]) == set(POINT)
        for name, (low, high) in found["ci"].items():
            assert 0 <= low <= found[name] <= high <= 1
        widths.append(np.diff(found["ci"]["auroc"])[0])
    assert 3 < widths[0] / widths[1] < 8  # about sqrt(25)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    truth = 0.5 * (1 + math.erf(1 / 2))  # P(N(1, 1) > N(0, 1))
    trials = [detection_metrics(rng.normal(size=80), rng.normal(1, 1, 80), 200, seed)["ci"] for seed in range(150)]
    covered = np.mean([low <= truth <= high for low, high in (ci["auroc"] for ci in trials)])
    assert 0.88 <= covered <= 0.99


def test_the_intervals_are_the_quantiles_of_resampling_both_sets() -> None:
    """One set constant, the other on both sides of it: the resampled AUROC is a binomial share."""
    constant, sides = np.zeros(50), np.repeat([-1.0, 1.0], [30, 70])
    expected = np.array(binom.interval(0.95, 100, 0.7)) / 100
    assert detection_metrics(constant, sides, bootstrap=4000)["ci"]["auroc"] == pytest.approx(expected, abs=0.011)
    assert detection_metrics(-sides, constant, bootstrap=4000)["ci"]["auroc"] == pytest.approx(expected, abs=0.011)
    found = detection_metrics(sides, constant, bootstrap=4000)["ci"]["fpr_at_ood_tpr95"]
    assert found == pytest.approx(expected, abs=0.011)


def test_the_seed_decides_the_intervals_and_nothing_else() -> None:
    rng = np.random.default_rng(3)
    ind, ood = rng.normal(size=50), rng.normal(1, 1, 50)
    one, same, other = (detection_metrics(ind, ood, 100, seed) for seed in (0, 0, 1))
    assert one == same and one["ci"] != other["ci"]
    assert [one[name] for name in POINT] == [other[name] for name in POINT]


def test_results_are_plain_json() -> None:
    found = detection_metrics(np.float32([1, 2]), np.float32([2, 3]), bootstrap=5)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {*POINT, "ci", "tie_fraction", "n_id", "n_ood"}


def test_a_thousand_resamples_of_20000_scores_take_seconds() -> None:
    rng = np.random.default_rng(4)
    ind, ood = rng.normal(size=10_000).astype(np.float32), rng.normal(1, 1, 10_000).astype(np.float32)
    start = time.process_time()
    detection_metrics(ind, ood)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], r"at least one value, got shape \[0\]"),
        ([[1.0, 2.0]], r"one-dimensional with at least one value, got shape \[1, 2\]"),
        (3.0, r"got shape \[\]"),
        ([0, np.nan, 1, np.nan], "2 of 4 values are NaN or infinite, the first at index 1"),
        ([0, np.inf], "1 of 2 values are NaN or infinite"),
        ([-np.inf], "1 of 1 values"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(values: object, reason: str) -> None:
    fine = [1.0, 2.0]
    right = np.array([True, False])
    for name, call in [
        ("id_scores", lambda: detection_metrics(values, fine)),  # type: ignore[arg-type]
        ("ood_scores", lambda: detection_metrics(fine, values)),  # type: ignore[arg-type]
        ("id_scores", lambda: conformal_threshold(values)),  # type: ignore[arg-type]
        ("scores", lambda: risk_coverage(values, right)),  # type: ignore[arg-type]
        ("ood_scores", lambda: oscr(fine, right, values)),  # type: ignore[arg-type]
        ("id_scores", lambda: at_threshold(values, fine, 0.0)),
    ]:
        with pytest.raises(UsageError, match=f"^{name}.*{reason}"):
            call()


def test_a_negative_number_of_resamples_is_refused() -> None:
    with pytest.raises(UsageError, match="bootstrap must be 0 or more"):
        detection_metrics([1], [2], bootstrap=-1)


# ---------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("n", "tpr", "rank"), [(19, 0.95, 19), (20, 0.95, 20), (39, 0.95, 38), (99, 0.95, 95), (999, 0.9, 900), (1, 0.5, 1)]
)
def test_the_threshold_is_the_conformal_quantile(n: int, tpr: float, rank: int) -> None:
    scores = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    threshold = conformal_threshold(scores, tpr, data="calib")
    assert threshold.value == rank
    assert (threshold.n, threshold.target_tpr, threshold.data) == (n, tpr, "calib")
    assert threshold.fitted_tpr == rank / n >= tpr


@pytest.mark.parametrize(("tpr", "least"), [(0.5, 1), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99), (0.999, 999)])
def test_too_few_images_name_the_least_number(tpr: float, least: int) -> None:
    conformal_threshold(np.arange(float(least)), tpr)
    if least > 1:
        with pytest.raises(UsageError, match=f"needs at least {least} in-distribution images, got {least - 1}"):
            conformal_threshold(np.arange(least - 1.0), tpr)


def test_new_images_stay_known_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    known = [np.mean(rng.normal(size=50) <= conformal_threshold(rng.normal(size=39)).value) for _ in range(2000)]
    assert np.mean(known) == pytest.approx(38 / 40, abs=0.005)


def test_the_threshold_is_exact_on_fp32_scores() -> None:
    scores = np.random.default_rng(1).normal(size=100).astype(np.float32)
    threshold = conformal_threshold(scores)
    assert threshold.value in scores.tolist()
    stored = json.loads(json.dumps(threshold.value))
    assert np.mean(scores <= stored) == np.mean(scores <= np.float32(stored)) == threshold.fitted_tpr == 0.96


def test_tied_scores_stay_known_together() -> None:
    threshold = conformal_threshold(np.zeros(30), 0.5)
    assert (threshold.value, threshold.fitted_tpr) == (0, 1)


@pytest.mark.parametrize("tpr", [0, 1, -0.1, 1.5, 95, float("nan")])
def test_a_target_outside_0_to_1_is_refused(tpr: float) -> None:
    with pytest.raises(UsageError, match="target_tpr"):
        conformal_threshold(np.arange(100.0), tpr)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (95, 100), (0, 50), (50, 50), (4750, 5000)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_the_rate_interval_is_wilsons(k: int, n: int, level: float) -> None:
    expected = binomtest(k, n).proportion_ci(level, method="wilson")
    assert tpr_interval(k, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("k", "n", "level"), [(1, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 0), (1, 5, 1)])
def test_impossible_counts_are_refused(k: int, n: int, level: float) -> None:
    with pytest.raises(UsageError, match="tpr_interval"):
        tpr_interval(k, n, level)


def at_threshold(ind: Any, ood: Any, threshold: float, correct: Any = None) -> dict[str, Any]:
    """What `deployment_metrics` says of one class and one OOD set."""
    right = np.ones(np.size(ind), bool) if correct is None else correct
    shipped = Threshold(threshold, 0.95, 99, "calib", 0.96)
    found = deployment_metrics(ind, {"ood_scores": ood}, shipped, right, np.zeros(np.size(ind), int), ("a",))
    return {**found, **found["ood"]["ood_scores"]}


def test_what_happens_at_the_threshold() -> None:
    found = at_threshold([1, 2, 3, 4], [2, 9, 9, 9, 9], 2.0, correct=[True, False, True, True])
    assert (found["id_tpr"], found["false_reject"], found["false_accept"]) == (0.5, 0.5, 0.2)
    assert found["selective_accuracy"] == 0.5
    assert found["id_tpr_ci"] == list(tpr_interval(2, 4))
    assert found["false_accept_ci"] == list(tpr_interval(1, 5))
    assert found["false_reject_ci"] == list(tpr_interval(2, 4))
    assert found["selective_accuracy_ci"] == list(tpr_interval(1, 2))
    assert json.loads(json.dumps(found)) == found
    nothing_known = at_threshold([1, 2], [3], 0.0, correct=[True, True])
    assert nothing_known["selective_accuracy"] is nothing_known["selective_accuracy_ci"] is None
    assert nothing_known["id_tpr"] == 0


def test_deployment_figures_by_hand() -> None:
    threshold = Threshold(2.0, 0.95, 99, "calib", 0.96)
    right = [True, False, True, True]
    found = deployment_metrics(
        [1, 2, 3, 4], {"far": [2, 9], "near": [1, 1, 0]}, threshold, right, [0, 2, 2, 0], ("a", "b", "c")
    )
    assert found["threshold"] == {"value": 2.0, "target_tpr": 0.95, "n": 99, "data": "calib", "fitted_tpr": 0.96}
    assert (found["id_tpr"], found["false_reject"], found["selective_accuracy"]) == (0.5, 0.5, 0.5)
    half = {"rate": 0.5, "ci": list(tpr_interval(1, 2)), "n": 2}
    assert found["rejected_by_class"] == {"a": half, "b": {"rate": None, "ci": None, "n": 0}, "c": half}
    # risks 0, 1/2, 1/3, 1/4 at coverages 1/4 to 1
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert found["ood"]["far"]["false_accept"] == 0.5 and found["ood"]["near"]["false_accept"] == 1
    # of 8 pairs: 1 below both; 3 and 4 below 9
    assert found["ood"]["far"]["oscr"] == 4 / 8 and found["ood"]["near"]["oscr"] == pytest.approx(2 * 0.5 / 12)
    assert found["ood"]["near"]["false_accept_ci"] == list(tpr_interval(3, 3))
    assert json.loads(json.dumps(found)) == found
    assert deployment_metrics([1, 2, 3, 4], {}, threshold, right, [0, 2, 2, 0], ("a", "b", "c"))["ood"] == {}


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 3], [0, -1, 1], [[0, 1, 2]]])
def test_labels_that_do_not_fit_are_refused(labels: list[int]) -> None:
    threshold = Threshold(2.0, 0.95, 99, "calib", 0.96)
    with pytest.raises(UsageError, match=r"labels must be \[3\] of 0 to 2"):
        deployment_metrics([1, 2, 3], {}, threshold, [True] * 3, labels, ("a", "b", "c"))


def test_the_threshold_at_95_percent_gives_the_fpr_at_95_percent() -> None:
    rng = np.random.default_rng(5)
    ind, ood = rng.normal(size=400), rng.normal(1, 1, 300)
    at_95 = at_threshold(ind, ood, float(np.sort(ind)[379]))
    assert at_95["id_tpr"] == 0.95
    assert at_95["false_accept"] == detection_metrics(ind, ood, 0)["fpr_at_id_tpr95"]


@pytest.mark.parametrize("threshold", [float("nan"), float("inf")])
def test_a_threshold_that_is_not_finite_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match="threshold must be finite"):
        at_threshold([1], [2], threshold)


# ---------------------------------------------------------------- risk, coverage, OSCR


def test_risk_and_coverage_counted_by_hand() -> None:
    curve = risk_coverage([1, 2, 3, 4], [True, False, True, False])
    np.testing.assert_allclose(curve.coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curve.risk, [0, 1 / 2, 1 / 3, 2 / 4])
    assert curve.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    # Wrong answers over all images go 0, 0, 1/4, 1/4, 2/4; trapezoids of width 1/4.
    assert curve.augrc == pytest.approx((0 + 0.5 + 1 + 1.5) / 4 / 4)


CASES = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(CASES)
def test_tied_images_count_as_answered_in_random_order(cases: list[tuple[int, bool]]) -> None:
    def plain(order: tuple[tuple[int, bool], ...]) -> np.ndarray:
        wrong = np.cumsum([not correct for _, correct in order])
        return wrong / np.arange(1, len(order) + 1)

    orders = [o for o in itertools.permutations(cases) if all(a[0] <= b[0] for a, b in itertools.pairwise(o))]
    curve = risk_coverage([float(s) for s, _ in cases], np.array([c for _, c in cases], bool))
    np.testing.assert_allclose(curve.risk, np.mean([plain(o) for o in orders], axis=0), atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=80))
def test_augrc_is_the_failure_auroc_and_the_accuracy(cases: list[tuple[int, bool]]) -> None:
    """Traub et al. 2024: AUGRC = (1 - AUROC_f) acc (1 - acc) + (1 - acc)^2 / 2."""
    scores, correct = np.array([s for s, _ in cases], float), np.array([c for _, c in cases], bool)
    accuracy = correct.mean()
    mixed = 0 < accuracy < 1
    auroc = roc_auc_score(~correct, scores) if mixed else 0.0
    expected = (1 - auroc) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    assert risk_coverage(scores, correct).augrc == pytest.approx(expected, abs=1e-12)


def test_a_better_order_has_a_lower_aurc() -> None:
    correct = np.array([True] * 80 + [False] * 20)
    good, bad = risk_coverage(np.arange(100.0), correct), risk_coverage(-np.arange(100.0), correct)
    assert good.aurc < bad.aurc and good.augrc < bad.augrc
    assert good.risk[-1] == bad.risk[-1] == pytest.approx(0.2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30), TIED)
def test_oscr_counts_pairs(cases: list[tuple[int, bool]], ood: list[float]) -> None:
    scores, correct = [float(s) for s, _ in cases], [c for _, c in cases]
    pairs = [c * ((s < o) + 0.5 * (s == o)) for s, c in zip(scores, correct, strict=True) for o in ood]
    assert oscr(scores, np.array(correct, bool), ood) == pytest.approx(np.mean(pairs), abs=1e-12)
    everything_right = np.ones(len(scores), bool)
    assert oscr(scores, everything_right, ood) == pytest.approx(detection_metrics(scores, ood, 0)["auroc"], abs=1e-12)


@pytest.mark.parametrize("correct", [[1, 0], [True], [[True, False]], [0.5, 1.0]])
def test_correct_must_be_one_bool_an_image(correct: object) -> None:
    for call in (
        lambda: risk_coverage([1, 2], correct),  # type: ignore[arg-type]
        lambda: oscr([1, 2], correct, [3]),  # type: ignore[arg-type]
        lambda: at_threshold([1, 2], [3], 1.0, correct=correct),
    ):
        with pytest.raises(UsageError, match=r"correct must be bool of shape \[2\]"):
            call()
