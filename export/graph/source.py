"""What is exported: a training run, published or local weights, or untrained weights for latency work."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ssod_edge.config import NEED_OOD_ROW, resolve_backbone
from ssod_edge.data.images import Images, whole_dataset
from ssod_edge.data.layout import is_training_part
from ssod_edge.detect.folds import Folds
from ssod_edge.errors import UsageError
from ssod_edge.files import real_path, same_data, sha256_file
from ssod_edge.runtime.calibrate import trained_part
from ssod_edge.training.checkpoint import BEST, is_checkpoint, model_meta, model_tensors, save_checkpoint
from ssod_edge.training.model import SSODClassifier, backbone_preprocess, build_model, load_weights
from ssod_edge.training.run import Run

UNTRAINED_CLASSES = 1000
#: Of `ssod_edge.data.negatives.Negatives.record`.
_OF_NEGATIVES = ("negatives", "negatives_fingerprint", "negatives_hash")


@dataclass(frozen=True)
class Source:
    """A model, and what the spec has to say about its origin.

    Attributes:
        model: in evaluation mode, on the CPU.
        trained: False for random weights.
        folder: the run folder; the export goes into `folder/export` unless another place is named.
        facts: the spec's `source`.
        images: in-distribution, by what they may be used for.
        checkpoint: the run's; None if `folder` is yet to be made from the weights.
        outliers: kinds of made images that the model was trained to reject, of `ssod_edge.config.OUTLIERS`.
        tuned: "head" if its features are published ones, "upper" if they were tuned gently from there (`train --tune`):
            detectors are then fitted with disturbed copies of the training images too. Empty for all else.
        folds: where the images for thresholds were trained on too: how they give out-of-fold scores. None: no need.
        run: the training run, if it is one: it knows its negatives.
    """

    model: SSODClassifier
    trained: bool
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    images: Images = field(default_factory=Images)
    checkpoint: Path | None = None
    outliers: tuple[str, ...] = ()
    tuned: str = ""
    folds: Folds | None = None
    run: Run | None = None


def check_score(source: Source, score: str) -> None:
    """Raises UsageError if the score needs an OOD row and this model's was never trained."""
    if score in NEED_OOD_ROW and source.trained and not source.model.ood.weight.any():
        raise UsageError(
            f"the score '{score}' needs a trained OOD row, and this model has none. "
            "Choose --score energy, msp or maxlogit, or train with the OOD loss."
        )


def from_run(path: str | Path, data: str | None = None) -> Source:
    """A trained run.

    Args:
        path: a run folder, or a checkpoint file.
        data: images for the thresholds; None, and the data that it was trained on, wherever it lies now, take the run's
            calibration split.

    Raises:
        UsageError: there is no checkpoint, or its training data is gone or changed and so has no calibration split.
        ArtifactError: the checkpoint is damaged.
    """
    run = Run.at(path)
    meta = run.meta
    if data is not None and is_training_part(data, meta.get("data")):
        raise trained_part(data)
    recorded = data is None or same_data(data, meta.get("data"))
    named = None if recorded else whole_dataset(str(data))
    # In another place too: images that were trained on would fit the thresholds.
    moved = named is not None and named.source.fingerprint == meta.get("data_fingerprint")
    try:
        images = run.images(data if moved else None)
    except UsageError:
        if recorded or moved:
            raise
        images = Images()
    folds = run.folds if images.thresholds is not None else None
    if not (recorded or moved):
        images, folds = replace(images, thresholds=named), None
    facts: dict[str, Any] = {
        "run": real_path(run.folder).name,
        "checkpoint_sha256": run.checkpoint_sha256,
        **{key: meta.get(key) for key in ("data", "data_fingerprint", "splits_hash", "epoch")},
        **{key: meta[key] for key in ("val_data", "val_fingerprint", *_OF_NEGATIVES) if key in meta},
        "id_accuracy_val": meta.get("val_accuracy"),
    }
    if "from" in (started_from := meta.get("started_from") or {}):
        facts["started_from"] = started_from
    if folds is not None:
        facts["pooled"] = len(folds.images)
    trained, tuned = meta.get("trained") is True, str(meta.get("tuned", ""))
    return Source(run.model, trained, run.folder, facts, images, run.checkpoint, run.outliers, tuned, folds, run)


def from_weights(
    backbone: str,
    weights: str | None,
    runs: str | Path = "runs",
    data: str | None = None,
    classes_file: str | None = None,
    input_size: int | None = None,
    **shape: Any,
) -> Source:
    """Weights that were trained elsewhere: they have classes, and no OOD row.

    Args:
        backbone: an alias or a timm name.
        weights: a .safetensors or .pth file; None takes timm's published weights.
        runs: folder of runs; the model gets a folder there.
        data: in-distribution images for the thresholds, in CLASS/IMAGE folders that name the classes.
        classes_file: the class names, one a line, in label order; wins over the folder names of `data`.
        input_size: in pixels; None takes the backbone's.
        shape: `fit` and `roi` of `ssod_edge.config.Preprocess`; None takes its defaults.

    Raises:
        UsageError: the number of classes does not fit the weights, they cannot be had, or they are a run's.
        ArtifactError: the weights are unreadable or of another model.
    """
    if weights is not None and is_checkpoint(weights):
        raise UsageError(f"'{weights}' is a run's checkpoint. Export it with: ssod-edge export {shlex.quote(weights)}")
    thresholds = whole_dataset(data, labelled=classes_file is None) if data else None
    if classes_file is not None:
        classes = _read_classes(classes_file)
    elif thresholds is not None:
        classes = thresholds.source.classes
    else:
        classes = imagenet_classes()
    name = resolve_backbone(backbone)
    settings = backbone_preprocess(backbone, input_size, pretrained=True).changed(**shape)
    if weights is None:
        count = timm.get_pretrained_cfg(name).num_classes
        if count != len(classes):
            raise UsageError(
                f"timm's weights of '{name}' have {count} classes, got {len(classes)}. Give --classes FILE"
            )
        facts: dict[str, Any] = {"run": f"{name}-pretrained", "weights": "timm"}
    else:
        path = Path(weights)
        facts = {"run": f"{name}-{path.stem}", "weights": path.name}
    model = build_model(name, classes, settings, pretrained=weights is None)
    if weights is not None:
        _load_all_weights(model, weights)
        facts["weights_sha256"] = sha256_file(weights)
    if thresholds is not None:
        facts |= {"data": data, "data_fingerprint": thresholds.source.fingerprint}
    return Source(model.eval(), True, Path(runs) / facts["run"], facts, Images(thresholds=thresholds))


def untrained(backbone: str, runs: str | Path = "runs", input_size: int | None = None, **shape: Any) -> Source:
    """Seeded random weights with 1000 classes: the latency of a backbone, and nothing else. `shape`: see above.

    Raises:
        UsageError: no such backbone, or one that is not supported.
    """
    torch.manual_seed(0)
    classes = tuple(str(index) for index in range(UNTRAINED_CLASSES))
    model = build_model(backbone, classes, backbone_preprocess(backbone, input_size).changed(**shape)).eval()
    for name, value in model.backbone.named_parameters():
        if name.endswith("bias"):
            # A trained network's are not zero. Engines leave out an addition of zero, and the quantiser knows gates by
            # theirs: it would be another network's latency.
            nn.init.normal_(value, std=0.01)
    name = f"{model.backbone_name}-untrained"
    return Source(model, False, Path(runs) / name, {"run": name})


def save_run(source: Source) -> Path:
    """Put the weights of a source without a run where a run has them, so that the eager model can be opened too.

    Returns:
        the checkpoint.

    Raises:
        OutputError: it cannot be written.
    """
    meta = {
        **model_meta(source.model),
        "trained": source.trained,
        "epoch": None,
        "val_accuracy": None,
        **{key: source.facts.get(key) for key in ("data", "data_fingerprint", "splits_hash")},
    }
    save_checkpoint(source.folder / BEST, model_tensors(source.model), meta)
    return source.folder / BEST


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 classes of ImageNet-1k in label order: WordNet id and first name, "n01440764_tench"."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names = (info.index_to_description(index).split(",")[0].replace(" ", "_") for index in range(info.num_classes()))
    return tuple(f"{info.index_to_label_name(index)}_{name}" for index, name in enumerate(names))


def _load_all_weights(model: SSODClassifier, path: str) -> None:
    """Load a file whose classifier must fit as well: `load_weights` leaves out one of another width."""
    with torch.no_grad():
        model.classifier.weight.fill_(torch.nan)
    load_weights(model.backbone, path)
    if model.classifier.weight.isnan().any():
        raise UsageError(
            f"the classifier in '{path}' does not have {len(model.classes)} classes. Name them with --classes FILE, "
            "one a line in label order, or with the folders of --id DATA"
        )


def _read_classes(path: str) -> tuple[str, ...]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--classes '{path}' cannot be read: {error}") from error
    classes = tuple(line.strip() for line in lines if line.strip())
    if len(set(classes)) != len(classes):
        raise UsageError(f"--classes '{path}' names a class twice")
    return classes
