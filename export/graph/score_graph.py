"""The end of the fused graph: a fitted score, a detector's or a sum's, in few operations.

An operation on a few hundred numbers costs an engine microseconds, however little it computes (docs/lab/results.md). So
factors and the OOD row, which are linear, are folded into rows of the Gemm; squares that differ in sign are added at
once; and the energy, which ViM holds too, is computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ssod_edge.detect.detectors import TINY, UNIT_LENGTH, Array, Detector
from ssod_edge.detect.rows import residual_factors, sum_numbers, unit_rows
from ssod_edge.detect.scores import GEN_CLASSES, GEN_GAMMA
from ssod_edge.detect.sums import SHARPNESS, FittedScore, ScoreSum
from ssod_edge.runtime.verify import TOLERANCES, score_tolerance

#: A detector whose rounding takes more of verification's tolerance than this is not shipped: an engine adds its own.
MOST_ROUNDING = 0.5


class FusedScore(nn.Module):
    """What `Detector.score` and `ScoreSum.score` compute, from what the fused Gemm gives.

    Args:
        score: a detector, or a sum with the states of its parts.
        head: weight [M+1, D] and bias [M+1] of the Gemm, the OOD row last.

    Attributes:
        weight, bias: float32 [K, D] and [K], the rows that it adds to the Gemm; K = `score.rows`.
        sizes: how these rows are cut into the blocks that `forward` reads, in their order.
    """

    def __init__(self, score: FittedScore, head: tuple[Tensor, Tensor]):
        super().__init__()
        self.one_sided = isinstance(score, ScoreSum) and bool(score.centers)
        if isinstance(score, Detector):
            parts = [_Plain({score.name: score}, {score.name: 1.0}, head)]
        elif not score.centers:
            parts = [_Plain(score.detectors, score.scales, head)]
        else:
            parts = [_Plain(_only(name, score.detectors), {name: 1.0}, head) for name in score.scales]
            for name, values in zip(("factors", "offsets"), sum_numbers(score), strict=True):
                self.register_buffer(name, torch.from_numpy(values))
        self.parts = nn.ModuleList(parts)
        self.weight = np.concatenate([part.weight for part in parts])
        self.bias = np.concatenate([part.bias for part in parts])
        self.sizes = [size for part in parts for size in part.sizes]

    def forward(
        self, features: Tensor, logits: Tensor, probs: Tensor, id_logit: Tensor, rows: Sequence[Tensor]
    ) -> Tensor:
        """features [N, D], logits and probs [N, M], id_logit [N], rows by `sizes` -> ood_score [N], all fp32."""
        blocks, found = list(rows), []
        for part in cast(Iterable[_Plain], self.parts):
            own, blocks = blocks[: len(part.sizes)], blocks[len(part.sizes) :]
            found.append(part(features, logits, probs, id_logit, own))
        if not self.one_sided:
            return found[0]
        standardised = torch.stack(found, dim=1) * cast(Tensor, self.factors) + cast(Tensor, self.offsets)
        return F.softplus(standardised).sum(dim=1) * (1 / SHARPNESS)


class _Plain(nn.Module):
    """The plain sum of scores, each times its factor; of one, that score.

    Args:
        parts: name -> state, for the scores that have one.
        scales: name -> factor of each score.
        head: see `FusedScore`, and there for the attributes.
    """

    def __init__(self, parts: dict[str, Detector], scales: dict[str, float], head: tuple[Tensor, Tensor]):
        super().__init__()
        free = {name: scale for name, scale in scales.items() if name not in parts}
        distances = [(parts[name], scale) for name, scale in scales.items() if name in ("mahalanobis", "rmd")]
        terms: list[_Term] = []
        if distances:
            terms.append(_squares(distances))
            lowest = [_Lowest(*distance) for distance in distances]
            if "ssod" in free:
                lowest[0].add_row(-free.pop("ssod"), *head)
            terms += lowest
        terms += [_residual(parts[name], scales[name]) for name in ("vim", "residual") if name in parts]
        if "vim" in parts:
            free["energy"] = free.get("energy", 0.0) + scales["vim"]
        terms += [_UnitLength(parts[name], scales[name]) for name in parts if name in UNIT_LENGTH]
        self.terms, self.free = nn.ModuleList(terms), free
        none = np.zeros((0, head[0].shape[1]), np.float32)
        self.weight = np.concatenate([none, *(term.weight for term in terms)])
        self.bias = np.concatenate([none[:, 0], *(term.bias for term in terms)])
        self.sizes = [len(term.bias) for term in terms]

    def forward(
        self, features: Tensor, logits: Tensor, probs: Tensor, id_logit: Tensor, rows: Sequence[Tensor]
    ) -> Tensor:
        """As `FusedScore.forward`."""
        found = [term(features, own) for term, own in zip(self.terms, rows, strict=True)]
        for name, scale in self.free.items():
            found.append(_times(scale, score_of_graph(name, logits, probs, id_logit)))
        return functools.reduce(torch.add, found)


class _Term(nn.Module):
    """A part of a score. Attributes: the rows it adds to the Gemm, weight [K, D] and bias [K]."""

    def __init__(self, weight: Array, bias: Array):
        super().__init__()
        self.weight, self.bias = weight.astype(np.float32), bias.astype(np.float32)

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        """[N, D] and [N, K] -> [N]."""
        raise NotImplementedError


class _Squares(_Term):
    """sum of factors * y^2 over its rows y and, with a center, z - center before them; with `root` its root."""

    def __init__(self, weight: Array, bias: Array, factors: Array, center: Array, start: int = 0, root: bool = False):
        super().__init__(weight, bias)
        self.start = start
        self.centered, self.root, self.plain = bool(center.size), root, bool((factors == 1).all())
        self.register_buffer("center", torch.from_numpy(np.array(center)))
        self.register_buffer("factors", torch.from_numpy(factors.astype(np.float32)))

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        y = rows
        if self.centered:
            y = torch.cat([_from(self.start, features) - cast(Tensor, self.center), y], dim=1)
        total = (y * y if self.plain else y * cast(Tensor, self.factors) * y).sum(dim=1)
        return total.clamp(min=0).sqrt() if self.root else total


def _squares(distances: list[tuple[Detector, float]]) -> _Squares:
    """The quadratic rows of Mahalanobis distances, each distance times its factor."""
    weights, biases, factors, center, start = [], [], [], np.zeros(0, np.float32), 0
    for detector, scale in distances:
        rows = int(detector.numbers["quadratic"])
        weights.append(detector.weight[:rows])
        biases.append(detector.bias[:rows])
        sign = -scale if detector.center.size else scale
        factors.append(np.full(rows, sign))
        if detector.center.size:
            center, start = detector.center, detector.start
            factors.insert(0, np.full(len(center), scale * detector.numbers["scale"]))
    return _Squares(np.concatenate(weights), np.concatenate(biases), np.concatenate(factors), center, start)


def _residual(detector: Detector, scale: float) -> _Squares:
    """ViM without its energy, or the distance alone."""
    factors = residual_factors(detector, scale)
    return _Squares(detector.weight, detector.bias, factors, detector.center, detector.start, root=True)


class _Lowest(_Term):
    """The class rows of a Mahalanobis distance, times a factor."""

    def __init__(self, distance: Detector, scale: float):
        rows = int(distance.numbers["quadratic"])
        super().__init__(scale * distance.weight[rows:], scale * distance.bias[rows:])

    def add_row(self, scale: float, weight: Tensor, bias: Tensor) -> None:
        """Add the last row of a linear layer: it is the same for all classes, so that the minimum moves by it."""
        self.weight = self.weight + np.float32(scale) * weight[-1].detach().numpy()
        self.bias = self.bias + np.float32(scale) * bias[-1].detach().numpy()

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        return rows.amin(dim=1)


class _UnitLength(_Term):
    """A detector of features at length 1, times a factor. Its bias is added after the division by their length."""

    def __init__(self, detector: Detector, scale: float):
        rows = unit_rows(detector, scale)
        super().__init__(rows.weight, np.zeros(len(rows.weight), np.float32))
        self.quadratic, self.start, self.minus = rows.quadratic, detector.start, detector.name == "mahalanobispp"
        self.register_buffer("constant", torch.from_numpy(rows.constant))

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(_from(self.start, features), dim=1, keepdim=True).clamp(min=TINY)
        u, constant = rows / length, cast(Tensor, self.constant)
        if not self.quadratic:
            return (u + constant).amin(dim=1)
        y, classes = u.split([self.quadratic, len(constant)], dim=1)
        lowest, squares = (classes + constant).amin(dim=1), (y * y).sum(dim=1)
        return lowest - squares if self.minus else lowest + squares


def lost_to_rounding(detector: Detector, features: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """The largest error of a detector in fp32, in units of what verification allows.

    Behind a network whose features hardly vary within their classes, some are small differences of large numbers.

    Args:
        features: [n, D], of images that the detector was not fitted on.
        logits: [n, M].
    """
    exact, z, x = detector.score(features, logits), torch.from_numpy(features), torch.from_numpy(logits)
    with torch.no_grad():
        fused = FusedScore(detector, (torch.zeros(1, z.shape[1]), torch.zeros(1)))
        rows = F.linear(z, torch.from_numpy(fused.weight), torch.from_numpy(fused.bias)).split(fused.sizes, dim=1)
        found = fused(z, x, torch.softmax(x, dim=1), x[:, 0], rows).numpy()
    tolerance = score_tolerance(detector.name, exact, TOLERANCES["fp32"].logit)
    return float(np.abs(found - exact).max()) / tolerance if tolerance > 0 else 0.0


def score_of_graph(name: str, logits: Tensor, probs: Tensor, id_logit: Tensor) -> Tensor:
    """A score of `ssod_edge.detect.scores.ood_scores` in few operations; larger = more likely OOD.

    max log_softmax is the logarithm of the largest probability, which is at least 1/M and has been computed anyway.
    msp has no such short cut: 1 - max(probs) is a difference that vanishes when the network is sure.

    Args:
        name: of `ssod_edge.config.SCORES`.
        logits, probs: fp32 [N, M], M >= 2.
        id_logit: fp32 [N].

    Returns:
        fp32 [N].
    """
    if name == "ssod":
        return -id_logit
    if name == "maxlogit":
        return -logits.amax(dim=1)
    if name == "energy":
        return _energy(logits, probs)
    if name == "gen":
        return _generalised_entropy(logits, probs)
    if name == "posterior":
        return F.softplus(-id_logit) - probs.amax(dim=1).log()
    top, index = logits.max(dim=1)
    winner = F.one_hot(index, logits.shape[1]).to(torch.bool)
    return torch.logsumexp(logits.masked_fill(winner, -torch.inf), dim=1) - top


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer of copies of these, [K, D] and [K]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def _energy(logits: Tensor, probs: Tensor | None = None) -> Tensor:
    """-logsumexp, without overflow in any engine."""
    probs = torch.softmax(logits, dim=1) if probs is None else probs
    return probs.amax(dim=1).log() - logits.amax(dim=1)


def _generalised_entropy(logits: Tensor, probs: Tensor) -> Tensor:
    """GEN. 1 - p is taken from the other classes where p > 0.5: of a sure network it would be 0, and its power not.

    p^gamma comes from its logarithm, because it is a number where p is none in fp32.
    """
    sure = probs > 0.5
    others = probs.masked_fill(sure, 0.0).sum(dim=1, keepdim=True)
    rest = torch.where(sure, others, 1 - probs)
    terms = (GEN_GAMMA * torch.log_softmax(logits, dim=1)).exp() * rest.pow(GEN_GAMMA)
    if terms.shape[1] > GEN_CLASSES:  # a term is the larger, the larger p
        terms = terms.topk(GEN_CLASSES, dim=1).values
    return terms.sum(dim=1)


def _from(start: int, features: Tensor) -> Tensor:
    """[N, D] -> [N, D - start]."""
    return features[:, start:] if start else features


def _only(name: str, states: dict[str, Detector]) -> dict[str, Detector]:
    return {name: states[name]} if name in states else {}


def _times(scale: float, score: Tensor) -> Tensor:
    return score if scale == 1 else scale * score
