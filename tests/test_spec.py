"""ssod.json: read back as it was written, or refused with the reason."""

from __future__ import annotations

import json

import pytest

from ssod_edge.config import Preprocess
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.files import sha256_file
from ssod_edge.spec import SPEC_NAME, Artifact, Spec, Threshold, check_files, load_spec, save_spec


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model-fp32.onnx").write_bytes(b"graph")
    save_spec(make_spec({"model-fp32.onnx": sha256_file(tmp_path / "model-fp32.onnx")}), tmp_path)
    return tmp_path


def make_spec(files):
    threshold = Threshold(value=-1.5, target_tpr=0.95, n=100, data="calib split 0123", fitted_tpr=0.96)
    artifact = Artifact("onnx-fp32", "onnxruntime", "fp32", files, 18, {"onnx": "1"}, threshold, {"decision_flips": 0})
    return Spec("resnet18", ("cat", "dog"), Preprocess(64), {"name": "energy"}, True, "0" * 64, {}, (artifact,))


def edit(folder, change):
    values = json.loads((folder / SPEC_NAME).read_text())
    change(values)
    (folder / SPEC_NAME).write_text(json.dumps(values))


def test_a_spec_reads_back_as_it_was_written(folder):
    spec = load_spec(folder)
    assert spec == make_spec(spec.artifact("onnx-fp32").files)
    assert check_files(folder, spec.artifacts[0]) == folder / "model-fp32.onnx"


def test_an_artifact_is_added_or_replaces_the_one_of_its_name(folder):
    spec = load_spec(folder)
    again = Artifact("onnx-fp32", "onnxruntime", "fp32", {"other.onnx": "0"}, 18, {})
    more = Artifact("onnx-fp16", "onnxruntime", "fp16", {"half.onnx": "0"}, 18, {})
    assert spec.with_artifact(again).artifacts == (again,)
    assert spec.with_artifact(more).artifacts == (*spec.artifacts, more)
    with pytest.raises(UsageError, match="no artifact 'int8'; it has: onnx-fp32"):
        spec.artifact("int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(schema_version=2), "schema version 2; this release reads up to 1. Update with"),
        (lambda v: v.pop("schema_version"), "not an ssod-edge spec"),
        (lambda v: v.pop("classes"), "damaged .*classes"),
        (lambda v: v.update(extra=1), "damaged .*extra"),
        (lambda v: v["preprocess"].update(input_size=0), "damaged .*input_size"),
        (lambda v: v["artifacts"][0].update(files={}), "lists no files"),
        (lambda v: v["artifacts"][0]["threshold"].pop("value"), "damaged .*value"),
        (lambda v: v.update(artifacts=[3]), "damaged"),
    ],
)
def test_a_spec_that_is_newer_or_damaged_is_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(ArtifactError, match=message):
        load_spec(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"text"'])
def test_a_file_that_is_no_spec_is_refused(folder, content):
    (folder / SPEC_NAME).write_bytes(content)
    with pytest.raises(ArtifactError, match="Export the run again"):
        load_spec(folder)


def test_no_spec_at_all(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist. Make an export"):
        load_spec(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="not an export folder"):
        load_spec(tmp_path / "file")


def test_files_that_changed_vanished_or_lie_elsewhere_are_refused(folder, tmp_path_factory):
    artifact = load_spec(folder).artifacts[0]
    (folder / "model-fp32.onnx").write_bytes(b"grape")
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
