"""Opening artifacts: each engine's numbers, what is chosen, what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from colour import CLASSES, SIZE, colour_images, colour_outputs, edit_graph, edit_spec
from house import MODULES

from ssod_edge.config import Preprocess
from ssod_edge.detect.confidence import verdict_inputs
from ssod_edge.errors import ArtifactError, EngineError, MissingExtraError, OutputError, UsageError, VerificationError
from ssod_edge.runtime.engines.onnxruntime import new_session, session_options
from ssod_edge.runtime.engines.openvino import request_config
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import choose_artifact, open_runner
from ssod_edge.runtime.runner import check_graph, check_images
from ssod_edge.runtime.verify import verify_runner
from ssod_edge.spec import load_spec

MakeExport = Callable[..., Path]

CPU_ENGINES = ("openvino", "onnxruntime")
ARTIFACTS = ("onnx-fp32", "onnx-fp16", "openvino-fp32", "openvino-fp16")


@pytest.mark.parametrize("name", ARTIFACTS)
@pytest.mark.parametrize("n", [1, 5])
def test_outputs_are_those_of_the_formulas(export: Path, name: str, n: int) -> None:
    images = colour_images(n, seed=3)
    logits, id_logit = colour_outputs(images)
    with open_runner(export, artifact=name) as runner:
        outputs = runner.infer({"image": images})
        computed = runner.precision
    tolerance = 1e-4 if name.endswith("fp32") else 5e-2 if computed == "fp16" else 1e-2
    assert {key: (value.shape, value.dtype) for key, value in outputs.items()} == {
        "logits": ((n, 3), np.float32),
        "probs": ((n, 3), np.float32),
        "id_logit": ((n,), np.float32),
        "ood_score": ((n,), np.float32),
        "p_known": ((n,), np.float32),
        "known": ((n,), np.bool_),
    }
    np.testing.assert_allclose(outputs["logits"], logits, atol=tolerance)
    np.testing.assert_allclose(outputs["id_logit"], id_logit, atol=tolerance)
    np.testing.assert_allclose(outputs["probs"].sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(outputs["ood_score"], -np.logaddexp.reduce(logits, axis=1), atol=tolerance)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_the_graph_says_what_is_known_and_how_usual_it_is(export: Path, name: str) -> None:
    """At the threshold for 95% the p-value is 0.05: above it an image is known, and only then."""
    greys = np.linspace(0, 255, 120).astype(np.uint8)[:, None, None, None]
    images = np.concatenate([colour_images(80, seed=4), np.broadcast_to(greys, (120, 3, SIZE, SIZE))])
    with open_runner(export, artifact=name) as runner:
        outputs = runner.infer({"image": images})
        known, p = outputs["known"], outputs["p_known"]
        np.testing.assert_array_equal(known, outputs["ood_score"] <= -2.0)
        np.testing.assert_array_equal(known, p > 0.05)
        assert 20 < known.sum() < 180 and p.min() < 0.02 and p.max() == 1
        order = np.argsort(outputs["ood_score"])
        assert (np.diff(p[order]) <= 0).all()
        threshold = runner.artifact.threshold
        runner.artifact = replace(runner.artifact, threshold=replace(threshold, value=-6.0))
        np.testing.assert_array_equal(runner.infer({"image": images})["known"], outputs["ood_score"] <= -6.0)
        runner.artifact = replace(runner.artifact, threshold=None)
        after = runner.infer({"image": images})
        assert not after["known"].any() and not after["p_known"].any()


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact_that_decides_otherwise_than_its_threshold_says_is_refused(export: Path, name: str) -> None:
    with open_runner(export, artifact=name) as runner:
        right = verify_runner(runner, export)
        runner.verdict_inputs = lambda: verdict_inputs(None)  # type: ignore[method-assign]
        wrong = verify_runner(runner, export)
    assert right.passed and right.verdict_errors == 0
    assert wrong.failures == (f"verdict_errors is {wrong.verdict_errors}, at most 0 allowed",)
    assert 0 < wrong.verdict_errors <= 40


@pytest.mark.parametrize("name", ARTIFACTS)
def test_reports_what_really_ran(export: Path, name: str) -> None:
    with open_runner(export, artifact=name, threads=1) as runner:
        assert runner.engine == {"onnx": "onnxruntime", "openvino": "openvino"}[name.split("-")[0]]
        assert runner.device == "CPU"
        assert runner.precision in (("fp32",) if name != "onnx-fp16" else ("fp32", "fp16"))
        assert runner.details["threads"] == "1"
        assert runner.artifact.name == name
        assert runner.spec.classes == CLASSES


def test_openvino_never_picks_bf16_by_itself() -> None:
    for precision in ("fp32", "fp16"):
        hint = request_config("CPU", precision, ["FP32", "FP16", "BF16"], None)["INFERENCE_PRECISION_HINT"]
        assert hint == "f32", "a 16-bit last layer makes tied scores"
    assert request_config("GPU", "fp16", ["FP32", "FP16"], 3) == {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f16",
    }
    assert request_config("GPU", "fp16", ["FP32"], None)["INFERENCE_PRECISION_HINT"] == "f32"
    assert request_config("GPU", "fp32", ["FP32", "FP16"], None)["INFERENCE_PRECISION_HINT"] == "f32"


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_outputs_belong_to_the_caller(export: Path, engine: str) -> None:
    first, second = colour_images(2, seed=1)[:, None]
    with open_runner(export, engine=engine) as runner:
        outputs = runner.infer({"image": first})
        kept = {name: value.copy() for name, value in outputs.items()}
        runner.infer({"image": second})
    for name, value in kept.items():
        np.testing.assert_array_equal(outputs[name], value)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_strided_and_read_only_images_give_the_same_numbers(export: Path, engine: str) -> None:
    images = colour_images(4, seed=2)
    strided = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    read_only = images.copy()
    read_only.flags.writeable = False
    with open_runner(export, engine=engine) as runner:
        expected = runner.infer({"image": images})["logits"]
        np.testing.assert_array_equal(runner.infer({"image": strided})["logits"], expected)
        np.testing.assert_array_equal(runner.infer({"image": read_only})["logits"], expected)
        np.testing.assert_allclose(runner.infer({"image": images[::2]})["logits"], expected[::2], atol=1e-5)


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'image'"),
        ({"pixels": colour_images(1)}, "pixels"),
        ({"image": colour_images(1).astype(np.float32)}, "float32"),
        ({"image": [[1, 2]]}, "list"),
        ({"image": colour_images(1)[0]}, r"\[3, 16, 16\]"),
        ({"image": colour_images(1)[:, :, :8]}, r"\[1, 3, 8, 16\]"),
        ({"image": colour_images(1)[:0]}, "N >= 1"),
    ],
)
def test_wrong_inputs_are_named(export: Path, engine: str, inputs: dict, message: str) -> None:
    with open_runner(export, engine=engine) as runner, pytest.raises(UsageError, match=message):
        runner.infer(inputs)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_a_closed_runner_says_so(export: Path, engine: str) -> None:
    with open_runner(export, engine=engine) as runner:
        pass
    with pytest.raises(UsageError, match="closed"):
        runner.infer({"image": colour_images(1)})


def test_auto_takes_openvino_then_onnxruntime(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(export)
    assert choose_artifact(spec).name == "openvino-fp32"
    assert choose_artifact(spec, precision="fp16").name == "openvino-fp16"
    assert choose_artifact(spec, engine="onnxruntime").name == "onnx-fp32"
    assert choose_artifact(replace(spec, artifacts=spec.artifacts[::-1])).name == "openvino-fp32"
    monkeypatch.setitem(sys.modules, "openvino", None)
    with open_runner(export) as runner:
        assert runner.artifact.name == "onnx-fp32"


def test_a_missing_engine_names_the_command_that_installs_it(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ssod-edge\[openvino\]'"):
        open_runner(export, engine="openvino")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ssod-edge\[onnx\]'"):
        open_runner(export, artifact="onnx-fp16")
    with pytest.raises(MissingExtraError):
        open_runner(export)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ssod-edge\[train\]'"):
        open_runner(export, engine="eager")


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (
            "raise ImportError('libgomp.so.1: no such file')",
            "EngineError:'{}' is installed and cannot be loaded: libgomp",
        ),
        ("import sys; sys.modules[__name__] = None; import {}", "MissingExtraError:the {} engine needs the package"),
    ],
)
def test_an_engine_that_cannot_be_imported(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, broken: str, kind: str
) -> None:
    (tmp_path / engine).mkdir()
    (tmp_path / engine / "__init__.py").write_text(broken.format(engine))
    monkeypatch.delitem(sys.modules, engine, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((EngineError, MissingExtraError)) as error:
        open_runner(export, engine=engine)
    assert f"{error.type.__name__}:{error.value}".startswith(kind.format(engine))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tensorflow"}, "engine must be one of auto, tensorrt, tensorrt_rtx, openvino, onnxruntime, eager"),
        ({"precision": "int4"}, "precision must be one of"),
        ({"artifact": "onnx-int8"}, "it has: onnx-fp32"),
        ({"artifact": "onnx-fp16", "engine": "openvino"}, "nothing fits"),
        ({"artifact": "onnx-fp16", "precision": "fp32"}, "nothing fits"),
        ({"threads": 0}, "threads"),
        ({"engine": "eager", "precision": "fp16"}, "eager"),
        ({"engine": "eager", "artifact": "onnx-fp32"}, "eager"),
    ],
)
def test_wrong_options_are_named(export: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_runner(export, **options)


def test_an_engine_that_the_export_lacks_is_not_replaced(export: Path) -> None:
    edit_spec(export, lambda spec: replace(spec, artifacts=spec.artifacts[:1]))
    with pytest.raises(UsageError, match=r"this export has: onnx-fp32 \(onnxruntime, fp32\)"):
        open_runner(export, engine="openvino")
    edit_spec(export, lambda spec: replace(spec, artifacts=()))
    with pytest.raises(UsageError, match="no artifacts"):
        open_runner(export)


def test_an_engine_of_a_newer_release_is_refused(export: Path) -> None:
    edit_spec(export, lambda spec: replace(spec, artifacts=(replace(spec.artifacts[0], engine="quantum"),)))
    with pytest.raises(ArtifactError, match="quantum"):
        open_runner(export)


@pytest.mark.parametrize("name", ["model-fp32.onnx", "openvino-fp32/model.bin", "reference.npz"])
@pytest.mark.parametrize("how", ["edited", "cut", "gone"])
def test_damaged_files_are_refused_before_loading(export: Path, name: str, how: str) -> None:
    path = export / name
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=path.name):
        open_runner(export, artifact="onnx-fp32" if name.endswith("onnx") else "openvino-fp32")


@pytest.mark.parametrize("name", ["onnx-fp32", "onnx-fp16", "openvino-fp32"])
def test_a_file_that_the_engine_cannot_load_is_an_engine_error(export: Path, name: str) -> None:
    path = export / load_spec(export).artifact(name).main_file
    path.write_bytes(b"" if path.suffix == ".onnx" else b"this is no model")  # an ONNX message without a graph
    edit_spec(export, lambda spec: spec, rehash=True)
    with pytest.raises(EngineError, match="cannot load"):
        open_runner(export, artifact=name)


@pytest.mark.parametrize("name", ["onnx-fp32", "onnx-fp16", "openvino-fp32"])
def test_a_file_of_a_newer_release_of_the_engine_says_which(export: Path, name: str) -> None:
    """Operations that this release has not heard of; what an engine says of them is a page of its source code."""
    path, package = export / load_spec(export).artifact(name).main_file, load_spec(export).artifact(name).engine
    newer = {package: "9999.1.0-123-abc"}
    if path.suffix == ".onnx":
        graph = onnx.load(path)
        graph.ir_version = 99
        onnx.save(graph, path)
    else:
        path.write_text(path.read_text().replace('version="opset1"', 'version="opset77"', 1))
    edit_spec(export, lambda spec: spec, rehash=True)
    with pytest.raises(EngineError, match="IR version: 99|unsupported opset: opset77") as caught:
        open_runner(export, artifact=name)
    assert not re.search(r"\n|\.cpp|\.cc|\[ONNX", str(caught.value)), str(caught.value)
    edit_spec(
        export,
        lambda spec: replace(spec, artifacts=tuple(replace(a, versions=newer) for a in spec.artifacts)),
        rehash=True,
    )
    message = (
        rf"cannot load .* was made by {package} 9999\.1\.0\. .*'{package}>=9999\.1\.0'.*export --from BUNDLE here$"
    )
    with pytest.raises(EngineError, match=message):
        open_runner(export, artifact=name)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Exception from a/b.cpp:246:\nCaught exception: x\n[CPU] Softmax can't alloc", "out of memory: use a smaller"),
        ("Failed to allocate memory for requested buffer of size 12", "out of memory: use a smaller"),
        ("Exception from a/b.cpp:246:\nthe device was lost", "ran: the device was lost"),
    ],
)
@pytest.mark.parametrize("name", ["onnx-fp32", "openvino-fp32"])
def test_an_engine_that_fails_while_it_runs_says_why_in_a_line(
    export: Path, name: str, said: str, expected: str
) -> None:
    class Failing:
        def run(self, *_: object) -> None:
            raise RuntimeError(said)

        start_async = run

    with open_runner(export, artifact=name) as runner:
        runner.infer({"image": colour_images(1)})
        setattr(runner, "_session" if name.startswith("onnx") else "_single", Failing())
        with pytest.raises(EngineError, match=expected) as caught:
            runner.infer({"image": colour_images(1)})
        assert "\n" not in str(caught.value) and ".cpp" not in str(caught.value)


@pytest.mark.parametrize("name", ["onnx-fp32", "openvino-fp32", "openvino-fp16"])
def test_one_image_and_many_get_the_same_answers_when_the_files_are_gone_too(export: Path, name: str) -> None:
    """OpenVINO compiles a model for one image when it is opened, and one for more when they come."""
    images = colour_images(5)
    with open_runner(export, artifact=name) as runner:
        shutil.rmtree(export)
        alone = [runner.infer({"image": image[None]}) for image in images]
        together = runner.infer({"image": images})
        again = runner.infer({"image": images[:1]})
    for output, values in together.items():
        assert np.allclose([one[output][0] for one in alone], values, rtol=1e-5, atol=1e-6), output
        assert np.array_equal(again[output], alone[0][output])


@pytest.mark.parametrize("name", ["onnx-fp32", "openvino-fp32"])
def test_threads_share_a_runner_and_each_gets_its_own_answer(export: Path, name: str) -> None:
    batches = [colour_images(1, seed=seed) for seed in range(4)]
    with open_runner(export, artifact=name, threads=1) as runner:
        expected = [runner.infer({"image": batch})["logits"] for batch in batches]

        def wrong(index: int) -> int:
            found = (runner.infer({"image": batches[index]})["logits"] for _ in range(200))
            return sum(not np.array_equal(logits, expected[index]) for logits in found)

        with ThreadPoolExecutor(len(batches)) as pool:
            assert list(pool.map(wrong, range(len(batches)))) == [0] * len(batches)


def test_a_file_that_is_no_onnx_is_damaged_whatever_its_hash(export: Path) -> None:
    (export / "model-fp32.onnx").write_bytes(b"this is no model")
    edit_spec(export, lambda spec: spec, rehash=True)
    with pytest.raises(ArtifactError, match="no ONNX file"):
        open_runner(export, artifact="onnx-fp32")


@pytest.mark.parametrize("name", ARTIFACTS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preprocess": Preprocess(input_size=64)}, "input_size 64 and 3 classes: image has shape ['N', 3, 16, 16]"),
        ({"classes": ("red", "green")}, "input_size 16 and 2 classes: logits has shape ['N', 3]"),
        ({"classes": ("red", "green", "blue", "grey")}, "4 classes: logits has shape ['N', 3]"),
    ],
)
def test_a_spec_of_another_graph_is_refused(export: Path, name: str, change: dict, message: str) -> None:
    edit_spec(export, lambda spec: replace(spec, **change))
    with pytest.raises(ArtifactError) as caught:
        open_runner(export, artifact=name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_graph_without_an_output_is_refused(export: Path) -> None:
    spec = load_spec(export)
    check_graph(Path("m"), spec, ("logits",), {"image": ["N", 3, None, 16], "logits": []})
    with pytest.raises(ArtifactError, match="it has no 'probs'"):
        check_graph(Path("m"), spec, ("logits", "probs"), {"image": ["N", 3, 16, 16], "logits": ["N", 3]})


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_an_unknown_device_is_refused(export: Path, engine: str) -> None:
    with pytest.raises(EngineError, match="'NPU'"):
        open_runner(export, engine=engine, device="NPU")


def test_missing_folder_and_run_folder(export: Path) -> None:
    with pytest.raises(UsageError, match="does not exist. Give the folder of a run or an export"):
        open_runner(export / "nowhere")
    assert Export.at(export.parent).folder == export
    with open_runner(export.parent) as runner:
        assert runner.artifact.name == "openvino-fp32"


def test_untrained_weights_must_be_asked_for(make_export: MakeExport, tmp_path: Path) -> None:
    make_export(tmp_path, trained=False)
    with pytest.raises(UsageError, match="--allow-untrained"):
        open_runner(tmp_path)
    with open_runner(tmp_path, allow_untrained=True) as runner:
        assert runner.artifact.threshold is None


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact_without_figures_is_verified_on_its_first_run(
    make_export: MakeExport, tmp_path: Path, name: str
) -> None:
    make_export(tmp_path, verified=False)
    with open_runner(tmp_path, artifact=name) as runner:
        figures = load_spec(tmp_path).artifact(name).verification
        assert figures == runner.artifact.verification
    assert figures is not None and figures["passed"] and figures["n"] == 40 and figures["decision_flips"] == 0
    others = [a.verification for a in load_spec(tmp_path).artifacts if a.name != name]
    assert others == [None, None, None]


def test_figures_of_another_device_are_made_again(export: Path) -> None:
    def elsewhere(spec):
        moved = {"passed": True, "precision": "fp16", "device": "GPU"}
        return spec.with_artifact(replace(spec.artifact("openvino-fp32"), verification=moved))

    edit_spec(export, elsewhere)
    open_runner(export)
    figures = load_spec(export).artifact("openvino-fp32").verification
    assert figures is not None and (figures["precision"], figures["device"], figures["n"]) == ("fp32", "CPU", 40)


def test_an_artifact_that_fails_on_its_first_run_is_refused(make_export: MakeExport, tmp_path: Path) -> None:
    make_export(tmp_path, verified=False)
    edit_graph(tmp_path, "onnx-fp32", bias=np.array([0, 0, 1, -1], np.float32))
    with pytest.raises(VerificationError, match=r"max_abs_logit_diff is 1\.1"):
        open_runner(tmp_path, artifact="onnx-fp32")
    assert load_spec(tmp_path).artifact("onnx-fp32").verification is None
    with open_runner(tmp_path, artifact="onnx-fp32", verify=False) as runner:
        assert runner.artifact.verification is None


def test_an_artifact_that_failed_where_it_was_built_is_refused(export: Path) -> None:
    def failed(spec):
        figures = {"passed": False, "failures": ["max_abs_logit_diff is 9"]}
        return spec.with_artifact(replace(spec.artifact("onnx-fp32"), verification=figures))

    edit_spec(export, failed)
    with pytest.raises(VerificationError, match="max_abs_logit_diff is 9"):
        open_runner(export, artifact="onnx-fp32")


def test_a_read_only_folder_still_runs(
    make_export: MakeExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_export(tmp_path, verified=False)

    def read_only(*_: object) -> None:
        raise OutputError("read-only")  # a folder's permissions don't stop root

    monkeypatch.setattr("ssod_edge.runtime.verify.save_spec", read_only)
    with open_runner(tmp_path) as runner:
        assert runner.artifact.verification is not None
    assert "not recorded" in caplog.text
    assert load_spec(tmp_path).artifacts[0].verification is None


def test_onnxruntime_precision_is_read_from_the_profile(export: Path, tmp_path: Path) -> None:
    """The CPU provider casts what it has no fp16 kernel for; then nothing of the fp16 graph ran in fp16.

    It has them for Arm processors with half precision, such as a Raspberry Pi 5's.
    """
    half = "asimdhp" in Path("/proc/cpuinfo").read_text()
    with open_runner(export, artifact="onnx-fp16") as runner:
        assert runner.precision == ("fp16" if half else "fp32")
    graph = onnx.load(export / "model-fp16.onnx").graph
    assert any(value.data_type == onnx.TensorProto.FLOAT16 for value in graph.initializer)
    assert not list(tmp_path.glob("*onnxruntime_profile*")), "the profile is removed"


def test_onnxruntime_takes_no_other_provider_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """It would say "Falling back" on standard output, where a command's JSON goes."""
    with pytest.raises(Exception, match=r"(?i)fail|invalid|protobuf"):
        new_session(b"no graph", session_options())
    assert capfd.readouterr().out == ""


def test_every_session_of_onnxruntime_is_made_in_one_place() -> None:
    found = {name for name, path in MODULES.items() if "InferenceSession(" in path.read_text(encoding="utf-8")}
    assert found == {"ssod_edge.runtime.engines.onnxruntime"}


PREDICT_WITHOUT_TORCH = """
import sys
for name in ("torch", "timm", "torchvision", "onnx", "sklearn", "scipy"):
    sys.modules[name] = None
import ssod_edge
assert "numpy" not in sys.modules, "importing ssod_edge must be cheap"
import ssod_edge.cli
assert "numpy" not in sys.modules
with ssod_edge.open(sys.argv[1], engine=sys.argv[2]) as model:
    print(model.predict(sys.argv[3]).class_name)
heavy = [m for m in sys.modules if m.split(".")[0] in ("torch", "timm") and sys.modules[m] is not None]
assert not heavy, heavy
other = {"openvino": "onnxruntime", "onnxruntime": "openvino"}[sys.argv[2]]
assert other not in sys.modules, "only the engine in use is imported"
"""


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_runs_without_torch_and_without_a_word_on_stderr(export: Path, tmp_path: Path, engine: str) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), (200, 20, 20)).save(tmp_path / "red.png")
    command = [sys.executable, "-c", PREDICT_WITHOUT_TORCH, str(export), engine, str(tmp_path / "red.png")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.stdout, done.stderr, done.returncode) == ("red\n", "", 0)


SIGNAL_AFTER_TWO = """
import gc, os, signal, sys
from ssod_edge.runtime.open import open_runner
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
first, second = (open_runner(sys.argv[1], artifact=name) for name in ("openvino-fp32", "openvino-fp16"))
del first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_is_survived_after_two_openvino_runners_went_in_the_order_they_came(export: Path) -> None:
    """With a Core each, the second left a signal stack behind that is no longer there."""
    command = [sys.executable, "-c", SIGNAL_AFTER_TWO, str(export)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("handled\n", 0)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with a real checkpoint (timm's smallest ResNet) and no export."""
    torch = pytest.importorskip("torch")
    from ssod_edge.config import Preprocess
    from ssod_edge.training.checkpoint import BEST, model_meta, model_tensors, save_checkpoint
    from ssod_edge.training.model import build_model

    torch.manual_seed(0)
    model = build_model("test_resnet", CLASSES, Preprocess(input_size=SIZE)).eval()
    save_checkpoint(tmp_path / "run" / BEST, model_tensors(model), {**model_meta(model), "trained": True})
    return tmp_path / "run"


def test_eager_may_be_closed_while_another_thread_runs(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that is under way ends; the next one says that the runner is closed."""
    import torch

    from ssod_edge.training import eager

    runner, images, threads = open_runner(run_folder, engine="eager"), colour_images(2), torch.get_num_threads()
    expected = runner.infer({"image": images})["logits"]

    def closing(*arguments: Any) -> Any:
        runner.__exit__(None, None, None)
        return check_images(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(eager, "check_images", closing)
        assert np.array_equal(runner.infer({"image": images})["logits"], expected)
    with pytest.raises(UsageError, match="closed"):
        runner.infer({"image": images})
    assert torch.get_num_threads() == threads


def test_eager_runs_the_checkpoint(run_folder: Path) -> None:
    import torch

    from ssod_edge.training.model import normalise
    from ssod_edge.training.run import Run

    images = colour_images(3)
    threads = torch.get_num_threads()
    with open_runner(run_folder, engine="eager", threads=threads + 1) as runner:
        assert runner.details["threads"] == str(threads + 1)
        outputs = runner.infer({"image": images})
        assert (runner.engine, runner.precision, runner.device) == ("eager", "fp32", "CPU")
        assert runner.artifact.threshold is None and runner.spec.trained
    assert torch.get_num_threads() == threads, "the number of threads is the whole process's"
    model = Run.at(run_folder).model
    with torch.no_grad():
        logits, id_logit = model(normalise(torch.from_numpy(images), model.preprocess))
    # one thread adds in another order than several
    np.testing.assert_allclose(outputs["logits"], logits.numpy(), atol=1e-5)
    np.testing.assert_allclose(outputs["id_logit"], id_logit.numpy(), atol=1e-5)
    np.testing.assert_allclose(outputs["probs"], logits.softmax(1).numpy(), atol=1e-6)
    np.testing.assert_allclose(outputs["ood_score"], -logits.logsumexp(1).numpy(), atol=1e-5)
    with pytest.raises(UsageError, match="closed"):
        runner.infer({"image": images})
    with pytest.raises(EngineError, match="'GPU'"):
        open_runner(run_folder, engine="eager", device="GPU")


def test_eager_beside_an_export(make_export: MakeExport, run_folder: Path) -> None:
    """The export's score, the threshold of its fp32 artifact, and only the checkpoint that was exported."""
    from ssod_edge.files import sha256_file
    from ssod_edge.training.checkpoint import BEST

    export = run_folder / "export"
    make_export(export)
    digest = sha256_file(run_folder / BEST)
    edit_spec(export, lambda spec: replace(spec, source={"checkpoint_sha256": digest}))
    for folder in (run_folder, export, run_folder / BEST):
        with open_runner(folder, engine="eager") as runner:
            assert runner.spec == load_spec(export)
            assert runner.artifact.files == {BEST: digest}
            assert runner.artifact.threshold == load_spec(export).artifact("onnx-fp32").threshold is not None
    fp16 = [replace(artifact, precision="fp16") for artifact in load_spec(export).artifacts]
    edit_spec(export, lambda spec: replace(spec, artifacts=tuple(fp16)))
    with open_runner(export, engine="eager") as runner:
        threshold = runner.artifact.threshold
    with np.load(export / "reference.npz") as reference:
        scores = np.sort(reference["score_energy"])
    assert threshold is not None and threshold.value == pytest.approx(scores[38]), "the 39th of 40: ceil(41 * 0.95)"
    edit_spec(export, lambda spec: replace(spec, classes=("red", "green")))
    with pytest.raises(ArtifactError, match="ssod.json names 2 classes, and .* has 3"):
        open_runner(export, engine="eager")
    edit_spec(export, lambda spec: replace(spec, classes=CLASSES, source={"checkpoint_sha256": "0" * 64}))
    with pytest.raises(ArtifactError, match="not the checkpoint of this export"):
        open_runner(export, engine="eager")


def test_eager_refuses_untrained_weights_and_missing_checkpoints(
    make_export: MakeExport, run_folder: Path, tmp_path: Path
) -> None:
    export = run_folder / "export"
    make_export(export, trained=False)
    with pytest.raises(UsageError, match="--allow-untrained"):
        open_runner(run_folder, engine="eager")
    with open_runner(run_folder, engine="eager", allow_untrained=True) as runner:
        assert runner.artifact.threshold is None
    with pytest.raises(UsageError, match="does not exist"):
        open_runner(tmp_path / "nothing", engine="eager")


def test_the_spec_on_disk_stays_json(export: Path) -> None:
    open_runner(export)
    assert json.loads((export / "ssod.json").read_text())["schema_version"] == 4
