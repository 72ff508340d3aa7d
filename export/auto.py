"""`export --score auto`: the best score on held-out images and images made from them, at next to no cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ssod_edge.config import DEFAULT_SCORE, DETECTORS, SCORES, DetectorName
from ssod_edge.detectors import Detector, FitData, fit
from ssod_edge.errors import UsageError
from ssod_edge.export.pseudo_ood import KINDS, TAUGHT, pseudo_ood
from ssod_edge.export.reference import run_eager
from ssod_edge.export.source import NEED_OOD_ROW, Calibration, Source
from ssod_edge.metrics import detection_metrics
from ssod_edge.model import SSODClassifier
from ssod_edge.score_sum import FittedScore, part_scores, spreads, sum_of

Say = Callable[[str], None]
Array = NDArray[np.float32]

#: Held-out images that a score is chosen by; images of each kind are made from the first half of them.
IMAGES = 2000
#: What a score may add to the network's multiply-adds, as a share.
MOST_COST = 0.01
#: Their papers take sums of activations for how much of something was found, which needs a ReLU. Behind MobileNetV3's
#: hard-swish they were the best on made images and the worst on real ones (docs/detection.md).
NEED_RELU = ("ash", "scale")
#: Parts of the sums that are candidates: one score of each family, two to `MOST_PARTS` of them together.
PARTS = ("ssod", "energy", "knn", "vim", "mahalanobis", "rmd")
MOST_PARTS = 4
#: Rows of the table that is printed; the spec has all of them.
SHOWN = 15


def choose(
    source: Source, choices: Calibration, data: FitData, say: Say
) -> tuple[str, FittedScore | None, dict[str, Any]]:
    """Fit every candidate, and take the one of the largest mean AUROC over the kinds of made images.

    Candidates are the scores of the logits, all detectors, and the sums of `PARTS`; those that read the OOD row only if
    it was trained, and those that take every activation for positive only if it is. Kinds that the network was trained
    to reject (`train --outliers`) have no say. A candidate that adds more than `MOST_COST` to the network's
    multiply-adds is measured and not taken. Of equals the cheapest wins.

    Args:
        source: a trained model.
        choices: in-distribution images that were not trained on, and that no threshold is fitted to.
        data: what detectors are fitted on.
        say: gets the table.

    Returns:
        the score's name, its state if it has one, and the figures for the spec.

    Raises:
        UsageError: no image can be read.
    """
    model = source.model
    left_out = NEED_RELU if data.features.min() < 0 else ()
    if left_out:
        say(f"no candidates, because the network's features are not those of a ReLU: {', '.join(left_out)}")
    detectors = {name: fit(cast(DetectorName, name), data) for name in DETECTORS if name not in left_out}
    candidates = _Candidates(model, detectors, data)
    images = _read(choices, model)
    half = images[: max(1, len(images) // 2)]
    kinds = [kind for kind in KINDS if TAUGHT.get(kind) not in source.outliers]
    if taught := sorted(set(KINDS) - set(kinds)):
        say(f"not chosen by, because the network was trained to reject them: {', '.join(taught)}")
    known = candidates.scores(model, images)
    auroc: dict[str, dict[str, float]] = {name: {} for name in candidates.names}
    for kind in kinds:
        unknown = candidates.scores(model, pseudo_ood(half, kinds=(kind,)))
        for name in candidates.names:
            auroc[name][kind] = float(detection_metrics(known[name], unknown[name], bootstrap=0)["auroc"])
    mean = {name: float(np.mean(list(values.values()))) for name, values in auroc.items()}
    network = multiply_adds(model)
    cost = {name: candidates.multiply_adds(name) / network for name in candidates.names}
    allowed = [name for name in candidates.names if cost[name] <= MOST_COST]
    best = max(allowed, key=lambda name: (mean[name], -cost[name]))
    rows = {name: {"mean_auroc": mean[name], "auroc": auroc[name], "cost": cost[name]} for name in candidates.names}
    for line in _table(rows, best, kinds, len(images), choices.description):
        say(line)
    figures = {
        "known": choices.description,
        "images": len(images),
        "made_of_each_kind": len(half),
        "cost": "multiply-adds over those of the network",
        "most_cost": MOST_COST,
        "candidates": rows,
    }
    return best, candidates.state(best), figures


class _Candidates:
    """Every score that may be chosen. Attributes: names, the default first, because it wins where all are equal."""

    def __init__(self, model: SSODClassifier, detectors: dict[str, Detector], data: FitData) -> None:
        free = sorted(SCORES, key=lambda name: name != DEFAULT_SCORE)
        free = [name for name in free if name not in NEED_OOD_ROW or bool(model.ood.weight.any())]
        self.detectors = detectors
        self.singles = (*free, *detectors)
        self.spread = spreads(self.singles, detectors, data)
        parts = [name for name in PARTS if name in self.singles and self.spread[name] > 0]
        self.sums = {
            "+".join(names): names
            for count in range(2, MOST_PARTS + 1)
            for names in itertools.combinations(parts, count)
        }
        self.names = (*self.singles, *self.sums)

    def scores(self, model: SSODClassifier, images: NDArray[np.uint8]) -> dict[str, Array]:
        """All of them for uint8 images [n, 3, S, S], float32 [n] each."""
        logits, id_logit, features = run_eager(model, images)
        found = part_scores(self.singles, self.detectors, features, logits, id_logit)
        for name, parts in self.sums.items():
            total = sum(found[part].astype(np.float64) / self.spread[part] for part in parts)
            found[name] = np.asarray(total, np.float32)
        return found

    def multiply_adds(self, name: str) -> int:
        """What a score adds to the network's, for one image."""
        parts = self.sums.get(name, (name,))
        return sum(self.detectors[part].multiply_adds for part in parts if part in self.detectors)

    def state(self, name: str) -> FittedScore | None:
        """What the graph needs to compute a score; None for those of the logits."""
        return sum_of(name, self.detectors, self.spread) if name in self.sums else self.detectors.get(name)


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


def _read(choices: Calibration, model: SSODClassifier) -> NDArray[np.uint8]:
    chosen = np.random.default_rng(0).permutation(choices.indices)[:IMAGES]
    batches = [images for images, _ in choices.batches(model.preprocess, chosen)]
    if not batches:
        raise UsageError(f"none of the images of {choices.description} can be read")
    return np.concatenate(batches)


def _table(rows: dict[str, dict[str, Any]], best: str, kinds: list[str], images: int, known: str) -> list[str]:
    """The evidence in fixed columns, the best first; of the sums only some."""
    width = max(map(len, rows))
    lines = [f"choosing a score: AUROC % of {images} images of {known} against images made from them"]
    lines.append(f"{'score':<{width}} {'mean':>6} " + " ".join(f"{kind:>8}" for kind in kinds) + f" {'cost':>7}")
    ranked = sorted(rows, key=lambda name: -rows[name]["mean_auroc"])
    for place, name in enumerate(ranked):
        if place >= SHOWN and "+" in name and name != best:
            continue
        row = rows[name]
        cells = " ".join(f"{100 * row['auroc'][kind]:8.1f}" for kind in kinds)
        note = "  <- shipped" if name == best else "  too costly" if row["cost"] > MOST_COST else ""
        lines.append(f"{name:<{width}} {100 * row['mean_auroc']:6.1f} {cells} {row['cost']:7.2%}{note}")
    if len(rows) > len(lines) - 2:
        lines.append(f"{len(rows) - len(lines) + 2} sums below these are in the spec")
    return lines
