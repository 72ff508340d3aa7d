"""Has the input drifted? A test of a stream of OOD scores against those of held-out in-distribution (ID) images.

The n ID scores cut the line into n + 1 gaps. If a new image is exchangeable with the ID images, its score falls into
each gap with the same probability; so, with m_b gaps in bin b, and c_b of the t scores before it in that bin, it falls
into bin b with probability

    p(b) = (m_b + c_b) / (n + 1 + t)

exactly, whatever the distribution of the scores (Polya's urn), as long as no two are equal, which fp32 scores of photos
hardly ever are; that n is finite is part of it. A conformal test
martingale (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World") bets against this: an expert e that
gives bin b the probability q_e(b) multiplies its stake by q_e(b) / p(b). The evidence is the mean over experts and,
because a drift may begin at any image s, over starts with the prior 1 / (s (s + 1)):

    M_t = mean_e sum_s 1 / (s (s + 1)) prod_(i = s..t) q_e(b_i) / p(b_i)

While the images are exchangeable with the ID ones, E[M_t] = 1, and by Ville's inequality M_t ever reaches 1 / rate with
a probability of at most `rate`, however long the stream is and however often one looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ssod_edge.detect.metrics import quantile_ranks
from ssod_edge.spec import Threshold

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

#: The probability of a false alarm, over the whole life of a test.
FALSE_ALARM_RATE = 0.01
#: Images without a further alarm after which a drift is over.
CALM = 1000
#: ID quantiles that bound the bins of the test: deciles, and the tail in which unknown images lie.
_CUTS = (*(tenth / 10 for tenth in range(1, 10)), 0.95, 0.99)
#: Experts that bet on high and on low scores: q gives the share u of the ID scores at that end the probability u^power.
_POWERS = (0.35, 0.7)
#: Experts that bet on what they saw lately: images that they remember. The last of them is what "recent" means.
MEMORY = (50, 500)
#: Images that such an expert's belief in the ID distribution weighs.
_PRIOR = 20.0
#: Finer bins beyond the ID quantiles, for the quantiles of the stream: this many at each end, each this share of the
#: distance between the outer ID quantiles.
_TAIL_BINS, _TAIL_STEP = 40, 0.05
#: Scores that are handled at once: few after an alarm, where the next one may be near, then twice as many each time.
#: More than the largest number would overflow the shorter memory's weights.
_BLOCK, _LARGEST_BLOCK = 16, 256
_NO_STAKE = -1e9  # the log of nothing that a JSON file can hold
_MOST_STAKE = 1e8  # of a test that never begins anew: what is above is not counted


@dataclass(frozen=True)
class Reference:
    """The scores that a stream is compared with.

    Attributes:
        edges: float64 [B - 1], ascending: bins of the histogram. Bin b holds edges[b - 1] < score <= edges[b].
        cuts: float64 [K - 1], ascending: bins of the test.
        gaps: int64 [K], how many of the n + 1 gaps between ID scores each bin of the test holds.
        id_shares: float64 [B], the probability of each bin of the histogram for an ID image; 0 in the finer bins
            beyond the outer quantiles, whose share stands in the outermost bins next to the quantiles.
    """

    edges: Floats
    cuts: Floats
    gaps: Integers
    id_shares: Floats


def reference(threshold: Threshold) -> Reference:
    """The bins that an artifact's ID quantiles make; it must have some."""
    ranks = quantile_ranks(threshold.n, len(threshold.id_quantiles) + 1)
    # Of equal quantiles the last counts: all of the scores up to there are at or below it.
    values, first = np.unique(np.array(threshold.id_quantiles)[::-1], return_index=True)
    ranks = ranks[::-1][first]
    step = _TAIL_STEP * (values[-1] - values[0]) or 1.0
    beyond = step * np.arange(1, _TAIL_BINS + 1)
    shares = np.diff(np.concatenate([[0], ranks, [threshold.n + 1]])) / (threshold.n + 1)
    none = np.zeros(_TAIL_BINS)
    nearest = sorted({int(np.abs(ranks - cut * (threshold.n + 1)).argmin()) for cut in _CUTS})
    return Reference(
        edges=np.concatenate([values[0] - beyond[::-1], values, values[-1] + beyond]),
        cuts=values[nearest],
        gaps=np.diff(np.concatenate([[0], ranks[nearest], [threshold.n + 1]])),
        id_shares=np.concatenate([none, shares, none]),
    )


@dataclass(frozen=True)
class Evidence:
    """A test that never begins anew, so that its evidence may pass the limit of an alarm: what a fleet needs.

    Attributes:
        counts: [K], of its images.
        log_stakes: [E], as of `DriftState`.
        peak: the largest log evidence.
    """

    counts: tuple[int, ...]
    log_stakes: tuple[float, ...]
    peak: float


@dataclass(frozen=True)
class DriftState:
    """All that the test keeps, as JSON holds it. K bins, E experts.

    Attributes:
        drifted: the last that was said.
        alarms: how often it turned to drifted.
        alarm_at: the number of images when it last did; None before the first time.
        images: since the evidence last reached its limit, and the test began anew.
        counts: [K], of these images.
        log_stakes: [E], log of each expert's sum over starts.
        peak: the largest log evidence of these images.
        recent: for each memory, [K]: counts of all images, fading by 1 / memory an image.
        recent_unknown: the same for the unknown ones, at the longest memory.
        whole: the same test of all images.
    """

    drifted: bool
    alarms: int
    alarm_at: int | None
    images: int
    counts: tuple[int, ...]
    log_stakes: tuple[float, ...]
    peak: float
    recent: tuple[tuple[float, ...], ...]
    recent_unknown: float
    whole: Evidence

    @staticmethod
    def complete(values: dict[str, Any]) -> dict[str, Any]:
        """Of a release that had no `whole`: it begins here."""
        counts, stakes = (values.get(name) for name in ("counts", "log_stakes"))
        if isinstance(counts, list) and isinstance(stakes, list):
            return {"whole": asdict(_no_evidence(len(counts), len(stakes))), **values}
        return values


def _no_evidence(bins: int, experts: int) -> Evidence:
    return Evidence((0,) * bins, (_NO_STAKE,) * experts, 0.0)


def new_state(bins: int) -> DriftState:
    """The test before the first image."""
    experts = 2 * len(_POWERS) + len(MEMORY)
    recent = tuple((0.0,) * bins for _ in MEMORY)
    whole = _no_evidence(bins, experts)
    return DriftState(False, 0, None, 0, whole.counts, whole.log_stakes, 0.0, recent, 0.0, whole)


def fits(state: DriftState, bins: int) -> bool:
    """Whether a state that was read has the shape of this reference's, and numbers that a test can have."""
    empty, whole = new_state(bins), state.whole
    weights = [*(weight for row in state.recent for weight in row), state.recent_unknown]
    return (
        len(state.counts) == bins
        and len(state.log_stakes) == len(empty.log_stakes)
        and [len(row) for row in state.recent] == [bins] * len(MEMORY)
        and min(state.counts) >= 0
        and sum(state.counts) == state.images
        and all(abs(value) <= -_NO_STAKE for value in (*state.log_stakes, *whole.log_stakes))
        and (len(whole.counts), len(whole.log_stakes)) == (bins, len(empty.log_stakes))
        and min(whole.counts) >= 0
        and 0 <= whole.peak <= _MOST_STAKE + 1
        # At the limit the test begins anew; decimals are whole, so that only the logarithms round.
        and max(state.peak, log_evidence(state)) <= -math.log(FALSE_ALARM_RATE) + 1e-6
        and state.peak >= 0
        and state.alarms >= int(state.drifted)
        and (state.alarms > 0) == (state.alarm_at is not None)
        # What fades by 1 / memory an image approaches the memory, and rounding takes it a little over.
        and all(0 <= weight <= MEMORY[-1] * (1 + 1e-6) for weight in weights)
    )


def advance(state: DriftState, scores: Sequence[float], threshold: float, bins: Reference, before: int) -> DriftState:
    """The state after further images.

    Args:
        state: the test so far.
        scores: finite OOD scores, in the order in which they came. How they are divided into calls does not matter.
        threshold: above it an image is unknown.
        bins: what to compare with.
        before: images in all before these, for `alarm_at`.
    """
    values = np.asarray(scores, np.float64)
    found = np.searchsorted(bins.cuts, values)
    unknown = values > threshold
    done, size = 0, _BLOCK
    while done < len(found):
        block = slice(done, done + size)
        state, used = _advance_block(state, found[block], unknown[block], bins, before + done)
        done += used
        size = _BLOCK if used < len(found[block]) else min(2 * size, _LARGEST_BLOCK)
    return state


def _advance_block(
    state: DriftState, found: Integers, unknown: npt.NDArray[np.bool_], bins: Reference, before: int
) -> tuple[DriftState, int]:
    """The state after the block, or after the first image in it at which the state changes; and how many that is."""
    hits = np.eye(len(bins.gaps))[found]
    recent = [_fade(np.array(row), hits, memory) for row, memory in zip(state.recent, MEMORY, strict=True)]
    counts, stakes, evidence = _wager(state.counts, state.log_stakes, found, recent, bins)
    t = state.images + 1.0 + np.arange(len(found))
    alarm = evidence >= -math.log(FALSE_ALARM_RATE)
    calm = t >= CALM if state.drifted else np.zeros(len(found), bool)
    stops = np.flatnonzero(alarm | calm)
    last = int(stops[0]) if len(stops) else len(found) - 1
    after = replace(
        state,
        recent=tuple(tuple(row[last + 1].tolist()) for row in recent),
        recent_unknown=float(
            _fade(np.array([state.recent_unknown]), unknown[:, None].astype(np.float64), MEMORY[-1])[last + 1, 0]
        ),
        whole=_longer(state.whole, found[: last + 1], [row[: last + 2] for row in recent], bins),
    )
    if alarm[last]:
        if not state.drifted:
            after = replace(after, drifted=True, alarms=state.alarms + 1, alarm_at=before + last + 1)
        anew = new_state(len(bins.gaps))
        return replace(after, images=0, counts=anew.counts, log_stakes=anew.log_stakes, peak=0.0), last + 1
    after = replace(
        after,
        drifted=state.drifted and not calm[last],
        images=state.images + last + 1,
        counts=tuple(counts[last].astype(int).tolist()),
        log_stakes=tuple(stakes[:, last].tolist()),
        peak=max(state.peak, float(evidence[: last + 1].max())),
    )
    return after, last + 1


def _wager(
    before: Sequence[int], staked: Sequence[float], found: Integers, recent: list[Floats], bins: Reference
) -> tuple[Floats, Floats, Floats]:
    """Bet on each image of a block.

    Args:
        before: [K], counts of the images that the test has seen.
        staked: [E], log stakes after them.
        found: the bin of each image.
        recent: for each memory, [len(found) + 1, K]: what it holds before each image.
        bins: what to compare with.

    Returns:
        after each image: counts [len(found), K], log stakes [E, len(found)] and log evidence [len(found)].
    """
    n, images, rows = int(bins.gaps.sum()), sum(before), np.arange(len(found))
    hits = np.eye(len(bins.gaps))[found]
    counts = np.cumsum(hits, axis=0) + np.array(before)
    p = (bins.gaps + counts - hits) / (n + images + rows)[:, None]  # before each image
    gains = np.log(np.stack([*_tails(p, found), *(_lately(r[:-1], p, found) for r in recent)]) / p[rows, found])
    stakes = _stakes(np.array(staked), gains, images)
    return counts, stakes, np.logaddexp(_log_mean(stakes), -np.log(images + 2.0 + rows))


def _longer(whole: Evidence, found: Integers, recent: list[Floats], bins: Reference) -> Evidence:
    counts, stakes, evidence = _wager(whole.counts, whole.log_stakes, found, recent, bins)
    return Evidence(
        tuple(counts[-1].astype(int).tolist()),
        tuple(np.minimum(stakes[:, -1], _MOST_STAKE).tolist()),
        max(whole.peak, min(float(evidence.max()), _MOST_STAKE)),
    )


def _fade(start: Floats, hits: Floats, memory: int) -> Floats:
    """x_i = (1 - 1 / memory) x_(i-1) + hits_i, with the start before it: [len(hits) + 1, K]."""
    keep = 1 - 1 / memory
    powers = keep ** np.arange(len(hits) + 1.0)[:, None]
    sums: Floats = np.cumsum(np.concatenate([start[None], hits / powers[1:]]), axis=0)
    return sums * powers


def _tails(p: Floats, found: Integers) -> list[Floats]:
    """The probability of each image's bin by the experts for high and for low scores."""
    rows = np.arange(len(found))
    below = np.concatenate([np.zeros((len(p), 1)), np.cumsum(p, axis=1)], axis=1).clip(0, 1)
    above = np.concatenate([np.cumsum(p[:, ::-1], axis=1)[:, ::-1], np.zeros((len(p), 1))], axis=1).clip(0, 1)
    high = [above[rows, found] ** power - above[rows, found + 1] ** power for power in _POWERS]
    return high + [below[rows, found + 1] ** power - below[rows, found] ** power for power in _POWERS]


def _lately(recent: Floats, p: Floats, found: Integers) -> Floats:
    """The probability of each image's bin by the expert that remembers these counts."""
    rows = np.arange(len(found))
    share: Floats = (recent[rows, found] + _PRIOR * p[rows, found]) / (recent.sum(axis=1) + _PRIOR)
    return share


def _stakes(start: Floats, gains: Floats, images: int) -> Floats:
    """log A_t = log(A_(t-1) + 1 / (t (t + 1))) + gain_t, for each expert: [E, block]."""
    t = images + 1.0 + np.arange(gains.shape[1])
    total = np.cumsum(gains, axis=1)
    begun = -np.log(t * (t + 1)) - (total - gains)  # as if put in at the start of the block
    sums: Floats = np.logaddexp.accumulate(np.concatenate([start[:, None], begun], axis=1), axis=1)[:, 1:]
    return sums + total


def _log_mean(values: Floats) -> Floats:
    """log of the mean of exp over the first axis."""
    mean: Floats = np.logaddexp.reduce(values, axis=0) - math.log(len(values))
    return mean


def stability_index(counts: npt.ArrayLike, gaps: npt.ArrayLike) -> float:
    """Population stability index of counts against the ID share of each bin; 0 = the same, 0.25 = a large shift.

    PSI = sum_b (a_b - e_b) ln(a_b / e_b), half an image being added to each bin so that none is empty.
    """
    actual = np.asarray(counts, np.float64) + 0.5
    expected = np.asarray(gaps, np.float64)
    a, e = actual / actual.sum(), expected / expected.sum()
    return float(((a - e) * np.log(a / e)).sum())


def log_evidence(state: DriftState | Evidence) -> float:
    """log M_t; 0 before the first image, and -log(FALSE_ALARM_RATE) raises an alarm."""
    stakes = float(_log_mean(np.array(state.log_stakes)))
    return float(np.logaddexp(stakes, -math.log(sum(state.counts) + 1)))


def quantiles(histogram: Sequence[int], low: float, high: float, bins: Reference, at: Sequence[float]) -> list[float]:
    """Quantiles of a stream from its histogram, interpolated within a bin.

    Args:
        histogram: [B], at least one image.
        low, high: the least and the largest score.
        at: in [0, 1].
    """
    inner = bins.edges.clip(low, high)
    ends = np.concatenate([[low], inner, [high]])
    shares = np.concatenate([[0], np.cumsum(histogram)]) / sum(histogram)
    found: list[float] = np.interp(at, shares, ends).tolist()
    return found


def coarse(histogram: Sequence[int], bins: Reference) -> Integers:
    """A histogram's counts in the bins of the test, [K]."""
    starts = np.concatenate([[0], np.searchsorted(bins.edges, bins.cuts) + 1])
    return np.add.reduceat(np.asarray(histogram, np.int64), starts)
