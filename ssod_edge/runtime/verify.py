"""Does an artifact still say what the trained model said? Its numbers against `reference.npz`, without torch."""

from __future__ import annotations

import logging
import math
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.config import has_state
from ssod_edge.detect.confidence import p_known, verdict_inputs
from ssod_edge.detect.scores import probabilities
from ssod_edge.errors import ArtifactError, OutputError, VerificationError
from ssod_edge.files import exclusive, real_path
from ssod_edge.runtime.runner import Array, Runner
from ssod_edge.spec import REFERENCE_NAME, Artifact, Spec, check_hash, load_spec, save_spec

BATCH = 8


@dataclass(frozen=True)
class Tolerance:
    """How far an artifact may drift from the fp32 model.

    Attributes:
        logit: bound on |delta logit| (class logits and ID logit) over 1 + max |reference logit|: the worst image.
        noise: bound on `Verification.relative_logit_error`: all images together. Not for untrained weights in reduced
            precision.
        prob: bound on |probs - softmax(the artifact's own logits)|.
        class_agreement: least share of images whose class is the reference's.
        flip_share: largest share of images that cross the threshold, besides the one whose score it is.

    One image may always change class or side: a conformal threshold is itself the score of one image, which any
    rounding moves across it.
    """

    logit: float
    noise: float
    prob: float
    class_agreement: float
    flip_share: float


#: By the artifact's precision, with the reasons:
#: fp32 - the same arithmetic in another order; fused and reordered sums drift by about 1e-6 of the largest logit
#:   per layer, and 1e-3 leaves room for hundreds of layers. Any class that changes was a tie: at most 1 in 100.
#: fp16 - 11 bits of mantissa lose 5e-4 in each layer, and the losses add like a random walk over some hundred
#:   layers: about 1e-2. The head, the softmax and the scores stay fp32, so only near-ties change class or side.
#: int8 - 256 steps lose up to 0.4% of the range in each layer, a hundred times what fp16 loses, so a single logit says
#:   little. What int8 costs in accuracy was measured and bounded when it was quantised; here the bounds tell that cost
#:   from an engine that computes something else. Four trained int8 artifacts (MobileNetV3-Large, RegNetY-800MF twice,
#:   EfficientNet-Lite0) had a noise of 0.04 to 0.11, a largest difference of 0.09 to 0.15 and an agreement of 0.98 up;
#:   answers that have nothing to do with the image have a noise of 1 or more. The softmax is fp32, as exact as in fp32.
TOLERANCES = {
    "fp32": Tolerance(logit=1e-3, noise=1e-3, prob=1e-4, class_agreement=0.99, flip_share=0.01),
    "fp16": Tolerance(logit=2e-2, noise=2e-2, prob=5e-3, class_agreement=0.99, flip_share=0.02),
    "int8": Tolerance(logit=0.5, noise=0.25, prob=1e-4, class_agreement=0.9, flip_share=0.1),
}

#: No score moves by more than this many times the largest logit shift: msp is a difference of two terms that each
#: move by one shift, posterior adds the ID logit's.
SCORE_FACTOR = 3.0
#: A detector's score has a scale of its own: its bound is the same share of the spread that it has over the reference
#: images, which is what a threshold has to tell apart. The sums of fp32 lose so much of its magnitude besides.
SUM_ROUNDING = 1e-5
ROUNDING = 1e-12
#: Of `p_known`, which is taken out of a table.
P_ROUNDING = 1e-6
#: Instead of 0, to divide by.
TINY = 1e-300


@dataclass(frozen=True)
class Verification:
    """Figures of one artifact on the reference images. Differences are absolute; shares are in [0, 1].

    Attributes:
        n: reference images.
        precision: what really ran, see `Runner.precision`.
        device: where it ran.
        max_abs_logit_diff, mean_abs_logit_diff: over the class logits.
        max_abs_id_logit_diff: over the ID logit.
        relative_logit_error: sqrt(sum of squared differences / sum of squared reference values), over the class logits
            and ID logits of all images: 0 is exact, 1 what an engine scores that answers 0, and 1.4 one whose answers
            have nothing to do with the model.
        max_abs_prob_diff: `probs` against the softmax of the artifact's own logits over the temperature.
        class_agreement: share of images with the reference's class.
        max_abs_score_diff: `ood_score` against the reference's score of that name.
        decision_flips: images that cross the threshold; None without one.
        decision_flip_share: the same over n.
        verdict_errors: images whose `known` or `p_known` is not what its own `ood_score` and threshold say; 0 where the
            graph has no such outputs.
        logit_tolerance: the bound on the logit differences.
        score_tolerance: the bound on the score's: `SCORE_FACTOR` times that of the logits; for a detector, that share
            of the spread of its scores.
        tolerance: the precision's `Tolerance`.
        failures: the bounds that were broken, as sentences; empty if it passed.
    """

    n: int
    precision: str
    device: str
    max_abs_logit_diff: float
    mean_abs_logit_diff: float
    max_abs_id_logit_diff: float
    relative_logit_error: float
    max_abs_prob_diff: float
    class_agreement: float
    max_abs_score_diff: float
    decision_flips: int | None
    decision_flip_share: float | None
    verdict_errors: int
    logit_tolerance: float
    score_tolerance: float
    tolerance: dict[str, float]
    failures: tuple[str, ...]
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures, for the spec. A difference that is not finite becomes None."""
        figures = {**asdict(self), "failures": list(self.failures)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}


def verify_runner(runner: Runner, folder: str | Path, threshold: float | None = None) -> Verification:
    """Run an artifact on the reference images and compare; nothing is written.

    Weights that were not trained are judged on their logits alone: with random weights the classes and scores are
    near-ties, which any rounding turns. Their logits are near 0, so the largest difference says little there; the noise
    says more, but in fp32 only: what the image changes in a random network may be smaller than a step of fp16 or int8.

    Args:
        runner: an open artifact.
        folder: its export folder, which holds `reference.npz`.
        threshold: on `ood_score`; None takes the artifact's own, if it has one.

    Raises:
        ArtifactError: the reference is missing, was changed, or does not belong to this export.
    """
    spec, artifact = runner.spec, runner.artifact
    if threshold is None and artifact.threshold is not None:
        threshold = artifact.threshold.value
    reference = load_reference(folder, spec)
    outputs = _run(runner, reference["image"])
    with np.errstate(invalid="ignore"):  # NaN and infinity are counted as failures, not warned of
        return _compare(runner, reference, outputs, threshold)


def load_reference(folder: str | Path, spec: Spec) -> dict[str, Array]:
    """`reference.npz`: image uint8 [n, 3, S, S], logits [n, M], id_logit [n], score_<name> [n] for the spec's score.

    Raises:
        ArtifactError: it is missing, its hash is not the spec's, or an array is missing or has another shape.
    """
    path = Path(folder) / REFERENCE_NAME
    check_hash(path, spec.reference_sha256)
    score, size = f"score_{spec.score_name}", spec.preprocess.input_size
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("image", "logits", "id_logit", score)}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"'{path}' is not a reference of this release ({error}). Export the run again.") from error
    n = len(arrays["image"])
    shapes = {"image": (n, 3, size, size), "logits": (n, len(spec.classes)), "id_logit": (n,), score: (n,)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape or n == 0:
            raise ArtifactError(
                f"'{path}' is of another model: {name} has shape {list(arrays[name].shape)}, expected {list(shape)} "
                "with at least one image. Export the run again."
            )
    return arrays


def _run(runner: Runner, images: Array) -> dict[str, Array]:
    """All outputs for all images: the first alone, the others in batches, because both ways are shipped."""
    starts = [0, *range(1, len(images), BATCH)]
    ends = [*starts[1:], len(images)]
    parts = [runner.infer({"image": images[start:end]}) for start, end in zip(starts, ends, strict=True)]
    return {name: np.concatenate([part[name] for part in parts]) for name in runner.spec.outputs}


def _compare(
    runner: Runner, reference: dict[str, Array], outputs: dict[str, Array], threshold: float | None
) -> Verification:
    spec = runner.spec
    expected, score = reference["logits"].astype(np.float64), reference[f"score_{spec.score_name}"].astype(np.float64)
    logits, ood_score = outputs["logits"].astype(np.float64), outputs["ood_score"].astype(np.float64)
    n = len(expected)
    tolerance = TOLERANCES[runner.artifact.precision]
    scale = logit_scale(reference)
    difference = np.abs(logits - expected)
    id_difference = np.abs(outputs["id_logit"].astype(np.float64) - reference["id_logit"])
    flips = None
    if spec.trained and threshold is not None:
        flips = int(np.count_nonzero((ood_score <= threshold) != (score <= threshold)))
    figures = Verification(
        n=n,
        precision=runner.precision,
        device=runner.device,
        max_abs_logit_diff=float(difference.max()),
        mean_abs_logit_diff=float(difference.mean()),
        max_abs_id_logit_diff=float(id_difference.max()),
        relative_logit_error=_norm(difference, id_difference) / max(_norm(expected, reference["id_logit"]), TINY),
        max_abs_prob_diff=float(np.abs(outputs["probs"] - probabilities(logits / spec.temperature)).max()),
        class_agreement=float((logits.argmax(1) == expected.argmax(1)).mean()),
        max_abs_score_diff=float(np.abs(ood_score - score).max()),
        decision_flips=flips,
        decision_flip_share=None if flips is None else flips / n,
        verdict_errors=_verdict_errors(runner, outputs),
        logit_tolerance=tolerance.logit * scale,
        score_tolerance=score_tolerance(spec.score_name, score, tolerance.logit, scale),
        tolerance=asdict(tolerance),
        failures=(),
        passed=False,
    )
    failures = _failures(figures, runner.artifact.precision, spec.trained)
    return replace(figures, failures=failures, passed=not failures)


def _verdict_errors(runner: Runner, outputs: dict[str, Array]) -> int:
    if "known" not in outputs:
        return 0
    inputs, score = verdict_inputs(runner.artifact.threshold), outputs["ood_score"]
    wrong = outputs["known"] != (score <= inputs["threshold"])
    return int(np.count_nonzero(wrong | (np.abs(outputs["p_known"] - p_known(score, inputs)) > P_ROUNDING)))


def _norm(*arrays: Array) -> float:
    """The root of the sum of all squares."""
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays))


def logit_scale(reference: dict[str, Array]) -> float:
    """What the tolerance of logits is a share of: one more than the largest of the reference."""
    return 1.0 + float(max(np.abs(reference["logits"]).max(), np.abs(reference["id_logit"]).max()))


def score_tolerance(name: str, score: Array, share: float, logit_scale: float = 0.0) -> float:
    """How far an artifact's score may be from the trained model's.

    Args:
        name: of the score.
        score: [n], the trained model's on the images that are compared.
        share: `Tolerance.logit` of the precision.
        logit_scale: what `share` is a share of, for a score of the logits; one with a state has a scale of its own.
    """
    if not has_state(name):
        return SCORE_FACTOR * share * logit_scale
    return SCORE_FACTOR * share * float(np.ptp(score)) + SUM_ROUNDING * float(np.abs(score).max())


def _failures(figures: Verification, precision: str, trained: bool) -> tuple[str, ...]:
    """The broken bounds of an artifact's precision. Each is written as "not within", so that NaN breaks it."""
    tolerance = TOLERANCES[precision]
    bounds: list[tuple[str, float, float]] = [
        ("max_abs_logit_diff", figures.max_abs_logit_diff, figures.logit_tolerance),
        ("max_abs_id_logit_diff", figures.max_abs_id_logit_diff, figures.logit_tolerance),
        ("max_abs_prob_diff", figures.max_abs_prob_diff, tolerance.prob),
        ("verdict_errors", figures.verdict_errors, 0),
    ]
    if trained or precision == "fp32":
        bounds.append(("relative_logit_error", figures.relative_logit_error, tolerance.noise))
    if trained:
        bounds.append(("max_abs_score_diff", figures.max_abs_score_diff, figures.score_tolerance))
        share = max(1 / figures.n, 1 - tolerance.class_agreement)
        bounds.append(("share of changed classes", 1 - figures.class_agreement, share + ROUNDING))
        if figures.decision_flips is not None:
            bounds.append(("decision_flips", figures.decision_flips, 1 + tolerance.flip_share * figures.n))
    found = [f"{name} is {value:.3g}, at most {most:.3g} allowed" for name, value, most in bounds if not value <= most]
    if not trained and not math.isfinite(figures.max_abs_score_diff):
        found.append("max_abs_score_diff is not finite")
    return tuple(found)


def check_passed(artifact: Artifact, verification: Verification) -> None:
    """Raises VerificationError, with the figures, unless the verification passed."""
    if not verification.passed:
        ways = "Use another precision or engine"
        if verification.max_abs_score_diff > verification.score_tolerance:
            ways += ", another score (export --score)"
        if artifact.precision == "int8":
            ways += ", or quantise with other images (export --calib)"
        raise VerificationError(
            f"artifact '{artifact.name}' does not reproduce the trained model on {verification.n} reference images "
            f"({verification.precision} on {verification.device}): {'; '.join(verification.failures)}. "
            f"{ways}, or export the run again."
        )


def require_verified(runner: Runner, folder: str | Path) -> Runner:
    """Let only verified artifacts run.

    One without figures, or with figures from another device or precision than what runs here, is verified now, and
    the figures are written to the spec. In a folder that can't be written that happens each time, with a warning.

    Returns:
        the runner, whose `artifact` carries the figures. It is closed if this raises.

    Raises:
        VerificationError: it fails, or failed where it was built.
        ArtifactError: see `verify_runner`.
    """
    artifact = runner.artifact
    try:
        if artifact.verification is not None:
            recorded = artifact.verification
            if recorded.get("passed") is not True:
                reasons = "; ".join(map(str, recorded.get("failures", ()))) or "no reason recorded"
                raise VerificationError(f"artifact '{artifact.name}' failed verification when it was built: {reasons}")
            if (recorded.get("precision"), recorded.get("device")) == (runner.precision, runner.device):
                return runner
        verification = verify_runner(runner, folder)
        check_passed(artifact, verification)
    except BaseException:
        runner.__exit__(None, None, None)
        raise
    runner.artifact = replace(artifact, verification=verification.to_dict())
    try:
        record(folder, runner.artifact)
    except OutputError as error:
        logging.getLogger("ssod_edge").warning("verified, but not recorded: %s", error)
    return runner


def record(folder: str | Path, artifact: Artifact) -> Spec:
    """Replace one artifact's entry in `ssod.json`, atomically; what other processes write meanwhile stays.

    Raises:
        OutputError: the folder cannot be written.
        UsageError: `ssod.json` is gone.
        ArtifactError: it is damaged.
    """
    with exclusive(real_path(folder).parent):  # the lock that a new export of the folder takes too
        spec = load_spec(folder).with_artifact(artifact)
        save_spec(spec, folder)
    return spec
