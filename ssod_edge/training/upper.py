"""Gentle tuning: blocks above a border learn with all norms frozen, on maps of the border that are computed once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssod_edge.data.sources import ImageSource
from ssod_edge.errors import UsageError
from ssod_edge.training.features import BATCH, Features
from ssod_edge.training.folding import folded
from ssod_edge.training.lesson import (
    DISTURBED,
    PLAIN,
    VERSIONS,
    Advance,
    Further,
    Lesson,
    Pace,
    Standardised,
    check_room,
    in_half,
    learn,
    versions_of,
)
from ssod_edge.training.model import SSODClassifier
from ssod_edge.training.stages import Place, maps_until, pooled, stage_maps

#: The first stage of this reduction of the input's side is the border: it, and what comes before, stays as published.
BORDER_REDUCTION = 16


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


class UpperBlocks(Further):
    """The blocks above the border of a model."""

    name, what = "upper", "upper blocks"
    pace = Pace(epochs=4, rate=5e-4, decay=0.01, head_rate=5e-4)

    def __init__(self, model: SSODClassifier, images: int):
        self.model, self.parts = model, cut(model)
        check_room(2 * VERSIONS * images * math.prod(self.parts.shape), images)
        self.maps: BorderMaps | None = None

    def read(self, source: ImageSource, workers: int, advance: Advance) -> Features:
        self.maps, features = border_maps(self.model, self.parts, source, workers, advance)
        return features

    def learn(
        self, features: Features, lesson: Lesson, finished: Callable[[int, float], None], advance: Advance
    ) -> None:
        assert self.maps is not None
        parts, maps, layer = self.parts, self.maps, self.model.classifier
        upper, head = _trainable(parts.view), Standardised.of(layer, features, lesson.train)

        def logits(index: Tensor, version: Tensor) -> Tensor:
            return head.logits(parts.features(*maps.at(index, version, layer.weight.device)))

        parts.view.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        learn(lesson, self.pace, upper, head, logits, finished, advance)
        head.put_back(layer)

    def features(self) -> Features:
        assert self.maps is not None
        found: list[NDArray[np.float32]] = []
        device, count = self.model.classifier.weight.device, len(self.maps.maps)
        with torch.inference_mode():
            for version in (PLAIN, DISTURBED):
                batches = (slice(start, start + 2 * BATCH) for start in range(0, count, 2 * BATCH))
                rows = [self.parts.features(*self.maps.at(batch, version, device)).cpu().numpy() for batch in batches]
                found.append(np.concatenate(rows))
        return Features(*found)


def border_maps(
    model: SSODClassifier, parts: Cut, source: ImageSource, workers: int, advance: Advance
) -> tuple[BorderMaps, Features]:
    """Compute them, and the features of the network as it is, by one pass over the images; see `Further.read`."""
    backbone, count = folded(model.eval()).backbone, len(source)
    maps = torch.empty((count, VERSIONS, *parts.shape), dtype=torch.float16)
    below: list[Tensor] = []
    features = np.empty((2, count, model.classifier.in_features), np.float32)
    with torch.inference_mode():
        for x, index in versions_of(model, source, workers, advance):
            found = maps_until(backbone, x, parts.below)
            border, means = found[-1].unflatten(0, (-1, VERSIONS)), torch.cat([*map(pooled, found)], dim=1)
            means = means.unflatten(0, (-1, VERSIONS))
            maps[index] = in_half(border)
            below.append(means.cpu())
            for version, rows in zip((PLAIN, DISTURBED), features, strict=True):
                z = parts.features(border[:, version], means[:, version])
                rows[index.numpy()] = z.float().cpu().numpy()
    return BorderMaps(maps, torch.cat(below)), Features(*features)


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
