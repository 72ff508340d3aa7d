"""A real small model of random weights, its images and its run folder, for the tests of the export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from PIL import Image

from ssod_edge.config import Preprocess
from ssod_edge.data.sources import open_dataset
from ssod_edge.data.splits import Splits
from ssod_edge.files import write_json
from ssod_edge.spec import LOGIT_OUTPUTS
from ssod_edge.training.checkpoint import BEST, model_meta, model_tensors, save_checkpoint
from ssod_edge.training.model import SSODClassifier, build_model, normalise

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


def run_onnx(graph: onnx.ModelProto, images: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(LOGIT_OUTPUTS, session.run(list(LOGIT_OUTPUTS), {"image": images.numpy()}), strict=True))


def write_run(folder: Path, model: SSODClassifier, data: str) -> None:
    source = open_dataset(data)
    indices = np.arange(len(source))
    splits = Splits(indices[1::2], indices[:0], indices[::2])
    record = {"data_fingerprint": source.fingerprint, "splits_hash": splits.hash}
    meta = {**model_meta(model), **record, "trained": True, "epoch": 3, "val_accuracy": 0.5, "data": data}
    save_checkpoint(folder / BEST, model_tensors(model), meta)
    write_json(folder / "config.json", {"backbone": model.backbone_name, "data": data})
    write_json(folder / "splits.json", {**record, "data": data, "val": [], "calib": splits.calib.tolist()})


def write_images(folder: Path, n: int = 84) -> None:
    """An image folder: n images over the classes."""
    for index, image in enumerate(random_images(n, seed=1).numpy()):
        path = folder / CLASSES[index % len(CLASSES)] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
