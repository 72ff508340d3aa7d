"""The CUDA driver through PyCUDA: one GPU, its context on any thread, pinned buffers, a stream, and CUDA graphs."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssod_edge.errors import EngineError, SsodEdgeError, UsageError, missing_extra
from ssod_edge.optional import is_there, load
from ssod_edge.runtime.runner import Array, check_process


@dataclass(frozen=True)
class Gpu:
    """A GPU, and its primary context.

    Attributes:
        index: the driver's number of it.
        name: e.g. "Orin".
        compute_capability: e.g. "8.7".
        context: PyCUDA's context; use `current`.
    """

    index: int
    name: str
    compute_capability: str
    context: Any

    @contextmanager
    def current(self) -> Iterator[Any]:
        """Make its context the calling thread's for the block; the value is `pycuda.driver`.

        A context belongs to the thread it was pushed on. Whatever allocates, runs or frees stands in such a block, so
        that any thread may do it, and the context that the thread had before is back afterwards.

        Raises:
            EngineError: the driver reports an error. After some of them, such as a device that was lost, nothing works
                any more in this process.
        """
        driver = _driver()
        try:
            self.context.push()
            try:
                yield driver
            finally:
                self.context.pop()
        except driver.Error as error:
            advice = "Start the program again; if that does not help, restart the machine."
            if isinstance(error, driver.MemoryError):
                advice = "Close other programs that use the GPU, or use a smaller batch or model."
            raise EngineError(f"the GPU '{self.name}' reports: {error}. {advice}") from error


def open_gpu(device: str = "auto", extra: str | None = None) -> Gpu:
    """The GPU called `device`.

    Args:
        device: "auto" is the first one; "cuda:1" is the driver's second.
        extra: of this package that the message names where pycuda is missing; None is the one that brings it alone.

    Raises:
        MissingExtraError: pycuda is not installed.
        EngineError: pycuda cannot be loaded, there is no driver, or no such GPU.
        UsageError: `device` is not the name of a GPU.
    """
    text = "cuda:0" if device in ("auto", "cuda") else device.lower()
    if not text.startswith("cuda:") or not text[5:].isdecimal():
        raise UsageError(f"TensorRT runs on a GPU: device must be auto or cuda:N, got '{device}'")
    if not is_there("pycuda"):
        raise missing_extra("pycuda", "running on a GPU", extra)
    check_process(_opened_in.setdefault(0, os.getpid()), "CUDA")
    return _open_gpu(int(text[5:]))


#: The process whose context it is.
_opened_in: dict[int, int] = {}


@functools.cache
def _open_gpu(index: int) -> Gpu:
    """One for each GPU and for the whole process: the primary context, which other libraries in it use too.

    It is never released. PyCUDA's `detach` leaves the released context on top of the thread's stack, where the next
    CUDA call of any library finds it dead.
    """
    driver = _driver()
    try:
        driver.init()
        count = driver.Device.count()
        if index >= count:
            names = ", ".join(f"cuda:{i} ({driver.Device(i).name()})" for i in range(count)) or "none"
            raise EngineError(f"there is no GPU 'cuda:{index}' here; there is: {names}")
        device = driver.Device(index)
        major, minor = device.compute_capability()
        return Gpu(index, device.name(), f"{major}.{minor}", device.retain_primary_context())
    except driver.Error as error:
        raise EngineError(f"the CUDA driver cannot be used: {error}. ssod-edge doctor shows what it finds.") from error


def has_gpu() -> bool:
    """Whether PyCUDA is installed and finds a GPU."""
    with suppress(SsodEdgeError):
        open_gpu()
        return True
    return False


def _driver() -> Any:
    return load("pycuda.driver")


class Buffer:
    """An array of the host, pinned so that copies need no second one, and room for it on the GPU.

    Made, used and freed inside `Gpu.current`.

    Args:
        driver: `pycuda.driver`.
        shape: of the largest array it has to hold; the first axis is the batch.
        dtype: of its elements.

    Attributes: `host`, the array, and its `address` on the GPU.
    """

    def __init__(self, driver: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self._driver = driver
        self.host: Array = driver.pagelocked_empty(shape, dtype)
        self._device = driver.mem_alloc(max(1, self.host.nbytes))
        self.address = int(self._device)

    def upload(self, n: int, stream: Any) -> None:
        """Copy the first n rows to the GPU, in the order of the stream."""
        self._driver.memcpy_htod_async(self._device, self.host[:n], stream)

    def download(self, n: int, stream: Any) -> None:
        """Copy the first n rows from the GPU, in the order of the stream."""
        self._driver.memcpy_dtoh_async(self.host[:n], self._device, stream)

    def free(self) -> None:
        """Give both back. A GPU that was lost frees nothing, which is no error any more."""
        with suppress(self._driver.Error):
            self._device.free()
        self.host = np.empty(0, self.host.dtype)


class Graph:
    """Work of a stream, captured once and launched as one call, through the driver's C interface: PyCUDA has no graphs,
    and NVIDIA's `cuda-bindings`, which has them, comes with no JetPack and is 108 MB more there for these six calls.

    Args:
        stream: PyCUDA's stream.
        enqueue: puts the work on the stream; nothing in it may wait for the GPU or allocate.

    Raises:
        GraphError: the work cannot be captured; nothing of it ran.
    """

    def __init__(self, stream: Any, enqueue: Callable[[], None]) -> None:
        self._stream = ctypes.c_void_p(stream.handle)
        self._executable = ctypes.c_void_p()
        graph = ctypes.c_void_p()
        _call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(_CAPTURE_THREAD_LOCAL))
        try:
            try:
                enqueue()
            except BaseException:
                with suppress(GraphError):  # it ends the capture even where it says that the capture is void
                    _call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
                raise
            _call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
            _call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        finally:
            _destroy("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Put the captured work on its stream."""
        _call("cuGraphLaunch", self._executable, self._stream)

    def free(self) -> None:
        """Safe to call twice."""
        _destroy("cuGraphExecDestroy", self._executable)
        self._executable = ctypes.c_void_p()


class GraphError(Exception):
    """The driver refused a call about a CUDA graph."""


#: Calls of other threads that may not be captured do not disturb this thread's capture.
_CAPTURE_THREAD_LOCAL = 1


@functools.cache
def _libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    try:
        code = getattr(_libcuda(), name)(*arguments)
    except (OSError, AttributeError) as error:  # no driver, or one that is older than CUDA 11.4
        raise GraphError(str(error)) from error
    if code != 0:
        raise GraphError(f"{name} failed with CUDA error {code}")


def _destroy(name: str, handle: ctypes.c_void_p) -> None:
    if handle:
        with suppress(GraphError):
            _call(name, handle)
