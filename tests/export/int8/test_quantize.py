"""int8 graphs: what is quantised, what stays fp32, what TensorRT would refuse, and what accuracy control puts back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from small import CLASSES, SIZE, make_model, random_images, write_images, write_run

pytest.importorskip("nncf", reason="needs the extra int8")

from ssod_edge.cli import main
from ssod_edge.data.images import Images, Subset, whole_dataset
from ssod_edge.detect.confidence import p_known, verdict_inputs
from ssod_edge.errors import UsageError, VerificationError
from ssod_edge.export.graph.onnx import fused_graph
from ssod_edge.export.graph.source import Source
from ssod_edge.export.int8.accuracy_control import (
    LEAST_IMAGES,
    AccuracyControl,
    DrawnImages,
    draw_images,
    quantize_controlled,
    rank_nodes,
)
from ssod_edge.export.int8.artifacts import check_int8
from ssod_edge.export.int8.bias_correction import correct_biases
from ssod_edge.export.int8.quantize import (
    OnnxQuantizer,
    OpenVinoQuantizer,
    Quantizer,
    check_symmetric,
    float_scope,
    infer_onnx,
    layer_names,
)
from ssod_edge.runtime.open import choose_artifact, open_runner
from ssod_edge.spec import load_spec
from ssod_edge.training.model import SSODClassifier

#: A residual network of 16 layers, with a convolution in its shortcuts.
BACKBONE = "test_resnet"
ROWS = len(CLASSES) + 1
FORMS = ("onnx", "openvino")
QUANTIZERS: dict[str, Callable[..., Quantizer]] = {"onnx": OnnxQuantizer, "openvino": OpenVinoQuantizer}


@pytest.fixture(scope="module")
def model() -> SSODClassifier:
    return make_model(BACKBONE)


@pytest.fixture(scope="module")
def fp32(model: SSODClassifier) -> onnx.ModelProto:
    """The fused graph; nobody changes it."""
    return fused_graph(model, "energy", trained=True)


def images(n: int, seed: int = 0) -> np.ndarray:
    return random_images(n, seed).numpy()


@pytest.fixture(scope="module")
def quantized(fp32: onnx.ModelProto) -> dict[str, tuple[Quantizer, Any]]:
    """Form -> (quantiser, int8 model)."""
    quantizers = {form: QUANTIZERS[form](fp32, ROWS, images(24)) for form in FORMS}
    return {form: (quantizer, quantizer.quantize()) for form, quantizer in quantizers.items()}


def copied(graph: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return copy


@pytest.mark.parametrize("form", FORMS)
def test_int8_gives_nearly_the_fp32_numbers(
    fp32: onnx.ModelProto, quantized: dict[str, tuple[Quantizer, Any]], form: str
) -> None:
    quantizer, int8 = quantized[form]
    expected, found = infer_onnx(fp32)(images(40, seed=3)), quantizer.infer(int8)(images(40, seed=3))
    error = found["logits"] - expected["logits"]
    assert 0 < np.square(error).mean() < 0.02 * np.square(expected["logits"]).mean()
    np.testing.assert_allclose(found["ood_score"], -np.logaddexp.reduce(found["logits"], axis=1), atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_all_layers_are_int8_but_the_head(quantized: dict[str, tuple[Quantizer, Any]], form: str) -> None:
    quantizer, int8 = quantized[form]
    layers = quantizer.layers(int8)
    assert len(layers) == 16
    assert [name for name, is_int8 in layers.items() if not is_int8] == ["node_linear"]
    assert not set(quantizer.quantized_nodes(int8)) & set(quantizer.scope), "the ends read no quantised value"


def test_onnx_graph_is_symmetric_and_weights_are_per_channel(quantized: dict[str, tuple[Quantizer, Any]]) -> None:
    _, int8 = quantized["onnx"]
    onnx.checker.check_model(int8, full_check=True)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in int8.graph.initializer}
    producer = {output: node for node in int8.graph.node for output in node.output}
    for node in int8.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert tensors[node.input[2]].dtype == np.int8 and not tensors[node.input[2]].any()
        if node.op_type == "Conv":
            weight = producer[node.input[1]]
            assert tensors[weight.input[0]].dtype == np.int8
            assert tensors[weight.input[1]].shape == (len(tensors[weight.input[0]]),)
            assert tensors[node.input[2]].dtype == np.float32, "no quantised bias"
            assert producer[node.input[0]].op_type in ("DequantizeLinear", "MaxPool")


def test_both_ends_stay_in_floating_point() -> None:
    graph = fused_graph(make_model("mobilenetv3_small_050"), "energy", trained=True)
    scope, names = set(float_scope(graph, ROWS)), layer_names(graph)
    layers = {names[node.name] for node in graph.graph.node if node.op_type in ("Conv", "Gemm")}
    assert {names[name] for name in scope} & layers == {"head", "backbone.conv_head"}
    assert any(name not in layers for name in (names[name] for name in scope)), "normalisation and scores too"


def pair(zero_point: np.ndarray | None, scale: float = 0.1) -> onnx.ModelProto:
    """x -> QuantizeLinear -> DequantizeLinear."""
    inputs = ["scale"] if zero_point is None else ["scale", "zero"]
    arrays = {"scale": np.float32(scale)} | ({} if zero_point is None else {"zero": zero_point})
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *inputs], ["q"], name="quantise"),
        helper.make_node("DequantizeLinear", ["q", *inputs], ["y"], name="dequantise"),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    return helper.make_model(helper.make_graph(nodes, "pair", ports[:1], ports[1:], tensors))


@pytest.mark.parametrize(
    ("zero_point", "scale", "message"),
    [
        (np.uint8(0), 0.1, "'quantise' .* type uint8: expected int8"),
        (np.int8(3), 0.1, "'quantise' .* other than 0"),
        (np.int32(0), 0.1, "'quantise' .* int32: a bias"),
        (None, 0.1, "'quantise' .* no constant scale and zero-point"),
        (np.int8(0), 0.0, "'quantise' .* not positive"),
    ],
)
def test_what_tensorrt_would_refuse_is_named(zero_point: np.ndarray | None, scale: float, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        check_symmetric(pair(zero_point, scale))


def test_a_symmetric_pair_passes() -> None:
    check_symmetric(pair(np.int8(0)))


def test_biases_get_the_fp32_means_back(fp32: onnx.ModelProto, quantized: dict[str, tuple[Quantizer, Any]]) -> None:
    _, int8 = quantized["onnx"]
    shifted = copied(int8)
    tensors = {tensor.name: tensor for tensor in shifted.graph.initializer}
    for node in shifted.graph.node:
        if node.op_type == "Conv":
            bias = tensors[node.input[2]]
            bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.3), bias.name))

    def error(graph: onnx.ModelProto) -> float:
        return float(np.square(infer_onnx(graph)(images(24))["logits"] - expected).mean())

    expected = infer_onnx(fp32)(images(24))["logits"]
    damage = error(shifted)
    correct_biases(shifted, fp32, images(24))
    onnx.checker.check_model(shifted, full_check=True)
    assert damage > 10 * error(int8)
    assert error(shifted) == pytest.approx(error(int8), rel=0.5)


@pytest.mark.parametrize("form", FORMS)
def test_excluded_nodes_stay_in_floating_point(fp32: onnx.ModelProto, form: str) -> None:
    quantizer = QUANTIZERS[form](fp32, ROWS, images(8))
    first = next(node.name for node in fp32.graph.node if node.op_type == "Conv")
    layers = quantizer.layers(quantizer.quantize([first]))
    assert [name for name, is_int8 in layers.items() if not is_int8] == [first, "node_linear"]


@pytest.mark.parametrize("form", FORMS)
def test_a_bypassed_node_reads_what_was_not_rounded(quantized: dict[str, tuple[Quantizer, Any]], form: str) -> None:
    quantizer, int8 = quantized[form]
    nodes = quantizer.quantized_nodes(int8)
    for node in (nodes[0], nodes[-1]):
        without = quantizer.bypassed(int8, node)
        assert set(nodes) - set(quantizer.quantized_nodes(without)) == {node}
        outputs = [quantizer.infer(graph)(images(4))["logits"] for graph in (int8, without)]
        assert 0 < np.abs(outputs[0] - outputs[1]).max() < 10
    assert quantizer.quantized_nodes(int8) == nodes, "a copy is changed"


class Ruined(OnnxQuantizer):
    """A quantiser that gets the range of one node's activations wrong, a thousand times too wide."""

    always = False

    def quantize(self, excluded: Sequence[str] = ()) -> onnx.ModelProto:
        graph = super().quantize(excluded)
        if self.victim in excluded and not self.always:
            return graph
        producer = {output: node for node in graph.graph.node for output in node.output}
        (node,) = (node for node in graph.graph.node if node.name == self.victim)
        pair = producer[node.input[0]]
        (scale,) = (tensor for tensor in graph.graph.initializer if tensor.name == pair.input[1])
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1000), scale.name))
        return graph

    @property
    def victim(self) -> str:
        return next(node.name for node in self._graph.graph.node if node.op_type == "Conv")


@pytest.fixture(scope="module")
def control(fp32: onnx.ModelProto) -> AccuracyControl:
    """Its labels are fp32's own classes, so that top-1 counts every class that changes."""
    known = images(120, seed=5)
    labels = infer_onnx(fp32)(known)["logits"].argmax(axis=1)
    return AccuracyControl(DrawnImages(images(24), known, labels, "noise", "noise"), infer_onnx(fp32), max_drop=10.0)


@pytest.mark.slow
def test_the_layer_that_costs_accuracy_goes_back_to_floating_point(
    fp32: onnx.ModelProto, control: AccuracyControl
) -> None:
    quantizer, lines = Ruined(fp32, ROWS, images(24)), []
    assert rank_nodes(quantizer, quantizer.quantize(), control)[0] == quantizer.victim
    int8, excluded, figures = quantize_controlled(quantizer, control, lines.append)
    assert excluded == (quantizer.victim,)
    assert control.holds(figures) and figures.top1 is not None and figures.top1 >= 0.9
    assert not quantizer.layers(int8)[quantizer.victim]
    assert "beyond 10.0 points; ranking the layers" in lines[0] and "with 1 nodes in floating point" in lines[1]
    record = control.record(figures)
    assert record["top1"] == {"fp32": 1.0, "int8": figures.top1} and record["images"] == 120


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 6, 8, 13])
def test_no_more_layers_go_back_than_have_to(
    control: AccuracyControl, monkeypatch: pytest.MonkeyPatch, needed: int
) -> None:
    from ssod_edge.export.int8.accuracy_control import Figures

    class Counted:
        preset = "performance"

        def __init__(self) -> None:
            self.tried: list[int] = []

        def quantize(self, excluded: Sequence[str] = ()) -> int:
            self.tried.append(len(excluded))
            return len(excluded)

        def infer(self, model: int) -> int:
            return model

    monkeypatch.setattr("ssod_edge.export.int8.accuracy_control.rank_nodes", lambda *_: [str(n) for n in range(26)])
    monkeypatch.setattr(control, "measure", lambda count: Figures(None, float(count >= needed)))
    quantizer = Counted()
    model, excluded, _ = quantize_controlled(quantizer, control, lambda line: None)  # type: ignore[arg-type]
    assert (model, excluded) == (needed, tuple(str(n) for n in range(needed)))
    assert len(quantizer.tried) <= 9 and len(set(quantizer.tried)) == len(quantizer.tried)


def test_what_cannot_be_mended_fails_with_the_figures(
    fp32: onnx.ModelProto, control: AccuracyControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ruined, "always", True)
    monkeypatch.setattr("ssod_edge.export.int8.accuracy_control.rank_nodes", lambda *_: ["node_linear"] * 4)
    with pytest.raises(
        VerificationError, match=r"loses more than 10.0 points.*top-1 of 120 images 100.00 -> .*--max-dr"
    ):
        quantize_controlled(Ruined(fp32, ROWS, images(24)), control, lambda line: None)


def test_a_drop_is_held_against_each_figure(control: AccuracyControl) -> None:
    from ssod_edge.export.int8.accuracy_control import Figures

    auroc = control.reference.auroc
    assert control.holds(Figures(0.9, auroc)) and control.holds(Figures(1.0, auroc - 0.1))
    assert not control.holds(Figures(0.89, auroc)) and not control.holds(Figures(1.0, auroc - 0.101))
    assert control.holds(Figures(None, auroc)), "without labels the AUROC alone decides"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "data"
    write_images(folder)
    return folder


def shared(data: Path) -> tuple[Subset, Subset]:
    """Ranges and control from one data set, as with --calib."""
    parts = Images(int8=whole_dataset(str(data))).for_int8()
    assert parts is not None
    return parts


def test_ranges_come_from_training_images_and_the_control_from_all_that_was_held_out() -> None:
    source: Any = object()

    def part(name: str, *indices: int) -> Subset:
        return Subset(source, np.array(indices), name)

    training, val, calib = part("train", 0, 1, 2, 3, 4), part("val", 5, 6), part("calib", 7, 8)
    ranges, control = Images(training, val, calib).for_int8() or (None, None)
    assert ranges is not None and control is not None
    assert (ranges.indices.tolist(), control.indices.tolist()) == ([0, 1, 2, 3, 4], [5, 6, 7, 8])
    assert (ranges.description, control.description) == ("train", "val and calib")
    # Where thresholds are out of fold, their images are training images too.
    ranges, control = Images(training, val, part("out of fold", 1, 3)).for_int8() or (None, None)
    assert ranges is not None and control is not None
    assert (ranges.indices.tolist(), control.indices.tolist()) == ([0, 2, 4], [1, 3, 5, 6])
    # Named ones go before all others, and without training images there is one set for both.
    named = part("named", *range(10, 21))
    for found in (Images(training, val, calib, int8=named), Images(thresholds=named)):
        ranges, control = found.for_int8() or (None, None)
        assert ranges is not None and control is not None
        assert sorted([*ranges.indices.tolist(), *control.indices.tolist()]) == list(range(10, 21))
        assert (len(ranges), len(control)) == (5, 6) and ranges.description == control.description == "named"
    assert Images(training).for_int8() is None is Images().for_int8()


def test_images_are_drawn_once_for_ranges_and_others_for_control(data: Path, model: SSODClassifier) -> None:
    lines: list[str] = []
    drawn = draw_images(shared(data), model, lines.append)
    assert (len(drawn.statistics), drawn.copies, len(drawn.control)) == (84, 42, 42) and lines == []
    both = {image.tobytes() for image in drawn.statistics} & {image.tobytes() for image in drawn.control}
    assert not both and drawn.labels is not None and set(drawn.labels) == set(range(len(CLASSES)))


def test_labels_go_by_the_names_of_the_classes(tmp_path: Path, model: SSODClassifier) -> None:
    write_images(tmp_path / "data")
    for name in CLASSES[:-1]:  # "g" becomes label 0
        for path in (tmp_path / "data" / name).iterdir():
            path.rename(tmp_path / "data" / "g" / path.name)
        (tmp_path / "data" / name).rmdir()
    lines: list[str] = []
    drawn = draw_images(shared(tmp_path / "data"), model, lines.append)
    assert drawn.labels is not None and set(drawn.labels) == {CLASSES.index("g")}
    assert "all images of" in lines[0] and "one class, 'g'" in lines[0]
    (tmp_path / "data" / "g").rename(tmp_path / "data" / "zebra")
    drawn = draw_images(shared(tmp_path / "data"), model, lines.append)
    assert drawn.labels is None and "top-1 is not controlled" in lines[1]


def test_too_few_images_are_refused(tmp_path: Path, model: SSODClassifier) -> None:
    write_images(tmp_path / "data", LEAST_IMAGES)
    draw_images(shared(tmp_path / "data"), model, lambda line: None)
    (tmp_path / "data" / "a" / "000.png").write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"at least 32 readable .* got 31 of .*--calib"):
        draw_images(shared(tmp_path / "data"), model, lambda line: None)


def test_a_list_that_is_too_short_is_refused_before_any_work(tmp_path: Path, model: SSODClassifier) -> None:
    write_images(tmp_path / "data", LEAST_IMAGES - 1)
    few = whole_dataset(str(tmp_path / "data"))
    with pytest.raises(UsageError, match=r"at least 32 readable .* got \d+ of .*--calib"):
        check_int8(Source(model, trained=True, folder=tmp_path, images=Images(thresholds=few)))


FEATURES = ["--features", "pooled"]


@pytest.fixture(scope="module")
def exported(model: SSODClassifier, data: Path) -> tuple[Path, Any]:
    """A run, exported to fp32 and int8 on the command line, one of its images broken."""
    run = data.parent / "runs" / "small"
    run.mkdir(parents=True)
    write_run(run, model, str(data))
    (data / "a" / "000.png").write_bytes(b"broken")  # an even index: of the calibration split
    result = CliRunner().invoke(main, ["export", str(run), "--fp32", "--int8", "--max-drop", "10", *FEATURES])
    return run / "export", result


def test_export_makes_int8_artifacts_with_their_own_thresholds(exported: tuple[Path, Any]) -> None:
    folder, result = exported
    assert result.exit_code == 1, result.output  # an image was left out
    assert "left out: " in result.stderr and "int8 (mixed): 15 of 16 layers are int8" in result.stderr
    spec = load_spec(folder)
    assert [a.name for a in spec.artifacts] == ["onnx-fp32", "onnx-int8", "openvino-fp32", "openvino-int8"]
    for name in ("onnx-int8", "openvino-int8"):
        artifact = spec.artifact(name)
        assert artifact.threshold is not None and artifact.verification is not None
        assert artifact.verification["passed"] and "nncf" in artifact.versions
        assert artifact.threshold.value != spec.artifact(name.replace("int8", "fp32")).threshold.value  # type: ignore[union-attr]
        build = artifact.build
        assert build["int8_layers"] == 15 and build["float_layers"] == {"head": "an fp32 end"}
        assert build["calibration"]["images"] == 2 * build["calibration"]["copies"] == 84
        assert "train split" in build["calibration"]["data"]
        assert set(build["accuracy_control"]["auroc"]) == {"fp32", "int8"}
    assert spec.artifact("onnx-int8").main_file == "model-int8.onnx"
    check_symmetric(onnx.load(folder / "model-int8.onnx"))
    sizes = {name: (folder / name / "model.bin").stat().st_size for name in ("openvino-fp32", "openvino-int8")}
    assert sizes["openvino-int8"] < 0.5 * sizes["openvino-fp32"]


@pytest.mark.parametrize("name", ["onnx-int8", "openvino-int8"])
def test_the_runner_says_that_int8_ran(exported: tuple[Path, Any], name: str) -> None:
    folder, _ = exported
    with open_runner(folder, artifact=name, threads=1) as runner:
        assert (runner.precision, runner.artifact.precision) == ("int8", "int8")
        outputs = runner.infer({"image": images(3)})
        threshold = runner.artifact.threshold
    np.testing.assert_allclose(outputs["probs"].sum(axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(outputs["p_known"], p_known(outputs["ood_score"], verdict_inputs(threshold)))
    with open_runner(folder, artifact=name.replace("int8", "fp32"), threads=1) as runner:
        assert runner.precision == "fp32"
        expected = runner.infer({"image": images(3)})["features_pooled"]
    error = np.abs(outputs["features_pooled"] - expected).max()
    assert 0 < error < 0.2 * np.abs(expected).max()


def test_int8_runs_where_it_is_asked_for(exported: tuple[Path, Any]) -> None:
    spec = load_spec(exported[0])
    assert choose_artifact(spec).name == "openvino-fp32"
    assert choose_artifact(spec, precision="int8").name == "openvino-int8"


def test_a_second_export_keeps_int8(exported: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = exported
    result = CliRunner().invoke(main, ["export", str(folder.parent), "--fp32", "--target", "onnx", *FEATURES])
    assert "kept openvino-int8 of the earlier export" in result.stderr
    assert load_spec(folder).artifact("onnx-int8").build["int8_layers"] == 15


AFTER_QUANTIZING = """
import os, signal, sys
import numpy as np, onnx
from ssod_edge.export.int8.quantize import OnnxQuantizer, OpenVinoQuantizer
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
quantizer = OpenVinoQuantizer(onnx.load(sys.argv[1]), int(sys.argv[2]), np.zeros((4, 3, 64, 64), np.uint8))
quantizer.infer(quantizer.quantize())(np.zeros((2, 3, 64, 64), np.uint8))
OnnxQuantizer(onnx.load(sys.argv[1]), int(sys.argv[2]), np.zeros((4, 3, 64, 64), np.uint8)).quantize()
del quantizer
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.slow
def test_nothing_is_printed_or_reported_and_a_signal_is_survived(fp32: onnx.ModelProto, tmp_path: Path) -> None:
    """NNCF draws its progress on standard output, makes OpenVINO Cores of its own, and would, as OpenVINO does, report
    its use by an id that lies in the home folder.
    """
    onnx.save(fp32, tmp_path / "model.onnx")
    command = [sys.executable, "-c", AFTER_QUANTIZING, str(tmp_path / "model.onnx"), str(ROWS)]
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "NNCF_CI")}
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "HOME": str(home)})
    assert (done.stdout, done.returncode) == ("handled\n", 0), done.stderr
    assert "onnxruntime" not in done.stderr  # of inputs that have defaults
    assert list(home.rglob("*")) == []
    assert signal.Signals.SIGUSR1


@pytest.mark.slow
def test_untrained_weights_are_quantised_with_noise(tmp_path: Path) -> None:
    arguments = ["export", "--backbone", BACKBONE, "--size", str(SIZE), "--runs", str(tmp_path), "--int8"]
    result = CliRunner().invoke(main, [*arguments, "--target", "openvino"])
    assert result.exit_code == 0, result.output
    (artifact,) = load_spec(tmp_path / f"{BACKBONE}-untrained" / "export").artifacts
    assert (artifact.name, artifact.threshold) == ("openvino-int8", None)
    assert "noise" in artifact.build["calibration"]["data"] and artifact.build["accuracy_control"] is None


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--calib", "x"], 2, "it needs --int8"),
        (["--int8", "--max-drop", "-1"], 2, "max_drop must lie between 0 and 100"),
        (["--int8", "--calib", "/nowhere"], 2, "does not exist"),
    ],
)
def test_wrong_options_are_named(exported: tuple[Path, Any], options: list[str], code: int, message: str) -> None:
    result = CliRunner().invoke(main, ["export", str(exported[0].parent), *options])
    assert result.exit_code == code and message in result.stderr


def test_without_nncf_the_extra_is_named(exported: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssod_edge.export.int8.artifacts.is_there", lambda name: False)
    result = CliRunner().invoke(main, ["export", str(exported[0].parent), "--int8"])
    assert result.exit_code == 3 and "pip install 'ssod-edge[int8]'" in result.stderr


def test_logging_stays_as_it_was() -> None:
    """NNCF sets the class of later loggers, and its way to be quiet the level of handlers that are not its own."""
    code = (
        "import logging; handler = logging.StreamHandler(); logging.getLogger('nncf').addHandler(handler); "
        "from ssod_edge.export.int8.quantize import _import_nncf; _import_nncf(); "
        "print(handler.level, logging.getLoggerClass() is logging.Logger)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("0 True\n")
