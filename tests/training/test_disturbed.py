"""What training says of validation images in another light or by another camera."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pictures import write_folder

from ssod_edge.config import UNTOUCHED_SCORE, LossConfig, Preprocess, TrainConfig
from ssod_edge.detect.scores import ood_scores
from ssod_edge.errors import UsageError
from ssod_edge.training import disturbed
from ssod_edge.training.disturbed import judge_disturbed, some
from ssod_edge.training.features import Features, compute_features, fitting_data
from ssod_edge.training.loop import train
from ssod_edge.training.model import SSODClassifier
from ssod_edge.training.run import Run


def features_and_labels(model: SSODClassifier, n: int, noise: float, seed: int) -> tuple[Features, np.ndarray]:
    """n images around means of their own for each class, and copies at a distance from them."""
    rng = np.random.default_rng(seed)
    width, labels = model.classifier.in_features, np.arange(n) % 3
    means = 3 * np.random.default_rng(0).random((3, width))
    plain = (means[labels] + 0.2 * rng.normal(size=(n, width))).astype(np.float32)
    copies = (plain + noise * rng.normal(size=plain.shape)).astype(np.float32)
    return Features(plain, copies), labels


@pytest.mark.parametrize(("noise", "least", "most"), [(0.02, 0.85, 1.0), (6.0, 0.0, 0.3)])
def test_it_counts_the_copies_at_the_threshold_of_the_images(
    small_model: SSODClassifier, noise: float, least: float, most: float
) -> None:
    taught, labels = features_and_labels(small_model, 90, 0.2, seed=1)
    both = np.concatenate([taught.plain, taught.disturbed])
    training = fitting_data(small_model, both, np.tile(labels, 2), "head")
    known, truth = features_and_labels(small_model, 60, noise, seed=2)
    found = judge_disturbed(small_model, known, truth, training, UNTOUCHED_SCORE)
    assert (found.images, found.score) == (60, "gen+mahalanobispp+residual") and least <= found.accepted <= most
    logits = known.disturbed @ training.weight.T + training.bias
    assert found.accuracy == (logits.argmax(axis=1) == truth).mean()
    words = (
        f"of disturbed copies of 60 validation images {found.accuracy:.1%} are right, and {found.accepted:.1%} still"
    )
    assert words in str(found) and "(gen+mahalanobispp+residual, at 95% of the images)" in str(found)


def test_without_a_distance_the_default_score_tells_and_is_named(
    small_model: SSODClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, labels = features_and_labels(small_model, 60, 0.3, seed=2)
    training = fitting_data(small_model, np.tile(known.plain, (2, 1)), np.tile(labels, 2), "head")
    weight, bias = training.weight, training.bias
    scores = [ood_scores(z @ weight.T + bias, np.zeros(60))["energy"] for z in (known.plain, known.disturbed)]
    expected = (scores[1] <= np.sort(scores[0])[56]).mean()  # at most three of 60 lie above: 95%
    few = training.of(np.arange(20))

    def fails(*_: object) -> None:
        raise UsageError("it cannot be fitted")

    for given in (None, few, training):
        if given is training:
            monkeypatch.setattr(disturbed, "fit_score", fails)
        found = judge_disturbed(small_model, known, labels, given)
        assert found.score == "energy" and found.accepted == pytest.approx(expected, abs=1 / 60)


def test_images_are_drawn_seeded_and_in_order() -> None:
    images = np.arange(50) * 3
    few = some(images, 10)
    assert len(few) == 10 and (np.diff(few) > 0).all() and np.isin(few, images).all()
    assert np.array_equal(few, some(images, 10)) and np.array_equal(some(images, 90), images)


def test_training_of_the_whole_network_tells_it_of_the_best_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssod_edge.training.loop.DISTURBED_IMAGES", 5)
    config = TrainConfig(
        backbone="test_efficientnet", data=str(write_folder(tmp_path / "data", per_class=16)), name="run", epochs=2,
        batch_size=8, lr=1e-2, workers=0, preprocess=Preprocess(input_size=40), loss=LossConfig(method="ce"),
    )  # fmt: skip
    run = Run.at(train(config, tmp_path))
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("another light or camera")]
    source, splits = run.splits("")
    val = some(splits.val, 5)
    expected = judge_disturbed(run.model, compute_features(run.model, source, val), source.labels[val])
    assert line == str(expected) and "of 5 validation images" in line and "(energy, at 95%" in line
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2
    train(config, tmp_path, resume=True)
    assert "another light" not in capsys.readouterr().err
