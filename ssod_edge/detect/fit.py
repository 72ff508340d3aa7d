"""How each detector is fitted: from the features of training images to the rows and numbers of `Detector`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ssod_edge.config import DETECTORS, DetectorName
from ssod_edge.detect.covariance import largest_variances, shrinkage_of
from ssod_edge.detect.detectors import TINY, Array, Detector, Wide
from ssod_edge.detect.side_by_side import fitting
from ssod_edge.errors import UsageError

Labels = npt.NDArray[np.int64]

#: Share of the mean variance that is added to every direction of a covariance: features have directions in which
#: nothing varies, and 16-bit noise must not be blown up along them.
RIDGE = 1e-3
#: Principal directions that Mahalanobis keeps if there are no more classes.
PRINCIPAL = 64
#: Largest term over the result (ViM's squared residual) or its spread (Mahalanobis), up to which a difference is taken
#: in fp32: it loses 1e-7 of the term.
CANCELLATION = 1e3
#: Directions that ViM, the residual and Mahalanobis++ keep (docs/lab/detection.md).
RANK = 64
#: Least deviation of a feature that is divided by, as a share of the mean one.
LEAST_DEVIATION = 0.1
#: Training images for each direction that ViM and the residual keep, at least.
IMAGES_A_DIRECTION = 4
#: Share of the distance by which a class of few photos is off that is taken from it. All of it would accept
#: too much of what looks like the class (docs/lab/results.md).
FEW_SHARE = 0.5
#: Least variance of unit-length features in a direction: fp32 loses the distances of a smaller one.
LEAST_VARIANCE = 1e-5
#: Prototypes of a class, as long as all classes together have no more than so many. So many images are all prototypes.
PROTOTYPES, MOST_PROTOTYPES = 10, 1000
KMEANS_ROUNDS = 20
#: Rows up to which one thread fits: several wait for each other where other programs use the cores too, six times as
#: long (bench/results/few-rows.json).
FEW_ROWS = 2000


@dataclass(frozen=True)
class FitData:
    """What detectors are fitted on: N training images.

    Attributes:
        features: float32 [N, D], pooled; of images and, where there are any, of disturbed copies of them.
        labels: int64 [N]; -1 where unknown, for which the classifier's own answer stands in.
        logits: float32 [N, M].
        weight: float32 [M, D], the classifier's.
        bias: float32 [M].
        id_logit: float32 [N].
        last: width of the network's last features, which distances read, at the end of `features`; 0: all of them.
        few: classes that were taught from few photos, to which Mahalanobis++'s distance is less (`_less_for_few`).
    """

    features: Array
    labels: Labels
    logits: Array
    weight: Array
    bias: Array
    id_logit: Array
    last: int = 0
    few: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n, d = self.features.shape
        if n < 2 or len(self.labels) != n or self.logits.shape != (n, len(self.bias)) or self.weight.shape[1] != d:
            raise UsageError(
                f"a detector is fitted on two images or more, with features [N, D], labels [N] and logits [N, M], got "
                f"{list(self.features.shape)}, {list(self.labels.shape)} and {list(self.logits.shape)}"
            )
        if not 0 <= self.last <= d:
            raise UsageError(f"last must lie between 0 and the {d} features, got {self.last}")
        if not (np.isfinite(self.features).all() and np.isfinite(self.logits).all()):
            raise UsageError("the features of the training images are not finite, so that no detector can be fitted")

    @property
    def start(self) -> int:
        """First of the last features."""
        return int(self.features.shape[1]) - self.last if self.last else 0

    @property
    def read(self) -> Array:
        """The last features, float32 [N, D - start]."""
        return self.features[:, self.start :]

    def wide(self, rows: npt.NDArray[np.floating[Any]]) -> Array:
        """Rows that read the last features as rows that read all: [K, D - start] -> float32 [K, D]."""
        return _f(np.pad(rows, ((0, 0), (self.start, 0))))

    def of(self, images: Labels) -> FitData:
        """Of some of the images, by their indices."""
        parts = {name: getattr(self, name)[images] for name in ("features", "labels", "logits", "id_logit")}
        return replace(self, **parts)

    def with_head(self, weight: Array, bias: Array) -> FitData:
        """Of the same images by another last layer, [M, D] and [M]."""
        return replace(self, weight=weight, bias=bias, logits=self.features @ weight.T + bias)

    def classes(self) -> Labels:
        """The class of each image, int64 [N]."""
        return np.where(self.labels >= 0, self.labels, self.logits.argmax(axis=1)).astype(np.int64)


def fit(name: DetectorName, data: FitData) -> Detector:
    """Fit a detector by name.

    Raises:
        UsageError: an unknown name, or too few images.
    """
    if name not in DETECTORS:
        raise UsageError(f"detector must be one of {', '.join(DETECTORS)}, got '{name}'")
    fits = {"vim": fit_vim, "mahalanobis": fit_mahalanobis, "rmd": fit_rmd, "knn": fit_knn}
    fits |= {"mahalanobispp": fit_mahalanobispp, "rmdpp": fit_rmdpp, "residual": fit_residual}
    with fitting() if len(data.features) <= FEW_ROWS else nullcontext():
        return fits[name](data)


def fit_vim(data: FitData) -> Detector:
    """ViM (Wang et al., CVPR 2022): how far a feature lies from the space that training features span.

    With o = -pinv(W) b the point where all logits are 0, P [d, D] the d principal directions of z - o about 0 and R the
    others: score = alpha |R (z - o)| - logsumexp(logits), where alpha = mean(max logit) / mean |R (z - o)| over the
    training images.

    |R v|^2 is |v|^2 - |P v|^2, which takes d rows instead of D - d. It stays exact if v is first moved along P to the
    middle of the training features: R does not see that, and both terms become small.

    d is `RANK`, or as many as there are classes; a quarter of the images at most, because what few images span leaves
    nothing out. The paper's 1000 takes four times the rows (docs/lab/detection.md).
    """
    origin = -np.linalg.pinv(data.weight.astype(np.float64)) @ data.bias
    found, norms = _residual("vim", data, origin, np.ones(1))
    return replace(found, numbers={"alpha": float(data.logits.max(axis=1).mean() / max(norms.mean(), TINY))})


def fit_residual(data: FitData) -> Detector:
    """How far a feature lies from the space that training features span: |R x| with x = (z - m) / s.

    m is the mean of each feature and s its deviation, R as in ViM, but for x. So an early stage, whose features are
    small, is heard like the last one, and nothing depends on the classifier. Features that hardly vary are divided by
    a share of the mean deviation: what a dead one does is noise.
    """
    deviation = data.features.std(axis=0, dtype=np.float64)
    least = max(LEAST_DEVIATION * float(deviation.mean()), TINY)
    mean = data.features.mean(axis=0, dtype=np.float64)
    return _residual("residual", data, mean, np.maximum(deviation, least))[0]


def _residual(name: DetectorName, data: FitData, origin: Wide, spread: Wide) -> tuple[Detector, Wide]:
    """|R (z - origin) / spread|, and that of the training images; origin [D], spread [D] or [1]."""
    width = data.features.shape[1]
    dimensions = max(1, min(width // 2, len(data.features) // IMAGES_A_DIRECTION, max(RANK, len(data.bias))))
    v = (data.features - _f(origin)) / _f(spread)
    principal = _f(largest_variances(v.T @ v / np.float32(len(v)), dimensions)[1].T)
    moved = principal.T @ (principal @ v.mean(axis=0))
    v -= moved
    lengths = np.square(v).sum(axis=1, dtype=np.float64)
    squares = np.maximum(lengths - np.square(v @ principal.T).sum(axis=1, dtype=np.float64), 0)
    settings: dict[str, float | str] = {"dimensions": dimensions, "rows": "principal space"}
    if dimensions < width - dimensions and (lengths / np.maximum(squares, TINY)).max() <= CANCELLATION:
        rows, center = principal / _f(spread), _f(origin + spread * moved)
        divisor = _f(spread) if len(spread) == width else _f([])
        return Detector(name, rows, _f(-rows @ center), center, settings=settings, spread=divisor), np.sqrt(squares)
    wide = (data.features - origin) / spread
    _, vectors = np.linalg.eigh(wide.T @ wide)  # ascending
    kept = vectors[:, : width - dimensions].T
    rest = kept / spread
    settings["rows"] = "residual space"
    return Detector(name, _f(rest), _f(-rest @ origin), settings=settings), np.linalg.norm(wide @ kept.T, axis=1)


def fit_mahalanobis(data: FitData) -> Detector:
    """Mahalanobis distance (Lee et al., NeurIPS 2018): min over classes of (z - m_c)' S^-1 (z - m_c).

    S is the covariance within the classes plus `RIDGE` times its mean variance in every direction. Of its D variances
    the d largest are kept, and the others take their mean v (the covariance of probabilistic PCA, Tipping and Bishop,
    1999), which tells images apart as well (docs/lab/detection.md) and takes d + C rows instead of D + C:
    S^-1 = I / v - A' A with A [d, D] the d directions, each times sqrt(1 / v - 1 / its variance).

    With m the mean of all features and o_c = m_c - m, the distance is
    (z - m)' S^-1 (z - m) - 2 o_c' S^-1 (z - m) + o_c' S^-1 o_c. Taken about m, no term is much larger than the
    distance, so that fp32 holds the difference; where one is, all D directions are rows and nothing is subtracted.

    d is `PRINCIPAL`, or as many as there are classes.
    """
    groups, width = _Groups.of(data), data.read.shape[1]
    dimensions = min(width // 2, max(PRINCIPAL, len(data.bias)))
    largest = groups.variances[width - dimensions :]
    rest = float(groups.variances[: width - dimensions].mean())
    rows = np.sqrt(np.maximum(1 / rest - 1 / largest, 0))[:, None] * groups.directions[:, width - dimensions :].T
    inverse = np.eye(width) / rest - rows.T @ rows
    v = data.read.astype(np.float64) - groups.mean
    distance = np.einsum("nd,nd->n", v @ inverse, v)
    if np.square(v).sum(axis=1).max() / rest > CANCELLATION * max(float(distance.std()), TINY):
        return groups.nearest("mahalanobis", groups.whitening, data, {"dimensions": width})
    weight = np.concatenate([rows, -2 * groups.offsets @ inverse])
    bias = -weight @ groups.mean
    bias[dimensions:] += np.einsum("cd,cd->c", groups.offsets @ inverse, groups.offsets)
    numbers, settings = {"quadratic": dimensions, "scale": 1 / rest}, groups.settings | {"dimensions": dimensions}
    return Detector("mahalanobis", data.wide(weight), _f(bias), _f(groups.mean), numbers, settings, data.start)


def fit_rmd(data: FitData) -> Detector:
    """Relative Mahalanobis distance (Ren et al., 2021): the distance to the nearest class, less that to all images.

    min over c of (z - m_c)' S^-1 (z - m_c) - (z - m)' S0^-1 (z - m), with S0 = S + B the covariance of all features,
    B that between the class means m_c. B has at most C - 1 directions, so S^-1 - S0^-1 = A' A has as many: with
    S^-1 = L' L and L B L' = V diag(t) V', A = diag(sqrt(t / (1 + t))) V' L. So 2 C - 1 rows do instead of 2 D.
    """
    groups = _Groups.of(data)
    return groups.nearest("rmd", groups.between(), data)


def fit_mahalanobispp(data: FitData) -> Detector:
    """Mahalanobis++ (Mueller and Hein, ICML 2025): `fit_mahalanobis` of features that are brought to length 1.

    The covariance within the classes is shrunk towards a sphere (Ledoit and Wolf, 2004), as much as the number of
    images asks for, and of its variances the `RANK` largest are kept, the others take their mean v.

    With u = z / |z|, S^-1 = I / v - A' A and |u| = 1, the distance (u - m_c)' S^-1 (u - m_c) is
    1 / v - |A u|^2 - 2 m_c' S^-1 u + m_c' S^-1 m_c: but for the squares of A u it is linear in u, so that nothing is
    computed of the D features but their length.
    """
    groups, covariance = _Groups.of_unit(data)
    width = len(covariance)
    rank = min(RANK, width // 2)
    kept, directions = largest_variances(covariance, rank)
    rest = max((float(np.trace(covariance, dtype=np.float64)) - float(kept.sum())) / (width - rank), LEAST_VARIANCE)
    rows = np.sqrt(np.maximum(1 / rest - 1 / np.maximum(kept, LEAST_VARIANCE), 0))[:, None] * directions.T
    means = groups.mean + groups.offsets
    products = means / rest - (means @ rows.T) @ rows  # S^-1 m_c
    bias = 1 / rest + np.einsum("cd,cd->c", products, means)
    if data.few:
        bias -= _less_for_few(data, np.square(groups.within).sum(1) / rest - np.square(groups.within @ rows.T).sum(1))
    settings = groups.settings | {"dimensions": rank}
    return _of_unit_length("mahalanobispp", data, np.concatenate([rows, -2 * products]), bias, settings)


def _less_for_few(data: FitData, distances: Wide) -> Wide:
    """What is taken off the distance to each class that has images, [C]; 0 but for `FitData.few`.

    A new image of the class is expected to lie further from its mean than one of the others from theirs: the mean is
    of n photos, and the class may vary more than the covariance that the others share. `FEW_SHARE` of that is taken.

    Args:
        distances: [N], of each image to the mean of its class, which it is a part of.
    """
    numbers, expected = data.classes(), float(distances.mean())
    classes = np.unique(numbers)
    less = np.zeros(len(classes))
    for place, label in enumerate(classes.tolist()):
        if label in data.few:
            own = distances[numbers == label]
            n = max(len(own) / 2, 2)  # images and their copies
            less[place] = FEW_SHARE * max(float(own.mean()) * n / (n - 1) * (1 + 1 / n) - expected, expected / n)
    return less


def fit_rmdpp(data: FitData) -> Detector:
    """`fit_rmd` of features at length 1, with the covariance of `fit_mahalanobispp` within the classes.

    The covariance S0 of all images is that one, S, and what lies between the class means. One that is shrunk by itself
    is below S in directions in which no training image varies, if features outnumber images, and then the further an
    image lies in them, the more it counts as known. Here S0 >= S, so that no distance ever becomes an argument for it.
    """
    groups, covariance = _Groups.of_unit(data)
    groups.whiten(covariance.astype(np.float64), LEAST_VARIANCE)
    rows = groups.between()
    # |A (u - m)|^2 is |A u|^2 and what is linear in u, and so is the distance to a class, less that to the middle.
    whitened = groups.offsets @ groups.whitening.T
    linear = -2 * (whitened @ groups.whitening + (rows @ groups.mean) @ rows)
    bias = np.square(whitened).sum(axis=1) + 2 * whitened @ (groups.whitening @ groups.mean)
    bias += np.square(rows @ groups.mean).sum()
    return _of_unit_length("rmdpp", data, np.concatenate([rows, linear]), bias, groups.settings)


def _of_unit_length(
    name: DetectorName, data: FitData, weight: Wide, bias: Wide, settings: dict[str, float | str]
) -> Detector:
    """Rows A [Q, D] whose squares are added up, with the classes' [C, D] and bias [C] after them."""
    numbers: dict[str, float] = {"quadratic": len(weight) - len(bias)}
    bias = np.concatenate([np.zeros(len(weight) - len(bias)), bias])
    return Detector(name, data.wide(weight), _f(bias), np.zeros(0, np.float32), numbers, settings, data.start)


def fit_knn(data: FitData) -> Detector:
    """Nearest neighbour (Sun et al., ICML 2022) among prototypes: 1 - max over k of cos(z, p_k).

    Up to `MOST_PROTOTYPES` images are all prototypes. Of more, the prototypes are the centres that spherical k-means
    finds for each class, so that the training images need not travel; a class of fewer images has one for each.
    """
    classes, rows = data.classes(), _unit(data.read)
    present = np.unique(classes)
    if len(rows) > MOST_PROTOTYPES:
        prototypes = max(1, min(PROTOTYPES, MOST_PROTOTYPES // len(present)))
        rng = np.random.default_rng(0)
        rows = np.concatenate([_spherical_kmeans(rows[classes == c], prototypes, rng) for c in present])
    settings: dict[str, float | str] = {"prototypes": len(rows), "classes": len(present), "seed": 0}
    bias = np.zeros(len(rows), np.float32)
    return Detector("knn", data.wide(rows), bias, settings=settings, start=data.start)


def _spherical_kmeans(unit: Array, k: int, rng: np.random.Generator) -> Array:
    """Centres of length 1 that unit vectors gather around, by their cosine.

    Args:
        unit: float32 [N, D], each of length 1.
        k: at most so many centres.

    Returns:
        float32 [min(k, N), D].
    """
    centres = unit[rng.permutation(len(unit))[:k]]
    for _ in range(KMEANS_ROUNDS if len(unit) > k else 0):
        nearest = (unit @ centres.T).argmax(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, unit)
        filled = np.linalg.norm(sums, axis=1) > 0
        moved = np.where(filled[:, None], _unit(sums), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


class _Groups:
    """Class means and the covariance that the classes share.

    Attributes:
        mean: [D], of all images.
        offsets: [C, D], class means less `mean`, of the C classes that have images.
        shares: [C], of the images.
        within: [N, D], each image less the mean of its class.
        variances, directions: [D], ascending, and [D, D], a column each: of the covariance within the classes.
        whitening: L [D, D], with L' L its inverse.
    """

    def __init__(self, z: npt.NDArray[np.floating[Any]], classes: Labels) -> None:
        present, index, counts = np.unique(classes, return_inverse=True, return_counts=True)
        self.mean = z.mean(axis=0, dtype=np.float64)
        means = np.stack([z[index == i].mean(axis=0, dtype=np.float64) for i in range(len(present))])
        self.offsets, self.shares = means - self.mean, counts / len(z)
        self.within = z - means.astype(z.dtype)[index]
        if not self.within.any():
            raise UsageError("the training features do not vary within their classes: there is no covariance to fit")
        self.settings: dict[str, float | str] = {"classes": len(present)}

    @classmethod
    def of(cls, data: FitData) -> _Groups:
        """With `RIDGE` times the mean variance in every direction."""
        groups = cls(data.read.astype(np.float64), data.classes())
        covariance = groups.within.T @ groups.within / len(groups.within)
        groups.whiten(covariance, ridge=RIDGE * float(np.trace(covariance)) / len(covariance))
        groups.settings["ridge"] = RIDGE
        return groups

    @classmethod
    def of_unit(cls, data: FitData) -> tuple[_Groups, Array]:
        """Of features at length 1, not whitened yet, and the covariance [D, D] within the classes, shrunk."""
        groups = cls(_unit(data.read), data.classes())
        covariance: Array = groups.within.T @ groups.within / np.float32(len(groups.within))
        level, shrinkage = float(np.trace(covariance)) / len(covariance), shrinkage_of(groups.within, covariance)
        covariance *= np.float32(1 - shrinkage)
        covariance[np.diag_indices_from(covariance)] += np.float32(shrinkage * level)
        groups.settings["shrinkage"] = shrinkage
        return groups, covariance

    def whiten(self, covariance: Wide, least: float = 0.0, ridge: float = 0.0) -> None:
        """Set `variances`, each with the ridge and at least `least`, `directions` and `whitening`."""
        values, vectors = np.linalg.eigh(covariance)
        self.variances, self.directions = np.maximum(np.maximum(values, 0) + ridge, least), vectors
        self.whitening = vectors.T / np.sqrt(self.variances)[:, None]

    def between(self) -> Wide:
        """A of `fit_rmd`, at most [C - 1, D]."""
        if len(self.shares) < 2:
            message = "the training features are all of one class: its distance is that to all images, and no score"
            raise UsageError(message)
        scaled = (self.offsets * np.sqrt(self.shares)[:, None]) @ self.whitening.T  # L B L' = scaled' scaled
        _, singular, directions = np.linalg.svd(scaled, full_matrices=False)
        t = np.square(singular)
        used = t > 1e-9 * max(t.max(), TINY)
        rows: Wide = (np.sqrt(t / (1 + t))[:, None] * directions)[used] @ self.whitening
        return rows

    def nearest(
        self, name: DetectorName, quadratic: Wide, data: FitData, settings: dict[str, float | str] | None = None
    ) -> Detector:
        """|A (z - m)|^2 of the rows A, and for each class what the distance to it adds."""
        u = self.offsets @ self.whitening.T
        weight = np.concatenate([quadratic, -2 * u @ self.whitening])
        bias = -weight @ self.mean
        bias[len(quadratic) :] += np.square(u).sum(axis=1)
        numbers: dict[str, float] = {"quadratic": len(quadratic)}
        settings = self.settings | (settings or {})
        return Detector(name, data.wide(weight), _f(bias), np.zeros(0, np.float32), numbers, settings, data.start)


def _unit(vectors: Array) -> Array:
    value: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(TINY))
    return value


def _f(values: npt.ArrayLike) -> Array:
    return np.ascontiguousarray(values, np.float32)
