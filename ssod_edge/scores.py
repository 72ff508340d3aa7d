"""Out-of-distribution scores from the fused head's outputs. Larger always means more likely OOD."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ssod_edge.config import ScoreName
from ssod_edge.errors import UsageError

Array = npt.NDArray[np.float32]


def ood_scores(logits: npt.ArrayLike, id_logit: npt.ArrayLike) -> dict[ScoreName, Array]:
    """Every score of the fused graph, in fp32, none of which saturates.

    With top = max_j logits_j, rest = logsumexp of the other logits and s = id_logit:

        ssod      = -s
        msp       = rest - top                          (= -logit of the largest probability)
        maxlogit  = -top
        energy    = -logsumexp(logits)
        posterior = -(max log_softmax + logsigmoid(s))  (the paper's Eq. 7)

    Args:
        logits: [N, M], M >= 2, raw class logits.
        id_logit: [N], the OOD row's output.

    Returns:
        Score name -> float32 [N]. NaN logits give NaN scores.

    Raises:
        UsageError: wrong shapes, or M < 2 (with one class, msp would be -inf everywhere).
    """
    logits, id_logit = _check(logits, id_logit)
    top, rest = _top_and_rest(logits)
    margin = rest - top
    return {
        "ssod": -id_logit,
        "msp": margin,
        "maxlogit": -top,
        "energy": -(top + _softplus(margin)),
        "posterior": _softplus(margin) + _softplus(-id_logit),
    }


def probabilities(logits: npt.ArrayLike) -> Array:
    """softmax(logits) over the classes, [N, M] -> float32 [N, M]. The OOD row takes no part in it."""
    values = np.asarray(logits, np.float32)
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    shares: Array = powers / powers.sum(axis=1, keepdims=True)
    return shares


def confidence(logits: npt.ArrayLike) -> Array:
    """The largest softmax probability, [N, M] -> float32 [N] in [1/M, 1]. For display: it saturates at 1."""
    largest: Array = probabilities(logits).max(axis=1)
    return largest


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


def _softplus(x: Array) -> Array:
    """log(1 + exp(x)), without overflow."""
    value: Array = np.logaddexp(np.float32(0), x)
    return value


def _check(logits: npt.ArrayLike, id_logit: npt.ArrayLike) -> tuple[Array, Array]:
    logits, id_logit = np.asarray(logits, np.float32), np.asarray(id_logit, np.float32)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise UsageError(f"logits must have shape [N, M] with M >= 2 classes, got {list(logits.shape)}")
    if id_logit.shape != logits.shape[:1]:
        raise UsageError(f"id_logit must have shape [{len(logits)}], one per row of logits, got {list(id_logit.shape)}")
    return logits, id_logit
