"""What a training ends with: its validation images class by class, as a record in the run folder and in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ssod_edge.data.sources import ImageSource
from ssod_edge.data.splits import Indices
from ssod_edge.detect.classes import class_lines, tempered_classification
from ssod_edge.detect.confidence import fit_temperature
from ssod_edge.detect.detectors import Array
from ssod_edge.files import write_json
from ssod_edge.terminal import printable
from ssod_edge.training.model import SSODClassifier
from ssod_edge.training.outputs import collect

#: In a run folder.
VALIDATION = "validation.json"


def write_validation(
    run: Path, source: ImageSource, val: Indices, logits: Array, held_out: tuple[Array, Indices]
) -> list[str]:
    """Write the record of the validation images; returns it in words.

    It is `ssod_edge.detect.classes.tempered_classification`, with `image` (as its data set names it) in each mistake.

    Args:
        run: the folder.
        source: the run's data.
        val: int64 [n], its validation images.
        logits: float32 [n, M], of these.
        held_out: logits [t, M] and labels [t] of images for thresholds, which the temperature is fitted to.

    Raises:
        OutputError: the record cannot be written.
    """
    temperature = fit_temperature(*held_out) if len(held_out[1]) else 1.0
    found = tempered_classification(source.labels[val], logits, source.classes, temperature)
    for row in found["mistakes"]:
        row["image"] = source.source(int(val[row["index"]]))
    path = write_json(run / VALIDATION, {"images": "validation split", **found})
    return [*map(printable, class_lines(found)), f"each class and each mistake of the validation images: '{path}'"]


def read_logits(model: SSODClassifier, source: ImageSource, indices: Indices, workers: int) -> Array:
    """Run a model over images: float32 [n, M]."""
    if not len(indices):
        return np.zeros((0, len(source.classes)), np.float32)
    return collect(model, source, indices, workers=workers).logits


def class_logits(model: SSODClassifier, features: Array) -> Array:
    """Of the last layer as it is, float32 [n, M], for features [n, D]."""
    with torch.inference_mode():
        z = torch.from_numpy(features).to(next(model.parameters()).device)
        found: Array = model.head(z)[0].float().cpu().numpy()
    return found
