"""`export --triton`: a repository that Triton's own protobuf reads, whose models give the artifact's verdicts."""

from __future__ import annotations

import importlib.util
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from colour import paint
from google.protobuf import text_format
from PIL import Image

import ssod_edge
from ssod_edge.cli import main
from ssod_edge.data.pixels import preprocess
from ssod_edge.errors import UsageError, VerificationError
from ssod_edge.export import triton as module
from ssod_edge.export.triton import LABELS, write_triton
from ssod_edge.spec import load_spec

onnxruntime = pytest.importorskip("onnxruntime")

NAMES = ["onnx-fp32", "onnx-fp32-frame", "onnx-fp16", "onnx-fp16-frame"]
#: ONNX Runtime's names of types -> Triton's, as its ONNX Runtime backend translates them.
TYPES = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32", "tensor(bool)": "TYPE_BOOL"}


def read_config(path: Path) -> Any:
    """A `ModelConfig` of Triton's; its package would import gRPC, which the message alone does not need."""
    found = next(file for file in files("tritonclient") or [] if file.match("tritonclient/grpc/model_config_pb2.py"))
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(found.locate()))
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return text_format.Parse(path.read_text(), loaded.ModelConfig())


def open_model(folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def repository(export_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of the colour classifier; nobody changes them."""
    folder = tmp_path_factory.mktemp("triton")
    assert write_triton(export_template, folder) == NAMES
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_triton_reads_it_and_it_says_what_the_model_takes_and_gives(repository: Path, name: str) -> None:
    folder = repository / name
    config, session = read_config(folder / "config.pbtxt"), open_model(folder)
    assert (config.name, config.backend, len(config.instance_group)) == (name, "onnxruntime", 1)
    frames = name.endswith("-frame")
    assert config.max_batch_size == (0 if frames else 8) and config.HasField("dynamic_batching") is not frames
    assert [value.name for value in config.input] == [value.name for value in session.get_inputs()]
    assert [value.name for value in config.output] == [value.name for value in session.get_outputs()]
    for told, value in [
        *zip(config.input, session.get_inputs(), strict=True),
        *zip(config.output, session.get_outputs(), strict=True),
    ]:
        kind = told.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[told.data_type].name
        assert kind == TYPES[value.type]
        axes = list(told.reshape.shape if told.HasField("reshape") else told.dims)
        real = [-1 if isinstance(axis, str) or axis is None else axis for axis in value.shape]
        if not frames:  # the first axis is the batch, which Triton adds
            assert real[0] == -1
            real = real[1:]
        assert len(axes) == len(real) and all(a == b or b == -1 for a, b in zip(axes, real, strict=True))
    assert {value.name for value in config.output if value.label_filename == LABELS} == {"logits", "probs"}


@pytest.mark.parametrize("name", ["onnx-fp32", "onnx-fp16"])
def test_the_models_give_the_verdicts_of_predict(export: Path, repository: Path, tmp_path: Path, name: str) -> None:
    pictures = [paint(tmp_path / f"{colour}.png", colour, (70, 50)) for colour in ("red", "green", "blue", "grey")]
    with ssod_edge.open(export, artifact=name) as model:
        verdicts = list(model.predict_many(pictures))
    assert {verdict.known for verdict in verdicts} == {True, False}
    session, labels = open_model(repository / f"{name}-frame"), (repository / name / LABELS).read_text().split()
    names = [value.name for value in session.get_outputs()]
    for picture, verdict in zip(pictures, verdicts, strict=True):
        frame = np.asarray(Image.open(picture).convert("RGB"))
        found = dict(zip(names, session.run(names, {"frame": frame}), strict=True))
        assert labels[int(found["probs"][0].argmax())] == verdict.class_name
        assert found["known"].shape == (1,) and bool(found["known"][0]) == verdict.known
    settings = load_spec(export).preprocess
    batch = np.stack([preprocess(Image.open(picture), settings) for picture in pictures])
    known = open_model(repository / name).run(["known"], {"image": batch})[0]
    assert known.tolist() == [verdict.known for verdict in verdicts]


def test_a_model_that_gives_something_else_is_refused(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(graph: onnx.ModelProto, values: dict[str, Any]) -> None:
        real(graph, {**values, "threshold": values["threshold"] - 100})

    real = module.close_inputs
    monkeypatch.setattr(module, "close_inputs", other)
    with pytest.raises(VerificationError, match="'onnx-fp32' for Triton gives another known"):
        write_triton(export, tmp_path / "repository")
    assert not list((tmp_path / "repository").iterdir())


def test_an_export_without_onnx_has_none(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssod_edge.errors import EngineError

    def none(*_: object, **__: object) -> Any:
        raise EngineError("none")

    lines: list[str] = []
    monkeypatch.setattr(module, "open_runner", none)
    with pytest.raises(UsageError, match="no ONNX artifact that runs here, .* --target onnx"):
        write_triton(export, tmp_path / "repository", say=lines.append)
    assert lines[0] == "left out onnx-fp32, which does not run here: none"


def test_export_writes_it_on_a_device_too(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["package", str(export), "-o", "model.tar"]).exit_code == 0
    command = ["export", "--from", "model.tar", "--target", "onnx", "--fp32", "--triton", "models"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "models onnx-fp32, onnx-fp32-frame for Triton in models" in done.stderr
    assert read_config(tmp_path / "models" / "onnx-fp32" / "config.pbtxt").name == "onnx-fp32"
