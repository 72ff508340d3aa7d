"""`features.npz`: the features that an export was fitted on, so that a device can fit it again (`ssod_edge.teach`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ssod_edge.detect.detectors import Array
from ssod_edge.detect.fit import Labels
from ssod_edge.detect.folds import Folds, folds_of
from ssod_edge.errors import ArtifactError
from ssod_edge.files import write_atomic
from ssod_edge.spec import FEATURES_NAME, Spec, check_hash

Half = npt.NDArray[np.float16]
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class StoredFeatures:
    """Features of n images, and last layers that were each fitted without a part of them.

    Attributes:
        plain, disturbed: float16 [n, D], of the images and of a disturbed copy of each.
        labels: int64 [n].
        folds: of the images that were trained on, by their rows here; the other rows are held out of every fit.
        last: see `ssod_edge.detect.fit.FitData`.
    """

    plain: Half
    disturbed: Half
    labels: Labels
    folds: Folds
    last: int = 0

    def __post_init__(self) -> None:
        n, width = self.plain.shape
        fits = self.disturbed.shape == (n, width) and self.labels.shape == (n,) and 0 <= self.last <= width
        if not fits or self.folds.weight.shape[2] != width or self.folds.images[-1] >= n or self.folds.images[0] < 0:
            raise ArtifactError("the stored features are damaged. Export the run again")

    @property
    def held_out(self) -> Labels:
        """Rows of images that no fit has seen, int64."""
        return np.setdiff1d(np.arange(len(self.labels)), self.folds.images)

    @property
    def taught(self) -> tuple[Array, Array, Labels]:
        """Features of the images of `folds`, of their copies, and labels; float32 [m, D] twice and int64 [m]."""
        rows = self.folds.images
        return self.plain[rows].astype(np.float32), self.disturbed[rows].astype(np.float32), self.labels[rows]


def half(features: Array) -> Half:
    """As they are stored. What is beyond float16's range is set to its end."""
    values: Half = np.clip(features, -LARGEST, LARGEST).astype(np.float16)
    return values


def save_features(stored: StoredFeatures, path: str | Path) -> Path:
    """Write them; the same bytes for the same features.

    Raises:
        OutputError: there is no room.
    """
    folds = stored.folds
    arrays = {
        "plain": stored.plain,
        "disturbed": stored.disturbed,
        "labels": stored.labels,
        "last": np.array(stored.last),
        **{f"fold.{name}": np.asarray(value) for name, value in vars(folds).items()},
    }
    return write_atomic(path, lambda temporary: np.savez(temporary, **arrays))  # type: ignore[arg-type]


def load_features(folder: Path, spec: Spec) -> StoredFeatures:
    """Of an export that has them.

    Raises:
        ArtifactError: they were changed, or are of another model.
    """
    path = folder / FEATURES_NAME
    check_hash(path, str(spec.features.get("sha256")))
    try:
        # Of a damaged archive the reader may raise anything, zlib's errors among them.
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        folds = folds_of({name[5:]: value for name, value in arrays.items() if name.startswith("fold.")})
        if folds is None or folds.weight.shape[1] != len(spec.classes):
            raise ValueError("its classes are not those of the export")
        rows = (arrays["plain"].astype(np.float16), arrays["disturbed"].astype(np.float16))
        return StoredFeatures(*rows, arrays["labels"].astype(np.int64), folds, int(arrays["last"]))
    except Exception as error:
        raise ArtifactError(f"'{path}' holds no features of this model ({error}). Export the run again.") from error
