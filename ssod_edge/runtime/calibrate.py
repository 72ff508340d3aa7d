"""An artifact's threshold, from its own scores on in-distribution images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssod_edge.data.pixels import ImageLike
from ssod_edge.detect.metrics import conformal_threshold
from ssod_edge.errors import UsageError
from ssod_edge.runtime.predict import Predictor
from ssod_edge.runtime.runner import Runner
from ssod_edge.runtime.verify import check_passed, record, verify_runner
from ssod_edge.spec import Artifact, Threshold


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
        unreadable: takes the message of each image that cannot be read, and so is left out.

    Raises:
        UsageError: untrained weights, or too few images for `target_tpr` (fewer than 19 at 95%).
    """
    if not runner.spec.trained:
        raise UsageError("untrained weights have no threshold: their scores mean nothing. Train a model and export it.")
    scores: list[float] = []
    for verdict in Predictor(runner).predict_many(images):
        if verdict.ood_score is not None:
            scores.append(verdict.ood_score)
        elif unreadable is not None:
            unreadable(str(verdict.error))
    if not scores:
        raise UsageError(f"none of the in-distribution images could be read: {data or 'no images were given'}")
    return conformal_threshold(scores, target_tpr, data)


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
    threshold = fit_threshold(runner, images, target_tpr, data, unreadable)
    verification = verify_runner(runner, folder, threshold.value)
    check_passed(runner.artifact, verification)
    artifact = replace(runner.artifact, threshold=threshold, verification=verification.to_dict())
    record(folder, artifact)
    runner.artifact = artifact
    return artifact


def trained_on(data: str) -> UsageError:
    """The error for training data where no run folder says which of its images were held out."""
    return UsageError(
        f"the model was trained on '{data}', and which of its images were held out says only its run folder. Name "
        "images that it was not trained on, or calibrate the export inside that folder: ssod-edge calibrate RUN --id"
    )
