"""Photos to be taught: read, cut to the graph's input, and turned into features by the export's own graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ssod_edge.config import Preprocess
from ssod_edge.data.disturbances import seeded_copy
from ssod_edge.data.images import Subset
from ssod_edge.data.layout import same_name
from ssod_edge.detect.detectors import Array
from ssod_edge.detect.fit import Labels
from ssod_edge.errors import ImageError, UsageError
from ssod_edge.export.release import Say
from ssod_edge.teach.graph import Trunk
from ssod_edge.terminal import image_bar

#: Photos of a class that a row can be made of and judged by: one is seen, another is left out.
LEAST_PHOTOS = 2
#: Photos that are read at a time.
BATCH = 32
#: Photos that join the reference.
REFERENCE_PHOTOS = 64
#: Share of a new class's photos, from which on they are taken for one class that is known.
ALIKE = 0.8


@dataclass(frozen=True)
class Photos:
    """m photos to be taught.

    Attributes:
        plain, disturbed: float32 [m, D], their features and those of a disturbed copy of each.
        labels: int64 [m], in `classes`.
        classes: those of the model, and the new ones after them.
        shown: uint8 [r, 3, S, S], photos for the reference.
        places: int64 [r], which ones these are.
        sources: names of the photos, for messages.
        added: how many of the classes are new.
        data, fingerprint: where the photos came from, for the record.
        unreadable: messages of the photos that were left out.
    """

    plain: Array
    disturbed: Array
    labels: Labels
    classes: tuple[str, ...]
    shown: NDArray[np.uint8]
    places: Labels
    sources: tuple[str, ...] = ()
    added: int = 0
    data: str | None = None
    fingerprint: str | None = None
    unreadable: tuple[str, ...] = ()

    @classmethod
    def none(cls, classes: tuple[str, ...], width: int, settings: Preprocess) -> Photos:
        """Nothing to teach."""
        features, size = np.zeros((0, width), np.float32), settings.input_size
        labels = np.zeros(0, np.int64)
        return cls(features, features, labels, classes, np.zeros((0, 3, size, size), np.uint8), labels)

    def only(self, stay: NDArray[np.bool_]) -> Photos:
        """Those of which `stay` [m] says so."""
        shown, place = stay[self.places], np.cumsum(stay) - 1
        return replace(
            self,
            plain=self.plain[stay],
            disturbed=self.disturbed[stay],
            labels=self.labels[stay],
            shown=self.shown[shown],
            places=place[self.places[shown]],
            sources=tuple(np.array(self.sources, object)[stay].tolist()),
        )


def read_photos(images: Subset, classes: tuple[str, ...], settings: Preprocess, trunk: Trunk, say: Say) -> Photos:
    """Read all that can be read; what cannot is said.

    Args:
        images: with classes. One with the name of a class of the model is that one.
        classes: of the model.

    Raises:
        UsageError: one photo in two classes, or a new class with fewer than `LEAST_PHOTOS`.
    """
    data = images.source.name
    if images.source.left_out:
        say(images.source.left_out)
    images = _without_copies(images, say)
    known = {same_name(name): number for number, name in enumerate(classes)}
    added = [name for name in images.source.classes if same_name(name) not in known]
    numbers = known | {same_name(name): len(classes) + place for place, name in enumerate(added)}
    table = np.array([numbers[same_name(name)] for name in images.source.classes], np.int64)
    read: list[int] = []
    plain, disturbed, shown, places = [], [], [], []
    wanted = _for_reference(images.source.labels[images.indices])
    for indices, pixels in _batches(images, settings):
        plain.append(trunk.features(pixels))
        disturbed.append(trunk.features(np.stack([*map(seeded_copy, pixels)])))
        for one, place in zip(pixels, range(len(read), len(read) + len(pixels)), strict=True):
            if place in wanted:
                shown.append(one)
                places.append(place)
        read += indices
    for message in images.unreadable:
        say(f"left out: {message}")
    everything = (*classes, *added)
    found = table[images.source.labels[read]]
    why = f" (left out: {next(iter(images.unreadable))})" if images.unreadable else ""
    for number in table.tolist():
        check_count(everything[number], data, int((found == number).sum()), number >= len(classes), why)
    return Photos(
        np.concatenate(plain),
        np.concatenate(disturbed),
        found,
        everything,
        np.stack(shown),
        np.array(places, np.int64),
        tuple(images.source.source(index) for index in read),
        len(added),
        data,
        images.source.fingerprint,
        tuple(images.unreadable),
    )


def _batches(images: Subset, settings: Preprocess) -> Iterator[tuple[list[int], NDArray[np.uint8]]]:
    """What can be read, in batches: its places in the source, and uint8 [n, 3, S, S]."""
    with image_bar("photos", len(images)) as advance:
        for start in range(0, len(images), BATCH):
            chosen = images.indices[start : start + BATCH]
            read = [(int(index), one) for index in chosen for one, _ in images.batches(settings, index[None])]
            if read:
                yield [index for index, _ in read], np.concatenate([one for _, one in read])
            advance(len(chosen))


def check_count(name: str, data: str | None, count: int, new: bool, why: str = "") -> None:
    """Raises UsageError where a class has too few photos; `why` says what was left out."""
    if count < (LEAST_PHOTOS if new else 1):
        photos = "1 photo" if count == 1 else f"{count} photos"
        raise UsageError(
            f"the class '{name}' of '{data}' has {photos} that can be read{why}. It takes {LEAST_PHOTOS} for a new "
            "class, one to learn from and one to prove it by, and 20 are better"
        )


def check_new(photos: Photos, before: int, taken_for: Labels, known: NDArray[np.bool_]) -> None:
    """Raises UsageError where nearly all photos of a new class are accepted as one class that the model knows.

    Args:
        before: classes of the model.
        taken_for: int64 [m], the class that the model gives each photo.
        known: bool [m], whether it accepts it.
    """
    for label in range(before, len(photos.classes)):
        mine = photos.labels == label
        counts = np.bincount(taken_for[mine & known], minlength=before)
        other, count = int(counts.argmax()), int(counts.max())
        if count >= ALIKE * mine.sum():
            name, like = photos.classes[label], photos.classes[other]
            raise UsageError(
                f"{count} of {mine.sum()} photos of '{name}' look like '{like}': the model knows them as that. If they "
                f"are, put them into a folder '{like}'; if they are another class all the same, add --alike"
            )


def _for_reference(labels: Labels) -> set[int]:
    """Places of the photos that join the reference, of every class in turn."""
    ranks = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        ranks[mine] = np.arange(len(mine))
    return set(np.argsort(ranks, kind="stable")[:REFERENCE_PHOTOS].tolist())


def _without_copies(images: Subset, say: Say) -> Subset:
    """Each photo once: a second one would be learnt from while the first one is left out to prove it.

    Raises:
        UsageError: one file is in two classes.
    """
    found: dict[str, int] = {}
    kept = []
    source = images.source
    for index in images.indices.tolist():
        try:
            first = found.setdefault(source.picture(index).sha256, index)
        except ImageError:
            first = index  # named when it is read
        if source.labels[first] != source.labels[index]:
            one, other = (source.classes[source.labels[place]] for place in (first, index))
            raise UsageError(
                f"'{source.source(first)}' of class '{one}' and '{source.source(index)}' of class '{other}' are the "
                "same photo. Remove one"
            )
        if first == index:
            kept.append(index)
    if copies := len(images) - len(kept):
        say(f"left out: {copies} of {len(images)} photos, which are copies of others")
    return replace(images, indices=np.array(kept, np.int64))


def counts_of(labels: Sequence[int] | Labels, classes: tuple[str, ...]) -> dict[str, int]:
    """Class -> how many photos, for the record."""
    values, counts = np.unique(np.asarray(labels, np.int64), return_counts=True)
    return {classes[int(value)]: int(count) for value, count in zip(values, counts, strict=True)}
