"""The maps of a backbone's stages, and their means: what a head reads beside the last features."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssod_edge.errors import UsageError

#: Stages from this reduction of the input's side on are read: those before say little of what is shown.
REDUCTION = 8


def stage_maps(backbone: nn.Module, x: Tensor, stages: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The last feature map of a timm model, and those of some of its stages on the way, by one pass.

    Args:
        backbone: a timm model.
        x: normalised images [N, 3, S, S].
        stages: ascending, of `find_stages`.

    Returns:
        `forward_features`' map; the stages' maps, [N, C, H, W] each.
    """
    model = cast(Any, backbone)
    if not stages:
        return model.forward_features(x), []
    last, maps = model.forward_intermediates(x, indices=list(stages), **_every_block(model))
    return last, maps


def maps_until(backbone: nn.Module, x: Tensor, stages: Sequence[int]) -> list[Tensor]:
    """The stages' maps alone; nothing is computed beyond the last of them."""
    model, options = cast(Any, backbone), _every_block(backbone)
    found = model.forward_intermediates(x, indices=list(stages), stop_early=True, intermediates_only=True, **options)
    return cast(list[Tensor], found)


def pooled(feature_map: Tensor) -> Tensor:
    """The mean over all places, [N, C, H, W] -> [N, C]."""
    return feature_map.mean(dim=(2, 3))


def find_stages(backbone: nn.Module, name: str, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which stages a head reads: all of `REDUCTION` or more, but one whose mean is the last features themselves.

    Args:
        backbone: a timm model; it is as before.
        name: of it, for the error.
        size: of its input, in pixels.

    Returns:
        the stages, ascending; the width of each.

    Raises:
        UsageError: timm gives no maps of this backbone.
    """
    model, was_training = cast(Any, backbone), backbone.training
    if not hasattr(model, "forward_intermediates"):
        raise UsageError(f"timm gives no maps of the stages of '{name}'. Train with --head last")
    backbone.eval()
    try:
        with torch.no_grad():
            x = torch.linspace(-1, 1, 3 * size * size, device=next(backbone.parameters()).device).view(1, 3, size, size)
            last, maps = model.forward_intermediates(x, **_every_block(model))
            z = model.forward_head(last, pre_logits=True)
            usable = isinstance(last, Tensor) and torch.equal(last, model.forward_features(x))
    finally:
        backbone.train(was_training)
    if not usable or not all(m.dim() == 4 for m in maps):
        raise UsageError(f"the stages of '{name}' are no maps that a head could read. Train with --head last")
    found = [i for i, m in enumerate(maps) if m.shape[-1] * REDUCTION <= size]
    if found and maps[found[-1]].shape[1] == z.shape[1] and torch.allclose(pooled(maps[found[-1]]), z, atol=1e-5):
        found.pop()
    return tuple(found), tuple(maps[i].shape[1] for i in found)


def _every_block(model: Any) -> dict[str, Any]:
    """EfficientNets and their kin give the map of every block, not just of the last before each reduction."""
    has = "extra_blocks" in inspect.signature(model.forward_intermediates).parameters
    return {"extra_blocks": True} if has else {}
