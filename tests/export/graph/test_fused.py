"""The fused graph and its ONNX form: its shape, and its numbers against the eager model."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from small import CLASSES, eager, make_model, random_images, run_onnx

from ssod_edge.config import SCORES, ScoreName
from ssod_edge.detect.confidence import verdict_inputs
from ssod_edge.detect.scores import ood_scores, probabilities
from ssod_edge.errors import UsageError, VerificationError
from ssod_edge.export.graph.fp16 import to_fp16
from ssod_edge.export.graph.fused import FusedClassifier
from ssod_edge.export.graph.onnx import fused_graph
from ssod_edge.export.graph.score_graph import score_of_graph
from ssod_edge.export.onnx_file import check_fused
from ssod_edge.spec import LOGIT_OUTPUTS
from ssod_edge.training.model import SSODClassifier


@pytest.mark.parametrize("score", SCORES)
def test_fused_module_gives_what_the_model_and_the_scores_give(small_model: SSODClassifier, score: str) -> None:
    images, nothing_known = random_images(5), map(torch.from_numpy, verdict_inputs(None).values())
    expected = eager(small_model, images)
    with torch.no_grad():
        outputs = dict(zip(LOGIT_OUTPUTS, FusedClassifier(small_model, score)(images, *nothing_known), strict=False))  # type: ignore[arg-type]
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name].numpy(), value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        outputs["ood_score"].numpy(), ood_scores(expected["logits"], expected["id_logit"])[score], rtol=1e-4, atol=1e-5
    )
    assert np.ptp(expected["id_logit"]) > 1e-2 and np.ptp(expected["logits"]) > 0.1


def graph_scores(score: str, logits: np.ndarray, id_logit: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(logits)
    found: np.ndarray = score_of_graph(score, x, x.softmax(1), torch.from_numpy(id_logit)).numpy()
    return found


@pytest.mark.parametrize(("n", "classes"), [(0, 3), (1, 2), (5, 6), (64, 10), (9, 1000)])
@pytest.mark.parametrize("score", SCORES)
def test_scores_in_the_graph_are_those_of_the_definition(score: ScoreName, n: int, classes: int) -> None:
    """On logits of any size: neither saturating nor overflowing, with ties at the top among them."""
    rng = np.random.default_rng(0)
    scale = np.resize(np.array([0.01, 1, 10, 80, 1000, 0, 1e30], np.float32), n)
    logits = (rng.normal(0, 1, (n, classes)) * scale[:, None]).astype(np.float32)
    id_logit = np.resize(np.array([-1000, -20, 0, 20, 1000, 1e30], np.float32), n)
    expected = ood_scores(logits, id_logit)[score]
    np.testing.assert_allclose(graph_scores(score, logits, id_logit), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["ssod", "msp", "maxlogit", "energy"])
def test_scores_in_the_graph_do_not_saturate_where_a_probability_does(score: ScoreName) -> None:
    logits, id_logit = np.zeros((2, 3), np.float32), np.array([40, 41], np.float32)
    logits[:, 0] = id_logit
    first, second = graph_scores(score, logits, id_logit)
    assert first > second
    assert len(np.unique(probabilities(logits).max(axis=1))) == 1


def test_an_unknown_score_is_refused(small_model: SSODClassifier) -> None:
    with pytest.raises(UsageError, match="score must be one of"):
        FusedClassifier(small_model, "entropy")


@pytest.mark.parametrize("n", [1, 5])
def test_onnx_gives_the_eager_numbers_at_any_batch(
    small_model: SSODClassifier, small_graph: onnx.ModelProto, n: int
) -> None:
    images = random_images(n, seed=n)
    expected, outputs = eager(small_model, images), run_onnx(small_graph, images)
    for name, value in expected.items():
        assert outputs[name].dtype == np.float32
        np.testing.assert_allclose(outputs[name], value, rtol=1e-3, atol=1e-4)


def test_graph_ends_in_one_gemm_of_all_rows(small_model: SSODClassifier, small_graph: onnx.ModelProto) -> None:
    head = check_fused(small_graph, rows=len(CLASSES) + 1)
    assert head.op_type == "Gemm"
    assert Counter(node.op_type for node in small_graph.graph.node)["Gemm"] == 1
    with pytest.raises(VerificationError, match="9 rows"):
        check_fused(small_graph, rows=9)


@pytest.mark.parametrize(
    "backbone",
    ["resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in ("regnety_008_tv", "densenet121"))],
)
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


def test_of_a_transformer_the_blocks_become_fp16_and_the_last_norm_does_not() -> None:
    model = make_model("test_vit", size=64)
    graph = fused_graph(model, "posterior", trained=False)
    half, report = to_fp16(graph, len(CLASSES) + 1)
    nodes = {node.output[0]: node for node in half.graph.node}
    inferred = onnx.shape_inference.infer_shapes(half).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    norms = [kinds[name] for name, node in nodes.items() if node.op_type == "LayerNormalization"]
    assert norms == [onnx.TensorProto.FLOAT16] * (len(norms) - 1) + [onnx.TensorProto.FLOAT] and len(norms) > 2
    trunk = sum(p.numel() for p in model.backbone.parameters()) - sum(p.numel() for p in model.classifier.parameters())
    last = 2 * model.classifier.in_features  # weight and bias of that norm
    assert report.weights == pytest.approx(trunk - last, rel=0.02), "constants are halved too"
    images = random_images(5, seed=3)
    expected = eager(model, images)
    for proto, tolerance in ((graph, 1e-3), (half, 0.05)):
        np.testing.assert_allclose(run_onnx(proto, images)["logits"], expected["logits"], rtol=0, atol=tolerance)
