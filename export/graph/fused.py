"""The graph that is exported: uint8 image in, everything an application needs out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssod_edge.config import DETECTORS, SCORES, Preprocess
from ssod_edge.detect.sums import FittedScore
from ssod_edge.errors import UsageError
from ssod_edge.export.graph.score_graph import FusedScore, linear, score_of_graph
from ssod_edge.training.model import SSODClassifier, normalise


class FusedClassifier(nn.Module):
    """Normalise, backbone, and one linear layer that gives classes, ID logit and a detector's rows together.

    Args:
        model: in evaluation mode; its weights are shared, the last layer's are copied into one of M + 1 + K rows.
        score: which OOD score the graph computes.
        detector: the state of the score's name, whose K rows follow the ID logit's; None for a score of the logits.
        temperature: of `probs` alone.
        features: of `ssod_edge.spec.FEATURE_OUTPUTS`, to be given besides.
    """

    def __init__(
        self,
        model: SSODClassifier,
        score: str,
        detector: FittedScore | None = None,
        temperature: float = 1.0,
        features: Sequence[str] = (),
    ):
        super().__init__()
        if score not in SCORES if detector is None else score != detector.name:
            known = f"one of {', '.join(SCORES)}, or of {', '.join(DETECTORS)} or a sum with its fitted state"
            raise UsageError(f"score must be {known}, got '{score}'")
        self.trunk = _Trunk(model)
        weight, bias = model.head_weight()
        self.score, self.sizes = score, [len(weight) - 1, 1]
        self.fitted = None if detector is None else FusedScore(detector, (weight, bias))
        if self.fitted is not None:
            self.sizes += self.fitted.sizes
            weight = torch.cat([weight, torch.from_numpy(self.fitted.weight)])
            bias = torch.cat([bias, torch.from_numpy(self.fitted.bias)])
        self.head = linear(weight, bias)
        self.temperature, self.features = temperature, tuple(features)
        self.eval()

    def forward(self, image: Tensor, threshold: Tensor, p_scores: Tensor, p_levels: Tensor) -> tuple[Tensor, ...]:
        """uint8 [N, 3, S, S] -> logits [N, M], probs [N, M], id_logit [N], ood_score [N], p_known [N], known bool [N].

        The others are fp32, and so are the features that follow where they were asked for. The inputs beside the image
        are those of `ssod_edge.detect.confidence.verdict_inputs`.
        """
        features = self.trunk(image)
        logits, row, *rows = self.head(features).split(self.sizes, dim=1)
        plain, id_logit = torch.softmax(logits, dim=1), row.squeeze(1)
        if self.fitted is None:
            score = score_of_graph(self.score, logits, plain, id_logit)
        else:
            score = self.fitted(features, logits, plain, id_logit, rows)
        probs = plain if self.temperature == 1 else torch.softmax(logits * (1 / self.temperature), dim=1)
        p_known = torch.where(p_scores >= score[:, None], 1.0, p_levels).amin(dim=1)
        given = {"pooled": features}
        return logits, probs, id_logit, score, p_known, score <= threshold, *(given[name] for name in self.features)


class _Trunk(nn.Module):
    """uint8 [N, 3, S, S] -> features z [N, Dall] in fp32."""

    def __init__(self, model: SSODClassifier):
        super().__init__()
        self.model = model
        self.preprocess: Preprocess = model.preprocess

    def forward(self, image: Tensor) -> Tensor:
        # The normalisation is not folded into the first convolution: its zero padding stands for the mean colour.
        return self.model.features(normalise(image, self.preprocess)).float()
