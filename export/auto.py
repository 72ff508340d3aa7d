"""`export --score auto`: the best score on held-out images and images made from them, at next to no cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ssod_edge.config import DEFAULT_SCORE, DETECTORS, SCORES, DetectorName
from ssod_edge.detectors import Detector, FitData, fit
from ssod_edge.errors import UsageError
from ssod_edge.export.pseudo_ood import KINDS, pseudo_ood
from ssod_edge.export.reference import run_eager
from ssod_edge.export.source import NEED_OOD_ROW, Calibration, Source
from ssod_edge.metrics import detection_metrics
from ssod_edge.model import SSODClassifier
from ssod_edge.scores import ood_scores

Say = Callable[[str], None]
Array = NDArray[np.float32]

#: Held-out images that a score is chosen by; images of each kind are made from the first half of them.
IMAGES = 2000
#: What a score may add to the network's multiply-adds, as a share.
MOST_COST = 0.01
#: Their papers take sums of activations for how much of something was found, which needs a ReLU. Behind MobileNetV3's
#: hard-swish they were the best on made images and the worst on real ones (docs/detection.md).
NEED_RELU = ("ash", "scale")


def choose(
    source: Source, choices: Calibration, data: FitData, say: Say
) -> tuple[str, Detector | None, dict[str, Any]]:
    """Fit every candidate, and take the one of the largest mean AUROC over the kinds of made images.

    Candidates are the scores of the logits and all detectors; those that read the OOD row only if it was trained, and
    those that take every activation for positive only if it is. One that adds more than `MOST_COST` to the network's
    multiply-adds is measured and not taken. Of equals the cheapest wins.

    Args:
        source: a trained model.
        choices: in-distribution images that were not trained on, and that no threshold is fitted to.
        data: what detectors are fitted on.
        say: gets the table.

    Returns:
        the score's name, its detector if it has a state, and the figures for the spec.

    Raises:
        UsageError: no image can be read.
    """
    model = source.model
    fitted: dict[str, Detector | None] = dict.fromkeys(_without_state(model))
    left_out = NEED_RELU if data.features.min() < 0 else ()
    if left_out:
        say(f"no candidates, because the network's features are not those of a ReLU: {', '.join(left_out)}")
    fitted |= {name: fit(cast(DetectorName, name), data) for name in DETECTORS if name not in left_out}
    network = multiply_adds(model)
    cost = {name: 0.0 if one is None else one.multiply_adds / network for name, one in fitted.items()}
    images = _read(choices, model)
    known = _scores(model, images, fitted)
    auroc: dict[str, dict[str, float]] = {name: {} for name in fitted}
    for kind in KINDS:
        unknown = _scores(model, pseudo_ood(images[: max(1, len(images) // 2)], kinds=(kind,)), fitted)
        for name in fitted:
            auroc[name][kind] = float(detection_metrics(known[name], unknown[name], bootstrap=0)["auroc"])
    mean = {name: float(np.mean(list(values.values()))) for name, values in auroc.items()}
    allowed = [name for name in fitted if cost[name] <= MOST_COST]
    best = max(allowed, key=lambda name: (mean[name], -cost[name]))
    rows = {name: {"mean_auroc": mean[name], "auroc": auroc[name], "cost": cost[name]} for name in fitted}
    for line in _table(rows, best, len(images), choices.description):
        say(line)
    figures = {
        "known": choices.description,
        "images": len(images),
        "made_of_each_kind": max(1, len(images) // 2),
        "cost": "multiply-adds over those of the network",
        "most_cost": MOST_COST,
        "candidates": rows,
    }
    return best, fitted[best], figures


def multiply_adds(model: SSODClassifier) -> int:
    """Of the convolutions and linear layers, for one image."""
    total = 0

    def count(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output[0].numel() * cast(nn.Conv2d, layer).weight[0].numel()

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    size = model.preprocess.input_size
    try:
        with torch.inference_mode():
            model.features(torch.zeros(1, 3, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    return total + model.head_weight()[0].numel()


def _without_state(model: SSODClassifier) -> list[str]:
    """The default first, because it wins where all are equal."""
    names = sorted(SCORES, key=lambda name: name != DEFAULT_SCORE)
    return [name for name in names if name not in NEED_OOD_ROW or bool(model.ood.weight.any())]


def _read(choices: Calibration, model: SSODClassifier) -> NDArray[np.uint8]:
    chosen = np.random.default_rng(0).permutation(choices.indices)[:IMAGES]
    batches = [images for images, _ in choices.batches(model.preprocess, chosen)]
    if not batches:
        raise UsageError(f"none of the images of {choices.description} can be read")
    return np.concatenate(batches)


def _scores(model: SSODClassifier, images: NDArray[np.uint8], fitted: dict[str, Detector | None]) -> dict[str, Array]:
    logits, id_logit, features = run_eager(model, images)
    free = ood_scores(logits, id_logit)
    return {
        name: free[name] if one is None else one.score(features, logits)  # type: ignore[index]
        for name, one in fitted.items()
    }


def _table(rows: dict[str, dict[str, Any]], best: str, images: int, known: str) -> list[str]:
    """The evidence in fixed columns, the best first."""
    lines = [f"choosing a score: AUROC % of {images} images of {known} against images made from them"]
    lines.append(f"{'score':<12} {'mean':>6} " + " ".join(f"{kind:>9}" for kind in KINDS) + f" {'cost':>7}")
    for name in sorted(rows, key=lambda name: -rows[name]["mean_auroc"]):
        row = rows[name]
        cells = " ".join(f"{100 * row['auroc'][kind]:9.1f}" for kind in KINDS)
        note = "  <- shipped" if name == best else "  too costly" if row["cost"] > MOST_COST else ""
        lines.append(f"{name:<12} {100 * row['mean_auroc']:6.1f} {cells} {row['cost']:7.2%}{note}")
    return lines
