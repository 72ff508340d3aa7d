"""An artifact's threshold, from its own scores on in-distribution images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ssod_edge.errors import UsageError
from ssod_edge.metrics import conformal_threshold
from ssod_edge.runtime.runner import Array, Runner
from ssod_edge.runtime.verify import BATCH, check_passed, record, verify_runner
from ssod_edge.spec import Artifact, Threshold


def fit_threshold(
    runner: Runner, images: Array | Iterable[Array], target_tpr: float = 0.95, data: str = ""
) -> Threshold:
    """The conformal threshold that keeps `target_tpr` of in-distribution images known.

    Args:
        runner: the open artifact whose threshold it will be; another artifact's scores differ.
        images: in-distribution images that were not trained on: uint8 [n, 3, S, S], or batches of that shape.
        target_tpr: in (0, 1).
        data: which images these are, for the record.

    Raises:
        UsageError: untrained weights, or too few images for `target_tpr` (fewer than 19 at 95%).
    """
    _require_trained(runner)
    batches = _batches(images) if isinstance(images, np.ndarray) else images
    scores = [runner.infer({"image": batch})["ood_score"] for batch in batches]
    if not scores:
        raise UsageError("no in-distribution images were given to fit a threshold to")
    return conformal_threshold(np.concatenate(scores), target_tpr, data)


def _batches(images: Array) -> Iterator[Array]:
    return (images[start : start + BATCH] for start in range(0, len(images), BATCH))


def calibrate(
    runner: Runner, folder: str | Path, scores: npt.ArrayLike, target_tpr: float = 0.95, data: str = ""
) -> Artifact:
    """Set an artifact's threshold: fit it, verify the artifact at it, and write both to `ssod.json` in one rename.

    Args:
        runner: the open artifact.
        folder: its export folder.
        scores: [n], `ood_score` that this artifact gave to in-distribution images that were not trained on.
        target_tpr, data: as for `fit_threshold`.

    Returns:
        the artifact as it is now recorded; the runner carries it too.

    Raises:
        UsageError: see `fit_threshold`.
        VerificationError: the artifact is out of tolerance at the new threshold; nothing is written.
        OutputError: the folder cannot be written.
    """
    _require_trained(runner)
    threshold = conformal_threshold(scores, target_tpr, data)
    verification = verify_runner(runner, folder, threshold.value)
    check_passed(runner.artifact, verification)
    artifact = replace(runner.artifact, threshold=threshold, verification=verification.to_dict())
    record(folder, artifact)
    runner.artifact = artifact
    return artifact


def _require_trained(runner: Runner) -> None:
    if not runner.spec.trained:
        raise UsageError("untrained weights have no threshold: their scores mean nothing. Train a model and export it.")
