"""The last layer's row of a new class, from a few photos: a distance to its mean and a regression, as one linear row.

Classes share one covariance S, of features about their class means. The difference of two squared distances is then
linear in the features x: a class's row is S^-1 m and its bias -m' S^-1 m / 2 (Fisher's discriminant). The classes that
are known keep the rows that regression gave them. So the new row is brought to their scale: what it is above the mean
of the known classes' distances, times one factor, is added to the mean of their logits.

A second row is learnt by logistic regression against the known classes' logits, which stay: p(new) = 1 / (1 + exp(s -
v'x - c)) with s their logsumexp. The distance knows more from five photos, the regression from fifty, and their
weighted mean is as good as the better one from 5 to 50 (docs/lab/results.md).

The bias is then the highest at which a small share of the known images, by models that have not seen them, change to
the new class. Of the shares `TAKEN` it is the one with the best balanced accuracy, so that a class that looks like a
known one is given more.

A bias that comes from hundreds of known images, and not from five new ones, is what few photos need: the mean of five
is uncertain, so that by distances alone most of a new class is missed, while no known image is near it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ssod_edge.detect.detectors import Array
from ssod_edge.detect.fit import Labels
from ssod_edge.detect.regression import LEAST_DEVIATION

#: Share of the covariance that is replaced by a sphere of the same size. The classes' own directions of variation are
#: known from few images, and with less of a sphere known images are lost that were not seen.
SHRINKAGE = 0.8
#: Shares of known images, rightly classified out of fold, that may change to a new class.
TAKEN = (0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03)
#: Images whose mean distance stands for the noise of a mean.
NOISE_IMAGES = 64
#: The regression's inverse weight of the L2 penalty on standardised features, and how much its row counts beside the
#: distance's, both brought to one spread over known images.
STRENGTH, LEARNT = 0.03, 2.0
ITERATIONS = 100
#: Images of known classes, and copies of them, that the regression sees: those that look most like the new class.
RIVALS = 1000
#: Images that are read at once where all would take another copy.
BLOCK = 512


@dataclass(frozen=True)
class Taught:
    """Images of one data set of features: n of known classes with their folds, m of new classes with theirs.

    Attributes:
        plain, disturbed: float32 [n + m, D]; the new ones last.
        labels: int64 [n + m]; of the m images from M on.
        fold: int64 [n + m].
    """

    plain: Array
    disturbed: Array
    labels: Labels
    fold: Labels


@dataclass(frozen=True)
class Heads:
    """A last layer, and one without each part of the images.

    Attributes:
        weight, bias: float32 [M, D] and [M].
        fold_weight, fold_bias: float32 [K, M, D] and [K, M].
    """

    weight: Array
    bias: Array
    fold_weight: Array
    fold_bias: Array

    @property
    def classes(self) -> int:
        """M."""
        return len(self.bias)

    @property
    def parts(self) -> int:
        """K."""
        return len(self.fold_bias)

    def part(self, k: int | None) -> tuple[Array, Array]:
        """Weight and bias of the layer without part k; None: of the one that has seen all."""
        return (self.weight, self.bias) if k is None else (self.fold_weight[k], self.fold_bias[k])


def add_classes(heads: Heads, data: Taught, count: int, most: float) -> Heads:
    """The same rows, and those of `count` new classes after them.

    Args:
        heads: of M classes.
        data: of each new class, images in at least two folds.
        most: share of the known images that may change to each new class, where that gains by it.
    """
    known = data.labels < heads.classes
    space = _Space(data, known)
    everything = space.rows(None, heads.classes + count, heads.part(None))
    rows = [space.rows(k, heads.classes + count, heads.part(k), everything) for k in range(heads.parts)]

    def against(images: npt.NDArray[np.bool_]) -> list[_Margins]:
        """Of the images of each part, by what has not seen it."""
        parts = [np.flatnonzero(images & (data.fold == k)) for k in range(heads.parts)]
        return [_against(rows[k], heads.part(k), space, data, part) for k, part in enumerate(parts) if len(part)]

    old, new = against(known), against(~known)
    mix = _Mix.of(old)
    above_old, above_new = (np.concatenate([margins.above(mix) for margins in both]) for both in (old, new))
    right = np.concatenate([margins.right for margins in old])
    labels = np.concatenate([margins.labels for margins in new]) - heads.classes
    offsets = np.array(
        [_offset(above_old[right, c], above_new[labels == c, c], heads.classes, most) for c in range(count)]
    )
    fold_rows = [space.head(rows[k], heads.part(k), mix, offsets) for k in range(heads.parts)]
    weight, bias = space.head(everything, heads.part(None), mix, offsets)
    return Heads(weight, bias, np.stack([w for w, _ in fold_rows]), np.stack([b for _, b in fold_rows]))


def _offset(old: Array, new: Array, classes: int, most: float) -> float:
    """The bias of a new class with the best balanced accuracy, at one of the shares `TAKEN` up to `most`.

    Args:
        old: [n], how far the row at no bias is above the best known one on images of known classes.
        new: [m], the same on its own images.
        classes: M, how many are known.
        most: share of known images that may change to it.
    """
    best, gain = 0.0, -np.inf
    for taken in sorted({min(share, most) for share in TAKEN}):
        offset = -float(np.quantile(old, 1 - taken, method="higher"))
        found = float(np.mean(new + offset > 0)) - classes * taken
        if found > gain:
            best, gain = offset, found
    return best


@dataclass(frozen=True)
class _Rows:
    """Rows on standardised features.

    Attributes:
        weight, bias: discriminants of M known and C new classes, [M + C, D] and [M + C].
        learnt, learnt_bias: of the new classes by regression, [C, D] and [C].
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    learnt: npt.NDArray[np.float32]
    learnt_bias: npt.NDArray[np.float32]


class _Space:
    """Standardised features, and covariances about the class means, of all known images but those of a part."""

    def __init__(self, data: Taught, known: npt.NDArray[np.bool_]):
        self.x = np.concatenate([data.plain, data.disturbed])
        inside = np.tile(known, 2)
        self.mean, self.deviation = _moments(self.x, inside)
        self.x -= self.mean
        self.x /= self.deviation
        self.labels, self.fold, self.known = np.tile(data.labels, 2), np.tile(data.fold, 2), inside
        new = self.x[~inside]
        self.products = self.x.T @ self.x
        self.products -= new.T @ new

    def rows(self, k: int | None, classes: int, head: tuple[Array, Array], near: _Rows | None = None) -> _Rows:
        """Rows by the images outside part k; None: by all.

        Args:
            classes: M + C.
            head: the known classes' layer without part k.
            near: rows that the regression starts from.
        """
        weight, bias = self._discriminants(k, classes)
        return _Rows(weight, bias, *self._learn(k, head, self.x @ weight.T + bias, near))

    def _learn(
        self, k: int | None, head: tuple[Array, Array], found: Array, near: _Rows | None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logistic regression of each new class against the known classes' logits, [C, D] and [C].

        Args:
            k, head, near: see `rows`.
            found: discriminants of all images, [2 N, M + C].
        """
        from scipy.special import logsumexp  # a dependency of scikit-learn

        m = len(head[1])
        seen = np.ones(len(self.x), bool) if k is None else self.fold != k
        rows = []
        for c in range(m, found.shape[1]):
            lead = np.where(seen & (self.labels != c), found[:, c] - found[:, :m].max(axis=1), -np.inf)
            own = np.flatnonzero(seen & (self.labels == c))
            rivals = np.argsort(-lead, kind="stable")[: min(RIVALS, int(np.isfinite(lead).sum()))]
            x = self.x[np.concatenate([own, rivals])]
            known = logsumexp(x @ (head[0] * self.deviation).T + (head[1] + head[0] @ self.mean), axis=1)
            positive = np.arange(len(x)) < len(own)
            # A new class counts as much as a known one has images, on the average.
            weights = np.where(positive, (seen & self.known).sum() / m / max(len(own), 1), 1.0)
            start = None if near is None else np.append(near.learnt[c - m], near.learnt_bias[c - m])
            rows.append(_regress(x, known, positive, weights, start))
        learnt = np.array(rows, np.float32)
        return learnt[:, :-1], learnt[:, -1]

    def _discriminants(self, k: int | None, classes: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Of all classes, by the images outside part k; None: by all. [M + C, D] and [M + C]."""
        from scipy.linalg import solve  # a dependency of scikit-learn

        seen = np.ones(len(self.x), bool) if k is None else self.fold != k
        means, counts = np.zeros((classes, self.x.shape[1]), np.float32), np.zeros(classes)
        for c in range(classes):
            chosen = self.x[seen & (self.labels == c)]
            counts[c] = len(chosen)
            if len(chosen):
                means[c] = chosen.mean(axis=0)
        m = int(self.labels[self.known].max()) + 1
        left = self.x[self.known & (self.fold == k)] if k is not None else self.x[:0]
        weighted = means[:m] * np.sqrt(counts[:m])[:, None].astype(np.float32)
        removed = np.concatenate([left, weighted])
        covariance = removed.T @ removed
        np.subtract(self.products, covariance, out=covariance)
        covariance /= np.float32(max(counts[:m].sum(), 1))
        level = np.float32(max(float(np.trace(covariance)) / len(covariance), LEAST_DEVIATION))
        covariance *= np.float32(1 - SHRINKAGE)
        covariance[np.diag_indices_from(covariance)] += np.float32(SHRINKAGE) * level
        some = np.flatnonzero(seen & self.known)[:: max(1, int((seen & self.known).sum()) // NOISE_IMAGES)]
        residuals = self.x[some] - means[self.labels[some]]
        wanted = np.concatenate([means, residuals]).T
        # It is symmetric, and solved in its place only by columns.
        solved = solve(covariance.T, wanted, overwrite_a=True, check_finite=False, assume_a="pos").T
        weight = solved[:classes]
        bias = -0.5 * np.einsum("cd,cd->c", weight, means)
        noise = float(np.einsum("nd,nd->n", solved[classes:], residuals).mean())
        bias[m:] += noise / np.maximum(counts[m:], 1)  # of twice the photos, with their copies: half of 2 / n
        return weight.astype(np.float32), bias.astype(np.float32)

    def head(
        self, rows: _Rows, known: tuple[Array, Array], mix: _Mix, offsets: npt.NDArray[np.floating]
    ) -> tuple[Array, Array]:
        """Known rows on the features as they are, and the new ones after them."""
        weight, bias = known
        m = len(bias)
        distance = weight.mean(axis=0) * self.deviation + mix.scale * (rows.weight[m:] - rows.weight[:m].mean(axis=0))
        constant = bias.mean() + weight.mean(axis=0) @ self.mean + mix.scale * (rows.bias[m:] - rows.bias[:m].mean())
        new = mix.share(distance.T, rows.learnt.T).T / self.deviation
        constant = mix.share(constant, rows.learnt_bias) - new @ self.mean + offsets
        return np.concatenate([weight, new]).astype(np.float32), np.concatenate([bias, constant]).astype(np.float32)


def _moments(x: Array, chosen: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    """Mean and deviation [D] of some rows of x [n, D], without a copy of them: a device has little memory."""
    count, width = int(chosen.sum()), x.shape[1]
    mean, square = np.zeros(width), np.zeros(width)
    for start in range(0, len(x), BLOCK):
        mean += x[start : start + BLOCK][chosen[start : start + BLOCK]].sum(axis=0, dtype=np.float64) / count
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK][chosen[start : start + BLOCK]] - mean
        square += np.square(rows).sum(axis=0) / count
    return mean.astype(np.float32), np.maximum(np.sqrt(square), LEAST_DEVIATION).astype(np.float32)


@dataclass(frozen=True)
class _Margins:
    """How the rows of C new classes stand to the logits of M known ones on n images that neither has seen.

    Attributes:
        scale: the factor that brings the discriminants to the logits.
        labels: int64 [n], of the images.
        right: bool [n], whether the known classes' logits give that class.
        gap: float32 [n, 1], the mean logit less the largest.
        lead: float32 [n, C], each new discriminant less the mean of the known ones.
        learnt: float32 [n, C], what the regression gives less the largest logit.
    """

    scale: float
    labels: Labels
    right: npt.NDArray[np.bool_]
    gap: Array
    lead: Array
    learnt: Array

    def above(self, mix: _Mix) -> Array:
        """How far each new row, at no bias, is above the best known one, [n, C]."""
        return mix.share(self.gap + mix.scale * self.lead, self.learnt)


@dataclass(frozen=True)
class _Mix:
    """How the rows of the distance and of the regression become one.

    Attributes:
        scale: see `_Margins`.
        learnt: float32 [C], what the regression's row is multiplied by before the mean is taken.
    """

    scale: float
    learnt: Array

    @classmethod
    def of(cls, known: list[_Margins]) -> _Mix:
        """From images of known classes."""
        scale = float(np.median([margins.scale for margins in known]))
        distance = np.concatenate([margins.gap + scale * margins.lead for margins in known]).std(axis=0)
        learnt = np.concatenate([margins.learnt for margins in known]).std(axis=0)
        return cls(scale, (LEARNT * distance / np.maximum(learnt, LEAST_DEVIATION)).astype(np.float32))

    def share(self, distance: Array, learnt: Array) -> Array:
        """The weighted mean of what both give for the new classes, [..., C]."""
        return np.asarray((distance + self.learnt * learnt) / (1 + self.learnt), np.float32)


def _against(
    rows: _Rows, head: tuple[Array, Array], space: _Space, data: Taught, images: npt.NDArray[np.intp]
) -> _Margins:
    """Copies have no say: a class that differs by its colour is where a copy in other colours lies."""
    m = len(head[1])
    logits = data.plain[images] @ head[0].T + head[1]
    found = space.x[images] @ rows.weight.T + rows.bias
    middle = found[:, :m].mean(axis=1, keepdims=True)
    centred, spread = logits - logits.mean(axis=1, keepdims=True), found[:, :m] - middle
    scale = float((centred * spread).sum() / max(float(np.square(spread).sum()), 1e-12))
    labels = data.labels[images]
    largest = logits.max(axis=1, keepdims=True)
    learnt = space.x[images] @ rows.learnt.T + rows.learnt_bias - largest
    gap = logits.mean(axis=1, keepdims=True) - largest
    return _Margins(scale, labels, logits.argmax(axis=1) == labels, gap, found[:, m:] - middle, learnt)


def _regress(
    x: Array,
    known: npt.NDArray[np.floating],
    positive: npt.NDArray[np.bool_],
    weights: npt.NDArray[np.floating],
    start: npt.NDArray[np.floating] | None,
) -> npt.NDArray[np.floating]:
    """v [D] and c of 1 / (1 + exp(s - v'x - c)), the share of a new class beside the known ones.

    Args:
        x: standardised features [n, D].
        known: s [n], the logsumexp of the known classes' logits.
        positive: bool [n], whether an image is of the new class.
        weights: [n], how much each image counts.
        start: what is known of the result, [D + 1].
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    sign = np.where(positive, 1.0, -1.0)

    def loss(row: npt.NDArray[np.floating]) -> tuple[float, npt.NDArray[np.floating]]:
        margin = sign * (x @ row[:-1].astype(np.float32) + row[-1] - known)
        slope = -STRENGTH * weights * sign * expit(-margin)
        value = STRENGTH * float(weights @ np.logaddexp(0, -margin)) + 0.5 * float(row[:-1] @ row[:-1])
        return value, np.append(slope.astype(np.float32) @ x + row[:-1], slope.sum())

    first = np.zeros(x.shape[1] + 1) if start is None else start
    found: npt.NDArray[np.floating] = minimize(
        loss, first, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}
    ).x
    return found


def spread(count: int, folds: int, seed: int = 0) -> Labels:
    """A fold for each of so many images, as evenly as can be: int64 [count]."""
    found: Labels = np.random.default_rng(seed).permutation(np.arange(count) % folds).astype(np.int64)
    return found
