"""Artifacts in int8 after a lesson: the trunk stays as it was quantised, and the end is made anew."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from lesson import SIZE, run, write_photos

from ssod_edge.detect.confidence import verdict_inputs
from ssod_edge.detect.sums import load_score
from ssod_edge.errors import VerificationError
from ssod_edge.export import release
from ssod_edge.export.engines.openvino import save_ir
from ssod_edge.runtime.engines.openvino import shared_core
from ssod_edge.spec import VERDICT_INPUTS, load_spec
from ssod_edge.teach.grafted import grafted


def test_the_trunk_of_an_ir_gets_the_end_of_another_graph(exported, tmp_path):
    """What int8 needs: the trunk of the old export as it is, and the new rows."""
    photos = write_photos(tmp_path / "new", "fg", 10, seed=2)
    assert run("teach", exported, photos, "-o", tmp_path / "taught", "--alike", "--max-drop", 20).exit_code == 0
    old, new = load_spec(exported), load_spec(tmp_path / "taught")
    rows = [
        len(spec.classes) + 1 + load_score(folder / "detector.npz").rows
        for spec, folder in ((old, exported), (new, tmp_path / "taught"))
    ]
    assert rows[1] == rows[0] + 4  # two classes, in the layer and in the distance
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/export-\xff"))  # no UTF-8
    shutil.copytree(exported, odd)
    trunk, end = odd / "openvino-fp32" / "model.xml", odd / "model-fp32.onnx"
    shutil.copy(tmp_path / "taught" / "model-fp32.onnx", end)
    model = grafted(trunk, rows[0], end, rows[1])
    path, _ = save_ir(end, tmp_path / "grafted", model)
    image = np.random.default_rng(0).integers(0, 256, (3, 3, SIZE, SIZE), dtype=np.uint8)
    outputs = []
    for place in (path, tmp_path / "taught" / "openvino-fp32" / "model.xml"):
        compiled = shared_core().compile_model(str(place), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = compiled({"image": image, **verdict_inputs(None)})
        outputs.append({port.get_any_name(): value for port, value in found.items()})
        assert {port.get_any_name() for port in compiled.inputs} == {"image", *VERDICT_INPUTS}
    assert outputs[0].keys() == outputs[1].keys() and outputs[0]["logits"].shape == (3, 7)
    for name, value in outputs[1].items():
        np.testing.assert_allclose(outputs[0][name], value, rtol=1e-4, atol=1e-4)
    with pytest.raises(VerificationError, match="does not end in one product"):
        grafted(trunk, 3, end, rows[1])


@pytest.mark.slow
def test_an_artifact_in_int8_that_does_not_hold_is_left_out_and_the_others_are_released(
    exported, tmp_path, monkeypatch
):
    photos = write_photos(tmp_path / "new", "f", 10, seed=2)
    passed = release.check_passed

    def fails_in_fp16(artifact, figures):
        if artifact.precision == "fp16":
            raise VerificationError(f"artifact '{artifact.name}' does not reproduce the trained model")
        passed(artifact, figures)

    monkeypatch.setattr(release, "check_passed", fails_in_fp16)
    arguments = "teach", exported, photos, "--alike", "--max-drop", 20, "-o"
    failed = run(*arguments, tmp_path / "nothing")
    assert failed.exit_code != 0 and not (tmp_path / "nothing").exists()
    monkeypatch.setattr("ssod_edge.teach.teach.QUANTISED", "fp16")
    done = run(*arguments, tmp_path / "taught")
    assert done.exit_code == 0, done.output
    assert "left out: artifact 'onnx-fp16' does not reproduce" in done.output
    spec = load_spec(tmp_path / "taught")
    assert [artifact.name for artifact in spec.artifacts] == ["onnx-fp32", "openvino-fp32"]
    assert (
        not (tmp_path / "taught" / "model-fp16.onnx").exists() and not (tmp_path / "taught" / "openvino-fp16").exists()
    )
