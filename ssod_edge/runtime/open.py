"""Opening an artifact on the engine that runs it. Nothing here needs torch, except the "eager" engine."""

from __future__ import annotations

import os
from pathlib import Path

from ssod_edge.errors import ArtifactError, UsageError, missing_extra
from ssod_edge.optional import is_there, load
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.runner import Runner
from ssod_edge.runtime.verify import require_verified
from ssod_edge.spec import Artifact, Spec

#: Engine -> the module it needs.
ENGINES = {
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt_rtx",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
    "eager": "torch",
}

#: Engines whose artifacts are plans, built for a GPU.
PLAN_ENGINES = ("tensorrt", "tensorrt_rtx")

#: What engine="auto" tries, in this order: a GPU first; on a CPU, OpenVINO is the faster of the two.
AUTO_ENGINES = (*PLAN_ENGINES, "openvino", "onnxruntime")

#: What precision="auto" tries, in this order: what was trained, before what is near it. On a CPU, fp16 saves disk space
#: and no time; int8 is the fastest, and moves scores and a few classes, so it runs where it is asked for by name or is
#: all that was exported.
AUTO_PRECISIONS = ("fp32", "fp16", "int8")

#: How often an export is opened anew that another one takes the place of meanwhile.
ATTEMPTS = 10


def open_runner(
    folder: str | os.PathLike[str],
    engine: str = "auto",
    precision: str = "auto",
    artifact: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    allow_untrained: bool = False,
    verify: bool = True,
) -> Runner:
    """Open one artifact of an export. What was asked for runs, or an error says why not.

    The hashes of the artifact and of the reference are checked before anything is loaded. An artifact that could
    not be verified where it was built (`verification: null`), or was verified in another precision or on another
    kind of device, is verified here, and the figures are recorded.

    Args:
        folder: an export folder, or the run folder that holds it.
        engine: "auto" takes the first of `AUTO_ENGINES` that the export has an artifact for and that is installed,
            those for a GPU only where there is one; "tensorrt", "tensorrt_rtx", "openvino", "onnxruntime", or "eager"
            (the checkpoint itself, with torch).
        precision: "auto" takes the first of `AUTO_PRECISIONS` that there is, fp32 before the others, because int8
            trades some accuracy for speed; "fp32", "fp16" or "int8".
        artifact: an artifact's name, e.g. "onnx-fp16"; `engine` and `precision` must then agree with it.
        device: "auto" is the CPU, and for TensorRT the first GPU; OpenVINO also takes its own device names, e.g.
            "GPU", and TensorRT cuda:N.
        threads: of an engine on the CPU; None leaves the number to the engine.
        allow_untrained: open an export of untrained weights, whose verdicts mean nothing.
        verify: False leaves verification to the caller.

    Raises:
        UsageError: no export there, an unknown name, nothing that fits, or untrained weights.
        ArtifactError: a file of the export is missing, edited or cut short, or `ssod.json` describes another graph.
        MissingExtraError: the engine is not installed.
        EngineError: the engine or device cannot run the artifact here.
        VerificationError: the artifact's numbers are not those of its reference.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    if engine == "eager":
        return _open_eager(Path(folder), precision, artifact, device, threads, allow_untrained)
    place = Export.place(folder)
    for _ in range(ATTEMPTS):
        before = _state(place)
        try:
            export = Export.at(place)
            require_trained(export.spec, allow_untrained)
            chosen = choose_artifact(export.spec, engine, precision, artifact)
            runner = _open(export.spec, chosen, export.check(chosen), device, threads)
            runner.folder = export.folder
            return require_verified(runner, export.folder) if verify else runner
        except ArtifactError as error:
            if _state(place) == before:
                raise
            mixed = error  # files of two versions: another one was swapped in meanwhile
    raise mixed


def _open_eager(
    folder: Path, precision: str, artifact: str | None, device: str, threads: int | None, allow_untrained: bool
) -> Runner:
    """The checkpoint in PyTorch; see `open_runner`."""
    if precision not in ("auto", "fp32") or artifact is not None:
        raise UsageError("the eager engine runs the checkpoint, in fp32: leave out precision and artifact")
    if not is_installed("eager"):
        raise missing_extra("torch", "the eager engine")
    _require_checkpoint(folder)
    load("torch")
    from ssod_edge.training.eager import EagerRunner

    return EagerRunner(folder, device, threads, allow_untrained)


def _require_checkpoint(folder: Path) -> None:
    """Raises UsageError where the export of a run is a taught one: the run's checkpoint has not learnt that.

    Args:
        folder: what the eager engine takes: a run folder, its export folder, or a checkpoint in it.
    """
    for place in (folder.parent / "export",) if folder.is_file() else (folder, folder / "export"):
        export = Export.in_place(place)
        if export is not None and export.spec.taught:
            raise UsageError(
                f"the eager engine runs a checkpoint, and '{place}' was taught since (version {export.spec.version}): "
                "use another engine, or go back with ssod-edge rollback --to 1"
            )


def _state(place: Path) -> tuple[int, int] | None:
    """What is another thing after a folder was swapped for another one, see `ssod_edge.export.staging`."""
    try:
        found = os.stat(place)
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def require_trained(spec: Spec, allow_untrained: bool) -> None:
    """Raises UsageError for untrained weights that were not asked for."""
    if not spec.trained and not allow_untrained:
        raise UsageError(
            f"this export of '{spec.backbone}' holds untrained weights, made to measure latency: its classes and its "
            "verdicts mean nothing. Train and export a model, or pass --allow-untrained (allow_untrained=True)."
        )


def is_installed(engine: str) -> bool:
    """Whether the module of an engine can be found. It is not imported."""
    modules = (ENGINES[engine], "tensorrt_lean") if engine == "tensorrt" else (ENGINES[engine],)
    return any(is_there(module) for module in modules)


def why_not_here(artifact: Artifact) -> str | None:
    """Why an artifact that was just built cannot run on this machine, because it is for another; None if it can."""
    if artifact.engine not in PLAN_ENGINES:
        return None
    from ssod_edge.runtime.engines import plans

    return plans.why_not_here(artifact)


def _has_device(engine: str) -> bool:
    """Whether there is a GPU, for an engine that needs one."""
    if engine not in PLAN_ENGINES:
        return True
    from ssod_edge.runtime.engines.cuda import has_gpu

    return has_gpu()


def choose_artifact(spec: Spec, engine: str = "auto", precision: str = "auto", name: str | None = None) -> Artifact:
    """The artifact that `open_runner` opens for these arguments; see there.

    Raises:
        UsageError: an unknown name, or the export has nothing that fits.
        MissingExtraError: there is one that fits, and its engine is not installed.
    """
    if engine not in ("auto", *AUTO_ENGINES):
        raise UsageError(f"engine must be one of auto, {', '.join(ENGINES)}, got '{engine}'")
    if precision not in ("auto", *AUTO_PRECISIONS):
        raise UsageError(f"precision must be one of auto, {', '.join(AUTO_PRECISIONS)}, got '{precision}'")
    candidates = spec.artifacts if name is None else (spec.artifact(name),)
    fitting = [a for a in candidates if engine in ("auto", a.engine) and precision in ("auto", a.precision)]
    if not fitting:
        has = ", ".join(f"{a.name} ({a.engine}, {a.precision})" for a in candidates) or "no artifacts"
        raise UsageError(f"nothing fits engine '{engine}' and precision '{precision}'; this export has: {has}")
    unknown = [a for a in fitting if a.engine not in AUTO_ENGINES or a.precision not in AUTO_PRECISIONS]
    if unknown:
        raise ArtifactError(
            f"artifact '{unknown[0].name}' is for engine '{unknown[0].engine}' in {unknown[0].precision}, which this "
            "release does not run. Install a newer one (docs/install.md)"
        )
    fitting.sort(key=lambda a: (AUTO_ENGINES.index(a.engine), AUTO_PRECISIONS.index(a.precision)))
    installed = [artifact for artifact in fitting if is_installed(artifact.engine)]
    if installed:  # the first of them, if none has its device, says why it cannot run
        return next((artifact for artifact in installed if _has_device(artifact.engine)), installed[0])
    raise missing_extra(ENGINES[fitting[0].engine], f"running artifact '{fitting[0].name}'")


def _open(spec: Spec, artifact: Artifact, path: Path, device: str, threads: int | None) -> Runner:
    if artifact.engine in PLAN_ENGINES:
        from ssod_edge.runtime.engines.tensorrt import TrtRunner

        return TrtRunner(spec, artifact, path, device=device)
    if artifact.engine == "openvino":
        from ssod_edge.runtime.engines.openvino import OpenVinoRunner

        return OpenVinoRunner(spec, artifact, path, device=device, threads=threads)
    from ssod_edge.runtime.engines.onnxruntime import OnnxRunner

    return OnnxRunner(spec, artifact, path, device=device, threads=threads)
