"""What a fused graph holds of a fitted score beside its rows: factors, offsets and constants. PyTorch traces them into
a new graph, and `ssod_edge.teach` puts them into one that is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssod_edge.detect.detectors import Array, Detector
from ssod_edge.detect.sums import SHARPNESS, ScoreSum


@dataclass(frozen=True)
class UnitRows:
    """Of a detector of features at length 1, times a factor.

    Attributes:
        weight: float32 [K, D], rows of the Gemm, which have no bias.
        quadratic: how many of them are squared.
        constant: float32 [K - quadratic], added to the others after the division by the length.
    """

    weight: Array
    quadratic: int
    constant: Array


def unit_rows(detector: Detector, scale: float) -> UnitRows:
    """Of a detector of `ssod_edge.detect.detectors.UNIT_LENGTH`."""
    rows = int(detector.numbers.get("quadratic", 0))
    linear = -scale if detector.name == "knn" else scale
    factors = np.repeat([np.sqrt(scale), linear], [rows, len(detector.weight) - rows])
    constant = linear * detector.bias[rows:] + (scale if detector.name == "knn" else 0)
    weight = (factors[:, None] * detector.weight).astype(np.float32)
    return UnitRows(weight, rows, np.asarray(constant, np.float32))


def residual_factors(detector: Detector, scale: float) -> Array:
    """What the squares of "vim" or "residual" are multiplied by, float32 [D - start + K], or [K] without a center:
    those of features less the center come first.
    """
    factor = (scale * detector.numbers.get("alpha", 1.0)) ** 2
    sign = -1 if detector.center.size else 1
    factors = np.repeat([factor, sign * factor], [len(detector.center), len(detector.bias)])
    if detector.spread.size:
        factors[: len(detector.center)] /= np.square(detector.spread.astype(np.float64))
    return factors.astype(np.float32)


def sum_numbers(total: ScoreSum) -> tuple[Array, Array]:
    """Factors and offsets of a one-sided sum, float32, one a part: softplus(factor * part + offset) is added up."""
    factors = SHARPNESS * np.array(list(total.scales.values()))
    offsets = -factors * np.array(list(total.centers.values()))
    return factors.astype(np.float32), offsets.astype(np.float32)
