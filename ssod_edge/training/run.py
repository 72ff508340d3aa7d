"""A training run on disk: settings, splits, weights and the export beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.config import Head, Preprocess, TrainConfig, from_dict, resolve_backbone
from ssod_edge.data.images import Images, Subset
from ssod_edge.data.negatives import Negatives, read_negatives
from ssod_edge.data.sources import ImageSource, open_training_data
from ssod_edge.data.splits import Splits, read_splits
from ssod_edge.detect.folds import Folds, folds_of
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.files import real_path, sha256_file
from ssod_edge.json_reader import from_json, read_json
from ssod_edge.runtime.export import Export
from ssod_edge.spec import SPEC_NAME
from ssod_edge.training.checkpoint import BEST, FOLDS, load_checkpoint, load_state
from ssod_edge.training.model import SSODClassifier, build_model
from ssod_edge.training.stages import BranchShape

#: Images whose out-of-fold scores a threshold comes from: every artifact runs them all.
THRESHOLD_IMAGES = 500


@dataclass(frozen=True)
class Run:
    """A run: its folder, or one checkpoint file in it. Each part is read when it is first asked for, and once.

    Attributes:
        folder: with config.json, splits.json, metrics.jsonl and export/, as far as there are any.
        checkpoint: the weights.
    """

    folder: Path
    checkpoint: Path

    @classmethod
    def at(cls, path: str | Path) -> Run:
        """The run that is meant by its folder, the export folder in it, or a checkpoint file."""
        path = Path(path)
        if not path.is_dir():
            return cls(path.parent, path)
        folder = real_path(path).parent if (path / SPEC_NAME).is_file() else path
        return cls(folder, folder / BEST)

    @classmethod
    def newest(cls, root: str | Path = "runs", backbone: str | None = None) -> Run:
        """The newest finished or running run under `root`, of this backbone if one is given.

        Raises:
            UsageError: there is none.
        """
        wanted = resolve_backbone(backbone) if backbone else None
        found: list[tuple[float, Path]] = []
        for checkpoint in Path(root).glob(f"*/{BEST}"):
            try:
                config = read_json(checkpoint.parent / "config.json")
            except (OSError, ValueError):
                continue
            if wanted is None or resolve_backbone(str(config.get("backbone"))) == wanted:
                found.append((checkpoint.stat().st_mtime, checkpoint.parent))
        if not found:
            what = f"run of '{backbone}'" if backbone else "run"
            raise UsageError(f"there is no {what} under '{root}'. Train one with: ssod-edge train DATA")
        return cls.at(max(found)[1])

    @cached_property
    def _weights(self) -> tuple[SSODClassifier, dict[str, Any], Folds | None]:
        tensors, meta = load_checkpoint(self.checkpoint)
        try:
            backbone = from_json(str, meta["backbone"], "backbone")
            classes = from_json(tuple[str, ...], meta["classes"], "classes")
            preprocess = from_json(Preprocess, meta["preprocess"], "preprocess")
            head = from_json(Head, meta.get("head", "last"), "head")  # earlier releases had no other
            branch = from_json(BranchShape | None, meta.get("branch"), "branch")
            model = build_model(backbone, classes, preprocess, head=head, branch=branch)
        except UsageError as error:
            raise ArtifactError(f"checkpoint '{self.checkpoint}' does not describe a model ({error})") from error
        load_state(model, tensors, self.checkpoint)
        arrays = {name.removeprefix(FOLDS): t.numpy() for name, t in tensors.items() if name.startswith(FOLDS)}
        return model.eval(), meta, folds_of(arrays)

    @property
    def model(self) -> SSODClassifier:
        """The trained model, on the CPU and in evaluation mode when it is read.

        Raises:
            UsageError: there is no such checkpoint.
            ArtifactError: as `load_checkpoint`, or tensors that do not fit the backbone named in it.
        """
        return self._weights[0]

    @property
    def meta(self) -> dict[str, Any]:
        """The checkpoint's metadata; errors as for `model`."""
        return self._weights[1]

    @cached_property
    def checkpoint_sha256(self) -> str:
        """Of the checkpoint file, hex."""
        return sha256_file(self.checkpoint)

    @property
    def folds(self) -> Folds | None:
        """How thresholds come from images that the last layer was fitted on; None where they have a split."""
        return self._weights[2]

    @property
    def outliers(self) -> tuple[str, ...]:
        """The made images of its training; none where its settings are gone."""
        try:
            loss = load_config(self.folder).loss
        except (UsageError, ArtifactError):
            return ()
        return loss.outliers if loss.trains_row_on_outliers else ()

    @cached_property
    def export(self) -> Export | None:
        """The export beside the checkpoint; None where there is none.

        Raises:
            ArtifactError: it is damaged, or of another checkpoint.
        """
        folder = self.folder / "export"
        if not (folder / SPEC_NAME).is_file():
            return None
        export = Export.at(folder)
        if export.spec.source.get("checkpoint_sha256") != self.checkpoint_sha256:
            raise ArtifactError(f"'{folder}' is of another checkpoint; export the run again")
        return export

    @cached_property
    def _data(self) -> ImageSource:
        return self._open_data(str(self.meta["data"]))

    def _open_data(self, data: str) -> ImageSource:
        return open_training_data(data, self.meta.get("val_data"), self.meta.get("val_fingerprint"))

    def splits(self, fix: str, place: str | None = None) -> tuple[ImageSource, Splits]:
        """The data that the model was trained on, and how it was split.

        Args:
            fix: what the user can do where they cannot be had, as the end of the message.
            place: where the data lies now; None: where it lay at training.

        Raises:
            UsageError: the data or splits.json is gone or was changed.
        """
        recorded = self.meta.get("data")
        if recorded is None:
            raise UsageError(f"'{self.checkpoint}' records no training data, so it has no splits; {fix}")
        data = str(recorded if place is None else place)
        try:
            source = self._data if place is None else self._open_data(data)
        except UsageError as error:
            raise UsageError(
                f"{error}. '{data}' is the path that was recorded at training, relative to the folder in which train "
                f"was started: go there, or {fix}"
            ) from error
        if source.fingerprint != self.meta["data_fingerprint"]:
            raise UsageError(f"the data set '{data}' changed since training; {fix}")
        return source, read_splits(self.folder, source, self.meta["splits_hash"], fix)

    def images(self, place: str | None = None) -> Images:
        """Its splits by what they are for; errors and `place` as for `splits`."""
        source, splits = self.splits("name others with --id", place)
        parts = {"train": splits.train, "val": splits.val, "calib": splits.calib}
        if self.folds is not None:
            everything = self.folds.images
            drawn = np.random.default_rng(0).permutation(everything)[:THRESHOLD_IMAGES]
            parts = {"train and calib": everything, "val": splits.val, "out-of-fold": np.sort(drawn)}
        name = place or self.meta["data"]
        subsets = (Subset(source, part, f"'{name}', {key} split {splits.hash[:12]}") for key, part in parts.items())
        return Images(*subsets)

    def negatives(self, fix: str) -> Negatives | None:
        """What must be unknown by its training, and how that was split; None where there is nothing of the kind.

        Args:
            fix: what the user can do where it cannot be had, as the end of the message.

        Raises:
            UsageError: it or splits.json is gone or was changed.
        """
        return read_negatives(self.folder, self.meta, fix)


def load_config(run: Path) -> TrainConfig:
    """The settings of a run folder.

    Raises:
        UsageError: there is no such run, or its config.json has unknown keys or wrong values.
        ArtifactError: config.json is damaged.
    """
    path = run / "config.json"
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise UsageError(f"there is no run '{run}' to resume; leave --resume out to start one") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' is damaged ({error}). Restore it, or start a new run") from error
    try:
        return from_dict(TrainConfig, values)
    except UsageError as error:
        raise UsageError(f"'{path}': {error}") from error
