"""`reference.npz`: images, and what the trained model said about them, for every later comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssod_edge.data.images import Subset
from ssod_edge.data.splits import Indices
from ssod_edge.detect.scores import ood_scores
from ssod_edge.detect.sums import FittedScore
from ssod_edge.errors import VerificationError
from ssod_edge.export.release import Say
from ssod_edge.files import write_atomic
from ssod_edge.terminal import image_bar
from ssod_edge.training.model import SSODClassifier, normalise

IMAGES = 256
#: Images that have to do for a reference, and to quantise with, where there are no real ones.
SYNTHETIC_IMAGES = 32
BATCH = 32


def write_reference(
    path: Path,
    model: SSODClassifier,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    detector: FittedScore | None = None,
) -> Path:
    """Run the eager model in fp32 and store its numbers.

    Args:
        path: of the .npz file. It gets `image`, `label`, `logits` [n, M], `id_logit` [n] and `score_<name>` [n] for
            every score of the logits and for the detector, all fp32 but the first two.
        model: in evaluation mode, on the CPU.
        images: uint8 [n, 3, S, S], n >= 1.
        labels: int64 [n]; -1 where unknown.
        detector: the shipped score's, if it has a state.

    Raises:
        VerificationError: the model's own numbers are not finite.
        OutputError: the file cannot be written.
    """
    logits, id_logit, features = run_eager(model, images)
    if not (np.isfinite(logits).all() and np.isfinite(id_logit).all()):
        raise VerificationError("the model gives logits that are not finite, so there is nothing to compare with")
    arrays: dict[str, Any] = {"image": images, "label": labels, "logits": logits, "id_logit": id_logit}
    arrays |= {f"score_{name}": value for name, value in ood_scores(logits, id_logit).items()}
    if detector is not None:
        arrays[f"score_{detector.name}"] = detector.score(features, logits, id_logit)
    return write_atomic(path, lambda temporary: np.savez_compressed(temporary, **arrays))


def run_eager(model: SSODClassifier, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ...]:
    """(logits [n, M], id_logit [n], features [n, D]) of uint8 images [n, 3, S, S], by PyTorch in fp32."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            x = normalise(torch.from_numpy(images[start : start + BATCH]), model.preprocess)
            features = model.features(x)
            parts.append((*model.head(features), features))
    return tuple(torch.cat(part).float().numpy() for part in zip(*parts, strict=True))


def synthetic_images(n: int, size: int, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [n, 3, S, S]: seeded noise at all scales, for weights that come without images."""
    rng = np.random.default_rng(seed)
    total = np.zeros((n, 3, size, size), np.float32)
    cells = 1
    while cells <= size:
        at = np.arange(size) * cells // size
        total += rng.normal(0, 1, (n, 3, cells, cells)).astype(np.float32)[:, :, at][:, :, :, at]
        cells *= 2
    return np.clip(128 + 28 * total, 0, 255).astype(np.uint8)


def eager_outputs(
    model: SSODClassifier, images: Subset, say: Say, indices: Indices | None = None
) -> tuple[NDArray[np.float32], ...] | None:
    """`run_eager` of all that can be read of some images; what cannot is said. None where nothing can."""
    parts = []
    with image_bar("held-out images", len(images if indices is None else indices)) as advance:
        for pixels, _ in images.batches(model.preprocess, indices):
            parts.append(run_eager(model, pixels))
            advance(len(pixels))
    for message in images.unreadable:
        say(f"left out: {message}")
    return tuple(map(np.concatenate, zip(*parts, strict=True))) or None
