"""The maps of a backbone's stages and blocks: what a head reads beside the last features, by means or by a branch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssod_edge.errors import UsageError

#: Stages from this reduction of the input's side on are read: those before say little of what is shown.
REDUCTION = 8
#: Of a stage, so many blocks at most are read, its last ones: of 23 (ResNet-101) most say the same.
MOST_BLOCKS = 4

#: Of a branch.
MOST_WIDTH = 1024

#: Where a backbone has a map: the index of one of timm's stages, or the name of a module, a block within one.
Place: TypeAlias = int | str


def stage_maps(backbone: nn.Module, x: Tensor, places: Sequence[Place]) -> tuple[Tensor, list[Tensor]]:
    """The last feature map of a timm model, and those of some of its stages and blocks on the way, by one pass.

    Args:
        backbone: a timm model.
        x: normalised images [N, 3, S, S].
        places: of `find_stages`, in its order.

    Returns:
        `forward_features`' map; the maps of the places, [N, C, H, W] each.
    """
    model, stages = cast(Any, backbone), [place for place in places if isinstance(place, int)]
    with _block_maps(backbone, places) as blocks:
        if stages:
            last, maps = model.forward_intermediates(x, indices=stages, **_every_stage(model))
        else:
            last, maps = model.forward_features(x), []
    found = blocks | dict(zip(stages, maps, strict=True))
    return last, [found[place] for place in places]


def maps_until(backbone: nn.Module, x: Tensor, places: Sequence[Place]) -> list[Tensor]:
    """The places' maps alone; nothing is computed beyond the last of them, a stage."""
    model, stages = cast(Any, backbone), [place for place in places if isinstance(place, int)]
    options = {"stop_early": True, "intermediates_only": True, **_every_stage(model)}
    with _block_maps(backbone, places) as blocks:
        found = blocks | dict(zip(stages, model.forward_intermediates(x, indices=stages, **options), strict=True))
    return [found[place] for place in places]


def pooled(feature_map: Tensor) -> Tensor:
    """The mean over all places, [N, C, H, W] -> [N, C]."""
    return feature_map.mean(dim=(2, 3))


@dataclass(frozen=True)
class BranchShape:
    """What a `Branch` is built from.

    Attributes:
        stages: timm's indices of the stages whose maps it reads, the smallest map last.
        width: channels that it makes of each map.
    """

    stages: tuple[int, ...]
    width: int

    def __post_init__(self) -> None:
        if not self.stages or not 1 <= self.width <= MOST_WIDTH:
            raise UsageError(f"a branch reads a stage or more, in 1 to {MOST_WIDTH} channels")

    @property
    def features(self) -> int:
        """How many features it gives."""
        return 2 * len(self.stages) * self.width


class Branch(nn.Module):
    """A small network beside a backbone: maps of some stages [N, C, H, W] -> features [N, `BranchShape.features`].

    1x1 convolutions bring each map to the same width, averages bring it onto the last one's grid, and two depthwise
    separable blocks read them together. The features are the mean and the maximum over the places.

    Args:
        shape: see `BranchShape`.
        channels: of each map.
    """

    def __init__(self, shape: BranchShape, channels: Sequence[int]):
        super().__init__()
        full = len(shape.stages) * shape.width
        self.shape = shape
        self.inner = nn.ModuleList([nn.Conv2d(count, shape.width, 1) for count in channels])
        self.blocks = nn.Sequential(_separable(full), _separable(full))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.pooled(self.at_places(maps))

    def at_places(self, maps: Sequence[Tensor]) -> Tensor:
        """What is found at each place of the last grid, [N, features / 2, H, W]."""
        height, width = maps[-1].shape[2:]
        on_grid = [_onto(conv(m), height, width) for conv, m in zip(self.inner, maps, strict=True)]
        found: Tensor = self.blocks(torch.cat(on_grid, dim=1))
        return found

    @staticmethod
    def pooled(found: Tensor) -> Tensor:
        """The features of what `at_places` found."""
        return torch.cat([found.mean(dim=(2, 3)), found.amax(dim=(2, 3))], dim=1)


def _separable(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
        nn.Conv2d(width, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.Hardswish(),
    )


def _onto(feature_map: Tensor, height: int, width: int) -> Tensor:
    """A map on a grid that is not finer: means where whole windows fit, as engines compute it fastest."""
    rows, columns = feature_map.shape[2:]
    if (rows, columns) == (height, width):
        return feature_map
    window = -(-rows // height), -(-columns // width)
    if (-(-rows // window[0]), -(-columns // window[1])) == (height, width):
        return F.avg_pool2d(feature_map, window, ceil_mode=True, count_include_pad=False)
    return F.interpolate(feature_map, (height, width), mode="bilinear", align_corners=False)


def find_stages(
    backbone: nn.Module, name: str, size: int, every_block: bool = False
) -> tuple[tuple[Place, ...], tuple[int, ...]]:
    """Which stages a head reads: all of `REDUCTION` or more, but one whose mean is the last features themselves.

    Args:
        backbone: a timm model; it is as before.
        name: of it, for the error.
        size: of its input, in pixels.
        every_block: the blocks within these stages too.

    Returns:
        the places, in the order in which they are computed; the width of each.

    Raises:
        UsageError: timm gives no maps of this backbone.
    """
    model, was_training = cast(Any, backbone), backbone.training
    if not hasattr(model, "forward_intermediates"):
        raise UsageError(f"timm gives no maps of the stages of '{name}'. Train with --head last")
    backbone.eval()
    try:
        with torch.no_grad(), recorded(backbone) as calls:
            x = torch.linspace(-1, 1, 3 * size * size, device=next(backbone.parameters()).device).view(1, 3, size, size)
            last, maps = model.forward_intermediates(x, **_every_stage(model))
            z = model.forward_head(last, pre_logits=True)
        with torch.no_grad():
            usable = isinstance(last, Tensor) and torch.equal(last, model.forward_features(x))
    finally:
        backbone.train(was_training)
    if not usable or not all(m.dim() == 4 for m in maps):
        raise UsageError(f"the stages of '{name}' are no feature maps for a head to read. Train with --head last")
    found: list[tuple[Place, int]] = []
    for stage, stage_map in enumerate(maps):
        if stage_map.shape[-1] * REDUCTION <= size:
            width = stage_map.shape[1]
            found += [(block, width) for block in (_blocks(backbone, calls, stage_map) if every_block else [])]
            is_last = stage == len(maps) - 1 and width == z.shape[1]
            if not (is_last and torch.allclose(pooled(stage_map), z, atol=1e-5)):
                found.append((stage, width))
    return tuple(place for place, _ in found), tuple(width for _, width in found)


#: Module -> the tensor that it was called with, and the one that it gave.
Calls: TypeAlias = dict[nn.Module, tuple[Tensor, Tensor]]


@contextmanager
def recorded(backbone: nn.Module) -> Iterator[Calls]:
    """Filled with what goes into and out of each module when the backbone runs."""
    calls: Calls = {}

    def record(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(out, Tensor) and out is not given[0]:
            calls[module] = given[0], out

    hooks = [module.register_forward_hook(record) for module in backbone.modules()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _blocks(backbone: nn.Module, calls: Calls, stage_map: Tensor) -> list[str]:
    """Names of the last modules that a stage is a row of, each of which gives a map like the stage's.

    Without the very last, whose map is the stage's, and at most `MOST_BLOCKS` with it.
    """
    ends = [module for module, (_, out) in calls.items() if out is stage_map]
    if not ends:
        return []  # computed between modules
    names = {module: name for name, module in backbone.named_modules()}
    stage = max(ends, key=lambda end: len(list(end.modules())))
    return [names[module] for module in _row(stage, calls)[-MOST_BLOCKS:-1]]


def _row(module: nn.Module, calls: Calls) -> list[nn.Module]:
    """The modules that a module runs one after the other, and nothing else; itself where it does more than that.

    A block is left whole: it adds its input in the end, has layers as its own, or is wider within.
    """
    children = [child for child in module.children() if child in calls]
    x, y = calls[module]
    for child in children:
        given, out = calls[child]
        if given is not x or out.shape != y.shape or not any(True for _ in child.children()):
            return [module]
        x = out
    return [block for child in children for block in _row(child, calls)] if children and x is y else [module]


@contextmanager
def _block_maps(backbone: nn.Module, places: Sequence[Place]) -> Iterator[dict[Place, Tensor]]:
    """Filled with the maps of the blocks among some places when the backbone runs."""
    found: dict[Place, Tensor] = {}

    def keep(place: Place) -> Any:
        return lambda module, given, out: found.__setitem__(place, out)

    names = [place for place in places if isinstance(place, str)]
    hooks = [backbone.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _every_stage(model: Any) -> dict[str, Any]:
    """EfficientNets and their kin give the map of every stage, not just of the last before each reduction."""
    has = "extra_blocks" in inspect.signature(model.forward_intermediates).parameters
    return {"extra_blocks": True} if has else {}
