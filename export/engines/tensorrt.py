"""TensorRT plans from an ONNX file: TensorRT 10 and 11, and TensorRT for RTX, which builds without a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssod_edge.errors import ArtifactError, EngineError, SsodEdgeError, UsageError, VerificationError
from ssod_edge.external_data import external_files
from ssod_edge.files import sha256_file, write_atomic
from ssod_edge.runtime.engines.cuda import Gpu, has_gpu, open_gpu
from ssod_edge.runtime.engines.loading import parse_version
from ssod_edge.runtime.engines.plans import (
    CUDA_EXTRAS,
    TITLES,
    graph_hash,
    load_module,
    make_logger,
    plan_key,
    without_collection,
)
from ssod_edge.runtime.export import Export
from ssod_edge.spec import VERDICT_INPUTS, check_files
from ssod_edge.terminal import PhaseBars

INPUT = "image"
PLAN_NAME = "model.plan"
#: How late an interrupt of a build may be noticed.
NOTICE_SECONDS = 0.2
#: TensorRT for RTX has no fp32 matrix product for Turing (7.5), and the last layer of every graph is one.
OLDEST_CAPABILITY = 80
#: Images in one run of a plan. A builder accepts any number, and reserves memory for it when the plan is opened.
MOST_IMAGES = 4096


@dataclass(frozen=True)
class PlanOptions:
    """How plans are built.

    Attributes:
        batch: smallest, usual and largest number of images in a run; the usual one is what TensorRT optimises for.
        version_compatible: later releases of the same major TensorRT, and their lean runtimes, open the plan too,
            because the lean runtime of this one is in it. That makes it larger, and it may be slower. TensorRT for RTX
            has no such plans.
    """

    batch: tuple[int, int, int] = (1, 1, 8)
    version_compatible: bool = False

    def __post_init__(self) -> None:
        low, usual, high = self.batch
        if not 1 <= low <= usual <= high:
            raise UsageError(
                f"batch must be MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX, got {','.join(map(str, self.batch))}"
            )
        if high > MOST_IMAGES:
            raise UsageError(f"a plan for {high} images in a run is more than any device holds: at most {MOST_IMAGES}")


def parse_batch(text: str) -> tuple[int, int, int]:
    """ "1,4,8" -> (1, 4, 8), and "4" -> (4, 4, 4).

    Raises:
        UsageError: not one or three whole numbers.
    """
    parts = text.split(",")
    try:
        low, usual, high = map(int, parts * 3 if len(parts) == 1 else parts)
    except ValueError:
        raise UsageError(f"batch must be one number of images, or MIN,OPT,MAX such as 1,1,8, got '{text}'") from None
    return low, usual, high


def runs_here(engine: str) -> bool:
    """Whether a plan that is built here can run here: there is a GPU, and this engine has code for it."""
    with suppress(SsodEdgeError):
        return check_builder(engine)[1] is not None
    return False


def check_builder(engine: str) -> tuple[Any, Gpu | None, list[str]]:
    """Find out before the work whether plans can be built here.

    Returns:
        the module, the GPU that is here, and the compute capabilities that a plan is built for, e.g. ["8.7"].

    Raises:
        MissingExtraError, EngineError: see `save_plan`.
    """
    module = load_module(engine)
    gpu = open_gpu(extra=CUDA_EXTRAS[engine]) if engine == "tensorrt" or has_gpu() else None
    if engine == "tensorrt" and gpu is not None:
        return module, gpu, [gpu.compute_capability]
    names = getattr(getattr(module, "ComputeCapability", None), "__members__", ())
    numbers = sorted(int(name[2:]) for name in names if name.startswith("SM"))
    known = [f"{number // 10}.{number % 10}" for number in numbers if number >= OLDEST_CAPABILITY]
    if gpu is None:
        return module, None, known
    if gpu.compute_capability not in known:
        raise EngineError(
            f"{TITLES['tensorrt_rtx']} {module.__version__} has no code for '{gpu.name}' (compute capability "
            f"{gpu.compute_capability}); it has for {', '.join(known)}. Use --target tensorrt there. To build for "
            "other GPUs on this machine, hide this one: CUDA_VISIBLE_DEVICES= ssod-edge export --target tensorrt-rtx"
        )
    return module, gpu, [gpu.compute_capability]


def save_plan(
    engine: str, precision: str, onnx_path: Path, folder: Path, options: PlanOptions, earlier: Export | None = None
) -> tuple[Path, dict[str, Any]]:
    """Build the plan of a graph, or copy it from an earlier export that has the same one.

    Args:
        engine: "tensorrt", for the GPU that is here, or "tensorrt_rtx", for the GPU that is here or, where none is, for
            every one from Ampere on.
        precision: of the graph, for the record; the graph alone decides what is computed in.
        onnx_path: the graph.
        folder: gets `model.plan`.
        options, earlier: see `ssod_edge.export.engines.artifact.make_artifact`.

    Returns:
        the plan's path and what `Artifact.build` records of it (`PLAN_FIELDS` of
        `ssod_edge.runtime.engines.plans` and their `key`).

    Raises:
        MissingExtraError: the engine, or for "tensorrt" pycuda, is not installed.
        EngineError: it is too old, has no GPU or no code for the one that is here, or runs out of memory.
        VerificationError: it cannot parse the graph.
        ArtifactError: the ONNX file is cut short, or its external data is missing or outside its folder.
        OutputError: the plan cannot be written.
    """
    module, gpu, capabilities = check_builder(engine)
    build: dict[str, Any] = {
        "onnx_sha256": graph_hash({p.as_posix(): sha256_file(p) for p in (onnx_path, *external_files(onnx_path))}),
        "engine": engine,
        "version": str(module.__version__),
        "gpu": gpu.name if gpu is not None and engine == "tensorrt" else None,
        "compute_capabilities": capabilities,
        "precision": precision,
        "batch": list(options.batch),
        "version_compatible": options.version_compatible and engine == "tensorrt",
    }
    build["key"] = plan_key(build)
    path = folder / PLAN_NAME
    if earlier is not None and (copied := _copy_earlier(earlier, build["key"], path)):
        return copied, build
    plan = build_plan(module, onnx_path, options, capabilities)
    return write_atomic(path, lambda temporary: temporary.write_bytes(plan)), build


def _copy_earlier(earlier: Export, key: str, path: Path) -> Path | None:
    """The plan of the same key, if an earlier export has it whole."""
    for artifact in earlier.spec.artifacts:
        if artifact.build.get("key") == key:
            with suppress(ArtifactError, OSError):
                found = check_files(earlier.folder, artifact)
                path.parent.mkdir(parents=True, exist_ok=True)
                return Path(shutil.copyfile(found, path))
    return None


def build_plan(module: Any, onnx_path: Path, options: PlanOptions, capabilities: Sequence[str] = ()) -> bytes:
    """Parse and build; nothing is written.

    Args:
        module: tensorrt or tensorrt_rtx.
        onnx_path: the graph, with the input `image` [N, 3, S, S].
        options: see `PlanOptions`.
        capabilities: that TensorRT for RTX builds for.

    Raises:
        VerificationError: the graph cannot be parsed, or has no such input.
        EngineError: TensorRT builds nothing.
    """
    with without_collection():
        return _built(module, onnx_path, options, capabilities)


def _built(module: Any, onnx_path: Path, options: PlanOptions, capabilities: Sequence[str]) -> bytes:
    title = f"{TITLES[module.__name__]} {module.__version__}"
    logger = make_logger(module)
    try:
        builder = module.Builder(logger)
    except Exception as error:  # without a driver the binding raises TypeError: the C++ factory gave nothing
        raise EngineError(
            f"{title} cannot start its builder: {logger.last()}. It needs a GPU and its driver; ssod-edge doctor "
            "shows what there is."
        ) from error
    # TensorRT 11 has only strongly typed networks; there the flag changes nothing.
    flags = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        raise VerificationError(f"{title} cannot parse '{onnx_path.name}': {_parser_error(parser, logger)}")
    _open_inputs(module, network)
    config = builder.create_builder_config()
    _configure(module, config, options, capabilities)
    config.add_optimization_profile(_profile(builder, network, onnx_path, options))
    with PhaseBars(f"building for {title}") as bars:
        monitor = _make_monitor(module, bars)
        config.progress_monitor = monitor
        plan = _build(builder, network, config, monitor)
    if plan is None:
        reason = logger.last()
        fix = "See the reason above"
        if any(word in reason.lower() for word in ("memory", "bad_alloc")):
            fix = "Close other programs, or use a smaller --batch or model"
        elif "libnvinfer_lean" in reason:
            package = f"libnvinfer-lean{parse_version(str(module.__version__))[0]}"
            fix = f"Install the lean runtime for the plan (apt install {package}), or drop --version-compatible"
        raise EngineError(f"{title} cannot build '{onnx_path.name}': {reason}. {fix}.")
    return bytes(memoryview(plan))


def _configure(module: Any, config: Any, options: PlanOptions, capabilities: Sequence[str]) -> None:
    """Exact fp32, the GPUs of a plan that is built ahead of time, and who may open it."""
    flag = module.BuilderFlag
    if hasattr(flag, "TF32"):
        config.clear_flag(flag.TF32)  # on by default: 10 bits of mantissa in what is called fp32
    if module.__name__ == "tensorrt_rtx":
        config.num_compute_capabilities = len(capabilities)
        for index, text in enumerate(capabilities):
            config.set_compute_capability(getattr(module.ComputeCapability, f"SM{text.replace('.', '')}"), index)
    elif options.version_compatible:
        # This puts the lean runtime into the plan. Without it (EXCLUDE_LEAN_RUNTIME) a later TensorRT opens the plan
        # only with the library of this one beside it. It is code, which the runner allows once it knows the hash.
        config.set_flag(flag.VERSION_COMPATIBLE)


def _open_inputs(module: Any, network: Any) -> None:
    """Make inputs of the constants that stand for `VERDICT_INPUTS`, so that another threshold takes no other plan."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    opened = {}
    for layer in layers:
        if layer.name in VERDICT_INPUTS and layer.type == module.LayerType.CONSTANT:
            constant = layer.get_output(0)
            opened[constant.name] = network.add_input(layer.name, constant.dtype, constant.shape)
    for layer in layers if opened else ():
        for index in range(layer.num_inputs):
            tensor = layer.get_input(index)
            if tensor is not None and tensor.name in opened:
                layer.set_input(index, opened[tensor.name])


def _profile(builder: Any, network: Any, onnx_path: Path, options: PlanOptions) -> Any:
    """The optimisation profile: the batch of `image` is dynamic."""
    inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
    shape = tuple(inputs[INPUT].shape) if set(inputs) - set(VERDICT_INPUTS) == {INPUT} else ()
    if len(shape) != 4 or shape[0] != -1 or min(shape[1:]) < 1:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items()) or "none"
        raise VerificationError(
            f"'{onnx_path.name}' must have one input, image [N, 3, S, S] with a dynamic N (-1), and has: {found}. "
            "Export it with ssod-edge export."
        )
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, *((n, *shape[1:]) for n in options.batch))
    return profile


def _parser_error(parser: Any, logger: Any) -> str:
    """The first of the parser's errors: which node, which op, why."""
    if parser.num_errors == 0:
        return str(logger.last())
    error = parser.get_error(0)
    name, op = (getattr(error, attribute, str)() for attribute in ("node_name", "node_operator"))
    where = f"node '{name}' ({op}): " if op else ""
    others = f" ({parser.num_errors - 1} more errors)" if parser.num_errors > 1 else ""
    return f"{where}{' '.join(str(error.desc()).split())}{others}"


def _build(builder: Any, network: Any, config: Any, monitor: Any) -> Any:
    """Build on a thread of its own: an interrupt must not reach Python in the middle of TensorRT's code.

    Returns:
        the serialised network, or None.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="build") as pool:
        pool.submit(int).result()  # a thread that an interrupt meets while it starts is not waited for
        try:
            build = pool.submit(builder.build_serialized_network, network, config)
            # A signal that comes just before a wait begins does not end it, so that no wait here is a long one.
            while not wait((build,), timeout=NOTICE_SECONDS).done:
                continue
            return build.result()
        except BaseException:
            monitor.cancelled = True  # it ends at its next step, and the pool waits for that
            raise


def _make_monitor(module: Any, bars: PhaseBars) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """Shows the builder's phases; `cancelled` ends the build."""

        cancelled = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            bars.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            bars.advance(phase_name)
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            bars.finish(phase_name)

    return Monitor()
