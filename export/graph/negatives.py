"""What a run's negatives say of a score: a kind of evidence for "auto", and whether the OOD row joins the default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssod_edge.config import PRIOR_SCORE, UNTOUCHED_SCORE
from ssod_edge.data.images import Subset
from ssod_edge.detect.choice import LEAST_MISTAKES
from ssod_edge.detect.detectors import Array
from ssod_edge.detect.fit import FitData
from ssod_edge.detect.metrics import more_than_chance
from ssod_edge.detect.sums import FittedScore, Outputs, ScoreSum, fit_score
from ssod_edge.errors import UsageError
from ssod_edge.export.graph.reference import eager_outputs
from ssod_edge.export.graph.source import Source
from ssod_edge.export.release import Say

#: The kind of evidence, beside those that are made.
KIND = "negatives"
_ROW = "ssod+"
#: What an export ships that nobody asked for, and that is not chosen by "auto".
DEFAULTS = tuple(f"{row}{prior}" for row in ("", _ROW) for prior in (PRIOR_SCORE, UNTOUCHED_SCORE))


def with_row(name: str) -> str:
    """One of `DEFAULTS` with the OOD row in it."""
    return _ROW + name.removeprefix(_ROW)


def negative_kind(source: Source, say: Say) -> dict[str, Outputs]:
    """`KIND` -> what the network says of the negatives to choose by; nothing where they are too few to say anything."""
    images = _to_choose_by(source, say)
    if images is None:
        return {}
    if len(images) < LEAST_MISTAKES:
        say(f"not chosen by: {len(images)} images of {images.description}; it takes {LEAST_MISTAKES}")
        return {}
    found = eager_outputs(source.model, images, say)
    return {} if found is None else {KIND: found}


def fit_default(
    source: Source, name: str, data: FitData, held_out: Outputs | Mapping[str, Array], say: Say
) -> tuple[FittedScore, dict[str, Any]]:
    """The prior, or the OOD row and the prior where the OOD row finds negatives that it was not taught.

    Each score rejects what lies above the threshold that keeps 95% of the held-out known images. The row joins where,
    of the negatives that only one of the two rejects, more are its own than chance gives, by two deviations (McNemar).

    Args:
        source: a model whose row may have been trained.
        name: of `DEFAULTS`.
        data: what detectors are fitted on.
        held_out: of known images that no threshold is fitted to, or the scores of the parts of both, out of fold.
        say: gets a line with both figures.

    Returns:
        the score, fitted; the figures for the spec, none without negatives.

    Raises:
        UsageError: the distance cannot be fitted.
    """
    prior = fit_score(name.removeprefix(_ROW), data, held_out)
    images = _to_choose_by(source, say) if source.model.ood.weight.any() else None
    unknown = None if images is None else eager_outputs(source.model, images, say)
    if images is None or unknown is None:
        return prior, {}
    row = fit_score(with_row(name), data, held_out)
    assert isinstance(prior, ScoreSum) and isinstance(row, ScoreSum)
    without, joined = (_rejected(score, held_out, unknown) for score in (prior, row))
    taken: FittedScore = row if more_than_chance(joined, without) else prior
    shares = {score.name: float(found.mean()) for score, found in ((prior, without), (row, joined))}
    figures = " and ".join(f"{name} {share:.1%}" for name, share in shares.items())
    why = "" if taken is row else ": no more than chance gives"
    say(f"of {len(without)} negatives to choose by, at 95% of known images, {figures} are rejected{why}")
    record = {"data": images.description, "images": len(without), "rejected": shares}
    return taken, {KIND: record}


def _rejected(score: ScoreSum, known: Outputs | Mapping[str, Array], unknown: Outputs) -> NDArray[np.bool_]:
    """Whether each unknown image lies above the threshold for 95% of the known ones, bool [n]."""
    logits, id_logit, features = unknown
    outside = score.score(features, logits, id_logit)
    if isinstance(known, Mapping):
        inside = score.add(known)
    else:
        logits, id_logit, features = known
        inside = score.score(features, logits, id_logit)
    rejected: NDArray[np.bool_] = outside > np.quantile(inside, 0.95, method="higher")
    return rejected


def _to_choose_by(source: Source, say: Say) -> Subset | None:
    """The part of a run's negatives; None, and a line, where they cannot be had."""
    if source.run is None:
        return None
    try:
        negatives = source.run.negatives("put them back")
    except UsageError as error:
        say(f"negatives have no say in the score: {error}")
        return None
    return None if negatives is None else negatives.subset("choice")
