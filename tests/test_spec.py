"""ssod.json: read back as it was written, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from places import GOLDEN
from specs import FIRST, LESSON, earlier_spec, edit_spec

from ssod_edge.config import Preprocess
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.files import sha256_file
from ssod_edge.spec import LOGIT_OUTPUTS, SPEC_NAME, Artifact, Spec, Threshold, check_files, load_spec, save_spec


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model-fp32.onnx").write_bytes(b"\x12\x05graph")  # an ONNX message: producer_name
    save_spec(make_spec({"model-fp32.onnx": sha256_file(tmp_path / "model-fp32.onnx")}), tmp_path)
    return tmp_path


def make_spec(files):
    threshold = Threshold(value=-1.5, target_tpr=0.95, n=100, data="calib split 0123", fitted_tpr=0.96)
    artifact = Artifact("onnx-fp32", "onnxruntime", "fp32", files, 18, {"onnx": "1"}, threshold, {"decision_flips": 0})
    return Spec("resnet18", ("cat", "dog"), Preprocess(64), {"name": "energy"}, True, "0" * 64, {}, (artifact,))


def test_a_spec_reads_back_as_it_was_written(folder):
    spec = load_spec(folder)
    assert spec == make_spec(spec.artifact("onnx-fp32").files)
    assert check_files(folder, spec.artifacts[0]) == folder / "model-fp32.onnx"


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_spec_of_an_earlier_schema_is_read(folder, version):
    expected = load_spec(folder)
    earlier_spec(folder, version)
    assert load_spec(folder) == replace(expected, preprocess=replace(expected.preprocess, version=1))
    assert load_spec(folder).outputs == ("logits", "probs", "id_logit", "ood_score")


def test_a_flipped_bit_is_found_wherever_it_is(folder):
    """Of 600 flips of single bits, each gives an error; in earlier releases a threshold of 3.43 became 2.43."""
    path = folder / SPEC_NAME
    content = path.read_bytes()
    for place in np.random.default_rng(0).choice(8 * len(content), 600, replace=False).tolist():
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert load_spec(folder) == make_spec(load_spec(folder).artifacts[0].files), chr(flipped[place // 8])
        except ArtifactError:
            continue
        assert json.loads(flipped) == json.loads(content)  # white space, or 1.0 as 1e0


def test_a_spec_that_was_edited_by_hand_says_so(folder):
    path = folder / SPEC_NAME
    path.write_text(path.read_text().replace("-1.5", "-2.5"))
    with pytest.raises(ArtifactError, match="changed after it was written: .* Of a whole export, ssod-edge calibrate"):
        load_spec(folder)


def test_a_choice_by_kinds_of_an_earlier_name_is_read(folder):
    """Kinds are shuffle, zoom and blend now."""
    row = {"figure": 0.9, "auroc": {"shuffled": 0.9, "corner": 0.8, "blended": 0.7}, "cost": 0.0}
    edit_spec(folder, lambda v: v.update(choice={"known": "validation split 0123", "candidates": {"energy": row}}))
    spec = load_spec(folder)
    save_spec(spec, folder)
    assert load_spec(folder) == spec and spec.choice["candidates"]["energy"] == row


def test_a_score_with_a_state_names_its_file(folder):
    detector = {"sha256": "1" * 64, "data": "train split 0123", "images": 100, "settings": {}}
    edit_spec(folder, lambda v: v.update(score={"name": "vim"}, detector=detector))
    spec = load_spec(folder)
    assert spec.score_name == "vim" and spec.detector == detector
    assert spec.shared_files == {"reference.npz": "0" * 64, "detector.npz": "1" * 64}


def test_an_artifact_is_added_or_replaces_the_one_of_its_name(folder):
    spec = load_spec(folder)
    again = Artifact("onnx-fp32", "onnxruntime", "fp32", {"other.onnx": "0"}, 18, {})
    more = Artifact("onnx-fp16", "onnxruntime", "fp16", {"half.onnx": "0"}, 18, {})
    assert spec.with_artifact(again).artifacts == (again,)
    assert spec.with_artifact(more).artifacts == (*spec.artifacts, more)
    with pytest.raises(UsageError, match="no artifact 'int8'; it has: onnx-fp32"):
        spec.artifact("int8")


def taught(values, **lesson):
    values["source"].update(version=2, lineage=[FIRST], taught={**LESSON, **lesson})


def test_a_spec_of_a_taught_export_is_read(folder):
    edit_spec(folder, taught)
    assert load_spec(folder).taught == LESSON and load_spec(folder).version == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(schema_version=5), "schema version 5; this release reads up to 4. Install a newer one"),
        (lambda v: v.pop("schema_version"), "not an ssod-edge spec"),
        (lambda v: v.pop("classes"), "damaged .*classes"),
        (lambda v: v.update(extra=1), "damaged .*extra"),
        (lambda v: v["preprocess"].update(input_size=0), "damaged .*input_size"),
        (lambda v: v["artifacts"][0].update(files={}), "lists no files"),
        (lambda v: v["artifacts"][0]["threshold"].pop("value"), "damaged .*value"),
        (lambda v: v.update(schema_version=0), "not an ssod-edge spec"),
        (lambda v: v.update(schema_version=True), "not an ssod-edge spec"),
        (lambda v: v.update(artifacts=[3]), r"artifacts\[0\] must be an object, got 3"),
        (lambda v: v.update(artifacts={}), "artifacts must be a list"),
        (lambda v: v.update(artifacts=v["artifacts"] * 2), "same name"),
        (lambda v: v.update(backbone=None), "backbone must be text, got null"),
        (lambda v: v.update(classes="cat"), "classes must be a list"),
        (lambda v: v.update(classes=["cat", 3]), r"classes\[1\] must be text, got 3"),
        (lambda v: v.update(classes=["cat"]), "classes must be at least 2"),
        (lambda v: v.update(trained=1), "trained must be true or false, got 1"),
        (lambda v: v.update(source=[]), "source must be an object"),
        (lambda v: v.update(score={}), "score.name: score must be one of ssod, msp, maxlogit, energy, gen, posterior"),
        (lambda v: v.update(score={"name": "best"}), "score.name: .*got 'best'"),
        (lambda v: v.update(score={"name": "energy", "evidence": 1}), "score.evidence must be text"),
        (lambda v: v.update(score={"name": "knn"}), "detector must have the sha256"),
        (lambda v: v.update(detector={"sha256": "0" * 64}), "detector must have the sha256"),
        (lambda v: v.update(detector=[]), "detector must be an object"),
        (lambda v: v.update(reference_sha256=None), "reference_sha256 must be text"),
        (lambda v: v.update(preprocess=5), "preprocess must be an object"),
        (lambda v: v["preprocess"].update(input_size="64"), "preprocess.input_size must be an integer"),
        (lambda v: v["preprocess"].update(input_size=64.0), "preprocess.input_size must be an integer"),
        (lambda v: v["preprocess"].pop("crop_pct"), "preprocess: crop_pct is missing"),
        (lambda v: v["preprocess"].update(crop_pct=10**400), "preprocess.crop_pct must be a finite number"),
        (lambda v: v["preprocess"].update(mean=[None] * 3), r"preprocess.mean\[0\] must be a finite number, got null"),
        (lambda v: v["preprocess"].update(std=[1.0, 1.0]), "preprocess.std must be a list of the right length"),
        (
            lambda v: v["preprocess"].update(interpolation="no"),
            "preprocess.interpolation must be 'bicubic' or 'bilinear'",
        ),
        (lambda v: v["artifacts"][0].update(name=1), r"artifacts\[0\].name must be text"),
        (lambda v: v["artifacts"][0].update(files=["x"]), r"artifacts\[0\].files must be an object"),
        (lambda v: v["artifacts"][0].update(files={"x": None}), r"artifacts\[0\].files.x must be text"),
        (lambda v: v["artifacts"][0].update(opset=-1), "opset must be 0 or more"),
        (lambda v: v["artifacts"][0].update(versions=None), "versions must be an object"),
        (lambda v: v["artifacts"][0].update(verification="yes"), "verification must be an object"),
        (lambda v: v["artifacts"][0].update(verification={"failures": 3}), "must list its failures"),
        (lambda v: v["artifacts"][0].update(threshold=-1.5), "threshold must be an object"),
        (lambda v: v["artifacts"][0]["threshold"].update(value="abc"), "threshold.value must be a finite number"),
        (lambda v: v["artifacts"][0]["threshold"].update(value=None), "threshold.value must be a finite number"),
        (lambda v: v["artifacts"][0]["threshold"].update(value=float("nan")), "threshold.value .*got NaN"),
        (lambda v: v["artifacts"][0]["threshold"].update(value=True), "threshold.value .*got true"),
        (lambda v: v["artifacts"][0]["threshold"].update(target_tpr=2), r"target_tpr must be in \(0, 1\), got 2"),
        (lambda v: v["artifacts"][0]["threshold"].update(fitted_tpr=-1), r"fitted_tpr must be in \[0, 1\]"),
        (lambda v: v["artifacts"][0]["threshold"].update(n=-5), "n must be at least 1 image, got -5"),
        (lambda v: v["artifacts"][0]["threshold"].update(n=2**63), "threshold.n must be an integer of at most 64 bits"),
        (lambda v: v["source"].update(epoch=float("nan")), "source.epoch must be a finite number, got NaN"),
        (lambda v: v["artifacts"][0]["verification"].update(a=[float("-inf")]), r"verification.a\[0\] .*got -Infinity"),
        (lambda v: v.update(classes=["cat", "\ud800"]), r"classes\[1\] must be text of valid Unicode, .*ud800"),
        (lambda v: v["source"].update({"\ud800": 1}), "a key of source must be text of valid Unicode"),
        (lambda v: v["source"].update(version=[]), "source.version must be an integer"),
        (lambda v: v["source"].update(version=0), "source.version must be at least 1"),
        (lambda v: v["source"].update(taught=[1]), "source.taught must be an object"),
        (lambda v: v["source"].update(taught=LESSON), "names no version that it was given to"),
        (lambda v: v["source"].update(lineage=3), "source.lineage must be a list"),
        (lambda v: v["source"].update(lineage=[3]), r"source.lineage\[0\] must be an object"),
        (lambda v: v["source"].update(lineage=[{**FIRST, "sha256": []}]), r"source.lineage\[0\].sha256 must be text"),
        (lambda v: taught(v, proof={}), "source.taught.proof.accuracy must be a list"),
        (lambda v: taught(v, proof={"accuracy": [1, 1], "new": {"a": {}}}), "source.taught.proof.new.recall"),
        (lambda v: taught(v, photos={"a": "b"}), "source.taught.photos.a must be an integer"),
        (lambda v: v.update(features={"sha256": []}), "features.sha256 must be text"),
        (lambda v: v.update(features={"images": 3}), "features.sha256 must be text"),
    ],
)
def test_a_spec_that_is_newer_or_damaged_is_refused(folder, change, message):
    edit_spec(folder, change)
    with pytest.raises(ArtifactError, match=message):
        load_spec(folder)


def test_a_threshold_may_be_a_whole_number(folder):
    edit_spec(folder, lambda v: v["artifacts"][0]["threshold"].update(value=-2))
    assert repr(load_spec(folder).artifacts[0].threshold.value) == "-2.0"


@pytest.mark.parametrize("version", [1, 2])
def test_a_golden_spec_of_an_earlier_schema_is_read(tmp_path, version):
    """Without `build` (1), without `detector`, `choice` and `id_quantiles` (1 and 2)."""
    shutil.copy(GOLDEN / f"ssod-schema-{version}.json", tmp_path / SPEC_NAME)
    spec, artifact = load_spec(tmp_path), load_spec(tmp_path).artifacts[0]
    assert (spec.schema_version, spec.score_name, spec.detector, spec.choice) == (4, "energy", {}, {})
    assert (spec.outputs, spec.temperature, spec.preprocess.version) == (LOGIT_OUTPUTS, 1.0, 1)
    assert artifact.build == ({} if version == 1 else {"calibration_images": 300})
    assert (artifact.threshold.value, artifact.threshold.id_quantiles) == (-1.5, ())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"text"', b"[" * 100_000])
def test_a_file_that_is_no_spec_is_refused(folder, content):
    (folder / SPEC_NAME).write_bytes(content)
    with pytest.raises(ArtifactError, match="Export the run again"):
        load_spec(folder)


def test_a_run_without_an_export_gets_the_command(tmp_path):
    (tmp_path / "best.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=f"has no export yet. Make one with: ssod-edge export {tmp_path}$"):
        load_spec(tmp_path)


def test_no_spec_at_all(tmp_path):
    with pytest.raises(UsageError, match="does not exist. Give the folder of a run or an export"):
        load_spec(tmp_path)
    with pytest.raises(UsageError, match="does not exist. Give the folder of a run or an export"):
        load_spec(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not an export folder"):
        load_spec(tmp_path / "file")


def test_files_that_changed_vanished_or_lie_elsewhere_are_refused(folder, tmp_path_factory):
    artifact = load_spec(folder).artifacts[0]
    (folder / "model-fp32.onnx").write_bytes(b"\x12\x05grape")
    with pytest.raises(ArtifactError, match="was changed or cut short"):
        check_files(folder, artifact)
    (folder / "model-fp32.onnx").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        check_files(folder, artifact)
    outside = tmp_path_factory.mktemp("outside") / "model.onnx"
    outside.write_bytes(b"graph")
    escaping = Artifact("a", "onnxruntime", "fp32", {f"../{outside.parent.name}/model.onnx": "0"}, 18, {})
    with pytest.raises(ArtifactError, match="outside its folder"):
        check_files(folder, escaping)


@pytest.mark.parametrize("name", ["long" * 100, "zero\0byte", ""])
def test_names_that_no_file_has_are_refused(folder, name):
    with pytest.raises(ArtifactError, match="is missing|outside its folder"):
        check_files(folder, Artifact("a", "onnxruntime", "fp32", {name: "0"}, 18, {}))
