"""Sums of scores: every part is heard alike, none buys back what another found, the file gives back what was fitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssod_edge.config import has_state, score_parts
from ssod_edge.detect.detectors import Detector
from ssod_edge.detect.fit import FitData, fit, fit_rmd, fit_vim
from ssod_edge.detect.scores import ood_scores
from ssod_edge.detect.sums import Outputs, ScoreSum, fit_score, load_score, save_score
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


def score(fitted, data: FitData) -> np.ndarray:
    return fitted.score(data.features, data.logits, data.id_logit)


def outputs(data: FitData) -> Outputs:
    return data.logits, data.id_logit, data.features


def test_a_sum_is_of_one_sided_parts(data: FitData) -> None:
    """Each part standardised by held-out images, and softplus(3 t) / 3 of it."""
    held_out, images = make(100, seed=2), make(50, seed=1)
    fitted = fit_score("ssod+gen+rmd+vim", data, outputs(held_out))
    assert isinstance(fitted, ScoreSum) and list(fitted.scales) == ["ssod", "gen", "rmd", "vim"]
    expected = np.zeros(50)
    for name in fitted.scales:
        if name in ("ssod", "gen"):
            known, values = (ood_scores(part.logits, part.id_logit)[name] for part in (held_out, images))
        else:
            detector = fit(name, data)
            known, values = score(detector, held_out), score(detector, images)
        t = (values - known.mean(dtype=np.float64)) / known.std(dtype=np.float64)
        expected += np.log1p(np.exp(3 * t)) / 3
    np.testing.assert_allclose(score(fitted, images), expected, rtol=1e-4, atol=1e-4)
    rows = fit_rmd(data).rows + fit_vim(data).rows
    assert fitted.rows == rows and fitted.multiply_adds == rows * WIDTH


def test_a_part_that_is_surer_than_of_known_images_buys_nothing_back(data: FitData) -> None:
    """A far image of large features: the energy says "known" far more strongly than a distance can say "unknown"."""
    held_out = make(100, seed=2)
    fitted = fit_score("energy+mahalanobispp", data, outputs(held_out))
    assert isinstance(fitted, ScoreSum)
    plain = replace(fitted, centers={})
    known = make(100, seed=3)
    far = known.features + np.float32(4) * np.abs(np.random.default_rng(1).normal(size=(100, WIDTH))).astype(np.float32)
    far *= 30
    unknown = replace(known, features=far, logits=far @ known.weight.T + known.bias)
    assert np.mean(score(plain, unknown)[:, None] > score(plain, known)) < 0.1
    assert np.mean(score(fitted, unknown)[:, None] > score(fitted, known)) > 0.8


def test_without_held_out_images_each_half_is_scored_by_the_other(data: FitData) -> None:
    """A distance is smaller to the images that it was fitted on, and the nearest of them is the image itself."""
    few = data.of(np.arange(40))
    fitted, held_out = fit_score("gen+knn", few), make(400, seed=4)
    assert isinstance(fitted, ScoreSum)
    assert fitted.centers == fit_score("gen+knn", few, outputs(make(7, seed=2))).centers  # type: ignore[union-attr]
    knn = fitted.detectors["knn"]
    assert knn.rows == 40 and score(knn, few).max() < 1e-5
    expected = score(knn, held_out)
    assert expected.mean() / 1.3 < fitted.centers["knn"] < 1.3 * expected.mean()
    assert expected.std() / 2 < 1 / fitted.scales["knn"] < 2 * expected.std()


def test_one_name_is_that_score(data: FitData) -> None:
    assert isinstance(fit_score("knn", data), Detector)
    assert score_parts("knn") == ("knn",) and score_parts("energy+knn") == ("energy", "knn")
    assert [has_state(name) for name in ("energy", "vim", "energy+msp")] == [False, True, True]


@pytest.mark.parametrize("name", ["energy+msp", "ssod+vim", "knn+rmdpp", "mahalanobis+rmd"])
def test_a_sum_comes_back_from_its_file(data: FitData, tmp_path: Path, name: str) -> None:
    fitted = fit_score(name, data)
    path = save_score(fitted, tmp_path / "detector.npz")
    assert path.read_bytes() == save_score(fitted, tmp_path / "again.npz").read_bytes()
    again = load_score(path)
    assert again.name == name and again.rows == fitted.rows
    np.testing.assert_array_equal(score(again, data), score(fitted, data))


def test_a_sum_of_an_earlier_release_is_plain(data: FitData, tmp_path: Path) -> None:
    fitted = fit_score("energy+knn", data)
    assert isinstance(fitted, ScoreSum)
    with np.load(save_score(fitted, tmp_path / "now.npz")) as file:
        arrays = {key: file[key] for key in file.files if key not in ("centers", "knn.start")}
    np.savez(tmp_path / "then.npz", **arrays)  # type: ignore[arg-type]
    then = load_score(tmp_path / "then.npz")
    parts = ood_scores(data.logits, data.id_logit)["energy"], score(fitted.detectors["knn"], data)
    expected = fitted.scales["energy"] * parts[0] + fitted.scales["knn"] * parts[1]
    np.testing.assert_allclose(score(then, data), expected, rtol=1e-5)


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
        ("energy+ssod", "'ssod' is the same for all known images: leave it out of 'energy[+]ssod'"),
    ],
)
def test_sums_that_make_no_sense_are_refused(data: FitData, name: str, message: str) -> None:
    untrained = replace(data, id_logit=np.zeros_like(data.id_logit))
    with pytest.raises(UsageError, match=message):
        fit_score(name, untrained)
