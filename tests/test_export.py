"""The fused graph, its ONNX and OpenVINO forms, and a whole export: the numbers against the eager model."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ssod_edge.config import SCORES, Preprocess
from ssod_edge.errors import VerificationError
from ssod_edge.export.graph import FusedClassifier
from ssod_edge.export.onnx import check_fused, fused_graph
from ssod_edge.model import SSODClassifier, build_model, normalise
from ssod_edge.runtime.runner import OUTPUTS
from ssod_edge.scores import ood_scores

SIZE = 64
CLASSES = tuple("abcdefg")


def make_model(backbone: str, size: int = SIZE, classes: tuple[str, ...] = CLASSES) -> SSODClassifier:
    """Random weights whose batch norms and OOD row are not at their neutral start, so that nothing cancels."""
    torch.manual_seed(0)
    model = build_model(backbone, classes, Preprocess(input_size=size)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.1)
        z = model.features(normalise(random_images(8, size=size), model.preprocess))
        scale = 4 / z.norm(dim=1).mean()
        model.classifier.weight.normal_(0, 1).mul_(scale)
        model.classifier.bias.normal_(0, 0.5)
        model.ood.weight.normal_(0, 1).mul_(scale)
        model.ood.bias.fill_(0.25)
    return model


def random_images(n: int, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    """uint8 [n, 3, S, S]: coarse colour patches, so that images differ after pooling."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 3, 4, 4), dtype=np.uint8)
    return torch.from_numpy(coarse.repeat(size // 4, axis=2).repeat(size // 4, axis=3).copy())


def eager(model: SSODClassifier, images: torch.Tensor) -> dict[str, np.ndarray]:
    with torch.no_grad():
        logits, id_logit = model(normalise(images, model.preprocess))
    return {"logits": logits.numpy(), "id_logit": id_logit.numpy(), "probs": logits.softmax(1).numpy()}


@pytest.fixture(scope="module")
def small() -> SSODClassifier:
    return make_model("mobilenetv3_small_050")


@pytest.fixture(scope="module")
def small_graph(small: SSODClassifier) -> onnx.ModelProto:
    return fused_graph(small, "energy", trained=True)


def run_onnx(graph: onnx.ModelProto, images: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"image": images.numpy()}), strict=True))


@pytest.mark.parametrize("score", SCORES)
def test_fused_module_gives_what_the_model_and_the_scores_give(small: SSODClassifier, score: str) -> None:
    images = random_images(5)
    expected = eager(small, images)
    with torch.no_grad():
        outputs = dict(zip(OUTPUTS, FusedClassifier(small, score)(images), strict=True))  # type: ignore[arg-type]
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name].numpy(), value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        outputs["ood_score"].numpy(), ood_scores(expected["logits"], expected["id_logit"])[score], rtol=1e-4, atol=1e-5
    )
    assert np.ptp(expected["id_logit"]) > 1e-2 and np.ptp(expected["logits"]) > 0.1


@pytest.mark.parametrize("n", [1, 5])
def test_onnx_gives_the_eager_numbers_at_any_batch(small: SSODClassifier, small_graph: onnx.ModelProto, n: int) -> None:
    images = random_images(n, seed=n)
    expected, outputs = eager(small, images), run_onnx(small_graph, images)
    for name, value in expected.items():
        assert outputs[name].dtype == np.float32
        np.testing.assert_allclose(outputs[name], value, rtol=1e-3, atol=1e-4)


def test_graph_ends_in_one_gemm_of_all_rows(small: SSODClassifier, small_graph: onnx.ModelProto) -> None:
    head = check_fused(small_graph, rows=len(CLASSES) + 1)
    assert head.op_type == "Gemm"
    assert Counter(node.op_type for node in small_graph.graph.node)["Gemm"] == 1
    with pytest.raises(VerificationError, match="9 rows"):
        check_fused(small_graph, rows=9)
