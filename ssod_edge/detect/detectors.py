"""OOD detectors whose state is a matrix, fitted on training features and small enough to be fused into the graph.

Each is brought into one form, so that one graph and one NumPy function serve all: rows [K, D] with a bias [K], which
read the pooled features z (for most of them in the Gemm that gives the logits), and a few numbers. Larger scores are
more likely OOD. `ssod_edge.detect.fit` fits them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ssod_edge.config import DETECTORS, DetectorName

Array = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]

#: Detectors of features that are brought to length 1: the rows' products are divided by it before the bias is added.
UNIT_LENGTH = ("knn", "mahalanobispp", "rmdpp")
#: Less than any divisor that means something.
TINY = 1e-12


@dataclass(frozen=True)
class Detector:
    """A fitted detector, in the form that the graph computes.

    With y = z @ weight.T + bias, v = z[start:], u = z @ weight.T / |v| + bias, Q = numbers["quadratic"] and
    e(l) = -logsumexp(l):

        vim            alpha |y| + e(logits); with a center: |y|^2 is |v - center|^2 - |y|^2
        residual       the same without alpha and e; |v - center|^2 is of (v - center) / spread
        rmd            |y[:Q]|^2 + min(y[Q:])
        mahalanobis    the same; with a center: scale |v - center|^2 - |y[:Q]|^2 + min(y[Q:])
        rmdpp          min(u[Q:]) + |u[:Q]|^2
        mahalanobispp  min(u[Q:]) - |u[:Q]|^2
        knn            1 - max(u)

    Attributes:
        name: of `ssod_edge.config.DETECTORS`.
        weight: float32 [K, D], 0 before `start`.
        bias: float32 [K].
        center: float32 [D - start], or [0].
        numbers: those above.
        settings: what it was fitted with, for the record.
        start: first of the features that it reads.
        spread: float32 [D - start] that features less the center are divided by, or [0].
    """

    name: DetectorName
    weight: Array
    bias: Array
    center: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    numbers: dict[str, float] = field(default_factory=dict)
    settings: dict[str, float | str] = field(default_factory=dict)
    start: int = 0
    spread: Array = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def rows(self) -> int:
        """Rows that it adds to the Gemm that gives the logits."""
        return len(self.weight)

    @property
    def multiply_adds(self) -> int:
        """Of its matrix products, for one image."""
        return int(self.weight.size)

    def score(self, features: npt.ArrayLike, logits: npt.ArrayLike, id_logit: npt.ArrayLike | None = None) -> Array:
        """Score images in double precision, rounded at the end.

        Args:
            features: [N, D], pooled.
            logits: [N, M], of the classifier.
            id_logit: not read; a sum of scores (`ssod_edge.detect.sums.ScoreSum`) takes it.

        Returns:
            float32 [N].
        """
        return self._score(np.asarray(features, np.float64), np.asarray(logits, np.float64)).astype(np.float32)

    def _score(self, features: Wide, given: Wide) -> Wide:
        z, v, weight = features, features[:, self.start :], self.weight.T.astype(np.float64)
        quadratic = int(self.numbers.get("quadratic", 0))
        if self.name in UNIT_LENGTH:
            u = z @ weight / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), TINY) + self.bias
            if self.name == "knn":
                return np.asarray(1 - u.max(axis=1))
            sign = 1 if self.name == "rmdpp" else -1
            return np.asarray(u[:, quadratic:].min(axis=1) + sign * np.square(u[:, :quadratic]).sum(axis=1))
        y = z @ weight + self.bias
        if self.name in ("vim", "residual"):
            squared = np.square(y).sum(axis=1)
            if self.center.size:
                away = (v - self.center) / self.spread if self.spread.size else v - self.center
                squared = np.maximum(np.square(away).sum(axis=1) - squared, 0)
            residual: Wide = np.sqrt(squared)
            return self.numbers["alpha"] * residual + _energy(given) if self.name == "vim" else residual
        distance: Wide = np.square(y[:, :quadratic]).sum(axis=1)
        if self.center.size:
            distance = self.numbers["scale"] * np.square(v - self.center).sum(axis=1) - distance
        distance += y[:, quadratic:].min(axis=1)
        return distance


def write_detector(detector: Detector) -> dict[str, npt.NDArray[Any]]:
    """A detector as named arrays; `read_detector` reads them back, without `settings`, which stand in the spec."""
    names = sorted(detector.numbers)
    return {
        "name": np.array(detector.name),
        "weight": detector.weight,
        "bias": detector.bias,
        "center": detector.center,
        "names": np.array(names),
        "numbers": np.array([detector.numbers[name] for name in names], np.float64),
        "start": np.array(detector.start),
        "spread": detector.spread,
    }


def read_detector(arrays: Mapping[str, npt.NDArray[Any]]) -> Detector:
    """One without `start`, as earlier releases wrote it, reads all features; one without `spread` has none.

    Raises:
        KeyError, ValueError: the arrays are not those of a detector.
    """
    numbers = dict(zip(arrays["names"].tolist(), arrays["numbers"].tolist(), strict=True))
    name = str(arrays["name"])
    if name not in DETECTORS:
        raise ValueError(f"unknown detector '{name}'")
    weight, bias, center = (np.asarray(arrays[key], np.float32) for key in ("weight", "bias", "center"))
    start, spread = int(arrays.get("start", 0)), np.asarray(arrays.get("spread", []), np.float32)
    return Detector(name, weight, bias, center, numbers, start=start, spread=spread)  # type: ignore[arg-type]


def _energy(logits: Wide) -> Wide:
    top = logits.max(axis=1)
    value: Wide = -(top + np.log(np.exp(logits - top[:, None]).sum(axis=1)))
    return value
