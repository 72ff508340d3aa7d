"""On a device: from a bundle to artifacts of its own engines, each verified. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ssod_edge.data.inputs import list_images
from ssod_edge.detect.metrics import check_target_tpr
from ssod_edge.errors import UsageError, VerificationError
from ssod_edge.export.bundle import BENCH_NAME, check_bundle, unpack
from ssod_edge.export.engines.artifact import CPU_TARGETS, PRECISIONS, check_engines, make_artifact
from ssod_edge.export.engines.tensorrt import PlanOptions
from ssod_edge.export.release import earlier_export, keep_earlier, staged, that_run_here
from ssod_edge.files import exclusive, same_data
from ssod_edge.runtime.calibrate import fit_threshold, trained_on
from ssod_edge.runtime.open import Runner, open_runner
from ssod_edge.runtime.verify import Verification, check_passed, load_reference, verify_runner
from ssod_edge.spec import SPEC_NAME, Artifact, Spec, Threshold, save_spec

#: A threshold is carried over while at most so many reference images change sides at it. One always may: a conformal
#: threshold is itself the score of one image, which any rounding moves across it.
MAX_FLIPS = 1

Say = Callable[[str], None]
#: `make_artifact`, but for what is the same for all.
Make = Callable[[str, str, Path, Path], Artifact]


def default_folder(bundle: str | Path) -> Path:
    """Where a bundle goes if no place is named: its name without `.tar`, in the current folder."""
    return Path(Path(bundle).name.removesuffix(".tar"))


def deploy(
    bundle: str | Path,
    out: str | Path | None = None,
    engines: Sequence[str] = CPU_TARGETS,
    precisions: Sequence[str] = (),
    data: str | None = None,
    target_tpr: float = 0.95,
    plans: PlanOptions | None = None,
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
        out: the export folder; None is `default_folder(bundle)`. Artifacts of an earlier export of the same model that
            are not made again are kept.
        engines: of `ssod_edge.export.engines.artifact.TARGETS`.
        precisions: of `PRECISIONS`; none given makes all that the bundle holds.
        data: a folder of in-distribution images, on whose scores every artifact's threshold is fitted.
        target_tpr: share of those images that must stay known, in (0, 1).
        plans: how TensorRT's plans are built.
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
    check_engines(engines)
    check_bundle(bundle)
    images = None if data is None else _id_images(data)
    check_target_tpr(target_tpr, None if images is None else len(images))
    place = default_folder(bundle) if out is None else Path(out)
    with ExitStack() as publishing, staged(place) as folder:
        bundled = unpack(bundle, folder)
        if data is not None and bundled.source.get("splits_hash") and same_data(data, bundled.source.get("data")):
            raise trained_on(data)
        say(f"unpacked {bundled.backbone} at {bundled.preprocess.input_size} px, score {bundled.score_name}")
        make = partial(make_artifact, plans=plans, earlier=earlier_export(place))
        spec = replace(bundled, artifacts=tuple(_make(bundled, folder, engines, precisions, make, say)))
        save_spec(spec, folder)
        failures: list[str] = []
        for artifact in that_run_here(spec, say):
            # One at a time: a device may have room for no more.
            with open_runner(folder, artifact=artifact.name, allow_untrained=True, verify=False) as runner:
                if images is not None:
                    say(f"{artifact.name}: fitting its threshold on {len(images)} images")
                    description = f"folder '{Path(str(data)).resolve().name}', {len(images)} images"
                    threshold = fit_threshold(runner, images, target_tpr, description, unreadable)
                    runner.artifact = replace(artifact, threshold=threshold)
                verification = _verify(runner, folder, bundled, say)
            spec = spec.with_artifact(replace(runner.artifact, verification=verification.to_dict()))
            try:
                check_passed(runner.artifact, verification)
            except VerificationError as error:
                failures.append(str(error))
        if failures:
            raise VerificationError("nothing is released: " + "\n".join(failures))
        _remove_the_rest(spec, folder)
        # Another process may be exporting to the same place: what it has published by now is kept too.
        publishing.enter_context(exclusive(place.resolve().parent))
        spec = keep_earlier(place, folder, spec, say)
        save_spec(spec, folder)
    return spec


def _id_images(data: str) -> list[str]:
    """Raises UsageError unless `data` is a folder of images: other data sets are opened with PyTorch."""
    if not Path(data).is_dir():
        raise UsageError(f"--id with --from takes a folder of in-distribution images, got '{data}', which is none")
    return list_images([data])


def _make(
    bundled: Spec, folder: Path, engines: Sequence[str], precisions: Sequence[str], make: Make, say: Say
) -> list[Artifact]:
    """Every engine's artifacts: those in the bundle as they are, the others from its ONNX graphs."""
    graphs = _graphs(bundled)
    ready = {(artifact.engine, artifact.precision): artifact for artifact in bundled.artifacts}
    made = []
    for engine in engines:
        for precision in precisions or PRECISIONS:
            if (engine, precision) in ready:
                made.append(ready[engine, precision])
            elif precision in graphs:
                say(f"making {engine} in {precision}")
                made.append(_from_graph(engine, graphs[precision], folder, make))
            elif precisions:
                raise UsageError(
                    f"the bundle holds no ONNX graph in {precision}; it has: {', '.join(graphs) or 'none'}. Export it "
                    f"where the model was trained, with: ssod-edge export RUN --target onnx --{precision}"
                )
    if not made:
        held = ", ".join(artifact.name for artifact in bundled.artifacts) or "no artifacts"
        raise UsageError(f"nothing can be made of the bundle for {', '.join(engines)}; it holds: {held}")
    return made


def _graphs(bundled: Spec) -> dict[str, Artifact]:
    """Precision -> the artifact that is its ONNX graph."""
    return {artifact.precision: artifact for artifact in bundled.artifacts if artifact.engine == "onnxruntime"}


def _from_graph(engine: str, graph: Artifact, folder: Path, make: Make) -> Artifact:
    """A new artifact, which remembers how its graph came about."""
    made = make(engine, graph.precision, folder / graph.main_file, folder)
    versions = {name: version for name, version in graph.versions.items() if name != graph.engine}
    return replace(made, opset=graph.opset, versions={**versions, **made.versions}, build={**graph.build, **made.build})


def _verify(runner: Runner, folder: Path, bundled: Spec, say: Say) -> Verification:
    """The artifact's figures. One that has no threshold gets that of its ONNX graph, if they bear it out."""
    artifact = runner.artifact
    graph = _graphs(bundled).get(artifact.precision)
    if artifact.threshold is not None or not bundled.trained:
        return verify_runner(runner, folder)
    doubt: str | None = "the bundle has none"
    if graph is not None and graph.threshold is not None:
        verification = verify_runner(runner, folder, graph.threshold.value)
        doubt = _doubt(verification, folder, bundled, graph.threshold)
        if doubt is None:
            evidence = f"{verification.decision_flips} of {verification.n} reference images change sides"
            say(f"{artifact.name}: takes over the threshold of {graph.name}: {evidence}")
            data = f"{graph.threshold.data}; fitted to {graph.name} and taken over: {evidence}"
            runner.artifact = replace(artifact, threshold=replace(graph.threshold, data=data))
            return verification
    say(f"{artifact.name}: no threshold: {doubt}. Fit one with: ssod-edge calibrate DIR --id DATA")
    return verify_runner(runner, folder)


def _doubt(figures: Verification, folder: Path, bundled: Spec, threshold: Threshold) -> str | None:
    """Why the reference does not show that an artifact decides as the trained model does; None if it does."""
    scores = load_reference(folder, bundled)[f"score_{bundled.score_name}"]
    known = int((scores <= threshold.value).sum())
    if not 0 < known < figures.n:
        side = "unknown" if known == 0 else "known"
        return (
            f"all {figures.n} reference images are {side} at the ONNX graph's, so they cannot show that it holds here"
        )
    if figures.decision_flips is None or figures.decision_flips > MAX_FLIPS:
        flips = f"{figures.decision_flips} of {figures.n} reference images"
        return f"{flips} change sides at the ONNX graph's, at most {MAX_FLIPS} may"
    return None


def _remove_the_rest(spec: Spec, folder: Path) -> None:
    """What was unpacked and belongs to no artifact of the export."""
    kept = {folder / name for artifact in spec.artifacts for name in artifact.files}
    kept |= {folder / name for name in (SPEC_NAME, BENCH_NAME, *spec.shared_files)}
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder after what lies in it
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif path.is_file() and path not in kept:
            path.unlink()
