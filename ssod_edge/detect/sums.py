"""Sums of OOD scores: each part in units of its own deviation over known images, all of them in one graph.

Scores err in different places: the entropy on far images that a network is sure of, a distance on objects that share
parts with a class. A sum keeps what either sees. A sum of several is still rows of one Gemm and a few numbers.

A network is often surer of a far image than of known ones, and a plain sum lets that buy back what the distance found.
So a part that speaks for "known" counts next to nothing: each is sent through a softplus before the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from ssod_edge.config import DETECTORS, DetectorName, ScoreName, score_parts
from ssod_edge.detect.detectors import Array, Detector, read_detector, write_detector
from ssod_edge.detect.fit import FitData, fit
from ssod_edge.detect.scores import ood_scores
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.files import write_atomic
from ssod_edge.spec import DETECTOR_NAME, Spec, check_hash

#: What a network says of n images: logits [n, M], id_logit [n] and features [n, D], all float32.
Outputs = tuple[Array, ...]

#: How sharply a part turns from "counts nothing" to "counts as it is", around the mean of known images.
SHARPNESS = 3.0
#: Fewer held-out images give no mean and deviation. Those of so few are off by a quarter, those of images that the
#: network was trained on by far more where it was taught with few: it is too sure of them.
LEAST_HELD_OUT = 8


@dataclass(frozen=True)
class ScoreSum:
    """score = sum over parts of softplus(3 t) / 3 with t = scales[part] * (score of the part - centers[part]).

    Larger where an image is more likely OOD. A part's center is its mean over known images, its scale 1 / its standard
    deviation, so that no part is heard more than another.

    Attributes:
        name: the parts' names, joined by "+".
        detectors: name of a part -> its state, for the parts that have one.
        scales: name of a part -> its factor, in the order of `name`.
        settings: of the parts, for the record.
        centers: name of a part -> what is taken off it; none in sums of earlier releases, which are the plain
            sum over parts of scales[part] * score of the part.
    """

    name: str
    detectors: dict[str, Detector]
    scales: dict[str, float]
    settings: dict[str, object] = field(default_factory=dict)
    centers: dict[str, float] = field(default_factory=dict)

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
        return self.add(parts)

    def add(self, parts: Mapping[str, Array]) -> Array:
        """The sum of the scores of its parts, float32 [N] each, and others beside them."""
        total = np.zeros(len(parts[next(iter(self.scales))]))
        for name, scale in self.scales.items():
            part = scale * (parts[name].astype(np.float64) - self.centers.get(name, 0.0))
            total += np.logaddexp(0, SHARPNESS * part) / SHARPNESS if self.centers else part
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


def fit_score(name: str, data: FitData, held_out: Outputs | Mapping[str, Array] | None = None) -> FittedScore:
    """Fit a detector, or a sum of scores, by name.

    Args:
        name: see `ssod_edge.config.score_parts`.
        data: what detectors are fitted on.
        held_out: what the network says of other known images, which parts of a sum are standardised by, or the scores
            of its parts, out of fold. Without `LEAST_HELD_OUT` of them, the fit's images are, by detectors that are
            fitted on the other half of them.

    Raises:
        UsageError: an unknown name, too few images, or a part that is the same for all of them.
    """
    parts = score_parts(name)
    detectors = {part: fit(cast(DetectorName, part), data) for part in parts if part in DETECTORS}
    if name in detectors:
        return detectors[name]
    if isinstance(held_out, Mapping):
        return sum_of(name, detectors, standards(held_out))
    if held_out is not None and len(held_out[0]) >= LEAST_HELD_OUT:
        return sum_of(name, detectors, standards(held_out_scores(parts, detectors, held_out)))
    return sum_of(name, detectors, standards(_by_halves(parts, data)))


def held_out_scores(names: tuple[str, ...], detectors: dict[str, Detector], outputs: Outputs) -> dict[str, Array]:
    """`part_scores` of what a network says of images."""
    logits, id_logit, features = outputs
    return part_scores(names, detectors, features, logits, id_logit)


def _by_halves(names: tuple[str, ...], data: FitData) -> dict[str, Array]:
    """Scores of the images that detectors are fitted on, each by detectors that were fitted on the other half.

    A distance is smaller to images that it was fitted on, by far where there are few. Classes are halved alike.
    """
    order = np.argsort(data.classes(), kind="stable")
    found: dict[str, list[Array]] = {name: [] for name in names}
    for known, others in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        half = data.of(others)
        detectors = {name: fit(cast(DetectorName, name), half) for name in names if name in DETECTORS}
        outputs = data.logits[known], data.id_logit[known], data.features[known]
        for name, values in held_out_scores(names, detectors, outputs).items():
            found[name].append(values)
    return {name: np.concatenate(values) for name, values in found.items()}


def standards(scores: Mapping[str, Array]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each score, float32 [n], over known images."""
    wide = {name: values.astype(np.float64) for name, values in scores.items()}
    return {name: (float(values.mean()), float(values.std())) for name, values in wide.items()}


def sum_of(name: str, detectors: dict[str, Detector], known: Mapping[str, tuple[float, float]]) -> ScoreSum:
    """The one-sided sum of fitted parts.

    Args:
        name: parts joined by "+".
        detectors: at least those of its parts that have a state; none for a sum that only `ScoreSum.add` is asked of.
        known: at least its parts', of `standards`.
    """
    parts = score_parts(name)
    for part in parts:
        if not known[part][1] > 0:
            raise UsageError(f"the score '{part}' is the same for all known images: leave it out of '{name}'")
    chosen = {part: detectors[part] for part in parts if part in DETECTORS} if detectors else {}
    settings: dict[str, object] = {part: detector.settings for part, detector in chosen.items()}
    scales, centers = {part: 1 / known[part][1] for part in parts}, {part: known[part][0] for part in parts}
    return ScoreSum(name, chosen, scales, settings, centers)


def save_score(score: FittedScore, path: str | Path) -> Path:
    """Write a fitted score as an .npz file, the same bytes for the same state; `load_score` reads it."""
    if isinstance(score, Detector):
        arrays = write_detector(score)
    else:
        arrays = {"sum": np.array(score.name), "scales": np.array(list(score.scales.values()), np.float64)}
        if score.centers:
            arrays["centers"] = np.array(list(score.centers.values()), np.float64)
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
        centers = dict(zip(parts, arrays["centers"].tolist(), strict=True)) if "centers" in arrays else {}
        detectors = {
            part: read_detector({key[len(part) + 1 :]: arrays[key] for key in arrays if key.startswith(f"{part}.")})
            for part in parts
            if part in DETECTORS
        }
        if any(part != detector.name for part, detector in detectors.items()):
            raise ValueError("its parts have changed places")
    except Exception as error:
        raise ArtifactError(f"'{path}' is no score of this release ({error}). Export the run again.") from error
    return ScoreSum(name, detectors, scales, centers=centers)


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
