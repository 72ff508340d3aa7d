"""Features that an export keeps of its images, for `ssod-edge teach`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.data.sources import ImageSource, model_labels
from ssod_edge.data.splits import Indices
from ssod_edge.detect.folds import Folds
from ssod_edge.detect.regression import STRENGTHS, parts_by_class
from ssod_edge.detect.stored import StoredFeatures, half, save_features
from ssod_edge.errors import ImageError
from ssod_edge.export.graph.source import Source
from ssod_edge.export.release import Say
from ssod_edge.files import real_path, sha256_file
from ssod_edge.spec import FEATURES_NAME
from ssod_edge.terminal import image_bar
from ssod_edge.training.disturbed import some
from ssod_edge.training.features import (
    Features,
    compute_features,
    distance_features,
    features_of,
    kept_features,
)

#: Of images that nothing was fitted on, so many for thresholds and so many of those to validate on: each costs two
#: passes of the network.
MOST_HELD_OUT = 1000


def store_features(source: Source, folder: Path, say: Say) -> dict[str, Any]:
    """Write `FEATURES_NAME` into an export folder, and return the spec's `features`.

    Where the last layer was fitted on features that training left alone, they are of all images but the validation
    images that it was fitted on, with the last layers that left out a part of them. Otherwise of the images for
    thresholds: the network and its last layer have seen none of them, so that the layer itself stands for each of
    those. Validation images stay held out.

    Returns:
        empty, and nothing is written, where the model is of no run, where the thresholds come from images of another
        data set or from too few, or where an image cannot be read any more.
    """
    training, thresholds, held_out = source.images.training, source.images.thresholds, source.images.choices
    if source.run is None or training is None or thresholds is None or thresholds.source is not training.source:
        return {}
    images = training.source
    labels = model_labels(images.labels, images.classes, source.model.classes)
    folds = source.folds or _folds(source, some(thresholds.indices, MOST_HELD_OUT), labels)
    if folds is None:
        say(
            f"no features are stored, so that teach will not do: {thresholds.description} has too few images of a class"
        )
        return {}
    others = np.zeros(0, np.int64) if held_out is None else np.setdiff1d(held_out.indices, folds.images)
    if source.folds is None:
        others = some(others, MOST_HELD_OUT)
    rows = np.sort(np.concatenate([folds.images, others]))
    try:
        both = _features(source, images, rows)
    except ImageError as error:
        say(f"no features are stored, so that teach will not do: {error}")
        return {}
    placed = replace(folds, images=np.searchsorted(rows, folds.images))
    last = distance_features(source.model, source.tuned)
    path = save_features(
        StoredFeatures(half(both.plain), half(both.disturbed), labels[rows], placed, last), folder / FEATURES_NAME
    )
    size = path.stat().st_size / 1e6
    say(f"{FEATURES_NAME}: {size:.1f} MB, features of {len(rows)} images for teach; --no-features leaves it out")
    record = {"sha256": sha256_file(path), "images": len(rows), "held_out": len(others)}
    return record if source.tuned == "head" else {**record, "tuned": source.tuned or "all"}


def _folds(source: Source, images: Indices, labels: Indices) -> Folds | None:
    """The last layer, which has seen none of these images, as the one without each part of them; None: too few."""
    classes = len(source.model.classes)
    parts = parts_by_class(labels[images], classes, np.arange(len(images)))
    if not parts:
        return None
    fold = np.zeros(len(images), np.int64)
    for number, (_, outside) in enumerate(parts):
        fold[outside] = number
    weight, bias = (part[:classes].detach().float().numpy() for part in source.model.head_weight())
    copies = len(parts)
    counts = np.ones(len(images), np.float32)
    return Folds(images, fold, np.tile(weight, (copies, 1, 1)), np.tile(bias, (copies, 1)), counts, STRENGTHS[1])


def _features(source: Source, images: ImageSource, rows: Indices) -> Features:
    """Of some images of the training data; raises ImageError where one cannot be read."""
    runs = real_path(source.folder).parent
    if source.folds is not None:
        with image_bar("features", len(images)) as advance:
            found: Features | None = features_of(source.model, images, runs, advance=advance)
    else:
        found = kept_features(source.model, images, runs) if source.tuned else None
    if found is not None:
        return Features(found.plain[rows], found.disturbed[rows])
    with image_bar("features", len(rows)) as advance:
        return compute_features(source.model, images, rows, advance=advance)
