"""Gentle tuning: blocks above a border learn with all norms frozen, on maps of the border that are computed once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ssod_edge.config import ClassWeights
from ssod_edge.data.sources import ImageSource
from ssod_edge.data.splits import Indices
from ssod_edge.detect.regression import LEAST_DEVIATION
from ssod_edge.errors import TrainingError, UsageError
from ssod_edge.training.batches import load_batches
from ssod_edge.training.features import BATCH, Features, Versions
from ssod_edge.training.folding import folded
from ssod_edge.training.model import SSODClassifier, normalise
from ssod_edge.training.objective import class_weights
from ssod_edge.training.stages import Place, maps_until, pooled, stage_maps

#: The first stage of this reduction of the input's side is the border: it, and what comes before, stays as published.
BORDER_REDUCTION = 16
#: Bytes that the maps of the border may take in memory.
MOST_BYTES = 3 * 2**30
EPOCHS, LEARNING_RATE, WEIGHT_DECAY, BATCH_SIZE = 4, 5e-4, 0.01, 64
#: Versions of an image: as it is, mirrored, and disturbed.
PLAIN, MIRRORED, DISTURBED = range(3)
VERSIONS = 3


@dataclass(frozen=True)
class Cut:
    """A network in two parts.

    Attributes:
        below, above: which of the model's places lie up to the border, the last of them, and beyond it.
        shape: [C, h, w] of the border's map.
        view: a view of the backbone that shares its parameters, and in which all that computes the border's map is the
            identity, so that it takes that map in place of an image.
    """

    below: tuple[Place, ...]
    above: tuple[Place, ...]
    shape: tuple[int, ...]
    view: nn.Module

    def features(self, border_map: Tensor, below: Tensor) -> Tensor:
        """z [N, Dall] of maps [N, C, h, w] and the pooled means of the stages up to there [N, Dbelow]."""
        last, maps = stage_maps(self.view, border_map, self.above)
        z = cast(Any, self.view).forward_head(last, pre_logits=True)
        return torch.cat([below, *map(pooled, maps), z], dim=1)


def cut(model: SSODClassifier) -> Cut:
    """Cut a model whose head reads every stage above the first stage of `BORDER_REDUCTION`.

    Raises:
        UsageError: this backbone computes more before the border than modules that follow each other.
    """
    size, backbone = model.preprocess.input_size, model.backbone.eval()
    x = torch.linspace(-1, 1, 2 * 3 * size * size, device=next(model.parameters()).device).view(2, 3, size, size)
    finished: list[tuple[nn.Module, Any]] = []
    hooks = [m.register_forward_hook(lambda m, _, out: finished.append((m, out))) for m in backbone.modules()]
    try:
        with torch.no_grad():
            _, maps = stage_maps(backbone, x, model.stages)
    finally:
        for hook in hooks:
            hook.remove()
    # A stage: timm can stop there, and nothing beyond it is begun.
    far = [
        m.shape[-1] * BORDER_REDUCTION <= size and isinstance(p, int) for p, m in zip(model.stages, maps, strict=True)
    ]
    at = far.index(True) if True in far else None
    ends = [] if at is None else [i for i, (_, out) in enumerate(finished) if out is maps[at]]
    failed = UsageError(f"'{model.backbone_name}' cannot be cut into a lower and an upper part. Use --tune head or all")
    if at is None or not ends:
        raise failed
    done = {id(module) for module, _ in finished[: ends[-1] + 1]}
    below, above, shape = model.stages[: at + 1], model.stages[at + 1 :], tuple(maps[at].shape[1:])
    parts = Cut(below, above, shape, _without(backbone, done))
    try:
        with torch.no_grad():
            found = parts.features(maps[at], torch.cat([pooled(m) for m in maps[: at + 1]], dim=1))
            same = torch.allclose(found, model.features(x), rtol=1e-3, atol=1e-4)
    except (RuntimeError, AttributeError, TypeError, ValueError, IndexError):
        same = False
    if not same or not _trainable(parts.view):
        raise failed
    return parts


def _without(module: nn.Module, done: set[int]) -> nn.Module:
    """A view of a module that shares its parameters, in which these modules are the identity."""
    shared = copy.copy(module)
    shared._modules = {
        name: child if child is None else nn.Identity() if id(child) in done else _without(child, done)
        for name, child in module._modules.items()
    }
    return shared


@dataclass(frozen=True)
class BorderMaps:
    """Of all N images of a source, in three versions: PLAIN, MIRRORED and DISTURBED.

    Attributes:
        maps: float16 [N, 3, C, h, w].
        below: float32 [N, 3, Dbelow].
    """

    maps: Tensor
    below: Tensor

    def at(self, index: Tensor | slice, version: Tensor | int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What `Cut.features` takes, of some images in one version each."""
        border = self.maps[index, version].to(device).float().contiguous(memory_format=torch.channels_last)
        return border, self.below[index, version].to(device)


class _Versions(Versions):
    mirrored = True


def check_maps(parts: Cut, images: int) -> None:
    """Raises UsageError where the maps of so many images do not fit into `MOST_BYTES`."""
    if 2 * VERSIONS * images * math.prod(parts.shape) > MOST_BYTES:
        raise UsageError(
            f"the maps of {images} images take more than {MOST_BYTES // 2**30} GB. Use --tune head or all, or a "
            "smaller --size"
        )


def border_maps(
    model: SSODClassifier, parts: Cut, source: ImageSource, workers: int, advance: Callable[[int], None]
) -> tuple[BorderMaps, Features]:
    """Compute them, and the features of the network as it is, by one pass over the images.

    Args:
        model, parts: of which `check_maps` passes the number of images.
        source: images.
        workers: processes that read photos.
        advance: called with the size of each finished batch.

    Raises:
        UsageError: a value is beyond half precision.
        ImageError: an image cannot be read.
    """
    device, backbone, count = next(model.parameters()).device, folded(model.eval()).backbone, len(source)
    maps = torch.empty((count, VERSIONS, *parts.shape), dtype=torch.float16)
    below: list[Tensor] = []
    features = np.empty((2, count, model.classifier.in_features), np.float32)
    with torch.inference_mode():
        for versions, _, index in load_batches(_Versions(source, None, model.preprocess), workers, batch_size=BATCH):
            x = normalise(versions.flatten(0, 1).to(device), model.preprocess)
            found = maps_until(backbone, x.contiguous(memory_format=torch.channels_last), parts.below)
            border, means = found[-1].unflatten(0, (-1, VERSIONS)), torch.cat([*map(pooled, found)], dim=1)
            means = means.unflatten(0, (-1, VERSIONS))
            maps[index] = border.half().cpu()
            below.append(means.cpu())
            if not maps[index].isfinite().all():
                raise UsageError(
                    "the values between the lower and the upper part are too large for half precision. Use --tune head "
                    "or all"
                )
            for version, rows in zip((PLAIN, DISTURBED), features, strict=True):
                z = parts.features(border[:, version], means[:, version])
                rows[index.numpy()] = z.float().cpu().numpy()
            advance(len(index))
    return BorderMaps(maps, torch.cat(below)), Features(*features)


@dataclass
class Tuning:
    """What `tune_upper` learns with, beside the parameters of the upper part.

    Attributes:
        weight, bias: of the last layer, on features that are standardised by `mean` and `deviation`.
    """

    mean: Tensor
    deviation: Tensor
    weight: nn.Parameter
    bias: nn.Parameter

    def logits(self, z: Tensor) -> Tensor:
        """[N, Dall] -> [N, M]."""
        return F.linear((z - self.mean) / self.deviation, self.weight, self.bias)


@dataclass(frozen=True)
class Lesson:
    """What is learnt.

    Attributes:
        labels: int64 [N], of the source.
        train: which images.
        seed: of their order and versions.
        class_weights: of `ssod_edge.config.ClassWeights`.
        mirror: whether a mirrored image is of the same class.
    """

    labels: Indices
    train: Indices
    seed: int = 0
    class_weights: ClassWeights = "none"
    mirror: bool = True


def tune_upper(
    model: SSODClassifier,
    parts: Cut,
    maps: BorderMaps,
    features: Features,
    lesson: Lesson,
    finished: Callable[[int, float], None],
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Train the upper part and the last layer, from what they are.

    Args:
        model: its upper part and head are changed.
        parts, maps: of it.
        features: of the untouched network, which the last layer was fitted to.
        lesson: what is learnt.
        finished: called after each epoch, with its number from 1 and its mean loss.
        advance: called after each step, with the number of its images.

    Raises:
        TrainingError: the loss is not finite.
    """
    train = lesson.train
    both = np.concatenate([features.plain[train], features.disturbed[train]])
    mean, deviation = both.mean(axis=0), np.maximum(both.std(axis=0), LEAST_DEVIATION)
    device = model.classifier.weight.device
    head = _standardised(model.classifier, *(torch.from_numpy(part).to(device) for part in (mean, deviation)))
    upper = _trainable(parts.view)
    optimizer = torch.optim.AdamW([*upper, head.weight, head.bias], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rng, target = np.random.default_rng(lesson.seed), torch.from_numpy(np.asarray(lesson.labels))
    versions = [PLAIN, MIRRORED, DISTURBED] if lesson.mirror else [PLAIN, DISTURBED]
    by_class = class_weights(lesson.labels[train], lesson.class_weights)
    by_class = None if by_class is None else by_class.to(device)
    size = min(BATCH_SIZE, len(train))
    steps = EPOCHS * (len(train) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    parts.view.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for epoch in range(EPOCHS):
        order, total = rng.permutation(train), 0.0
        for start in range(0, len(order) - size + 1, size):
            index = torch.from_numpy(order[start : start + size])
            version = torch.from_numpy(rng.choice(versions, size))
            logits = head.logits(parts.features(*maps.at(index, version, device)))
            loss = F.cross_entropy(logits, target[index].to(device), by_class)
            if not math.isfinite(float(loss.detach())):
                raise TrainingError(f"the loss is {float(loss.detach())} in epoch {epoch + 1}. Use --tune head")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([*upper, head.weight, head.bias], 5.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * size
            advance(size)
        finished(epoch + 1, total / (len(order) // size * size))
    with torch.no_grad():
        weight = head.weight / head.deviation
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(head.bias - weight @ head.mean)


def tuned_features(parts: Cut, maps: BorderMaps) -> Features:
    """`Features` of the network as it is now."""
    found: list[NDArray[np.float32]] = []
    device = next(parts.view.parameters()).device
    with torch.inference_mode():
        for version in (PLAIN, DISTURBED):
            rows = []
            for start in range(0, len(maps.maps), 2 * BATCH):
                batch = maps.at(slice(start, start + 2 * BATCH), version, device)
                rows.append(parts.features(*batch).cpu().numpy())
            found.append(np.concatenate(rows))
    return Features(*found)


def _standardised(classifier: nn.Linear, mean: Tensor, deviation: Tensor) -> Tuning:
    """A last layer on features as they are, as one on standardised features."""
    with torch.no_grad():
        weight = classifier.weight * deviation
        bias = classifier.bias + classifier.weight @ mean
    return Tuning(mean, deviation, nn.Parameter(weight.clone()), nn.Parameter(bias.clone()))


def _trainable(view: nn.Module) -> list[nn.Parameter]:
    """The parameters above the border but those of norms; the others take no gradient."""
    chosen = []
    for module in view.modules():
        is_norm = isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm))
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(not is_norm)
            if not is_norm:
                chosen.append(parameter)
    return chosen
