"""Does the int8 graph still classify and reject? Where it does not, its worst layers go back to floating point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssod_edge.data.disturbances import seeded_copy
from ssod_edge.data.images import RANGE_IMAGES, Subset
from ssod_edge.data.sources import model_labels
from ssod_edge.detect.made_images import make_for_choices
from ssod_edge.detect.metrics import detection_metrics
from ssod_edge.errors import UsageError, VerificationError
from ssod_edge.export.int8.quantize import Images, Infer, Quantizer
from ssod_edge.export.release import Say
from ssod_edge.training.model import SSODClassifier

#: Held-out images that the control looks at. The top-1 of 2,000 images that differ in 3% moves by 0.4 points by chance.
CONTROL_IMAGES = 2000
#: The OOD score is checked against so many images made from them.
PSEUDO_OOD_IMAGES = 1000
#: Fewer readable images than this, for the ranges and the control, say nothing about either.
LEAST_IMAGES = 32
#: Images that the layers are ranked with.
RANKING_IMAGES = 64
BATCH = 32


@dataclass(frozen=True)
class DrawnImages:
    """The images of an int8 export, no image in both parts.

    Attributes:
        statistics: uint8 [n, 3, S, S], for the ranges of the activations; copies come last.
        control: uint8 [m, 3, S, S], for the accuracy control.
        labels: int64 [m], of the control images in the model's classes; None if they have none that the model knows.
        ranges_of, control_of: descriptions of what they come from, for the record.
        copies: how many of the former are disturbed copies of others.
    """

    statistics: Images
    control: Images
    labels: NDArray[np.int64] | None
    ranges_of: str
    control_of: str
    copies: int = 0


def draw_images(parts: tuple[Subset, Subset], model: SSODClassifier, say: Say) -> DrawnImages:
    """A seeded choice of `RANGE_IMAGES` and `CONTROL_IMAGES`.

    Of fewer images than that, ranges also come from a disturbed copy of each (`seeded_copy`): a camera in the field
    sees more than a few photos do.

    Args:
        parts: images for the ranges and others for the control, see `Images.for_int8`.
        model: whose preprocessing and classes they get.
        say: gets a line where the control's images are of one class, or have no labels.

    Raises:
        UsageError: fewer than `LEAST_IMAGES` can be read.
    """
    rng = np.random.default_rng(0)
    ranges, control = parts
    drawn = [
        part.read(model.preprocess, rng.permutation(part.indices)[:most])
        for part, most in ((ranges, RANGE_IMAGES), (control, CONTROL_IMAGES))
    ]
    check_count(sum(len(images) for images, _ in drawn), ranges)
    (statistics, _), (known, found) = drawn
    copies = [seeded_copy(image) for image in statistics[: RANGE_IMAGES - len(statistics)]]
    labels = model_labels(found, control.source.classes, model.classes)
    present = np.unique(labels[labels >= 0])
    if len(present) == 1:
        say(
            f"note: all images of {control.description} are of one class, '{model.classes[present[0]]}': the "
            "ranges of the int8 graph may not fit the others, and its top-1 says nothing about them"
        )
    have_labels = bool((labels >= 0).all())
    if not have_labels:
        say(f"note: images of {control.description} have no class that the model knows: top-1 is not controlled")
    images = np.concatenate([statistics, *(copy[None] for copy in copies)])
    return DrawnImages(
        images, known, labels if have_labels else None, ranges.description, control.description, len(copies)
    )


def check_count(count: int, calibration: Subset) -> None:
    """Raises UsageError if so many images are too few to quantise with."""
    if count < LEAST_IMAGES:
        raise UsageError(
            f"int8 needs at least {LEAST_IMAGES} readable in-distribution images, got {count} of "
            f"{calibration.description}. Name more with --calib DATA"
        )


@dataclass(frozen=True)
class Figures:
    """What the control measures. Attributes: top1 (None without labels) and auroc, both in [0, 1]."""

    top1: float | None
    auroc: float


class AccuracyControl:
    """The drop from fp32 to int8 on held-out images: of top-1, and of the shipped score's AUROC.

    The AUROC is that of the control images against images made from them (`ssod_edge.detect.made_images`), so that no
    OOD set has a say in what is shipped.

    Args:
        images: to look at.
        reference: the fp32 graph.
        max_drop: in points, for each of the two; one changed image is always allowed.
    """

    def __init__(self, images: DrawnImages, reference: Infer, max_drop: float):
        self._known, self._labels = images.control, images.labels
        self._unknown = make_for_choices(images.control[:PSEUDO_OOD_IMAGES])
        self._ranking = images.control[:RANKING_IMAGES]
        self._expected = _run(reference, self._ranking)["logits"]
        self.max_drop = max_drop
        self.reference = self.measure(reference)

    def measure(self, infer: Infer) -> Figures:
        """Raises VerificationError if an output is not finite."""
        known = _run(infer, self._known)
        unknown = _run(infer, self._unknown)
        if not all(np.isfinite(part["ood_score"]).all() for part in (known, unknown)):
            raise VerificationError("the int8 graph gives scores that are not finite")
        top1 = None if self._labels is None else float((known["logits"].argmax(axis=1) == self._labels).mean())
        auroc = detection_metrics(known["ood_score"], unknown["ood_score"], bootstrap=0)["auroc"]
        return Figures(top1, float(auroc))

    def holds(self, figures: Figures) -> bool:
        """Whether neither figure is more than `max_drop` points below fp32's."""
        one_image = 1 / len(self._known)
        top1, before = figures.top1, self.reference.top1
        top1_holds = top1 is None or before is None or before - top1 <= max(self.max_drop / 100, one_image) + 1e-9
        return top1_holds and self.reference.auroc - figures.auroc <= self.max_drop / 100 + 1e-9

    def error(self, infer: Infer) -> float:
        """Mean squared error of the logits against fp32's, on a few images."""
        return float(np.square(_run(infer, self._ranking)["logits"] - self._expected).mean())

    def record(self, figures: Figures) -> dict[str, Any]:
        """The evidence, for the spec."""
        return {
            "max_drop": self.max_drop,
            "images": len(self._known),
            "pseudo_ood_images": len(self._unknown),
            "top1": {"fp32": self.reference.top1, "int8": figures.top1},
            "auroc": {"fp32": self.reference.auroc, "int8": figures.auroc},
        }

    def describe(self, figures: Figures) -> str:
        """The figures in words."""
        words = f"AUROC on images made from them {100 * self.reference.auroc:.2f} -> {100 * figures.auroc:.2f}"
        if figures.top1 is None or self.reference.top1 is None:
            return words
        top1 = f"{100 * self.reference.top1:.2f} -> {100 * figures.top1:.2f}"
        return f"top-1 of {len(self._known)} images {top1}, {words}"


def quantize_controlled(
    quantizer: Quantizer, control: AccuracyControl, say: Say
) -> tuple[Any, tuple[str, ...], Figures]:
    """An int8 model that holds the control, with few nodes in floating point.

    Nodes are ranked once, by how much the error of the logits shrinks when a node alone reads its activations
    unquantised; then the 1, 2, 4, ... worst are left out until the control holds, and fewer again by halving the last
    step. Each time the model is quantised anew, so that the bias correction knows of it.

    Returns:
        the model, the nodes that were left out, and its figures.

    Raises:
        VerificationError: the control does not hold with half of the nodes in floating point.
    """
    model = quantizer.quantize()
    figures = control.measure(quantizer.infer(model))
    if control.holds(figures):
        return model, (), figures
    say(f"int8 ({quantizer.preset}): {control.describe(figures)}: beyond {control.max_drop} points; ranking the layers")
    ranked = rank_nodes(quantizer, model, control)
    best: tuple[Any, tuple[str, ...], Figures] | None = None
    fails, count = 0, 1  # so many are too few
    while fails + 1 < (len(best[1]) if best else len(ranked) // 2 + 1):
        excluded = tuple(ranked[:count])
        model = quantizer.quantize(excluded)
        figures = control.measure(quantizer.infer(model))
        say(f"int8 ({quantizer.preset}): {control.describe(figures)} with {count} nodes in floating point")
        if control.holds(figures):
            best = model, excluded, figures
        else:
            fails = count
        count = (fails + len(best[1])) // 2 if best else min(2 * count, len(ranked) // 2)
    if best:
        return best
    raise VerificationError(
        f"int8 ({quantizer.preset}) loses more than {control.max_drop} points, also with {fails} of {len(ranked)} "
        f"nodes in floating point: {control.describe(figures)}. Allow more with --max-drop, give images that are "
        "nearer to those of the device with --calib, or stay with fp16"
    )


def rank_nodes(quantizer: Quantizer, model: Any, control: AccuracyControl) -> list[str]:
    """The nodes that read quantised activations, the one that costs most first."""
    nodes = quantizer.quantized_nodes(model)
    return sorted(nodes, key=lambda node: control.error(quantizer.infer(quantizer.bypassed(model, node))))


def _run(infer: Infer, images: Images) -> dict[str, NDArray[np.float32]]:
    parts = [infer(batch) for batch in np.array_split(images, range(BATCH, len(images), BATCH))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
