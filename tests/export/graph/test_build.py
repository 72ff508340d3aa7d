"""A whole export: its artifacts, their thresholds, and what a failure leaves behind."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from places import ROOT
from small import CLASSES, SIZE, eager, random_images, write_run

from ssod_edge.detect.scores import ood_scores
from ssod_edge.errors import ArtifactError, MissingExtraError, OutputError, UsageError, VerificationError
from ssod_edge.export.command import SourceOptions, TargetOptions, run_export
from ssod_edge.export.engines.openvino import save_ir
from ssod_edge.export.graph.build import ExportOptions, _overflow_record, export_run, export_source
from ssod_edge.export.graph.fp16 import HalfReport
from ssod_edge.export.graph.onnx import fused_graph
from ssod_edge.export.graph.reference import run_eager
from ssod_edge.export.graph.source import from_run
from ssod_edge.files import sha256_file
from ssod_edge.runtime.open import open_runner
from ssod_edge.spec import (
    LOGIT_OUTPUTS,
    VERDICT_INPUTS,
    VERDICT_OUTPUTS,
    Threshold,
    check_files,
    check_hash,
    load_spec,
    save_spec,
)
from ssod_edge.training.checkpoint import BEST
from ssod_edge.training.model import SSODClassifier


@pytest.fixture(scope="module")
def exported(small_run: Path) -> Path:
    """The export of that run, with both precisions on both engines. Nobody changes it."""
    export_run(small_run)
    return small_run / "export"


@pytest.fixture
def traced_once(small_graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the small model take the graph that was traced already: tracing it takes most of the time."""

    def same(model: SSODClassifier, score: str, trained: bool, *others: object) -> onnx.ModelProto:
        assert (model.backbone_name, model.classes) == ("test_efficientnet", CLASSES)
        assert (score, trained, *others) == ("energy", True, None, 1.0, ())
        graph = onnx.ModelProto()
        graph.CopyFrom(small_graph)
        return graph

    monkeypatch.setattr("ssod_edge.export.graph.build.fused_graph", same)


def snapshot(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


NAMES = ["onnx-fp32", "onnx-fp16", "openvino-fp32", "openvino-fp16"]


def test_export_holds_every_artifact_verified_and_with_its_own_threshold(exported: Path) -> None:
    spec = load_spec(exported)
    assert [artifact.name for artifact in spec.artifacts] == NAMES
    assert spec.trained and spec.classes == CLASSES and spec.score["name"] == "energy"
    assert spec.source["run"] == "small" and spec.source["epoch"] == 3
    assert spec.source["checkpoint_sha256"] == sha256_file(exported.parent / BEST)
    for artifact in spec.artifacts:
        assert artifact.threshold is not None and artifact.verification is not None
        assert artifact.threshold.n == 42
        assert f"calib split {spec.source['splits_hash'][:12]}" in artifact.threshold.data
        assert artifact.verification["passed"] and artifact.verification["n"] == 42
        assert {"torch", "onnx", artifact.engine, "ssod-edge"} <= set(artifact.versions)
    listed = {name for artifact in spec.artifacts for name in artifact.files} | {"ssod.json", "reference.npz"}
    assert set(snapshot(exported)) == listed | {"features.npz"} and spec.features["tuned"] == "all"


def test_fp32_drifts_by_rounding_alone_and_fp16_by_more(exported: Path) -> None:
    drift = {a.name: (a.verification or {})["max_abs_logit_diff"] for a in load_spec(exported).artifacts}
    with np.load(exported / "reference.npz") as reference:
        scale = np.abs(reference["logits"]).max()
    for engine in ("onnx", "openvino"):
        assert drift[f"{engine}-fp32"] < 1e-5 * scale
        assert 1e-5 * scale < drift[f"{engine}-fp16"] < 1e-2 * scale


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 5])
def test_every_artifact_gives_the_eager_numbers_on_new_images(
    small_model: SSODClassifier, exported: Path, name: str, n: int
) -> None:
    images = random_images(n, seed=7)
    expected = eager(small_model, images)
    expected["ood_score"] = ood_scores(expected["logits"], expected["id_logit"])["energy"]
    with open_runner(exported, artifact=name) as runner:
        outputs = runner.infer({"image": images.numpy()})
    for key, value in expected.items():
        np.testing.assert_allclose(outputs[key], value, rtol=0, atol=1e-4 if name.endswith("fp32") else 0.03)


@pytest.mark.parametrize("name", NAMES)
def test_threshold_is_the_conformal_quantile_of_the_artifacts_own_scores(exported: Path, name: str) -> None:
    # 42 calibration images: all of them are in the reference too.
    with open_runner(exported, artifact=name) as runner:
        images = np.load(exported / "reference.npz")["image"]
        scores = runner.infer({"image": images})["ood_score"]
        threshold = runner.artifact.threshold
    assert threshold is not None
    assert threshold.value == pytest.approx(np.sort(scores)[int(np.ceil(43 * 0.95)) - 1], abs=1e-5)
    assert threshold.fitted_tpr == pytest.approx(41 / 42)


def test_onnx_file_tells_what_it_is_and_nothing_about_this_machine(exported: Path) -> None:
    for precision in ("fp32", "fp16"):
        graph = onnx.load(exported / f"model-{precision}.onnx")
        properties = {p.key: p.value for p in graph.metadata_props}
        assert properties["ssod.schema_version"] == "4"
        assert properties["ssod.backbone"] == "test_efficientnet"
        assert json.loads(properties["ssod.classes"]) == list(CLASSES)
        assert json.loads(properties["ssod.preprocess"])["input_size"] == SIZE
        assert (properties["ssod.score"], properties["ssod.trained"]) == ("energy", "true")
        assert [(o.domain, o.version) for o in graph.opset_import] == [("", 18)]
        assert [o.name for o in graph.graph.output] == [*LOGIT_OUTPUTS, *VERDICT_OUTPUTS]
        image, *beside = graph.graph.input
        assert tuple(value.name for value in beside) == VERDICT_INPUTS
        assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
        assert image.type.tensor_type.shape.dim[0].dim_param == "batch"
    for path in exported.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"site-packages" not in data and str(ROOT).encode() not in data


def test_reference_holds_the_eager_numbers(small_model: SSODClassifier, exported: Path) -> None:
    with np.load(exported / "reference.npz") as reference:
        logits, id_logit, _ = run_eager(small_model, reference["image"])
        np.testing.assert_allclose(reference["logits"], logits, atol=1e-5)
        for score, value in ood_scores(logits, id_logit).items():
            np.testing.assert_allclose(reference[f"score_{score}"], value, atol=1e-4)
        assert set(np.unique(reference["label"])) == set(range(len(CLASSES)))


def test_missing_packages_are_named_before_any_work(
    small_run: Path, small_model: SSODClassifier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"ssod-edge\[onnx\]"):
        fused_graph(small_model, "energy", trained=True)
    for engine, extra in (("openvino", "openvino"), ("onnxruntime", "onnx")):
        with pytest.raises(MissingExtraError, match=rf"ssod-edge\[{extra}\]"):
            export_run(small_run, tmp_path / "out", engines=[engine])
    assert not list(tmp_path.iterdir())


def test_the_same_run_gives_the_same_bytes(small_run: Path, exported: Path, traced_once: None, tmp_path: Path) -> None:
    export_run(small_run, tmp_path / "again")
    before, after = snapshot(exported), snapshot(tmp_path / "again")
    # An .xml file and the spec that hashes it differ: OpenVINO counts the nodes of a process in their names.
    assert {name for name in before if before[name] != after.pop(name)} <= {"ssod.json"} | {
        f"openvino-{precision}/model.xml" for precision in ("fp32", "fp16")
    }
    assert not after


def test_choosing_precision_and_engine(small_run: Path, traced_once: None, tmp_path: Path) -> None:
    spec = export_run(small_run, tmp_path / "out", precisions=["fp16"], engines=["openvino"])
    assert [artifact.name for artifact in spec.artifacts] == ["openvino-fp16"]
    assert {p.split("/")[0] for p in snapshot(tmp_path / "out")} == {
        *("ssod.json", "reference.npz", "features.npz", "openvino-fp16")
    }
    for wrong in ({"precisions": ["int3"]}, {"engines": []}, {"target_tpr": 1.0}):
        with pytest.raises(UsageError):
            export_run(small_run, tmp_path / "out", **wrong)  # type: ignore[arg-type]


def test_artifacts_that_are_not_made_again_are_kept_with_their_thresholds(
    small_run: Path, exported: Path, traced_once: None, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    (out / "notes.txt").write_text("mine")
    fitted = Threshold(-1.25, 0.9, 50, "folder 'mine', 50 images", 0.92)
    spec = load_spec(out)
    save_spec(replace(spec, artifacts=tuple(replace(a, threshold=fitted) for a in spec.artifacts)), out)
    (out / "openvino-fp16" / "model.bin").write_bytes(b"cut")
    lines: list[str] = []
    options = ExportOptions(precisions=("fp32",), engines=("onnxruntime",))
    spec = export_source(from_run(small_run), out, options, say=lines.append)
    assert spec == load_spec(out)
    assert [a.name for a in spec.artifacts] == ["onnx-fp32", "onnx-fp16", "openvino-fp32"]
    assert [a.threshold == fitted for a in spec.artifacts] == [False, True, True]
    assert {name.split("/")[0] for name in snapshot(out)} == {
        "model-fp32.onnx", "model-fp16.onnx", "openvino-fp32", "reference.npz", "features.npz", "ssod.json",
        "notes.txt",
    }  # fmt: skip
    assert sum(line.startswith("kept ") for line in lines) == 2
    assert any("onnx-fp32: its threshold from folder 'mine', 50 images is replaced" in line for line in lines)
    assert any("removed openvino-fp16" in line and "changed or cut short" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for artifact in spec.artifacts:
        check_files(out, artifact)


def test_artifacts_of_a_run_that_was_copied_are_kept_with_their_thresholds(
    small_run: Path, exported: Path, traced_once: None, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(small_run, tmp_path / "copy"))
    lines: list[str] = []
    options = ExportOptions(precisions=("fp32",), engines=("onnxruntime",))
    spec = export_source(from_run(copy), None, options, say=lines.append)
    assert [a.name for a in spec.artifacts] == NAMES
    assert spec.artifacts[1:] == load_spec(exported).artifacts[1:]
    assert spec.source == {**load_spec(exported).source, "run": "copy"} and spec == load_spec(copy / "export")
    assert sum(line.startswith("kept ") for line in lines) == 3


@pytest.mark.slow
def test_artifacts_of_another_score_are_removed_and_named(small_run: Path, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    lines: list[str] = []
    options = ExportOptions(precisions=("fp32",), engines=("onnxruntime",), score="msp")
    spec = export_source(from_run(small_run), out, options, say=lines.append)
    assert [a.name for a in spec.artifacts] == ["onnx-fp32"]
    assert set(snapshot(out)) == {"model-fp32.onnx", "reference.npz", "features.npz", "ssod.json"}
    assert sum("is of another model, score" in line for line in lines) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "kept"), [(1 + 1e-6, 3), (1 + 1e-2, 0)])
def test_artifacts_are_kept_though_the_last_bits_of_the_reference_differ(
    small_run: Path, exported: Path, tmp_path: Path, factor: float, kept: int
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    with np.load(out / "reference.npz") as file:
        arrays = dict(file)
    np.savez(out / "reference.npz", **{**arrays, "logits": arrays["logits"] * np.float32(factor)})
    save_spec(replace(load_spec(out), reference_sha256=sha256_file(out / "reference.npz")), out)
    lines: list[str] = []
    options = ExportOptions(precisions=("fp32",), engines=("onnxruntime",))
    spec = export_source(from_run(small_run), out, options, say=lines.append)
    assert len(spec.artifacts) == 1 + kept
    assert sum(line.startswith("kept ") for line in lines) == kept
    check_hash(out / "reference.npz", spec.reference_sha256)


def test_a_range_that_is_infinite_can_be_written_down() -> None:
    record = _overflow_record(HalfReport(images=1, largest=np.inf, overflowing={"conv": np.inf, "add": 1e6}))
    assert record["overflow"]["largest"] is None
    assert record["overflow"]["fp32_nodes"] == {"conv": None, "add": 1e6}
    json.dumps(record, allow_nan=False)


def test_a_folder_of_other_files_is_not_touched(small_run: Path, traced_once: None, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="other files"):
        export_run(small_run, tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        export_run(small_run, tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_drift_fails_the_export_with_the_figures_and_releases_nothing(
    small_run: Path, exported: Path, small_graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drifted = onnx.ModelProto()
    drifted.CopyFrom(small_graph)
    for tensor in drifted.graph.initializer:
        if tensor.name == "head.weight":
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.02, tensor.name))
    monkeypatch.setattr("ssod_edge.export.graph.build.fused_graph", lambda *_: drifted)
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    with pytest.raises(VerificationError, match=r"onnx-fp32.*max_abs_logit_diff is") as caught:
        export_run(small_run, out)
    assert caught.value.exit_code == 4 and "openvino-fp32" in str(caught.value)
    assert snapshot(out) == snapshot(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_edited_artifact_does_not_open(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    graph = onnx.load(out / "model-fp32.onnx")
    (bias,) = (t for t in graph.graph.initializer if t.name == "head.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.1, bias.name))
    onnx.save(graph, out / "model-fp32.onnx")
    with pytest.raises(ArtifactError, match="was changed"):
        open_runner(out, artifact="onnx-fp32")
    spec = load_spec(out)
    files = {"model-fp32.onnx": sha256_file(out / "model-fp32.onnx")}
    save_spec(spec.with_artifact(replace(spec.artifact("onnx-fp32"), files=files, verification=None)), out)
    with pytest.raises(VerificationError, match="max_abs_logit_diff") as caught:
        open_runner(out, artifact="onnx-fp32")
    assert caught.value.exit_code == 4


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """No file can grow beyond 300 kB, as on a full disk: the ONNX file is larger."""
    old_limit, old_handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, old_limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
    signal.signal(signal.SIGXFSZ, old_handler)


def test_a_full_disk_leaves_the_earlier_export(
    small_run: Path, exported: Path, traced_once: None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    request.getfixturevalue("small_files_only")
    with pytest.raises(OutputError, match="cannot write"):
        export_run(small_run, out)
    assert snapshot(out) == snapshot(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_openvino_reports_a_full_disk(exported: Path, tmp_path: Path, small_files_only: None) -> None:
    with pytest.raises(OutputError, match=r"model\.xml"):
        save_ir(exported / "model-fp32.onnx", tmp_path / "ir")


def test_a_folder_that_cannot_be_written_is_refused(small_run: Path, traced_once: None) -> None:
    with pytest.raises(OutputError, match="cannot"):
        export_run(small_run, "/proc/ssod-edge/export")


def test_an_interrupt_leaves_the_earlier_export(
    small_run: Path, exported: Path, traced_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ssod_edge.export.release.verify_runner", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_run(small_run, out)
    assert snapshot(out) == snapshot(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unreadable_images_are_left_out_and_named(
    small_run: Path, small_model: SSODClassifier, traced_once: None, tmp_path: Path
) -> None:
    shutil.copytree(small_run.parent / "data", tmp_path / "data")
    broken = tmp_path / "data" / "a" / "000.png"
    write_run(tmp_path / "run", small_model, str(tmp_path / "data"))
    broken.write_bytes(broken.read_bytes()[:100])
    lines: list[str] = []
    options = ExportOptions(engines=("onnxruntime",))
    spec = export_source(from_run(tmp_path / "run"), None, options, say=lines.append)
    assert spec.artifacts[0].threshold is not None and spec.artifacts[0].threshold.n == 41
    assert any("left out" in line and "000.png" in line for line in lines)
    assert run_export(SourceOptions(str(tmp_path / "run")), TargetOptions(precisions=("fp32",), target="onnx")) == 1, (
        "some inputs failed"
    )


def test_too_few_images_for_a_threshold(small_run: Path, traced_once: None, tmp_path: Path) -> None:
    images = tmp_path / "few" / "a"
    images.mkdir(parents=True)
    for path in list((small_run.parent / "data" / "a").iterdir())[:5]:
        shutil.copy(path, images)
    options = ExportOptions(engines=("onnxruntime",), precisions=("fp32",))
    with pytest.raises(UsageError, match="at least 19"):
        export_source(from_run(small_run, str(images.parent)), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
