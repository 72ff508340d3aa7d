"""Images that no class describes, made from training images, to teach the OOD row what it may not know.

Patches of a feature map teach it too, but what it reads at inference is the pooled feature of a whole image. Each kind
keeps what tells a camera's images from others, colours and local texture, and breaks something of the object:

- rotate: by 90, 180 or 270 degrees, which few kinds of objects are photographed at. Not where a camera may be turned,
  and the training images are upright.
- shuffle: the quadrants change places; the parts remain, the whole does not.
- zoom: a small crop, blown up; texture without a form.
- blend: the mean of two images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Cells a side of a shuffled image.
CELLS = 2
#: Sides of a crop that is blown up, as shares of the image's.
ZOOM = (1 / 6, 3 / 8)


def make_outliers(image: Tensor, kinds: Sequence[str], count: int) -> Tensor:
    """A batch of made images, the kinds in turn.

    Randomness is torch's global generator of the CPU, which training seeds anew for every step.

    Args:
        image: uint8 [N, 3, S, S], square, N >= 1; they are taken in a random order, over again where count > N.
        kinds: of `ssod_edge.config.OUTLIERS`, at least one.
        count: how many to make.

    Returns:
        uint8 [count, 3, S, S] on the device of `image`.
    """
    n = len(image)
    order = torch.randperm(n).repeat(-(-count // n))[:count]
    made = image[order.to(image.device)]
    for index, kind in enumerate(kinds):
        part = slice(index, None, len(kinds))
        if not len(made[part]):
            continue
        if kind == "blend":
            made[part] = blend(made[part], _partners(image, order[part]))
        else:
            made[part] = _MAKERS[kind](made[part])
    return made


def _partners(image: Tensor, chosen: Tensor) -> Tensor:
    """For each chosen image another one of the batch; one that is alone gets itself, upside down."""
    n = len(image)
    if n == 1:
        return image.flip(2)[chosen.to(image.device)]
    return image[((chosen + torch.randint(1, n, chosen.shape)) % n).to(image.device)]


def rotate(image: Tensor) -> Tensor:
    """[n, 3, S, S] -> the same, each turned by 90, 180 or 270 degrees."""
    turns = torch.randint(1, 4, (len(image), 1, 1, 1)).to(image.device)
    result = image
    for turn in (1, 2, 3):
        result = torch.where(turns == turn, image.rot90(turn, (2, 3)), result)
    return result


def shuffle(image: Tensor) -> Tensor:
    """[n, 3, S, S] -> the same, the cells of a grid in an order in which at least two have changed places."""
    n, channels, size, _ = image.shape
    side = size // CELLS
    inner = image[:, :, : side * CELLS, : side * CELLS]
    cells = inner.reshape(n, channels, CELLS, side, CELLS, side).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    # The cell that would come first goes to another place than the first, so that no order is the old one.
    order = torch.rand(n, CELLS**2).argsort(dim=1)
    order = torch.where(order[:, :1] == 0, order.roll(1, dims=1), order).to(image.device)
    cells = cells.gather(1, order.view(n, -1, 1, 1, 1).expand_as(cells))
    result = image.clone()
    result[:, :, : side * CELLS, : side * CELLS] = (
        cells.unflatten(1, (CELLS, CELLS)).permute(0, 3, 1, 4, 2, 5).reshape(inner.shape)
    )
    return result


def zoom(image: Tensor) -> Tensor:
    """[n, 3, S, S] -> one small square of each, enlarged to S (bilinear)."""
    n = len(image)
    scale = torch.empty(n).uniform_(*ZOOM)
    centre = (2 * torch.rand(n, 2) - 1) * (1 - scale).unsqueeze(1)
    theta = torch.cat([torch.diag_embed(scale.unsqueeze(1).expand(n, 2)), centre.unsqueeze(2)], dim=2)
    grid = F.affine_grid(theta.to(image.device), list(image.shape), align_corners=False)
    enlarged = F.grid_sample(image.float(), grid, padding_mode="border", align_corners=False)
    return enlarged.round().to(torch.uint8)


def blend(image: Tensor, other: Tensor) -> Tensor:
    """Twice [n, 3, S, S] -> their mean."""
    return ((image.int() + other.int()) // 2).to(torch.uint8)


_MAKERS: dict[str, Callable[[Tensor], Tensor]] = {"rotate": rotate, "shuffle": shuffle, "zoom": zoom}
