"""The photos of a report: which ones are shown, small copies of them, and the nearest training photo of each."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ssod_edge.config import Preprocess
from ssod_edge.data.pixels import load_image
from ssod_edge.data.sources import ImageSource, model_labels
from ssod_edge.data.splits import Indices
from ssod_edge.errors import ImageError, UsageError
from ssod_edge.evaluation.page_judged import KNOWN, Judged
from ssod_edge.files import real_path
from ssod_edge.terminal import image_bar, printable

if TYPE_CHECKING:
    from ssod_edge.training.run import Run

#: Pixels of the longer side of a small copy, and its JPEG quality.
SIDE, QUALITY = 168, 72
#: Photos of a gallery, and of a cell of the confusion matrix.
OF_GALLERY, OF_CELL = 48, 12
#: Photos that are judged and shown, however much room there is: each takes some milliseconds to make.
MOST = 1200
#: Training photos that features are computed of where none are kept, drawn, seeded.
MOST_TRAINING = 2000

#: Bytes that say which photo is whose.
BESIDE = 40

#: Which photo: a set's name and a row of it.
Place = tuple[str, int]


@dataclass
class Photos:
    """Small copies of photos.

    Attributes:
        content: Base64 of JPEG files.
        shown: set -> row -> which of `content`.
        near: set -> row -> which of `training`.
        training: the nearest training photos: name, label in the model's numbering, which of `content` (-1: none).
        why_no_near: why no training photo is beside them; empty where they are.
    """

    content: list[str] = field(default_factory=list)
    shown: dict[str, dict[int, int]] = field(default_factory=dict)
    near: dict[str, dict[int, int]] = field(default_factory=dict)
    training: list[tuple[str, int, int]] = field(default_factory=list)
    why_no_near: str = ""


def places(judged: Judged) -> list[Place]:
    """The photos that a report shows, the most telling first, each once; at most `MOST`.

    Confident mistakes, known images that are the least known, unknown images that are the most known; then those of
    each cell of the confusion matrix, the most confident first.
    """
    known, correct = judged.known, judged.correct
    sure = np.argsort(-known.confidence, kind="stable")
    galleries = [[(KNOWN, int(row)) for row in sure[~correct[sure]]]]
    galleries.append([(KNOWN, int(row)) for row in np.argsort(-known.scores, kind="stable")])
    for name, images in judged.unknown.items():
        galleries.append([(name, int(row)) for row in np.argsort(images.scores, kind="stable")])
    turns = [gallery[turn] for turn in range(OF_GALLERY) for gallery in galleries if turn < len(gallery)]
    cells: dict[tuple[int, int], list[Place]] = {}
    for row in sure:
        cells.setdefault((int(known.labels[row]), int(known.guesses[row])), []).append((KNOWN, int(row)))
    wrong_first = sorted(cells, key=lambda cell: (cell[0] == cell[1], -len(cells[cell])))
    of_cells = [place for cell in wrong_first for place in cells[cell][:OF_CELL]]
    return list(dict.fromkeys([*turns, *of_cells]))[:MOST]


def take_photos(judged: Judged, room: int, workers: int = 1) -> Photos:
    """Small copies of the photos of a report, as long as there is room, and of the nearest training photos.

    Args:
        judged: the images.
        room: bytes of Base64 that there is room for.
        workers: processes that read training images whose features are not kept.
    """
    photos, wanted = Photos(), places(judged)
    try:
        near = _Nearest.of(judged, wanted, workers)
    except (UsageError, ImageError) as error:
        near, photos.why_no_near = None, printable(str(error))
    seen: dict[int, int] = {}
    copies = _Copies(photos.content, room)
    with image_bar("small copies", len(wanted)) as advance:
        for name, row in wanted:
            advance(1)
            images = judged.sets[name]
            copy = copies.add(images.source, int(images.indices[row]))
            if copy is None:
                break
            photos.shown.setdefault(name, {})[row] = copy
            if near is None:
                continue
            index = near.found[name, row]
            if index not in seen:
                name_there = printable(near.source.source(index))
                copy = copies.add(near.source, index, name_there)
                if copy is None:
                    break
                seen[index] = len(photos.training)
                photos.training.append((name_there, int(near.labels[index]), copy))
            photos.near.setdefault(name, {})[row] = seen[index]
    return photos


@dataclass
class _Copies:
    """Small copies, as long as there is room. Attributes: Base64 of each; bytes that are left."""

    content: list[str]
    room: int

    def add(self, source: ImageSource, index: int, name: str = "") -> int | None:
        """Add one, and a name that goes with it: its place; -1 of an image that cannot be read; None without room."""
        try:
            text = small_copy(source, index)
        except ImageError:
            return -1
        size = len(text) + BESIDE + len(json.dumps(name))
        if size > self.room:
            return None
        self.room -= size
        self.content.append(text)
        return len(self.content) - 1


def small_copy(source: ImageSource, index: int) -> str:
    """Base64 of a JPEG of an image, upright and whole. Raises ImageError if it cannot be read."""
    image = load_image(source.picture(index), Preprocess(input_size=SIDE, fit="pad"))
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


@dataclass(frozen=True)
class _Nearest:
    """The nearest training photos. Attributes: their source; labels of all of it; photo -> index in the source."""

    source: ImageSource
    labels: Indices
    found: Mapping[Place, int]

    @classmethod
    def of(cls, judged: Judged, wanted: list[Place], workers: int) -> _Nearest:
        """Raises UsageError where no training photos or no features are at hand."""
        if judged.run is None:
            raise UsageError("an export holds no training photos; they stand here where the run is given")
        source, splits = judged.run.splits("they stand here where it is at hand")
        indices = splits.train if judged.run.folds is None else judged.run.folds.images
        indices, features = _training_features(judged.run, source, indices, workers)
        asked = np.stack([_features(judged, place) for place in wanted])
        labels = model_labels(source.labels, source.classes, judged.classes)
        rows = nearest(asked, features)
        return cls(source, labels, {place: int(indices[row]) for place, row in zip(wanted, rows, strict=True)})


def _features(judged: Judged, place: Place) -> NDArray[np.float32]:
    features = judged.sets[place[0]].features
    if features is None:
        raise UsageError("what ran gives no features")
    row: NDArray[np.float32] = features[place[1]]
    return row


def _training_features(
    run: Run, source: ImageSource, indices: Indices, workers: int
) -> tuple[Indices, NDArray[np.float32]]:
    """Training images and their features: those that are kept, or of at most `MOST_TRAINING` computed."""
    from ssod_edge.training.features import kept_features
    from ssod_edge.training.outputs import collect

    kept = kept_features(run.model, source, real_path(run.folder).parent)
    if kept is not None:
        return indices, kept.plain[indices]
    chosen = np.sort(np.random.default_rng(0).permutation(indices)[:MOST_TRAINING])
    with image_bar("features of training images", len(chosen)) as advance:
        return chosen, collect(run.model, source, chosen, workers=workers, advance=advance).features


def nearest(asked: NDArray[np.float32], features: NDArray[np.float32]) -> Indices:
    """The row of `features` [n, D] that is nearest to each of `asked` [m, D]: int64 [m].

    By the cosine about the mean, each feature over its own deviation: those of one block are larger than another's.
    """
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6

    def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        scaled = (rows - mean) / deviation
        length: NDArray[np.float32] = scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12)
        return length

    trained = unit(features)
    found = [unit(part) @ trained.T for part in _parts(asked)]
    return np.concatenate([part.argmax(axis=1) for part in found]).astype(np.int64)


def _parts(rows: NDArray[np.float32], size: int = 256) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
