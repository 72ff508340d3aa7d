"""Does each artifact still classify and reject as the eager model does? One pass over the images, all backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ssod_edge.config import Preprocess
from ssod_edge.data.named import Via
from ssod_edge.data.pixels import read_pixels
from ssod_edge.data.sources import ImageSource
from ssod_edge.detect.metrics import deployment_metrics, detection_metrics
from ssod_edge.errors import EngineError, ImageError
from ssod_edge.runtime.runner import Array, Runner
from ssod_edge.spec import Threshold

BATCH = 32


@dataclass(frozen=True)
class ImageSet:
    """Images to run every backend on.

    Attributes:
        name: "id", or the OOD set's name.
        data: how the user named the data.
        source: where the images come from.
        indices: int64 [n], which of them.
        labels: int64 [n], in the model's classes; None for an OOD set.
        via: what each image goes through first; None for native resolution.
    """

    name: str
    data: str
    source: ImageSource
    indices: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None = None
    via: Via | None = None

    def read(self, index: int, settings: Preprocess) -> Array:
        """One image, through the protocol, as uint8 [3, S, S]. Raises ImageError if it cannot be read."""
        return read_pixels(self.source.picture(int(index)), settings, via=self.via)


@dataclass
class Collected:
    """What every backend said about one image set.

    Attributes:
        outputs: backend -> {"logits": [n, M], "ood_score": [n] (not for the plain classifier)}.
        errors: backend -> why it has no outputs.
        rows: positions in the set's indices of the n images that could be read.
        unreadable: a message for each of the others.
    """

    outputs: dict[str, dict[str, Array]] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def run_backends(
    runners: Mapping[str, Runner], images: ImageSet, settings: Preprocess, tick: Callable[[int], None] | None = None
) -> Collected:
    """Run every open backend on every image of a set; each image is decoded once.

    After each batch `tick` is called with its number of images.
    """
    collected = Collected()
    parts: dict[str, list[dict[str, Array]]] = {name: [] for name in runners}
    for pixels in _batches(images, settings, collected):
        for name in [name for name in runners if name not in collected.errors]:
            try:
                parts[name].append(_finite(runners[name].infer({"image": pixels}), name))
            except Exception as error:  # whatever an engine raises, the other rows go on
                collected.errors[name] = error
        if tick is not None:
            tick(len(pixels))
    if collected.rows:
        for name in runners.keys() - collected.errors.keys():
            first = parts[name][0]
            collected.outputs[name] = {key: np.concatenate([part[key] for part in parts[name]]) for key in first}
    return collected


def _batches(images: ImageSet, settings: Preprocess, collected: Collected) -> Iterator[Array]:
    pixels: list[Array] = []
    for row, index in enumerate(images.indices):
        try:
            pixels.append(images.read(index, settings))
        except ImageError as error:
            collected.unreadable.append(str(error))
            continue
        collected.rows.append(row)
        if len(pixels) == BATCH:
            yield np.stack(pixels)
            pixels.clear()
    if pixels:
        yield np.stack(pixels)


def _finite(outputs: dict[str, Array], name: str) -> dict[str, Array]:
    """Copies of what is compared. Raises EngineError for NaN or infinity: they would count as "known" or "wrong"."""
    kept: dict[str, Array] = {key: outputs[key].copy() for key in ("logits", "ood_score") if key in outputs}
    if not all(np.isfinite(value).all() for value in kept.values()):
        raise EngineError(f"the output of '{name}' is not finite on some images")
    return kept


def accuracy_figures(
    name: str,
    threshold: Threshold | None,
    labels: npt.NDArray[np.int64],
    known: Mapping[str, Mapping[str, Array]],
    unknown: Mapping[str, Mapping[str, Mapping[str, Array]]],
    reference: str | None,
    classes: Sequence[str],
) -> dict[str, Any]:
    """One backend's accuracy columns. A figure that cannot be computed is None.

    Args:
        name: the backend.
        threshold: its own; None if it has none.
        labels: int64 [n], of the ID images; -1 where the model does not know the class.
        known: backend -> outputs on the ID images.
        unknown: OOD set -> backend -> outputs.
        reference: the backend that the others are compared with; itself, it has no agreement and no flips. None: no
            backend has.
        classes: the model's.

    Returns:
        - top1: share of ID images whose largest logit is the label's.
        - agreement: share of ID images with the reference's class.
        - auroc, fpr_at_id_tpr95: of `ood_score`, means over the OOD sets (each set counts the same).
        - decision_flips: ID and OOD images that this backend and the reference put on different sides of `threshold`.
        - false_reject: share of ID images unknown at `threshold`.
        - false_accept: share of OOD images known at `threshold`, mean over the OOD sets.
        - ood_sets: OOD set -> {auroc, fpr_at_id_tpr95, n_ood}, with a threshold also false_accept.
        - deployment: what the threshold means, as `ssod_edge.detect.metrics.deployment_metrics`; None if a label is -1.
    """
    own, against = known[name], None if reference == name else reference
    predicted = own["logits"].argmax(axis=1)
    figures: dict[str, Any] = {
        "top1": float((predicted == labels).mean()),
        "agreement": None if against is None else float((predicted == known[against]["logits"].argmax(axis=1)).mean()),
        **dict.fromkeys(("auroc", "fpr_at_id_tpr95", "decision_flips", "false_accept", "false_reject", "deployment")),
        "ood_sets": {},
    }
    if "ood_score" not in own:
        return figures
    if threshold is not None:
        figures["false_reject"] = float((own["ood_score"] > threshold.value).mean())
        if labels.min() >= 0:
            ood = {set_name: outputs[name]["ood_score"] for set_name, outputs in unknown.items()}
            right = predicted == labels
            figures["deployment"] = deployment_metrics(own["ood_score"], ood, threshold, right, labels, classes)
    for set_name, outputs in unknown.items():
        metrics = detection_metrics(own["ood_score"], outputs[name]["ood_score"], bootstrap=0)
        values = figures["ood_sets"][set_name] = {key: metrics[key] for key in ("auroc", "fpr_at_id_tpr95", "n_ood")}
        if threshold is not None:
            values["false_accept"] = float((outputs[name]["ood_score"] <= threshold.value).mean())
    means = ("auroc", "fpr_at_id_tpr95", *(("false_accept",) if threshold is not None else ()))
    for key in means if unknown else ():
        figures[key] = float(np.mean([values[key] for values in figures["ood_sets"].values()]))
    if threshold is not None and against is not None:
        sets = (known, *unknown.values())
        figures["decision_flips"] = sum(_flips(outputs[name], outputs[against], threshold.value) for outputs in sets)
    return figures


def _flips(one: Mapping[str, Array], other: Mapping[str, Array], threshold: float) -> int:
    return int(np.count_nonzero((one["ood_score"] <= threshold) != (other["ood_score"] <= threshold)))
