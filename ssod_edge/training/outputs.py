"""What a model says of many images: logits, ID logits and pooled features, collected in order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ssod_edge.data.named import Via
from ssod_edge.data.sources import ImageSource
from ssod_edge.data.splits import Indices
from ssod_edge.training.batches import EvalImages, load_batches
from ssod_edge.training.model import SSODClassifier, normalise


@dataclass(frozen=True)
class Outputs:
    """What the model says of N images.

    Attributes:
        logits: float32 [N, M].
        id_logit: float32 [N].
        labels: int64 [N]; -1 where there are none.
        features: float32 [N, D], the pooled features that the last layer reads.
        ms_per_image: time in the network, median over the batches.
    """

    logits: NDArray[np.float32]
    id_logit: NDArray[np.float32]
    labels: NDArray[np.int64]
    features: NDArray[np.float32]
    ms_per_image: float = 0.0

    @property
    def correct(self) -> NDArray[np.bool_]:
        """bool [N]: whether the largest logit is the label's."""
        return self.logits.argmax(axis=1) == self.labels

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in [0, 1]."""
        return float(self.correct.mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy; every image has a label."""
        return float(F.cross_entropy(torch.from_numpy(self.logits), torch.from_numpy(self.labels)))


@torch.no_grad()
def collect(
    model: SSODClassifier,
    source: ImageSource,
    indices: Indices | None = None,
    via: Via | None = None,
    batch_size: int = 64,
    workers: int = 1,
    advance: Callable[[int], None] = lambda n: None,
    watch: Callable[[Tensor], None] | None = None,
) -> Outputs:
    """Run a model in fp32 over images, in order.

    Args:
        model: in any mode; it is left in eval mode.
        source, indices, via: as `EvalImages`.
        advance: called with the size of each finished batch.
        watch: called with each normalised batch [N, 3, S, S], on the model's device.

    Raises:
        ImageError: an image cannot be read.
    """
    model.eval()
    device = next(model.parameters()).device
    parts, times = [], []
    images = EvalImages(source, indices, model.preprocess, via)
    for image, label, _ in load_batches(images, workers, batch_size=batch_size):
        start = time.perf_counter()
        x = normalise(image.to(device), model.preprocess).contiguous(memory_format=torch.channels_last)
        z = model.features(x)
        batch_logits, batch_id = model.head(z)
        read = batch_logits.cpu().numpy()  # waits for the device
        times.append((time.perf_counter() - start) / len(label))
        parts.append((read, batch_id.cpu().numpy(), label.numpy(), z.float().cpu().numpy()))
        if watch is not None:
            watch(x)
        advance(len(label))
    logits, id_logit, labels, features = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Outputs(logits, id_logit, labels, features, 1000 * float(np.median(times)))
