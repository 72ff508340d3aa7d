"""Detectors with a state: their rows against the formulas of their papers, and what is written of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf

from ssod_edge.config import DETECTORS, DetectorName
from ssod_edge.detect import fit as fit_module
from ssod_edge.detect.covariance import largest_variances, shrinkage_of
from ssod_edge.detect.detectors import Detector, read_detector, write_detector
from ssod_edge.detect.fit import (
    IMAGES_A_DIRECTION,
    RIDGE,
    FitData,
    _spherical_kmeans,
    fit,
)
from ssod_edge.detect.sums import load_score, save_score
from ssod_edge.errors import UsageError

CLASSES, WIDTH = 4, 24


def make_data(n: int = 400, seed: int = 0, offset: float = 5.0) -> FitData:
    """Classes around their means, with a covariance that is no sphere, far from the origin, one dimension constant."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(1).normal(0, 2, (CLASSES, WIDTH))
    labels = rng.integers(0, CLASSES, n)
    noise = rng.normal(0, 1, (n, WIDTH)) * np.geomspace(3, 0.05, WIDTH)
    features = means[labels] + noise @ np.linalg.qr(np.random.default_rng(2).normal(size=(WIDTH, WIDTH)))[0] + offset
    features[:, 3] = 0
    weight = np.random.default_rng(3).normal(0, 0.3, (CLASSES, WIDTH)).astype(np.float32)
    bias = np.arange(CLASSES, dtype=np.float32)
    features = features.astype(np.float32)
    return FitData(features, labels, features @ weight.T + bias, weight, bias, np.zeros(n, np.float32))


@pytest.fixture(scope="module")
def data() -> FitData:
    return make_data()


@pytest.fixture(scope="module")
def images() -> FitData:
    """Others than those of the fit, the last half of them far out."""
    made = make_data(60, seed=7)
    features = made.features.copy()
    features[30:] += np.random.default_rng(4).normal(0, 4, (30, WIDTH)).astype(np.float32)
    return replace(made, features=features, logits=features @ made.weight.T + made.bias)


def energy(logits: np.ndarray) -> np.ndarray:
    return -np.log(np.exp(logits.astype(np.float64)).sum(axis=1))


def covariances(data: FitData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class means, and the covariances within the classes and of all features, with the same ridge."""
    z = data.features.astype(np.float64)
    means = np.stack([z[data.labels == c].mean(axis=0) for c in range(CLASSES)])
    within = np.cov((z - means[data.labels]).T, bias=True)
    ridge = RIDGE * np.trace(within) / WIDTH * np.eye(WIDTH)
    return means, within + ridge, np.cov(z.T, bias=True) + ridge


def squared_distance(z: np.ndarray, center: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    inverse = np.linalg.inv(covariance)
    return np.array([(row - center) @ inverse @ (row - center) for row in z.astype(np.float64)])


def tune(monkeypatch: pytest.MonkeyPatch, **constants: float) -> None:
    """Fit with other constants than those that ship."""
    for name, value in constants.items():
        monkeypatch.setattr(f"ssod_edge.detect.fit.{name}", value)


@pytest.mark.parametrize(("constants", "kept"), [({}, WIDTH // 2), ({"PRINCIPAL": 4}, 4), ({"CANCELLATION": 0}, WIDTH)])
def test_mahalanobis_is_the_smallest_distance_to_a_class(
    data: FitData, images: FitData, monkeypatch: pytest.MonkeyPatch, constants: dict[str, int], kept: int
) -> None:
    tune(monkeypatch, **constants)
    means, within, _ = covariances(data)
    values, vectors = np.linalg.eigh(within)
    values[: WIDTH - kept] = values[: WIDTH - kept].mean() if kept < WIDTH else 1.0  # the rest is a sphere
    within = (vectors * values) @ vectors.T
    expected = np.min([squared_distance(images.features, mean, within) for mean in means], axis=0)
    found = fit("mahalanobis", data)
    assert found.rows == kept + CLASSES and bool(found.center.size) == (kept < WIDTH)
    np.testing.assert_allclose(found.score(images.features, images.logits), expected, rtol=1e-3)


def test_mahalanobis_subtracts_nothing_where_fp32_would_lose_it() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(0, 1e-3, (200, WIDTH))
    features[:, 0] += np.repeat([1000, -1000], 100)  # two classes, far apart and narrow
    labels = np.repeat([0, 1], 100)
    weight, logits = np.zeros((2, WIDTH), np.float32), np.zeros((200, 2), np.float32)
    data = FitData(features.astype(np.float32), labels, logits, weight, weight[:, 0], logits[:, 0])
    found = fit("mahalanobis", data)
    assert not found.center.size and found.settings["dimensions"] == WIDTH


def test_relative_mahalanobis_takes_two_rows_a_class(data: FitData, images: FitData) -> None:
    means, within, total = covariances(data)
    nearest = np.min([squared_distance(images.features, mean, within) for mean in means], axis=0)
    expected = nearest - squared_distance(images.features, data.features.astype(np.float64).mean(axis=0), total)
    found = fit("rmd", data)
    assert found.rows == 2 * CLASSES - 1
    np.testing.assert_allclose(found.score(images.features, images.logits), expected, rtol=1e-4, atol=1e-3)
    assert np.ptp(expected) > 10


def unit(features: np.ndarray) -> np.ndarray:
    return features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)


def shrunk(data: FitData) -> tuple[np.ndarray, np.ndarray]:
    """Class means of features at length 1, and their shrunk covariance within the classes."""
    z = unit(data.features)
    means = np.stack([z[data.labels == c].mean(axis=0) for c in range(CLASSES)])
    return means, ledoit_wolf(z - means[data.labels], assume_centered=True)[0]


@pytest.mark.parametrize("rank", [4, WIDTH // 2])
def test_mahalanobispp_is_the_distance_of_features_at_length_1(
    data: FitData, images: FitData, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    tune(monkeypatch, RANK=rank)
    means, within = shrunk(data)
    values, vectors = np.linalg.eigh(within)
    values[: WIDTH - rank] = values[: WIDTH - rank].mean()
    within = (vectors * values) @ vectors.T
    expected = np.min([squared_distance(unit(images.features), mean, within) for mean in means], axis=0)
    found = fit("mahalanobispp", data)
    assert found.rows == rank + CLASSES
    score = found.score(images.features, images.logits)
    np.testing.assert_allclose(score, expected, rtol=1e-3, atol=1e-3 * np.ptp(expected))
    longer = found.score(7 * images.features, images.logits)
    np.testing.assert_allclose(longer, score, rtol=1e-5, atol=1e-5 * np.ptp(expected))


def test_rmdpp_is_that_distance_less_the_one_to_all_images(data: FitData, images: FitData) -> None:
    means, within = shrunk(data)
    middle = unit(data.features).mean(axis=0)
    shares = np.bincount(data.labels) / len(data.labels)
    total = within + (means - middle).T @ ((means - middle) * shares[:, None])
    nearest = np.min([squared_distance(unit(images.features), mean, within) for mean in means], axis=0)
    expected = nearest - squared_distance(unit(images.features), middle, total)
    found = fit("rmdpp", data)
    assert found.rows == 2 * CLASSES - 1
    np.testing.assert_allclose(
        found.score(images.features, images.logits), expected, rtol=1e-3, atol=1e-4 * np.ptp(expected)
    )


def few_and_wide(n: int, seed: int, away: float = 0.0, width: int = 300) -> FitData:
    """Images of `CLASSES` classes with far more features than images; `away`: along directions that no class has."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(1).normal(0, 1, (CLASSES, width))
    labels = np.arange(n) % CLASSES
    features = 3 + means[labels] + rng.normal(0, 1, (n, width)) * np.geomspace(2, 0.1, width)
    features = (features + away * np.random.default_rng(8).normal(0, 1, (n, width))).astype(np.float32)
    weight = means.astype(np.float32)
    return FitData(features, labels, features @ weight.T, weight, np.zeros(CLASSES, np.float32), features[:, 0])


@pytest.mark.parametrize("name", ["mahalanobispp", "rmdpp", "knn"])
def test_what_is_unlike_all_images_is_far_with_ten_images_a_class(name: DetectorName) -> None:
    data = few_and_wide(10 * CLASSES, seed=0)
    sets = few_and_wide(100, seed=1), few_and_wide(100, seed=2, away=2.0)
    inside, outside = (fit(name, data).score(images.features, images.logits) for images in sets)
    assert np.mean(outside[:, None] > inside) > 0.85
    # The relative distance of two covariances that are shrunk apart turns round.
    means, within = shrunk(data)
    z = unit(data.features)
    total = ledoit_wolf(z - z.mean(axis=0), assume_centered=True)[0]
    inside, outside = (
        np.min([squared_distance(unit(images.features), mean, within) for mean in means], axis=0)
        - squared_distance(unit(images.features), z.mean(axis=0), total)
        for images in sets
    )
    assert np.mean(outside[:, None] > inside) < 0.05


def test_no_distance_from_all_images_makes_rmdpp_smaller() -> None:
    """Along what the classes do not differ in, it is the same at any distance: S^-1 - S0^-1 has no negative part."""
    data = few_and_wide(10 * CLASSES, seed=0)
    found = fit("rmdpp", data)
    quadratic = found.weight[: int(found.numbers["quadratic"])].astype(np.float64)
    assert len(quadratic) == CLASSES - 1 and np.linalg.eigvalsh(quadratic.T @ quadratic).min() > -1e-6


def test_a_variance_that_fp32_would_lose_is_no_direction_of_its_own() -> None:
    data = few_and_wide(200, seed=0)
    means = np.stack([data.features[data.labels == c].mean(axis=0) for c in range(CLASSES)])[data.labels]
    flat = replace(data, features=(means + 1e-5 * (data.features - means)).astype(np.float32))
    assert fit("mahalanobispp", flat).bias.max() < 1.1e5 * (1 + 1)  # 1 / LEAST_VARIANCE, and as much of the means


@pytest.mark.parametrize("name", ["mahalanobis", "rmd", "mahalanobispp", "rmdpp", "knn"])
def test_a_distance_reads_the_last_features_alone(
    data: FitData, images: FitData, monkeypatch: pytest.MonkeyPatch, name: DetectorName
) -> None:
    monkeypatch.setattr("ssod_edge.detect.fit.CANCELLATION", 1e9)  # so that `mahalanobis` has a center
    stages = 7
    early = np.random.default_rng(5).normal(0, 50, (len(data.features), stages)).astype(np.float32)
    both = replace(
        data,
        features=np.concatenate([early, data.features], axis=1),
        weight=np.pad(data.weight, ((0, 0), (stages, 0))),
        last=WIDTH,
    )
    found, expected = fit(name, both), fit(name, data)
    assert found.start == stages and found.weight.shape == (expected.rows, stages + WIDTH)
    assert not found.weight[:, :stages].any()
    seen = np.concatenate([np.full((len(images.features), stages), 9, np.float32), images.features], axis=1)
    score = expected.score(images.features, images.logits)
    np.testing.assert_allclose(found.score(seen, images.logits), score, rtol=1e-5, atol=1e-5 * np.ptp(score))
    assert fit("vim", both).start == 0


def test_disturbed_copies_bring_a_disturbance_nearer(data: FitData, images: FitData) -> None:
    """A fit may hold images and copies of them, with the labels of both."""
    offset = np.random.default_rng(6).normal(0, 2, WIDTH).astype(np.float32)
    both = data.of(np.tile(np.arange(len(data.features)), 2))
    features = both.features.copy()
    features[len(data.features) :] += offset
    both, known = replace(both, features=features), images.features[:30]
    for name in ("mahalanobis", "mahalanobispp", "knn"):
        apart, together = (
            np.mean(found.score(known + offset, images.logits[:30])) / np.mean(found.score(known, images.logits[:30]))
            for found in (fit(name, data), fit(name, both))  # type: ignore[arg-type]
        )
        assert together < 0.5 * apart, name
    assert fit("rmdpp", both).settings["classes"] == CLASSES


@pytest.mark.parametrize(
    ("constants", "kept", "rows"),
    [({}, 12, 12), ({"RANK": 8}, 8, 8), ({"RANK": 8, "CANCELLATION": 0}, 8, WIDTH - 8)],
)
def test_vim_is_the_residual_less_the_energy(
    data: FitData, images: FitData, monkeypatch: pytest.MonkeyPatch, constants: dict[str, int], kept: int, rows: int
) -> None:
    tune(monkeypatch, **constants)
    origin = -np.linalg.pinv(data.weight.astype(np.float64)) @ data.bias
    v = data.features - origin
    _, _, directions = np.linalg.svd(v, full_matrices=False)
    residual = directions[kept:].T
    alpha = data.logits.max(axis=1).mean() / np.linalg.norm(v @ residual, axis=1).mean()
    expected = alpha * np.linalg.norm((images.features - origin) @ residual, axis=1) + energy(images.logits)
    found = fit("vim", data)
    assert found.rows == rows
    np.testing.assert_allclose(found.score(images.features, images.logits), expected, rtol=1e-4, atol=1e-4)


def test_vim_keeps_the_residual_rows_where_the_difference_would_cancel(
    data: FitData, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(monkeypatch, RANK=8)
    flat = data.features.copy()
    flat[:, 8:] = 5 + 1e-4 * (flat[:, 8:] - 5)
    nearly_flat = replace(data, features=flat, logits=flat @ data.weight.T + data.bias)
    assert fit("vim", data).settings["rows"] == "principal space"
    assert fit("vim", nearly_flat).settings["rows"] == "residual space"


def test_knn_is_one_less_the_largest_cosine(data: FitData, images: FitData, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(monkeypatch, PROTOTYPES=3, MOST_PROTOTYPES=len(data.features) - 1)
    found = fit("knn", data)
    assert found.rows == 3 * CLASSES
    np.testing.assert_allclose(np.linalg.norm(found.weight, axis=1), 1, rtol=1e-5)
    cosine = images.features @ found.weight.T / np.linalg.norm(images.features, axis=1)[:, None]
    np.testing.assert_allclose(found.score(images.features, images.logits), 1 - cosine.max(axis=1), atol=1e-6)
    # Of so many images all are prototypes: it is the nearest training image, exactly.
    tune(monkeypatch, MOST_PROTOTYPES=len(data.features))
    full = fit("knn", data)
    assert full.rows == len(data.features)
    np.testing.assert_allclose(full.score(data.features, data.logits), 0, atol=1e-6)


def test_spherical_kmeans_finds_the_groups_and_repeats() -> None:
    rng = np.random.default_rng(0)
    axes = np.eye(6, dtype=np.float32)[:3]
    points = np.repeat(axes, 50, axis=0) + rng.normal(0, 0.05, (150, 6)).astype(np.float32)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    centres = _spherical_kmeans(unit, 3, np.random.default_rng(3))
    assert sorted((centres @ axes.T).argmax(axis=1)) == [0, 1, 2] and (centres @ axes.T).max(axis=1).min() > 0.99
    np.testing.assert_array_equal(centres, _spherical_kmeans(unit, 3, np.random.default_rng(3)))


def test_features_of_nothing_but_zeros_give_finite_scores(data: FitData) -> None:
    z = np.zeros((2, WIDTH), np.float32)
    for name in DETECTORS:
        assert np.isfinite(fit(name, data).score(z, z @ data.weight.T + data.bias)).all()  # type: ignore[arg-type]


def test_images_without_a_label_get_the_class_that_the_network_says(data: FitData) -> None:
    told = replace(data, labels=data.logits.argmax(axis=1))
    untold = replace(data, labels=np.full(len(data.labels), -1))
    np.testing.assert_array_equal(fit("rmd", told).weight, fit("rmd", untold).weight)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_comes_back_from_its_file(data: FitData, images: FitData, tmp_path, name: str) -> None:
    detector = fit(name, data)  # type: ignore[arg-type]
    path = save_score(detector, tmp_path / "detector.npz")
    assert path.read_bytes() == save_score(detector, tmp_path / "again.npz").read_bytes()
    again = load_score(path)
    assert isinstance(again, Detector)
    assert (again.name, again.numbers, again.rows) == (detector.name, detector.numbers, detector.rows)
    expected = detector.score(images.features, images.logits)
    np.testing.assert_array_equal(again.score(images.features, images.logits), expected)


def test_a_file_of_an_earlier_release_reads_all_features(data: FitData) -> None:
    arrays = write_detector(fit("knn", replace(data, last=WIDTH - 4)))
    assert read_detector(arrays).start == 4
    del arrays["start"]
    assert read_detector(arrays).start == 0


def test_wrong_input_is_refused(data: FitData, tmp_path) -> None:
    with pytest.raises(UsageError, match="detector must be one of vim"):
        fit("best", data)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not finite"):
        replace(data, features=np.full_like(data.features, np.nan))
    with pytest.raises(UsageError, match="features"):
        replace(data, labels=data.labels[1:])
    with pytest.raises(UsageError, match="between 0 and the 24 features, got 25"):
        replace(data, last=WIDTH + 1)
    with pytest.raises(UsageError, match="do not vary"):
        fit("rmd", replace(data, features=np.ones_like(data.features)))


def test_rmd_needs_two_classes(data: FitData) -> None:
    one = replace(data, labels=np.zeros_like(data.labels))
    with pytest.raises(UsageError, match="all of one class"):
        fit("rmd", one)
    assert fit("mahalanobis", one).numbers["quadratic"]


def test_the_residual_is_what_the_principal_directions_leave_out(
    data: FitData, images: FitData, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(monkeypatch, RANK=8)
    z = data.features.astype(np.float64)
    middle, deviation = z.mean(axis=0), z.std(axis=0)
    deviation = np.maximum(deviation, 0.1 * deviation.mean())
    _, _, directions = np.linalg.svd((z - middle) / deviation, full_matrices=False)
    expected = np.linalg.norm((images.features - middle) / deviation @ directions[8:].T, axis=1)
    found = fit("residual", data)
    assert found.rows == 8
    np.testing.assert_allclose(found.score(images.features, images.logits), expected, rtol=1e-4)
    other = replace(data, weight=-data.weight, logits=-data.logits)
    np.testing.assert_array_equal(fit("residual", other).weight, found.weight)


def test_a_dead_feature_says_little(data: FitData) -> None:
    found = fit("residual", data)
    z = data.features[:1].copy()
    z[:, 3] += data.features.std()  # which is 0 in all training images
    before, after = (found.score(values, values @ data.weight.T)[0] for values in (data.features[:1], z))
    assert before < after < before + 30


def test_few_images_leave_something_out() -> None:
    """As many directions as images would leave nothing of them, and the score would tell images of the fit apart."""
    found = fit("residual", few_and_wide(80, seed=0))
    assert found.settings["dimensions"] == 80 // IMAGES_A_DIRECTION


def test_the_largest_variances_of_many_features_are_found_by_iterations() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1, (500, 200)).astype(np.float32) * np.geomspace(10, 0.01, 200).astype(np.float32)
    covariance = z.T @ z / 500
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    found, directions = largest_variances(covariance, 20)
    np.testing.assert_allclose(found, values[-20:], rtol=0.02)
    left_out, exact = (np.linalg.norm(z - z @ space @ space.T, axis=1) for space in (directions, vectors[:, -20:]))
    np.testing.assert_allclose(left_out, exact, rtol=0.01)


@pytest.mark.parametrize("count", [5, 50, 5000])
def test_the_covariance_is_shrunk_as_ledoit_and_wolf_say(count: int) -> None:
    z = np.random.default_rng(0).normal(0, np.geomspace(1, 0.3, 30), (count, 30))
    covariance = (z.T @ z / count).astype(np.float32)
    assert shrinkage_of(z.astype(np.float32), covariance) == pytest.approx(
        ledoit_wolf(z, assume_centered=True)[1], rel=1e-3, abs=1e-5
    )


@pytest.mark.parametrize("few", [True, False])
def test_few_rows_are_fitted_by_one_thread(data: FitData, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a machine has several."""
    from threadpoolctl import threadpool_info, threadpool_limits

    found: list[int] = []
    monkeypatch.setattr(fit_module, "fit_vim", lambda _: found.extend(one["num_threads"] for one in threadpool_info()))
    monkeypatch.setattr(fit_module, "FEW_ROWS", len(data.features) - (0 if few else 1))
    with threadpool_limits(2):
        fit("vim", data)
    assert found and set(found) == ({1} if few else {2})
