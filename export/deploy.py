"""On a device: from a bundle to artifacts of its own engines, each verified. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.data.inputs import known_images, list_images
from ssod_edge.detect.metrics import check_target_tpr
from ssod_edge.errors import UsageError
from ssod_edge.export.bundle import BENCH_NAME, check_bundle, unpack
from ssod_edge.export.engines.artifact import PRECISIONS, check_engines, make_artifact
from ssod_edge.export.release import Say, Targets, release
from ssod_edge.files import real_path, same_data
from ssod_edge.runtime.calibrate import fit_threshold, trained_on
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.runner import Runner
from ssod_edge.runtime.verify import Verification, verify_runner
from ssod_edge.spec import SPEC_NAME, Artifact, Spec, Threshold

#: A threshold is carried over while at most so many reference images change sides at it. One always may: a conformal
#: threshold is itself the score of one image, which any rounding moves across it.
MAX_FLIPS = 1


def deploy(
    bundle: str | Path,
    out: str | Path,
    targets: Targets | None = None,
    data: str | None = None,
    unreadable: Callable[[str], Any] | None = None,
    say: Say = lambda line: None,
) -> Spec:
    """Make and verify the artifacts of a device's engines, then put the whole folder in its place by a rename.

    An artifact that the bundle holds keeps its threshold. One that is made here takes that of the ONNX artifact of its
    precision, if the reference shows that it decides alike: at that threshold at most `MAX_FLIPS` reference images
    change sides against the trained model, and there are images on both sides to show it. The record then says so.
    Otherwise it has none until `calibrate`, or `data`, gives it its own.

    Args:
        bundle: what `ssod_edge.export.bundle.write_bundle` wrote.
        out: the export folder. Artifacts of an earlier export of the same model that are not made again are kept.
        targets: what to make; None makes all that the bundle holds, for the CPU.
        data: a folder of in-distribution images, on whose scores every artifact's threshold is fitted.
        unreadable: takes the message of each of those images that cannot be read.
        say: gets a line for each step.

    Returns:
        the spec that was written.

    Raises:
        UsageError: no such bundle or images, a precision that it does not hold, or too few images for `target_tpr`.
        ArtifactError: the bundle is damaged.
        MissingExtraError: an engine that was asked for is not installed.
        EngineError: an engine cannot run here what it made.
        VerificationError: an artifact drifted beyond its tolerance; nothing is released.
        OutputError: the folder cannot be written. In every case an earlier export is unchanged.
    """
    targets = targets or Targets()
    check_engines(targets.engines)
    check_bundle(bundle)
    _check_images(data, targets.target_tpr)
    with release(Path(out), say) as draft:
        bundled = unpack(bundle, draft.folder)
        if data is not None and bundled.source.get("splits_hash") and same_data(data, bundled.source.get("data")):
            raise trained_on(data)
        say(f"unpacked {bundled.backbone} at {bundled.preprocess.input_size} px, score {bundled.score_name}")
        images = None if data is None else known_images(data, bundled.classes, say)
        make = partial(make_artifact, plans=targets.plans, earlier=Export.in_place(Path(out)))
        draft.write(replace(bundled, artifacts=tuple(_make(bundled, draft.folder, targets, make, say))))

        def fit(runners: Sequence[Runner]) -> Mapping[str, Verification]:
            (runner,) = runners
            if images is None:
                return _take_over(runner, Export(draft.folder, bundled), say)
            say(f"{runner.artifact.name}: fitting its threshold on {len(images)} images")
            description = f"folder '{real_path(str(data)).name}', {len(images)} images"
            threshold = fit_threshold(runner, images, targets.target_tpr, description, unreadable)
            runner.artifact = replace(runner.artifact, threshold=threshold)
            return {}

        draft.prove(fit, together=False)
        _remove_the_rest(draft.spec, draft.folder)
    return draft.spec


def _check_images(data: str | None, target_tpr: float) -> None:
    """Before any work; other data sets than folders are opened with PyTorch."""
    if data is not None and not Path(data).is_dir():
        raise UsageError(
            f"--id with --from takes a folder of in-distribution images, got '{data}', which is not a folder"
        )
    check_target_tpr(target_tpr, None if data is None else len(list_images([data])))


def _make(bundled: Spec, folder: Path, targets: Targets, make: Callable[..., Artifact], say: Say) -> list[Artifact]:
    """Every engine's artifacts: those in the bundle as they are, the others from its ONNX graphs."""
    graphs = _graphs(bundled)
    ready = {(artifact.engine, artifact.precision): artifact for artifact in bundled.artifacts}
    made = []
    for engine in targets.engines:
        for precision in targets.precisions or PRECISIONS:
            if (engine, precision) in ready:
                made.append(ready[engine, precision])
            elif precision in graphs:
                say(f"making {engine} in {precision}")
                graph = graphs[precision]
                new = make(engine, precision, folder / graph.main_file, folder)
                # It remembers how its graph came about.
                versions = {name: version for name, version in graph.versions.items() if name != graph.engine}
                versions, build = {**versions, **new.versions}, {**graph.build, **new.build}
                made.append(replace(new, opset=graph.opset, versions=versions, build=build))
            elif targets.precisions:
                raise UsageError(
                    f"the bundle holds no ONNX graph in {precision}; it has: {', '.join(graphs) or 'none'}. Export it "
                    f"where the model was trained, with: ssod-edge export RUN --target onnx --{precision}"
                )
    if not made:
        held = ", ".join(artifact.name for artifact in bundled.artifacts) or "no artifacts"
        raise UsageError(f"nothing can be made of the bundle for {', '.join(targets.engines)}; it holds: {held}")
    return made


def _graphs(bundled: Spec) -> dict[str, Artifact]:
    """Precision -> the artifact that is its ONNX graph."""
    return {artifact.precision: artifact for artifact in bundled.artifacts if artifact.engine == "onnxruntime"}


def _take_over(runner: Runner, bundled: Export, say: Say) -> Mapping[str, Verification]:
    """Give an artifact that has no threshold that of its ONNX graph, if its figures bear it out; returns these."""
    artifact = runner.artifact
    if artifact.threshold is not None or not bundled.spec.trained:
        return {}
    graph = _graphs(bundled.spec).get(artifact.precision)
    doubt: str | None = "the bundle has none"
    if graph is not None and graph.threshold is not None:
        figures = verify_runner(runner, bundled.folder, graph.threshold.value)
        cut = _cut(bundled, graph.threshold)
        there = figures if cut in (None, graph.threshold.value) else verify_runner(runner, bundled.folder, cut)
        doubt = _doubt(there, cut)
        if doubt is None:
            evidence = f"{there.decision_flips} of {there.n} reference images change sides"
            if there is not figures:
                evidence += f" at the {graph.threshold.target_tpr:.0%} quantile of their own scores"
            say(f"{artifact.name}: takes over the threshold of {graph.name}: {evidence}")
            data = f"{graph.threshold.data}; fitted to {graph.name} and taken over: {evidence}"
            runner.artifact = replace(artifact, threshold=replace(graph.threshold, data=data))
            return {artifact.name: figures}
    say(f"{artifact.name}: no threshold: {doubt}. Fit one with: ssod-edge calibrate DIR --id DATA")
    return {}


def _cut(bundled: Export, threshold: Threshold) -> float | None:
    """The score at which the reference shows whether an artifact decides as its ONNX graph does: the threshold.

    Where all reference images are known at that, as photos are that the model was trained on, their sides say nothing.
    Then it is the quantile of their own scores that belongs to the threshold's share of known images. None where all
    are unknown: such a threshold fits no model.
    """
    scores = np.sort(bundled.reference()[f"score_{bundled.spec.score_name}"].astype(np.float64))
    known = int((scores <= threshold.value).sum())
    if known < len(scores):
        return threshold.value if known else None
    place = min(max(1, round(threshold.target_tpr * len(scores))), len(scores) - 1)
    return float(scores[place - 1 : place + 1].mean())


def _doubt(figures: Verification, cut: float | None) -> str | None:
    """Why the reference does not show that an artifact decides as the trained model does; None if it does."""
    if cut is None:
        return (
            f"all {figures.n} reference images are unknown at the ONNX graph's, so they cannot show that it holds here"
        )
    if figures.decision_flips is None or figures.decision_flips > MAX_FLIPS:
        flips = f"{figures.decision_flips} of {figures.n} reference images"
        return f"{flips} change sides at the ONNX graph's, at most {MAX_FLIPS} may"
    return None


def _remove_the_rest(spec: Spec, folder: Path) -> None:
    """What was unpacked and belongs to no artifact of the export."""
    files = (name for artifact in spec.artifacts for name in artifact.files)
    kept = {folder / name for name in (SPEC_NAME, BENCH_NAME, *spec.shared_files, *files)}
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder after what lies in it
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif path.is_file() and path not in kept:
            path.unlink()
