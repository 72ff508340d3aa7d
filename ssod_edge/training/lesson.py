"""Learning from maps that are computed once: the last layer, and what makes a part of its features, together."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssod_edge.config import ClassWeights
from ssod_edge.data.sources import ImageSource
from ssod_edge.data.splits import Indices
from ssod_edge.detect.regression import LEAST_DEVIATION
from ssod_edge.errors import TrainingError, UsageError
from ssod_edge.training.batches import load_batches
from ssod_edge.training.features import BATCH, Features, Versions
from ssod_edge.training.model import SSODClassifier, normalise
from ssod_edge.training.objective import class_weights

#: Bytes that maps may take in memory.
MOST_BYTES = 3 * 2**30
#: Versions of an image: as it is, mirrored, and disturbed.
PLAIN, MIRRORED, DISTURBED = range(3)
VERSIONS = 3

Advance = Callable[[int], None]


class _ThreeVersions(Versions):
    """(uint8 [3, 3, S, S]: `PLAIN`, `MIRRORED`, `DISTURBED`; label, index)."""

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        (plain, disturbed), label, index = super().__getitem__(position)
        return torch.stack([plain, plain.flip(2), disturbed]), label, index


def versions_of(
    model: SSODClassifier, source: ImageSource, workers: int, advance: Advance
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of all images of a source, for a model: (normalised [n * 3, 3, S, S], the versions of an image one after
    the other; int64 [n], which images); arguments and errors as for `Further.read`.
    """
    device = model.classifier.weight.device
    for versions, _, index in load_batches(_ThreeVersions(source, None, model.preprocess), workers, batch_size=BATCH):
        x = normalise(versions.flatten(0, 1).to(device), model.preprocess)
        yield x.contiguous(memory_format=torch.channels_last), index
        advance(len(index))


def check_room(size: int, images: int) -> None:
    """Raises UsageError where maps of so many bytes, of so many images, do not fit into `MOST_BYTES`."""
    if size > MOST_BYTES:
        raise UsageError(
            f"the maps of {images} images take more than {MOST_BYTES // 2**30} GB. Use --tune head or all, or a "
            "smaller --size"
        )


def in_half(maps: Tensor) -> Tensor:
    """Maps in half precision, on the CPU; raises UsageError where they do not fit into it."""
    found = maps.half().cpu()
    if not found.isfinite().all():
        raise UsageError("the maps of the network are too large for half precision. Use --tune head or all")
    return found


@dataclass(frozen=True)
class Lesson:
    """What is learnt.

    Attributes:
        labels: int64 [N], of the source.
        train: which images.
        seed: of their order and versions.
        class_weights: of `ssod_edge.config.ClassWeights`.
        versions: of an image, that are drawn from.
    """

    labels: Indices
    train: Indices
    seed: int = 0
    class_weights: ClassWeights = "none"
    versions: tuple[int, ...] = (PLAIN, MIRRORED, DISTURBED)


@dataclass(frozen=True)
class Pace:
    """How it is learnt, by AdamW and one cycle of the rate.

    Attributes:
        epochs: passes over the images.
        rate, decay: of the optimizer.
        head_rate: of the last layer, which was fitted already.
        batch: images of a step.
    """

    epochs: int
    rate: float
    decay: float
    head_rate: float
    batch: int = 64


class Further(ABC):
    """What `train --tune` may teach beyond the last layer: a part of a model, and the maps that it learns from.

    Args:
        model: nothing was taught beyond its last layer.
        images: how many.

    Raises:
        UsageError: the model has no such part, or there is no room for the maps.

    Attributes:
        name: of `ssod_edge.config.Tune`.
        what: the part, in words.
        pace: how it learns.
    """

    name: str
    what: str
    pace: Pace

    @abstractmethod
    def __init__(self, model: SSODClassifier, images: int): ...

    @abstractmethod
    def read(self, source: ImageSource, workers: int, advance: Advance) -> Features:
        """Keep the maps of all images of a source; returns the features of the model as it is.

        Args:
            workers: processes that read photos.
            advance: called with the size of each finished batch.

        Raises:
            UsageError: a value is beyond half precision.
            ImageError: an image cannot be read.
        """

    @abstractmethod
    def learn(
        self, features: Features, lesson: Lesson, finished: Callable[[int, float], None], advance: Advance
    ) -> None:
        """Train the part and the last layer, from what they are; other arguments and errors as for `learn`.

        Args:
            features: that `read` returned, and the last layer was fitted to.
        """

    @abstractmethod
    def features(self) -> Features:
        """Of all images, by the model as it is now."""


@dataclass
class Standardised:
    """A last layer that is learnt on features of mean 0 and deviation 1: they differ in size by stage.

    Attributes:
        mean, deviation: of the features, [D].
        weight, bias: of the layer on them, [M, D] and [M].
    """

    mean: Tensor
    deviation: Tensor
    weight: nn.Parameter
    bias: nn.Parameter

    @classmethod
    def of(cls, layer: nn.Linear, features: Features, train: Indices) -> Standardised:
        """A layer's last inputs, by the images that are learnt from and their disturbed copies.

        Args:
            features: the last D of the layer's inputs.
        """
        both = np.concatenate([features.plain[train], features.disturbed[train]])
        moments = both.mean(axis=0), np.maximum(both.std(axis=0), LEAST_DEVIATION)
        mean, deviation = (torch.from_numpy(part).to(layer.weight.device) for part in moments)
        with torch.no_grad():
            weight = layer.weight[:, -len(mean) :]
            bias = layer.bias + weight @ mean
            return cls(mean, deviation, nn.Parameter(weight * deviation), nn.Parameter(bias.clone()))

    def logits(self, z: Tensor) -> Tensor:
        """[N, D] -> [N, M]."""
        return F.linear((z - self.mean) / self.deviation, self.weight, self.bias)

    @torch.no_grad()
    def put_back(self, layer: nn.Linear) -> None:
        """Give the layer what was learnt, on features as they are."""
        weight = self.weight / self.deviation
        layer.weight[:, -len(self.mean) :] = weight
        layer.bias.copy_(self.bias - weight @ self.mean)


def learn(
    lesson: Lesson,
    pace: Pace,
    parameters: Sequence[nn.Parameter],
    head: Standardised,
    logits: Callable[[Tensor, Tensor], Tensor],
    finished: Callable[[int, float], None],
    advance: Advance,
) -> None:
    """Minimise the cross-entropy of images in a drawn version each.

    Args:
        parameters: that learn, beside the last layer's.
        head: the last layer.
        logits: [n, M] of images [n] in versions [n], one of `PLAIN`, `MIRRORED`, `DISTURBED` each.
        finished: called after each epoch, with its number from 1 and its mean loss.
        advance: called after each step, with the number of its images.

    Raises:
        TrainingError: the loss is not finite.
    """
    train, device = lesson.train, head.weight.device
    own, all_parameters = [head.weight, head.bias], [*parameters, head.weight, head.bias]
    groups = [{"params": list(parameters)}, {"params": own, "lr": pace.head_rate}]
    optimizer = torch.optim.AdamW(groups, lr=pace.rate, weight_decay=pace.decay)
    rng, target = np.random.default_rng(lesson.seed), torch.from_numpy(np.asarray(lesson.labels))
    by_class = class_weights(lesson.labels[train], lesson.class_weights)
    by_class = None if by_class is None else by_class.to(device)
    size = min(pace.batch, len(train))
    steps = pace.epochs * (len(train) // size)
    rates = [pace.rate, pace.head_rate]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    for epoch in range(1, pace.epochs + 1):
        order, total = rng.permutation(train), 0.0
        for start in range(0, len(order) - size + 1, size):
            index = torch.from_numpy(order[start : start + size])
            version = torch.from_numpy(rng.choice(lesson.versions, size))
            loss = F.cross_entropy(logits(index, version), target[index].to(device), by_class)
            if not math.isfinite(float(loss.detach())):
                raise TrainingError(f"the loss is {float(loss.detach())} in epoch {epoch}. Use --tune head")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(all_parameters, 5.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * size
            advance(size)
        finished(epoch, total / (len(order) // size * size))
