"""The p-value of "known", and the temperature of the probabilities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssod_edge.detect.confidence import LEAST_IMAGES, P_SIZE, fit_temperature, p_known, verdict_inputs
from ssod_edge.detect.metrics import conformal_threshold
from ssod_edge.detect.scores import probabilities


def conformal(scores: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """(1 + number of calibration scores at or above) / (n + 1)."""
    return (1 + (calibration >= scores[:, None]).sum(axis=1)) / (len(calibration) + 1)


@given(st.integers(19, 99), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 0.8, 0.9, 0.95]))
def test_with_few_images_it_is_the_conformal_p_value(n: int, seed: int, tpr: float) -> None:
    rng = np.random.default_rng(seed)
    calibration = rng.normal(size=n).astype(np.float32).round(1)  # with ties
    scores = np.concatenate([calibration, rng.normal(0, 2, 50).astype(np.float32).round(1)])
    found = p_known(scores, verdict_inputs(conformal_threshold(calibration, tpr)))
    np.testing.assert_allclose(found, conformal(scores, calibration), atol=1e-6)


@settings(deadline=None)  # an emulator takes longer
@given(st.integers(100, 3000), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99]))
def test_with_many_it_is_never_below_and_by_a_hundredth_at_most_above(n: int, seed: int, tpr: float) -> None:
    rng = np.random.default_rng(seed)
    calibration = rng.normal(size=n).astype(np.float32)
    threshold = conformal_threshold(calibration, tpr)
    scores = np.concatenate([calibration, rng.normal(0, 2, 200).astype(np.float32), [np.float32(threshold.value)]])
    found, exact = p_known(scores, verdict_inputs(threshold)), conformal(scores, calibration)
    assert (found >= exact - 1e-6).all() and (found <= exact + 0.0101 + 1 / n).all()
    assert found.min() == pytest.approx(1 / (n + 1), abs=1e-6) or scores.max() <= calibration.max()
    np.testing.assert_array_equal(scores <= threshold.value, found > 1 - tpr + 1e-6)


def test_a_p_value_is_below_a_level_no_more_often_than_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = [
        p_known(rng.normal(size=50).astype(np.float32), verdict_inputs(conformal_threshold(rng.normal(size=200))))
        for _ in range(200)
    ]
    for level in (0.01, 0.05, 0.1, 0.5):
        assert (np.concatenate(draws) <= level).mean() <= level + 0.005


@pytest.mark.parametrize("n", [19, 39, 59, 999])
def test_at_the_threshold_it_is_not_above_the_level_in_any_number_format(n: int) -> None:
    """Where 1 / 20 is a level, as float32 nearest to 0.05 lies above it."""
    threshold = conformal_threshold(np.arange(float(n)))
    (p,) = p_known(np.array([threshold.value + 0.5]), verdict_inputs(threshold))
    assert 0.04 < float(p) <= 0.05


def test_a_score_that_is_no_number_is_not_usual() -> None:
    inputs = verdict_inputs(conformal_threshold(np.arange(100.0)))
    assert p_known(np.array([np.nan]), inputs)[0] == inputs["p_levels"].min()


def test_without_a_threshold_nothing_is_known() -> None:
    inputs = verdict_inputs(None)
    assert {name: value.shape for name, value in inputs.items()} == {
        "threshold": (1,),
        "p_scores": (1, P_SIZE),
        "p_levels": (1, P_SIZE),
    }
    scores = np.array([-1e30, 0, 1e30], np.float32)
    assert not (scores <= inputs["threshold"]).any() and not p_known(scores, inputs).any()


def test_a_threshold_of_an_early_release_still_says_what_is_known() -> None:
    early = replace(conformal_threshold(np.arange(100.0)), id_quantiles=(), id_highest=None)
    inputs = verdict_inputs(early)
    assert inputs["threshold"].tolist() == [95.0] and not p_known(np.array([3.0]), inputs).any()


@pytest.mark.parametrize("truth", [0.5, 1.0, 2.5])
def test_the_temperature_is_found_again(truth: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (20_000, 5))
    drawn = probabilities(logits / truth).cumsum(axis=1) > rng.uniform(size=(len(logits), 1))
    labels = drawn.argmax(axis=1)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(truth, rel=0.03)
    labels[::2] = -1
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(truth, rel=0.04)


def test_a_network_that_gets_all_right_is_not_certain_of_the_next() -> None:
    """Of 200 right answers, as sure of the next as the rule of succession: 1 - 3/4 / 201."""
    logits, labels = 5 * np.eye(4, dtype=np.float32).repeat(50, axis=0), np.arange(4).repeat(50)
    sure = probabilities(logits / fit_temperature(logits, labels)).max(axis=1)
    np.testing.assert_allclose(sure, 1 - 0.75 / 201, atol=1e-6)


def test_a_temperature_takes_labels_and_stays_in_its_bounds() -> None:
    logits = 5 * np.eye(4, dtype=np.float32).repeat(50, axis=0)
    labels = np.arange(4).repeat(50)
    assert fit_temperature(logits[: LEAST_IMAGES - 1], labels[: LEAST_IMAGES - 1]) == 1
    assert fit_temperature(logits / 100, labels) == pytest.approx(0.1, rel=1e-4)
    assert fit_temperature(logits, (labels + 1) % 4) == pytest.approx(10, rel=1e-4)
