"""Copies: images that are one file, or nearly one picture. On both sides of a split they make every figure flatter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssod_edge.data.sources import ImageSource
from ssod_edge.data.splits import Indices
from ssod_edge.errors import ImageError

#: Least cosine of near-copies. On two sets of photos all pairs from here on show one object from one side (28 of 1,571
#: photos of waste, 2 of 2,747 photos of clothes), and the first of two objects comes at 0.83 (docs/lab/results.md).
ALIKE = 0.85
#: Near-copies of an image that are kept, those that are most alike; so no group is larger than one more.
MOST_ALIKE = 32
#: Images that are compared with all others at a time, and pairs that are looked at again at a time.
BLOCK, PAIRS = 256, 4096
#: Pairs are looked for in so many random mixtures of the features, an eighth of the work, and then measured in full: at
#: `ALIKE` a cosine of mixtures is off by 0.017 (standard deviation), so none of 0.85 falls below by this much.
ROUGH, ROUGH_ERROR = 256, 0.1
#: Least deviation of a feature that is divided by, and least length.
TINY = 1e-6


@dataclass(frozen=True)
class Copies:
    """The copies among n images.

    Attributes:
        groups: int64 [n], a number for each group of copies; an image without any has a number of its own.
        pairs: int64 [p, 2], what was found: (image, its copy). Near-copies of one image need not be near-copies of each
            other, so a pair may lie in two groups.
        exact: how many images have the bytes of an earlier one.
        near: how many images have a near-copy with other bytes; None where it was not looked for.
    """

    groups: Indices
    pairs: Indices
    exact: int = 0
    near: int | None = None

    def across(self, first: Indices, second: Indices) -> Indices:
        """int64 [q, 2]: the pairs of which one image is among the first, and one among the second; in this order."""
        sides = np.zeros(len(self.groups), np.int64)
        sides[first], sides[second] = 1, 2
        found = sides[self.pairs]
        chosen = found.sum(axis=1) == 3
        pairs: Indices = np.take_along_axis(self.pairs, found.argsort(axis=1), axis=1)[chosen & (found > 0).all(axis=1)]
        return pairs


def exact_copies(source: ImageSource, advance: Callable[[int], None] = lambda n: None) -> Copies:
    """The images with the same bytes, by SHA-256; each is read once. One that cannot be read has no copy.

    Args:
        advance: called with 1 after each image.
    """
    keys = []
    for index in range(len(source)):
        try:
            keys.append(source.picture(index).sha256)
        except ImageError:  # named when its pixels are read
            keys.append(f"{index}")
        advance(1)
    first, groups = np.unique(keys, return_index=True, return_inverse=True)[1:]
    others = np.setdiff1d(np.arange(len(keys)), first)
    return Copies(groups.astype(np.int64), np.stack([first[groups[others]], others], axis=1), len(others))


def near_copies(features: NDArray[np.float32], labels: Indices, exact: Copies) -> Copies:
    """With the images that are nearly the same picture: taken or saved again, or frames of a camera that stood still.

    Two images are near-copies where the cosine of their features is at least `ALIKE`, once each feature has mean 0 and
    deviation 1 over all images, and also once it has mean 0 over the class of either: so what all of a class share (one
    machine, one board) says nothing. Any two images of a group are near-copies (complete linkage):
    in a row of images, of which each is like the next, the first and the last need not show one thing.

    Args:
        features: [n, D], of a network that was not trained on these images. Memory: twice as much, and `BLOCK` rows
            of n cosines.
        labels: [n].
        exact: of `exact_copies`; of images with the same bytes, one is compared.
    """
    first, copy_of = np.unique(exact.groups, return_index=True, return_inverse=True)[1:]
    pairs = near_pairs(features[first], labels[first])
    groups = _complete_linkage(len(first), pairs)[copy_of]
    found = np.concatenate([exact.pairs, first[pairs]])
    return Copies(groups, found, exact.exact, len(np.unique(pairs)))


def near_pairs(features: NDArray[np.float32], labels: Indices) -> Indices:
    """int64 [p, 2] of the n images, as `near_copies` says; those that are most alike first."""
    directions = _unit((features - features.mean(axis=0)) / np.maximum(features.std(axis=0), TINY))
    rough, least = directions, ALIKE
    if features.shape[1] > ROUGH:
        mixing = np.random.default_rng(0).normal(size=(features.shape[1], ROUGH)).astype(np.float32)
        rough, least = _unit(directions @ mixing), ALIKE - ROUGH_ERROR
    found, cosines = [], []
    for start in range(0, len(features), BLOCK):
        block = rough[start : start + BLOCK] @ rough[start:].T
        block[np.tri(*block.shape) > 0] = -1  # itself, and those that an earlier row has met
        for row in np.flatnonzero((block >= least).any(axis=1)).tolist():
            others = start + np.flatnonzero(block[row] >= least)
            alike = directions[others] @ directions[start + row]
            nearest = np.argsort(-alike, kind="stable")[:MOST_ALIKE]
            nearest = nearest[alike[nearest] >= ALIKE]
            found.append(np.stack([np.full(len(nearest), start + row), others[nearest]], axis=1))
            cosines.append(alike[nearest])
    if not found:
        return np.zeros((0, 2), np.int64)
    pairs, cosine = np.concatenate(found), np.concatenate(cosines)
    kept = _within_class(features, labels, pairs) >= ALIKE
    pairs = pairs[kept]
    ordered: Indices = pairs[np.argsort(-cosine[kept], kind="stable")]
    return ordered


def _within_class(features: NDArray[np.float32], labels: Indices, pairs: Indices) -> NDArray[np.float32]:
    """[p]: the cosine of each pair about the mean of either image's class, the smaller one."""
    means = np.zeros((labels.max() + 1, features.shape[1]), np.float32)
    squares = np.zeros(features.shape[1])
    for label in np.unique(labels):
        own = features[labels == label]
        means[label] = own.mean(axis=0)
        squares += len(own) * own.var(axis=0)
    deviation = np.maximum(np.sqrt(squares / len(features)), TINY).astype(np.float32)
    cosines = np.empty((2, len(pairs)), np.float32)
    for start in range(0, len(pairs), PAIRS):
        some = pairs[start : start + PAIRS].T
        for found, centre in zip(cosines, means[labels[some]], strict=True):
            one, other = (_unit((features[index] - centre) / deviation) for index in some)
            found[start : start + PAIRS] = (one * other).sum(axis=1)
    smaller: NDArray[np.float32] = cosines.min(axis=0)
    return smaller


def _unit(z: NDArray[np.float32]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), TINY)
    return scaled


def _complete_linkage(n: int, pairs: Indices) -> Indices:
    """int64 [n]: groups of which any two images are a pair, joined in the order of the pairs."""
    alike: defaultdict[int, set[int]] = defaultdict(set)
    members = {index: [index] for index in np.unique(pairs).tolist()}
    for one, other in pairs.tolist():
        alike[one].add(other)
        alike[other].add(one)
    for one, other in pairs.tolist():
        ours, theirs = members[one], members[other]
        if ours is not theirs and all(alike[image].issuperset(theirs) for image in ours):
            ours += theirs
            members.update(dict.fromkeys(theirs, ours))
    groups = np.arange(n)
    for group in members.values():
        groups[group] = group[0]
    return groups


def joined(one: Indices, other: Indices) -> Indices:
    """int64 [n]: the smallest groups in which all images of a group of either lie together."""
    found = one
    while True:
        before = found
        for groups in (other, one):
            _, group_of = np.unique(groups, return_inverse=True)
            least = np.full(len(groups), found.max())
            np.minimum.at(least, group_of, found)
            found = least[group_of]
        if np.array_equal(found, before):
            return found
