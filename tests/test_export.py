"""The fused graph, its ONNX and OpenVINO forms, and a whole export: the numbers against the eager model."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ssod_edge.checkpoint import BEST, model_meta, model_tensors, save_checkpoint
from ssod_edge.cli import main
from ssod_edge.config import SCORES, Preprocess, ScoreName
from ssod_edge.errors import ArtifactError, MissingExtraError, OutputError, UsageError, VerificationError
from ssod_edge.export.command import choose_source
from ssod_edge.export.fp16 import to_fp16
from ssod_edge.export.graph import FusedClassifier, score_of_graph
from ssod_edge.export.onnx import check_fused, fused_graph
from ssod_edge.export.openvino import save_ir
from ssod_edge.export.reference import run_eager
from ssod_edge.export.run import ExportOptions, export_run, export_source
from ssod_edge.export.source import from_run, from_weights, imagenet_classes
from ssod_edge.files import sha256_file, write_json
from ssod_edge.model import SSODClassifier, build_model, normalise
from ssod_edge.runtime import open_runner
from ssod_edge.runtime.runner import OUTPUTS
from ssod_edge.scores import ood_scores
from ssod_edge.sources import open_dataset
from ssod_edge.spec import load_spec, save_spec

SIZE = 64
CLASSES = tuple("abcdefg")


def make_model(backbone: str, size: int = SIZE, classes: tuple[str, ...] = CLASSES) -> SSODClassifier:
    """Random weights whose batch norms and OOD row are not at their neutral start, so that nothing cancels."""
    torch.manual_seed(0)
    model = build_model(backbone, classes, Preprocess(input_size=size)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.1)
        z = model.features(normalise(random_images(8, size=size), model.preprocess))
        scale = 4 / z.norm(dim=1).mean()
        model.classifier.weight.normal_(0, 1).mul_(scale)
        model.classifier.bias.normal_(0, 0.5)
        model.ood.weight.normal_(0, 1).mul_(scale)
        model.ood.bias.fill_(0.25)
    return model


def random_images(n: int, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    """uint8 [n, 3, S, S]: coarse colour patches, so that images differ after pooling."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 3, 4, 4), dtype=np.uint8)
    return torch.from_numpy(coarse.repeat(size // 4, axis=2).repeat(size // 4, axis=3).copy())


def eager(model: SSODClassifier, images: torch.Tensor) -> dict[str, np.ndarray]:
    with torch.no_grad():
        logits, id_logit = model(normalise(images, model.preprocess))
    return {"logits": logits.numpy(), "id_logit": id_logit.numpy(), "probs": logits.softmax(1).numpy()}


@pytest.fixture(scope="module")
def small() -> SSODClassifier:
    return make_model("mobilenetv3_small_050")


@pytest.fixture(scope="module")
def small_graph(small: SSODClassifier) -> onnx.ModelProto:
    return fused_graph(small, "energy", trained=True)


def run_onnx(graph: onnx.ModelProto, images: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"image": images.numpy()}), strict=True))


@pytest.mark.parametrize("score", SCORES)
def test_fused_module_gives_what_the_model_and_the_scores_give(small: SSODClassifier, score: str) -> None:
    images = random_images(5)
    expected = eager(small, images)
    with torch.no_grad():
        outputs = dict(zip(OUTPUTS, FusedClassifier(small, score)(images), strict=True))  # type: ignore[arg-type]
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name].numpy(), value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        outputs["ood_score"].numpy(), ood_scores(expected["logits"], expected["id_logit"])[score], rtol=1e-4, atol=1e-5
    )
    assert np.ptp(expected["id_logit"]) > 1e-2 and np.ptp(expected["logits"]) > 0.1


@pytest.mark.parametrize("score", SCORES)
def test_scores_in_the_graph_neither_saturate_nor_overflow(score: ScoreName) -> None:
    rng = np.random.default_rng(0)
    scale = np.array([0.01, 1, 10, 80, 1000], np.float32)
    logits = (rng.normal(0, 1, (5, 6)) * scale[:, None]).astype(np.float32)
    id_logit = np.array([-1000, -20, 0, 20, 1000], np.float32)
    tensors = torch.from_numpy(logits), torch.from_numpy(logits).softmax(1), torch.from_numpy(id_logit)
    expected = ood_scores(logits, id_logit)[score]
    np.testing.assert_allclose(score_of_graph(score, *tensors).numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 5])
def test_onnx_gives_the_eager_numbers_at_any_batch(small: SSODClassifier, small_graph: onnx.ModelProto, n: int) -> None:
    images = random_images(n, seed=n)
    expected, outputs = eager(small, images), run_onnx(small_graph, images)
    for name, value in expected.items():
        assert outputs[name].dtype == np.float32
        np.testing.assert_allclose(outputs[name], value, rtol=1e-3, atol=1e-4)


def test_graph_ends_in_one_gemm_of_all_rows(small: SSODClassifier, small_graph: onnx.ModelProto) -> None:
    head = check_fused(small_graph, rows=len(CLASSES) + 1)
    assert head.op_type == "Gemm"
    assert Counter(node.op_type for node in small_graph.graph.node)["Gemm"] == 1
    with pytest.raises(VerificationError, match="9 rows"):
        check_fused(small_graph, rows=9)


@pytest.fixture(scope="module")
def run(small: SSODClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: a checkpoint, images in class folders, and the record of their splits. Nobody changes it."""
    root = tmp_path_factory.mktemp("runs")
    images = random_images(84, seed=1).numpy()
    for index, image in enumerate(images):
        path = root / "data" / CLASSES[index % len(CLASSES)] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    write_run(root / "small", small, str(root / "data"))
    return root / "small"


def write_run(folder: Path, model: SSODClassifier, data: str) -> None:
    source = open_dataset(data)
    calib = np.arange(0, len(source), 2)
    record = {"data_fingerprint": source.fingerprint, "splits_hash": "ab" * 32}
    meta = {**model_meta(model), **record, "trained": True, "epoch": 3, "val_accuracy": 0.5, "data": data}
    save_checkpoint(folder / BEST, model_tensors(model), meta)
    write_json(folder / "config.json", {"backbone": model.backbone_name, "data": data})
    write_json(folder / "splits.json", {**record, "data": data, "calib": calib.tolist()})


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """The export of that run, with both precisions on both engines. Nobody changes it."""
    export_run(run)
    return run / "export"


@pytest.fixture
def traced_once(small_graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the small model take the graph that was traced already: tracing it takes most of the time."""

    def same(model: SSODClassifier, score: str, trained: bool) -> onnx.ModelProto:
        assert (model.backbone_name, model.classes, score, trained) == (
            "mobilenetv3_small_050",
            CLASSES,
            "energy",
            True,
        )
        graph = onnx.ModelProto()
        graph.CopyFrom(small_graph)
        return graph

    monkeypatch.setattr("ssod_edge.export.run.fused_graph", same)


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
        assert artifact.threshold.n == 42 and "calib split abababababab" in artifact.threshold.data
        assert artifact.verification["passed"] and artifact.verification["n"] == 42
        assert {"torch", "onnx", artifact.engine, "ssod-edge"} <= set(artifact.versions)
    listed = {name for artifact in spec.artifacts for name in artifact.files} | {"ssod.json", "reference.npz"}
    assert set(snapshot(exported)) == listed


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
    small: SSODClassifier, exported: Path, name: str, n: int
) -> None:
    images = random_images(n, seed=7)
    expected = eager(small, images)
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
        assert properties["ssod.schema_version"] == "1"
        assert properties["ssod.backbone"] == "mobilenetv3_small_050"
        assert json.loads(properties["ssod.classes"]) == list(CLASSES)
        assert json.loads(properties["ssod.preprocess"])["input_size"] == SIZE
        assert (properties["ssod.score"], properties["ssod.trained"]) == ("energy", "true")
        assert [(o.domain, o.version) for o in graph.opset_import] == [("", 18)]
        assert [o.name for o in graph.graph.output] == list(OUTPUTS)
        (image,) = graph.graph.input
        assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
        assert image.type.tensor_type.shape.dim[0].dim_param == "batch"
    for path in exported.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"site-packages" not in data and str(Path(__file__).parent.parent).encode() not in data


def test_reference_holds_the_eager_numbers(small: SSODClassifier, exported: Path) -> None:
    with np.load(exported / "reference.npz") as reference:
        logits, id_logit = run_eager(small, reference["image"])
        np.testing.assert_allclose(reference["logits"], logits, atol=1e-5)
        for score, value in ood_scores(logits, id_logit).items():
            np.testing.assert_allclose(reference[f"score_{score}"], value, atol=1e-4)
        assert set(np.unique(reference["label"])) == set(range(len(CLASSES)))


def test_missing_packages_are_named_before_any_work(
    run: Path, small: SSODClassifier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"ssod-edge\[onnx\]"):
        fused_graph(small, "energy", trained=True)
    for engine, extra in (("openvino", "openvino"), ("onnxruntime", "onnx")):
        with pytest.raises(MissingExtraError, match=rf"ssod-edge\[{extra}\]"):
            export_run(run, tmp_path / "out", engines=[engine])
    assert not list(tmp_path.iterdir())


def test_the_same_run_gives_the_same_bytes(run: Path, exported: Path, traced_once: None, tmp_path: Path) -> None:
    export_run(run, tmp_path / "again")
    before, after = snapshot(exported), snapshot(tmp_path / "again")
    # An .xml file and the spec that hashes it differ: OpenVINO counts the nodes of a process in their names.
    assert {name for name in before if before[name] != after.pop(name)} <= {"ssod.json"} | {
        f"openvino-{precision}/model.xml" for precision in ("fp32", "fp16")
    }
    assert not after


def test_choosing_precision_and_engine(run: Path, traced_once: None, tmp_path: Path) -> None:
    spec = export_run(run, tmp_path / "out", precisions=["fp16"], engines=["openvino"])
    assert [artifact.name for artifact in spec.artifacts] == ["openvino-fp16"]
    assert {p.split("/")[0] for p in snapshot(tmp_path / "out")} == {"ssod.json", "reference.npz", "openvino-fp16"}
    for wrong in ({"precisions": ["int3"]}, {"engines": []}, {"target_tpr": 1.0}):
        with pytest.raises(UsageError):
            export_run(run, tmp_path / "out", **wrong)  # type: ignore[arg-type]


def test_export_replaces_the_old_one_and_keeps_files_that_are_not_its_own(
    run: Path, exported: Path, traced_once: None, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    (out / "notes.txt").write_text("mine")
    export_run(run, out, precisions=["fp32"], engines=["onnxruntime"])
    assert set(snapshot(out)) == {"model-fp32.onnx", "reference.npz", "ssod.json", "notes.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_other_files_is_not_touched(run: Path, traced_once: None, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="other files"):
        export_run(run, tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        export_run(run, tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_drift_fails_the_export_with_the_figures_and_releases_nothing(
    run: Path, exported: Path, small_graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drifted = onnx.ModelProto()
    drifted.CopyFrom(small_graph)
    for tensor in drifted.graph.initializer:
        if tensor.name == "head.weight":
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.02, tensor.name))
    monkeypatch.setattr("ssod_edge.export.run.fused_graph", lambda *_: drifted)
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    with pytest.raises(VerificationError, match=r"onnx-fp32.*max_abs_logit_diff is") as caught:
        export_run(run, out)
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
    run: Path, exported: Path, traced_once: None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    request.getfixturevalue("small_files_only")
    with pytest.raises(OutputError, match="cannot write"):
        export_run(run, out)
    assert snapshot(out) == snapshot(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_openvino_reports_a_full_disk(exported: Path, tmp_path: Path, small_files_only: None) -> None:
    with pytest.raises(OutputError, match=r"model\.xml"):
        save_ir(exported / "model-fp32.onnx", tmp_path / "ir")


def test_a_folder_that_cannot_be_written_is_refused(run: Path, traced_once: None) -> None:
    with pytest.raises(OutputError, match="cannot"):
        export_run(run, "/proc/ssod-edge/export")


def test_an_interrupt_leaves_the_earlier_export(
    run: Path, exported: Path, traced_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ssod_edge.export.run.verify_runner", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, out)
    assert snapshot(out) == snapshot(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unreadable_images_are_left_out_and_named(
    run: Path, small: SSODClassifier, traced_once: None, tmp_path: Path
) -> None:
    shutil.copytree(run.parent / "data", tmp_path / "data")
    broken = tmp_path / "data" / "a" / "000.png"
    write_run(tmp_path / "run", small, str(tmp_path / "data"))
    broken.write_bytes(broken.read_bytes()[:100])
    lines: list[str] = []
    options = ExportOptions(engines=("onnxruntime",))
    spec = export_source(from_run(tmp_path / "run"), None, options, say=lines.append)
    assert spec.artifacts[0].threshold is not None and spec.artifacts[0].threshold.n == 41
    assert any("left out" in line and "000.png" in line for line in lines)


def test_too_few_images_for_a_threshold(run: Path, traced_once: None, tmp_path: Path) -> None:
    images = tmp_path / "few" / "a"
    images.mkdir(parents=True)
    for path in list((run.parent / "data" / "a").iterdir())[:5]:
        shutil.copy(path, images)
    options = ExportOptions(engines=("onnxruntime",), precisions=("fp32",))
    with pytest.raises(UsageError, match="at least 19"):
        export_source(from_run(run, str(images.parent)), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_changed_training_data_has_no_calibration_split(run: Path, small: SSODClassifier, tmp_path: Path) -> None:
    shutil.copytree(run.parent / "data", tmp_path / "data")
    write_run(tmp_path / "run", small, str(tmp_path / "data"))
    (tmp_path / "data" / "a" / "000.png").rename(tmp_path / "data" / "a" / "zzz.png")
    with pytest.raises(UsageError, match="changed since training"):
        from_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UsageError, match="--id"):
        from_run(tmp_path / "run")


def test_a_score_of_an_untrained_ood_row_is_refused(small: SSODClassifier, run: Path, tmp_path: Path) -> None:
    model = copy.deepcopy(small)
    torch.nn.init.zeros_(model.ood.weight)
    write_run(tmp_path / "run", model, str(run.parent / "data"))
    with pytest.raises(UsageError, match="OOD row"):
        export_run(tmp_path / "run", score="ssod")
    assert not (tmp_path / "run" / "export").exists()


def test_choose_source(run: Path, tmp_path: Path) -> None:
    runs = str(run.parent)
    assert choose_source(str(run)).checkpoint == run / BEST
    assert choose_source(str(run / BEST)).folder == run
    assert choose_source(None, runs).folder == run
    assert choose_source(None, runs, "mobilenetv3_small_050").trained
    fresh = choose_source(None, str(tmp_path), "mobilenetv3_small_050", size=32)
    assert not fresh.trained and len(fresh.model.classes) == 1000 and fresh.model.preprocess.input_size == 32
    assert fresh.folder == tmp_path / "mobilenetv3_small_050-untrained"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": None, "runs": "nothing-here"}, "there is no run"),
        ({"run": "x", "backbone": "resnet18"}, "not both"),
        ({"run": "x", "backbone": "resnet18", "pretrained": True}, "and no run"),
        ({"run": None, "weights": "w.pth"}, "--backbone"),
        ({"run": "x", "classes": "names.txt"}, "--classes"),
        ({"run": "x", "size": 64}, "--size"),
        ({"run": None, "runs": "nothing-here", "backbone": "resnet18", "data": "demo"}, "leave --id out"),
        ({"run": None, "runs": "nothing-here", "backbone": "resnet-18"}, "unknown backbone"),
    ],
)
def test_contradictions_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_source(**arguments)


def test_weights_from_a_file_must_have_the_named_classes(small: SSODClassifier, run: Path, tmp_path: Path) -> None:
    torch.save(small.backbone.state_dict(), tmp_path / "w.pth")
    arguments = ("mobilenetv3_small_050", str(tmp_path / "w.pth"), tmp_path)
    with pytest.raises(UsageError, match="does not have 1000 classes"):
        from_weights(*arguments)
    source = from_weights(*arguments, data=str(run.parent / "data"))
    assert source.trained and source.model.classes == CLASSES and source.facts["weights"] == "w.pth"
    assert torch.equal(source.model.classifier.weight, small.classifier.weight)
    (tmp_path / "names.txt").write_text("\n".join(reversed(CLASSES)))
    assert from_weights(*arguments, classes_file=str(tmp_path / "names.txt")).model.classes == CLASSES[::-1]
    (tmp_path / "names.txt").write_text("a\na\n")
    with pytest.raises(UsageError, match="twice"):
        from_weights(*arguments, classes_file=str(tmp_path / "names.txt"))


def test_imagenet_classes_are_in_label_order() -> None:
    classes = imagenet_classes()
    assert len(classes) == len(set(classes)) == 1000
    assert list(classes) == sorted(classes)
    assert (classes[0], classes[999]) == ("n01440764_tench", "n15075141_toilet_tissue")


def test_untrained_weights_are_exported_loudly_and_refused_by_predict(tmp_path: Path) -> None:
    runs = str(tmp_path)
    arguments = ["export", "--backbone", "mobilenetv3_small_050", "--fp16", "--size", "32", "--runs", runs]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "UNTRAINED" in result.stderr and "onnx-fp16" in result.stdout and "openvino-fp16" in result.stdout
    folder = tmp_path / "mobilenetv3_small_050-untrained"
    spec = load_spec(folder / "export")
    assert not spec.trained and all(artifact.threshold is None for artifact in spec.artifacts)
    with pytest.raises(UsageError, match="allow-untrained"):
        open_runner(folder)
    with open_runner(folder, allow_untrained=True) as runner:
        logits = runner.infer({"image": random_images(1, size=32).numpy()})["logits"]
    with open_runner(folder, engine="eager", allow_untrained=True) as runner:
        expected = runner.infer({"image": random_images(1, size=32).numpy()})["logits"]
    np.testing.assert_allclose(logits, expected, atol=1e-3)


@pytest.mark.parametrize("backbone", ["resnet18", "regnety_008_tv", "densenet121"])
def test_other_families_keep_the_form(backbone: str) -> None:
    model = make_model(backbone, size=64)
    graph = fused_graph(model, "posterior", trained=False)
    ops = Counter(node.op_type for node in graph.graph.node)
    assert ops["Gemm"] + ops["MatMul"] == 1
    # The only norms left are those of densenet that follow a concatenation, where no convolution can take them in.
    assert bool(ops["BatchNormalization"]) == (backbone == "densenet121")
    half, report = to_fp16(graph, len(CLASSES) + 1)
    assert report.clipped == 0 and report.max_abs_error < 1e-2
    images = random_images(5, seed=3)
    expected = eager(model, images)
    expected["ood_score"] = ood_scores(expected["logits"], expected["id_logit"])["posterior"]
    for proto, tolerance in ((graph, 1e-3), (half, 0.05)):
        outputs = run_onnx(proto, images)
        for name, value in expected.items():
            np.testing.assert_allclose(outputs[name], value, rtol=0, atol=tolerance)
