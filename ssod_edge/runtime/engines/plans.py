"""Plans of TensorRT and TensorRT for RTX: what the spec records of one, whether it fits here, and what opens it."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssod_edge.errors import ArtifactError, EngineError, SsodEdgeError, missing_extra
from ssod_edge.optional import is_there, load
from ssod_edge.runtime.engines.cuda import Gpu, open_gpu
from ssod_edge.runtime.engines.loading import parse_version
from ssod_edge.spec import Artifact, Spec

#: Engine -> the modules that open its plans, in the order they are tried.
MODULES = {"tensorrt": ("tensorrt", "tensorrt_lean"), "tensorrt_rtx": ("tensorrt_rtx",)}
#: Engine -> its name in messages.
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
#: Engine -> the extra that brings pycuda for it. `tensorrt` would bring a wheel that hides JetPack's own TensorRT.
CUDA_EXTRAS = {"tensorrt": "jetson", "tensorrt_rtx": "tensorrt-rtx"}
#: The oldest TensorRT whose networks can be strongly typed and that parses opset 18 here: JetPack 6.1 brings it.
OLDEST = (10, 3)

#: What an `Artifact.build` holds of a plan: `version` is TensorRT's, `gpu` a name (None where the plan is built for
#: compute capabilities, e.g. ["8.7"]), `batch` [min, opt, max]. And `key`, a hash of them: the same key, the same plan.
PLAN_FIELDS = (
    "onnx_sha256",
    "engine",
    "version",
    "gpu",
    "compute_capabilities",
    "precision",
    "batch",
    "version_compatible",
)


def plan_key(build: Mapping[str, Any]) -> str:
    """The SHA-256 of everything that a plan depends on, the `PLAN_FIELDS` of `build`."""
    text = json.dumps({name: build[name] for name in PLAN_FIELDS}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def graph_hash(files: Mapping[str, str]) -> str:
    """What `onnx_sha256` of a plan holds.

    Args:
        files: path -> SHA-256, of the ONNX file first and then of its external data.

    Returns:
        the ONNX file's own SHA-256; with external data, that of the digits of all of them, sorted by path.
    """
    main, *others = files
    digests = files[main] + "".join(files[name] for name in sorted(others))
    return hashlib.sha256(digests.encode("ascii")).hexdigest() if others else files[main]


def check_build(artifact: Artifact, path: Path, spec: Spec) -> None:
    """Does the artifact say what its plan was built from, and is that this export's graph?

    Raises:
        ArtifactError: no, or it was edited.
    """
    build = artifact.build
    again = f"Build it again with: {build_command(artifact.engine)}"
    if not set(PLAN_FIELDS) <= set(build) or build.get("key") != plan_key(build):
        raise ArtifactError(f"'{path}' is not the plan that its entry in the spec describes (`build`). {again}")
    if (build["engine"], build["precision"]) != (artifact.engine, artifact.precision):
        raise ArtifactError(
            f"'{path}' was built for {build['engine']} in {build['precision']}, and its artifact says "
            f"{artifact.engine} in {artifact.precision}. {again}"
        )
    for other in spec.artifacts:
        graph = (other.engine, other.precision) == ("onnxruntime", artifact.precision)
        if graph and (found := graph_hash(other.files)) != build["onnx_sha256"]:
            raise ArtifactError(
                f"'{path}' was built from another graph than '{other.main_file}' of this export: SHA-256 "
                f"{build['onnx_sha256'][:12]}... instead of {found[:12]}... {again}"
            )


def check_plan(artifact: Artifact, path: Path, module: Any, gpu: Gpu) -> None:
    """Was the plan built for this TensorRT and this GPU? TensorRT itself does not always notice.

    Raises:
        EngineError: no; the message says for which, and how to build it here.
    """
    build, title = artifact.build, TITLES[artifact.engine]
    again = f"Build it here with: {build_command(artifact.engine)}, or choose another engine"
    built, here = str(build["version"]), str(module.__version__)
    if not _fits(built, here, build["version_compatible"]):
        raise EngineError(f"'{path}' was built by {title} {built}, and this is {here}. {again}")
    if gpu.compute_capability not in build["compute_capabilities"]:
        raise EngineError(
            f"'{path}' was built for compute capability {', '.join(build['compute_capabilities'])}, and '{gpu.name}' "
            f"has {gpu.compute_capability}. {again}"
        )
    if build["gpu"] not in (None, gpu.name):
        raise EngineError(f"'{path}' was built for '{build['gpu']}', and this is '{gpu.name}'. {again}")


def build_command(engine: str, options: str = "") -> str:
    """What builds a plan: from a run, and on a device, which has a bundle and nothing to export a run with."""
    target = f"--target {engine.replace('_', '-')}{options}"
    return f"ssod-edge export {target} (on a device: ssod-edge export --from BUNDLE {target})"


def _fits(built: str, here: str, compatible: bool) -> bool:
    """A plan runs on the version that built it; a version-compatible one also on later ones of the same major.

    NVIDIA promises the next major too, without the interfaces that it removed; that is not relied on.
    """
    old, new = parse_version(built), parse_version(here)
    return built == here or (compatible and old[:1] == new[:1] and old <= new)


def why_not_here(artifact: Artifact) -> str | None:
    """Why a plan that was just built cannot run on this machine; None if it can."""
    try:
        gpu = open_gpu(extra=CUDA_EXTRAS[artifact.engine])
    except SsodEdgeError as error:
        return str(error)
    found = artifact.build["compute_capabilities"]
    if gpu.compute_capability not in found:
        return f"it is for compute capability {', '.join(found)}, and '{gpu.name}' has {gpu.compute_capability}"
    return None


def load_module(name: str) -> Any:
    """Import tensorrt, tensorrt_rtx or tensorrt_lean.

    Raises:
        MissingExtraError: it is not installed.
        EngineError: it cannot be loaded, or is older than `OLDEST`.
    """
    module = load(name)
    version = str(getattr(module, "__version__", "of an unknown version"))
    if name != "tensorrt_rtx" and parse_version(version)[:2] < OLDEST:
        raise EngineError(
            f"{name} {version} is too old: {OLDEST[0]}.{OLDEST[1]} is the oldest that works, which JetPack 6.1 brings. "
            "Update JetPack, or where there is none: pip install -U tensorrt"
        )
    return module


def load_for(artifact: Artifact) -> Any:
    """The module that opens an artifact's plan: the whole TensorRT, or else the lean runtime."""
    for name in MODULES[artifact.engine]:
        if not is_there(name):
            continue
        if name == "tensorrt_lean" and not artifact.build["version_compatible"]:
            raise EngineError(
                f"'{artifact.name}' needs the whole TensorRT, and only its lean runtime is installed. Install "
                f"tensorrt, or build the plan where it is: {build_command('tensorrt', ' --version-compatible')}"
            )
        return load_module(name)
    raise missing_extra(MODULES[artifact.engine][0], f"running artifact '{artifact.name}'")


@contextmanager
def without_collection() -> Iterator[None]:
    """A block without garbage collection, for calls in which TensorRT logs.

    It calls the logger while it holds a lock of its own. A collection that begins there and frees an earlier builder or
    runtime, which needs that lock, would wait for it for ever.
    """
    gc.collect()  # what was held in a cycle goes now
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def make_logger(module: Any) -> Any:
    """A logger for TensorRT that keeps its errors; `last()` is what went wrong, as one line."""
    severity = module.ILogger.Severity

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=4)

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.errors.append(" ".join(message.split()))
            elif level == severity.WARNING:
                logging.getLogger("ssod_edge.tensorrt").info("%s", message)

        def last(self) -> str:
            return "; ".join(self.errors) or "it gives no reason"

    return Logger()
