"""Which score an export ships, and the state that it needs: fitted on training images, before any graph is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.config import AUTO_SCORE, DEFAULT_SCORE, has_state, score_parts
from ssod_edge.data.sources import model_labels
from ssod_edge.detect.detectors import FitData
from ssod_edge.detect.sums import FittedScore, fit_score, load_shipped
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.export.graph.choice import choose
from ssod_edge.export.graph.reference import run_eager
from ssod_edge.export.graph.source import Calibration, Source, check_score
from ssod_edge.export.release import without_names
from ssod_edge.spec import Spec
from ssod_edge.terminal import image_bar

Say = Callable[[str], None]

#: Training images that a detector is fitted on.
FIT_IMAGES = 10_000
#: Fewer readable ones than this describe no distribution.
LEAST_IMAGES = 32
#: A score is chosen without being asked for from so many training images, and so many held-out ones, on: with fewer,
#: chance chooses.
LEAST_UNASKED = 200
DEFAULT_EVIDENCE = "the default for a network that was not trained with made outliers, or has few images to choose by"


@dataclass(frozen=True)
class ShippedScore:
    """What an export computes as `ood_score`.

    Attributes:
        name: see `ssod_edge.config.score_parts`.
        evidence: why this one, in words.
        source: what is exported, with the images that are left for the thresholds.
        detector: the state, if the score has one.
        record: what it was fitted on, for the spec.
        choice: the evidence of "auto" in figures, for the spec.
    """

    name: str
    evidence: str
    source: Source
    detector: FittedScore | None = None
    record: dict[str, Any] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)


def ship_score(source: Source, wanted: str | None, say: Say, earlier: tuple[Path, Spec] | None = None) -> ShippedScore:
    """Decide on the score, and fit what it needs.

    Args:
        source: what is exported.
        wanted: of `SHIPPED_SCORES`, a sum of some, or "auto". None takes that of `earlier`, else chooses as "auto" does
            if the network was trained with made outliers and its images are at hand, and else takes the default.
        say: gets a line for each step.
        earlier: the export that this one goes beside, its folder and spec.

    Raises:
        UsageError: the score needs an OOD row or images that this model has not.
    """
    if wanted is None and earlier is not None and _same_weights(source, earlier[1]):
        kept = _kept(source, *earlier, say)
        if kept is not None:
            return kept
        wanted = AUTO_SCORE if earlier[1].choice else earlier[1].score_name
    if wanted is None:
        return _unasked(source, say)
    if wanted == AUTO_SCORE and not source.trained:
        say(f"--score auto: untrained weights give nothing to choose by, so the score is {DEFAULT_SCORE}")
        return ShippedScore(DEFAULT_SCORE, "auto: untrained weights give nothing to choose by", source)
    if wanted != AUTO_SCORE:
        for part in score_parts(wanted):
            check_score(source, part)
        if not has_state(wanted):
            return ShippedScore(wanted, "chosen when exporting", source)
    if not source.trained:
        raise UsageError(f"the score '{wanted}' is fitted on training images, and untrained weights have none")
    if wanted == AUTO_SCORE:
        return _chosen(source, say, brief=False)
    training, _, source = divide(source, False, say)
    data = fit_data(source, training, say)
    detector = fit_score(wanted, data)
    record = {"data": training.description, "images": len(data.features), "settings": detector.settings}
    return ShippedScore(wanted, "chosen when exporting", source, detector, record)


def _unasked(source: Source, say: Say) -> ShippedScore:
    """The score of an export that names none, and has none beside it.

    Without made outliers in training nothing is chosen: a network that was taught by its classes alone may give unknown
    images scores so close to the threshold that the best of them by AUROC does not hold there (docs/detection.md).
    """
    images = [0 if part is None else len(part.indices) for part in (source.training, source.choices)]
    if source.outliers and min(images) >= LEAST_UNASKED:
        try:
            return _chosen(source, say, brief=True)
        except UsageError as error:
            say(f"no score can be chosen ({error}), so it is {DEFAULT_SCORE}")
    elif source.outliers:
        say(
            f"the score is {DEFAULT_SCORE}: it takes {LEAST_UNASKED} training images and as many held-out ones to "
            f"choose another, and there are {images[0]} and {images[1]}"
        )
    return ShippedScore(DEFAULT_SCORE, DEFAULT_EVIDENCE, source)


def _chosen(source: Source, say: Say, brief: bool) -> ShippedScore:
    """The score that "auto" chooses."""
    training, choices, source = divide(source, True, say)
    assert choices is not None
    data = fit_data(source, training, say)
    record: dict[str, Any] = {"data": training.description, "images": len(data.features)}
    chosen, candidate, figures = choose(source, choices, data, say, brief)
    for message in choices.unreadable:
        say(f"left out: {message}")
    detector_record = record | {"settings": candidate.settings} if candidate is not None else {}
    evidence = f"auto: the best by AUROC and FPR on images made from {choices.description}, within the cost allowed"
    return ShippedScore(chosen, evidence, source, candidate, detector_record, figures)


def _same_weights(source: Source, spec: Spec) -> bool:
    model = source.model
    return (spec.backbone, spec.classes, spec.preprocess, spec.trained) == (
        model.backbone_name,
        model.classes,
        model.preprocess,
        source.trained,
    ) and all(spec.source.get(key) == value for key, value in without_names(source.facts).items())


def _kept(source: Source, place: Path, spec: Spec, say: Say) -> ShippedScore | None:
    """The score of an export of the same weights as it is; None if its state is lost, or of other images than now."""
    name, state = spec.score_name, None
    if spec.detector or spec.choice:
        training, choices, source = divide(source, bool(spec.choice), say)
        fitted_on, chosen_on = spec.detector.get("data"), spec.choice.get("known")
        if fitted_on not in (None, training.description) or chosen_on not in (None, choices and choices.description):
            say(f"'{place}' ships {name}, of other images: it is made anew")
            return None
        try:
            state = load_shipped(spec, place, source.model.classifier.in_features)
        except ArtifactError as error:
            say(f"{error}: it is made anew")
            return None
    if spec.score["evidence"] != DEFAULT_EVIDENCE:
        say(f"score {name}, as in the export that is there; another with --score")
    record = {key: value for key, value in spec.detector.items() if key != "sha256"}
    return ShippedScore(name, spec.score["evidence"], source, state, record, spec.choice)


def divide(source: Source, auto: bool, say: Say) -> tuple[Calibration, Calibration | None, Source]:
    """Images to fit on, images to choose by (with "auto"), and the source with those left for the thresholds.

    A run has its training, validation and calibration splits. For weights that were trained elsewhere, and runs whose
    training data is gone, the images of --id are divided, and so are those of a calibration split if a run has no
    validation images.

    Raises:
        UsageError: there are no images, or too few.
    """
    training, choices, calibration = source.training, source.choices, source.calibration
    if training is None:
        if calibration is None:
            raise UsageError("a score with a state is fitted on in-distribution images. Name some: --id DATA")
        training, rest = _halves(calibration, "half that fits the detector", "the other half")
        say(
            f"note: the images that the model was trained on are not at hand: the detector is fitted on "
            f"{len(training.indices)} images of {calibration.description}, and the thresholds on others of them"
        )
        calibration, choices = rest, None
    if auto and (choices is None or len(choices.indices) < LEAST_IMAGES):
        if calibration is None:
            raise UsageError("--score auto chooses on in-distribution images, and there are none. Name some: --id DATA")
        choices, calibration = _halves(calibration, "part that chooses", "part for thresholds")
        say(f"note: the score is chosen on {len(choices.indices)} images of {choices.description}")
    for part, what in ((training, "fit a detector"), (choices, "choose a score") if auto else (training, "")):
        if part is None or len(part.indices) < LEAST_IMAGES:
            found = 0 if part is None else len(part.indices)
            own = found and part is source.training  # not taken from --id
            fix = (
                "Train on more, or ship a score without a state (--score energy)" if own else "Name more with --id DATA"
            )
            raise UsageError(f"it takes at least {LEAST_IMAGES} images to {what}, got {found}. {fix}")
    return training, choices, replace(source, calibration=calibration)


def _halves(images: Calibration, first: str, second: str) -> tuple[Calibration, Calibration]:
    """Two seeded halves, with one list of unreadable images."""
    order = np.random.default_rng(1).permutation(images.indices)
    middle = len(order) // 2
    parts = ((np.sort(order[:middle]), first), (np.sort(order[middle:]), second))
    one, other = (
        replace(images, indices=indices, description=f"{images.description}, {name}") for indices, name in parts
    )
    return one, other


def fit_data(source: Source, training: Calibration, say: Say) -> FitData:
    """The features of a seeded choice of training images, through the deployment preprocessing.

    Raises:
        UsageError: too few of them can be read.
    """
    model = source.model
    chosen = np.random.default_rng(0).permutation(training.indices)[:FIT_IMAGES]
    say(f"fitting on the features of {len(chosen)} images of {training.description}")
    logits, id_logits, features, labels = [], [], [], []
    with image_bar("fitting", len(chosen)) as advance:
        for images, found in training.batches(model.preprocess, np.sort(chosen)):
            batch_logits, batch_id, batch_features = run_eager(model, images)
            logits.append(batch_logits)
            id_logits.append(batch_id)
            features.append(batch_features)
            labels.append(found)
            advance(len(images))
    for message in training.unreadable:
        say(f"left out: {message}")
    if sum(map(len, labels)) < LEAST_IMAGES:
        raise UsageError(f"fewer than {LEAST_IMAGES} images of {training.description} can be read")
    weight, bias = (part[: len(model.classes)].detach().float().numpy() for part in model.head_weight())
    known = model_labels(np.concatenate(labels), training.source.classes, model.classes)
    return FitData(np.concatenate(features), known, np.concatenate(logits), weight, bias, np.concatenate(id_logits))
