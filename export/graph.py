"""The graph that is exported: uint8 image in, everything an application needs out."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssod_edge.config import SCORES, Preprocess, ScoreName
from ssod_edge.errors import UsageError
from ssod_edge.model import SSODClassifier, normalise
from ssod_edge.ops import ood_score


class FusedClassifier(nn.Module):
    """Normalise, backbone, and one linear layer of M+1 rows that gives classes and ID logit together.

    Args:
        model: in evaluation mode; its weights are shared, the last layer's are copied into one.
        score: which OOD score the graph computes.
    """

    def __init__(self, model: SSODClassifier, score: ScoreName):
        super().__init__()
        if score not in SCORES:
            raise UsageError(f"score must be one of {', '.join(SCORES)}, got '{score}'")
        self.trunk = _Trunk(model)
        self.head = _linear(*model.head_weight())
        self.score = score
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """uint8 [N, 3, S, S] -> logits [N, M], probs [N, M], id_logit [N], ood_score [N], all fp32."""
        fused = self.head(self.trunk(image))
        logits, row = fused.split([fused.shape[1] - 1, 1], dim=1)
        probs, id_logit = torch.softmax(logits, dim=1), row.squeeze(1)
        return logits, probs, id_logit, score_of_graph(self.score, logits, probs, id_logit)


def score_of_graph(name: ScoreName, logits: Tensor, probs: Tensor, id_logit: Tensor) -> Tensor:
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
