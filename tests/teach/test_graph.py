"""The end of a graph with another number of classes, against what NumPy computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small import random_images, run_onnx

from ssod_edge.config import has_state
from ssod_edge.detect.fit import FitData
from ssod_edge.detect.scores import probabilities
from ssod_edge.detect.sums import fit_score
from ssod_edge.errors import UsageError
from ssod_edge.export.graph.onnx import fused_graph, head_rows
from ssod_edge.export.graph.reference import run_eager
from ssod_edge.teach.fitted import outputs
from ssod_edge.teach.graph import End, Trunk, check_teachable, with_end

PHOTOS = random_images(60, seed=4)


def fit_data(model, seed: int, more: int) -> FitData:
    """Of random images, by the model's rows and `more` others."""
    _, id_logit, features = run_eager(model, PHOTOS.numpy())
    rng = np.random.default_rng(seed)
    weight, bias = (part[: len(model.classes)].detach().numpy() for part in model.head_weight())
    weight = np.concatenate([weight, rng.normal(0, weight.std(), (more, weight.shape[1])).astype(np.float32)])
    bias = np.concatenate([bias, np.zeros(more, np.float32)])
    labels = np.arange(60) % len(bias)
    return FitData(features, labels, features @ weight.T + bias, weight, bias, id_logit)


@pytest.mark.parametrize(
    ("score", "temperature", "cancellation"),
    [
        ("energy", 1.0, 0),
        ("knn", 2.0, 0),
        ("ssod+gen+mahalanobispp", 0.5, 0),
        ("residual", 1.0, 0),  # its rows are what is left out,
        ("gen+mahalanobispp+residual", 2.0, 1e9),  # or what is kept
    ],
)
def test_a_graph_with_another_class_gives_what_numpy_gives(small_model, score, temperature, cancellation, monkeypatch):
    monkeypatch.setattr("ssod_edge.detect.fit.CANCELLATION", cancellation)
    monkeypatch.setattr("ssod_edge.detect.fit.RANK", 8)
    before, after = fit_data(small_model, 0, 0), fit_data(small_model, 1, 1)
    state = fit_score(score, before) if has_state(score) else None
    graph = fused_graph(small_model, score, True, state, temperature)
    rows = head_rows(small_model, state)
    trunk = Trunk(graph, rows)
    np.testing.assert_allclose(trunk.features(PHOTOS.numpy()), before.features, atol=1e-4)
    row = np.append(trunk.weight[7], trunk.bias[7])
    new = fit_score(score, after) if has_state(score) else None
    weight, bias = np.concatenate([after.weight, row[None, :-1]]), np.append(after.bias, row[-1])
    taught = with_end(graph, rows, End(weight, bias, (*small_model.classes, "h"), new, 3.0))
    found = run_onnx(taught, random_images(5, seed=9))
    features = trunk.features(random_images(5, seed=9).numpy())
    logits, id_logit, expected = outputs(features, after.weight, after.bias, row, new, score)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-3)
    np.testing.assert_allclose(found["id_logit"], id_logit, atol=1e-3)
    np.testing.assert_allclose(found["ood_score"], expected, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(found["probs"], probabilities(logits / 3.0), atol=1e-4)


@pytest.mark.parametrize("score", ["msp", "vim", "gen+mahalanobis", "rmd"])
def test_scores_whose_operations_change_are_refused(score):
    with pytest.raises(UsageError, match="cannot be taught: .* Export the run with --score"):
        check_teachable(score, 7, 8)


def test_gen_reads_a_hundred_classes():
    check_teachable("gen", 99, 100)
    with pytest.raises(UsageError, match="a graph of 100 classes cannot be taught to have 101"):
        check_teachable("gen", 100, 101)


def test_the_mean_of_few_photos_counts_for_less(small_model):
    data = fit_data(small_model, 0, 0)
    plain, few = fit_score("mahalanobispp", data), fit_score("mahalanobispp", replace(data, few=(3,)))
    difference = few.bias - plain.bias
    assert np.flatnonzero(difference).tolist() == [len(plain.bias) - 7 + 3] and difference.min() < 0
