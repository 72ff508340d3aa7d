"""Features that an export keeps of its images, for `ssod-edge teach`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.data.sources import model_labels
from ssod_edge.detect.stored import StoredFeatures, half, save_features
from ssod_edge.errors import ImageError
from ssod_edge.export.graph.source import Source
from ssod_edge.export.release import Say
from ssod_edge.files import sha256_file
from ssod_edge.spec import FEATURES_NAME
from ssod_edge.terminal import image_bar
from ssod_edge.training.features import features_of


def store_features(source: Source, folder: Path, say: Say) -> dict[str, Any]:
    """Write `FEATURES_NAME` into an export folder, of the images that the model was fitted on and of its validation
    images, which stay held out.

    Returns:
        the spec's `features`; empty, and nothing is written, where training changed the features, where the thresholds
        come from other images, or where an image cannot be read any more.
    """
    training, held_out = source.images.training, source.images.choices
    if source.tuned != "head" or source.folds is None or training is None:
        return {}
    images = training.source
    try:
        with image_bar("features", len(images)) as advance:
            both = features_of(source.model, images, source.folder.resolve().parent, advance=advance)
    except ImageError as error:
        say(f"no features are stored, so that teach will not do: {error}")
        return {}
    others = np.zeros(0, np.int64) if held_out is None else np.setdiff1d(held_out.indices, source.folds.images)
    rows = np.sort(np.concatenate([source.folds.images, others]))
    labels = model_labels(images.labels, images.classes, source.model.classes)[rows]
    folds = replace(source.folds, images=np.searchsorted(rows, source.folds.images))
    stored = StoredFeatures(half(both.plain[rows]), half(both.disturbed[rows]), labels, folds, source.model.last_width)
    path = save_features(stored, folder / FEATURES_NAME)
    size = path.stat().st_size / 1e6
    say(f"{FEATURES_NAME}: {size:.1f} MB, features of {len(rows)} images for teach; --no-features leaves it out")
    return {"sha256": sha256_file(path), "images": len(rows), "held_out": len(others)}
