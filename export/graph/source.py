"""What is exported: a training run, published or local weights, or untrained weights for latency work."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from ssod_edge.config import NEED_OOD_ROW, Preprocess, resolve_backbone
from ssod_edge.data.pixels import preprocess
from ssod_edge.data.sources import ImageSource, open_dataset
from ssod_edge.data.splits import read_splits
from ssod_edge.errors import ArtifactError, ImageError, SsodEdgeError, UsageError
from ssod_edge.files import same_data, sha256_file
from ssod_edge.training.checkpoint import BEST, is_checkpoint, load_model, model_meta, model_tensors, save_checkpoint
from ssod_edge.training.loop import load_config
from ssod_edge.training.model import SSODClassifier, backbone_preprocess, build_model, load_weights

UNTRAINED_CLASSES = 1000
BATCH = 32


@dataclass(frozen=True)
class Calibration:
    """In-distribution images that were not trained on.

    Attributes:
        source: where they come from.
        indices: which of them.
        description: for the record.
        unreadable: message of each image that `batches` could not read, once.
    """

    source: ImageSource
    indices: NDArray[np.int64]
    description: str
    unreadable: dict[str, None] = field(default_factory=dict)

    def batches(
        self, settings: Preprocess, indices: NDArray[np.int64] | None = None
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """(images uint8 [n, 3, S, S], labels int64 [n]) in batches. Unreadable images are left out.

        Args:
            settings: the model's preprocessing.
            indices: which images; None for all.
        """
        chosen = self.indices if indices is None else indices
        for start in range(0, len(chosen), BATCH):
            images, labels = [], []
            for index in chosen[start : start + BATCH].tolist():
                try:
                    images.append(preprocess(self.source.image(index), settings))
                except ImageError as error:
                    self.unreadable[str(error)] = None
                else:
                    labels.append(int(self.source.labels[index]))
            if images:
                yield np.stack(images), np.array(labels, np.int64)


@dataclass(frozen=True)
class Source:
    """A model, and what the spec has to say about its origin.

    Attributes:
        model: in evaluation mode, on the CPU.
        trained: False for random weights.
        folder: the run folder; the export goes into `folder/export` unless another place is named.
        facts: the spec's `source`.
        calibration: None if there are no images to fit thresholds on.
        checkpoint: the run's; None if `folder` is yet to be made from the weights.
        int8: in-distribution images to quantise with; None takes those of `calibration`.
        training: images that the model was trained on, for the state of a detector; None if they cannot be had.
        choices: images that choices may look at, the run's validation split; None if there are none.
        outliers: kinds of made images that the model was trained to reject, of `ssod_edge.config.OUTLIERS`.
    """

    model: SSODClassifier
    trained: bool
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    checkpoint: Path | None = None
    int8: Calibration | None = None
    training: Calibration | None = None
    choices: Calibration | None = None
    outliers: tuple[str, ...] = ()


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
    path = Path(path)
    model, meta = load_model(path)
    checkpoint = path / BEST if path.is_dir() else path
    folder = checkpoint.parent
    recorded = data is None or same_data(data, meta.get("data"))
    named = None if recorded else from_dataset(str(data))
    # In another place too: images that were trained on would fit the thresholds.
    moved = named is not None and named.source.fingerprint == meta.get("data_fingerprint")
    try:
        splits = _run_splits(folder, meta, data if moved else None)
    except UsageError:
        if recorded or moved:
            raise
        splits = {}
    facts = {
        "run": folder.resolve().name,
        "checkpoint_sha256": sha256_file(checkpoint),
        **{key: meta.get(key) for key in ("data", "data_fingerprint", "splits_hash", "epoch")},
        "id_accuracy_val": meta.get("val_accuracy"),
    }
    calibration = splits["calib"] if recorded or moved else named
    source = Source(model, meta.get("trained") is True, folder, facts, calibration, checkpoint)
    return replace(source, training=splits.get("train"), choices=splits.get("val"), outliers=_outliers(folder))


def from_weights(
    backbone: str,
    weights: str | None,
    runs: str | Path = "runs",
    data: str | None = None,
    classes_file: str | None = None,
    input_size: int | None = None,
) -> Source:
    """Weights that were trained elsewhere: they have classes, and no OOD row.

    Args:
        backbone: an alias or a timm name.
        weights: a .safetensors or .pth file; None takes timm's published weights.
        runs: folder of runs; the model gets a folder there.
        data: in-distribution images for the thresholds, in CLASS/IMAGE folders that name the classes.
        classes_file: the class names, one a line, in label order; wins over the folder names of `data`.
        input_size: in pixels; None takes the backbone's.

    Raises:
        UsageError: the number of classes does not fit the weights, they cannot be had, or they are a run's.
        ArtifactError: the weights are unreadable or of another model.
    """
    if weights is not None and is_checkpoint(weights):
        raise UsageError(f"'{weights}' is a run's checkpoint. Export it with: ssod-edge export {shlex.quote(weights)}")
    calibration = from_dataset(data, labelled=classes_file is None) if data else None
    if classes_file is not None:
        classes = _read_classes(classes_file)
    elif calibration is not None:
        classes = calibration.source.classes
    else:
        classes = imagenet_classes()
    name = resolve_backbone(backbone)
    settings = backbone_preprocess(backbone, input_size, pretrained=True)
    model = _pretrained(name, classes, settings) if weights is None else build_model(name, classes, settings)
    if weights is not None:
        _load_all_weights(model, weights)
    origin = Path(weights).stem if weights else "pretrained"
    facts: dict[str, Any] = {"run": f"{name}-{origin}", "weights": Path(weights).name if weights else "timm"}
    if weights is not None:
        facts["weights_sha256"] = sha256_file(weights)
    if calibration is not None:
        facts |= {"data": data, "data_fingerprint": calibration.source.fingerprint}
    return Source(model.eval(), True, Path(runs) / facts["run"], facts, calibration)


def untrained(backbone: str, runs: str | Path = "runs", input_size: int | None = None) -> Source:
    """Seeded random weights with 1000 classes: the latency of a backbone, and nothing else.

    Raises:
        UsageError: no such backbone, or one that is not supported.
    """
    torch.manual_seed(0)
    classes = tuple(str(index) for index in range(UNTRAINED_CLASSES))
    model = build_model(backbone, classes, backbone_preprocess(backbone, input_size)).eval()
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


def check_run_folder(source: Source) -> None:
    """Raises UsageError if the folder that a source is about to make belongs to a training run."""
    if source.checkpoint is None and (source.folder / "config.json").exists():
        raise UsageError(f"'{source.folder}' is a training run; name another place with -o/--out, or another --runs")


def from_dataset(name: str, labelled: bool = False) -> Calibration:
    """All images of a data set."""
    images = open_dataset(name, labelled=labelled)
    return Calibration(images, np.arange(len(images)), f"'{name}', fingerprint {images.fingerprint[:12]}")


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 classes of ImageNet-1k in label order: WordNet id and first name, "n01440764_tench"."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names = (info.index_to_description(index).split(",")[0].replace(" ", "_") for index in range(info.num_classes()))
    return tuple(f"{info.index_to_label_name(index)}_{name}" for index, name in enumerate(names))


def _outliers(folder: Path) -> tuple[str, ...]:
    """The made images of a run's training; none where its settings are gone."""
    try:
        loss = load_config(folder).loss
    except (UsageError, ArtifactError):
        return ()
    return loss.outliers if loss.trains_row_on_outliers else ()


def _run_splits(folder: Path, meta: dict[str, Any], place: str | None) -> dict[str, Calibration]:
    """The splits that training recorded: train, val and calib; `place` is where its data lies, None: where it lay."""
    data, splits_hash = str(place or meta.get("data")), str(meta.get("splits_hash"))
    try:
        source = open_dataset(data)
    except UsageError as error:
        raise UsageError(f"the run's calibration images cannot be had ({error}). Name others with --id") from error
    if source.fingerprint != meta.get("data_fingerprint"):
        raise UsageError(f"the data set '{data}' changed since training. Name other images with --id")
    splits = read_splits(folder, source, splits_hash)
    parts = {"train": splits.train, "val": splits.val, "calib": splits.calib}
    return {
        name: Calibration(source, part, f"'{data}', {name} split {splits_hash[:12]}") for name, part in parts.items()
    }


def _pretrained(name: str, classes: tuple[str, ...], settings: Preprocess) -> SSODClassifier:
    count = timm.get_pretrained_cfg(name).num_classes
    if count != len(classes):
        raise UsageError(f"timm's weights of '{name}' have {count} classes, got {len(classes)}. Give --classes FILE")
    try:
        return build_model(name, classes, settings, pretrained=True)
    except SsodEdgeError:
        raise
    except Exception as error:  # a download fails in many ways
        raise UsageError(f"timm's weights of '{name}' cannot be had ({error}). Give a file with --weights") from error


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
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--classes '{path}' cannot be read: {error}") from error
    classes = tuple(line.strip() for line in lines if line.strip())
    if len(set(classes)) != len(classes):
        raise UsageError(f"--classes '{path}' names a class twice")
    return classes
