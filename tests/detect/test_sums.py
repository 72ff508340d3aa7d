"""Sums of scores: every part is heard alike, and the file gives back what was fitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssod_edge.config import has_state, score_parts
from ssod_edge.detect.detectors import Detector
from ssod_edge.detect.fit import FitData, fit_rmd, fit_vim
from ssod_edge.detect.scores import ood_scores
from ssod_edge.detect.sums import ScoreSum, fit_score, load_score, save_score, spreads
from ssod_edge.errors import ArtifactError, UsageError

WIDTH, CLASSES = 24, 4


def make(n: int, seed: int) -> FitData:
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(9).normal(0, 3, (CLASSES, WIDTH))
    labels = rng.integers(0, CLASSES, n)
    features = np.maximum(means[labels] + rng.normal(0, 1, (n, WIDTH)), 0).astype(np.float32)
    weight, bias = means.astype(np.float32), np.full(CLASSES, -5, np.float32)
    id_logit = (features[:, 0] - 2).astype(np.float32)
    return FitData(features, labels, features @ weight.T + bias, weight, bias, id_logit)


@pytest.fixture(scope="module")
def data() -> FitData:
    return make(400, seed=0)


def spread(values: np.ndarray) -> float:
    """Of 400 scores: from half the way between the 200th and 201st to a twentieth behind the 380th."""
    ordered = np.sort(values.astype(np.float64))
    return 0.95 * ordered[379] + 0.05 * ordered[380] - ordered[199:201].mean()


def score(fitted, data: FitData) -> np.ndarray:
    return fitted.score(data.features, data.logits, data.id_logit)


def test_a_sum_is_of_its_parts_in_units_of_their_spread(data: FitData) -> None:
    fitted, images = fit_score("ssod+energy+rmd+vim", data), make(50, seed=1)
    assert isinstance(fitted, ScoreSum) and list(fitted.scales) == ["ssod", "energy", "rmd", "vim"]
    free, trained = ood_scores(images.logits, images.id_logit), ood_scores(data.logits, data.id_logit)
    assert spread(trained["ssod"]) == 0  # most of these ID logits are the largest
    expected = free["ssod"] / np.std(trained["ssod"]) + free["energy"] / spread(trained["energy"])
    for detector in (fit_rmd(data), fit_vim(data)):
        expected = expected + score(detector, images) / spread(score(detector, data))
    np.testing.assert_allclose(score(fitted, images), expected, rtol=1e-4, atol=1e-3)
    rows = fit_rmd(data).rows + fit_vim(data).rows
    assert fitted.rows == rows and fitted.multiply_adds == rows * WIDTH


def test_one_name_is_that_score(data: FitData) -> None:
    assert isinstance(fit_score("knn", data), Detector)
    assert score_parts("knn") == ("knn",) and score_parts("energy+knn") == ("energy", "knn")
    assert [has_state(name) for name in ("energy", "vim", "energy+msp")] == [False, True, True]


@pytest.mark.parametrize("name", ["energy+msp", "ssod+vim", "knn+react+scale", "mahalanobis+rmd"])
def test_a_sum_comes_back_from_its_file(data: FitData, tmp_path: Path, name: str) -> None:
    fitted = fit_score(name, data)
    path = save_score(fitted, tmp_path / "detector.npz")
    assert path.read_bytes() == save_score(fitted, tmp_path / "again.npz").read_bytes()
    again = load_score(path)
    assert again.name == name and again.rows == fitted.rows
    np.testing.assert_array_equal(score(again, data), score(fitted, data))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"rubbish"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "detector.npz").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"detector.npz' is no score of this release .* Export the run again"):
        load_score(tmp_path / "detector.npz")


def test_parts_that_are_not_those_of_the_name_are_refused(data: FitData, tmp_path: Path) -> None:
    fitted = fit_score("energy+rmd", data)
    assert isinstance(fitted, ScoreSum)
    wrong = ScoreSum("energy+vim", {"vim": fitted.detectors["rmd"]}, {"energy": 1.0, "vim": 1.0})
    with pytest.raises(ArtifactError, match="changed places"):
        load_score(save_score(wrong, tmp_path / "detector.npz"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("energy+best", "or a sum of some such as energy[+]rmd, got 'best'"),
        ("energy+", "got ''"),
        ("rmd+rmd", "has one part twice"),
        ("react+vim+ash", "react and ash cannot be in one sum"),
        ("energy+ssod", "'ssod' is the same for all training images: leave it out of 'energy[+]ssod'"),
    ],
)
def test_sums_that_make_no_sense_are_refused(data: FitData, name: str, message: str) -> None:
    untrained = replace(data, id_logit=np.zeros_like(data.id_logit))
    with pytest.raises(UsageError, match=message):
        fit_score(name, untrained)


def test_a_spread_is_taken_on_the_side_of_the_threshold(data: FitData) -> None:
    """A long tail of surely known images does not count, one towards the unknown does."""
    id_logit = np.linspace(-1, 1, 400, dtype=np.float32)
    for sign, expected in ((1, 0.9), (-1, 10.0)):
        stretched = sign * np.where(id_logit > 0.85, 10, id_logit)  # the score is its negative
        found = spreads(("ssod",), {}, replace(data, id_logit=stretched.astype(np.float32)))["ssod"]
        assert found == pytest.approx(expected, rel=1e-2)
