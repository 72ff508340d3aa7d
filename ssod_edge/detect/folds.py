"""Out-of-fold scores: of every training image, by a head and detectors that were fitted without it.

So few images need no split of their own for the thresholds: each image gives the score of a new one (cross-conformal
prediction, Vovk, Annals of Mathematics and Artificial Intelligence 2015; CV+, Barber et al., Annals of Statistics
2021). Fold models know a little less than the one that ships, so that known images are accepted a little more often
than asked for. The theorem is weaker: at a target of 95% at least 90% are, on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ssod_edge.config import DETECTORS, DetectorName
from ssod_edge.detect.detectors import Array
from ssod_edge.detect.fit import FitData, Labels, fit
from ssod_edge.detect.side_by_side import side_by_side
from ssod_edge.detect.sums import held_out_scores
from ssod_edge.errors import ArtifactError


@dataclass(frozen=True)
class Folds:
    """Last layers that were each fitted without some of n training images.

    Attributes:
        images: int64 [n], ascending, the images in their data set.
        fold: int64 [n], from 0 to K - 1: which layer has not seen an image.
        weight: float32 [K, M, D].
        bias: float32 [K, M].
        counts: float32 [n], how much each image counted in the fits.
        strength: of the fits, see `ssod_edge.detect.regression.STRENGTHS`.
        row, row_bias: float32 [K, D] and [K], the OOD row, fitted without each part; empty where it was not trained.
    """

    images: Labels
    fold: Labels
    weight: Array
    bias: Array
    counts: Array
    strength: float
    row: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    row_bias: Array = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        n, k = len(self.images), len(self.weight)
        fits = (
            self.fold.shape == self.counts.shape == (n,)
            and self.weight.ndim == 3
            and self.bias.shape == self.weight.shape[:2]
        )
        fits = fits and len(self.row) == len(self.row_bias) and len(self.row) in (0, k)
        if not fits or not n or self.fold.min() < 0 or self.fold.max() >= k or (np.diff(self.images) <= 0).any():
            raise ArtifactError("the folds of this run are damaged. Train it again")

    def rows(self, images: Labels) -> Labels:
        """Where some images stand in `images`.

        Raises:
            ArtifactError: not all of them are there.
        """
        found = np.searchsorted(self.images, images).clip(max=len(self.images) - 1)
        if not np.array_equal(self.images[found], images):
            raise ArtifactError("an image that thresholds come from is in no fold of this run. Train it again")
        return found

    def logits(self, features: Array, rows: Labels | None = None) -> Array:
        """Out-of-fold logits, float32 [n, M].

        Args:
            features: float32 [n, D], of `images`, or of those in `rows`.
            rows: int64 [n].
        """
        fold = self.fold if rows is None else self.fold[rows]
        found = np.empty((len(features), self.weight.shape[1]), np.float32)
        for k in np.unique(fold):
            found[fold == k] = features[fold == k] @ self.weight[k].T + self.bias[k]
        return found

    def id_logit(self, features: Array, otherwise: Array, rows: Labels | None = None) -> Array:
        """Out-of-fold logits of the OOD row, float32 [n]; arguments as for `logits`, and what it is without the row."""
        if not len(self.row):
            return otherwise
        fold = self.fold if rows is None else self.fold[rows]
        found: Array = np.einsum("nd,nd->n", features, self.row[fold]) + self.row_bias[fold]
        return found


def out_of_fold_parts(names: Sequence[str], data: FitData, folds: Folds) -> tuple[dict[str, Array], dict[str, Array]]:
    """Scores by name, float32 [n] each, of the images and of a disturbed copy of each, out of fold.

    Args:
        names: of scores, which are no sums.
        data: 2 n rows: the images of `folds`, in their order, and then a disturbed copy of each.
        folds: n images.

    Raises:
        UsageError: a detector cannot be fitted on so few images.
    """
    n = len(folds.images)
    assert len(data.features) == 2 * n
    plain: dict[str, Array] = {name: np.empty(n, np.float32) for name in names}
    disturbed: dict[str, Array] = {name: np.empty(n, np.float32) for name in names}
    parts = range(len(folds.weight))
    for outside, scores in side_by_side(partial(_without, names, data, folds), parts, data.features.nbytes):
        for found, values in zip((plain, disturbed), scores, strict=True):
            for name in names:
                found[name][outside] = values[name]
    return plain, disturbed


def _without(
    names: Sequence[str], data: FitData, folds: Folds, k: int
) -> tuple[NDArray[np.intp], tuple[dict[str, Array], dict[str, Array]]]:
    """(images of part k, scores of these by fits without them: of the images, and of their disturbed copies)."""
    n = len(folds.images)
    inside, outside = np.flatnonzero(folds.fold != k), np.flatnonzero(folds.fold == k)
    weight, bias = folds.weight[k], folds.bias[k]
    part = data.of(np.concatenate([inside, n + inside])).with_head(weight, bias)
    detectors = {name: fit(cast(DetectorName, name), part) for name in names if name in DETECTORS}

    def scores(rows: NDArray[np.intp]) -> dict[str, Array]:
        z = data.features[rows]
        id_logit = z @ folds.row[k] + folds.row_bias[k] if len(folds.row) else data.id_logit[rows]
        return held_out_scores(tuple(names), detectors, (z @ weight.T + bias, id_logit, z))

    return outside, (scores(outside), scores(n + outside))


def folds_of(arrays: Mapping[str, Array | Labels]) -> Folds | None:
    """Of what a checkpoint holds; None where it holds none."""
    if not arrays:
        return None
    try:
        images, fold = (np.asarray(arrays[key], np.int64) for key in ("images", "fold"))
        weight, bias, counts = (np.asarray(arrays[key], np.float32) for key in ("weight", "bias", "counts"))
        rows = [np.asarray(arrays[key], np.float32) for key in ("row", "row_bias") if key in arrays]
        return Folds(images, fold, weight, bias, counts, float(arrays["strength"]), *rows)
    except KeyError as error:
        raise ArtifactError("the folds of this run are damaged. Train it again") from error
