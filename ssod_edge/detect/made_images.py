"""Images that no class describes, made from in-distribution images, by kinds.

In training they teach the OOD row what it may not know: patches of a feature map teach it too, but what it reads at
inference is the pooled feature of a whole image. Choices (of a score, of int8 layers) measure by them, because no OOD
set may have a say. Each kind keeps what tells a camera's images from others, colours and local texture, and breaks
something of the object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssod_edge.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Images = NDArray[np.uint8]

#: Cells a side of an image that is shuffled for training, and of one that is shuffled for choices.
CELLS, PATCHES = 2, 4
#: Sides of a crop that is blown up for training, as shares of the image's; for choices it is a corner, 1 / CORNER.
ZOOM, CORNER = (1 / 6, 3 / 8), 4
#: Side of a tile, as shares of the image's, and the border that is left of an erased image.
TILE, BORDER = (1 / 4, 3 / 8), 5


def make_for_training(image: Tensor, kinds: Sequence[str], count: int) -> Tensor:
    """A batch of made images, the kinds in turn.

    Randomness is torch's global generator of the CPU, which training seeds anew for every step.

    Args:
        image: uint8 [N, 3, S, S], square, N >= 1; they are taken in a random order, over again where count > N.
        kinds: of `ssod_edge.config.OUTLIERS`, at least one.
        count: how many to make.

    Returns:
        uint8 [count, 3, S, S] on the device of `image`.
    """
    import torch

    n = len(image)
    order = torch.randperm(n).repeat(-(-count // n))[:count]
    made = image.new_empty((count, *image.shape[1:]))
    for index, kind in enumerate(kinds[:count]):
        part = slice(index, None, len(kinds))
        made[part] = TRAINING_KINDS[kind](image, order[part])
    return made


def make_for_choices(images: Images, seed: int = 0, kinds: Sequence[str] = ("shuffle", "zoom", "blend")) -> Images:
    """One image each, of several kinds in turn.

    Args:
        images: uint8 [n, 3, S, S], in-distribution; S >= 4.
        seed: of patch order, corners, partners and phases.
        kinds: of `CHOICE_KINDS`.

    Returns:
        uint8 [n, 3, S, S].

    Raises:
        UsageError: an unknown kind.
    """
    if unknown := [kind for kind in kinds if kind not in CHOICE_KINDS]:
        raise UsageError(f"kinds must be some of {', '.join(CHOICE_KINDS)}, got '{unknown[0]}'")
    rng = np.random.default_rng(seed)
    made = np.empty_like(images)
    for index in range(len(images)):
        made[index] = CHOICE_KINDS[kinds[index % len(kinds)]](images, index, rng)
    return made


def _rotate_batch(images: Tensor, chosen: Tensor) -> Tensor:
    import torch

    image = images[chosen.to(images.device)]
    turns = torch.randint(1, 4, (len(image), 1, 1, 1)).to(image.device)
    result = image
    for turn in (1, 2, 3):
        result = torch.where(turns == turn, image.rot90(turn, (2, 3)), result)
    return result


def _shuffle_batch(images: Tensor, chosen: Tensor) -> Tensor:
    import torch

    result = images[chosen.to(images.device)]
    n, channels, size, _ = result.shape
    side = size // CELLS
    inner = result[:, :, : side * CELLS, : side * CELLS]
    cells = inner.reshape(n, channels, CELLS, side, CELLS, side).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    # The cell that would come first goes to another place than the first, so that no order is the old one.
    order = torch.rand(n, CELLS**2).argsort(dim=1)
    order = torch.where(order[:, :1] == 0, order.roll(1, dims=1), order).to(result.device)
    cells = cells.gather(1, order.view(n, -1, 1, 1, 1).expand_as(cells))
    result[:, :, : side * CELLS, : side * CELLS] = (
        cells.unflatten(1, (CELLS, CELLS)).permute(0, 3, 1, 4, 2, 5).reshape(inner.shape)
    )
    return result


def _zoom_batch(images: Tensor, chosen: Tensor) -> Tensor:
    import torch
    import torch.nn.functional as F

    image, n = images[chosen.to(images.device)], len(chosen)
    scale = torch.empty(n).uniform_(*ZOOM)
    centre = (2 * torch.rand(n, 2) - 1) * (1 - scale).unsqueeze(1)
    theta = torch.cat([torch.diag_embed(scale.unsqueeze(1).expand(n, 2)), centre.unsqueeze(2)], dim=2)
    grid = F.affine_grid(theta.to(image.device), list(image.shape), align_corners=False)
    enlarged = F.grid_sample(image.float(), grid, padding_mode="border", align_corners=False)
    return enlarged.round().to(torch.uint8)


def _blend_batch(images: Tensor, chosen: Tensor) -> Tensor:
    import torch

    n, image = len(images), images[chosen.to(images.device)]
    # One that is alone is blended with itself, upside down.
    other = image.flip(2) if n == 1 else images[((chosen + torch.randint(1, n, chosen.shape)) % n).to(images.device)]
    return ((image.int() + other.int()) // 2).to(torch.uint8)


def _shuffle(images: Images, index: int, rng: np.random.Generator) -> Images:
    image = images[index]
    side = image.shape[1] // PATCHES
    result: Images = image.copy()
    cells = [(slice(None), *(slice(i * side, (i + 1) * side) for i in divmod(n, PATCHES))) for n in range(PATCHES**2)]
    for target, source in zip(cells, rng.permutation(len(cells)), strict=True):
        result[target] = image[cells[source]]
    return result


def _zoom(images: Images, index: int, rng: np.random.Generator) -> Images:
    image = images[index]
    size = image.shape[1]
    side = max(1, size // CORNER)
    top, left = rng.integers(0, 2, 2) * (size - side)
    return _resized(image[:, top : top + side, left : left + side], size)


def _resized(image: Images, size: int) -> Images:
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    resized: Images = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    return resized


def _blend(images: Images, index: int, rng: np.random.Generator) -> Images:
    other = images[(index + rng.integers(1, max(2, len(images)))) % len(images)]
    mean: Images = ((images[index].astype(np.uint16) + other) // 2).astype(np.uint8)
    return mean


def _texture(images: Images, index: int, rng: np.random.Generator) -> Images:
    image = images[index].astype(np.float64)
    # The phases of real noise are odd, so that the result is real; one set for all channels keeps the colours together.
    phase = np.angle(np.fft.fft2(rng.standard_normal(image.shape[1:])))
    phase[0, 0] = 0
    made = np.fft.ifft2(np.fft.fft2(image) * np.exp(1j * phase)).real
    return np.clip(np.round(made), 0, 255).astype(np.uint8)


def _mosaic(images: Images, index: int, rng: np.random.Generator) -> Images:
    size = images.shape[2]
    half = (size + 1) // 2
    made = np.empty((3, 2 * half, 2 * half), np.uint8)
    for n, other in enumerate((index, *rng.integers(0, len(images), 3))):
        row, column = divmod(n, 2)
        made[:, row * half : (row + 1) * half, column * half : (column + 1) * half] = _resized(images[other], half)
    return made[:, :size, :size]


def _tiled(images: Images, index: int, rng: np.random.Generator) -> Images:
    size = images.shape[2]
    side = max(1, round(size * rng.uniform(*TILE)))
    top, left = rng.integers(0, size - side + 1, 2)
    times = -(-size // side)
    return np.tile(images[index][:, top : top + side, left : left + side], (1, times, times))[:, :size, :size]


def _erased(images: Images, index: int, rng: np.random.Generator) -> Images:
    image = images[index]
    size = image.shape[1]
    border = max(1, size // BORDER)
    made: Images = image.copy()
    # From the upper and the lower edge towards the middle, so that what surrounds the object takes its place.
    inner = np.arange(border, size - border)
    made[:, inner] = image[:, np.where(inner < size // 2, inner % border, size - 1 - (size - 1 - inner) % border)]
    return made


# The kinds. A network that was trained on one says nothing about images that it was not taught, when it is measured by
# it.
# - rotate: by 90, 180 or 270 degrees, which few kinds of objects are photographed at. Not where a camera may be
#   turned, and the training images are upright.
# - shuffle: the cells of a grid change places: colours and texture remain, the object's form does not.
# - zoom: a small crop, or a corner, blown up: texture without a form, or what lies around the object.
# - blend: the mean of two images: two objects where the network was taught one.
# - texture: the spectrum and colours of an image, with random phases, and no object.
# - mosaic: four small images.
# - tiled: one piece, repeated.
# - erased: only the upper and lower border are left, repeated.

#: For training: of images uint8 [N, 3, S, S], square, and indices of n of them, n images on their device. Randomness is
#: torch's global generator of the CPU.
TRAINING_KINDS = {"rotate": _rotate_batch, "shuffle": _shuffle_batch, "zoom": _zoom_batch, "blend": _blend_batch}
#: For choices: of images uint8 [N, 3, S, S] and an index, one image.
CHOICE_KINDS = {
    "shuffle": _shuffle,
    "zoom": _zoom,
    "blend": _blend,
    "texture": _texture,
    "mosaic": _mosaic,
    "tiled": _tiled,
    "erased": _erased,
}
