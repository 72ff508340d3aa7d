"""An artifact's threshold, from its own scores on in-distribution images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ssod_edge.errors import UsageError
from ssod_edge.runtime.runner import Array, Runner
from ssod_edge.runtime.verify import check_passed, record, verify_runner
from ssod_edge.spec import Artifact, Threshold


def collect_scores(runner: Runner, batches: Iterable[Array]) -> Array:
    """`ood_score` float32 [n] of all images in `batches` (uint8 [N, 3, S, S] each), in their order."""
    parts = [runner.infer({"image": batch})["ood_score"] for batch in batches]
    if not parts:
        return np.empty(0, np.float32)
    scores: Array = np.concatenate(parts)
    return scores


def fit_threshold(runner: Runner, batches: Iterable[Array], target_tpr: float = 0.95, data: str = "") -> Threshold:
    """The conformal threshold that keeps `target_tpr` of in-distribution images known.

    Args:
        runner: the open artifact whose threshold it will be; another artifact's scores differ.
        batches: in-distribution images that were not trained on, as uint8 [N, 3, S, S] arrays.
        target_tpr: in (0, 1).
        data: what the images are, for the record.

    Raises:
        UsageError: untrained weights, or too few images for `target_tpr` (19 at 95%).
    """
    from ssod_edge.metrics import conformal_threshold

    if not runner.spec.trained:
        raise UsageError("untrained weights have no threshold. Train and export a model first.")
    return conformal_threshold(collect_scores(runner, batches), target_tpr, data)


def calibrate(
    runner: Runner, folder: str | Path, batches: Iterable[Array], target_tpr: float = 0.95, data: str = ""
) -> Artifact:
    """Fit an artifact's threshold, verify the artifact at it, and write both to `ssod.json` in one rename.

    Returns:
        the artifact as it is now recorded.

    Raises:
        UsageError: see `fit_threshold`.
        VerificationError: too many reference images change sides at the new threshold; nothing is written.
        OutputError: the folder cannot be written.
    """
    threshold = fit_threshold(runner, batches, target_tpr, data)
    verification = verify_runner(runner, folder, threshold.value)
    check_passed(runner.artifact, verification)
    artifact = replace(runner.artifact, threshold=threshold, verification=verification.to_dict())
    record(folder, artifact)
    runner.artifact = artifact
    return artifact
