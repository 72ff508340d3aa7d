"""The fp16 conversion of a graph: what is halved, what stays fp32, and what happens to numbers that do not fit."""

from __future__ import annotations

import io

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper

from ssod_edge.errors import VerificationError
from ssod_edge.export.graph.fp16 import LARGEST, OVERFLOW_LIMIT, HalfReport, to_fp16

ROWS = 4
RNG = np.random.default_rng(0)


def graph(*, branches: bool = False, batch_norm: bool = False, kernel: np.ndarray | None = None) -> onnx.ModelProto:
    """uint8 image, normalised, two convolutions with squeeze and excite between them, pooling, one Gemm."""
    weights = {
        "scale": np.full((1, 3, 1, 1), 1 / 57.375, np.float32),
        "shift": np.full((1, 3, 1, 1), -2.1, np.float32),
        "k1": kernel if kernel is not None else RNG.normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32),
        "se": RNG.normal(0, 0.3, (8, 8, 1, 1)).astype(np.float32),
        "k2": RNG.normal(0, 0.3, (6, 8, 1, 1)).astype(np.float32),
        "axes": np.array([2, 3]),
        "flat": np.array([0, -1]),
        "w": RNG.normal(0, 1, (ROWS, 12 if branches else 6)).astype(np.float32),
        "b": RNG.normal(0, 1, ROWS).astype(np.float32),
        "starts": np.array([0]),
        "ends": np.array([ROWS - 1]),
        "axis": np.array([1]),
        "last": np.array(ROWS - 1),
        **{name: RNG.uniform(0.5, 1.5, 8).astype(np.float32) for name in ("gamma", "beta", "mean", "variance")},
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["normal"]),
        helper.make_node("Conv", ["normal", "k1"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c0", "gamma", "beta", "mean", "variance"], ["c1"], epsilon=1e-3)
        if batch_norm
        else helper.make_node("Identity", ["c0"], ["c1"]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("ReduceMean", ["r1", "axes"], ["squeezed"], keepdims=1),
        helper.make_node("Conv", ["squeezed", "se"], ["excited"]),
        helper.make_node("Sigmoid", ["excited"], ["gate"]),
        helper.make_node("Mul", ["r1", "gate"], ["gated"]),
        helper.make_node("Conv", ["gated", "k2"], ["c2"]),
        helper.make_node("ReduceMean", ["c2", "axes"], ["average"], keepdims=1),
        helper.make_node("GlobalMaxPool", ["c2"], ["maximum"]),
        helper.make_node("Concat", ["average", "maximum"] if branches else ["average"], ["pooled"], axis=1),
        helper.make_node("Reshape", ["pooled", "flat"], ["z"]),
        helper.make_node("Gemm", ["z", "w", "b"], ["fused"], transB=1),
        helper.make_node("Slice", ["fused", "starts", "ends", "axis"], ["logits"]),
        helper.make_node("Gather", ["fused", "last"], ["id_logit"], axis=1),
        helper.make_node("Softmax", ["logits"], ["probs"], axis=1),
        helper.make_node("ReduceLogSumExp", ["logits", "axis"], ["energy"], keepdims=0),
        helper.make_node("Neg", ["energy"], ["ood_score"]),
    ]
    if not branches:
        nodes = [node for node in nodes if node.op_type != "GlobalMaxPool"]
    shapes = {"logits": ["n", ROWS - 1], "probs": ["n", ROWS - 1], "id_logit": ["n"], "ood_score": ["n"]}
    used = {name for node in nodes for name in node.input}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 3, 8, 8])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
            [numpy_helper.from_array(value, name) for name, value in weights.items() if name in used],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Value or weight -> element type."""
    values = (*model.graph.value_info, *model.graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def run(model: onnx.ModelProto, image: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in model.graph.output]
    return dict(zip(names, session.run(names, {"image": image}), strict=True))


def images(n: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)


@pytest.mark.parametrize("branches", [False, True])
def test_trunk_is_fp16_and_both_ends_are_fp32(branches: bool) -> None:
    half, _ = to_fp16(graph(branches=branches), ROWS)
    onnx.checker.check_model(half, full_check=True)
    found = types(half)
    head = ["pooled", "z", "fused", "logits", "probs", "id_logit", "energy", "ood_score", "w", "b", "average"]
    for name in ["float", "scaled", "normal", "scale", "shift", *head, *(["maximum"] if branches else [])]:
        assert found[name] == TensorProto.FLOAT, name
    for name in ["c0", "r1", "squeezed", "excited", "gate", "gated", "c2", "k1_fp16", "se_fp16", "k2_fp16"]:
        assert found[name] == TensorProto.FLOAT16, name
    assert not {"k1", "se", "k2"} & set(found)


@pytest.mark.parametrize("branches", [False, True])
def test_there_are_two_casts_and_no_more(branches: bool) -> None:
    half, _ = to_fp16(graph(branches=branches), ROWS)
    casts = [node for node in half.graph.node if node.op_type == "Cast"]
    assert [(cast.input[0], cast.attribute[0].i) for cast in casts] == [
        ("image", TensorProto.FLOAT),
        ("normal", TensorProto.FLOAT16),
        ("c2", TensorProto.FLOAT),
    ]


@pytest.mark.parametrize("options", [{}, {"branches": True}, {"batch_norm": True}])
def test_numbers_stay_within_half_precision_on_both_engines(options: dict[str, bool]) -> None:
    full = graph(**options)
    half, report = to_fp16(full, ROWS)
    expected, outputs = run(full, images()), run(half, images())
    core = openvino.Core()
    model = core.read_model(io.BytesIO(half.SerializeToString()))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    other = compiled({"image": images()})
    for name, value in expected.items():
        assert outputs[name].dtype == np.float32
        np.testing.assert_allclose(outputs[name], value, rtol=0, atol=0.02)
        np.testing.assert_allclose(other[name], value, rtol=0, atol=0.02)
    assert any(np.abs(outputs[name] - value).max() > 0 for name, value in expected.items())
    assert report.weights > 0 and report.clipped == 0


def test_the_softmax_sees_unrounded_logits() -> None:
    half, _ = to_fp16(graph(), ROWS)
    logits = run(half, images(64))["logits"]
    assert (logits != logits.astype(np.float16)).mean() > 0.9


def test_batch_norms_become_a_multiply_and_an_add() -> None:
    full = graph(batch_norm=True)
    half, _ = to_fp16(full, ROWS)
    assert "BatchNormalization" not in {node.op_type for node in half.graph.node}
    assert not {"gamma", "beta", "mean", "variance"} & set(types(half))
    assert types(half)["c1_factor_fp16"] == TensorProto.FLOAT16


def test_the_argument_is_left_alone_and_metadata_is_kept() -> None:
    full = graph(batch_norm=True)
    helper.set_model_props(full, {"ssod.score": "energy"})
    before = full.SerializeToString(deterministic=True)
    half, _ = to_fp16(full, ROWS)
    assert full.SerializeToString(deterministic=True) == before
    assert {p.key: p.value for p in half.metadata_props} == {"ssod.score": "energy"}
    assert [o.name for o in half.graph.output] == [o.name for o in full.graph.output]


def test_weights_that_do_not_fit_are_counted_and_never_infinite() -> None:
    kernel = np.full((8, 3, 3, 3), 0.1, np.float32)
    kernel.flat[:5] = [1e5, -1e6, 1e-9, -1e-9, 1e-6]
    half, report = to_fp16(graph(kernel=kernel), ROWS)
    assert (report.clipped, report.flushed) == (2, 2)
    assert report.subnormal >= 1 and report.max_abs == 1e6
    assert report.max_abs_error == pytest.approx(1e6 - 65504)
    (stored,) = (numpy_helper.to_array(t) for t in half.graph.initializer if t.name == "k1_fp16")
    assert np.isfinite(stored).all() and stored.flat[0] == 65504 and stored.flat[1] == -65504


def test_a_weight_used_on_both_sides_exists_in_both_types() -> None:
    full = graph()
    full.graph.node.insert(5, helper.make_node("Mul", ["c1", "one"], ["c1b"]))
    full.graph.node[6].input[0] = "c1b"
    full.graph.initializer.append(numpy_helper.from_array(np.float32(1.0), "one"))
    position = next(i for i, node in enumerate(full.graph.node) if node.op_type == "Gemm")
    full.graph.node.insert(position, helper.make_node("Mul", ["z", "one"], ["z1"]))
    full.graph.node[position + 1].input[0] = "z1"
    half, _ = to_fp16(full, ROWS)
    onnx.checker.check_model(half, full_check=True)
    assert types(half)["one"] == TensorProto.FLOAT and types(half)["one_fp16"] == TensorProto.FLOAT16


def test_resize_keeps_its_fp32_scales() -> None:
    full = graph()
    full.graph.node.insert(5, helper.make_node("Resize", ["c1", "", "scales"], ["c1b"], mode="nearest"))
    full.graph.node[6].input[0] = "c1b"
    full.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    half, _ = to_fp16(full, ROWS)
    onnx.checker.check_model(half, full_check=True)
    assert types(half)["scales"] == TensorProto.FLOAT
    assert np.isfinite(run(half, images())["logits"]).all()


def test_without_pooling_the_head_alone_stays_fp32() -> None:
    full = graph()
    for node in full.graph.node:
        if node.output[0] == "average":
            node.CopyFrom(helper.make_node("MaxPool", ["c2"], ["average"], kernel_shape=[8, 8]))
    half, _ = to_fp16(full, ROWS)
    onnx.checker.check_model(half, full_check=True)
    found = types(half)
    assert found["average"] == found["pooled"] == TensorProto.FLOAT16
    assert found["w"] == found["fused"] == TensorProto.FLOAT
    np.testing.assert_allclose(run(half, images())["logits"], run(full, images())["logits"], rtol=0, atol=0.1)


def overflowing(peak: float) -> onnx.ModelProto:
    """A graph whose squeezed and gated values are small again, and whose first convolution reaches `peak`."""
    full = graph()
    reached = np.abs(probe(full, "r1")).max()
    for tensor in full.graph.initializer:
        factor = {"k1": peak / reached, "se": reached / peak, "k2": reached / peak}.get(tensor.name)
        if factor is not None:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    return full


def probe(full: onnx.ModelProto, name: str, kind: int = TensorProto.FLOAT) -> np.ndarray:
    """A value that the graph computes on `images`."""
    probed = onnx.ModelProto()
    probed.CopyFrom(full)
    probed.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return run(probed, images(16))[name]


def test_a_layer_that_overflows_stays_fp32_by_name() -> None:
    full = overflowing(3e5)
    expected = run(full, images(16))
    assert np.isinf(probe(to_fp16(full, ROWS)[0], "r1", TensorProto.FLOAT16)).any()
    half, report = to_fp16(full, ROWS, images(16))
    onnx.checker.check_model(half, full_check=True)
    found = types(half)
    # The convolution, what passes its values on, and what reads them; small values are fp16 again.
    assert set(report.overflowing) == {"c0", "c1", "r1", "squeezed", "gated"}
    for name in ["c0", "c1", "r1", "squeezed", "excited", "gated", "c2", "k1", "k2"]:
        assert found[name] == TensorProto.FLOAT, name
    assert found["gate"] == TensorProto.FLOAT16
    assert report.images == 16 and report.largest == pytest.approx(max(report.overflowing.values()))
    assert report.overflowing["r1"] == pytest.approx(np.abs(probe(full, "r1")).max(), rel=1e-5)
    np.testing.assert_allclose(run(half, images(16))["logits"], expected["logits"], atol=0.02)


def test_a_layer_within_the_margin_is_left_in_fp16() -> None:
    half, report = to_fp16(overflowing(0.9 * OVERFLOW_LIMIT), ROWS, images(16))
    assert report.overflowing == {} and 0.5 * OVERFLOW_LIMIT < report.largest < OVERFLOW_LIMIT
    assert types(half)["r1"] == TensorProto.FLOAT16
    assert OVERFLOW_LIMIT == LARGEST / 2
    _, report = to_fp16(overflowing(1.2 * OVERFLOW_LIMIT), ROWS, images(16))
    assert "r1" in report.overflowing, "from half of the range on: other images reach further"


def test_values_that_are_not_finite_count_as_overflow() -> None:
    kernel = np.full((8, 3, 3, 3), 1e38, np.float32)
    _, report = to_fp16(graph(kernel=kernel), ROWS, images())
    assert report.overflowing["c0"] == float("inf")


def test_a_graph_of_another_form_is_refused() -> None:
    with pytest.raises(VerificationError, match="5 rows"):
        to_fp16(graph(), 5)


def test_report_of_nothing() -> None:
    empty = np.empty(0, np.float32)
    assert HalfReport().including(empty, empty.astype(np.float16)) == HalfReport()


def test_fp16_begins_at_a_linear_layer_too() -> None:
    full = graph()
    full.graph.node.insert(3, helper.make_node("MatMul", ["normal", "embed"], ["embedded"]))
    full.graph.node[4].input[0] = "embedded"
    full.graph.initializer.append(numpy_helper.from_array(np.eye(8, dtype=np.float32), "embed"))
    half, _ = to_fp16(full, ROWS)
    onnx.checker.check_model(half, full_check=True)
    found = types(half)
    assert found["normal"] == TensorProto.FLOAT and found["embedded"] == found["embed_fp16"] == TensorProto.FLOAT16
    np.testing.assert_allclose(run(half, images())["logits"], run(full, images())["logits"], rtol=0, atol=0.1)


def test_weights_that_the_graph_computes_stay_fp32_until_they_are_used() -> None:
    """Standardised weights, as of a BiT or an NFNet: the exporter writes a batch norm of the weights."""
    full = graph()
    nodes = full.graph.node
    nodes.insert(0, helper.make_node("ReduceMean", ["k1", "axes"], ["k1_mean"], keepdims=1))
    nodes.insert(1, helper.make_node("Sub", ["k1", "k1_mean"], ["k1_centred"]))
    nodes.insert(2, helper.make_node("ReduceMean", ["k1", "all"], ["k1_means"], keepdims=0))
    nodes.insert(
        3, helper.make_node("BatchNormalization", ["k1_centred", *["three"] * 2, "k1_means", "three"], ["k1s"])
    )
    full.graph.initializer.append(numpy_helper.from_array(np.array([0, 2, 3]), "all"))
    full.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "three"))
    (first,) = (node for node in nodes if node.output[0] == "c0")
    first.input[1] = "k1s"
    half, _ = to_fp16(full, ROWS, images())
    onnx.checker.check_model(half, full_check=True)
    found = types(half)
    assert found["k1"] == found["k1_centred"] == found["k1s"] == TensorProto.FLOAT
    assert found["c0"] == found["k2_fp16"] == TensorProto.FLOAT16
    np.testing.assert_allclose(run(half, images())["logits"], run(full, images())["logits"], rtol=0, atol=0.1)
