"""What becomes of known images on another day: still accepted, and still of the right class, under named shifts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssod_edge.data.disturbances import SHIFTS, STRENGTHS, shift
from ssod_edge.data.splits import Indices
from ssod_edge.detect.metrics import tpr_interval
from ssod_edge.training.batches import EvalImages, load_batches
from ssod_edge.training.model import SSODClassifier, normalise
from ssod_edge.training.outputs import Outputs

Floats = NDArray[np.floating[Any]]
Flags = NDArray[np.bool_]

#: Of the sample of images, and of what a shift draws.
SEED = 0
#: What each image is shown under, in this order.
CASES = tuple((kind, strength) for kind in SHIFTS for strength in STRENGTHS)
#: Images that are read at once; the network gets each of them len(CASES) times.
BATCH_SIZE = 2
#: Kind and strength of the row that the others are compared with.
UNDISTURBED = "none"


class ShiftedImages(EvalImages):
    """(uint8 [len(CASES), 3, S, S], label, index): an image is read once, and shown under every shift."""

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        image, label, index = super().__getitem__(position)
        pixels = image.numpy()
        shifted = np.stack([shift(pixels, kind, strength, (SEED, index)) for kind, strength in CASES])
        return torch.from_numpy(shifted), label, index


def sample(n: int, most: int) -> Indices:
    """At most so many of n positions, seeded, in order."""
    return np.sort(np.random.default_rng(SEED).permutation(n)[:most])


@torch.no_grad()
def judge_shifted(
    model: SSODClassifier,
    images: ShiftedImages,
    labels: Indices,
    score: Callable[[Outputs], Floats],
    workers: int = 1,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[Floats, Flags]:
    """Score images under every shift, in fp32. The pixels and features of a few images are held at a time.

    Args:
        model: in any mode; it is left in eval mode.
        images: n of them.
        labels: int64 [n], in the model's numbering.
        score: of what the model says; larger is more OOD.
        workers: processes that read and shift.
        advance: called with the number of finished images.

    Returns:
        scores and whether the class is right, [n, len(CASES)] each.

    Raises:
        ImageError: an image cannot be read.
    """
    model.eval()
    device = next(model.parameters()).device
    scores, correct, done = [], [], 0
    for batch, *_ in load_batches(images, workers, batch_size=BATCH_SIZE):
        x = normalise(batch.flatten(0, 1).to(device), model.preprocess).contiguous(memory_format=torch.channels_last)
        z = model.features(x)
        logits, id_logit = (output.cpu().numpy() for output in model.head(z))
        truth = labels[done : done + len(batch)].repeat(len(CASES))
        outputs = Outputs(logits, id_logit, truth, z.float().cpu().numpy())
        scores.append(score(outputs).reshape(-1, len(CASES)))
        correct.append(outputs.correct.reshape(-1, len(CASES)))
        done += len(batch)
        advance(len(batch))
    return np.concatenate(scores), np.concatenate(correct)


def shift_rows(
    shifted: tuple[Floats, Flags], undisturbed: tuple[Floats, Flags], threshold: float | None
) -> list[dict[str, Any]]:
    """A row for each shift, JSON-ready, after one for the same images undisturbed (kind and strength "none").

    Args:
        shifted: of `judge_shifted`, [n, len(CASES)] each.
        undisturbed: the same of the images as they are, [n] each.
        threshold: an image is accepted at a score up to it; None where there is no threshold.

    Returns:
        rows of `kind`, `strength`, `n`, `accepted` and `accuracy` with their intervals by `tpr_interval`
        (`accepted_ci`, `accuracy_ci`), and `accuracy_drop` against the undisturbed images. `accepted` is a share of all
        n images, right or wrong; it and its interval are None without a threshold.
    """
    base_scores, base_correct = undisturbed
    base = float(base_correct.mean())
    rows = [_row((UNDISTURBED, UNDISTURBED), base_scores, base_correct, threshold, base)]
    for case, scores, correct in zip(CASES, shifted[0].T, shifted[1].T, strict=True):
        rows.append(_row(case, scores, correct, threshold, base))
    return rows


def _row(case: Sequence[str], scores: Floats, correct: Flags, threshold: float | None, base: float) -> dict[str, Any]:
    n, right = len(scores), int(correct.sum())
    known = None if threshold is None else int((scores <= threshold).sum())
    return {
        "kind": case[0],
        "strength": case[1],
        "n": n,
        "accepted": None if known is None else known / n,
        "accepted_ci": None if known is None else list(tpr_interval(known, n)),
        "accuracy": right / n,
        "accuracy_ci": list(tpr_interval(right, n)),
        "accuracy_drop": base - right / n,
    }
