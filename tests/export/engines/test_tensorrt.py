"""Plans that TensorRT for RTX really builds, without a GPU; what a builder refuses; the cache; two exports at once."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from click.testing import CliRunner
from fake_gpu import FakeDriver, FakeTensorRT, install
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from small import CLASSES, make_model, random_images

from ssod_edge.cli import main
from ssod_edge.errors import ArtifactError, EngineError, MissingExtraError, UsageError, VerificationError
from ssod_edge.export.command import SourceOptions, TargetOptions, engines_for, run_export
from ssod_edge.export.engines import tensorrt
from ssod_edge.export.engines.artifact import make_artifact
from ssod_edge.export.engines.tensorrt import PlanOptions, build_plan, parse_batch
from ssod_edge.export.graph.build import ExportOptions, export_source
from ssod_edge.export.graph.fp16 import to_fp16
from ssod_edge.export.graph.onnx import fused_graph
from ssod_edge.export.graph.source import from_run
from ssod_edge.export.onnx_file import save_onnx
from ssod_edge.export.release import Draft
from ssod_edge.external_data import external_files
from ssod_edge.files import sha256_file
from ssod_edge.runtime.engines.plans import graph_hash, plan_key
from ssod_edge.runtime.open import open_runner
from ssod_edge.spec import Artifact, check_files, load_spec, save_spec

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx, which the extra 'dev' brings"
)
#: What TensorRT for RTX 1.7 has code for, less Turing.
AMPERE_ON = ["8.0", "8.6", "8.9", "12.0", "12.1"]
SOME = 1_000_000


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx, which the extra 'dev' brings")


def save_graph(path: Path, *nodes: onnx.NodeProto, dims: tuple = ("N", 3, 8, 8), **constants: np.ndarray) -> Path:
    """A graph from `image` to `y` whose first node makes `x`, the image as float32."""
    cast = oh.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT)
    graph = oh.make_graph(
        [cast, *nodes],
        "small",
        [oh.make_tensor_value_info("image", TensorProto.UINT8, dims)],
        [oh.make_tensor_value_info("y", TensorProto.FLOAT, dims)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [oh.make_opsetid("", 18), oh.make_opsetid("acme", 1)]
    onnx.save(oh.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


RELU = oh.make_node("Relu", ["x"], ["y"], name="relu")


@pytest.fixture(scope="module", params=["mobilenetv3", pytest.param("regnet", marks=pytest.mark.slow)])
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model-fp32.onnx, model-fp16.onnx and model-int8.onnx of a backbone with random weights."""
    folder = tmp_path_factory.mktemp(request.param)
    graph = fused_graph(make_model(request.param), "energy", trained=False)
    save_onnx(graph, folder / "model-fp32.onnx")
    save_onnx(to_fp16(graph, len(CLASSES) + 1)[0], folder / "model-fp16.onnx")
    reader = SimpleNamespace(get_next=iter([{"image": random_images(2).numpy()}, None]).__next__)
    CalibrationDataReader.register(SimpleNamespace)
    quantize_static(
        folder / "model-fp32.onnx",
        folder / "model-int8.onnx",
        reader,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )
    return folder


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_real_plans_of_every_precision(rtx: Any, graphs: Path, tmp_path: Path, precision: str) -> None:
    onnx_path = graphs / f"model-{precision}.onnx"
    artifact = make_artifact("tensorrt_rtx", precision, onnx_path, tmp_path, plans=PlanOptions((1, 2, 4)))
    plan = tmp_path / f"tensorrt-rtx-{precision}" / "model.plan"
    assert artifact.name == f"tensorrt-rtx-{precision}"
    assert artifact.files == {f"tensorrt-rtx-{precision}/model.plan": sha256_file(plan)}
    # The weights are in it, in the precision of the graph.
    parameters = onnx_path.with_name("model-fp32.onnx").stat().st_size
    assert plan.stat().st_size > {"fp32": 1.0, "fp16": 0.5, "int8": 0.25}[precision] * parameters
    assert artifact.build == {
        "onnx_sha256": sha256_file(onnx_path),
        "engine": "tensorrt_rtx",
        "version": rtx.__version__,
        "gpu": None,
        "compute_capabilities": AMPERE_ON,
        "precision": precision,
        "batch": [1, 2, 4],
        "version_compatible": False,
        "key": plan_key(artifact.build),
    }
    assert artifact.versions["tensorrt_rtx"] == rtx.__version__
    assert artifact.verification is None and artifact.threshold is None


@needs_rtx
@pytest.mark.parametrize(
    ("nodes", "constants", "message"),
    [
        (
            [oh.make_node("Weird", ["x"], ["y"], name="trunk/weird_7", domain="acme")],
            {},
            r"node 'trunk/weird_7' \(Weird",
        ),
        (
            [oh.make_node("Conv", ["x", "w"], ["y"], name="stem")],
            {"w": np.ones((4, 5, 3, 3), np.float32)},
            r"node 'stem' \(Conv\): .*failed to broadcast",
        ),
        (
            [
                oh.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantize"),
                oh.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
            ],
            {"scale": np.float32(0.1), "zero": np.int8(3)},
            r"node 'quantize' \(QuantizeLinear\): .*[Nn]on-zero zero point",
        ),
    ],
)
def test_a_parser_error_names_the_node_and_its_op(
    rtx: Any, tmp_path: Path, nodes: list, constants: dict, message: str
) -> None:
    path = save_graph(tmp_path / "g.onnx", *nodes, **{name: np.asarray(value) for name, value in constants.items()})
    with pytest.raises(
        VerificationError, match=f"TensorRT for RTX {rtx.__version__} cannot parse 'g.onnx': {message}"
    ) as e:
        build_plan(rtx, path, PlanOptions(), ["8.6"])
    assert "\n" not in str(e.value) and e.value.exit_code == 4


@needs_rtx
def test_a_graph_with_another_input_is_refused(rtx: Any, tmp_path: Path) -> None:
    path = save_graph(tmp_path / "g.onnx", RELU, dims=(2, 3, 8, 8))
    with pytest.raises(VerificationError, match=r"must have one input, image .* and has: image \[2, 3, 8, 8\]"):
        build_plan(rtx, path, PlanOptions(), ["8.6"])


@needs_rtx
def test_a_gpu_without_code_is_refused_before_building(
    rtx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, capability in (("Hopper", (9, 0)), ("Turing", (7, 5))):
        install(monkeypatch, FakeDriver(gpus=((name, *capability),)), rtx)
        with pytest.raises(EngineError, match=f"no code for '{name}' .* for 8.0, 8.6, 8.9, 12.0, 12.1") as error:
            make_artifact("tensorrt_rtx", "fp32", save_graph(tmp_path / "g.onnx", RELU), tmp_path)
        assert error.value.exit_code == 3
        assert engines_for("tensorrt-rtx") == ("tensorrt_rtx",) and "tensorrt_rtx" not in engines_for("all")


@needs_rtx
def test_all_means_plans_only_where_they_run(rtx: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, None, rtx)
    assert engines_for("all") == ("onnxruntime", "openvino")
    install(monkeypatch, FakeDriver(gpus=(("Ada", 8, 9),)), rtx)
    assert engines_for("all") == ("onnxruntime", "openvino", "tensorrt_rtx")
    artifact = make_artifact("tensorrt_rtx", "fp32", save_graph(tmp_path / "g.onnx", RELU), tmp_path)
    assert artifact.build["compute_capabilities"] == ["8.9"], "the GPU that is here is enough"


@needs_rtx
def test_an_earlier_builder_that_is_garbage_does_not_stop_a_build(tmp_path: Path) -> None:
    """A collection within TensorRT's own calls would free it, and wait for a lock that they hold."""
    code = """
import gc, sys
import tensorrt_rtx
from pathlib import Path
from ssod_edge.export.engines import tensorrt
from ssod_edge.runtime.engines.plans import make_logger
gc.disable()
class Cycle: pass
earlier = Cycle()
earlier.itself, earlier.builder = earlier, tensorrt_rtx.Builder(make_logger(tensorrt_rtx))
del earlier
def logger(module):
    found = make_logger(module)
    log = type(found).log
    def collecting(self, level, message):
        if gc.isenabled():  # as any allocation may
            gc.collect()
        log(self, level, message)
    type(found).log = collecting
    return found
tensorrt.make_logger = logger
gc.enable()
print(len(tensorrt.build_plan(tensorrt_rtx, Path(sys.argv[1]), tensorrt.PlanOptions(), ["8.9"])))
assert gc.isenabled()
"""
    graph = save_graph(tmp_path / "g.onnx", RELU)
    done = subprocess.run([sys.executable, "-c", code, graph], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr


@pytest.fixture
def tensorrt_10(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """TensorRT 10 on an Orin: the library for RTX under the other's name, whose interface it shares."""
    module = ModuleType("tensorrt")
    vars(module).update({name: value for name, value in vars(rtx).items() if not name.startswith("__")})
    module.__version__, module.__spec__ = "10.13.0", importlib.util.find_spec("json")
    install(monkeypatch, FakeDriver(gpus=(("Orin", 8, 7),)), module)
    return module


def test_tensorrt_builds_for_the_gpu_that_is_here(
    tensorrt_10: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    configure = tensorrt._configure

    def spy(module: Any, config: Any, options: PlanOptions, capabilities: Any) -> None:
        configure(module, config, options, capabilities)
        flags = ("TF32", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME")
        made.append([config.get_flag(getattr(module.BuilderFlag, name)) for name in flags])

    monkeypatch.setattr(tensorrt, "_configure", spy)
    path = save_graph(tmp_path / "g.onnx", RELU)
    artifact = make_artifact("tensorrt", "fp32", path, tmp_path)
    assert (artifact.name, artifact.engine) == ("tensorrt-fp32", "tensorrt")
    build = artifact.build
    assert (build["gpu"], build["compute_capabilities"], build["version"]) == ("Orin", ["8.7"], "10.13.0")
    # The library for RTX has no lean runtime to put into a plan, and shows that the builder looks for it.
    with pytest.raises(EngineError, match=r"libnvinfer_lean.*apt install libnvinfer-lean10.*drop --version-compatible"):
        make_artifact("tensorrt", "fp32", path, tmp_path, plans=PlanOptions(version_compatible=True))
    assert made == [[False, False, False], [False, True, False]]
    monkeypatch.setattr(tensorrt, "build_plan", lambda *_: b"plan")
    _, lean = tensorrt.save_plan("tensorrt", "fp32", path, tmp_path / "lean", PlanOptions(version_compatible=True))
    assert lean["version_compatible"] and lean["key"] != build["key"]
    assert engines_for("all") == ("onnxruntime", "openvino", "tensorrt")


def test_tensorrt_needs_a_gpu_pycuda_and_version_10(
    tensorrt_10: ModuleType, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export() -> None:
        export_source(from_run(small_run), tmp_path / "out", ExportOptions(engines=("tensorrt",)))

    tensorrt_10.__version__ = "8.6.1"
    with pytest.raises(EngineError, match="8.6.1 is too old.*JetPack 6.1"):
        export()
    install(monkeypatch, FakeDriver(gpus=()), FakeTensorRT("tensorrt", "10.3.0", lambda: None))
    with pytest.raises(EngineError, match="no CUDA-capable device"):
        export()
    install(monkeypatch, None, FakeTensorRT("tensorrt", "10.3.0", lambda: None))
    with pytest.raises(MissingExtraError, match=r"ssod-edge\[jetson\]"):
        export()
    install(monkeypatch, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ssod-edge\[tensorrt\]'"):
        export()
    assert not (tmp_path / "out").exists()


class OneBuilder:
    """The builder of a module whose `build_serialized_network` is replaced."""

    def __init__(self, module: Any, build: Any) -> None:
        self.real, self.build = module.Builder, build

    def __call__(self, logger: Any) -> Any:
        builder = self.real(logger)
        names = ("create_network", "create_builder_config", "create_optimization_profile")
        methods = {name: getattr(builder, name) for name in names}
        return SimpleNamespace(**methods, build_serialized_network=lambda n, c: self.build(logger, c), keep=builder)


@pytest.mark.parametrize(
    ("reason", "fix"),
    [
        ("Requested amount of GPU memory (1073741824 bytes) could not be allocated", "smaller --batch or model"),
        ("Unexpected exception std::bad_alloc", "smaller --batch or model"),
        ("Could not find any implementation for node stem", "See the reason above"),
    ],
)
def test_a_builder_that_gives_nothing_says_why(tensorrt_10: ModuleType, tmp_path: Path, reason: str, fix: str) -> None:
    def build(logger: Any, config: Any) -> None:
        logger.log(tensorrt_10.ILogger.Severity.ERROR, f"[allocator.cpp]\n{reason}")

    vars(tensorrt_10)["Builder"] = OneBuilder(tensorrt_10, build)
    with pytest.raises(EngineError) as error:
        make_artifact("tensorrt", "fp32", save_graph(tmp_path / "g.onnx", RELU), tmp_path)
    assert reason in str(error.value) and fix in str(error.value) and error.value.exit_code == 3
    assert not (tmp_path / "tensorrt-fp32").exists()


def test_a_builder_that_does_not_start(tensorrt_10: ModuleType, tmp_path: Path) -> None:
    def refuse(logger: Any) -> None:
        logger.log(tensorrt_10.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    vars(tensorrt_10)["Builder"] = refuse
    with pytest.raises(EngineError, match="cannot start its builder: CUDA initialization failure.*doctor"):
        make_artifact("tensorrt", "fp32", save_graph(tmp_path / "g.onnx", RELU), tmp_path)


def test_an_interrupt_ends_the_build_at_its_next_step(tensorrt_10: ModuleType, tmp_path: Path) -> None:
    ended = threading.Event()

    def build(logger: Any, config: Any) -> None:
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 1000)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        for step in range(1000):
            if not monitor.step_complete("Building engine", step):
                monitor.phase_finish("Building engine")
                ended.set()
                return
            ended.wait(0.01)

    vars(tensorrt_10)["Builder"] = OneBuilder(tensorrt_10, build)
    with pytest.raises(KeyboardInterrupt):
        make_artifact("tensorrt", "fp32", save_graph(tmp_path / "g.onnx", RELU), tmp_path)
    assert ended.is_set()
    assert not (tmp_path / "tensorrt-fp32").exists()


@needs_rtx
def test_progress_is_that_of_the_builder(rtx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []

    class Bars(tensorrt.PhaseBars):
        def start(self, phase: str, steps: int) -> None:
            seen.append(("start", phase))
            super().start(phase, steps)

        def advance(self, phase: str) -> None:
            assert phase in self.tasks
            seen.append(("advance", phase))
            super().advance(phase)

        def finish(self, phase: str) -> None:
            seen.append(("finish", phase))
            super().finish(phase)

    monkeypatch.setattr(tensorrt, "PhaseBars", Bars)
    build_plan(rtx, save_graph(tmp_path / "g.onnx", RELU), PlanOptions(), ["8.6"])
    assert seen[0] == ("start", "Building engine") and seen[-1] == ("finish", "Building engine")
    assert ("advance", "Building engine") in seen
    assert sum(kind == "start" for kind, _ in seen) == sum(kind == "finish" for kind, _ in seen)


@pytest.mark.parametrize(("text", "expected"), [("1,1,8", (1, 1, 8)), ("4", (4, 4, 4)), ("1, 2 ,3", (1, 2, 3))])
def test_batch(text: str, expected: tuple[int, int, int]) -> None:
    assert parse_batch(text) == expected == PlanOptions(parse_batch(text)).batch


@pytest.mark.parametrize("text", ["", "1,8", "a,b,c", "0,1,1", "2,1,8", "1,9,8", "1,1,1,1", "1.5"])
def test_a_wrong_batch_is_wrong_usage(text: str, small_run: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(small_run), "--target", "onnx", "--batch", text])
    assert done.exit_code == 2
    assert "batch must be" in done.output and f"got {text}" in done.output.replace("'", "")


def test_a_batch_that_no_device_holds_is_refused() -> None:
    with pytest.raises(UsageError, match="99999999 images in a run is more than any device holds: at most 4096"):
        PlanOptions((1, 1, 99_999_999))


# External data


def external(path: Path, location: str, size: int = 12) -> Path:
    """A graph whose one weight is in another file."""
    save_graph(path, oh.make_node("Add", ["x", "w"], ["y"]), w=np.ones((3, 1, 1), np.float32))
    model = onnx.load(path)
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


@needs_rtx
def test_external_data_beside_the_graph_is_used_and_counts(rtx: Any, tmp_path: Path) -> None:
    path = external(tmp_path / "g.onnx", "weights.bin")
    (tmp_path / "weights.bin").write_bytes(np.ones(3, np.float32).tobytes())
    assert external_files(path) == (tmp_path / "weights.bin",)
    first = make_artifact("tensorrt_rtx", "fp32", path, tmp_path)
    (tmp_path / "weights.bin").write_bytes(np.full(3, 2, np.float32).tobytes())
    second = make_artifact("tensorrt_rtx", "fp32", path, tmp_path)
    assert first.build["onnx_sha256"] != second.build["onnx_sha256"] != sha256_file(path)
    files = {name: sha256_file(tmp_path / name) for name in ("g.onnx", "weights.bin")}
    assert second.build["onnx_sha256"] == graph_hash(files), "what the ONNX artifact of the same export gives"


def test_an_artifact_vouches_for_its_external_data(tmp_path: Path) -> None:
    path, weights = external(tmp_path / "g.onnx", "weights.bin"), tmp_path / "weights.bin"
    weights.write_bytes(np.ones(3, np.float32).tobytes())
    alone = Artifact("onnx-fp32", "onnxruntime", "fp32", {"g.onnx": sha256_file(path)}, 18, {})
    with pytest.raises(ArtifactError, match=r"keeps weights in 'weights.bin', which ssod.json has no hash of"):
        check_files(tmp_path, alone)
    both = replace(alone, files={**alone.files, "weights.bin": sha256_file(weights)})
    assert check_files(tmp_path, both) == path
    weights.write_bytes(b"edited")
    with pytest.raises(ArtifactError, match="was changed"):
        check_files(tmp_path, both)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("weights.bin", "'weights.bin', which is missing"),
        ("../weights.bin", "outside its folder"),
        ("/etc/hostname", "outside its folder"),
        ("link.bin", "outside its folder"),
        ("", "outside its folder"),
        ("a\0b", "outside its folder"),
    ],
)
def test_external_data_elsewhere_is_refused(tmp_path: Path, location: str, message: str) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0" * 12)
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(ArtifactError, match=message) as error:
        external_files(external(folder / "g.onnx", location))
    assert error.value.exit_code == 4


def test_external_data_is_found_wherever_tensors_stand(tmp_path: Path) -> None:
    def tensor(name: str) -> TensorProto:
        proto = numpy_helper.from_array(np.ones(1, np.float32), name)
        proto.ClearField("raw_data")
        proto.data_location = TensorProto.EXTERNAL
        proto.external_data.add(key="location", value=f"{name}.bin")
        (tmp_path / f"{name}.bin").touch()
        return proto

    branch = oh.make_graph([], "branch", [], [], [tensor("in_branch")])
    function = oh.make_function(
        "acme", "F", [], ["f"], [oh.make_node("Constant", [], ["f"], value=tensor("in_function"))], []
    )
    sparse = oh.make_sparse_tensor(tensor("values"), numpy_helper.from_array(np.zeros(1, np.int64)), [1])
    nodes = [
        oh.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        oh.make_node("Constant", [], ["k"], value=tensor("constant")),
        oh.make_node("Custom", [], ["l"], many=[tensor("listed")]),
    ]
    graph = oh.make_graph(nodes, "g", [], [], [tensor("weight")], sparse_initializer=[sparse])
    model = oh.make_model(graph, functions=[function])
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    found = {path.stem for path in external_files(tmp_path / "g.onnx")}
    assert found == {"in_branch", "in_function", "values", "constant", "listed", "weight"}


def test_a_damaged_onnx_file_is_refused(small_graph: onnx.ModelProto, tmp_path: Path) -> None:
    content = small_graph.SerializeToString()
    path = tmp_path / "g.onnx"
    path.write_bytes(content)
    assert external_files(path) == ()
    for damaged in (content[: len(content) // 2], content[:-1], b"this is no model", b"\xff" * 40):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="no ONNX file, or was cut short"):
            external_files(path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        external_files(tmp_path / "gone.onnx")


# Whole exports


@pytest.fixture
def traced_once(small_graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the small model take the graph that was traced already."""

    def same(*_: Any) -> onnx.ModelProto:
        graph = onnx.ModelProto()
        graph.CopyFrom(small_graph)
        return graph

    monkeypatch.setattr("ssod_edge.export.graph.build.fused_graph", same)


def rtx_options(**changes: Any) -> ExportOptions:
    return replace(ExportOptions(("fp32",), ("tensorrt_rtx",)), **changes)


@needs_rtx
def test_a_plan_for_another_machine_is_released_unverified(
    small_run: Path,
    traced_once: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(monkeypatch, None, importlib.import_module("tensorrt_rtx"))
    out = tmp_path / "out"
    assert (
        run_export(SourceOptions(str(small_run)), TargetOptions(str(out), ("fp16",), "tensorrt-rtx", batch="1,2,4"))
        == 0
    )
    shown = capsys.readouterr()
    (row,) = [line for line in shown.out.splitlines() if "tensorrt-rtx-fp16" in line]
    assert row.split()[-4:] == ["none", "on", "first", "run"]
    assert "verified on its first run, not here" in shown.err and "ssod-edge calibrate" in shown.err
    (artifact,) = load_spec(out).artifacts
    assert artifact.verification is None and artifact.threshold is None and artifact.build["batch"] == [1, 2, 4]
    assert json.loads((out / "ssod.json").read_text())["artifacts"][0]["build"] == artifact.build
    with pytest.raises(MissingExtraError, match=r"ssod-edge\[tensorrt-rtx\]"):
        open_runner(out)


@needs_rtx
def test_the_same_plan_is_not_built_again_and_a_stale_one_is(
    small_run: Path, traced_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, built = tmp_path / "out", []
    build = tensorrt.build_plan
    monkeypatch.setattr(tensorrt, "build_plan", lambda *a: built.append(a[2].batch) or build(*a))

    def export(**changes: Any) -> str:
        export_source(from_run(small_run), out, rtx_options(**changes))
        (artifact,) = (a for a in load_spec(out).artifacts if a.engine == "tensorrt_rtx")
        assert artifact.files["tensorrt-rtx-fp32/model.plan"] == sha256_file(out / "tensorrt-rtx-fp32" / "model.plan")
        return artifact.build["key"]

    key = export()
    assert export() == key and built == [(1, 1, 8)]
    assert export(plans=PlanOptions((1, 1, 4))) != key and built == [(1, 1, 8), (1, 1, 4)]
    # An entry of another version, a plan that was cut short: neither is taken.
    spec = load_spec(out)
    stale = {**spec.artifacts[0].build, "version": "1.0"}
    save_spec(spec.with_artifact(replace(spec.artifacts[0], build={**stale, "key": plan_key(stale)})), out)
    export(plans=PlanOptions((1, 1, 4)))
    plan = out / "tensorrt-rtx-fp32" / "model.plan"
    plan.write_bytes(plan.read_bytes()[:1000])
    export(plans=PlanOptions((1, 1, 4)))
    assert built == [(1, 1, 8)] + 3 * [(1, 1, 4)]


@needs_rtx
def test_a_failed_build_leaves_the_earlier_export(
    small_run: Path, traced_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_source(from_run(small_run), out, rtx_options())
    before = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(tensorrt, "_build", lambda *_: None)
    with pytest.raises(EngineError, match=r"cannot build 'model-fp32.onnx': it gives no reason"):
        export_source(from_run(small_run), out, rtx_options(plans=PlanOptions((1, 1, 2))))
    assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@needs_rtx
def test_two_exports_into_one_folder_at_once_keep_both(
    small_run: Path, traced_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, failures = tmp_path / "out", []
    both_built = threading.Barrier(2, timeout=300)
    prove = Draft.prove
    monkeypatch.setattr(Draft, "prove", lambda *a, **named: (prove(*a, **named), both_built.wait())[0])

    def export(engine: str) -> None:
        try:
            export_source(from_run(small_run), out, rtx_options(engines=(engine,)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=export, args=(engine,)) for engine in ("tensorrt_rtx", "onnxruntime")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [artifact.name for artifact in load_spec(out).artifacts] == ["onnx-fp32", "tensorrt-rtx-fp32"]
    assert {path.name for path in out.iterdir()} == {
        "ssod.json",
        "reference.npz",
        "features.npz",
        "model-fp32.onnx",
        "tensorrt-rtx-fp32",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


PUBLISH = """
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from ssod_edge.export.release import staged
from ssod_edge.files import exclusive
from ssod_edge.spec import Artifact, load_spec, save_spec
place, me = Path(sys.argv[1]), sys.argv[2]
for turn in range(30):
    with ExitStack() as publishing, staged(place) as folder:
        (folder / "reference.npz").write_bytes(b"x" * 1000)
        publishing.enter_context(exclusive(place.parent))
        spec = load_spec(place)
        for artifact in spec.artifacts:
            (folder / artifact.main_file).write_bytes((place / artifact.main_file).read_bytes())
        name = f"{me}-{turn}"
        (folder / name).write_text(name)
        save_spec(spec.with_artifact(Artifact(name, "onnxruntime", "fp32", {name: "0"}, 18, {})), folder)
"""


def test_two_processes_publish_into_one_folder(export: Path, tmp_path: Path) -> None:
    spec = load_spec(export)
    save_spec(replace(spec, artifacts=()), export)
    workers = [
        subprocess.Popen([sys.executable, "-c", PUBLISH, str(export), name], stderr=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    for worker in workers:
        assert worker.wait(120) == 0, worker.stderr and worker.stderr.read()
    names = {artifact.name for artifact in load_spec(export).artifacts}
    assert names == {f"{worker}-{turn}" for worker in "ab" for turn in range(30)}
    assert all((export / name).read_text() == name for name in names)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    shutil.rmtree(export)
