"""The last word of a training: what becomes of known validation images in another light or by another camera.

It is told by one disturbed copy of each, which `train --tune` has computed already. The copies are of the kinds that
heads and detectors are fitted with, so that this is the friendly end. The thirteen other kinds, in two strengths, would
take as long as the rest of a short training; `eval` shows them (`--shift-images`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ssod_edge.config import DEFAULT_SCORE, PRIOR_SCORE
from ssod_edge.data.images import LEAST_IMAGES
from ssod_edge.data.splits import Indices
from ssod_edge.detect.detectors import Array
from ssod_edge.detect.fit import FitData
from ssod_edge.detect.scores import ood_scores
from ssod_edge.detect.sums import FittedScore, Outputs, fit_score
from ssod_edge.errors import UsageError
from ssod_edge.training.features import Features
from ssod_edge.training.model import SSODClassifier

#: Share of the images as they are that is accepted.
TPR = 0.95
#: Training images that the distance is fitted on here: of tuned features, which are wide, more take many seconds.
FIT_IMAGES = 1000


@dataclass(frozen=True)
class Disturbed:
    """Of disturbed copies of n validation images.

    Attributes:
        images: n.
        accuracy: share that is classified rightly, in [0, 1].
        accepted: share whose score is at most the one that `TPR` of the images themselves reach.
        score: by name.
    """

    images: int
    accuracy: float
    accepted: float
    score: str

    def __str__(self) -> str:
        return (
            f"another light or camera: of disturbed copies of {self.images} validation images {self.accuracy:.1%} are "
            f"right, and {self.accepted:.1%} still accepted as known ({self.score}, at {TPR:.0%} of the images)"
        )


def judge_disturbed(
    model: SSODClassifier,
    known: Features,
    labels: Indices,
    training: FitData | None = None,
    prior: str = PRIOR_SCORE,
) -> Disturbed:
    """Judge by what an export would ship that chooses nothing.

    Args:
        model: on any device.
        known: of n validation images.
        labels: int64 [n], of the same.
        training: images, and then a disturbed copy of each. None, too few of them, or such as no distance can be
            fitted on, make it the default score of the logits.
        prior: see `ssod_edge.config.prior_score`.
    """
    plain, disturbed = (_outputs(model, z) for z in (known.plain, known.disturbed))
    state = None
    if training is not None and len(training.labels) >= 2 * LEAST_IMAGES:
        try:
            state = fit_score(prior, training, plain)
        except UsageError:  # an export ships the default score then, too
            state = None
    scores = [_score(state, outputs) for outputs in (plain, disturbed)]
    accepted = scores[1] <= np.quantile(scores[0], TPR, method="higher")
    right = disturbed[0].argmax(axis=1) == labels
    name = DEFAULT_SCORE if state is None else state.name
    return Disturbed(len(labels), float(right.mean()), float(accepted.mean()), name)


def some(images: Indices, most: int) -> Indices:
    """At most so many of some images, drawn, seeded; ascending."""
    return np.sort(np.random.default_rng(0).permutation(images)[:most])


def _outputs(model: SSODClassifier, features: Array) -> Outputs:
    with torch.inference_mode():
        z = torch.from_numpy(features).to(next(model.parameters()).device)
        logits, id_logit = (part.float().cpu().numpy() for part in model.head(z))
    return logits, id_logit, features


def _score(state: FittedScore | None, outputs: Outputs) -> Array:
    logits, id_logit, features = outputs
    if state is not None:
        return state.score(features, logits, id_logit)
    return np.asarray(ood_scores(logits, id_logit)[DEFAULT_SCORE], np.float32)
