"""Which score an export ships, and the state that it needs: fitted on training images, before any graph is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssod_edge.config import AUTO_SCORE, DEFAULT_SCORE, has_state, prior_score, score_parts
from ssod_edge.data.disturbances import seeded_copy
from ssod_edge.data.images import LEAST_IMAGES, Images, Subset
from ssod_edge.data.sources import model_labels
from ssod_edge.data.splits import Indices
from ssod_edge.detect.choice import LEAST_UNASKED, unasked_score
from ssod_edge.detect.detectors import Detector
from ssod_edge.detect.fit import FitData
from ssod_edge.detect.folds import Folds, out_of_fold_parts
from ssod_edge.detect.sums import FittedScore, Outputs, ScoreSum, fit_score, held_out_scores
from ssod_edge.errors import ArtifactError, ImageError, UsageError
from ssod_edge.evaluation.expect import TaughtImages
from ssod_edge.evaluation.left_out import WITHOUT_BRANCH, expectation, expectation_lines
from ssod_edge.export.graph.auto_score import OUT_OF_FOLD, choose
from ssod_edge.export.graph.negatives import DEFAULTS, fit_default, with_row
from ssod_edge.export.graph.reference import eager_outputs, run_eager
from ssod_edge.export.graph.score_graph import MOST_ROUNDING, lost_to_rounding
from ssod_edge.export.graph.source import Source, check_score
from ssod_edge.export.release import Say, without_names
from ssod_edge.files import real_path
from ssod_edge.runtime.export import Export
from ssod_edge.spec import Spec
from ssod_edge.terminal import image_bar
from ssod_edge.training.features import fitting_data, kept_features

Array = NDArray[np.float32]
Advance = Callable[[int], None]

#: Training images that a detector is fitted on.
FIT_IMAGES = 10_000
#: Held-out images that the parts of a sum are standardised by.
HELD_OUT_IMAGES = 2000
#: Training images by which an export beside a branch says what to expect; `eval --leave-out` takes twice as many.
EXPECTED_BY = 1000
DEFAULT_EVIDENCE = "the default for a network that was not trained with made outliers, or has few images to choose by"


@dataclass(frozen=True)
class WantedScore:
    """Which score an export is to ship, before any image is looked at.

    Attributes:
        name: see `ssod_edge.config.score_parts`, or "auto".
        evidence: why, in words.
        asked: whether somebody asked for it; a choice that nobody asked for is told in a line.
        kept: the export whose score this is, to be taken over if it is of the same images.
    """

    name: str
    evidence: str = "chosen when exporting"
    asked: bool = True
    kept: Export | None = None

    @property
    def chooses(self) -> bool:
        return self.name == AUTO_SCORE

    @property
    def told(self) -> str:
        """What is said where it cannot be made."""
        return "no score can be chosen" if self.chooses else f"the score {self.name} cannot be fitted"

    def divide(self, images: Images, by_folds: bool, say: Say) -> Images:
        """The images, with some to choose by and to fit on where this score takes them; errors as `Images.divide`.

        Args:
            by_folds: whether images that were trained on have folds to be chosen by.
        """
        choosing = self.chooses and not by_folds
        return images.divide(choosing, say) if self.chooses or has_state(self.name) else images


@dataclass(frozen=True)
class ShippedScore:
    """What an export computes as `ood_score`.

    Attributes:
        name, evidence: see `WantedScore`; never "auto".
        detector: the state, if the score has one.
        record: what it was fitted on, for the spec.
        choice: the evidence of "auto" in figures, for the spec.
        out_of_fold: what stands in for the scores of the images for thresholds, where the model was fitted on them.
        expected: the spec's, of the same models.
    """

    name: str
    evidence: str
    detector: FittedScore | None = None
    record: dict[str, Any] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)
    out_of_fold: OutOfFold | None = None
    expected: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OutOfFold:
    """Of the t images for thresholds, by heads and detectors that were fitted without them.

    Attributes:
        logits: float32 [t, M].
        labels: int64 [t], in the numbering of the data set; -1 where there is none.
        change: float32 [t]: the score, less that of the model that ships. An artifact's score of an image, plus this,
            is what it would be if the image were new.
    """

    logits: Array
    labels: Indices
    change: Array


def want_score(source: Source, name: str | None, earlier: Export | None, say: Say) -> WantedScore:
    """Which score to ship.

    Args:
        source: what is exported.
        name: of `SHIPPED_SCORES`, a sum of some, or "auto". None takes that of `earlier`, else chooses as "auto" does
            if the network was trained with made outliers and its images are at hand, else takes config's `prior_score`
            if they are, perhaps with the OOD row (`fit_default`), and `DEFAULT_SCORE` if not.
        earlier: the export that this one goes beside.
        say: gets a line for each step.

    Raises:
        UsageError: the score needs an OOD row or images that this model has not.
    """
    if name is None and earlier is not None and same_weights(source, earlier.spec):
        spec = earlier.spec
        if spec.score["evidence"] == DEFAULT_EVIDENCE:
            return WantedScore(spec.score_name, DEFAULT_EVIDENCE, asked=False, kept=earlier)
        return WantedScore(AUTO_SCORE if spec.choice else spec.score_name, kept=earlier)
    if name is None:
        training, choices = (
            0 if part is None else len(part) for part in (source.images.training, source.images.choices)
        )
        default = unasked_score(source.outliers, training, choices, source.tuned) if source.trained else DEFAULT_SCORE
        if default != AUTO_SCORE and source.outliers:
            say(
                f"the score is {default}: it takes {LEAST_UNASKED} training images and as many held-out ones to "
                f"choose another, and there are {training} and {choices}"
            )
        elif default == DEFAULT_SCORE and source.tuned:
            say(
                f"the score is {default}: {prior_score(source.tuned)} is fitted on {LEAST_IMAGES} training images or "
                f"more, and there are {training}"
            )
        return WantedScore(default, DEFAULT_EVIDENCE, asked=False)
    if name == AUTO_SCORE and not source.trained:
        say(f"--score auto: untrained weights give nothing to choose by, so the score is {DEFAULT_SCORE}")
        return WantedScore(DEFAULT_SCORE, "auto: untrained weights give nothing to choose by")
    wanted = WantedScore(name)
    if not wanted.chooses:
        for part in score_parts(name):
            check_score(source, part)
        if has_state(name) and not source.trained:
            raise UsageError(f"the score '{name}' is fitted on training images, and untrained weights have none")
    return wanted


def ship_score(source: Source, wanted: WantedScore, say: Say) -> ShippedScore:
    """Choose the score and fit what it needs, on images that were divided for it (`WantedScore.divide`).

    Raises:
        UsageError: too few images can be read.
    """
    shipped = _kept(source, wanted.kept, say) if wanted.kept is not None else None
    folded = None if source.folds is None else _Folded(source, source.folds, say)
    if shipped is None:
        try:
            shipped = _made(source, wanted, folded, say)
        except UsageError as error:
            if wanted.asked:
                raise
            say(f"{wanted.told} ({error}), so it is {DEFAULT_SCORE}")
            shipped = ShippedScore(DEFAULT_SCORE, wanted.evidence)
    if folded is None or source.images.thresholds is None:
        return replace(shipped, expected=_expected_beside_branch(source, shipped.name, say))
    return replace(shipped, out_of_fold=folded.of(shipped), expected=folded.expected(shipped.name))


def _made(source: Source, wanted: WantedScore, folded: _Folded | None, say: Say) -> ShippedScore:
    """The score that is named, fitted, or the one that "auto" chooses."""
    if not (wanted.chooses or has_state(wanted.name)):
        return ShippedScore(wanted.name, wanted.evidence)
    data = fit_data(source, say) if folded is None else folded.data
    if wanted.chooses:
        return _chosen(source, data, say, brief=not wanted.asked)
    held_out: Outputs | dict[str, Array] | None = None
    by_default = not wanted.asked and wanted.name in DEFAULTS
    if folded is not None:
        held_out = folded.parts(with_row(wanted.name) if by_default and source.model.ood.weight.any() else wanted.name)[
            0
        ]
    elif len(score_parts(wanted.name)) > 1:
        held_out = _held_out(source, say)
    by_negatives: dict[str, Any] = {}
    if by_default and held_out is not None:
        detector, by_negatives = fit_default(source, wanted.name, data, held_out, say)
    else:
        detector = fit_score(wanted.name, data, held_out)
    if not wanted.asked and held_out is not None:
        known = held_out if isinstance(held_out, tuple) else (data.logits, data.id_logit, data.features)
        _check_rounding(detector, known)
    return ShippedScore(detector.name, wanted.evidence, detector, _record(source, data, detector) | by_negatives)


class _Folded:
    """A source whose images for thresholds were trained on."""

    def __init__(self, source: Source, folds: Folds, say: Say):
        self._source, self._folds, self._say = source, folds, say
        self._found: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {}

    @cached_property
    def data(self) -> FitData:
        """What detectors are fitted on, read once."""
        return fit_data(self._source, self._say)

    def parts(self, score: str) -> tuple[dict[str, Array], dict[str, Array]]:
        """`out_of_fold_parts` of a score, once."""
        if score not in self._found:
            self._found[score] = out_of_fold_parts(score_parts(score), self.data, self._folds)
        return self._found[score]

    def of(self, shipped: ShippedScore) -> OutOfFold:
        """Of the images for thresholds."""
        data, state, n = self.data, shipped.detector, len(self._folds.images)
        parts, outputs = self.parts(shipped.name)[0], (data.logits[:n], data.id_logit[:n], data.features[:n])
        if state is None:
            new, now = parts[shipped.name], held_out_scores((shipped.name,), {}, outputs)[shipped.name]
        else:
            new = state.add(parts) if isinstance(state, ScoreSum) else parts[shipped.name]
            now = state.score(outputs[2], *outputs[:2])
        thresholds = self._source.images.thresholds
        assert thresholds is not None
        rows = self._folds.rows(thresholds.indices)
        labels = thresholds.source.labels[thresholds.indices]
        return OutOfFold(self._folds.logits(data.features[rows], rows), labels, (new - now)[rows])

    def expected(self, score: str) -> dict[str, Any]:
        """The record for the spec, which is told too; empty where there are too few images for it."""
        try:
            found = expectation(score, self.data, self._folds, self._source.model.classes, self.parts(score))
        except UsageError as error:
            self._say(f"what to expect of new classes is not known: {error}")
            return {}
        for line in expectation_lines(found):
            self._say(line)
        return found


def _expected_beside_branch(source: Source, score: str, say: Say) -> dict[str, Any]:
    """What `_Folded.expected` gives, of a run that taught a branch: by its backbone, which has learnt no class.

    Empty where there is no branch, where too few classes would be left, where the training data is not at hand, or
    where there are too few images.
    """
    if source.run is None or source.tuned != "branch" or len(source.model.classes) < 3:
        return {}
    try:
        taught = TaughtImages.of(source.run, "the export is complete without it", EXPECTED_BY)
        found = taught.expect(score)
    except (UsageError, ImageError) as error:
        say(f"what to expect of new classes is not known: {error}")
        return {}
    for line in (*expectation_lines(found), WITHOUT_BRANCH):
        say(line)
    return {key: found[key] for key in ("new_class", "disturbed", "without_branch")}


def _check_rounding(score: FittedScore, known: Outputs) -> None:
    """Raises UsageError where verification would refuse what nobody asked for."""
    logits, _, features = known
    for detector in [score] if isinstance(score, Detector) else score.detectors.values():
        if lost_to_rounding(detector, features, logits) > MOST_ROUNDING:
            raise UsageError("fp32 does not hold it, because the features hardly vary within the classes")


def _held_out(source: Source, say: Say) -> Outputs | None:
    """What the network says of held-out images that no threshold is fitted to; None where none can be read."""
    choices = source.images.choices
    if choices is None:
        return None
    drawn = np.random.default_rng(0).permutation(choices.indices)[:HELD_OUT_IMAGES]
    return eager_outputs(source.model, choices, say, np.sort(drawn))


def _chosen(source: Source, data: FitData, say: Say, brief: bool) -> ShippedScore:
    """The score that "auto" chooses."""
    choices = source.images.choices
    assert choices is not None
    chosen, candidate, figures = choose(source, choices, data, say, brief)
    for message in choices.unreadable:
        say(f"left out: {message}")
    evidence = f"auto: the least regret over kinds of images made from {figures['known']}, within the cost allowed"
    record = {} if candidate is None else _record(source, data, candidate)
    return ShippedScore(chosen, evidence, candidate, record, figures)


def _record(source: Source, data: FitData, detector: FittedScore) -> dict[str, Any]:
    """What the spec says of the images that a state was fitted on."""
    training, choices = source.images.training, source.images.choices
    assert training is not None
    record = {"data": training.description, "images": len(data.features), "settings": detector.settings}
    if source.tuned:
        record |= {"images": len(data.features) // 2, "disturbed_copies": len(data.features) // 2}
    if isinstance(detector, ScoreSum) and choices and source.folds is None:
        record["held_out"] = choices.description
    return record


def same_weights(source: Source, spec: Spec) -> bool:
    """Whether an export is of the model that a source is."""
    model = source.model
    return (spec.backbone, spec.classes, spec.preprocess, spec.trained) == (
        model.backbone_name,
        model.classes,
        model.preprocess,
        source.trained,
    ) and all(spec.source.get(key) == value for key, value in without_names(source.facts).items())


def _kept(source: Source, earlier: Export, say: Say) -> ShippedScore | None:
    """The score of an export of the same weights as it is; None if its state is lost, or of other images than now."""
    spec, images, state = earlier.spec, source.images, None
    name, evidence = spec.score_name, spec.score["evidence"]
    if spec.detector or spec.choice:
        fitted_on, chosen_on = (part and part.description for part in (images.training, images.choices))
        if source.folds is not None and str(spec.choice.get("known", "")).endswith(OUT_OF_FOLD):
            chosen_on = f"{images.thresholds and images.thresholds.description}{OUT_OF_FOLD}"
        known = spec.choice.get("known", spec.detector.get("held_out", chosen_on))
        if spec.detector.get("data", fitted_on) != fitted_on or known != chosen_on:
            say(f"'{earlier.folder}' ships {name}, of other images: it is made anew")
            return None
        try:
            state = earlier.score_state(source.model.classifier.in_features)
        except ArtifactError as error:
            say(f"{error}: it is made anew")
            return None
    if evidence != DEFAULT_EVIDENCE:
        say(f"score {name}, as in the export that is there; another with --score")
    record = {key: value for key, value in spec.detector.items() if key != "sha256"}
    return ShippedScore(name, evidence, state, record, spec.choice)


def fit_data(source: Source, say: Say) -> FitData:
    """The features of a seeded choice of training images, through the deployment preprocessing.

    Where the network's features are published ones, or tuned from there, a disturbed copy of each image counts too:
    known photos of a worse camera are then no surprise.

    Raises:
        UsageError: too few of them can be read.
    """
    model, training = source.model, source.images.training
    assert training is not None
    chosen = np.sort(np.random.default_rng(0).permutation(training.indices)[:FIT_IMAGES])
    copies = " and a disturbed copy of each" if source.tuned else ""
    say(f"fitting on the features of {len(chosen)} images of {training.description}{copies}")
    with image_bar("fitting", len(chosen)) as advance:
        features, found = (_kept_features if source.tuned else _read_features)(source, training, chosen, advance)
    for message in training.unreadable:
        say(f"left out: {message}")
    if source.folds is not None and len(found) < 2 * len(chosen):
        raise UsageError(f"not all images of {training.description}, which thresholds come from, can be read any more")
    if source.folds is None and len(found) < LEAST_IMAGES * (2 if source.tuned else 1):
        raise UsageError(f"fewer than {LEAST_IMAGES} images of {training.description} can be read")
    known = model_labels(found, training.source.classes, model.classes)
    return fitting_data(model, features, known, source.tuned)


def _read_features(source: Source, training: Subset, chosen: Indices, advance: Advance) -> tuple[Array, Indices]:
    """Features [n, Dall] and labels [n] of the images that can be read, and of tuned runs of a copy of each, after."""
    empty = np.empty((0, source.model.classifier.in_features), np.float32)
    found, parts = [chosen[:0]], [[empty], [empty]] if source.tuned else [[empty]]
    for images, labels in training.batches(source.model.preprocess, chosen):
        found.append(labels)
        for part, version in zip(parts, (images, np.stack([*map(seeded_copy, images)])), strict=False):
            part.append(run_eager(source.model, version)[2])
        advance(len(images))
    return np.concatenate([z for part in parts for z in part]), np.tile(np.concatenate(found), len(parts))


def _kept_features(source: Source, training: Subset, chosen: Indices, advance: Advance) -> tuple[Array, Indices]:
    """The same from where `train --tune` keeps them, if it does."""
    both = kept_features(source.model, training.source, real_path(source.folder).parent)
    if both is None:
        return _read_features(source, training, chosen, advance)
    advance(len(chosen))
    return np.concatenate([both.plain[chosen], both.disturbed[chosen]]), np.tile(training.source.labels[chosen], 2)
