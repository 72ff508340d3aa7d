"""What an evaluation says of the images of known classes, one by one: mistakes, with what the shipped score says."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssod_edge.data.sources import ImageSource
from ssod_edge.data.splits import Indices
from ssod_edge.detect.classes import tempered_classification
from ssod_edge.detect.confidence import fit_temperature, p_known, verdict_inputs
from ssod_edge.spec import Spec, Threshold
from ssod_edge.training.outputs import Outputs


def shipped_temperature(spec: Spec | None, calibration: Outputs | None) -> tuple[float, str]:
    """The temperature of `probs`, and where it comes from.

    Args:
        spec: of the run's export, if there is one.
        calibration: held-out or out-of-fold outputs of images for thresholds, if there are any: without an export the
            temperature is fitted to them, as an export would.
    """
    if spec is not None:
        return spec.temperature, "the export"
    if calibration is not None:
        return fit_temperature(calibration.logits, calibration.labels), "images for thresholds"
    return 1.0, "nothing: there are no images for thresholds"


def judge_known(
    outputs: Outputs,
    images: tuple[ImageSource, Indices],
    classes: tuple[str, ...],
    temperature: tuple[float, str],
    scores: NDArray[np.floating[Any]],
    threshold: Threshold | None,
) -> dict[str, Any]:
    """The part `classification` of a report.

    Args:
        outputs: of the N known images; each has a class of the model.
        images: the same, as they are read.
        classes: of the model.
        temperature: from `shipped_temperature`.
        scores: [N], `ood_score` by what ships.
        threshold: of this score.

    Returns:
        What `ssod_edge.detect.classes.tempered_classification` returns; `temperature` has `fitted_on` too, and each of
        the `mistakes` also `image` (as its data set names it), `ood_score`, `p_known` and `known`, the last two None
        without a threshold.
    """
    source, indices = images
    value, fitted_on = temperature
    found = tempered_classification(outputs.labels, outputs.logits, classes, value)
    found["temperature"]["fitted_on"] = fitted_on
    p = None if threshold is None else p_known(scores, verdict_inputs(threshold))
    for row in found["mistakes"]:
        score = float(scores[row["index"]])
        row |= {
            "image": source.source(int(indices[row["index"]])),
            "ood_score": score,
            "p_known": None if p is None else round(float(p[row["index"]]), 6),
            "known": None if threshold is None else score <= threshold.value,
        }
    return found
