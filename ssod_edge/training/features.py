"""Features of images through a network that does not change: computed once, and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssod_edge.data.disturbances import seeded_copy
from ssod_edge.data.sources import ImageSource
from ssod_edge.data.splits import Indices
from ssod_edge.detect.fit import FitData
from ssod_edge.errors import ImageError, OutputError, UsageError
from ssod_edge.files import write_atomic
from ssod_edge.training.batches import EvalImages, load_batches
from ssod_edge.training.checkpoint import trunk_hash
from ssod_edge.training.folding import folded
from ssod_edge.training.model import SSODClassifier, normalise

#: Of what `disturbed_copy` makes of an image, and how it is read; another one makes features anew.
VERSION = 1
#: Folder of kept features, in a folder of runs.
CACHE = ".features"
#: Bytes that it may hold, and features in memory; those that were used longest ago go first.
MOST_BYTES = 4 * 2**30
BATCH = 32


@dataclass(frozen=True)
class Features:
    """Of all N images of a source, through the trunk of one model.

    Attributes:
        plain: float32 [N, Dall], of the images as they are.
        disturbed: float32 [N, Dall], of one disturbed copy of each (`disturbed_copy`), seeded by its place.
    """

    plain: NDArray[np.float32]
    disturbed: NDArray[np.float32]


class Versions(EvalImages):
    """(uint8 [2, 3, S, S]: the image and its disturbed copy; label, index)."""

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        image, label, index = super().__getitem__(position)
        return torch.stack([image, torch.from_numpy(seeded_copy(image.numpy()))]), label, index


def fitting_data(model: SSODClassifier, features: NDArray[np.float32], labels: Indices, tuned: str) -> FitData:
    """What detectors are fitted on: images, or images and then a disturbed copy of each.

    Distances read the last features; where those were tuned, every stage, because tuned ones see less of what is far
    (docs/lab/detection.md).

    Args:
        model: on any device.
        features: [N, Dall].
        labels: int64 [N], in the model's numbering; -1 where unknown.
        tuned: "upper" where the features were tuned gently from published ones; see the run's `tuned`.
    """
    weight, bias = (part[: len(model.classes)].detach().float().cpu().numpy() for part in model.head_weight())
    with torch.inference_mode():
        z = torch.from_numpy(features).to(next(model.parameters()).device)
        logits, id_logit = (part.float().cpu().numpy() for part in model.head(z))
    return FitData(features, labels, logits, weight, bias, id_logit, distance_features(model, tuned))


def distance_features(model: SSODClassifier, tuned: str) -> int:
    """How many features, the last ones, distances read; 0: all of them. See `fitting_data`.

    Never what a branch makes: it learnt to tell the known classes, and far photos lie among these in it
    (docs/lab/results.md).
    """
    if tuned != "upper":
        return model.last_width
    return model.classifier.in_features - model.branch_width if model.branch_width else 0


def check_features(model: SSODClassifier, source: ImageSource) -> None:
    """Raises UsageError where the features of all images and their copies are more than `MOST_BYTES`."""
    size = 8 * len(source) * model.classifier.in_features
    if size > MOST_BYTES:
        raise UsageError(
            f"the features of {len(source)} images take {size / 2**30:.1f} GB, and there is room for "
            f"{MOST_BYTES / 2**30:.1f}. Train the whole network: --tune all"
        )


def features_of(
    model: SSODClassifier,
    source: ImageSource,
    folder: Path,
    workers: int = 1,
    advance: Callable[[int], None] = lambda n: None,
) -> Features:
    """The features of all images of a source, from the folder where they are kept, or computed and put there.

    Args:
        model: its head does not matter.
        source: images that `check_features` passes.
        folder: of runs; the features lie in `CACHE` there.
        workers: processes that read photos.
        advance: called with the size of each finished batch.

    Raises:
        ImageError: an image cannot be read.
    """
    path = _path(model, source, folder)
    if (kept := _read(path, len(source))) is not None:
        advance(len(source))
        return kept
    found = compute_features(model, source, None, workers, advance)
    _keep(path, found)
    return found


def compute_features(
    model: SSODClassifier,
    source: ImageSource,
    indices: Indices | None = None,
    workers: int = 1,
    advance: Callable[[int], None] = lambda n: None,
) -> Features:
    """The features of some images, ascending, or of all; other arguments and errors as for `features_of`."""
    count, device = len(source) if indices is None else len(indices), next(model.parameters()).device
    model.eval()
    trunk = folded(model)
    plain, disturbed = np.empty((2, count, model.classifier.in_features), np.float32)
    done = 0
    with torch.inference_mode():
        for pair, *_ in load_batches(Versions(source, indices, model.preprocess), workers, batch_size=BATCH):
            x = normalise(pair.flatten(0, 1).to(device), model.preprocess).contiguous(memory_format=torch.channels_last)
            z = trunk.features(x).float().cpu().numpy().reshape(len(pair), 2, -1)
            rows = slice(done, done + len(pair))
            plain[rows], disturbed[rows] = z[:, 0], z[:, 1]
            done += len(pair)
            advance(len(pair))
    return Features(plain, disturbed)


def kept_features(model: SSODClassifier, source: ImageSource, folder: Path) -> Features | None:
    """What `features_of` has kept; None where there is nothing."""
    return _read(_path(model, source, folder), len(source))


def keep_features(model: SSODClassifier, source: ImageSource, folder: Path, features: Features) -> None:
    """Put what was computed in another way where `features_of` finds it."""
    _keep(_path(model, source, folder), features)


def _path(model: SSODClassifier, source: ImageSource, folder: Path) -> Path:
    record = {
        "version": VERSION,
        "trunk": trunk_hash(model),
        "backbone": model.backbone_name,
        "stages": model.stages,
        "preprocess": asdict(model.preprocess),
        "images": [source.fingerprint, source.val_record, _contents(source)],
    }
    return folder / CACHE / f"{hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]}.npz"


def _contents(source: ImageSource) -> str:
    """SHA-256 over all pictures, hex: a fingerprint knows names and labels alone, which other photos may share."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        try:
            digest.update(source.picture(index).sha256.encode())
        except ImageError as error:  # named when it is read
            digest.update(str(error).encode())
    return digest.hexdigest()


def _read(path: Path, count: int) -> Features | None:
    """None where there is no such file, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Features(file["plain"], file["disturbed"])
        with contextlib.suppress(OSError):  # another's folder: it stays as old as it was
            path.touch()
    except Exception:  # of a damaged archive the reader may raise anything
        return None
    return found if len(found.plain) == len(found.disturbed) == count else None


def _keep(path: Path, features: Features) -> None:
    """Write features, and delete those that nobody used for the longest time; without room for them, do without."""
    size = features.plain.nbytes + features.disturbed.nbytes
    # No room, another process deletes too, or a folder has that name: do without.
    with contextlib.suppress(OSError, OutputError, UsageError):
        others = sorted(path.parent.glob("*.npz"), key=lambda other: other.stat().st_mtime)
        total = size + sum(other.stat().st_size for other in others)
        for other in others:
            if total > MOST_BYTES:
                total -= other.stat().st_size
                other.unlink(missing_ok=True)
        write_atomic(path, lambda temporary: np.savez(temporary, **asdict(features)))  # type: ignore[arg-type]
