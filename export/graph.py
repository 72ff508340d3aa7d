"""The graph that is exported: uint8 image in, everything an application needs out."""

from __future__ import annotations

import functools
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ssod_edge.config import DETECTORS, OWN_GEMM, SCORES, Preprocess
from ssod_edge.detectors import TINY, Detector
from ssod_edge.errors import UsageError
from ssod_edge.model import SSODClassifier, normalise
from ssod_edge.ops import ood_score
from ssod_edge.runtime.verify import TOLERANCES, score_tolerance
from ssod_edge.score_sum import FittedScore, ScoreSum

#: A detector whose rounding takes more of verification's tolerance than this is not shipped: an engine adds its own.
MOST_ROUNDING = 0.5


class FusedClassifier(nn.Module):
    """Normalise, backbone, and one linear layer that gives classes, ID logit and a detector's rows together.

    Args:
        model: in evaluation mode; its weights are shared, the last layer's are copied into one of M + 1 + K rows.
        score: which OOD score the graph computes.
        detector: the state of the score's name, whose K rows follow the ID logit's; None for a score of the logits.
    """

    def __init__(self, model: SSODClassifier, score: str, detector: FittedScore | None = None):
        super().__init__()
        if score not in SCORES if detector is None else score != detector.name:
            known = f"one of {', '.join(SCORES)}, or of {', '.join(DETECTORS)} or a sum with its fitted state"
            raise UsageError(f"score must be {known}, got '{score}'")
        self.trunk = _Trunk(model)
        weight, bias = model.head_weight()
        self.sizes = [len(weight) - 1, 1]
        if detector is not None and detector.rows:
            self.sizes.append(detector.rows)
            weight = torch.cat([weight, torch.from_numpy(detector.weight)])
            bias = torch.cat([bias, torch.from_numpy(detector.bias)])
        self.head = _linear(weight, bias)
        self.score = score
        self.fitted: DetectorScore | SumScore | None = None
        if detector is not None:
            self.fitted = DetectorScore(detector) if isinstance(detector, Detector) else SumScore(detector)
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """uint8 [N, 3, S, S] -> logits [N, M], probs [N, M], id_logit [N], ood_score [N], all fp32."""
        features = self.trunk(image)
        logits, row, *more = self.head(features).split(self.sizes, dim=1)
        probs, id_logit = torch.softmax(logits, dim=1), row.squeeze(1)
        if self.fitted is None:
            score = score_of_graph(self.score, logits, probs, id_logit)
        else:
            score = self.fitted(features, logits, probs, id_logit, more[0] if more else None)
        return logits, probs, id_logit, score


class DetectorScore(nn.Module):
    """What `ssod_edge.detectors.Detector.score` computes, from what the fused Gemm gives."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.name, self.numbers = detector.name, dict(detector.numbers)
        self.has_center = bool(detector.center.size)
        self.register_buffer("center", torch.from_numpy(np.array(detector.center)))
        self.register_buffer("bias", torch.from_numpy(np.array(detector.bias)))
        # Their rows read changed features, and the classes those of the plain ones: no row can serve both.
        self.own = None
        if detector.name in OWN_GEMM:
            self.own = _linear(torch.from_numpy(detector.weight), torch.zeros(len(detector.bias)))

    def forward(self, features: Tensor, logits: Tensor, probs: Tensor, id_logit: Tensor, rows: Tensor | None) -> Tensor:
        """features [N, D], logits and probs [N, M], id_logit [N], rows [N, K] or None -> ood_score [N], all fp32."""
        if self.name == "react":
            return _energy(cast(nn.Linear, self.own)(features.clamp(max=self.numbers["clip"])) + self.bias)
        if self.name in ("ash", "scale"):
            return self._scaled(features, logits)
        assert rows is not None
        if self.name == "knn":
            return 1 - rows.amax(dim=1) / features.square().sum(dim=1).sqrt().clamp(min=TINY)
        if self.name == "vim":
            squared = rows.square().sum(dim=1)
            if self.has_center:
                squared = ((features - self.center).square().sum(dim=1) - squared).clamp(min=0)
            return self.numbers["alpha"] * squared.sqrt() + score_of_graph("energy", logits, probs, logits)
        quadratic = int(self.numbers["quadratic"])
        distances, classes = rows.split([quadratic, rows.shape[1] - quadratic], dim=1)
        distance = distances.square().sum(dim=1)
        if self.has_center:
            distance = self.numbers["scale"] * (features - self.center).square().sum(dim=1) - distance
        return distance + classes.amin(dim=1)

    def _scaled(self, features: Tensor, logits: Tensor) -> Tensor:
        """k is fixed, so that TopK has a shape that every engine knows when it builds."""
        kth = features.topk(int(self.numbers["k"]), dim=1).values[:, -1:]
        kept = torch.where(features >= kth, features, torch.zeros_like(features))
        factor = (features.relu().sum(dim=1, keepdim=True) / kept.relu().sum(dim=1, keepdim=True).clamp(min=TINY)).exp()
        product = logits - self.bias if self.own is None else cast(nn.Linear, self.own)(kept)
        return _energy(factor * product + self.bias)


class SumScore(nn.Module):
    """What `ssod_edge.score_sum.ScoreSum.score` computes, from what the fused Gemm gives."""

    def __init__(self, score: ScoreSum):
        super().__init__()
        self.scales = dict(score.scales)
        self.sizes = [detector.rows for detector in score.detectors.values()]
        self.fitted = nn.ModuleDict({name: DetectorScore(detector) for name, detector in score.detectors.items()})

    def forward(self, features: Tensor, logits: Tensor, probs: Tensor, id_logit: Tensor, rows: Tensor | None) -> Tensor:
        """As `DetectorScore.forward`; the rows are those of its detectors, one after the other."""
        cut = rows.split([size for size in self.sizes if size], dim=1) if rows is not None else ()
        parts = iter(cut)
        own = {name: next(parts) if size else None for name, size in zip(self.fitted, self.sizes, strict=True)}
        terms = []
        for name, scale in self.scales.items():
            if name in own:
                value = self.fitted[name](features, logits, probs, id_logit, own[name])
            else:
                value = score_of_graph(name, logits, probs, id_logit)
            terms.append(scale * value)
        return functools.reduce(torch.add, terms)


def lost_to_rounding(detector: Detector, features: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """The largest error of a detector in fp32, in units of what verification allows.

    Behind a network whose features hardly vary within their classes, some are small differences of large numbers.

    Args:
        features: [n, D], of images that the detector was not fitted on.
        logits: [n, M].
    """
    exact, z, x = detector.score(features, logits), torch.from_numpy(features), torch.from_numpy(logits)
    with torch.no_grad():
        rows = F.linear(z, *map(torch.from_numpy, (detector.weight, detector.bias))) if detector.rows else None
        found = DetectorScore(detector)(z, x, torch.softmax(x, dim=1), x[:, 0], rows).numpy()
    tolerance = score_tolerance(detector.name, exact, TOLERANCES["fp32"].logit)
    return float(np.abs(found - exact).max()) / tolerance if tolerance > 0 else 0.0


def _energy(logits: Tensor) -> Tensor:
    """-logsumexp, without overflow in any engine."""
    return torch.softmax(logits, dim=1).amax(dim=1).log() - logits.amax(dim=1)


def score_of_graph(name: str, logits: Tensor, probs: Tensor, id_logit: Tensor) -> Tensor:
    """`ssod_edge.ops.ood_score` in as few small operations as the engines need: each costs about a microsecond.

    max log_softmax is the logarithm of the largest probability, which is at least 1/M and has been computed anyway.
    msp has no such short cut: 1 - max(probs) is a difference that vanishes when the network is sure.
    """
    if name == "energy":
        return probs.amax(dim=1).log() - logits.amax(dim=1)
    if name == "posterior":
        return F.softplus(-id_logit) - probs.amax(dim=1).log()
    return ood_score(name, logits, id_logit)


class _Trunk(nn.Module):
    """uint8 [N, 3, S, S] -> pooled features z [N, D] in fp32."""

    def __init__(self, model: SSODClassifier):
        super().__init__()
        self.backbone = model.backbone
        self.preprocess: Preprocess = model.preprocess

    def forward(self, image: Tensor) -> Tensor:
        # The normalisation is not folded into the first convolution: its zero padding stands for the mean colour.
        backbone = cast(Any, self.backbone)
        x = normalise(image, self.preprocess)
        return cast(Tensor, backbone.forward_head(backbone.forward_features(x), pre_logits=True)).float()


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer
