"""Images that no class describes, made from in-distribution images alone, for choices that may not see an OOD set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssod_edge.errors import UsageError

Images = NDArray[np.uint8]

#: A shuffled image is cut into this many patches a side.
PATCHES = 4
#: A corner that is blown up is this share of the side.
CORNER = 4
#: Side of a tile, as shares of the image's, and the border that is left of an erased image.
TILE = (1 / 4, 3 / 8)
BORDER = 5


def pseudo_ood(images: Images, seed: int = 0, kinds: Sequence[str] = ("shuffled", "corner", "blended")) -> Images:
    """One image each, of several kinds in turn; see `KINDS`.

    Args:
        images: uint8 [n, 3, S, S], in-distribution; S >= 4.
        seed: of patch order, corners, partners and phases.
        kinds: of `KINDS`.

    Returns:
        uint8 [n, 3, S, S].

    Raises:
        UsageError: an unknown kind.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"kinds must be some of {', '.join(KINDS)}, got '{unknown[0]}'")
    rng = np.random.default_rng(seed)
    made = np.empty_like(images)
    for index in range(len(images)):
        made[index] = KINDS[kinds[index % len(kinds)]](images, index, rng)
    return made


def _shuffled(images: Images, index: int, rng: np.random.Generator) -> Images:
    image = images[index]
    side = image.shape[1] // PATCHES
    result: Images = image.copy()
    cells = [(slice(None), *(slice(i * side, (i + 1) * side) for i in divmod(n, PATCHES))) for n in range(PATCHES**2)]
    for target, source in zip(cells, rng.permutation(len(cells)), strict=True):
        result[target] = image[cells[source]]
    return result


def _corner(images: Images, index: int, rng: np.random.Generator) -> Images:
    image = images[index]
    size = image.shape[1]
    side = max(1, size // CORNER)
    top, left = rng.integers(0, 2, 2) * (size - side)
    picture = Image.fromarray(np.ascontiguousarray(image[:, top : top + side, left : left + side].transpose(1, 2, 0)))
    enlarged: Images = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    return enlarged


def _blended(images: Images, index: int, rng: np.random.Generator) -> Images:
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
        picture = Image.fromarray(np.ascontiguousarray(images[other].transpose(1, 2, 0)))
        small = np.asarray(picture.resize((half, half), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        row, column = divmod(n, 2)
        made[:, row * half : (row + 1) * half, column * half : (column + 1) * half] = small
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


#: Kind -> how one image is made of images [n, 3, S, S] and an index. A shuffle keeps colours and texture and loses the
#: object's form; a corner, blown up, shows what lies around the object; a blend holds two objects where the network was
#: taught one; a texture has the spectrum and colours of an image, with random phases, and no object; a mosaic holds
#: four small images; tiles repeat one piece; of an erased image only its upper and lower border are left, repeated.
KINDS: dict[str, Callable[[Images, int, np.random.Generator], Images]] = {
    "shuffled": _shuffled,
    "corner": _corner,
    "blended": _blended,
    "texture": _texture,
    "mosaic": _mosaic,
    "tiled": _tiled,
    "erased": _erased,
}
#: Kind -> the one of `ssod_edge.config.OUTLIERS` that is much the same. A network that was taught to reject it says
#: nothing about images that it was not taught.
TAUGHT = {"shuffled": "shuffle", "corner": "zoom", "blended": "blend"}
