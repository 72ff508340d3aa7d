"""Scores in fp32 against their formulas in double, and the properties that make them scores."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, logsumexp
from scipy.stats import rankdata

from ssod_edge.config import SCORES, ScoreName
from ssod_edge.detect.scores import ood_scores, probabilities
from ssod_edge.errors import UsageError


def reference(logits: np.ndarray, id_logit: np.ndarray) -> dict[str, np.ndarray]:
    """The documented formulas, written plainly in double."""
    z, s = logits.astype(np.float64), id_logit.astype(np.float64)
    ordered = np.sort(z, axis=1)
    return {
        "ssod": -s,
        "msp": logsumexp(ordered[:, :-1], axis=1) - ordered[:, -1],
        "maxlogit": -ordered[:, -1],
        "energy": -logsumexp(z, axis=1),
        "gen": generalised_entropy(z),
        "posterior": -(log_softmax(z, axis=1).max(axis=1) - np.logaddexp(0, -s)),
    }


def generalised_entropy(z: np.ndarray) -> np.ndarray:
    """(p (1 - p))^0.1 of the 100 likeliest classes, where 1 - p is the sum of the others."""
    log_p = log_softmax(z, axis=1)
    log_rest = np.stack([logsumexp(np.delete(log_p, c, axis=1), axis=1) for c in range(z.shape[1])], axis=1)
    likeliest = np.argsort(-log_p, axis=1, kind="stable")[:, :100]
    return np.take_along_axis(np.exp(0.1 * (log_p + log_rest)), likeliest, axis=1).sum(axis=1)


def assert_matches(logits: np.ndarray, id_logit: np.ndarray) -> None:
    scores, expected = ood_scores(logits, id_logit), reference(logits, id_logit)
    assert tuple(scores) == SCORES
    scale = max(1.0, float(np.abs(logits).max()), float(np.abs(id_logit).max()))
    for name, values in scores.items():
        assert values.dtype == np.float32 and values.shape == id_logit.shape
        np.testing.assert_allclose(values, expected[name], rtol=2e-6, atol=2e-7 * scale, err_msg=name)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("spread", [0.01, 1, 30, 1000, 1e5])
def test_scores_follow_their_formulas(classes: int, spread: float) -> None:
    rng = np.random.default_rng(classes)
    logits = (spread * rng.normal(size=(50, classes))).astype(np.float32)
    assert_matches(logits, (spread * rng.normal(size=50)).astype(np.float32))


LOGITS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(2, 7)), elements=st.floats(-100, 100, width=32)
)


@settings(max_examples=200, deadline=None)
@given(LOGITS, st.data())
def test_scores_follow_their_formulas_on_any_logits(logits: np.ndarray, data: st.DataObject) -> None:
    rows = hnp.arrays(np.float32, len(logits), elements=st.floats(-100, 100, width=32))
    assert_matches(logits, data.draw(rows))


def test_known_values() -> None:
    scores = ood_scores([[np.log(6), np.log(3), 0]], [0])  # probabilities 0.6, 0.3, 0.1 and sigmoid 0.5
    assert scores["ssod"] == 0
    np.testing.assert_allclose(scores["msp"], np.log(4 / 6), rtol=1e-6)
    np.testing.assert_allclose(scores["maxlogit"], -np.log(6), rtol=1e-6)
    np.testing.assert_allclose(scores["energy"], -np.log(10), rtol=1e-6)
    np.testing.assert_allclose(scores["gen"], 0.24**0.1 + 0.21**0.1 + 0.09**0.1, rtol=1e-6)
    np.testing.assert_allclose(scores["posterior"], -np.log(0.6 * 0.5), rtol=1e-6)


def test_msp_ranks_as_the_largest_probability_does() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (500, 5)).astype(np.float32)
    exact = np.exp(log_softmax(logits.astype(np.float64), axis=1)).max(axis=1)
    order = np.argsort(ood_scores(logits, np.zeros(500))["msp"], kind="stable")
    assert (np.diff(exact[order]) <= 1e-6).all()


@pytest.mark.parametrize("name", ["msp", "gen"])
def test_msp_and_gen_rank_on_where_the_probability_has_saturated(name: ScoreName) -> None:
    logits = np.stack([np.linspace(20, 200, 300), np.zeros(300), np.zeros(300)], 1)
    assert len(np.unique(probabilities(logits).max(axis=1))) == 1
    assert (np.diff(ood_scores(logits, np.zeros(300))[name]) < 0).all()


def test_ssod_ranks_on_where_the_sigmoid_has_saturated() -> None:
    id_logit = np.linspace(18, 100, 300)
    assert (np.diff(ood_scores(np.zeros((300, 2)), id_logit)["ssod"]) < 0).all()


def test_posterior_keeps_small_doubts_apart() -> None:
    logits = np.stack([np.linspace(20, 60, 100), np.zeros(100)], 1)
    posterior = ood_scores(logits, np.full(100, 100))["posterior"]  # 1 - p is below fp32's resolution from 17 on
    assert (np.diff(posterior) < 0).all() and (posterior > 0).all()


@pytest.mark.parametrize("name", SCORES)
def test_larger_is_more_ood(name: str) -> None:
    sure, unsure = [9.0, 0, 0], [0.4, 0.3, 0.2]
    scores = ood_scores([sure, unsure], [5, -5])[name]  # type: ignore[index]
    assert scores[1] > scores[0]


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.integers(-50, 50))
def test_a_common_shift_of_the_logits_moves_energy_and_maxlogit_alone(logits: np.ndarray, shift: int) -> None:
    zeros = np.zeros(len(logits))
    before, after = ood_scores(logits, zeros), ood_scores(logits + np.float32(shift), zeros)
    for name, moved in [
        ("ssod", 0),
        ("msp", 0),
        ("gen", 0),
        ("posterior", 0),
        ("energy", -shift),
        ("maxlogit", -shift),
    ]:
        np.testing.assert_allclose(after[name], before[name] + moved, rtol=1e-4, atol=1e-4, err_msg=name)  # type: ignore[index]


def test_the_order_of_the_classes_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    logits, id_logit = rng.normal(0, 5, (40, 9)).astype(np.float32), rng.normal(size=40)
    before, after = ood_scores(logits, id_logit), ood_scores(logits[:, rng.permutation(9)], id_logit)
    for name in SCORES:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-6)  # type: ignore[index]


def test_posterior_lies_above_its_two_parts() -> None:
    rng = np.random.default_rng(2)
    logits, id_logit = rng.normal(0, 3, (200, 4)), rng.normal(0, 3, 200)
    posterior = ood_scores(logits, id_logit)["posterior"]
    assert (posterior >= -np.log(probabilities(logits).max(axis=1)) - 1e-5).all()
    assert (posterior >= np.logaddexp(0, -id_logit) - 1e-5).all()


def test_ties_at_the_top_count_once() -> None:
    scores = ood_scores([[5, 5, -np.inf]], [0])
    assert scores["msp"] == 0
    np.testing.assert_allclose(scores["energy"], -(5 + np.log(2)), rtol=1e-6)


def test_a_row_that_is_not_finite_stays_alone_and_quiet() -> None:
    logits = np.array([[1, 2, 3], [np.nan, 0, 1], [np.inf, np.inf, 0], [3, 2, 1]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = ood_scores(logits, [0, 0, 0, np.nan])
        shares = probabilities(logits)
    clean = ood_scores(logits[:1], [0])
    for name in SCORES:
        assert scores[name][0] == clean[name][0]  # type: ignore[index]
    for name in ("msp", "maxlogit", "energy", "gen", "posterior"):
        assert not np.isfinite(scores[name][1:3]).any()  # type: ignore[index]
    assert np.isnan(scores["ssod"][3]) and np.isnan(scores["posterior"][3]) and np.isfinite(scores["energy"][3])
    assert np.isnan(shares[1]).all() and np.isfinite(shares[[0, 3]]).all()


def test_empty_batches_and_other_layouts() -> None:
    for values in ood_scores(np.empty((0, 3)), np.empty(0)).values():
        assert values.shape == (0,) and values.dtype == np.float32
    logits = np.random.default_rng(3).normal(size=(6, 8)).astype(np.float32)
    strided = np.asfortranarray(np.repeat(logits, 2, axis=0))[::2]
    for name, values in ood_scores(strided, np.zeros(6)).items():
        np.testing.assert_array_equal(values, ood_scores(logits, np.zeros(6))[name])


def test_half_precision_logits_are_scored_in_fp32() -> None:
    half = np.float16([[60000, 0, 0], [12, 11, 10]])
    for name, values in ood_scores(half, np.float16([1, 2])).items():
        np.testing.assert_array_equal(values, ood_scores(half.astype(np.float32), [1, 2])[name])


def test_arguments_are_not_modified() -> None:
    logits, id_logit = np.random.default_rng(4).normal(size=(2, 5, 3)).astype(np.float32), np.ones(5, np.float32)
    before = logits.copy()
    ood_scores(logits[0], id_logit)
    probabilities(logits[1])
    np.testing.assert_array_equal(logits, before)


def test_probabilities_are_a_softmax() -> None:
    logits = np.random.default_rng(5).normal(0, 20, (100, 7)).astype(np.float32)
    shares = probabilities(logits)
    assert shares.dtype == np.float32
    np.testing.assert_allclose(shares, np.exp(log_softmax(logits.astype(np.float64), axis=1)), rtol=5e-6, atol=1e-30)
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-6)
    assert (rankdata(shares, axis=1).argmax(axis=1) == logits.argmax(axis=1)).all()
    np.testing.assert_array_equal(probabilities([[1e30, -1e30]]), [[1, 0]])


@pytest.mark.parametrize("logits", [np.zeros((3, 1)), np.zeros(3), np.zeros((2, 3, 4)), np.zeros((0, 0))])
def test_wrong_logits_are_refused(logits: np.ndarray) -> None:
    for call in (lambda: ood_scores(logits, np.zeros(3)), lambda: probabilities(logits)):
        with pytest.raises(UsageError, match=r"logits must have shape \[N, M\] with M >= 2"):
            call()


@pytest.mark.parametrize("id_logit", [np.zeros(2), np.zeros((3, 1)), 0.0])
def test_a_wrong_id_logit_is_refused(id_logit: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"id_logit must have shape \[3\]"):
        ood_scores(np.zeros((3, 4)), id_logit)
