"""Scores and logits as numbers that people read: the p-value of "known", and the temperature of `probs`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ssod_edge.detect.metrics import ID_BINS, quantile_ranks, threshold_rank
from ssod_edge.spec import Threshold

Array = npt.NDArray[np.float32]

#: Length of the table of quantiles: those of `Threshold.id_quantiles`, the threshold itself and the highest score.
P_SIZE = ID_BINS + 1
#: Labelled images that a temperature takes; with fewer it stays 1.
LEAST_IMAGES = 50


def verdict_inputs(threshold: Threshold | None) -> dict[str, Array]:
    """The inputs beside the image from which a graph computes `known` and `p_known`.

    Of n held-out ID scores r are below a score that is above the r-th smallest. So the conformal p-value,
    (1 + number of scores at or above it) / (n + 1), is at most 1 - r / (n + 1) (Vovk et al., 2005; Bates et al., 2023,
    Eq. 2). The table holds some ranks of the n, the threshold's among them, so that for a target of 95% an image is
    known if, and only if, its p-value is above 0.05.

    Args:
        threshold: the artifact's; None, or one without quantiles, as earlier releases wrote it, leaves `p_known` at 0.

    Returns:
        `ssod_edge.spec.VERDICT_INPUTS`, float32: "threshold" [1]; "p_scores" [1, P_SIZE], ascending; "p_levels"
        [1, P_SIZE], the p-value of what is above each.
    """
    scores, levels = np.full((1, P_SIZE), np.inf, np.float32), np.zeros((1, P_SIZE), np.float32)
    value = -np.inf if threshold is None else threshold.value
    inputs = {"threshold": np.array([value], np.float32), "p_scores": scores, "p_levels": levels}
    if threshold is None or not threshold.id_quantiles:
        scores[:] = -np.inf
        return inputs
    n = threshold.n
    ranks = quantile_ranks(n, len(threshold.id_quantiles) + 1).tolist()
    table = dict(zip(ranks, threshold.id_quantiles, strict=True))
    table[threshold_rank(n, threshold.target_tpr)] = value
    if threshold.id_highest is not None:
        table[n] = threshold.id_highest
    rows = sorted(table.items())
    scores[0, : len(rows)] = [score for _, score in rows]
    exact = np.array([1 - rank / (n + 1) for rank, _ in rows])
    rounded = exact.astype(np.float32)  # down: one that is 0.05 must not be above it
    levels[0, : len(rows)] = np.where(rounded > exact, np.nextafter(rounded, np.float32(0)), rounded)
    return inputs


def p_known(scores: npt.ArrayLike, inputs: dict[str, Array]) -> Array:
    """The p-value of "this image is a known one": small where few known images score as high.

    Args:
        scores: `ood_score` [n].
        inputs: from `verdict_inputs`.

    Returns:
        float32 [n], in [0, 1].
    """
    # In this order NaN gets the lowest level.
    at_or_above = inputs["p_scores"] >= np.asarray(scores, np.float32)[:, None]
    found: Array = np.where(at_or_above, np.float32(1), inputs["p_levels"]).min(axis=1)
    return found


def explain_p_known(target_tpr: float) -> str:
    """What `p_known` in percent means, in a line, at a threshold for this share of known images."""
    return (
        "p known: of 100 new images of known classes about so many have such an ood score or a higher one; up to "
        f"{100 * (1 - target_tpr):.3g} it is UNKNOWN"
    )


def fit_temperature(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """T of probs = softmax(logits / T), by the likelihood of held-out labels (Guo et al., 2017, Sec. 4.2).

    One label in n + 1 counts as drawn at random: a network that gets all n right is not certain of the next.

    Args:
        logits: [n, M].
        labels: [n]; those below 0 are left out.

    Returns:
        T in [0.1, 10]; 1 with fewer than `LEAST_IMAGES` labels.
    """
    known = labels >= 0
    if known.sum() < LEAST_IMAGES:
        return 1.0
    x, y = logits[known].astype(np.float64), labels[known]

    random = 1 / (len(y) + 1)

    def loss(log_temperature: float) -> float:
        z = x / np.exp(log_temperature)
        log_probs = z - np.logaddexp.reduce(z, axis=1)[:, None]
        right = log_probs[np.arange(len(y)), y]
        return float(-((1 - random) * right + random * log_probs.mean(axis=1)).mean())

    # The loss is convex in 1 / T, so in log T it falls and then rises: a search by thirds finds its lowest place.
    low, high = np.log(0.1), np.log(10)
    for _ in range(60):
        third = (high - low) / 3
        low, high = (low, high - third) if loss(low + third) <= loss(high - third) else (low + third, high)
    return float(np.exp((low + high) / 2))
