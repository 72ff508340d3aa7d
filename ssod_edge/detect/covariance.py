"""Of a covariance of many features: how much a sphere should replace it, and its largest directions, in little time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ssod_edge.detect.detectors import Array, Wide
from ssod_edge.optional import load


def shrinkage_of(within: Array, covariance: Array) -> float:
    """How much of a covariance a sphere of its size should replace (Ledoit and Wolf, 2004), in [0, 1].

    scikit-learn's `ledoit_wolf` gives the same; it forms the products of all features once more.

    Args:
        within: [N, D], of mean 0.
        covariance: [D, D], of them.
    """
    square = float(np.vdot(covariance, covariance))
    level = float(np.trace(covariance)) / len(covariance)
    fourth = float(np.square(np.square(within).sum(axis=1, dtype=np.float64)).mean())
    error = (fourth - square) / len(within)
    distance = square - len(covariance) * level**2
    return min(max(error, 0.0), distance) / distance if distance > 0 else 0.0


def largest_variances(covariance: npt.NDArray[np.floating[Any]], count: int) -> tuple[Wide, Wide]:
    """The largest variances of a covariance [D, D], [count], and their directions [D, count], ascending.

    Of many features by randomised iterations (Halko et al., 2011), in a tenth of the time; they find the space of the
    directions as well as scores can tell.
    """
    if len(covariance) <= 4 * count:
        values, vectors = np.linalg.eigh(covariance.astype(np.float64))
        return values[len(values) - count :], vectors[:, len(values) - count :]
    extmath = load("sklearn.utils.extmath", "fitting a detector")
    vectors, values, _ = extmath.randomized_svd(covariance, count, n_oversamples=count // 4, n_iter=6, random_state=0)
    return values[::-1].astype(np.float64), vectors[:, ::-1].astype(np.float64)
