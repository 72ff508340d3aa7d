"""TensorRT and TensorRT for RTX on a GPU, without torch: plans are opened and run, on any thread."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.errors import ArtifactError, EngineError, OutputError
from ssod_edge.files import write_atomic
from ssod_edge.runtime.engines.cuda import Buffer, Gpu, Graph, GraphError, open_gpu
from ssod_edge.runtime.engines.plans import (
    CUDA_EXTRAS,
    build_command,
    check_build,
    check_plan,
    load_for,
    make_logger,
    without_collection,
)
from ssod_edge.runtime.runner import Array, Runner, check_graph, check_images, check_process, closed_error
from ssod_edge.spec import VERDICT_INPUTS, Artifact, Spec

#: TensorRT's name of an element type -> numpy's. Its own `nptype` uses names that newer numpy lacks.
TYPES = {
    "BOOL": np.bool_, "UINT8": np.uint8, "INT8": np.int8,
    "INT32": np.int32, "INT64": np.int64, "HALF": np.float16, "FLOAT": np.float32,
}  # fmt: skip


class TrtRunner(Runner):
    """`ssod_edge.runtime.Runner` on TensorRT, TensorRT for RTX or the lean runtime of TensorRT.

    Several threads may call `infer` at once; each run has an execution context, a stream and pinned buffers of its
    own while it lasts. A batch above the plan's largest is run in parts, one below its smallest is filled up, which
    changes no image's numbers. When the same batch size comes again, the run is captured in a CUDA graph and from
    then on launched as one call.

    The network is strongly typed, so it computes in the precision of its graph; TF32 is off.

    Raises:
        MissingExtraError: TensorRT or pycuda is not installed.
        EngineError: they cannot be loaded, there is no such GPU, the plan is for another GPU or TensorRT, or TensorRT
            cannot open it.
        ArtifactError: the plan was changed, or is of another model.
        UsageError: `device` names no GPU.
    """

    def __init__(self, spec: Spec, artifact: Artifact, path: Path, device: str = "auto") -> None:
        self.spec, self._opened_in = spec, os.getpid()
        self.artifact = artifact
        self.engine = artifact.engine
        self.precision = artifact.precision
        check_build(artifact, path, spec)
        module = load_for(artifact)
        gpu = open_gpu(device, CUDA_EXTRAS[self.engine])
        self.device = gpu.name
        check_plan(artifact, path, module, gpu)
        # The bytes that are hashed are those that are loaded: a plan is code.
        plan = path.read_bytes()
        if hashlib.sha256(plan).hexdigest() != artifact.files[artifact.main_file]:
            raise ArtifactError(f"'{path}' was changed while it was opened. Open it again, or export the run again.")
        cache = _cache_file(artifact, gpu) if self.engine == "tensorrt_rtx" else None
        # The lean runtime in a version-compatible plan may run because these bytes are those of the spec.
        host_code = bool(artifact.build["version_compatible"])
        self._session = Session(module, plan, path.name, gpu, cache, host_code)
        try:
            check_graph(path, spec, spec.outputs, self._session.shapes)
        except BaseException:
            self._session.close()
            raise
        low, high = self._session.batch
        self.details = {
            "library": f"{module.__name__} {module.__version__}",
            "gpu": f"cuda:{gpu.index}, compute capability {gpu.compute_capability}",
            "batch": f"{low} to {high}",
            "cuda_graph": self._session.graphs,
        }

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a batch; see `ssod_edge.runtime.Runner.infer`.

        Raises:
            UsageError: wrong name, dtype or shape, or the runner is closed.
            EngineError: the GPU or TensorRT failed. After that, only a new runner may work.
        """
        check_process(self._opened_in)
        session = self._session
        images = check_images(inputs, self.spec.preprocess.input_size)
        values = session.run({"image": images}, self.verdict_inputs() if session.settings else None)
        self.details["cuda_graph"] = session.graphs
        return {name: values[name] for name in self.spec.outputs}


class Session:
    """A plan, open on a GPU. Inputs and outputs go by name.

    The first axis of all of them is the batch, but for the settings, `ssod_edge.spec.VERDICT_INPUTS`.

    Args:
        module: tensorrt, tensorrt_rtx or tensorrt_lean.
        plan: its bytes.
        name: of the plan, for messages.
        gpu: where it runs.
        cache: where TensorRT for RTX keeps the kernels it compiles for this plan; None keeps none.
        host_code: whether the plan may bring code that TensorRT loads into this process, as a version-compatible one
            does. Only for bytes that were checked.

    Attributes:
        batch: smallest and largest batch of one run.
        shapes: of each input and output; None where an axis is dynamic.
        graphs: what became of CUDA graphs, for reports.

    Raises:
        EngineError: TensorRT cannot open the plan on this GPU.
    """

    def __init__(
        self, module: Any, plan: bytes, name: str, gpu: Gpu, cache: Path | None = None, host_code: bool = False
    ) -> None:
        self._gpu, self._name, self._cache = gpu, name, cache
        self._engine_name = module.__name__.removesuffix("_lean")
        self._logger = make_logger(module)
        self._lock = threading.Lock()
        self._free: list[_Lane] = []
        self._lost: str | None = None
        self._closed = False
        with gpu.current(), without_collection():
            self._runtime: Any = module.Runtime(self._logger)
            if host_code:
                self._runtime.engine_host_code_allowed = True
            self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise EngineError(
                    f"{module.__name__} {module.__version__} cannot open '{name}' on '{gpu.name}': "
                    f"{self._logger.last()}. Build it again here with: {build_command(self._engine_name)}"
                )
            engine, inputs = self._engine, module.TensorIOMode.INPUT
            names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
            taken = tuple(name for name in names if engine.get_tensor_mode(name) == inputs)
            self.settings = tuple(name for name in taken if name in VERDICT_INPUTS)
            self.inputs = tuple(name for name in taken if name not in VERDICT_INPUTS)
            self.outputs = tuple(name for name in names if name not in taken)
            self.types = {name: TYPES[engine.get_tensor_dtype(name).name] for name in names}
            self.shapes: dict[str, list[int | None]] = {
                name: [axis if axis >= 0 else None for axis in engine.get_tensor_shape(name)] for name in names
            }
            fixed = self.shapes[self.inputs[0]][0]
            if fixed is not None:
                self.batch = (fixed, fixed)
            else:
                smallest, _, largest = engine.get_tensor_profile_shape(self.inputs[0], 0)
                self.batch = (int(smallest[0]), int(largest[0]))
            # TensorRT for RTX captures by itself, once it has compiled the kernels for a shape.
            strategy = getattr(module, "CudaGraphStrategy", None)
            self.captures = strategy is None
            self.graphs = "not yet" if self.captures else "left to TensorRT for RTX"
            self._config, self._kernels = self._configure(strategy)
            self._free.append(_Lane(self))  # what has no room fails here, not in the first run

    def _configure(self, strategy: Any) -> tuple[Any, Any]:
        """The runtime configuration and kernel cache of TensorRT for RTX; (None, None) for the others."""
        if strategy is None:
            return None, None
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE
        if self._cache is None:
            return config, None
        kernels = config.create_runtime_cache()
        # One that is damaged, or of another GPU or version, is refused by the library and replaced.
        if self._cache.is_file():
            kernels.deserialize(self._cache.read_bytes())
        config.set_runtime_cache(kernels)
        return config, kernels

    def create_context(self) -> Any:
        """An execution context with the first optimisation profile. Inside `Gpu.current`.

        Raises:
            UsageError: another thread has closed the session meanwhile.
            EngineError: there is no memory left for it.
        """
        with self._lock:
            if self._closed:
                raise closed_error()
            engine, config = self._engine, self._config
        # Not under the lock, since this takes long. The names keep both alive where another thread closes from here on:
        # this run then ends as one that was under way.
        context = engine.create_execution_context(*(() if config is None else (config,)))
        if context is None:
            raise EngineError(
                f"TensorRT cannot prepare '{self._name}' on '{self._gpu.name}': {self._logger.last()}. "
                "Close other programs that use the GPU, or build it with a smaller --batch: "
                f"{build_command(self._engine_name)}"
            )
        return context

    def run(self, inputs: Mapping[str, Array], settings: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run a batch of any size; see `TrtRunner`.

        Args:
            inputs: C-contiguous arrays [N, ...], N >= 1, of the plan's types and shapes.
            settings: the same object as long as nothing in it changes.

        Returns:
            arrays [N, ...] that belong to the caller.
        """
        n, largest = len(next(iter(inputs.values()))), self.batch[1]
        parts: list[dict[str, Array]] = []
        with self._gpu.current():
            lane = self._take()
            try:
                if settings is not None:
                    lane.set(settings)
                for start in range(0, n, largest):
                    part = {name: values[start : start + largest] for name, values in inputs.items()}
                    parts.append(lane.run(part))
            except BaseException as error:
                if isinstance(error, Exception):
                    self._lost = str(error)
                lane.free()
                raise
            self._give(lane)
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def failed(self, what: str) -> EngineError:
        """The error for a call of TensorRT that returned False."""
        return EngineError(
            f"TensorRT {what} '{self._name}' on '{self._gpu.name}': {self._logger.last()}. Open the artifact again; "
            "if that does not help, start the program again."
        )

    def _take(self) -> _Lane:
        with self._lock:
            if self._closed:
                raise closed_error()
            if self._lost is not None:
                raise EngineError(f"this runner failed before and is of no more use: {self._lost}")
            if self._free:
                return self._free.pop()
        return _Lane(self)

    def _give(self, lane: _Lane) -> None:
        with self._lock:
            if not self._closed:
                self._free.append(lane)
                return
        lane.free()

    def close(self) -> None:
        """Free everything; what still runs on another thread is freed when it ends. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            lanes, self._free = self._free, []
        try:
            with self._gpu.current():
                for lane in lanes:
                    lane.free()
                self._save_kernels()
                self._kernels = self._config = self._engine = self._runtime = None
        except EngineError as error:
            if self._lost is None:  # else it has been reported
                logging.getLogger("ssod_edge").warning("closing '%s': %s", self._name, error)

    def _save_kernels(self) -> None:
        """Keep what TensorRT for RTX compiled, for the next time. That it cannot be kept only costs time."""
        if self._kernels is None or self._cache is None or self._lost is not None:
            return
        kernels = self._kernels.serialize()
        if kernels is None:
            return
        content = bytes(memoryview(kernels))
        try:
            write_atomic(self._cache, lambda temporary: temporary.write_bytes(content))
        except OutputError as error:
            logging.getLogger("ssod_edge").warning("compiled kernels are not kept: %s", error)


class _Lane:
    """All that one run needs to itself: an execution context, a stream, buffers, and the graph of one batch size.

    Made, used and freed inside `Gpu.current`.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._context: Any = session.create_context()
        self._buffers: dict[str, Buffer] = {}
        self._graph: Graph | None = None
        self._n = 0
        self._settings: Mapping[str, Array] = {}
        with session._gpu.current() as driver:
            self._driver = driver
            self._stream: Any = driver.Stream()
            try:
                for name in (*session.inputs, *session.settings, *session.outputs):
                    shape = self._shape(name, session.batch[1])
                    self._buffers[name] = Buffer(driver, shape, session.types[name])
                    if not self._context.set_tensor_address(name, self._buffers[name].address):
                        raise session.failed(f"refuses a buffer for '{name}' of")
            except BaseException:
                self.free()
                raise

    def _shape(self, name: str, n: int) -> tuple[int, ...]:
        return tuple(n if axis is None else axis for axis in self._session.shapes[name])

    def set(self, settings: Mapping[str, Array]) -> None:
        """Bring the settings to the GPU, where they stay until they are others."""
        if settings is not self._settings:
            for name in self._session.settings:
                buffer = self._buffers[name]
                buffer.host[:] = settings[name]
                buffer.upload(len(buffer.host), self._stream)
            self._settings = settings

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch that is no larger than the plan's largest."""
        session = self._session
        given = len(next(iter(inputs.values())))
        n = max(given, session.batch[0])
        for name in session.inputs:
            host = self._buffers[name].host
            host[:given] = inputs[name]
            host[given:n] = 0
        if n != self._n:
            self._drop_graph()
            for name in session.inputs:
                if not self._context.set_input_shape(name, self._shape(name, n)):
                    raise session.failed(f"refuses a batch of {n} for")
            self._n = n
            self._enqueue()
        elif self._graph is not None:
            self._launch(self._graph)
        elif session.captures:
            self._capture()
        else:
            self._enqueue()
        self._stream.synchronize()
        return {name: self._buffers[name].host[:given].copy() for name in session.outputs}

    def _enqueue(self) -> None:
        for name in self._session.inputs:
            self._buffers[name].upload(self._n, self._stream)
        if not self._context.execute_async_v3(self._stream.handle):
            raise self._session.failed("cannot run")
        for name in self._session.outputs:
            self._buffers[name].download(self._n, self._stream)

    def _capture(self) -> None:
        """The second run of a batch size: the first one has set up what may not be captured."""
        try:
            self._graph = Graph(self._stream, self._enqueue)
        except (GraphError, EngineError, self._driver.Error) as error:
            # Without a graph it is only slower. An engine that really fails does so again right here.
            self._session.captures = False
            self._session.graphs = f"no: {error}"
            self._enqueue()
        else:
            self._session.graphs = "yes"
            self._launch(self._graph)

    def _launch(self, graph: Graph) -> None:
        try:
            graph.launch()
        except GraphError as error:
            raise self._session.failed(f"cannot launch the CUDA graph ({error}) of") from error

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.free()
            self._graph = None

    def free(self) -> None:
        """Give everything back, also from an unfinished `__init__` or run."""
        with suppress(Exception):  # of a GPU that was lost, nothing is to be waited for
            self._stream.synchronize()
        self._drop_graph()
        self._context = None
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers = {}
        self._stream = None


def _cache_file(artifact: Artifact, gpu: Gpu) -> Path:
    """Where the kernels of a plan are kept: with the user's own files, since they are code that no hash guards."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = f"{artifact.files[artifact.main_file]}-sm{gpu.compute_capability.replace('.', '')}.bin"
    return Path(root) / "ssod-edge" / "tensorrt-rtx" / name
