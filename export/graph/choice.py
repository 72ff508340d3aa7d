"""`export --score auto`: the best score on held-out images and images made from them, at next to no cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ssod_edge.config import DEFAULT_SCORE, DETECTORS, NEED_OOD_ROW, SCORES, DetectorName
from ssod_edge.data.images import Subset
from ssod_edge.data.sources import model_labels
from ssod_edge.detect.detectors import Detector, FitData, fit
from ssod_edge.detect.made_images import CHOICE_KINDS, make_for_choices
from ssod_edge.detect.metrics import detection_metrics
from ssod_edge.detect.sums import FittedScore, part_scores, spreads, sum_of
from ssod_edge.errors import UsageError
from ssod_edge.export.graph.reference import run_eager
from ssod_edge.export.graph.score_graph import MOST_ROUNDING, lost_to_rounding
from ssod_edge.export.graph.source import Source
from ssod_edge.terminal import image_bar
from ssod_edge.training.model import SSODClassifier

Say = Callable[[str], None]
Array = NDArray[np.float32]

#: Held-out images that a score is chosen by; images of each kind are made from the first half of them.
IMAGES = 2000
#: What a score may add to the network's multiply-adds, as a share.
MOST_COST = 0.01
#: Detectors that are no candidates: they lead on made images and fall behind on classes that were never taught.
NOT_CHOSEN = ("ash", "scale")
#: A kind that is not made: held-out images that the network gets wrong. Made images are far from the known classes;
#: these are what comes closest to a class that looks like one of them (docs/detection.md).
MISTAKEN = "mistaken"
#: Fewer of them say nothing.
LEAST_MISTAKES = 20
#: Parts of the sums that are candidates: one score of each family, two or more of them together.
PARTS = ("ssod", "energy", "knn", "vim", "mahalanobis", "rmd")
#: Candidates whose figure is this near to the best are level: of 2,000 images, a difference of a point is noise.
LEVEL = 0.01
#: Rows of the table that is printed; the spec has all of them.
SHOWN = 15


def choose(
    source: Source, choices: Subset, data: FitData, say: Say, brief: bool = False
) -> tuple[str, FittedScore | None, dict[str, Any]]:
    """Fit every candidate, and take the one that does best over the kinds of images that no class describes.

    What counts is AUROC and the share of them that is rejected where 95% of the held-out images are accepted, half
    each: a device runs at the one threshold, and a mean over all of them, which AUROC is, may hide what it does.

    Candidates are the scores of the logits, the detectors, and the sums of `PARTS`; those that read the OOD row only if
    it was trained. Kinds that the network was trained to reject (`train --outliers`) have no say. A candidate that adds
    more than `MOST_COST` to the network's multiply-adds is measured and not taken. Of those that are level
    (`LEVEL`) the sum of most parts wins: what one part does not see in images that nobody made, another may.

    Args:
        source: a trained model.
        choices: in-distribution images that were not trained on, and that no threshold is fitted to.
        data: what detectors are fitted on.
        say: gets the table.
        brief: one line instead of it.

    Returns:
        the score's name, its state if it has one, and the figures for the spec.

    Raises:
        UsageError: no image can be read.
    """
    model = source.model
    images, labels = _read(choices, model)
    half = images[: max(1, len(images) // 2)]
    kinds = [kind for kind in CHOICE_KINDS if kind not in source.outliers]
    if taught := sorted(set(CHOICE_KINDS) - set(kinds)):
        say(f"not chosen by, because the network was trained to reject them: {', '.join(taught)}")
    with image_bar("choosing", len(images) + len(kinds) * len(half)) as advance:
        logits, id_logit, features = run_eager(model, images)
        advance(len(images))
        made = {}
        for kind in kinds:
            made[kind] = run_eager(model, make_for_choices(half, kinds=(kind,)))
            advance(len(half))
    candidates = _Candidates(model, _fit_all(data, features, logits, say), data)
    known = candidates.scores(logits, id_logit, features)
    pairs = {kind: (known, candidates.scores(*outputs)) for kind, outputs in made.items()}
    right = logits.argmax(1) == labels
    wrong = ~right & (labels >= 0)
    if wrong.sum() >= LEAST_MISTAKES and right.any():
        pairs[MISTAKEN] = _part(known, right), _part(known, wrong)
    network = multiply_adds(model)
    rows = {name: {**_figures(name, pairs), "cost": candidates.multiply_adds(name) / network} for name in known}
    best = _best(rows)
    lines = [_in_brief(rows, best)] if brief else _table(rows, best, list(pairs), len(images), choices.description)
    for line in lines:
        say(line)
    figures = {
        "known": choices.description,
        "images": len(images),
        "made_of_each_kind": len(half),
        "mistaken": int(wrong.sum()),
        "cost": "multiply-adds over those of the network",
        "most_cost": MOST_COST,
        "level": LEVEL,
        "candidates": rows,
    }
    return best, candidates.state(best), figures


def _fit_all(data: FitData, features: Array, logits: Array, say: Say) -> dict[str, Detector]:
    """Every detector that can be fitted, and computed in fp32 on held-out images; the others are named."""
    fitted = {}
    for name in DETECTORS:
        if name in NOT_CHOSEN:
            continue
        try:
            detector = fit(cast(DetectorName, name), data)
        except UsageError as error:
            say(f"no candidate: {name}: {error}")
            continue
        if lost_to_rounding(detector, features, logits) > MOST_ROUNDING:
            say(f"no candidate: {name}: fp32 does not hold it, because the features hardly vary within the classes")
            continue
        fitted[name] = detector
    return fitted


def _part(scores: dict[str, Array], chosen: NDArray[np.bool_]) -> dict[str, Array]:
    return {name: values[chosen] for name, values in scores.items()}


def _figures(name: str, pairs: dict[str, tuple[dict[str, Array], dict[str, Array]]]) -> dict[str, Any]:
    """Of one candidate: `auroc` and `fpr` (at 95% of known images) by kind, their means, and `figure`, to choose by."""
    found = {
        kind: detection_metrics(known[name], unknown[name], bootstrap=0) for kind, (known, unknown) in pairs.items()
    }
    auroc = {kind: float(metrics["auroc"]) for kind, metrics in found.items()}
    fpr = {kind: float(metrics["fpr_at_id_tpr95"]) for kind, metrics in found.items()}
    means = float(np.mean(list(auroc.values()))), float(np.mean(list(fpr.values())))
    return {
        "figure": (means[0] + 1 - means[1]) / 2,
        "mean_auroc": means[0],
        "mean_fpr": means[1],
        "auroc": auroc,
        "fpr": fpr,
    }


def _best(rows: dict[str, dict[str, Any]]) -> str:
    """The candidate to take, by its `figure`, its `cost` and the parts in its name."""
    allowed = {name: row for name, row in rows.items() if row["cost"] <= MOST_COST}
    level = max(row["figure"] for row in allowed.values()) - LEVEL
    return max(
        (name for name, row in allowed.items() if row["figure"] >= level),
        key=lambda name: (name.count("+"), allowed[name]["figure"], -allowed[name]["cost"]),
    )


class _Candidates:
    """Every score that may be chosen. Attributes: names, the default first: of single scores that are equal it wins."""

    def __init__(self, model: SSODClassifier, detectors: dict[str, Detector], data: FitData) -> None:
        free = sorted(SCORES, key=lambda name: name != DEFAULT_SCORE)
        free = [name for name in free if name not in NEED_OOD_ROW or bool(model.ood.weight.any())]
        self.detectors = detectors
        self.singles = (*free, *detectors)
        self.spread = spreads(self.singles, detectors, data)
        parts = [name for name in PARTS if name in self.singles and self.spread[name] > 0]
        self.sums = {
            "+".join(names): names
            for count in range(2, len(parts) + 1)
            for names in itertools.combinations(parts, count)
        }
        self.names = (*self.singles, *self.sums)

    def scores(self, logits: Array, id_logit: Array, features: Array) -> dict[str, Array]:
        """All of them for n images, float32 [n] each, of what `run_eager` gives."""
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


def _read(choices: Subset, model: SSODClassifier) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images to choose by, and their labels in the model's numbering, -1 where there is none."""
    chosen = np.random.default_rng(0).permutation(choices.indices)[:IMAGES]
    images, labels = choices.read(model.preprocess, chosen)
    return images, model_labels(labels, choices.source.classes, model.classes)


def _in_brief(rows: dict[str, dict[str, Any]], best: str) -> str:
    def shown(name: str) -> str:
        return f"AUROC {rows[name]['mean_auroc']:.1%}, FPR {rows[name]['mean_fpr']:.1%}"

    text = f"score {best}: {shown(best)} on images made from held-out ones"
    if best != DEFAULT_SCORE:
        text += f" ({DEFAULT_SCORE}: {shown(DEFAULT_SCORE)})"
    return f"{text}; --score auto shows all {len(rows)} candidates, --score NAME takes another"


def _table(rows: dict[str, dict[str, Any]], best: str, kinds: list[str], images: int, known: str) -> list[str]:
    """The evidence in fixed columns, the best first; of the sums only some."""
    width = max(map(len, rows))
    lines = [f"choosing a score by {images} images of {known}: AUROC % for each kind, means, and FPR % at 95% TPR"]
    lines.append(
        f"{'score':<{width}} {'figure':>6} {'AUROC':>6} {'FPR':>6} "
        + " ".join(f"{k:>8}" for k in kinds)
        + f" {'cost':>7}"
    )
    ranked = sorted(rows, key=lambda name: -rows[name]["figure"])
    for place, name in enumerate(ranked):
        if place >= SHOWN and "+" in name and name != best:
            continue
        row = rows[name]
        cells = [f"{100 * row[key]:6.1f}" for key in ("figure", "mean_auroc", "mean_fpr")]
        cells += [f"{100 * row['auroc'][kind]:8.1f}" for kind in kinds]
        note = "  <- shipped" if name == best else "  too costly" if row["cost"] > MOST_COST else ""
        lines.append(f"{name:<{width}} {' '.join(cells)} {row['cost']:7.2%}{note}")
    if len(rows) > len(lines) - 2:
        lines.append(f"{len(rows) - len(lines) + 2} sums below these are in the spec")
    lines.append(f"shipped: of those within {100 * LEVEL:.0f} point of the best, the one of most parts")
    return lines
