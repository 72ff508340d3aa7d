"""An export's last layer, score, temperature and threshold, fitted again on stored features and on new ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ssod_edge.config import has_state, score_parts
from ssod_edge.detect.confidence import fit_temperature
from ssod_edge.detect.detectors import Array
from ssod_edge.detect.fit import FitData, Labels
from ssod_edge.detect.folds import Folds, out_of_fold_parts
from ssod_edge.detect.metrics import conformal_threshold
from ssod_edge.detect.regression import fit_layer
from ssod_edge.detect.side_by_side import side_by_side
from ssod_edge.detect.stored import StoredFeatures, half
from ssod_edge.detect.sums import FittedScore, ScoreSum, fit_score, held_out_scores
from ssod_edge.errors import UsageError
from ssod_edge.spec import Threshold
from ssod_edge.teach.photos import Photos
from ssod_edge.teach.rows import Heads, Taught, add_classes, spread

#: Few photos of a class do not widen what all training images span, so that this part would go on calling it unknown.
OUTSIDE = "residual"


@dataclass(frozen=True)
class Lesson:
    """What a model is fitted on: stored images and photos.

    Attributes:
        stored: of the images that stay, in the numbering of the new classes, and last layers of those that stay.
        heads: of the classes that stay.
        row: weight [D + 1] of the OOD row and its bias after it.
        photos: to be taught, in the same numbering.
        score: the name of the shipped score.
        few: classes that were taught from few photos, by number.
        most: share of the images of known classes that may change to new ones.
    """

    stored: StoredFeatures
    heads: Heads
    row: Array
    photos: Photos
    score: str
    few: tuple[int, ...] = ()
    most: float = 0.0075


@dataclass(frozen=True)
class Fitted:
    """The model after a lesson.

    Attributes:
        heads: of all classes.
        labels: int64 [n], of the images that the score was fitted on.
        folds: of these images, by their rows in `stored`.
        stored: what is stored of them, the held-out images among them.
        state: of the score, if it has one.
        scores: float32 [n], out of fold.
        logits: float32 [n, M], out of fold.
        temperature: of `probs`.
        row, name: the OOD row and the score's name, see `Lesson`.
    """

    heads: Heads
    labels: Labels
    folds: Folds
    stored: StoredFeatures
    state: FittedScore | None
    scores: Array
    logits: Array
    temperature: float
    row: Array
    name: str

    @property
    def rows(self) -> int:
        """Rows of the graph's final Gemm that the score reads."""
        return 0 if self.state is None else self.state.rows

    def threshold(self, target_tpr: float, description: str) -> Threshold:
        """For every artifact: it is taken of features, and each is verified at it."""
        return conformal_threshold(self.scores, target_tpr, description)

    def say_of(self, features: Array) -> tuple[Array, Array, Array]:
        """Logits [n, M], id_logit [n] and score [n] of features, by the model as it ships."""
        return outputs(features, self.heads.weight, self.heads.bias, self.row, self.state, self.name)


def outputs(
    features: Array, weight: Array, bias: Array, row: Array, state: FittedScore | None, score: str
) -> tuple[Array, Array, Array]:
    """What a graph gives for features [n, D], in NumPy: logits [n, M], id_logit [n], ood_score [n]; float32."""
    logits, id_logit = features @ weight.T + bias, features @ row[:-1] + row[-1]
    if state is None:
        return logits, id_logit, held_out_scores((score,), {}, (logits, id_logit, features))[score]
    return logits, id_logit, state.score(features, logits, id_logit)


def fit_lesson(lesson: Lesson) -> Fitted:
    """Fit everything.

    Raises:
        UsageError: too few images.
    """
    stored, photos, folds = lesson.stored, lesson.photos, lesson.stored.folds
    plain, disturbed, labels = stored.taught
    k, m = lesson.heads.parts, lesson.heads.classes
    fold = np.concatenate(
        [spread(int((photos.labels == c).sum()), k, c) for c in np.unique(photos.labels)] or [labels[:0]]
    )
    order = np.argsort(photos.labels, kind="stable")
    new_fold = np.empty(len(order), np.int64)
    new_fold[order] = fold
    # Once for all that follows: a copy takes 66 MB of 2,747 images, and a device has little memory.
    features = np.concatenate([plain, photos.plain, disturbed, photos.disturbed])
    del plain, disturbed
    n = len(features) // 2
    data = Taught(
        features[:n],
        features[n:],
        np.concatenate([labels, photos.labels]),
        np.concatenate([folds.fold, new_fold]),
    )
    counts = np.concatenate([folds.counts, _counts(folds.counts, labels, photos.labels, m)])
    heads = lesson.heads
    if (photos.labels < m).any():
        heads = _regression(data, m, counts, folds.strength, k)
    if added := len(photos.classes) - m:
        heads = add_classes(heads, data, added, lesson.most / added)
    return _finish(lesson, features, data, heads, counts)


def _finish(lesson: Lesson, features: Array, data: Taught, heads: Heads, counts: Array) -> Fitted:
    """Score, temperature, and what is stored for the next lesson; features [2 n, D] are of images, then of copies."""
    stored, photos, folds = lesson.stored, lesson.photos, lesson.stored.folds
    n = len(data.labels)
    new_rows = len(stored.labels) + np.arange(len(photos.labels))
    taught = Folds(
        np.arange(n), data.fold, heads.fold_weight, heads.fold_bias, counts, folds.strength, folds.row, folds.row_bias
    )
    logits, id_logit = features @ heads.weight.T + heads.bias, features @ lesson.row[:-1] + lesson.row[-1]
    fit = FitData(
        features, np.tile(data.labels, 2), logits, heads.weight, heads.bias, id_logit, stored.last, lesson.few
    )
    names = score_parts(lesson.score)
    silent = len(names) > 1 and bool(lesson.few) and OUTSIDE in names
    heard = [name for name in names if not (silent and name == OUTSIDE)]
    parts = out_of_fold_parts(heard, fit, taught)[0]
    if silent:
        parts[OUTSIDE] = parts[heard[0]]  # only so that there is something to standardise by: the part is not heard
    state = fit_score(lesson.score, fit, parts) if has_state(lesson.score) else None
    if isinstance(state, ScoreSum) and silent:
        state = _without_a_say(state, OUTSIDE)
    scores = state.add(parts) if isinstance(state, ScoreSum) else parts[lesson.score]
    out_of_fold = taught.logits(data.plain)
    kept = StoredFeatures(
        np.concatenate([stored.plain, half(photos.plain)]),
        np.concatenate([stored.disturbed, half(photos.disturbed)]),
        np.concatenate([stored.labels, photos.labels]),
        replace(taught, images=np.concatenate([folds.images, new_rows])),
        stored.last,
    )
    temperature = fit_temperature(out_of_fold, data.labels)
    return Fitted(heads, data.labels, taught, kept, state, scores, out_of_fold, temperature, lesson.row, lesson.score)


def _without_a_say(total: ScoreSum, part: str) -> ScoreSum:
    """A sum in which one part is the same for every image. The graph keeps its operations."""
    scales, centers = total.scales | {part: 0.0}, total.centers | {part: 0.0}
    return replace(total, scales=scales, centers=centers, settings={**total.settings, part: "has no say"})


def without_classes(stored: StoredFeatures, heads: Heads, gone: Labels) -> tuple[StoredFeatures, Heads]:
    """Take classes out: their images, their rows, and their numbers, which those behind them move up to.

    Raises:
        UsageError: fewer than two would be left.
    """
    kept = np.setdiff1d(np.arange(heads.classes), gone)
    if len(kept) < 2:
        raise UsageError(f"{len(kept)} of {heads.classes} classes would be left, and a classifier has two or more")
    numbers = np.full(heads.classes, -1, np.int64)
    numbers[kept] = np.arange(len(kept))
    rows = np.flatnonzero(np.isin(stored.labels, kept))
    folds = stored.folds
    stays = np.isin(folds.images, rows)
    fewer = Heads(heads.weight[kept], heads.bias[kept], heads.fold_weight[:, kept], heads.fold_bias[:, kept])
    new = replace(
        folds,
        images=np.searchsorted(rows, folds.images[stays]),
        fold=folds.fold[stays],
        weight=fewer.fold_weight,
        bias=fewer.fold_bias,
        counts=folds.counts[stays],
    )
    labels = numbers[stored.labels[rows]]
    return StoredFeatures(stored.plain[rows], stored.disturbed[rows], labels, new, stored.last), fewer


def _regression(data: Taught, classes: int, counts: Array, strength: float, parts: int) -> Heads:
    """The rows of known classes, fitted again with photos of them."""

    def fit(images: NDArray[np.intp]) -> tuple[Array, Array]:
        return fit_layer(
            data.plain[images], data.disturbed[images], data.labels[images], classes, counts[images], strength
        )

    known = data.labels < classes
    without = [np.flatnonzero(known & (data.fold != k)) for k in range(parts)]
    (weight, bias), *folds = side_by_side(fit, [np.flatnonzero(known), *without], 2 * data.plain.nbytes)
    return Heads(weight, bias, np.stack([w for w, _ in folds]), np.stack([b for _, b in folds]))


def _counts(counts: Array, labels: Labels, new: Labels, classes: int) -> Array:
    """How much each new photo counts: as those of its class, or as its class's share where classes count alike."""
    found = np.ones(len(new), np.float32)
    alike = bool(np.ptp(counts) > 0)
    for label in np.unique(new):
        mine = new == label
        if label < classes:
            found[mine] = counts[labels == label].mean()
        elif alike:
            found[mine] = counts.sum() / (classes * mine.sum())
    return found
