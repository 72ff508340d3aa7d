"""What graphs give beside logits: the verdict, calibrated probabilities, and features that were asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from small import random_images, write_images, write_run

from ssod_edge.cli import main
from ssod_edge.detect import confidence
from ssod_edge.detect.confidence import fit_temperature, p_known, verdict_inputs
from ssod_edge.detect.metrics import conformal_threshold
from ssod_edge.detect.scores import probabilities
from ssod_edge.export.graph.onnx import fused_graph
from ssod_edge.export.graph.reference import run_eager
from ssod_edge.files import sha256_file
from ssod_edge.runtime.open import open_runner
from ssod_edge.spec import load_spec
from ssod_edge.training.model import SSODClassifier

#: int8 is in tests/export/int8.
NAMES = ["onnx-fp32", "onnx-fp16", "openvino-fp32", "openvino-fp16"]


@pytest.fixture(scope="module")
def exported(small_model: SSODClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 100 held-out images, exported with its features."""
    root = tmp_path_factory.mktemp("verdicts")
    write_images(root / "data", 200)
    write_run(root / "run", small_model, str(root / "data"))
    result = CliRunner().invoke(main, ["export", str(root / "run"), "--features", "pooled", "--features", "pooled"])
    assert result.exit_code == 0, result.output
    return root / "run" / "export"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.rglob("*") if path.is_file() and path.name != "ssod.json"}


@pytest.mark.parametrize("name", NAMES)
def test_every_engine_and_precision_gives_all_of_it(exported: Path, small_model: SSODClassifier, name: str) -> None:
    images = random_images(40, seed=5).numpy()
    _, _, features = run_eager(small_model, images)
    with open_runner(exported, artifact=name) as runner:
        outputs, spec, threshold = runner.infer({"image": images}), runner.spec, runner.artifact.threshold
    assert tuple(outputs) == spec.outputs
    assert spec.outputs[4:] == ("p_known", "known", "features_pooled")
    assert threshold is not None
    np.testing.assert_array_equal(outputs["known"], outputs["ood_score"] <= threshold.value)
    np.testing.assert_array_equal(outputs["p_known"], p_known(outputs["ood_score"], verdict_inputs(threshold)))
    expected = probabilities(outputs["logits"] / spec.temperature)
    np.testing.assert_allclose(outputs["probs"], expected, atol=1e-5)
    assert outputs["features_pooled"].dtype == np.float32
    drift = np.abs(outputs["features_pooled"] - features).max() / np.abs(features).max()
    assert drift < {"fp32": 1e-5, "fp16": 1e-2}[name.split("-")[1]]


def test_the_temperature_is_that_of_held_out_labels_and_no_score_knows_it(exported: Path) -> None:
    spec = load_spec(exported)
    with np.load(exported / "reference.npz") as reference:
        assert spec.temperature == fit_temperature(reference["logits"], reference["label"])
        energy = -np.logaddexp.reduce(reference["logits"], axis=1)
        images = reference["image"]
    assert abs(spec.temperature - 1) > 0.1
    with open_runner(exported, artifact="onnx-fp32") as runner:
        np.testing.assert_allclose(runner.infer({"image": images})["ood_score"], energy, atol=1e-3)
    with open_runner(exported, engine="eager") as eager, open_runner(exported, artifact="onnx-fp32") as runner:
        found, expected = eager.infer({"image": images}), runner.infer({"image": images})
    assert tuple(found) == tuple(expected)
    for name, value in expected.items():
        if name != "known":  # these very images bound the steps of p_known, 0.01 each: one or two apart
            np.testing.assert_allclose(found[name], value, atol=0.021 if name == "p_known" else 1e-3)


def test_calibrate_changes_numbers_and_no_file(exported: Path) -> None:
    before, spec = contents(exported), load_spec(exported)
    data = str(exported.parent.parent / "data")
    result = CliRunner().invoke(main, ["calibrate", str(exported), "--id", data, "--tpr", "0.8"])
    assert result.exit_code == 0, result.output
    assert contents(exported) == before
    images = random_images(40, seed=5).numpy()
    for old, new in zip(spec.artifacts, load_spec(exported).artifacts, strict=True):
        assert old.threshold is not None and new.threshold is not None and old.threshold != new.threshold
        with open_runner(exported, artifact=new.name) as runner:
            outputs = runner.infer({"image": images})
        np.testing.assert_array_equal(outputs["known"], outputs["ood_score"] <= new.threshold.value)
        np.testing.assert_array_equal(outputs["known"], outputs["p_known"] > 0.2 + 1e-6)


def test_a_temperature_changes_probabilities_and_no_verdict(small_model: SSODClassifier) -> None:
    given = {"image": random_images(60, seed=6).numpy()}
    found = []
    for temperature in (1.0, 2.5):
        graph = fused_graph(small_model, "gen", trained=True, temperature=temperature).SerializeToString()
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        if not found:
            (scores,) = session.run(["ood_score"], given)
            given |= verdict_inputs(conformal_threshold(scores[:40]))
        names = [output.name for output in session.get_outputs()]
        found.append(dict(zip(names, session.run(names, given), strict=True)))
    plain, tempered = found
    assert 0 < plain["known"].sum() < 60
    for name in set(plain) - {"probs"}:
        np.testing.assert_array_equal(tempered[name], plain[name], err_msg=name)
    np.testing.assert_array_equal(tempered["probs"].argmax(axis=1), plain["logits"].argmax(axis=1))
    assert (tempered["probs"].max(axis=1) < plain["probs"].max(axis=1)).all(), "less sure"


def test_a_program_of_its_own_gets_a_verdict_from_the_file_alone(exported: Path) -> None:
    """The inputs beside the image have defaults, with which nothing is known."""
    session = onnxruntime.InferenceSession(str(exported / "model-fp32.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["image"]
    images = random_images(40, seed=5).numpy()
    score, known, p = session.run(["ood_score", "known", "p_known"], {"image": images})
    assert not known.any() and not p.any()
    limit = np.array([np.median(score)], np.float32)
    (known,) = session.run(["known"], {"image": images, "threshold": limit})
    np.testing.assert_array_equal(known, score <= limit)
    properties = {p.key: p.value for p in onnx.load(exported / "model-fp32.onnx").metadata_props}
    assert json.loads(properties["ssod.temperature"]) == load_spec(exported).temperature


def test_an_export_beside_it_keeps_the_features_and_the_other_artifacts(exported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exported.parent, run)
    result = CliRunner().invoke(main, ["export", str(run), "--fp32", "--target", "onnx"])
    assert result.exit_code == 0, result.output
    assert "features pooled, as in the export that is there" in result.stderr and "removed" not in result.stderr
    spec = load_spec(run / "export")
    assert [artifact.name for artifact in spec.artifacts] == NAMES and "features_pooled" in spec.outputs


def test_an_export_in_place_of_a_damaged_one_says_so(exported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exported.parent, run)
    path = run / "export" / "ssod.json"
    path.write_text(path.read_text().replace("pooled", "pulled"))
    result = CliRunner().invoke(main, ["export", str(run), "--fp32", "--target", "onnx"])
    assert result.exit_code == 0 and "is damaged: nothing of it is kept" in result.stderr


def test_features_must_be_some_that_there_are(exported: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(exported.parent), "--features", "all"])
    assert result.exit_code == 2 and "'pooled'" in result.output


def test_few_labels_leave_the_probabilities_as_they_are(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(main, ["export", str(small_run), "-o", str(tmp_path), "--fp32", "--target", "onnx"])
    assert result.exit_code == 0, result.output
    assert load_spec(tmp_path).temperature == 1.0 and confidence.LEAST_IMAGES > 42
    graph = onnx.load(tmp_path / "model-fp32.onnx").graph
    assert sum(node.op_type == "Softmax" for node in graph.node) == 1
