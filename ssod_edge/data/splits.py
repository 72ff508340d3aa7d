"""Which images of a data set train, which choose, and which set thresholds; recorded with the run, by hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ssod_edge.errors import UsageError
from ssod_edge.json_reader import from_json, read_json

Indices = NDArray[np.int64]

#: Images from which a 95% conformal threshold exists: ceil(0.95 * (n + 1)) <= n.
MIN_CALIB = 19


@dataclass(frozen=True)
class Splits:
    """Disjoint indices: train; val (choices); calib (thresholds and INT8, nothing else)."""

    train: Indices
    val: Indices
    calib: Indices

    @property
    def hash(self) -> str:
        """SHA-256 of the three index lists, hex."""
        digest = hashlib.sha256()
        for part in (self.train, self.val, self.calib):
            digest.update(np.sort(part).astype("<i8").tobytes() + b"|")
        return digest.hexdigest()


class Labelled(Protocol):
    """What is divided: a data set, by the labels of its images.

    Attributes:
        name: how the user named it.
        classes: class names in label order.
        labels: int64 [n]; -1 where an OOD set has no classes.
        fixed_splits: splits that come with the data, or None.
    """

    name: str
    classes: tuple[str, ...]
    labels: Indices
    fixed_splits: Splits | None

    def __len__(self) -> int: ...


def split_dataset(source: Labelled, val_fraction: float, calib_fraction: float, seed: int) -> Splits:
    """Split the training data by class, seeded; a data set's own splits win.

    Raises:
        UsageError: a class has fewer than 3 images, so that one of the splits would lack it.
    """
    if source.fixed_splits is not None:
        return source.fixed_splits
    parts: list[list[Indices]] = [[], [], []]
    for label in range(len(source.classes)):
        members = np.flatnonzero(source.labels == label)
        if len(members) < 3:
            raise UsageError(
                f"class '{source.classes[label]}' of '{source.name}' has {len(members)} image(s); "
                "at least 3 are needed for training, validation and calibration"
            )
        members = np.random.default_rng((seed, label)).permutation(members)
        n_val = min(max(1, round(val_fraction * len(members))), len(members) - 2)
        n_calib = min(max(1, round(calib_fraction * len(members))), len(members) - 1 - n_val)
        ends = [len(members) - n_val - n_calib, len(members) - n_calib]
        for part, chosen in zip(parts, np.split(members, ends), strict=True):
            part.append(chosen)
    return Splits(*(np.sort(np.concatenate(part)) for part in parts))


def read_splits(
    folder: str | Path, source: Labelled, splits_hash: str, fix: str = "name the ID images with --id"
) -> Splits:
    """The splits that training recorded in a run folder.

    Args:
        folder: the run folder, with its splits.json.
        source: the training data, unchanged since.
        splits_hash: of the splits, from the checkpoint's metadata.
        fix: what the user can do where there are none, as the end of the message.

    Raises:
        UsageError: splits.json is missing, damaged or edited, so that it may name images that were trained on.
    """
    path = Path(folder) / "splits.json"
    try:
        record = read_json(path)
        held_out = [from_json(tuple[int, ...], record.get(part), part) for part in ("val", "calib")]
        val, calib = (np.array(indices, np.int64) for indices in held_out)
        train = np.setdiff1d(np.arange(len(source)), np.concatenate([val, calib]))  # all the others
    except (OSError, ValueError) as error:
        raise UsageError(f"'{folder}' has no readable splits.json ({error}); {fix}") from error
    splits = Splits(train, val, calib)
    if splits.hash != splits_hash:
        raise UsageError(f"'{path}' was changed after training: its hash is not the checkpoint's. Restore it, or {fix}")
    return splits
