"""OpenVINO, tuned for the latency of one request."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.errors import EngineError
from ssod_edge.files import unicode_path
from ssod_edge.machine import engine_threads
from ssod_edge.optional import load
from ssod_edge.runtime.engines.loading import cannot_load, failed_run
from ssod_edge.runtime.forks import is_child, keep_in_children, leave_signal_stack, never_destroy
from ssod_edge.runtime.runner import Array, Runner, check_graph, check_images, check_process, closed_error
from ssod_edge.spec import Artifact, Spec

#: OpenVINO's names of element types -> ours.
PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}
#: Layers of a device's own graph that do nearly all of the arithmetic.
HEAVY_LAYERS = ("Convolution", "FullyConnected", "MatMul")


class OpenVinoRunner(Runner):
    """`ssod_edge.runtime.Runner` on OpenVINO.

    An IR's precision is how it is stored; what it is computed in is a hint, which machines with AMX set to bf16 by
    themselves. So it is pinned: to fp32 for fp32 artifacts, and for all on the CPU, whose plugin would take the last
    layer to 16 bits with the rest, and a 16-bit last layer makes tied scores. On other devices fp16 artifacts run in
    fp16 where they can. `precision` is read back from the compiled model: an int8 artifact's is "int8" where the device
    runs its convolutions so, and what it falls back to elsewhere.

    One image is run by a model that was compiled for one: of any number, OpenVINO works out every layer's shape anew
    each time. More images have one for any number, compiled when
    they first come.

    With `bf16` an fp32 artifact is computed in bf16, to measure what that would bring; nothing ships so.

    A graph with fewer `outputs` than the fused one's is for measuring only.

    Raises:
        MissingExtraError: openvino is not installed.
        EngineError: openvino cannot be loaded, the device does not exist, or it cannot run the model.
        ArtifactError: the graph is not the one that the spec describes.
    """

    engine = "openvino"

    def __init__(
        self,
        spec: Spec,
        artifact: Artifact,
        path: Path,
        device: str = "auto",
        threads: int | None = None,
        outputs: tuple[str, ...] | None = None,
        bf16: bool = False,
    ) -> None:
        openvino = load("openvino")
        device = "CPU" if device == "auto" else device
        core = shared_core()
        if device not in core.available_devices:
            raise EngineError(f"OpenVINO has no device '{device}' here; it has: {', '.join(core.available_devices)}")
        self.spec, self._opened_in = spec, os.getpid()
        self.artifact = artifact
        outputs = outputs or spec.outputs
        precision = "bf16" if bf16 else artifact.precision
        config = request_config(device, precision, core.get_property(device, "OPTIMIZATION_CAPABILITIES"), threads)
        try:
            model = read_ir(path)
            check_graph(path, spec, outputs, _shapes(model))
            single = model.clone()
            single.reshape({"image": [1, *model.input("image").get_partial_shape()[1:]]})
            request = open_request(single, device, config)
        except RuntimeError as error:
            raise cannot_load("openvino", openvino.__version__, artifact, path, error) from error
        self._single: _Compiled | None = _Compiled(request, outputs)
        self._several: _Compiled | None = None
        self._compile: Callable[[], _Compiled] = lambda: _Compiled(open_request(model, device, config), outputs)
        self._lock = threading.Lock()  # two threads in one request get each other's outputs, and no error
        compiled = request.get_compiled_model()
        element = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        self.precision = PRECISIONS.get(element, element)
        if artifact.precision == "int8" and _runs_int8(compiled):
            self.precision = "int8"
        self.device = ", ".join(compiled.get_property("EXECUTION_DEVICES"))
        self.details = {"device_name": str(core.get_property(device, "FULL_DEVICE_NAME")).strip()}
        if device == "CPU":
            self.details["threads"] = str(compiled.get_property("INFERENCE_NUM_THREADS"))

    def __exit__(self, *_: object) -> None:
        if self._opened_in != os.getpid():  # a thread that is not here may hold the lock
            return
        with self._lock:
            self._single = self._several = None
            self._compile = _closed

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a batch; see `ssod_edge.runtime.Runner.infer`."""
        check_process(self._opened_in)
        images = check_images(inputs, self.spec.preprocess.input_size)
        with self._lock:
            if self._single is None:
                raise closed_error()
            try:
                if len(images) == 1:
                    return self._single.run(images, self.verdict_inputs)
                self._several = self._several or self._compile()
                return self._several.run(images, self.verdict_inputs)
            except RuntimeError as error:
                raise failed_run("openvino", error) from error


def _closed() -> _Compiled:
    raise closed_error()


class _Compiled:
    """A compiled model with the memory that it reads and writes, for batches of the size of the last one."""

    def __init__(self, request: Any, outputs: Sequence[str]) -> None:
        self._request, self._outputs = request, outputs
        self._tensor = load("openvino").Tensor
        self._pixels: Any = np.zeros((0, 3, 0, 0), np.uint8)
        self._values: dict[str, Any] = {}
        self._beside: Mapping[str, Array] = {}

    def run(self, images: Array, beside: Callable[[], Mapping[str, Array]]) -> dict[str, Array]:
        """uint8 [N, 3, S, S], and what gives the inputs beside it -> the outputs.

        Copying the image costs less than naming another place to read it from, and the outputs less than asking where
        they are; OpenVINO's `infer` would do all of it, in more time.
        """
        if self._pixels.shape != images.shape:
            self._make_room(images.shape)
        if "known" in self._outputs and self._beside is not (values := beside()):
            self._beside = values
            for name, value in values.items():
                self._request.set_tensor(name, self._tensor(value))
        np.copyto(self._pixels, images)
        self._request.start_async()
        self._request.wait()
        return {name: value.copy() for name, value in self._values.items()}

    def _make_room(self, shape: tuple[int, ...]) -> None:
        """Give the request an input of this shape and outputs for as many images, as arrays to copy to and from."""
        openvino = load("openvino")
        pixels = openvino.Tensor(openvino.Type.u8, openvino.Shape(list(shape)))
        self._request.set_tensor("image", pixels)
        for name in self._outputs:
            port = self._request.get_compiled_model().output(name)
            axes = [axis.get_length() for axis in list(port.get_partial_shape())[1:]]
            tensor = openvino.Tensor(port.get_element_type(), openvino.Shape([shape[0], *axes]))
            self._request.set_tensor(port, tensor)
            self._values[name] = tensor.data
        self._pixels = pixels.data


def shared_core() -> Any:
    """One for the whole process, never destroyed; a process that was forked from one that used it gets its own.

    Raises:
        EngineError: OpenVINO would wait for ever for threads that the fork did not take along, see `_Threads`.

    The CPU plugin of a Core gives the main thread a signal stack of its own and, when it goes, puts back the one it
    found. Of two Cores that go in the order they came, the second puts back the first one's, which is no longer mapped,
    and the next signal (a Ctrl-C, the end of a child process) is a segmentation fault.
    """
    if _threads.lost:
        raise EngineError(
            "this process was forked from one in which OpenVINO had closed a model and had another one open, and would "
            "wait for ever for the threads of the former. Open models after the fork only, or start processes with the "
            "method 'spawn'"
        )
    return _core(os.getpid())


class _Threads:
    """OpenVINO keeps the threads of a closed model for the next one that is like it; in a forked process they are not
    there, and the next model would wait for them. Unloading the plugin, which takes that no model is open, ends them.

    Attributes:
        kept: whether threads of closed models wait for the next one.
        lost: whether they did so in the process that this one was forked from.
    """

    def __init__(self) -> None:
        self.kept = self.lost = False
        self._requests: weakref.WeakSet[Any] = weakref.WeakSet()
        self._devices: set[str] = set()  # whose plugins were loaded
        os.register_at_fork(before=self._before_fork, after_in_child=self._in_child)

    def open_request(self, model: Any, device: str, config: dict[str, str]) -> Any:
        """See the function of this name."""
        core = shared_core()
        self._devices.add(device)
        try:
            request = core.compile_model(model, device, config).create_infer_request()
        except RuntimeError:
            self.kept = True
            raise
        self._requests.add(request)
        weakref.finalize(request, self._closed).atexit = False
        return keep_in_children(request)

    def _closed(self) -> None:
        self.kept = True

    def _before_fork(self) -> None:
        in_main = threading.current_thread() is threading.main_thread()  # whose signal stack the plugin has set
        if self.kept and not self._requests and in_main and not is_child():
            for device in self._devices:
                _core(os.getpid()).unload_plugin(device)
            leave_signal_stack()
            self.kept = False

    def _in_child(self) -> None:
        self.lost, self.kept = self.lost or self.kept, False
        self._requests.clear()
        self._devices.clear()


_threads = _Threads()


def read_ir(path: Path) -> Any:
    """An `openvino.Model` of a file, of whatever name."""
    with unicode_path(path) as name:
        return shared_core().read_model(name)


def open_request(model: Any, device: str, config: Mapping[str, str]) -> Any:
    """A request of a compiled model: of a file's name, or of an `openvino.Model`.

    Raises:
        RuntimeError: OpenVINO's, where it cannot.
    """
    return _threads.open_request(model, device, dict(config))


@functools.cache
def _core(process: int) -> Any:
    core = keep_in_children(load("openvino").Core())
    if is_child():  # its plugin would end the threads of both processes
        never_destroy(core)
    return core


def cpu_capabilities() -> list[str]:
    """The types that OpenVINO computes in on this CPU, by its names: "FP32", "BF16", "FP16", "INT8"."""
    types = ("FP32", "BF16", "FP16", "INT8")
    return [name for name in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") if name in types]


def _shapes(model: Any) -> dict[str, list[int | None]]:
    """Name of an input or output -> its axes, None where one is dynamic; empty if their number is."""
    found: dict[str, list[int | None]] = {}
    for port in (*model.inputs, *model.outputs):
        shape = port.get_partial_shape()
        axes = [] if shape.rank.is_dynamic else [None if a.is_dynamic else a.get_length() for a in shape]
        found |= dict.fromkeys(port.get_names(), axes)
    return found


def _runs_int8(compiled: Any) -> bool:
    """Whether a device runs convolutions or matrix products in int8, by the types of its own graph."""
    layers = (op.get_rt_info() for op in compiled.get_runtime_model().get_ops())
    heavy = (info for info in layers if "layerType" in info and info["layerType"].astype(str) in HEAVY_LAYERS)
    return any(info["runtimePrecision"].astype(str) in ("i8", "u8") for info in heavy)


def request_config(
    device: str, precision: str, capabilities: Sequence[str] = (), threads: int | None = None
) -> dict[str, str]:
    """One request, as fast as it can be, in the precision that `OpenVinoRunner` promises."""
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if device == "CPU":
        config["NUM_STREAMS"] = "1"
        if (limit := engine_threads(threads)) is not None:
            config["INFERENCE_NUM_THREADS"] = str(limit)
    elif precision == "fp16" and "FP16" in capabilities:
        config["INFERENCE_PRECISION_HINT"] = "f16"
    if precision == "bf16":
        config["INFERENCE_PRECISION_HINT"] = "bf16"
    return config
