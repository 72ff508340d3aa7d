"""Stand-ins for PyCUDA and TensorRT that check how they are used: contexts, streams, addresses, lifetimes.

The stand-in for an engine copies bytes: each image holds the outputs that it shall give, as float32 in its first bytes.
`ByteEngine` does so through whatever driver it is given, so that the GPU tests run it on the real one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ssod_edge.config import Preprocess
from ssod_edge.detect.confidence import p_known, verdict_inputs
from ssod_edge.detect.scores import ood_scores, probabilities
from ssod_edge.files import sha256_file
from ssod_edge.runtime.engines import cuda
from ssod_edge.runtime.engines.plans import plan_key
from ssod_edge.spec import LOGIT_OUTPUTS, VERDICT_INPUTS, VERDICT_OUTPUTS, Artifact, Spec, Threshold, save_spec

SIZE = 8
CLASSES = ("red", "green", "blue")
OUTPUTS = (*LOGIT_OUTPUTS, *VERDICT_OUTPUTS)
VERSION = "10.3.0"
#: What the bytes of `byte_images` were made for; earlier releases wrote it without quantiles.
THRESHOLD = Threshold(-1.0, 0.95, 100, "calib", 0.95)


class FakeDriver(ModuleType):
    """`pycuda.driver`: memory is bytes of the host, a stream runs what it holds when it is waited for."""

    def __init__(self, gpus: tuple[tuple[str, int, int], ...] = (("Orin", 8, 7), ("Orin NX", 8, 7), ("RTX", 8, 9))):
        super().__init__("pycuda.driver")
        self.gpus = gpus
        self.memory: dict[int, np.ndarray] = {}
        self.streams: dict[int, Any] = {}
        self.lost = False
        self.free_bytes = 1 << 30
        self.local = threading.local()
        self.addresses = itertools.count(1 << 20, 1 << 24)
        driver = self

        class Error(Exception):
            pass

        class LogicError(Error):
            pass

        class LaunchError(Error):
            pass

        class MemoryError(Error):
            pass

        class Context:
            def push(self) -> None:
                driver.stack().append(self)

            def pop(self) -> None:
                assert driver.stack().pop() is self

        class Device:
            def __init__(self, index: int) -> None:
                self.index = index

            @staticmethod
            def count() -> int:
                return len(driver.gpus)

            def name(self) -> str:
                return driver.gpus[self.index][0]

            def compute_capability(self) -> tuple[int, int]:
                return driver.gpus[self.index][1:]

            def retain_primary_context(self) -> Context:
                return Context()

        class Stream:
            def __init__(self) -> None:
                driver.check_context()
                self.handle = next(driver.addresses)
                self.work: list[Callable[[], None]] = []
                self.captured: list[Callable[[], None]] | None = None
                driver.streams[self.handle] = self

            def add(self, work: Callable[[], None]) -> None:
                driver.check_context()
                (self.work if self.captured is None else self.captured).append(work)

            def synchronize(self) -> None:
                driver.check_context()
                assert self.captured is None, "a stream that is captured may not be waited for"
                driver.check_alive()
                work, self.work = self.work, []
                for step in work:
                    step()

        class Allocation:
            def __init__(self, size: int) -> None:
                driver.check_context()
                if size > driver.free_bytes:
                    raise MemoryError("cuMemAlloc failed: out of memory")
                self.address = next(driver.addresses)
                driver.memory[self.address] = np.zeros(size, np.uint8)

            def __int__(self) -> int:
                return self.address

            def free(self) -> None:
                driver.check_context()
                driver.memory.pop(self.address)

        self.Error, self.LogicError, self.LaunchError, self.MemoryError = Error, LogicError, LaunchError, MemoryError
        self.Device, self.Stream, self.mem_alloc = Device, Stream, Allocation

    def stack(self) -> list[Any]:
        """The contexts of the calling thread."""
        if not hasattr(self.local, "stack"):
            self.local.stack = []
        return self.local.stack

    def check_context(self) -> None:
        if not self.stack():
            raise self.LogicError("invalid device context - no currently active context?")

    def check_alive(self) -> None:
        if self.lost:
            raise self.LaunchError("cuStreamSynchronize failed: unspecified launch failure")

    def init(self) -> None:
        if not self.gpus:
            raise self.LogicError("cuInit failed: no CUDA-capable device is detected")

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        self.check_context()
        return np.full(shape, 77, dtype)

    def memcpy_htod_async(self, device: Any, host: np.ndarray, stream: Any) -> None:
        assert host.flags.c_contiguous
        stream.add(lambda: self.write(int(device), host.view(np.uint8).reshape(-1)))

    def memcpy_dtoh_async(self, host: np.ndarray, device: Any, stream: Any) -> None:
        assert host.flags.c_contiguous and host.flags.writeable
        target = host.reshape(-1).view(np.uint8)
        stream.add(lambda: target.__setitem__(slice(None), self.memory[int(device)][: target.size]))

    def write(self, address: int, content: np.ndarray) -> None:
        self.memory[address][: content.size] = content

    def copy(self, target: int, source: int, size: int, handle: int) -> None:
        """Device to device, in the order of the stream."""
        (target, target_at), (source, source_at) = self.find(target), self.find(source)

        def work() -> None:
            self.memory[target][target_at : target_at + size] = self.memory[source][source_at : source_at + size]

        self.streams[handle].add(work)

    def find(self, address: int) -> tuple[int, int]:
        """The allocation that holds an address, and the offset in it."""
        base = max(start for start in self.memory if start <= address)
        assert address - base < self.memory[base].size, "an address outside every allocation"
        return base, address - base

    def graph_call(self, name: str, *arguments: Any) -> None:
        """What `ssod_edge.runtime.engines.cuda` asks of the driver's C interface."""
        values = [argument.value if hasattr(argument, "value") else argument._obj for argument in arguments]
        if name == "cuStreamBeginCapture_v2":
            self.streams[values[0]].captured = []
        elif name == "cuStreamEndCapture":
            stream = self.streams[values[0]]
            values[1].value = next(self.addresses)
            self.graphs[values[1].value] = stream.captured
            stream.captured = None
        elif name == "cuGraphInstantiateWithFlags":
            values[0].value = next(self.addresses)
            self.graphs[values[0].value] = self.graphs[values[1]]
        elif name == "cuGraphLaunch":
            self.launches += 1
            self.streams[values[1]].work += self.graphs[values[0]]
        else:
            assert name in ("cuGraphDestroy", "cuGraphExecDestroy")
            del self.graphs[values[0]]

    #: Of `graph_call`: handles that live, and graphs that were launched.
    graphs: dict[int, Any]
    launches = 0


class ByteEngine:
    """An engine whose plan is JSON: {"batch": [min, max], "size": S, "classes": M, "version": V, "lean_runtime": L}."""

    def __init__(self, plan: dict[str, Any], fake: FakeTensorRT) -> None:
        self.fake, self.plan = fake, plan
        low, high = plan["batch"]
        size, m = plan["size"], plan["classes"]
        n = -1 if low < high else low
        self.shape: dict[str, tuple[int, ...]] = {"image": (n, 3, size, size)}
        self.shape |= {name: value.shape for name, value in verdict_inputs(None).items()}
        self.shape |= {name: (n, m) if name in ("logits", "probs") else (n,) for name in OUTPUTS}
        self.outputs = plan.get("outputs", OUTPUTS)
        self.names = ["image", *(VERDICT_INPUTS if "known" in self.outputs else ()), *self.outputs]
        self.num_io_tensors = len(self.names)
        self.get_tensor_name = self.names.__getitem__
        self.get_tensor_shape = self.shape.__getitem__

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in ("image", *VERDICT_INPUTS) else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name={"image": "UINT8", "known": "BOOL"}.get(name, "FLOAT"))

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert (name, profile) == ("image", 0)
        low, high = self.plan["batch"]
        return [(n, *self.shape["image"][1:]) for n in (low, low, high)]

    def create_execution_context(self, config: Any = None) -> Any:
        assert (config is not None) == (self.fake.__name__ == "tensorrt_rtx")
        self.fake.check_context()
        return None if self.fake.no_context else ByteContext(self)

    def create_runtime_config(self) -> Any:
        return FakeConfig(self.fake)


class FakeConfig:
    """`IRuntimeConfig` of TensorRT for RTX, which is its own runtime cache here."""

    def __init__(self, fake: FakeTensorRT) -> None:
        self.fake = fake
        self.cuda_graph_strategy = "DISABLED"

    def create_runtime_cache(self) -> FakeConfig:
        return self

    def set_runtime_cache(self, cache: Any) -> bool:
        assert cache is self
        return True

    def deserialize(self, content: bytes) -> bool:
        self.fake.kernels_read.append(content)
        return True

    def serialize(self) -> bytes:
        return b"compiled kernels"


class ByteContext:
    """An execution context: one run at a time, with the shapes and addresses that were set."""

    def __init__(self, engine: ByteEngine) -> None:
        self.engine, self.fake = engine, engine.fake
        self.address: dict[str, int] = {}
        self.n = 0
        self.running = threading.Lock()
        self.fake.contexts.append(self)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self.engine.plan["batch"]
        self.n = shape[0]
        return name == "image" and low <= shape[0] <= high and tuple(shape[1:]) == self.engine.shape["image"][1:]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.address[name] = address
        return name in self.engine.names and not self.fake.refuse_address

    def execute_async_v3(self, handle: int) -> bool:
        self.fake.check_context()
        assert self.running.acquire(blocking=False), "two threads use one execution context"
        try:
            self.fake.executed()
            if self.fake.fails:
                self.fake.log("ERROR", "Error Code 1: Cuda Runtime\n (an illegal memory access)")
                return False
            assert self.n > 0, "the input's shape was not set"
            image, offset = int(np.prod(self.engine.shape["image"][1:])), 0
            for name in self.engine.outputs:
                width = (1 if name == "known" else 4) * int(np.prod(self.engine.shape[name][1:]))
                for row in range(self.n):
                    source = self.address["image"] + row * image + offset
                    self.fake.copy(self.address[name] + row * width, source, width, handle)
                offset += width
            return True
        finally:
            self.running.release()


class FakeTensorRT(ModuleType):
    """`tensorrt`, `tensorrt_rtx` or `tensorrt_lean`, on a driver.

    Args:
        copy: moves bytes on the device: target, source, size, handle of the stream.
        check_context: raises where the calling thread has no CUDA context.
    """

    def __init__(
        self, name: str, version: str, copy: Callable[..., None], check_context: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__version__ = version
        self.copy, self.check_context = copy, check_context
        self.no_context = self.refuse_address = self.fails = False
        self.executed: Callable[[], None] = lambda: None
        self.contexts: list[ByteContext] = []
        self.kernels_read: list[bytes] = []
        self.loggers: list[Any] = []
        self.TensorIOMode = SimpleNamespace(INPUT="INPUT")
        fake = self

        class ILogger:
            Severity = SimpleNamespace(INTERNAL_ERROR="INTERNAL_ERROR", ERROR="ERROR", WARNING="WARNING", INFO="INFO")

            def __init__(self) -> None:
                fake.loggers.append(self)

        class Runtime:
            def __init__(self, logger: Any) -> None:
                fake.check_context()
                self.engine_host_code_allowed = False

            def deserialize_cuda_engine(self, plan: bytes) -> ByteEngine | None:
                fake.check_context()
                fake.log("INFO", "deserialising")
                try:
                    content = json.loads(plan)
                except ValueError:
                    fake.log("ERROR", "Error Code 4: the plan file has a wrong magic tag")
                    return None
                if content["lean_runtime"]:
                    if not self.engine_host_code_allowed:
                        fake.log("ERROR", "Error Code 6: the plan holds host code, which is not allowed")
                        return None
                    return ByteEngine(content, fake)
                assert not self.engine_host_code_allowed, "host code is allowed for a plan that has none"
                if fake.__name__ == "tensorrt_lean" or content["version"] != fake.__version__:
                    fake.log("ERROR", "Error Code 6: the plan file is not compatible with this version of TensorRT")
                    return None
                return ByteEngine(content, fake)

        self.ILogger, self.Runtime = ILogger, Runtime
        if name == "tensorrt_rtx":
            self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE")

    def log(self, severity: str, message: str) -> None:
        self.loggers[-1].log(severity, message)


def install(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None, *modules: ModuleType, graphs: bool = True
) -> None:
    """Put the stand-ins where imports find them; a TensorRT that is not given cannot be found, nor can pycuda."""
    monkeypatch.delitem(sys.modules, "pycuda.driver", raising=False)
    for name in ("tensorrt", "tensorrt_lean", "tensorrt_rtx", "pycuda"):
        monkeypatch.setitem(sys.modules, name, None)
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    if driver is not None:
        package = ModuleType("pycuda")
        package.__spec__, package.__path__, package.driver = ModuleSpec("pycuda", None), [], driver
        monkeypatch.setitem(sys.modules, "pycuda", package)
        monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
        driver.graphs = {}
        if graphs:
            monkeypatch.setattr(cuda, "_call", driver.graph_call)
    cuda._open_gpu.cache_clear()


def byte_images(n: int, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images uint8 [n, 3, S, S] for a `ByteEngine`, and the outputs that they hold."""
    rng = np.random.default_rng(seed)
    logits, id_logit = rng.normal(0, 3, (n, 3)).astype(np.float32), rng.normal(0, 3, n).astype(np.float32)
    outputs = {
        "logits": logits,
        "probs": probabilities(logits).astype(np.float32),
        "id_logit": id_logit,
        "ood_score": ood_scores(logits, id_logit)["energy"].astype(np.float32),
    }
    threshold = verdict_inputs(THRESHOLD)
    outputs["p_known"] = p_known(outputs["ood_score"], threshold)
    outputs["known"] = outputs["ood_score"] <= threshold["threshold"]
    images = rng.integers(0, 256, (n, 3 * SIZE * SIZE), dtype=np.uint8)
    packed = np.concatenate([outputs[name].reshape(n, -1).view(np.uint8) for name in OUTPUTS], axis=1)
    images[:, : packed.shape[1]] = packed
    return images.reshape(n, 3, SIZE, SIZE), outputs


def write_export(
    folder: Path,
    engine: str = "tensorrt",
    batch: tuple[int, int] = (1, 8),
    outputs: tuple[str, ...] = OUTPUTS,
    **build: Any,
) -> Path:
    """An export whose one artifact is a plan for a `ByteEngine`, not verified yet.

    Args:
        folder: the export's.
        engine, batch, outputs: of the plan.
        build: what `Artifact.build` says otherwise; a version-compatible plan has the lean runtime in it.
    """
    name = f"{engine.replace('_', '-')}-fp32"
    plan = folder / name / "model.plan"
    plan.parent.mkdir(parents=True)
    images, values = byte_images(20, seed=9)
    logits, id_logit = values["logits"], values["id_logit"]
    scores = {f"score_{score}": value for score, value in ood_scores(logits, id_logit).items()}
    np.savez(folder / "reference.npz", image=images, label=logits.argmax(1), logits=logits, id_logit=id_logit, **scores)
    record = {
        "onnx_sha256": "0" * 64,
        "engine": engine,
        "version": VERSION,
        "gpu": "Orin" if engine == "tensorrt" else None,
        "compute_capabilities": ["8.7"] if engine == "tensorrt" else ["8.6", "8.7", "8.9"],
        "precision": "fp32",
        "batch": [batch[0], batch[0], batch[1]],
        "version_compatible": False,
        **build,
    }
    holds = {"version": record["version"], "lean_runtime": record["version_compatible"]}
    content = {"batch": batch, "size": SIZE, "classes": len(CLASSES), "outputs": outputs, **holds}
    plan.write_text(json.dumps(content), encoding="utf-8")
    artifact = Artifact(
        name=name,
        engine=engine,
        precision="fp32",
        files={f"{name}/model.plan": sha256_file(plan)},
        opset=18,
        versions={engine: VERSION},
        threshold=THRESHOLD,
        build={**record, "key": plan_key(record)},
    )
    spec = Spec(
        backbone="bytes",
        classes=CLASSES,
        preprocess=Preprocess(input_size=SIZE),
        score={"name": "energy", "evidence": "default"},
        trained=True,
        reference_sha256=sha256_file(folder / "reference.npz"),
        artifacts=(artifact,),
        outputs=outputs,
    )
    save_spec(spec, folder)
    return folder


@contextlib.contextmanager
def outer_context(driver: FakeDriver) -> Any:
    """Another library's context on this thread, which must be there again after each call."""
    marker = object()
    driver.stack().append(marker)
    yield
    assert driver.stack().pop() is marker and not driver.stack()
