"""The TensorRT runner on a GPU: `make test-gpu`.

The first part needs no TensorRT: PyCUDA's contexts, threads, pinned buffers, streams and graphs are real, driven by the
runner's own code, and only the engine is a stand-in that copies bytes on the GPU. The last test runs a real plan, and
is skipped, with the reason, where TensorRT has no code for the GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeTensorRT, byte_images, write_export

from ssod_edge.errors import EngineError, SsodEdgeError
from ssod_edge.runtime.engines import cuda
from ssod_edge.runtime.engines.cuda import Buffer, Gpu, Graph, open_gpu
from ssod_edge.runtime.open import open_runner


def missing() -> str | None:
    """Why these tests cannot run."""
    try:
        open_gpu()
    except SsodEdgeError as error:
        return str(error)
    return None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=f"needs PyCUDA and a GPU: {missing()}")]


@pytest.fixture
def gpu() -> Gpu:
    return open_gpu()


@pytest.fixture
def export(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export for a stand-in engine that runs on the real driver."""

    def copy(target: int, source: int, size: int, handle: int) -> None:
        call = cuda._libcuda().cuMemcpyDtoDAsync_v2
        code = call(*(ctypes.c_size_t(value) for value in (target, source, size)), ctypes.c_void_p(handle))
        assert code == 0

    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT("tensorrt", "10.3.0", copy))
    capability = [gpu.compute_capability]
    return write_export(tmp_path / "export", batch=(2, 8), gpu=gpu.name, compute_capabilities=capability)


def stack_is_empty() -> bool:
    """Whether this thread has no CUDA context."""
    handle = ctypes.c_void_p()
    assert cuda._libcuda().cuCtxGetCurrent(ctypes.byref(handle)) == 0
    return not handle


def free_memory(gpu: Gpu) -> int:
    with gpu.current() as driver:
        return int(driver.mem_get_info()[0])


@pytest.mark.parametrize("n", [1, 2, 8, 21])
def test_numbers_survive_the_way_through_the_gpu(export: Path, n: int) -> None:
    assert stack_is_empty()
    with open_runner(export) as runner:
        for seed in range(6):
            images, expected = byte_images(n, seed)
            outputs = runner.infer({"image": images})
            for name, values in expected.items():
                np.testing.assert_array_equal(outputs[name], values)
            assert stack_is_empty()
        if n <= 8:
            assert runner.details["cuda_graph"] == "yes"


def test_many_threads_use_one_runner(export: Path) -> None:
    with open_runner(export) as runner:

        def work(seed: int) -> None:
            images, expected = byte_images(1 + seed % 8, seed)
            outputs = runner.infer({"image": images})
            for name, values in expected.items():
                np.testing.assert_array_equal(outputs[name], values)
            assert stack_is_empty()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(400)))


def test_nothing_is_left_behind(gpu: Gpu, export: Path) -> None:
    images, _ = byte_images(8)

    def once() -> None:
        with open_runner(export) as runner, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: runner.infer({"image": images}), range(16)))
        runner.__exit__(None, None, None)

    once()
    before = free_memory(gpu)
    for _ in range(20):
        once()
    assert free_memory(gpu) >= before - (8 << 20)


def test_a_runner_opened_on_a_thread_that_has_ended(export: Path) -> None:
    opened = []
    thread = threading.Thread(target=lambda: opened.append(open_runner(export)))
    thread.start()
    thread.join()
    images, expected = byte_images(3)
    with opened[0] as runner:
        np.testing.assert_array_equal(runner.infer({"image": images})["logits"], expected["logits"])


def test_the_context_of_another_library_is_back_afterwards(export: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch as the other library")
    x = torch.arange(8, device="cuda")
    images, expected = byte_images(3)
    with open_runner(export) as runner:
        np.testing.assert_array_equal(runner.infer({"image": images})["logits"], expected["logits"])
        assert int((x + 1).sum()) == 36
    assert int((x + 2).sum()) == 44


def test_memory_that_is_not_there_is_an_engine_error(gpu: Gpu) -> None:
    with pytest.raises(EngineError, match="out of memory.*smaller batch"), gpu.current() as driver:
        driver.mem_alloc(free_memory(gpu) + (1 << 33))
    assert stack_is_empty()


def test_buffers_are_pinned_and_a_graph_replays_what_is_in_them(gpu: Gpu) -> None:
    with gpu.current() as driver:
        stream = driver.Stream()
        buffer, result = Buffer(driver, (4, 1000), np.float32), Buffer(driver, (4, 1000), np.float32)
        flags = ctypes.c_uint()
        address = ctypes.c_void_p(buffer.host.ctypes.data)
        assert cuda._libcuda().cuMemHostGetFlags(ctypes.byref(flags), address) == 0, "not pinned"

        def enqueue() -> None:
            buffer.upload(4, stream)
            driver.memcpy_dtod_async(result.address, buffer.address, 16_000, stream)
            result.download(4, stream)

        buffer.host[:] = 1
        result.host[:] = 0
        graph = Graph(stream, enqueue)
        stream.synchronize()
        assert not result.host.any(), "captured work does not run"
        for value in (2, 3):
            buffer.host[:] = value
            graph.launch()
            stream.synchronize()
            assert (result.host == value).all()
        graph.free()
        graph.free()
        with pytest.raises(cuda.GraphError):
            Graph(stream, stream.synchronize)  # may not be captured: the capture ends all the same
        enqueue()
        stream.synchronize()
        buffer.free()
        result.free()


def test_a_real_plan() -> None:
    """What `doctor` does: a matrix product, built, opened and run by the runner's own code."""
    from ssod_edge.export.engines import tensorrt
    from ssod_edge.probe import PROBES

    engine = next((name for name in ("tensorrt", "tensorrt_rtx") if importlib.util.find_spec(name)), None)
    if engine is None:
        pytest.skip("the engine did not run: neither tensorrt nor tensorrt_rtx is installed")
    try:
        tensorrt.check_builder(engine)
    except EngineError as error:
        pytest.skip(f"the engine did not run: {error}")
    outcomes = {device: (status, detail) for device, status, detail in PROBES[engine]()}
    assert outcomes["CUDA:0"][0] == "ok", outcomes
