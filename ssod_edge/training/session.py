"""What every way of training begins with and leaves: images and how they are split, the model, and the run folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssod_edge.config import NO_WEIGHTS, PUBLISHED, UNTOUCHED, TrainConfig
from ssod_edge.csv_table import write_csv
from ssod_edge.data.copies import Copies, exact_copies, near_copies
from ssod_edge.data.division import divide, earlier_splits
from ssod_edge.data.negatives import Negatives, open_negatives
from ssod_edge.data.sources import open_training_data
from ssod_edge.data.splits import MIN_CALIB, Indices
from ssod_edge.errors import OutputError, UsageError
from ssod_edge.files import write_atomic, write_json
from ssod_edge.json_reader import from_json, parse_json
from ssod_edge.terminal import image_bar, tell
from ssod_edge.training.begun import Begun
from ssod_edge.training.checkpoint import (
    FOLDS,
    is_checkpoint,
    load_checkpoint,
    model_meta,
    model_tensors,
    save_checkpoint,
    trunk_hash,
)
from ssod_edge.training.distributed import check_same_images, is_main
from ssod_edge.training.model import SSODClassifier, build_model, check_size
from ssod_edge.training.opening import opening_line
from ssod_edge.training.published import check_published

#: Training and calibration images up to which thresholds may come from out-of-fold scores; of more, a split is 5%.
MOST_POOLED = 10_000


def say(message: str) -> None:
    """A line for the user, from one process."""
    if is_main():
        tell(message, err=True)


class Session:
    """A run that is being trained: its images, model and folder.

    Args:
        config: the settings.
        run: the folder.
        device: of the model.
        restored: whether the weights will be put back from a checkpoint of this run.
        resume: whether the run was begun before.

    Raises:
        UsageError: data or settings that cannot be trained on.
    """

    def __init__(
        self, config: TrainConfig, run: Path, device: torch.device, restored: bool = False, resume: bool = False
    ):
        self.config, self.run, self.device = config, run, device
        self.started_from: dict[str, str] | None = None
        try:
            self.source = open_training_data(config.data, config.val)
            self.negatives = self._open_negatives()
        except UsageError as error:
            if not resume:
                raise
            raise UsageError(
                f"{error}. The run was started with this path: go to the folder that it was started in"
            ) from error
        if config.weights == PUBLISHED and not restored:  # a hub that is not there takes half a minute to say so
            check_published(config.backbone)
        if self.source.left_out:
            say(self.source.left_out)
        self._of_negatives = {} if self.negatives is None else self.negatives.record
        others = (self.source.val_record.get("val_fingerprint", ""), self._of_negatives.get("negatives_hash", ""))
        check_same_images(self.source.fingerprint + "".join(others))
        weights = None if restored else config.weights_file
        tensors: dict[str, Tensor] = {}
        self._begun: dict[str, Any] | None = None
        if weights and is_checkpoint(weights):
            tensors, self._begun = load_checkpoint(Path(weights))
        #: Features that training starts from, but of a run that changed them.
        self.published = self._begun is None or self._begun.get("tuned") in UNTOUCHED
        self._begun_pooled = any(name.startswith(FOLDS) for name in tensors)
        self._said: set[str] = set()
        begun = run if restored else Path(config.weights_file or "").parent
        self._earlier = earlier_splits(begun, config, self.source) if restored or config.weights_file else None
        self._divide(self._exact_copies())
        if self.negatives is not None:
            say(str(self.negatives))
        self.model = self._make_model(restored)
        if not restored and config.weights != NO_WEIGHTS:
            self.started_from = {"weights": config.weights, "sha256": trunk_hash(self.model)}
            if config.begun_from is not None:
                self.started_from |= {"from": config.begun_from, "from_sha256": config.begun_sha256}
        if not resume and is_main():
            say(opening_line(self))

    def _exact_copies(self) -> Copies:
        if self.source.fixed_splits is not None:  # what is given is not divided
            return Copies(np.arange(len(self.source)), np.zeros((0, 2), np.int64))
        with image_bar("copies", len(self.source)) as advance:
            return exact_copies(self.source, advance)

    def keep_near_copies_together(self, features: NDArray[np.float32]) -> None:
        """Look for near-copies by the features [n, D] of all images, and divide these again where there are any."""
        if self.source.fixed_splits is None:
            copies = near_copies(features, self.source.labels, self.copies)
            if copies.near:
                self._divide(copies)
            self.copies_record["near"] = copies.near
            self._write_splits()

    def _divide(self, copies: Copies) -> None:
        """Split the images, and say how."""
        self.copies, division = copies, divide(self.source, self.config, copies, self._earlier)
        self.groups, self.splits, self.copies_record = division.groups, division.splits, division.record
        check_same_images(self.splits.hash)
        self.data_record = {
            "data_fingerprint": self.source.fingerprint,
            "splits_hash": self.splits.hash,
            **self.source.val_record,
            **self._of_negatives,
        }
        for line in (self._describe_splits(), *division.lines):
            if line not in self._said:  # before near-copies were looked for
                say(line)
            self._said.add(line)

    @property
    def pools(self) -> bool:
        """Whether thresholds come from out-of-fold scores where the head alone is tuned, so that the calibration images
        are trained on too: published features have seen none of them, and nobody asked for a split of their own.
        """
        config, source, calib = self.config, self.source, self.splits.calib
        own = source.fixed_splits is not None or config.calib_fraction is not None
        own = own or (source.given_val is not None and bool(np.isin(calib, source.given_val).any()))
        return self.published and config.tune in ("head", "auto") and not own and len(self.pooled) <= MOST_POOLED

    @property
    def pooled(self) -> Indices:
        """Training and calibration images, ascending."""
        return np.sort(np.concatenate([self.splits.train, self.splits.calib]))

    def _describe_splits(self) -> str:
        splits = self.splits
        if self.config.tune == "head" and self.pools:
            return f"{len(self.pooled)} images to train on and for thresholds, {len(splits.val)} to validate on"
        return (
            f"{len(splits.train)} images to train on, {len(splits.val)} to validate on, {len(splits.calib)} for "
            "thresholds"
        )

    def _open_negatives(self) -> Negatives | None:
        config = self.config
        if config.negatives is None:
            return None
        return open_negatives(config.negatives, self.source, config.preprocess, config.group, config.seed, say)

    def _make_model(self, restored: bool) -> SSODClassifier:
        config, classes = self.config, self.source.classes
        weights, meta, same = None if restored else config.weights_file, self._begun, False
        if meta is not None:
            same = meta["data_fingerprint"] == self.source.fingerprint
            if same:
                if meta["splits_hash"] != self.splits.hash:
                    raise UsageError(
                        f"'{weights}' was trained on another split of these images, so validation and calibration "
                        "would see images it knows. Use the --seed, --val, --group, --val-fraction and "
                        "--calib-fraction in its run's config.json, beside its splits.json"
                    )
                self._earlier = self.splits
            if self.negatives is not None and self.negatives.were_learnt_otherwise(meta):
                raise UsageError(
                    f"'{weights}' learnt from another part of these negatives, so the choice of a score and the "
                    "evaluation would see images it knows. Use the --seed and --group in its run's config.json"
                )
        torch.manual_seed(config.seed)
        published = not restored and config.weights == PUBLISHED
        model = build_model(config.backbone, classes, config.preprocess, published, weights, config.head)
        if not restored and config.begun_from is not None:
            self._take_rows(model, same)
        if same and self._begun_pooled and config.tune == "all":
            say("the last layer begins anew: that of the run has learnt the images for thresholds too")
            model.classifier.reset_parameters()
        if config.half_size_epochs:
            check_size(model, config.preprocess.input_size // 2, "Train without it: --half-size-epochs 0")
        return model.to(self.device, memory_format=torch.channels_last)

    def _take_rows(self, model: SSODClassifier, same: bool) -> None:
        """Give a model the class rows of what the run begins from, and say what that means for held-out images."""
        config = self.config
        begun = Begun.at(str(config.begun_from), self.run.parent)
        say(begun.give_rows(model))
        if not same and (config.tune == "all" or not self.published):
            say(
                f"note: held-out images that '{begun.path}' was trained on flatter its figures here, and set "
                "thresholds too low. Where there are some, name others with --val, and with: ssod-edge export --id"
            )

    def begin_folder(self) -> None:
        """Write the settings and splits of a new run, and say what they leave out."""
        splits = self.splits
        write_json(self.run / "config.json", dataclasses.asdict(self.config))
        self._write_splits()
        count, what, fix = len(splits.calib), "the calibration split has {} images", "Use a larger --calib-fraction"
        if self.pools:
            count, what, fix = len(self.pooled), "there are {} images for thresholds", "Add images"
        if count < MIN_CALIB:
            say(
                f"warning: {what.format(count)}, and a 95% threshold needs {MIN_CALIB}. {fix}, or give other images "
                "to: ssod-edge export --id DATA"
            )

    def _write_splits(self) -> None:
        splits = self.splits
        held_out = {"val": splits.val.tolist(), "calib": splits.calib.tolist()}
        record = {"data": self.source.name, **self.data_record, "train": len(splits.train), **held_out}
        if self.negatives is not None:
            record["negatives_parts"] = {part: found.tolist() for part, found in self.negatives.listed.items()}
        write_json(self.run / "splits.json", {**record, "copies": self.copies_record})

    def save(
        self,
        name: str,
        epoch: int,
        accuracy: float | None,
        tensors: dict[str, Tensor] | None = None,
        meta: dict[str, Any] | None = None,
        model: SSODClassifier | None = None,
    ) -> None:
        """Write a checkpoint of the model, or of another one that learnt the same, with more tensors and metadata."""
        model = model or self.model
        record = {
            **model_meta(model),
            "trained": True,
            "epoch": epoch,
            "val_accuracy": accuracy,
            "data": self.config.data,
            **self.data_record,
            "started_from": self.started_from,
        }
        save_checkpoint(self.run / name, model_tensors(model) | (tensors or {}), record | (meta or {}))


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Add one epoch's line; an epoch that was run again after a kill replaces what stood there for it.

    A line that is damaged is left out, and said so, and so is all of it where it cannot be read or written: it is not
    worth the epoch that was trained. A table beside it has the numbers of all lines, for spreadsheets and plots.
    """
    try:
        _append_row(path, row)
    except (OSError, OutputError, UsageError) as error:
        say(f"the figures of epoch {row['epoch']} are not kept ({error}); training goes on")


def _append_row(path: Path, row: dict[str, Any]) -> None:
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept, rows = [], []
    for number, line in enumerate(lines, 1):
        try:
            earlier = parse_json(line)
            if from_json(int, earlier.get("epoch"), "epoch") < row["epoch"]:
                kept.append(line)
                rows.append(earlier)
        except UsageError as error:
            say(f"left out line {number} of '{path}', which is damaged ({error})")
    write_atomic(path, lambda temporary: temporary.write_bytes(b"\n".join([*kept, json.dumps(row).encode(), b""])))
    _write_table(path.with_suffix(".csv"), [*rows, row])


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """A row an epoch, a column for each number or word; what holds more than one stays in the lines."""
    plain = [{key: value for key, value in row.items() if isinstance(value, (str, int, float))} for row in rows]
    header = list(dict.fromkeys(key for row in plain for key in row))
    write_csv(path, header, ([row.get(key) for key in header] for row in plain))
