"""Out-of-distribution scores from the fused head's outputs. Larger always means more likely OOD."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ssod_edge.config import ScoreName
from ssod_edge.errors import UsageError

Array = npt.NDArray[np.float32]

#: GEN's exponent, and how many of the largest probabilities it reads.
GEN_GAMMA, GEN_CLASSES = 0.1, 100


def ood_scores(logits: npt.ArrayLike, id_logit: npt.ArrayLike) -> dict[ScoreName, Array]:
    """Every score of the logits, in fp32: the definition that the graph is tested against. None saturates.

    With top = max_j logits_j, rest = logsumexp of the other logits and s = id_logit:

        ssod      = -s
        msp       = rest - top                          (= -logit of the largest probability)
        maxlogit  = -top
        energy    = -logsumexp(logits)
        gen       = sum of (p (1 - p))^0.1 over the 100 largest p of softmax(logits)
        posterior = -(max log_softmax + logsigmoid(s))  (the paper's Eq. 7)

    gen is the generalised entropy of Liu et al. (GEN, CVPR 2023).

    Args:
        logits: [N, M], M >= 2, raw class logits.
        id_logit: [N], the OOD row's output.

    Returns:
        Score name -> float32 [N]. Logits that are not finite give scores that are not, in their row alone.

    Raises:
        UsageError: wrong shapes, or M < 2 (with one class, msp would be -inf everywhere).
    """
    values, s = _check_logits(logits), np.asarray(id_logit, np.float32)
    if s.shape != values.shape[:1]:
        raise UsageError(f"id_logit must have shape [{len(values)}], one per row of logits, got {list(s.shape)}")
    with np.errstate(invalid="ignore"):
        top, rest = _top_and_rest(values)
        margin = rest - top
        doubt = _softplus(margin)  # -max log_softmax
        return {
            "ssod": -s,
            "msp": margin,
            "maxlogit": -top,
            "energy": -(top + doubt),
            "gen": _generalised_entropy(values, top, margin),
            "posterior": doubt + _softplus(-s),
        }


def probabilities(logits: npt.ArrayLike) -> Array:
    """softmax(logits) over the classes, [N, M] -> float32 [N, M]. The OOD row takes no part in it.

    Raises:
        UsageError: wrong shape, or M < 2.
    """
    values = _check_logits(logits)
    with np.errstate(invalid="ignore"):
        powers = np.exp(values - values.max(axis=1, keepdims=True))
    shares: Array = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32, copy=False)
    return shares


def _top_and_rest(logits: Array) -> tuple[Array, Array]:
    """The largest logit [N], and the logsumexp of the others [N]."""
    rows = np.arange(len(logits))
    index = logits.argmax(axis=1)
    top = logits[rows, index]
    others = logits.copy()
    others[rows, index] = -np.inf
    second = others.max(axis=1)
    rest: Array = second + np.log(np.exp(others - second[:, None]).sum(axis=1))
    return top, rest


def _generalised_entropy(logits: Array, top: Array, margin: Array) -> Array:
    """GEN [N] from logarithms: 1 - p of a class that the network is sure of is the share of the others."""
    doubt = _softplus(margin)
    log_p = logits - top[:, None] - doubt[:, None]
    log_rest = np.log1p(-np.exp(np.minimum(log_p, -np.log(np.float32(2)))))  # right for every class but the winner
    log_rest[np.arange(len(logits)), logits.argmax(axis=1)] = margin - doubt
    terms = np.exp(np.float32(GEN_GAMMA) * (log_p + log_rest))
    if terms.shape[1] > GEN_CLASSES:  # a term is the larger, the larger p
        terms = np.partition(terms, -GEN_CLASSES, axis=1)[:, -GEN_CLASSES:]
    total: Array = terms.sum(axis=1)
    return total


def _softplus(x: Array) -> Array:
    """log(1 + exp(x)), without overflow."""
    value: Array = np.logaddexp(np.float32(0), x)
    return value


def _check_logits(logits: npt.ArrayLike) -> Array:
    values = np.asarray(logits, np.float32, order="C")
    if values.ndim != 2 or values.shape[1] < 2:
        raise UsageError(f"logits must have shape [N, M] with M >= 2 classes, got {list(values.shape)}")
    return values
