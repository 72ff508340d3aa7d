"""Photos of a lesson that are there twice: the model has learnt them already, or the lesson itself has them again.

Whoever reviews a camera's images and teaches `unknown/classes` once more gives the photos of the last lesson too. They
would count twice, and be judged by a model that has seen them. An export holds no images, so they are found by their
features: also where a photo was saved again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ssod_edge.detect.stored import StoredFeatures, half
from ssod_edge.errors import UsageError
from ssod_edge.export.release import Say
from ssod_edge.teach.photos import Photos, check_count

#: From this cosine on two photos are one, once each feature has mean 0 and deviation 1. A photo that was saved as JPEG
#: again has 0.9825 at least (160 photos of waste, quality 95); the most that two photos have is 0.973 of 1,571 of waste
#: and 0.889 of 2,747 of clothes, but for the pairs that are one photo in two classes.
SAME = 0.98
#: Rows that are compared at a time.
BLOCK = 256
_TINY = 1e-6


def without_copies(photos: Photos, stored: StoredFeatures, before: int, alike: bool, say: Say) -> Photos:
    """The photos that are neither among the stored images nor twice in the lesson.

    Args:
        stored: in the numbering of the classes of `photos`.
        before: how many classes the model has.
        alike: allow a photo of one class that is there as one of another.

    Raises:
        UsageError: such a photo, or a new class that has fewer than two photos without the copies.
    """
    n, m = len(stored.labels), len(photos.labels)
    first = _first_copies(np.concatenate([stored.plain, half(photos.plain)]), n)
    labels = np.concatenate([stored.labels, photos.labels])
    found = first >= 0
    other = found & (labels[first] != photos.labels)
    if other.any() and not alike:
        _refuse(photos, first, labels, n, np.flatnonzero(other).tolist())
    found &= ~other
    if learnt := int((found & (first < n)).sum()):
        say(f"left out: {learnt} of {m} photos, which the model has learnt already")
    if copies := int((found & (first >= n)).sum()):
        say(f"left out: {copies} of {m} photos, which are copies of others")
    left = photos.only(~found)
    why = f" (left out: {copies} copies)" if copies else ""
    for label in range(before, len(photos.classes)):
        check_count(photos.classes[label], photos.data, int((left.labels == label).sum()), True, why)
    return left


def _first_copies(features: NDArray[np.float16], n: int) -> NDArray[np.intp]:
    """Of each row from n on the earlier row that it is a copy of, or -1."""
    rows = np.arange(n, len(features))
    mean = features.mean(axis=0, dtype=np.float32)
    deviation = np.maximum(features.std(axis=0, dtype=np.float32), _TINY)

    def unit(start: int, end: int) -> NDArray[np.float32]:
        values = (features[start:end].astype(np.float32) - mean) / deviation
        scaled: NDArray[np.float32] = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), _TINY)
        return scaled

    ours = unit(n, len(features))
    nearest, most = np.full(len(rows), -1), np.full(len(rows), SAME, np.float32)
    for start in range(0, len(features), BLOCK):
        cosines = ours @ unit(start, start + BLOCK).T
        cosines[np.arange(start, start + cosines.shape[1]) >= rows[:, None]] = -1  # itself, and later ones
        best = cosines.max(axis=1)
        better = best >= most
        nearest[better], most[better] = start + cosines[better].argmax(axis=1), best[better]
    return nearest


def _refuse(photos: Photos, first: NDArray[np.intp], labels: NDArray[np.int64], n: int, wrong: list[int]) -> None:
    """Raises UsageError that names the photos whose labels contradict."""
    place = wrong[0]
    source, name, other = (
        photos.sources[place],
        photos.classes[photos.labels[place]],
        photos.classes[labels[first[place]]],
    )
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    if first[place] >= n:
        twin = photos.sources[first[place] - n]
        raise UsageError(
            f"'{twin}' of class '{other}' and '{source}' of class '{name}' are the same photo, saved again{more}. "
            "Remove one; or add --alike, if they are not"
        )
    raise UsageError(
        f"'{source}' of class '{name}' is a photo that the model has learnt as '{other}'{more}. Remove it; if it was "
        f"wrong then, take that class out with --forget and teach it anew; or add --alike, if it is another photo"
    )
