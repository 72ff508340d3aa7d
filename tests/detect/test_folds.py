"""Out-of-fold scores: by models that have not seen an image, and what is damaged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ssod_edge.detect.fit import FitData, fit
from ssod_edge.detect.folds import Folds, folds_of, out_of_fold_parts
from ssod_edge.detect.scores import ood_scores
from ssod_edge.errors import ArtifactError

WIDTH, CLASSES, N, PARTS = 6, 3, 60, 4


def material() -> tuple[FitData, Folds]:
    """N images, then a copy of each; every fold's head is another one."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(CLASSES), N // CLASSES)
    plain = np.eye(CLASSES, WIDTH)[labels] * 4 + rng.normal(size=(N, WIDTH))
    z = np.concatenate([plain, plain + 0.1 * rng.normal(size=plain.shape)]).astype(np.float32)
    weight = rng.normal(size=(CLASSES, WIDTH)).astype(np.float32)
    zeros = np.zeros(2 * N, np.float32)
    data = FitData(z, np.tile(labels, 2), z @ weight.T, weight, np.zeros(CLASSES, np.float32), zeros)
    fold = np.repeat(np.arange(PARTS), N // PARTS)
    heads = rng.normal(size=(PARTS, CLASSES, WIDTH)).astype(np.float32)
    bias = rng.normal(size=(PARTS, CLASSES)).astype(np.float32)
    return data, Folds(np.arange(N) * 2, fold, heads, bias, np.ones(N, np.float32), 0.01)


def test_every_image_is_scored_by_the_models_that_have_not_seen_it() -> None:
    data, folds = material()
    plain, disturbed = out_of_fold_parts(("gen", "knn"), data, folds)
    for part in range(PARTS):
        outside = folds.fold == part
        inside = np.flatnonzero(~outside)
        logits = data.features[:N][outside] @ folds.weight[part].T + folds.bias[part]
        np.testing.assert_allclose(plain["gen"][outside], ood_scores(logits, logits[:, 0])["gen"], rtol=1e-5)
        detector = fit("knn", data.of(np.concatenate([inside, N + inside])))
        for found, z in ((plain, data.features[:N]), (disturbed, data.features[N:])):
            np.testing.assert_allclose(found["knn"][outside], detector.score(z[outside], logits), atol=1e-6)
    # An image that is among those of the fit, or whose copy is, lies next to itself.
    seen = fit("knn", data).score(data.features[:N], data.logits[:N])
    assert np.all(plain["knn"] > seen + 1e-6)


def test_logits_of_some_images_are_theirs() -> None:
    data, folds = material()
    rows = folds.rows(np.array([4, 40, 118]))
    assert rows.tolist() == [2, 20, 59]
    z = data.features[:N]
    np.testing.assert_allclose(folds.logits(z[rows], rows), folds.logits(z)[rows], rtol=1e-5)
    with pytest.raises(ArtifactError, match="in no fold"):
        folds.rows(np.array([4, 5]))


def test_damaged_folds_are_refused() -> None:
    _, folds = material()
    arrays = {name: np.asarray(getattr(folds, name)) for name in Folds.__dataclass_fields__}
    again = folds_of(arrays)
    assert again is not None and np.array_equal(again.weight, folds.weight) and again.strength == folds.strength
    assert folds_of({}) is None
    for broken in (
        {key: value for key, value in arrays.items() if key != "bias"},
        {**arrays, "fold": folds.fold + 1},
        {**arrays, "images": folds.images[::-1]},
        {**arrays, "counts": folds.counts[1:]},
    ):
        with pytest.raises(ArtifactError, match="damaged"):
            folds_of(broken)
    with pytest.raises(ArtifactError, match="damaged"):
        replace(folds, bias=folds.bias[:1])


def test_the_ood_row_is_out_of_fold_too() -> None:
    data, folds = material()
    rng = np.random.default_rng(5)
    row, bias = rng.normal(size=(PARTS, WIDTH)).astype(np.float32), rng.normal(size=PARTS).astype(np.float32)
    taught = replace(folds, row=row, row_bias=bias)
    plain, disturbed = out_of_fold_parts(("ssod",), data, taught)
    for found, z in ((plain, data.features[:N]), (disturbed, data.features[N:])):
        s = np.einsum("nd,nd->n", z, row[folds.fold]) + bias[folds.fold]
        np.testing.assert_allclose(found["ssod"], ood_scores(data.logits[:N], s)["ssod"], rtol=1e-4, atol=1e-6)
    expected = np.einsum("nd,nd->n", data.features[:N], row[folds.fold]) + bias[folds.fold]
    np.testing.assert_allclose(taught.id_logit(data.features[:N], s), expected, rtol=1e-4, atol=1e-6)
    assert folds.id_logit(data.features[:N], s) is s
    assert not np.allclose(plain["ssod"], out_of_fold_parts(("ssod",), data, folds)[0]["ssod"])
    with pytest.raises(ArtifactError, match="damaged"):
        replace(taught, row=row[1:])
