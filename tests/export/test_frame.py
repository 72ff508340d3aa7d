"""`export --frame`: a frame goes in, the verdict of the artifact comes out, and nothing else is needed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from colour import SIZE, paint
from PIL import Image

import ssod_edge
from ssod_edge.cli import main
from ssod_edge.config import Preprocess
from ssod_edge.data.pixels import read_pixels
from ssod_edge.errors import UsageError, VerificationError
from ssod_edge.export import frame as module
from ssod_edge.export.frame import FRAME_JSON, check_frames, write_frame_graphs
from ssod_edge.export.frame_graph import Channels
from ssod_edge.export.frame_samples import colours_of, make_frames, to_nv12
from ssod_edge.runtime.open import open_runner

pytest.importorskip("onnxruntime")
ov = pytest.importorskip("openvino")

NAMES = ["onnx-fp32", "onnx-fp16", "openvino-fp32", "openvino-fp16"]


def run(folder: Path, name: str, frame: np.ndarray) -> dict[str, Any]:
    """What a client does, with nothing of this package: the frame goes in, the outputs come out."""
    graph = folder / json.loads((folder / FRAME_JSON).read_text())["graphs"][name]["main_file"]
    if name.startswith("onnx"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        assert [value.name for value in session.get_inputs()] == ["frame"]
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, {"frame": frame}), strict=True))
    model = ov.Core().read_model(graph)
    assert [value.get_any_name() for value in model.inputs] == ["frame"]
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {port.get_any_name(): value for port, value in compiled({"frame": frame}).items()}


@pytest.fixture(scope="module")
def frames(export_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs of the colour classifier that take frames; nobody changes them."""
    folder = tmp_path_factory.mktemp("frames")
    assert sorted(write_frame_graphs(export_template, folder)) == sorted(NAMES)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_client_gets_the_verdicts_of_predict(export: Path, frames: Path, tmp_path: Path, name: str) -> None:
    pictures = [paint(tmp_path / f"{colour}.png", colour, (70, 50)) for colour in ("red", "green", "blue", "grey")]
    with ssod_edge.open(export, artifact=name) as model:
        verdicts = list(model.predict_many(pictures))
    for picture, verdict in zip(pictures, verdicts, strict=True):
        found = run(frames, name, np.asarray(Image.open(picture).convert("RGB")))
        assert int(found["logits"][0].argmax()) == verdict.class_index
        assert bool(found["known"][0]) == verdict.known
        assert float(found["ood_score"][0]) == pytest.approx(verdict.ood_score, abs=0.02)
        assert float(found["p_known"][0]) == pytest.approx(verdict.p_known, abs=0.05)
    assert {verdict.known for verdict in verdicts} == {True, False}


def test_an_export_folder_of_any_name(export: Path, tmp_path: Path) -> None:
    """One that is not UTF-8."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/export-\xff"))
    export.rename(odd)
    assert sorted(write_frame_graphs(odd, odd / "frames")) == sorted(NAMES)


def test_blue_first(export: Path, tmp_path: Path) -> None:
    write_frame_graphs(export, tmp_path / "frames", "BGR")
    document = json.loads((tmp_path / "frames" / FRAME_JSON).read_text())
    assert document["input"] == {"name": "frame", "dtype": "uint8", "shape": ["height", "width", 3], "channels": "BGR"}
    for name in NAMES:
        found = run(tmp_path / "frames", name, np.full((33, 21, 3), (220, 20, 20), np.uint8))
        assert document["classes"][int(found["logits"][0].argmax())] == "blue"
        assert document["graphs"][name]["max_pixel_diff"] <= 1 and document["graphs"][name]["threshold"] == -2.0


@pytest.mark.slow
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_golden_frames(export: Path, tmp_path: Path, channels: Channels) -> None:
    """A client that reads `golden.json` alone gets what stands in it, from bytes in the order of the graphs."""
    write_frame_graphs(export, tmp_path, channels)
    place = tmp_path / "golden"
    document = json.loads((place / "golden.json").read_text())
    frames = []
    for told in document["frames"]:
        data = (place / told["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == told["sha256"]
        frame = np.frombuffer(data, document["input"]["dtype"]).reshape(told["height"], told["width"], 3)
        shown = np.asarray(Image.open(place / told["picture"]))
        np.testing.assert_array_equal(frame if channels == "RGB" else frame[:, :, ::-1], shown)
        frames.append(frame)
    assert (
        len(frames) == 10
        and len({frame.shape for frame in frames}) == 4
        and sorted(document["graphs"]) == sorted(NAMES)
    )
    for name, told in document["graphs"].items():
        graph = place / told["file"]
        assert hashlib.sha256(graph.read_bytes()).hexdigest() == told["sha256"]
        for frame, expected in zip(frames, told["outputs"], strict=True):
            found = run(tmp_path, name, frame)
            np.testing.assert_allclose(found["logits"][0], expected["logits"], atol=told["tolerance"]["logits"])
            assert float(found["ood_score"][0]) == pytest.approx(
                expected["ood_score"], abs=told["tolerance"]["ood_score"]
            )
            assert expected["known"] == (expected["ood_score"] <= told["threshold"]) == bool(found["known"][0])
            assert document["classes"][int(found["logits"][0].argmax())] == expected["class"]
        assert {row["known"] for row in told["outputs"]} == {True, False}


def test_nv12_as_cameras_give_it(export: Path, tmp_path: Path) -> None:
    """OpenCV's own conversion makes the frames, so that a swapped U and V would show."""
    cv2 = pytest.importorskip("cv2")
    lines: list[str] = []
    made = write_frame_graphs(export, tmp_path / "frames", "NV12", lines.append)
    assert made == ["openvino-fp32", "openvino-fp16"] and "left out onnx-fp32: only OpenVINO takes NV12" in lines
    document = json.loads((tmp_path / "frames" / FRAME_JSON).read_text())
    assert document["input"]["shape"] == ["height * 3 / 2", "width"] and document["input"]["channels"] == "NV12"
    for colour, pixel in (("red", (220, 20, 20)), ("green", (20, 200, 20)), ("blue", (20, 20, 220))):
        picture = np.full((48, 64, 3), pixel, np.uint8)
        planes = cv2.cvtColor(picture, cv2.COLOR_RGB2YUV_I420)
        pairs = planes[48:].reshape(2, -1).T.reshape(24, 64)  # OpenCV writes all U, then all V
        found = run(tmp_path / "frames", "openvino-fp32", np.concatenate([planes[:48], pairs]))
        assert document["classes"][int(found["logits"][0].argmax())] == colour and found["known"][0]
    assert document["graphs"]["openvino-fp32"]["max_pixel_diff"] <= 1


def test_nv12_as_opencv_reads_it() -> None:
    cv2 = pytest.importorskip("cv2")
    picture = np.asarray(Image.effect_noise((64, 48), 60).convert("RGB").resize((64, 48)))
    frame = to_nv12(picture[:47, :63])
    assert frame.shape == (69, 62)
    assert np.abs(colours_of(frame, "NV12").astype(int) - cv2.cvtColor(frame, cv2.COLOR_YUV2RGB_NV12)).max() <= 2
    assert np.abs(colours_of(frame, "NV12").astype(int) - picture[:46, :62]).max() <= 4  # of a grey picture


@pytest.mark.parametrize("options", [["--target", "onnx", "--frame", "x"], ["--frame", "x", "--triton", "y"]])
def test_nv12_is_refused_where_nothing_takes_it(export: Path, tmp_path: Path, options: list[str]) -> None:
    command = ["export", "--from", str(export), "-o", str(tmp_path / "out"), "--channels", "NV12", *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2 and "only OpenVINO takes it" in done.output
    assert not (tmp_path / "out").exists()


def test_what_comes_out_otherwise_is_refused(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(settings: Preprocess, channels: str = "RGB", *opset: int) -> Any:
        return real(settings.changed(fit="squash"), channels, *opset)  # type: ignore[arg-type]

    real = module.pixels_graph
    monkeypatch.setattr(module, "pixels_graph", other)
    with pytest.raises(VerificationError, match="for frames does not compute what its artifact does: pixels are up to"):
        write_frame_graphs(export, tmp_path / "frames")


@pytest.mark.parametrize(("levels", "share", "passes"), [(2, 0.001, True), (2, 0.01, False), (3, 0.001, False)])
def test_two_levels_beside_a_hard_edge_are_allowed_and_no_more(
    export: Path, levels: int, share: float, passes: bool
) -> None:
    frames = [np.full((SIZE, SIZE, 3), 100, np.uint8)]
    with open_runner(export, artifact="onnx-fp32") as runner:
        settings = runner.spec.preprocess

        def pixels(frame: np.ndarray) -> dict[str, np.ndarray]:
            made = read_pixels(colours_of(frame, "RGB"), settings).copy()
            made.reshape(-1)[: max(1, round(share * made.size))] += levels
            return {"image": made[None]}

        def graph(frame: np.ndarray) -> dict[str, np.ndarray]:
            return runner.infer(pixels(frame))

        if passes:
            found = check_frames(runner, graph, pixels, frames, "RGB")
            assert found["max_pixel_diff"] == levels
        else:
            with pytest.raises(VerificationError, match=f"up to {levels} levels off"):
                check_frames(runner, graph, pixels, frames, "RGB")


def test_the_frames_that_are_checked_hold_the_region() -> None:
    images = np.zeros((3, 3, SIZE, SIZE), np.uint8)
    settings = Preprocess(SIZE, roi=(9, 4, 30, 20))
    for frame in make_frames(images, settings, "RGB"):
        assert frame.shape[0] >= 24 and frame.shape[1] >= 39


def test_an_export_of_plans_alone_has_none(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module, "open_runner", lambda *_, **options: _no_engine(options))
    with pytest.raises(UsageError, match="no artifact of .* runs here on ONNX Runtime or OpenVINO"):
        write_frame_graphs(export, tmp_path / "frames", say=lines.append)
    assert len(lines) == 4 and "left out onnx-fp32, which does not run here: none" in lines[0]


def _no_engine(_: object) -> Any:
    from ssod_edge.errors import EngineError

    raise EngineError("none")


def test_export_writes_them_on_a_device_too(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["package", str(export), "-o", "model.tar"]).exit_code == 0
    command = ["export", "--from", "model.tar", "--target", "onnx", "--frame", "frames", "--channels", "BGR"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "graphs of onnx-fp32, onnx-fp16 that take a frame in frames" in done.stderr
