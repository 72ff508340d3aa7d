"""The TensorRT runner's control flow, with stand-ins for TensorRT and PyCUDA; what runs on a GPU is another file."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import (
    CLASSES,
    OUTPUTS,
    VERSION,
    FakeDriver,
    FakeTensorRT,
    byte_images,
    install,
    outer_context,
    write_export,
)

from ssod_edge.config import Preprocess
from ssod_edge.detect.confidence import P_SIZE, verdict_inputs
from ssod_edge.errors import ArtifactError, EngineError, MissingExtraError, UsageError
from ssod_edge.runtime.engines import cuda
from ssod_edge.runtime.engines import tensorrt as trt
from ssod_edge.runtime.engines.cuda import Buffer
from ssod_edge.runtime.engines.loading import parse_version
from ssod_edge.runtime.engines.plans import plan_key
from ssod_edge.runtime.open import choose_artifact, open_runner, why_not_here
from ssod_edge.spec import LOGIT_OUTPUTS, Artifact, Threshold, load_spec, save_spec

BUILD_AGAIN = "ssod-edge export --target tensorrt (on a device: ssod-edge export --from BUNDLE --target tensorrt)"


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def tensorrt(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """TensorRT on a board with two GPUs of one kind and another."""
    module = FakeTensorRT("tensorrt", VERSION, driver.copy, driver.check_context)
    install(monkeypatch, driver, module)
    return module


@pytest.fixture
def export(tensorrt: FakeTensorRT, tmp_path: Path) -> Path:
    return write_export(tmp_path / "export")


def edit(folder: Path, **changes: Any) -> None:
    """Change the artifact of a spec."""
    spec = load_spec(folder)
    save_spec(replace(spec, artifacts=(replace(spec.artifacts[0], **changes),)), folder)


def rebuild(folder: Path, **build: Any) -> None:
    """Say that the plan was built in another way, with the key that belongs to it."""
    values = {**load_spec(folder).artifacts[0].build, **build}
    edit(folder, build={**values, "key": plan_key(values)})


def check(outputs: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(outputs) == list(OUTPUTS)
    for name in OUTPUTS:
        assert outputs[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(outputs[name], expected[name])


def test_another_threshold_is_brought_to_the_gpu_once(
    tensorrt: FakeTensorRT, driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the work that a CUDA graph has captured, and not with every run."""
    uploads: list[tuple[int, ...]] = []
    upload = Buffer.upload
    monkeypatch.setattr(Buffer, "upload", lambda *a: (uploads.append(a[0].host.shape), upload(*a))[1])
    images, _ = byte_images(2)
    with open_runner(write_export(tmp_path / "export")) as runner:
        for value in (-1.0, -3.0, 2.0):
            runner.artifact = replace(runner.artifact, threshold=Threshold(value, 0.95, 100, "calib", 0.95))
            for _ in range(3):
                runner.infer({"image": images})
            (context,) = tensorrt.contexts
            for name, expected in verdict_inputs(runner.artifact.threshold).items():
                found = driver.memory[context.address[name]].view(np.float32)
                np.testing.assert_array_equal(found, expected.ravel())
    assert uploads.count((1,)) == 3 + 1 and uploads.count((1, P_SIZE)) == 2 * (3 + 1)  # one of the verification


def test_a_plan_of_an_earlier_release_gives_what_it_gave(tensorrt: FakeTensorRT, tmp_path: Path) -> None:
    images, expected = byte_images(3)
    with open_runner(write_export(tmp_path / "export", outputs=LOGIT_OUTPUTS)) as runner:
        outputs = runner.infer({"image": images})
    assert list(outputs) == list(LOGIT_OUTPUTS)
    np.testing.assert_array_equal(outputs["ood_score"], expected["ood_score"])


@pytest.mark.parametrize("batch", [(1, 8), (4, 8), (3, 3)])
@pytest.mark.parametrize("n", [1, 3, 8, 21])
def test_every_batch_runs_in_parts_or_filled_up(
    tensorrt: FakeTensorRT, driver: FakeDriver, tmp_path: Path, batch: tuple[int, int], n: int
) -> None:
    folder = write_export(tmp_path / "export", batch=batch)
    images, expected = byte_images(n)
    with outer_context(driver), open_runner(folder) as runner:
        for _ in range(4):  # enqueued, captured, launched, launched again
            check(runner.infer({"image": images}), expected)
        assert (runner.engine, runner.precision, runner.device) == ("tensorrt", "fp32", "Orin")
        assert runner.details["batch"] == f"{batch[0]} to {batch[1]}"
        assert runner.details["library"] == f"tensorrt {VERSION}"


def test_outputs_belong_to_the_caller(export: Path) -> None:
    first, second = byte_images(2, seed=1), byte_images(2, seed=2)
    with open_runner(export) as runner:
        outputs = runner.infer({"image": first[0]})
        runner.infer({"image": second[0]})
    check(outputs, first[1])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'image'"),
        ({"pixels": byte_images(1)[0]}, "pixels"),
        ({"image": byte_images(1)[0].astype(np.float32)}, "float32"),
        ({"image": byte_images(1)[0][0]}, r"\[3, 8, 8\]"),
        ({"image": byte_images(1)[0].transpose(0, 2, 3, 1)}, r"\[1, 8, 8, 3\]"),
        ({"image": byte_images(1)[0][:0]}, "N >= 1"),
    ],
)
def test_wrong_inputs_are_named(export: Path, inputs: dict, message: str) -> None:
    with open_runner(export) as runner, pytest.raises(UsageError, match=message):
        runner.infer(inputs)


def test_each_thread_at_work_has_a_context_of_its_own(tensorrt: FakeTensorRT, driver: FakeDriver, export: Path) -> None:
    together = threading.Barrier(4, timeout=20)
    with open_runner(export) as runner:
        tensorrt.executed = lambda: together.wait() and None

        def work(seed: int) -> None:
            images, expected = byte_images(1 + seed, seed)
            check(runner.infer({"image": images}), expected)
            assert not driver.stack(), "the thread's context is given back"

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        tensorrt.executed = lambda: None
        assert len(tensorrt.contexts) == 4
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(60 // 8)))
        assert len(tensorrt.contexts) == 4, "they are used again, whatever thread comes"
    assert not driver.memory and not driver.graphs, "all of it is freed"


def test_close_is_safe_twice_and_while_another_thread_runs(
    tensorrt: FakeTensorRT, driver: FakeDriver, export: Path
) -> None:
    runner = open_runner(export)
    images, expected = byte_images(3)
    running, closed = threading.Event(), threading.Event()

    def wait() -> None:
        running.set()
        assert closed.wait(20)

    tensorrt.executed = wait
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(runner.infer, {"image": images})
        assert running.wait(20)
        runner.__exit__(None, None, None)
        runner.__exit__(None, None, None)
        with pytest.raises(UsageError, match="closed"):
            runner.infer({"image": images})
        closed.set()
        check(late.result(), expected)
    assert not driver.memory


@pytest.mark.parametrize("moment", ["before its context", "after its context"])
def test_close_while_another_thread_starts_a_run(
    tensorrt: FakeTensorRT, driver: FakeDriver, export: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    runner = open_runner(export)
    images, expected = byte_images(3)
    running, ended = threading.Event(), threading.Event()

    def wait() -> None:
        tensorrt.executed = lambda: None
        running.set()
        assert ended.wait(20)

    class Lane(trt._Lane):
        def __init__(self, session: trt.Session) -> None:
            if moment == "before its context":
                runner.__exit__(None, None, None)
            super().__init__(session)
            runner.__exit__(None, None, None)

    monkeypatch.setattr(trt, "_Lane", Lane)
    tensorrt.executed = wait
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(runner.infer, {"image": images})
        assert running.wait(20), "it has the one context that was free"
        try:
            if moment == "before its context":
                with pytest.raises(UsageError, match="closed"):
                    runner.infer({"image": images})
            else:
                check(runner.infer({"image": images}), expected)
        finally:
            ended.set()
        check(first.result(), expected)
    assert not driver.memory and not driver.stack()


def test_a_gpu_that_is_lost_is_an_engine_error_and_closing_is_none(
    driver: FakeDriver, export: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, _ = byte_images(1)
    with open_runner(export) as runner:
        driver.lost = True
        with pytest.raises(EngineError, match="'Orin' reports: .*unspecified launch failure.*restart"):
            runner.infer({"image": images})
        driver.lost = False
        with pytest.raises(EngineError, match="failed before"):
            runner.infer({"image": images})
        driver.lost = True
    assert not caplog.records
    assert not driver.stack()


def test_no_memory_left(driver: FakeDriver, export: Path) -> None:
    driver.free_bytes = 100
    with pytest.raises(EngineError, match="out of memory.*smaller batch") as error:
        open_runner(export)
    assert error.value.exit_code == 3
    assert not driver.memory and not driver.stack()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no_context", "cannot prepare 'model.plan' on 'Orin'"),
        ("refuse_address", "refuses a buffer for 'image'"),
        ("fails", r"cannot run 'model.plan' on 'Orin': Error Code 1: Cuda Runtime \(an illegal memory access\)"),
    ],
)
def test_what_tensorrt_refuses_is_an_engine_error(
    tensorrt: FakeTensorRT, driver: FakeDriver, export: Path, fault: str, message: str
) -> None:
    setattr(tensorrt, fault, True)
    with pytest.raises(EngineError, match=message):
        open_runner(export, verify=False).infer({"image": byte_images(1)[0]})
    assert not driver.stack()


def test_a_run_that_repeats_is_launched_as_a_graph(tensorrt: FakeTensorRT, driver: FakeDriver, export: Path) -> None:
    enqueued = []
    tensorrt.executed = lambda: enqueued.append(1)
    with open_runner(export, verify=False) as runner:
        for step, (n, work, launches) in enumerate([(2, 1, 0), (2, 2, 1), (2, 2, 2), (3, 3, 2), (2, 4, 2), (2, 5, 3)]):
            images, expected = byte_images(n, seed=step)
            check(runner.infer({"image": images}), expected)
            assert (len(enqueued), driver.launches) == (work, launches)
        assert runner.details["cuda_graph"] == "yes"
        assert len(driver.graphs) == 1
    assert not driver.graphs


def test_without_cuda_graphs_it_runs_all_the_same(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, driver, FakeTensorRT("tensorrt", VERSION, driver.copy, driver.check_context), graphs=False)
    monkeypatch.setattr(cuda, "_libcuda", lambda: (_ for _ in ()).throw(OSError("libcuda.so.1: no such file")))
    folder = write_export(tmp_path / "export")
    images, expected = byte_images(2)
    with open_runner(folder) as runner:
        for _ in range(3):
            check(runner.infer({"image": images}), expected)
        assert runner.details["cuda_graph"] == "no: libcuda.so.1: no such file"


@pytest.mark.parametrize("failing", ["cuStreamEndCapture", "cuGraphInstantiateWithFlags", "execute", "copy"])
def test_a_run_that_cannot_be_captured_is_enqueued(
    tensorrt: FakeTensorRT, driver: FakeDriver, export: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def call(name: str, *arguments: Any) -> None:
        driver.graph_call(name, *arguments)
        if name == failing:
            raise cuda.GraphError(f"{name} failed with CUDA error 901")

    def upload(device: Any, host: np.ndarray, stream: Any) -> None:
        if failing == "copy" and stream.captured is not None:
            raise driver.LogicError("cuMemcpyHtoDAsync failed: operation not permitted when stream is capturing")
        stream.add(lambda: driver.write(int(device), host.view(np.uint8).reshape(-1)))

    monkeypatch.setattr(cuda, "_call", call)
    monkeypatch.setattr(driver, "memcpy_htod_async", upload)
    images, expected = byte_images(2)
    with open_runner(export, verify=False) as runner:
        check(runner.infer({"image": images}), expected)
        if failing == "execute":
            fail = iter([True])
            tensorrt.executed = lambda: setattr(tensorrt, "fails", next(fail, False))
        for _ in range(3):
            check(runner.infer({"image": images}), expected)
        assert runner.details["cuda_graph"].startswith("no: ")
    assert driver.launches == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ({"version": "10.13.0"}, "was built by TensorRT 10.13.0, and this is 10.3.0"),
        ({"version": "10.3.0.1"}, "was built by TensorRT 10.3.0.1"),
        ({"gpu": "Orin NX"}, "was built for 'Orin NX', and this is 'Orin'"),
        ({"compute_capabilities": ["8.9"]}, "was built for compute capability 8.9, and 'Orin' has 8.7"),
    ],
)
def test_a_plan_of_another_tensorrt_or_gpu_is_refused(export: Path, build: dict, message: str) -> None:
    rebuild(export, **build)
    with pytest.raises(EngineError, match=message) as error:
        open_runner(export)
    assert BUILD_AGAIN in str(error.value) and error.value.exit_code == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"build": {}}, "is not the plan that its entry"),
        ({"precision": "fp16"}, "was built for tensorrt in fp32"),
        ({"engine": "tensorrt_rtx"}, "its artifact says tensorrt_rtx"),
    ],
)
def test_an_edited_entry_is_refused(
    driver: FakeDriver, export: Path, changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, driver, *(FakeTensorRT(name, VERSION, driver.copy) for name in ("tensorrt", "tensorrt_rtx")))
    edit(export, **changes)
    with pytest.raises(ArtifactError, match=message) as error:
        open_runner(export)
    again = BUILD_AGAIN.replace("tensorrt", load_spec(export).artifacts[0].engine.replace("_", "-"))
    assert again in str(error.value) and error.value.exit_code == 4


def test_every_field_of_the_key_counts(export: Path) -> None:
    build = dict(load_spec(export).artifacts[0].build)
    others = {
        "onnx_sha256": "1" * 64, "engine": "tensorrt_rtx", "version": "10.4", "gpu": "Xavier", "precision": "fp16",
        "compute_capabilities": ["7.2"], "batch": [1, 2, 8], "version_compatible": True,
    }  # fmt: skip
    assert set(others) | {"key"} == set(build)
    assert len({plan_key({**build, name: value}) for name, value in others.items()} | {build["key"]}) == 9
    for name, value in others.items():
        edit(export, build={**build, name: value})
        with pytest.raises(ArtifactError, match="is not the plan"):
            open_runner(export)


def test_a_plan_of_another_model_is_refused(export: Path) -> None:
    spec = load_spec(export)
    onnx = Artifact("onnx-fp32", "onnxruntime", "fp32", {"model-fp32.onnx": "1" * 64}, 18, {})
    save_spec(replace(spec, artifacts=(*spec.artifacts, onnx)), export)
    with pytest.raises(ArtifactError, match="another graph than 'model-fp32.onnx'"):
        open_runner(export, engine="tensorrt")


@pytest.mark.parametrize("how", ["edited", "cut", "gone"])
def test_a_damaged_plan_is_not_loaded(tensorrt: FakeTensorRT, export: Path, how: str) -> None:
    plan = export / "tensorrt-fp32" / "model.plan"
    content = plan.read_bytes()
    plan.unlink() if how == "gone" else plan.write_bytes(content[:-1] if how == "cut" else b" " + content)
    with pytest.raises(ArtifactError, match=r"model\.plan"):
        open_runner(export)
    assert not tensorrt.loggers, "TensorRT never saw it"


@pytest.mark.parametrize("version_compatible", [False, True])
def test_a_plan_that_is_swapped_while_it_is_opened(
    tensorrt: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version_compatible: bool
) -> None:
    export = write_export(tmp_path / "export", version_compatible=version_compatible)
    monkeypatch.setattr("ssod_edge.runtime.export.check_files", lambda folder, artifact: folder / artifact.main_file)
    (export / "tensorrt-fp32" / "model.plan").write_bytes(b"another plan")
    with pytest.raises(ArtifactError, match="was changed while it was opened"):
        open_runner(export)
    assert not tensorrt.loggers, "TensorRT never saw it"


def test_a_plan_that_tensorrt_cannot_read(export: Path) -> None:
    from ssod_edge.files import sha256_file

    plan = export / "tensorrt-fp32" / "model.plan"
    plan.write_bytes(b"no plan")
    edit(export, files={"tensorrt-fp32/model.plan": sha256_file(plan)})
    with pytest.raises(
        EngineError, match=r"cannot open 'model.plan' on 'Orin': Error Code 4: the plan file has a wrong"
    ) as error:
        open_runner(export)
    assert BUILD_AGAIN in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preprocess": Preprocess(input_size=64)}, "input_size 64"),
        ({"classes": (*CLASSES, "grey")}, "4 classes"),
    ],
)
def test_a_spec_of_another_graph_is_refused(driver: FakeDriver, export: Path, change: dict, message: str) -> None:
    save_spec(replace(load_spec(export), **change), export)
    with pytest.raises(ArtifactError, match=message):
        open_runner(export)
    assert not driver.memory


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_lean"])
@pytest.mark.parametrize("version", [VERSION, "10.13.0"])
def test_later_releases_and_the_lean_runtime_open_version_compatible_plans(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: str
) -> None:
    install(monkeypatch, driver, FakeTensorRT(name, version, driver.copy, driver.check_context))
    if name == "tensorrt_lean":
        with pytest.raises(EngineError, match="whole TensorRT.*--target tensorrt --version-compatible"):
            open_runner(write_export(tmp_path / "other"))
    folder = write_export(tmp_path / "export", version_compatible=True)
    images, expected = byte_images(2)
    with open_runner(folder) as runner:
        check(runner.infer({"image": images}), expected)
        assert runner.details["library"] == f"{name} {version}"
    for older in ("11.0.0", "10.14.0"):
        rebuild(folder, version=older)
        with pytest.raises(EngineError, match=f"was built by TensorRT {older}"):
            open_runner(folder)


def test_missing_and_old_modules_name_the_fix(
    driver: FakeDriver, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = FakeTensorRT("tensorrt", "8.6.1", driver.copy)
    install(monkeypatch, driver, old)
    with pytest.raises(
        EngineError, match="tensorrt 8.6.1 is too old: 10.3 is the oldest that works, which JetPack 6.1"
    ):
        open_runner(export)
    install(monkeypatch, driver)
    with pytest.raises(MissingExtraError, match=r"pip install 'ssod-edge\[tensorrt\]'"):
        open_runner(export)
    install(monkeypatch, None, FakeTensorRT("tensorrt", VERSION, driver.copy))
    with pytest.raises(MissingExtraError, match=r"pip install 'ssod-edge\[jetson\]'"):
        open_runner(export, engine="tensorrt")
    install(monkeypatch, None, FakeTensorRT("tensorrt_rtx", VERSION, driver.copy))
    with pytest.raises(MissingExtraError, match=r"package 'pycuda'.* pip install 'ssod-edge\[tensorrt-rtx\]'"):
        open_runner(write_export(tmp_path / "rtx", "tensorrt_rtx"))


@pytest.mark.parametrize(
    ("device", "kind", "message"),
    [
        ("CPU", UsageError, "device must be auto or cuda:N, got 'CPU'"),
        ("cuda:x", UsageError, "cuda:x"),
        ("cuda:7", EngineError, r"no GPU 'cuda:7' here; there is: cuda:0 \(Orin\), cuda:1 \(Orin NX\), cuda:2 \(RTX\)"),
        ("cuda:2", EngineError, "'RTX' has 8.9"),
    ],
)
def test_devices(export: Path, device: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        open_runner(export, device=device)


def test_auto_takes_a_plan_only_where_there_is_a_gpu(
    tensorrt: FakeTensorRT, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", FakeTensorRT("onnxruntime", "1", lambda: None))
    spec = load_spec(export)
    onnx = Artifact("onnx-fp32", "onnxruntime", "fp32", {"model-fp32.onnx": "0" * 64}, 18, {})
    both = replace(spec, artifacts=(onnx, *spec.artifacts))
    assert choose_artifact(both).name == "tensorrt-fp32"
    assert choose_artifact(both, engine="onnxruntime").name == "onnx-fp32"
    install(monkeypatch, FakeDriver(gpus=()), tensorrt)
    assert choose_artifact(both).name == "onnx-fp32"
    assert choose_artifact(both, engine="tensorrt").name == "tensorrt-fp32", "asked for, it says why it cannot run"
    with pytest.raises(EngineError, match="no CUDA-capable device"):
        open_runner(export, artifact="tensorrt-fp32")
    install(monkeypatch, None, tensorrt)
    assert choose_artifact(both).name == "onnx-fp32"


def test_it_is_verified_on_its_first_run_and_again_on_another_gpu(
    tensorrt: FakeTensorRT, driver: FakeDriver, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_spec(export).artifacts[0].verification is None
    with open_runner(export):
        pass
    figures = load_spec(export).artifacts[0].verification
    assert figures is not None and (figures["device"], figures["precision"], figures["n"]) == ("Orin", "fp32", 20)
    driver.gpus = (("Orin B", 8, 7),)
    cuda._open_gpu.cache_clear()
    rebuild(export, gpu="Orin B")
    with open_runner(export):
        pass
    figures = load_spec(export).artifacts[0].verification
    assert figures is not None and figures["device"] == "Orin B"


def test_what_was_built_for_another_machine_says_why_it_does_not_run_here(
    tensorrt: FakeTensorRT, driver: FakeDriver, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan,) = load_spec(write_export(tmp_path / "rtx", "tensorrt_rtx")).artifacts
    assert why_not_here(plan) is None
    driver.gpus = (("Hopper", 9, 0),)
    cuda._open_gpu.cache_clear()
    assert why_not_here(plan) == "it is for compute capability 8.6, 8.7, 8.9, and 'Hopper' has 9.0"
    install(monkeypatch, None, tensorrt)
    assert "pycuda" in str(why_not_here(plan))
    assert why_not_here(replace(plan, engine="onnxruntime")) is None


@pytest.fixture
def rtx(driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[FakeTensorRT, Path]:
    """TensorRT for RTX, an export for it, and a place for compiled kernels."""
    module = FakeTensorRT("tensorrt_rtx", VERSION, driver.copy, driver.check_context)
    install(monkeypatch, driver, module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return module, write_export(tmp_path / "rtx", "tensorrt_rtx")


def test_tensorrt_for_rtx_keeps_the_kernels_it_compiled(rtx: tuple[FakeTensorRT, Path], tmp_path: Path) -> None:
    module, folder = rtx
    images, expected = byte_images(2)
    for _ in range(2):
        with open_runner(folder) as runner:
            for _ in range(3):
                check(runner.infer({"image": images}), expected)
            assert runner.details["cuda_graph"] == "left to TensorRT for RTX"
    assert module.kernels_read == [b"compiled kernels"], "written by the first, read by the second"
    digest = load_spec(folder).artifacts[0].files["tensorrt-rtx-fp32/model.plan"]
    assert [path.name for path in (tmp_path / "cache").rglob("*.bin")] == [f"{digest}-sm87.bin"]


def test_kernels_that_cannot_be_kept_only_cost_time(
    rtx: tuple[FakeTensorRT, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with open_runner(rtx[1]):
        pass
    assert "compiled kernels are not kept" in caplog.text


def test_versions_are_compared_by_number() -> None:
    assert parse_version("10.13.2") > parse_version("10.3.0.post1") == (10, 3, 0)
    assert parse_version("8.6.1")[:2] < (10, 3) <= parse_version("11.0")[:2]
    assert parse_version("of an unknown version") == ()


def test_the_stand_in_notices_misuse(driver: FakeDriver) -> None:
    with pytest.raises(driver.LogicError, match="invalid device context"):
        driver.mem_alloc(4)
