"""Sums of OOD scores: each part in units of its own spread over training images, all of them in one graph.

Scores err in different places: the energy on features that are large in a new direction, a distance on objects that
share parts with a class. A sum keeps what either sees. A sum of several is still rows of one Gemm and a few numbers.

The spread is the distance from the median to the 95% quantile. A threshold lies there, and a part with a long tail
among known images would otherwise decide alone which of them are rejected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from ssod_edge.config import DETECTORS, DetectorName, ScoreName, score_parts
from ssod_edge.detect.detectors import Array, Detector, Wide, read_detector, write_detector
from ssod_edge.detect.fit import FitData, fit
from ssod_edge.detect.scores import ood_scores
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.files import write_atomic
from ssod_edge.spec import DETECTOR_NAME, Spec, check_hash


@dataclass(frozen=True)
class ScoreSum:
    """score = sum over parts of scales[part] * score of the part, larger where an image is more likely OOD.

    A part's scale is 1 / its spread over the training images, so that no part is heard more than another.

    Attributes:
        name: the parts' names, joined by "+".
        detectors: name of a part -> its state, for the parts that have one.
        scales: name of a part -> its factor, in the order of `name`.
        settings: of the parts, for the record.
    """

    name: str
    detectors: dict[str, Detector]
    scales: dict[str, float]
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows that it adds to the Gemm that gives the logits."""
        return sum(detector.rows for detector in self.detectors.values())

    @property
    def multiply_adds(self) -> int:
        """Of its matrix products, for one image."""
        return sum(detector.multiply_adds for detector in self.detectors.values())

    def score(self, features: npt.ArrayLike, logits: npt.ArrayLike, id_logit: npt.ArrayLike) -> Array:
        """Score images; [N, D], [N, M] and [N] -> float32 [N]."""
        parts = part_scores(tuple(self.scales), self.detectors, features, logits, id_logit)
        total: Wide = sum(scale * parts[name].astype(np.float64) for name, scale in self.scales.items())  # type: ignore[assignment]
        return total.astype(np.float32)


#: A shipped score with a state.
FittedScore = Detector | ScoreSum


def part_scores(
    names: tuple[str, ...],
    detectors: dict[str, Detector],
    features: npt.ArrayLike,
    logits: npt.ArrayLike,
    id_logit: npt.ArrayLike,
) -> dict[str, Array]:
    """Scores by name, float32 [N] each: of the logits, or of the detector that is given for a name."""
    free = ood_scores(logits, id_logit)
    return {
        name: detectors[name].score(features, logits) if name in detectors else free[cast(ScoreName, name)]
        for name in names
    }


def fit_score(name: str, data: FitData) -> FittedScore:
    """Fit a detector, or a sum of scores, by name.

    Raises:
        UsageError: an unknown name, too few images, or a part that is the same for all of them.
    """
    parts = score_parts(name)
    detectors = {part: fit(cast(DetectorName, part), data) for part in parts if part in DETECTORS}
    return detectors[name] if name in detectors else sum_of(name, detectors, spreads(parts, detectors, data))


def spreads(names: tuple[str, ...], detectors: dict[str, Detector], data: FitData) -> dict[str, float]:
    """The 95% quantile less the median of each score over the images that detectors are fitted on.

    The standard deviation where so many images have the largest score that these are equal.
    """
    parts = part_scores(names, detectors, data.features, data.logits, data.id_logit)
    found = {}
    for name, values in parts.items():
        median, high = np.quantile(values.astype(np.float64), (0.5, 0.95))
        found[name] = float(high - median) or float(np.std(values, dtype=np.float64))
    return found


def sum_of(name: str, detectors: dict[str, Detector], spread: dict[str, float]) -> ScoreSum:
    """The sum of fitted parts.

    Args:
        name: parts joined by "+".
        detectors: at least those of its parts that have a state.
        spread: at least its parts', of `spreads`.
    """
    parts = score_parts(name)
    for part in parts:
        if not spread[part] > 0:
            raise UsageError(f"the score '{part}' is the same for all training images: leave it out of '{name}'")
    chosen = {part: detectors[part] for part in parts if part in DETECTORS}
    scales = {part: 1 / spread[part] for part in parts}
    return ScoreSum(name, chosen, scales, {part: detector.settings for part, detector in chosen.items()})


def save_score(score: FittedScore, path: str | Path) -> Path:
    """Write a fitted score as an .npz file, the same bytes for the same state; `load_score` reads it."""
    if isinstance(score, Detector):
        arrays = write_detector(score)
    else:
        arrays = {"sum": np.array(score.name), "scales": np.array(list(score.scales.values()), np.float64)}
        for part, detector in score.detectors.items():
            arrays |= {f"{part}.{key}": value for key, value in write_detector(detector).items()}
    return write_atomic(path, lambda temporary: np.savez(temporary, **arrays))  # type: ignore[arg-type]


def load_score(path: str | Path) -> FittedScore:
    """Read what `save_score` wrote, without its `settings`, which stand in the spec.

    Raises:
        ArtifactError: it cannot be read, or is no fitted score.
    """
    try:
        # Of a damaged archive the reader may raise anything, zlib's errors among them.
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if "sum" not in arrays:
            return read_detector(arrays)
        name = str(arrays["sum"])
        parts = score_parts(name)
        scales = dict(zip(parts, arrays["scales"].tolist(), strict=True))
        detectors = {
            part: read_detector({key[len(part) + 1 :]: arrays[key] for key in arrays if key.startswith(f"{part}.")})
            for part in parts
            if part in DETECTORS
        }
        if any(part != detector.name for part, detector in detectors.items()):
            raise ValueError("its parts have changed places")
    except Exception as error:
        raise ArtifactError(f"'{path}' is no score of this release ({error}). Export the run again.") from error
    return ScoreSum(name, detectors, scales)


def load_shipped(spec: Spec, export: Path, width: int) -> FittedScore | None:
    """The state of the score that an export ships, which the graphs hold and the eager model needs.

    Args:
        spec: of the export.
        export: its folder.
        width: D, of the model's features.

    Returns:
        None for a score without a state.

    Raises:
        ArtifactError: it was changed, or is of another model.
    """
    if not spec.detector:
        return None
    path = export / DETECTOR_NAME
    check_hash(path, spec.detector["sha256"])
    score = load_score(path)
    parts = [score] if isinstance(score, Detector) else list(score.detectors.values())
    if score.name != spec.score_name or any(part.weight.size and part.weight.shape[1] != width for part in parts):
        raise ArtifactError(f"'{path}' is not the score of this model. Export the run again.")
    return score
