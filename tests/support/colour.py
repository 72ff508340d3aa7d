"""A colour classifier with the fused graph's face: a real export folder, small enough to make in a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from ssod_edge.config import Preprocess
from ssod_edge.detect.confidence import verdict_inputs
from ssod_edge.detect.scores import ood_scores
from ssod_edge.export.engines.openvino import open_inputs
from ssod_edge.files import sha256_file
from ssod_edge.spec import LOGIT_OUTPUTS, VERDICT_OUTPUTS, Artifact, Spec, Threshold, load_spec, save_spec

SIZE = 16
CLASSES = ("red", "green", "blue")
COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220), "grey": (60, 60, 60)}
#: A colour classifier: features are the three channel means in [0, 1]; grey is what it does not know.
WEIGHT = np.array([[8, -4, -4], [-4, 8, -4], [-4, -4, 8], [2, 1, 1]], np.float32)
BIAS = np.array([0.0, 0.1, -0.1, -1.0], np.float32)


def colour_graph(half: bool = False) -> onnx.ModelProto:
    """The fused graph's face on a colour classifier; `half` computes the pooling in fp16."""
    body = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    kernel = np.eye(3, dtype=np.float16 if half else np.float32).reshape(3, 3, 1, 1)
    constants = {
        "scale": np.array(255, np.float32), "kernel": kernel, "weight": WEIGHT, "bias": BIAS,
        "start": np.array([0]), "middle": np.array([3]), "end": np.array([4]), "axis": np.array([1]),
        "one": np.array(1, np.float32), **verdict_inputs(None),
    }  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["unit"]),
        helper.make_node("Cast", ["unit"], ["body"], to=body),
        helper.make_node("Conv", ["body", "kernel"], ["convolved"]),
        helper.make_node("GlobalAveragePool", ["convolved"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["z"], to=TensorProto.FLOAT),
        helper.make_node("Gemm", ["z", "weight", "bias"], ["fused"], transB=1),
        helper.make_node("Slice", ["fused", "start", "middle", "axis"], ["logits"]),
        helper.make_node("Slice", ["fused", "middle", "end", "axis"], ["row"]),
        helper.make_node("Squeeze", ["row", "axis"], ["id_logit"]),
        helper.make_node("Softmax", ["logits"], ["probs"], axis=1),
        helper.make_node("ReduceLogSumExp", ["logits", "axis"], ["energy"], keepdims=0),
        helper.make_node("Neg", ["energy"], ["ood_score"]),
        helper.make_node("Unsqueeze", ["ood_score", "axis"], ["column"]),
        helper.make_node("GreaterOrEqual", ["p_scores", "column"], ["above"]),
        helper.make_node("Where", ["above", "one", "p_levels"], ["levels"]),
        helper.make_node("ReduceMin", ["levels", "axis"], ["p_known"], keepdims=0),
        helper.make_node("LessOrEqual", ["ood_score", "threshold"], ["known"]),
    ]
    shapes = {"logits": ["N", 3], "probs": ["N", 3], "id_logit": ["N"], "ood_score": ["N"], "p_known": ["N"]}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    beside = [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in verdict_inputs(None).items()]
    graph = helper.make_graph(
        nodes,
        "colour",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 3, SIZE, SIZE]), *beside],
        [*outputs, helper.make_tensor_value_info("known", TensorProto.BOOL, ["N"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def colour_outputs(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logits [N, 3], id_logit [N]) of uint8 images [N, 3, S, S]: what `colour_graph` stands for, in numpy."""
    z = (images.astype(np.float64) / 255).mean((2, 3))
    fused = (z @ WEIGHT.T + BIAS).astype(np.float32)
    return fused[:, :3], fused[:, 3]


def colour_images(n: int, seed: int = 0) -> np.ndarray:
    """uint8 [n, 3, S, S]: strong colours, each with some noise."""
    rng = np.random.default_rng(seed)
    colour = np.eye(3)[rng.integers(0, 3, n)] * rng.uniform(120, 220, (n, 1)) + rng.uniform(0, 30, (n, 3))
    return np.clip(colour[:, :, None, None] + rng.normal(0, 8, (n, 3, SIZE, SIZE)), 0, 255).astype(np.uint8)


def write_reference(folder: Path, images: np.ndarray) -> str:
    """`reference.npz` of the colour classifier; returns its SHA-256."""
    logits, id_logit = colour_outputs(images)
    scores = {f"score_{name}": value for name, value in ood_scores(logits, id_logit).items()}
    np.savez(folder / "reference.npz", image=images, label=logits.argmax(1), logits=logits, id_logit=id_logit, **scores)
    return sha256_file(folder / "reference.npz")


def write_export(folder: Path) -> None:
    """A real export folder of the colour classifier: ONNX and OpenVINO, fp32 and fp16, trained and verified."""
    import openvino

    # The scores at the ranks 1 to 99 of 100; the 96th is the threshold.
    quantiles = tuple((-2.0 + 0.05 * (np.arange(1, 100) - 96)).tolist())
    threshold = Threshold(-2.0, 0.95, 100, "calib", 0.95, quantiles, id_highest=-1.0)
    artifacts = []
    for precision in ("fp32", "fp16"):
        onnx.save(colour_graph(half=precision == "fp16"), folder / f"model-{precision}.onnx")
        ir = folder / f"openvino-{precision}" / "model.xml"
        model = openvino.convert_model(folder / f"model-{precision}.onnx")
        open_inputs(model)
        openvino.save_model(model, ir, compress_to_fp16=precision == "fp16")
        for engine, names in (
            ("onnxruntime", [f"model-{precision}.onnx"]),
            ("openvino", [f"openvino-{precision}/model.xml", f"openvino-{precision}/model.bin"]),
        ):
            artifacts.append(
                Artifact(
                    name=f"{engine.removesuffix('runtime')}-{precision}",
                    engine=engine,
                    precision=precision,
                    files={name: sha256_file(folder / name) for name in names},
                    opset=18,
                    versions={"onnx": onnx.__version__},
                    threshold=threshold,
                    verification={"passed": True, "precision": "fp32", "device": "CPU"},
                )
            )
    spec = Spec(
        backbone="colour",
        classes=CLASSES,
        preprocess=Preprocess(input_size=SIZE),
        score={"name": "energy", "evidence": "default"},
        trained=True,
        reference_sha256=write_reference(folder, colour_images(40)),
        artifacts=tuple(artifacts),
        outputs=(*LOGIT_OUTPUTS, *VERDICT_OUTPUTS),
    )
    save_spec(spec, folder)


def edit_spec(folder: Path, edit: Callable[[Spec], Spec], rehash: bool = False) -> None:
    """Rewrite `ssod.json`; `rehash` also takes the files' hashes as they are now."""
    spec = edit(load_spec(folder))
    if rehash:
        artifacts = (replace(a, files={name: sha256_file(folder / name) for name in a.files}) for a in spec.artifacts)
        digest = sha256_file(folder / "reference.npz")
        spec = replace(spec, artifacts=tuple(artifacts), reference_sha256=digest)
    save_spec(spec, folder)


def edit_graph(folder: Path, artifact: str, **initializers: np.ndarray) -> None:
    """Give an ONNX artifact other constants, as a broken export would: with a hash that fits."""
    path = folder / load_spec(folder).artifact(artifact).main_file
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in initializers:
            tensor.CopyFrom(numpy_helper.from_array(initializers[tensor.name], tensor.name))
    onnx.save(model, path)
    edit_spec(folder, lambda spec: spec, rehash=True)


def paint(path: Path, colour: str, size: tuple[int, int] = (40, 30)) -> Path:
    """An image file of one of `COLOURS`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[colour]).save(path)
    return path


def write_colours(folder: Path, n: int = 4) -> Path:
    """An ImageFolder of the colour classifier's classes, n images of 20 x 24 pixels in each; returns its path."""
    for index, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(n):
            colour = [number * min(20, 228 // max(1, n - 1))] * 3  # no two images alike
            colour[index] = 230
            Image.new("RGB", (20, 24), tuple(colour)).save(folder / name / f"{number}.png")
    return folder
