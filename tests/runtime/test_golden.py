"""Golden inputs and outputs: another client, which reads nothing but these files, gets the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from colour import SIZE, edit_spec
from PIL import Image

from ssod_edge.cli import main
from ssod_edge.errors import EngineError, UsageError
from ssod_edge.runtime import golden
from ssod_edge.runtime.golden import GOLDEN, write_golden
from ssod_edge.spec import load_spec

MakeExport = Callable[..., Path]


def read(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / GOLDEN).read_text(encoding="utf-8"))
    return document


def array(folder: Path, described: dict[str, Any]) -> np.ndarray:
    return np.fromfile(folder / described["file"], described["dtype"]).reshape(described["shape"])


@pytest.mark.parametrize("name", ["onnx-fp32", "onnx-fp16"])
def test_a_client_of_its_own_gets_the_golden_outputs(export: Path, tmp_path: Path, name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    write_golden(export, tmp_path / "golden")
    document = read(tmp_path / "golden")
    told = document["artifacts"][name]
    path = export / told["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == told["sha256"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    beside = {name: array(tmp_path / "golden", described) for name, described in told["inputs_beside"].items()}
    known = []
    for row, expected in zip(document["inputs"], told["outputs"], strict=True):
        data = (tmp_path / "golden" / row["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        image = np.frombuffer(data, document["input"]["dtype"]).reshape(document["input"]["shape"])
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(names, {"image": image, **beside}), strict=True))
        np.testing.assert_allclose(found["logits"][0], expected["logits"], atol=told["tolerance"]["logits"])
        assert abs(float(found["ood_score"][0]) - expected["ood_score"]) <= told["tolerance"]["ood_score"]
        assert document["classes"][int(found["logits"][0].argmax())] == expected["class"]
        assert bool(found["known"][0]) == expected["known"] == (expected["ood_score"] <= told["threshold"])
        known.append(expected["known"])
    assert len(known) == 10 and len(set(known)) == 2, "known and unknown ones"


def test_the_pictures_show_the_inputs(export: Path, tmp_path: Path) -> None:
    write_golden(export, tmp_path / "golden")
    for row in read(tmp_path / "golden")["inputs"]:
        shown = np.asarray(Image.open(tmp_path / "golden" / row["picture"]))
        data = np.frombuffer((tmp_path / "golden" / row["file"]).read_bytes(), np.uint8).reshape(3, SIZE, SIZE)
        np.testing.assert_array_equal(shown.transpose(2, 0, 1), data)


def test_what_does_not_run_here_is_left_out_and_said(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lines = golden.open_runner, list[str]()

    def open_runner(folder: Path, artifact: str, **options: Any) -> Any:
        if artifact != "onnx-fp32":
            raise EngineError("no such device")
        return real(folder, artifact=artifact, **options)

    monkeypatch.setattr(golden, "open_runner", open_runner)
    assert write_golden(export, tmp_path / "golden", lines.append) == ["onnx-fp32"]
    assert list(read(tmp_path / "golden")["artifacts"]) == ["onnx-fp32"] and any(
        "left out openvino-fp32, which does not run here: no such device" in line for line in lines
    )
    edit_spec(export, lambda spec: replace(spec, artifacts=spec.artifacts[1:]))
    with pytest.raises(UsageError, match="no artifact of .* runs here"):
        write_golden(export, tmp_path / "none")


def test_untrained_weights_have_golden_outputs_and_no_threshold(make_export: MakeExport, tmp_path: Path) -> None:
    write_golden(make_export(tmp_path / "untrained", trained=False), tmp_path / "golden")
    told = read(tmp_path / "golden")["artifacts"]["onnx-fp32"]
    assert told["threshold"] is None and told["inputs_beside"] == {}
    assert not any(row["known"] for row in told["outputs"])


def test_export_writes_them_on_a_device_too(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["package", str(export), "-o", "model.tar"]).exit_code == 0
    done = CliRunner().invoke(main, ["export", "--from", "model.tar", "--target", "onnx", "--golden", "golden"])
    assert done.exit_code == 0, done.output
    assert "golden inputs and outputs of onnx-fp32, onnx-fp16 in golden" in done.stderr
    assert list(read(Path("golden"))["artifacts"]) == [artifact.name for artifact in load_spec(Path("model")).artifacts]
