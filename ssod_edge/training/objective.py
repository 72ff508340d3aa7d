"""What training minimises: cross-entropy, and what teaches the network to know what it does not know."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ssod_edge.config import LossConfig
from ssod_edge.detect.made_images import make_for_training
from ssod_edge.errors import UsageError
from ssod_edge.ops import background_norm, ood_loss, sample_patches
from ssod_edge.training.model import SSODClassifier, normalise

#: Of the size of background features (arXiv 2510.12259).
NORM_WEIGHT = 0.05


class TrainStep(nn.Module):
    """uint8 images and labels -> the loss of Eq. 14 with the terms of `LossConfig`, and what there is to log.

    A module of its own so that DistributedDataParallel and torch.compile see the whole step.

    Args:
        class_weights: float [classes], how much the cross-entropy of an image of each class counts; None: alike.
    """

    class_weights: Tensor | None

    def __init__(
        self, model: SSODClassifier, config: LossConfig, precision: str = "fp32", kernel: str = "auto",
        class_weights: Tensor | None = None,
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("class_weights", class_weights, persistent=False)
        if config.labels_patches and model.no_patches:
            raise UsageError(
                f"--method {config.method} labels the patches of a feature map, and '{model.backbone_name}' has none: "
                f"{model.no_patches}. Train with made outliers (--method ce --outliers rotate,shuffle,zoom,blend), or "
                "choose a CNN"
            )
        self.model = model
        self.config = config
        self.kernel = kernel
        self.autocast_dtype = torch.bfloat16 if precision == "bf16" else None

    def forward(self, image: Tensor, target: Tensor, warm: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """image uint8 [N + K, 3, S, S], target int64 [N]; before it is warm, the loss is cross-entropy alone.

        The last K images are negatives. Where there are any, half as many images are made.
        """
        config, n, negatives = self.config, len(target), len(image) - len(target)
        outliers = warm and (config.trains_row_on_outliers or negatives > 0)
        if not warm:
            image = image[:n]
        elif config.trains_row_on_outliers:
            share = config.outlier_share / 2 if negatives else config.outlier_share
            image = torch.cat([image, make_for_training(image[:n], config.outliers, max(1, round(share * n)))])
        patches = n if warm and config.labels_patches else 0
        x = normalise(image, self.model.preprocess).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            pooled, z = self.model.forward_train(x, patches)
            logits = self.model.classifier(pooled[:n])
        loss = F.cross_entropy(logits.float(), target, self.class_weights)
        log = {"ce": loss.detach(), "correct": (logits.detach().argmax(1) == target).sum()}
        if z is not None:
            extra, stats = self._patch_terms(z, target)
            loss, log = loss + extra, {**log, **stats}
        if outliers:
            term = outlier_loss(self.model.head(pooled)[1], n)
            loss, log["outlier"] = loss + term, term.detach()
        return loss, log

    def _patch_terms(self, z: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What patch features [N, H, W, D] add to the loss."""
        config, classifier, row = self.config, self.model.classifier, self.model.ood
        bias = classifier.bias if classifier.bias is not None else classifier.weight.new_zeros(len(self.model.classes))
        total, log = z.new_zeros((), dtype=torch.float32), {}
        # Sampled once, whatever reads it: it is a product with all classes.
        ood_weight, ood_bias = (row.weight, row.bias) if config.trains_row_on_patches else (None, None)
        sampled = sample_patches(z, classifier.weight, bias, ood_weight, ood_bias, target, config.gamma, self.kernel)
        if config.shrinks_background:
            norm, stats = background_norm(z, sampled[1])
            total, log = total + NORM_WEIGHT * norm, {**stats, "norm": norm.detach()}
        if config.trains_row_on_patches:
            ood, stats = ood_loss(sampled, target, config.patch_balance, math.prod(z.shape[1:-1]))
            total, log = total + config.alpha * ood, {**log, "ood": ood.detach(), **stats}
        return total, log


def class_weights(labels: NDArray[np.int64], kind: str) -> Tensor | None:
    """What an image of each class counts in the cross-entropy.

    Args:
        labels: int64 [n], of the training images; every class is among them.
        kind: "balanced" gives n / (classes * images of the class), so that all classes count alike; "none".

    Returns:
        float32 [classes], a mean of 1 over images; None where all count alike.
    """
    counts = np.bincount(labels)
    if kind == "none" or counts.min() == counts.max():
        return None
    return torch.from_numpy(len(labels) / (len(counts) * counts)).float()


def outlier_loss(id_logit: Tensor, n: int) -> Tensor:
    """Binary cross-entropy of the ID logit on whole images: half the mean over known ones, half over the others.

    The balance is that of LWB (the paper's Table 5). Every process has as many of each, so means of means are exact.

    Args:
        id_logit: [N], of the fused head on pooled features.
        n: the first n are training images, the others were made, or are negatives.
    """
    return 0.5 * (F.softplus(-id_logit[:n]).mean() + F.softplus(id_logit[n:]).mean())
