"""A whole export: make every artifact, fit its threshold, prove its numbers, then release all of it or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssod_edge.config import AUTO_SCORE, score_parts
from ssod_edge.data.sources import model_labels
from ssod_edge.detect.confidence import fit_temperature
from ssod_edge.detect.metrics import conformal_threshold
from ssod_edge.detect.sums import save_score
from ssod_edge.errors import UsageError
from ssod_edge.export.engines.artifact import (
    CPU_TARGETS,
    DEFAULT_PRECISIONS,
    PRECISIONS,
    TARGETS,
    check_engines,
    make_artifact,
)
from ssod_edge.export.graph.fp16 import OVERFLOW_LIMIT, HalfReport, to_fp16
from ssod_edge.export.graph.onnx import MADE_WITH, fused_graph, head_rows, make_from
from ssod_edge.export.graph.reference import IMAGES, SYNTHETIC_IMAGES, synthetic_images, write_reference
from ssod_edge.export.graph.score import OutOfFold, ShippedScore, same_weights, ship_score, want_score
from ssod_edge.export.graph.source import Source, from_run, save_run
from ssod_edge.export.graph.stored import store_features
from ssod_edge.export.int8.artifacts import check_int8, int8_artifacts
from ssod_edge.export.release import Say, Targets, release
from ssod_edge.files import sha256_file
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.runner import Runner
from ssod_edge.runtime.verify import Verification
from ssod_edge.spec import (
    DETECTOR_NAME,
    FEATURE_OUTPUTS,
    LOGIT_OUTPUTS,
    REFERENCE_NAME,
    VERDICT_OUTPUTS,
    Artifact,
    Spec,
)
from ssod_edge.terminal import image_bar


@dataclass(frozen=True)
class ExportOptions(Targets):
    """What to make of a model.

    Attributes:
        precisions: of `PRECISIONS`; "int8" is not made unless it is named.
        score: the OOD score that the graph computes, or "auto"; None takes that of an earlier export of the same
            weights in the same place, else the default.
        max_drop: points of top-1, and of AUROC, that int8 may cost on held-out images.
        features: of `ssod_edge.spec.FEATURE_OUTPUTS`: features that the graph gives besides; none takes those of an
            earlier export of the same weights in the same place.
        stored: whether the export keeps the features of its images for `teach`.
        others: see `Targets`.
    """

    precisions: tuple[str, ...] = DEFAULT_PRECISIONS
    score: str | None = None
    max_drop: float = 1.0
    features: tuple[str, ...] = ()
    stored: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.precisions:
            raise UsageError(f"precisions must be some of {', '.join(PRECISIONS)}, got none")
        if self.score not in (None, AUTO_SCORE):
            score_parts(str(self.score))
        if unknown := set(self.features) - set(FEATURE_OUTPUTS):
            raise UsageError(f"features must be some of {', '.join(FEATURE_OUTPUTS)}, got '{min(unknown)}'")
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"max_drop must lie between 0 and 100 points, got {self.max_drop}")


def export_run(
    run: str | Path,
    out: str | Path | None = None,
    precisions: Sequence[str] = DEFAULT_PRECISIONS,
    engines: Sequence[str] = CPU_TARGETS,
    target_tpr: float = 0.95,
    score: str | None = None,
) -> Spec:
    """Export a trained run; see `export_source`.

    Args:
        run: a run folder, or a checkpoint file.
        out: the export folder; None is `export` inside the run folder.
        precisions, engines, target_tpr, score: see `ExportOptions`.
    """
    options = ExportOptions(tuple(precisions), tuple(engines), target_tpr, score=score)
    return export_source(from_run(run), out, options)


def export_source(
    source: Source, out: str | Path | None = None, options: ExportOptions | None = None, say: Say = lambda line: None
) -> Spec:
    """Make, calibrate and verify every artifact, then put the whole folder in its place by a rename.

    Artifacts of an earlier export in that place that are not made again are kept, if they are of the same model.

    Args:
        source: what to export.
        out: the export folder; None is `export` in the source's run folder, which is made if need be.
        options: what to make.
        say: gets a line for each step.

    Returns:
        the spec that was written.

    Raises:
        UsageError: the backbone cannot be exported, or there are too few images for `target_tpr`.
        MissingExtraError: an engine that was asked for is not installed.
        VerificationError: an artifact drifted beyond its tolerance; nothing is released.
        OutputError: the folder cannot be written. In every case an earlier export is unchanged.
    """
    options = options or ExportOptions()
    check_engines(options.engines)
    if "int8" in options.precisions:
        check_int8(source)
    if out is None and source.checkpoint is None and (source.folder / "config.json").exists():
        raise UsageError(f"'{source.folder}' is a training run; name another place with -o/--out, or another --runs")
    place = Path(out) if out is not None else source.folder / "export"
    earlier = Export.in_place(place)
    if not options.features and earlier is not None and same_weights(source, earlier.spec):
        features = tuple(name for name, output in FEATURE_OUTPUTS.items() if output in earlier.spec.outputs)
        if features:
            say(f"features {', '.join(features)}, as in the export that is there")
        options = replace(options, features=features)
    wanted = want_score(source, options.score, earlier, say)
    source = replace(source, images=wanted.divide(source.images, source.folds is not None, say))
    shipped = ship_score(source, wanted, say)
    with release(place, say) as draft:
        spec = _build(source, shipped, draft.folder, options, earlier, say)
        stored = store_features(source, draft.folder, say) if options.stored else {}
        draft.write(replace(spec, features=stored))
        draft.prove(partial(_fit_thresholds, source, shipped.out_of_fold, options.target_tpr, say), together=True)
        if out is None and source.checkpoint is None:
            facts = {**draft.spec.source, "checkpoint_sha256": sha256_file(save_run(source))}
            draft.spec = replace(draft.spec, source=facts)
    return draft.spec


def _build(
    source: Source, shipped: ShippedScore, folder: Path, options: ExportOptions, earlier: Export | None, say: Say
) -> Spec:
    """Write every artifact, the reference and the detector; the spec has neither thresholds nor figures yet."""
    detector = shipped.detector
    make = partial(make_artifact, made_with=MADE_WITH, plans=options.plans, earlier=earlier)
    images, labels = _reference_images(source)
    reference = write_reference(folder / REFERENCE_NAME, source.model, images, labels, detector)
    state = shipped.record
    if detector is not None:
        state = {"sha256": sha256_file(save_score(detector, folder / DETECTOR_NAME)), **state}
    say(f"exporting {source.model.backbone_name} at {source.model.preprocess.input_size} px, score {shipped.name}")
    temperature = _temperature(source, reference, labels, shipped.out_of_fold)
    fp32 = fused_graph(source.model, shipped.name, source.trained, detector, temperature, options.features)
    rows = head_rows(source.model, detector)
    artifacts: list[Artifact] = []
    for precision in options.precisions:
        if precision == "int8":
            artifacts += int8_artifacts(source, fp32, rows, options.engines, options.max_drop, folder, make, say)
            continue
        graph, build = fp32, {}
        if precision == "fp16":
            graph, report = to_fp16(fp32, rows, images)
            build = _overflow_record(report)
            _tell(report, say)
        artifacts += make_from(graph, precision, folder, options.engines, make, build)
    return Spec(
        backbone=source.model.backbone_name,
        classes=source.model.classes,
        preprocess=source.model.preprocess,
        score={"name": shipped.name, "evidence": shipped.evidence},
        trained=source.trained,
        reference_sha256=sha256_file(reference),
        source=source.facts,
        detector=state,
        choice=shipped.choice,
        outputs=(*LOGIT_OUTPUTS, *VERDICT_OUTPUTS, *(FEATURE_OUTPUTS[name] for name in options.features)),
        temperature=temperature,
        expected=shipped.expected,
        artifacts=tuple(sorted(artifacts, key=lambda artifact: TARGETS.index(artifact.engine))),
    )


def _reference_images(source: Source) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The reference's images and labels: calibration images, or noise where there are none."""
    settings, thresholds = source.model.preprocess, source.images.thresholds
    if thresholds is None:
        images = synthetic_images(SYNTHETIC_IMAGES, settings.input_size)
        return images, np.full(len(images), -1, np.int64)
    order = np.random.default_rng(0).permutation(thresholds.indices)
    return thresholds.read(settings, np.sort(order[:IMAGES]))


def _temperature(source: Source, reference: Path, labels: NDArray[np.int64], out_of_fold: OutOfFold | None) -> float:
    """Of `probs`, by the reference's images: they are held out, and the model has seen them anyway; or out of fold."""
    thresholds = source.images.thresholds
    if not source.trained or thresholds is None:
        return 1.0
    if out_of_fold is not None:
        known = model_labels(out_of_fold.labels, thresholds.source.classes, source.model.classes)
        return fit_temperature(out_of_fold.logits, known)
    known = model_labels(labels, thresholds.source.classes, source.model.classes)
    with np.load(reference) as file:
        return fit_temperature(file["logits"], known)


def _overflow_record(report: HalfReport) -> dict[str, Any]:
    """What the spec says about overflow: the range that was measured, and the nodes that stay fp32 because of it.

    None stands for infinity, which JSON has not.
    """
    finite = {node: value if np.isfinite(value) else None for node, value in report.overflowing.items()}
    largest = report.largest if np.isfinite(report.largest) else None
    return {"overflow": {"images": report.images, "largest": largest, "limit": OVERFLOW_LIMIT, "fp32_nodes": finite}}


def _tell(report: HalfReport, say: Say) -> None:
    line = f"fp16: {report.weights} weights, largest error {report.max_abs_error:.2g}"
    for count, what in ((report.clipped, "clipped to 65504"), (report.flushed, "rounded to 0")):
        line += f", {count} {what}" if count else ""
    say(line)
    limit = f"{OVERFLOW_LIMIT:.0f}, half of fp16's range"
    for name, largest in report.overflowing.items():
        say(f"fp16: node '{name}' reaches {largest:.3g} on {report.images} images: beyond {limit}, so it stays in fp32")


def _fit_thresholds(
    source: Source, out_of_fold: OutOfFold | None, target_tpr: float, say: Say, runners: Sequence[Runner]
) -> Mapping[str, Verification]:
    """One pass over the calibration images, which every runner sees; each runner's artifact gets its threshold.

    Where the model was fitted on them, each score is changed to what it is out of fold.
    """
    calibration = source.images.thresholds
    if not runners or not source.trained or calibration is None:
        return {}
    say(f"fitting thresholds on {len(calibration)} images of {calibration.description}")
    scores: list[list[np.ndarray]] = [[] for _ in runners]
    with image_bar("calibrating", len(calibration)) as advance:
        for images, _ in calibration.batches(source.model.preprocess):
            for runner, found in zip(runners, scores, strict=True):
                found.append(runner.infer({"image": images})["ood_score"])
            advance(len(images))
    for message in calibration.unreadable:
        say(f"left out: {message}")
    for runner, found in zip(runners, scores, strict=True):
        values = np.concatenate(found) if found else np.empty(0, np.float32)
        if out_of_fold is not None:
            if len(values) < len(calibration):
                raise UsageError(f"not all images of {calibration.description} can be read any more")
            values = values + out_of_fold.change
        threshold = conformal_threshold(values, target_tpr, calibration.description)
        runner.artifact = replace(runner.artifact, threshold=threshold)
    return {}
