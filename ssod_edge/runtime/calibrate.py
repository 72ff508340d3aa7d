"""Thresholds from an artifact's own scores on in-distribution images, and the command that refits an export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ssod_edge.data.inputs import known_images
from ssod_edge.data.jpeg import tells_damage
from ssod_edge.data.layout import is_training_part
from ssod_edge.data.pixels import ImageLike
from ssod_edge.detect.metrics import check_target_tpr, conformal_threshold, tpr_interval
from ssod_edge.errors import (
    EXIT_OK,
    EXIT_SOME_FAILED,
    ArtifactError,
    EngineError,
    ImageError,
    MissingExtraError,
    UsageError,
    VerificationError,
)
from ssod_edge.files import check_output, same_data
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import Predictor
from ssod_edge.runtime.runner import Runner
from ssod_edge.runtime.verify import check_passed, record, verify_runner
from ssod_edge.spec import SPEC_NAME, Artifact, Spec, Threshold
from ssod_edge.terminal import tell

#: Draws the images afresh for each artifact, and takes the message of each one that cannot be read.
Draw = Callable[[Callable[[str], Any]], Iterator[ImageLike]]


def fit_threshold(
    runner: Runner,
    images: Iterable[ImageLike],
    target_tpr: float = 0.95,
    data: str = "",
    unreadable: Callable[[str], Any] | None = None,
) -> Threshold:
    """The conformal threshold that keeps `target_tpr` of in-distribution images known.

    Args:
        runner: the open artifact whose threshold it will be; another artifact's scores differ.
        images: in-distribution images that were not trained on: what `Predictor.predict` takes.
        target_tpr: in (0, 1).
        data: which images these are, for the record.
        unreadable: takes the message of each image that cannot be read or is damaged, and so is left out.

    Raises:
        UsageError: untrained weights, or too few images for `target_tpr` (fewer than 19 at 95%).
    """
    return conformal_threshold(known_scores(runner, images, data, unreadable), target_tpr, data)


def known_scores(
    runner: Runner, images: Iterable[ImageLike], data: str = "", unreadable: Callable[[str], Any] | None = None
) -> list[float]:
    """The OOD score of each image that can be read; arguments and errors as for `fit_threshold`."""
    _require_trained(runner.spec)
    scores: list[float] = []
    failed: list[str] = []
    for verdict in Predictor(runner, strict_images=tells_damage()).predict_many(images):
        if verdict.ood_score is not None:
            scores.append(verdict.ood_score)
            continue
        failed.append(str(verdict.error))
        if unreadable is not None:
            unreadable(failed[-1])
    if not scores:
        why = f" ({failed[0]})" if failed else ""
        raise UsageError(f"none of the in-distribution images could be read: {data or 'no images were given'}{why}")
    return scores


def calibrate(
    runner: Runner,
    folder: str | Path,
    images: Iterable[ImageLike],
    target_tpr: float = 0.95,
    data: str = "",
    unreadable: Callable[[str], Any] | None = None,
) -> Artifact:
    """Fit an artifact's threshold, verify the artifact at it, and write both to `ssod.json` in one rename.

    Args:
        runner: the open artifact.
        folder: its export folder.
        images, target_tpr, data, unreadable: as for `fit_threshold`.

    Returns:
        the artifact as it is now recorded; the runner carries it too.

    Raises:
        UsageError: see `fit_threshold`.
        VerificationError: the artifact is out of tolerance at the new threshold; nothing is written.
        OutputError: the folder cannot be written.
    """
    return _set_threshold(runner, folder, fit_threshold(runner, images, target_tpr, data, unreadable))


def _set_threshold(runner: Runner, folder: str | Path, threshold: Threshold) -> Artifact:
    """Verify an artifact at a threshold and write both; see `calibrate`."""
    verification = verify_runner(runner, folder, threshold.value)
    check_passed(runner.artifact, verification)
    artifact = replace(runner.artifact, threshold=threshold, verification=verification.to_dict())
    record(folder, artifact)
    runner.artifact = artifact
    return artifact


def trained_on(data: str) -> UsageError:
    """The error for training data where no run folder says which of its images were held out."""
    return UsageError(
        f"the model was trained on '{data}', and only its run folder says which of these images were held out. Name "
        "images that it was not trained on, or calibrate the export inside that folder: ssod-edge calibrate RUN --id"
    )


def trained_part(data: str) -> UsageError:
    """The error for the train part of the data that a model was trained on."""
    return UsageError(
        f"the model was trained on images of '{data}', and a threshold needs new ones. Name others, or the whole data "
        "set for the run's calibration split"
    )


def taught_with(data: str) -> UsageError:
    """The error for photos of a lesson."""
    return UsageError(f"the model was taught with the photos of '{data}', and a threshold needs new ones. Name others")


def run_calibrate(folder: str, data: str, tpr: float = 0.95, artifact: str | None = None) -> int:
    """Refit the threshold of one artifact, or of every artifact; returns the exit code.

    Each artifact is fitted on its own scores and verified at its new threshold. One that is damaged, cannot run
    here, or fails, keeps its old threshold and is reported.

    Args:
        folder: an export folder, or the run folder that holds it.
        data: a folder of in-distribution images, labelled or not, or what `ssod_edge.data.sources.open_dataset` takes
            (which needs torch). Of the data the run was trained on, the calibration split is taken.
        tpr: share of in-distribution images to keep known, in (0, 1).
        artifact: the name of the only one to calibrate.

    Raises:
        UsageError: untrained weights, no such artifact or data, or too few images.
        OutputError: the export cannot be written to.
    """
    export = Export.at(folder)
    _require_trained(export.spec)
    check_target_tpr(tpr)
    check_output(export.folder / SPEC_NAME)
    targets = export.spec.artifacts if artifact is None else (export.spec.artifact(artifact),)
    draw, description = _id_images(data, export)
    unreadable: dict[str, None] = {}
    code = EXIT_OK
    for target in targets:
        try:
            # Not verified on opening: an old threshold may be what fails, and the new one is verified.
            with open_runner(export.folder, artifact=target.name, verify=False) as runner:
                failed = unreadable.setdefault
                scores = known_scores(runner, draw(failed), description, failed)
                done = _set_threshold(runner, export.folder, conformal_threshold(scores, tpr, description))
        except (ArtifactError, EngineError, MissingExtraError, VerificationError) as error:
            tell(f"{target.name}: not calibrated: {error}", err=True)
            code = max(code, error.exit_code)
            continue
        tell(_line(target, done, scores))
    for message in unreadable:
        tell(f"left out: {message}", err=True)
    return code or (EXIT_SOME_FAILED if unreadable else EXIT_OK)


def _line(before: Artifact, after: Artifact, scores: list[float]) -> str:
    """What became of an artifact; how many of these images its former threshold kept says how far they have shifted."""
    old, was = before.threshold, ""
    new, figures = after.threshold, after.verification
    assert new is not None and figures is not None
    if old is not None:
        kept = sum(score <= old.value for score in scores)
        low, high = tpr_interval(kept, len(scores))
        was = f", before {kept / len(scores):.1%} ({100 * low:.1f}-{100 * high:.1f})"
    return (
        f"{after.name}: threshold {'none' if old is None else f'{old.value:.4f}'} -> {new.value:.4f}, "
        f"keeps {new.fitted_tpr:.1%} of {new.n} images known{was} "
        f"(target {new.target_tpr:.0%}); {figures['decision_flips']} of {figures['n']} reference images change sides "
        "against the trained model"
    )


def _trained_on(data: str, export: Export) -> bool:
    """Whether a folder holds the images of the training, wherever they lie now."""
    source = export.spec.source
    if same_data(data, source.get("data")):
        return True
    if export.run_folder is None:
        return False  # a device: it has no PyTorch to open a data set with, and no splits to keep to
    from ssod_edge.data.sources import open_dataset

    try:
        return open_dataset(data, labelled=False).fingerprint == source.get("data_fingerprint")
    except (UsageError, MissingExtraError):
        return False


def _taught_with(data: str, spec: Spec) -> bool:
    """Whether a data set is the photos of a lesson."""
    lessons = (spec.taught, *(entry["taught"] for entry in spec.lineage))
    return any(same_data(data, lesson.get("data")) for lesson in lessons)


def _id_images(data: str, export: Export) -> tuple[Draw, str]:
    """How to draw the images, and what they are, for the record."""
    if is_training_part(data, export.spec.source.get("data")):
        raise trained_part(data)
    if _taught_with(data, export.spec):
        raise taught_with(data)
    if Path(data).is_dir() and not _trained_on(data, export):
        paths = known_images(data, export.spec.classes, partial(tell, err=True))
        return lambda failed: iter(paths), f"folder '{Path(data).name}', {len(paths)} images"
    from ssod_edge.data.images import whole_dataset
    from ssod_edge.data.sources import model_labels, open_training_data
    from ssod_edge.data.splits import read_splits

    images, facts = whole_dataset(data), export.spec.source
    if images.source.left_out:
        tell(images.source.left_out, err=True)
    labels = model_labels(images.source.labels, images.source.classes, export.spec.classes)
    if (labels >= 0).any() and (labels < 0).any():
        tell(f"left out: {(labels < 0).sum()} of {len(labels)} images, of no class of the model", err=True)
        images = replace(images, indices=images.indices[labels >= 0])
    splits_hash = facts.get("splits_hash")  # none where the weights were trained elsewhere
    if splits_hash and images.source.fingerprint == facts.get("data_fingerprint"):
        if export.run_folder is None:
            raise trained_on(data)
        if facts.get("pooled"):
            raise UsageError(
                f"the model was trained on all images of '{data}', and only an export can set thresholds by them (out "
                f"of fold). {'Teach it' if export.spec.taught else 'Export the run'} again for these, or name new "
                "images"
            )
        source = open_training_data(data, facts.get("val_data"), facts.get("val_fingerprint"))
        splits = read_splits(export.run_folder, source, str(splits_hash))
        known = model_labels(source.labels, source.classes, export.spec.classes) >= 0  # a class may have been forgotten
        calib = splits.calib[known[splits.calib]] if known.any() else splits.calib
        description = f"'{data}', calib split {str(splits_hash)[:12]}"
        images = replace(images, source=source, indices=calib, description=description)

    def draw(failed: Callable[[str], Any]) -> Iterator[ImageLike]:
        for index in images.indices.tolist():
            try:
                yield images.source.picture(index)
            except ImageError as error:
                failed(str(error))

    return draw, images.description


def _require_trained(spec: Spec) -> None:
    if not spec.trained:
        raise UsageError("untrained weights have no threshold: their scores mean nothing. Train a model and export it.")
