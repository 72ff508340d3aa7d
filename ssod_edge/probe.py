"""Try an engine by running a 2x2 matrix product on each of its devices.

Each probe runs in a process of its own (`ssod_edge.doctor` starts it), because a broken driver may
crash or hang instead of raising.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssod_edge.optional import load
from ssod_edge.runtime.engines.onnxruntime import new_session

#: float32 [2, 2]; `FACTOR @ FACTOR` is exact in every floating-point format that an engine may choose.
FACTOR = np.array([[1, 2], [3, 4]], np.float32)
PRODUCT = np.array([[7, 10], [15, 22]], np.float32)

#: y = x @ x, with float32 [2, 2] x and y: IR version 8, opset 18. tests/test_doctor.py makes it again.
TINY_ONNX = Path(__file__).with_name("probe.onnx")

#: The "device" of an engine that makes plans; it runs nothing.
BUILDER = "builder"

#: A device's name, its status, and what to know about it or why it does not work.
Outcome = tuple[str, Literal["ok", "failed", "missing"], str]


def check(device: str, run: Callable[[], Any], detail: str = "") -> Outcome:
    """Run a product on a device and compare every digit."""
    try:
        result = np.asarray(run(), dtype=np.float32)
    except Exception as error:
        return device, "failed", first_line(error)
    if not np.array_equal(result, PRODUCT):
        return device, "failed", f"wrong result: {result.tolist()} instead of {PRODUCT.tolist()}"
    return device, "ok", detail


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def probe_onnxruntime() -> Iterator[Outcome]:
    """ONNX Runtime: each execution provider of this build that runs whole graphs by itself."""
    onnxruntime = load("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for provider in onnxruntime.get_available_providers():
        if provider == "AzureExecutionProvider":  # calls a remote service; nothing to try here
            continue

        def run(provider: str = provider) -> Any:
            session = new_session(TINY_ONNX.read_bytes(), options, [provider])
            if session.get_providers()[0] != provider:
                raise RuntimeError(f"{provider} could not be loaded; ONNX Runtime fell back to the CPU")
            return session.run(["y"], {"x": FACTOR})[0]

        yield check(provider.removesuffix("ExecutionProvider"), run)


def probe_openvino() -> Iterator[Outcome]:
    """OpenVINO: each device its plugins find."""
    openvino = load("openvino")
    ops = openvino.opset13
    x = ops.parameter([2, 2], np.float32)
    model = openvino.Model([ops.matmul(x, x, False, False)], [x])
    core = openvino.Core()
    for device in core.available_devices:
        name = core.get_property(device, "FULL_DEVICE_NAME")
        formats = ", ".join(sorted(core.get_property(device, "OPTIMIZATION_CAPABILITIES")))

        def run(device: str = device) -> Any:
            return core.compile_model(model, device)([FACTOR])[0]

        yield check(device, run, f"{name}; {formats}")


def probe_torch() -> Iterator[Outcome]:
    """PyTorch on the CPU and on each CUDA device, and what samples patches there (`ops.kernel_in_use`)."""
    import torch

    from ssod_edge.ops import kernel_in_use

    def kernel(device: str) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where it was not built is what this says
            return f"kernel: {kernel_in_use(device)}"

    def multiply(device: str) -> Any:
        x = torch.tensor(FACTOR, device=device)
        return (x @ x).cpu().numpy()

    yield check("CPU", lambda: multiply("cpu"), f"{torch.get_num_threads()} threads, {kernel('cpu')}")
    if not torch.cuda.is_available():
        reason = "this build of PyTorch has no CUDA" if torch.version.cuda is None else "no CUDA device or driver found"
        yield "CUDA", "missing", reason
    for index in range(torch.cuda.device_count()):
        device = f"cuda:{index}"
        major, minor = torch.cuda.get_device_capability(index)
        detail = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, {kernel(device)}"
        yield check(device.upper(), partial(multiply, device), detail)


def probe_plan(name: str) -> Iterator[Outcome]:
    """TensorRT or TensorRT for RTX: its builder, which for the first needs a GPU, and a plan on the first GPU."""
    from ssod_edge.errors import SsodEdgeError
    from ssod_edge.runtime.engines.cuda import open_gpu
    from ssod_edge.runtime.engines.plans import CUDA_EXTRAS
    from ssod_edge.runtime.engines.tensorrt import Session

    tensorrt = import_module(name)

    def build(capability: str | None) -> bytes:
        builder = tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR))
        network = builder.create_network()
        if not tensorrt.OnnxParser(network, tensorrt.Logger(tensorrt.Logger.ERROR)).parse(TINY_ONNX.read_bytes()):
            raise RuntimeError("it cannot parse an ONNX model")
        config = builder.create_builder_config()
        if hasattr(tensorrt, "ComputeCapability"):
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(tensorrt.ComputeCapability, f"SM{capability or '86'}"), 0)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError("it builds nothing")
        return bytes(memoryview(plan))

    try:
        build(None)
    except Exception as error:
        yield BUILDER, "failed", first_line(error)
        return
    yield BUILDER, "ok", ""
    try:
        gpu = open_gpu(extra=CUDA_EXTRAS[name])
    except SsodEdgeError as error:
        yield "CUDA", "missing", first_line(error)
        return

    number = gpu.compute_capability.replace(".", "")
    if hasattr(tensorrt, "ComputeCapability") and not hasattr(tensorrt.ComputeCapability, f"SM{number}"):
        yield "CUDA:0", "missing", f"no code for {gpu.name}, compute capability {gpu.compute_capability}"
        return

    def run() -> Any:
        session = Session(tensorrt, build(number), "probe", gpu)
        try:
            return session.run({"x": FACTOR})["y"]
        finally:
            session.close()

    yield check("CUDA:0", run, f"{gpu.name}, compute capability {gpu.compute_capability}")


def probe_pycuda() -> Iterator[Outcome]:
    """PyCUDA: the CUDA driver and its devices."""
    import pycuda.driver as cuda

    try:
        cuda.init()
    except Exception as error:
        yield "driver", "failed", first_line(error)
        return
    for index in range(cuda.Device.count()):
        yield f"CUDA:{index}", "ok", cuda.Device(index).name()


PROBES: dict[str, Callable[[], Iterator[Outcome]]] = {
    "onnxruntime": probe_onnxruntime,
    "openvino": probe_openvino,
    "torch": probe_torch,
    "tensorrt": partial(probe_plan, "tensorrt"),
    "tensorrt_rtx": partial(probe_plan, "tensorrt_rtx"),
    "pycuda": probe_pycuda,
}


def main(name: str) -> None:
    """Run one probe; the last line on stdout is its outcomes as JSON."""
    try:
        outcomes = list(PROBES[name]())
    except Exception as error:
        outcomes = [("", "failed", f"{type(error).__name__}: {first_line(error)}")]
    sys.stdout.write("\n" + json.dumps(outcomes) + "\n")
