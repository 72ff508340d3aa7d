"""`doctor` reports what really ran: engines that work, that are broken, that crash, that hang, that are missing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ssod_edge import doctor, probe
from ssod_edge.cli import main
from ssod_edge.errors import EXTRAS


def broken_module(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, source: str) -> None:
    """Put a module of an engine's name in front of the real one, as a broken installation does."""
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    for loaded in (name, f"{name}.driver"):
        monkeypatch.setitem(sys.modules, loaded, None)  # so that what the test imports is forgotten after it
        monkeypatch.delitem(sys.modules, loaded)


def test_the_model_of_the_probe_is_a_product_of_matrices() -> None:
    onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "x"], ["y"])], "probe", [x], [y])
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[opset])
    onnx.checker.check_model(model, full_check=True)
    assert onnx.load(probe.TINY_ONNX) == model


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_installed_engines_multiply_on_the_cpu(name: str) -> None:
    pytest.importorskip(name, reason=f"needs {name}")
    outcomes = {device: status for device, status, _ in probe.PROBES[name]()}
    assert outcomes["CPU"] == "ok"


def test_the_kernel_that_samples_patches_is_named() -> None:
    ops = pytest.importorskip("ssod_edge.ops", reason="needs torch")
    details = {device: detail for device, _, detail in probe.PROBES["torch"]()}
    assert details["CPU"].endswith(f"kernel: {ops.kernel_in_use('cpu')}")


def test_what_each_extra_is_for_is_known() -> None:
    """A bare environment shows all of them as missing."""
    assert set(EXTRAS.values()) <= set(doctor.PURPOSES)


def test_wrong_result_is_a_failure() -> None:
    device, status, detail = probe.check("CPU", lambda: np.zeros((2, 2)))
    assert (device, status) == ("CPU", "failed")
    assert "wrong result" in detail


def test_error_while_running_is_a_failure_with_its_first_line() -> None:
    def run() -> None:
        raise RuntimeError("plugin not found\nsecond line")

    assert probe.check("GPU", run) == ("GPU", "failed", "plugin not found")


def test_probe_prints_an_import_error_as_its_outcome(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_module(monkeypatch, tmp_path, "tensorrt", "raise ImportError('libnvinfer.so.10: cannot open')")
    probe.main("tensorrt")
    outcomes = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert outcomes == [["", "failed", "ImportError: libnvinfer.so.10: cannot open"]]


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx", "pycuda"])
def test_engine_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    source = "def fail(*args):\n    raise RuntimeError('no driver')\nclass Logger:\n    ERROR = 1\n"
    source += "    def __init__(self, level): pass\nBuilder = init = fail\n"
    if name == "pycuda":
        (tmp_path / "pycuda").mkdir()
        (tmp_path / "pycuda" / "driver.py").write_text(source, encoding="utf-8")
        source = "__path__ = [__file__.removesuffix('.py')]\n"
    broken_module(monkeypatch, tmp_path, name, source)
    assert [outcome[1:] for outcome in probe.PROBES[name]()] == [("failed", "no driver")]
    (engine,) = doctor.try_engine(name)
    assert (engine.status, engine.detail) == ("failed", "no driver")


def test_engine_that_crashes_does_not_take_doctor_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken_module(monkeypatch, tmp_path, "openvino", "import os\nos.abort()\n")
    (engine,) = doctor.try_engine("openvino")
    assert engine.status == "failed"
    assert "ended with code -6" in engine.detail


def test_engine_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken_module(monkeypatch, tmp_path, "tensorrt", "import time\ntime.sleep(60)\n")
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 1)
    (engine,) = doctor.try_engine("tensorrt")
    assert engine.status == "failed"
    assert "no answer within 1 s" in engine.detail


def test_missing_engine_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "is_there", lambda name: False)
    (engine,) = doctor.try_engine("openvino")
    assert (engine.status, engine.install) == ("missing", "pip install 'ssod-edge[openvino]'")
    (engine,) = doctor.try_engine("tensorrt_rtx")
    assert (engine.status, engine.install) == ("missing", "pip install 'ssod-edge[tensorrt-rtx]'")


def test_package_under_another_name_counts_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.DISTRIBUTIONS, "click", "a-vendor-build-of-click")
    assert doctor.package("click") == doctor.Package("a-vendor-build-of-click", "unknown", None, None)


def test_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "no_such_module", "report")
    missing = doctor.package("no_such_module")
    assert (missing.version, missing.install) == (None, "pip install 'ssod-edge[report]'")
    monkeypatch.delitem(doctor.EXTRAS, "no_such_module")
    assert doctor.package("no_such_module").install == "pip install no_such_module"


def empty_report() -> doctor.Report:
    cpu = {"model": "a CPU", "usable_cores": 2, "quota": 0.5, "flags": []}
    return doctor.Report("0", "3.10", "Linux", cpu, ["a GPU, 580.1"], None, packages=(), engines=())


def test_without_an_engine_doctor_ends_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = doctor.Engine("openvino", "CPU", "failed", "plugin [CPU] not found")
    torch_missing = doctor.Package("torch", None, "train", "pip install 'ssod-edge[train]'")
    onnx_missing = doctor.Package("onnx", None, "onnx", "pip install 'ssod-edge[onnx]'")
    report = replace(empty_report(), engines=(broken,), packages=(torch_missing, onnx_missing))
    monkeypatch.setattr(doctor, "examine", lambda: report)
    assert doctor.run_doctor(as_json=False) == 3
    printed = capsys.readouterr().out
    assert "plugin [CPU] not found" in printed
    assert "a CPU, 2 cores (a container's limit allows 0.5)\nCPU features: unknown\nGPU: a GPU, 580.1\n" in printed
    assert "No engine can run an export here" in printed
    assert "pip install 'ssod-edge[onnx,train]'" in printed


def test_a_builder_alone_runs_nothing() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx, which the extra 'dev' brings")
    engines = doctor.try_engine("tensorrt_rtx")
    assert (engines[0].device, engines[0].status) == ("builder", "ok")
    assert replace(empty_report(), engines=(engines[0],)).working_runtimes == ()
    on_gpu = replace(engines[0], device="CUDA:0")
    assert replace(empty_report(), engines=(on_gpu,)).working_runtimes == ("tensorrt_rtx",)


def test_what_a_gpu_needs_is_named_only_where_there_is_one() -> None:
    packages = tuple(doctor.Package(extra, None, extra, f"pip {extra}") for extra in ("onnx", *doctor.GPU_EXTRAS))
    report = replace(empty_report(), packages=packages)
    assert "pip install 'ssod-edge[onnx]'" in "\n".join(doctor.advice(report))
    assert "jetson" in doctor.advice(report)[-1]
    assert "jetson" not in "\n".join(doctor.advice(replace(report, gpus=[])))
    working = (doctor.Engine("tensorrt", "CUDA:0", "ok", ""),)
    assert "jetson" not in "\n".join(doctor.advice(replace(report, engines=working)))


def test_one_working_engine_is_enough() -> None:
    engines = (doctor.Engine("openvino", "CPU", "ok", ""), doctor.Engine("onnxruntime", "", "missing", ""))
    assert replace(empty_report(), engines=engines).working_runtimes == ("openvino",)
    # torch alone runs no export
    assert replace(empty_report(), engines=(doctor.Engine("torch", "CPU", "ok", ""),)).working_runtimes == ()


def test_command_prints_json_that_matches_this_machine() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    document = json.loads(result.stdout)
    assert result.exit_code == (0 if document["working_runtimes"] else 3)
    names = {entry["name"]: entry for entry in document["packages"]}
    assert names["numpy"]["version"] == np.__version__
    assert len(names) == len(EXTRAS) + len(doctor.BASE)
    assert {engine["engine"] for engine in document["engines"]} == set(probe.PROBES)
    for engine in document["engines"]:
        if engine["engine"] in ("onnxruntime", "openvino") and engine["device"] == "CPU":
            assert engine["status"] == "ok", engine


def test_command_prints_tables() -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert "Engines, each tried" in result.output
    assert "scikit-learn" in result.output
