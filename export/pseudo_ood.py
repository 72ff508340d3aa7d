"""Images that no class describes, made from in-distribution images alone, for choices that may not see an OOD set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Images = NDArray[np.uint8]

#: A shuffled image is cut into this many patches a side.
PATCHES = 4
#: A corner that is blown up is this share of the side.
CORNER = 4


def pseudo_ood(images: Images, seed: int = 0) -> Images:
    """One image each, of three kinds in turn: shuffled patches, a corner blown up, and two images blended.

    The first keeps colours and texture and loses the object's form, the second shows what lies around the object, the
    third holds two objects where the network was taught one.

    Args:
        images: uint8 [n, 3, S, S], in-distribution; S >= 4.
        seed: of patch order, corners and partners.

    Returns:
        uint8 [n, 3, S, S].
    """
    rng = np.random.default_rng(seed)
    made = np.empty_like(images)
    for index, image in enumerate(images):
        if index % 3 == 0:
            made[index] = _shuffled(image, rng)
        elif index % 3 == 1:
            made[index] = _corner(image, rng)
        else:
            made[index] = _blended(image, images[(index + rng.integers(1, max(2, len(images)))) % len(images)])
    return made


def _shuffled(image: Images, rng: np.random.Generator) -> Images:
    side = image.shape[1] // PATCHES
    result = image.copy()
    cells = [(slice(None), *(slice(i * side, (i + 1) * side) for i in divmod(n, PATCHES))) for n in range(PATCHES**2)]
    for target, source in zip(cells, rng.permutation(len(cells)), strict=True):
        result[target] = image[cells[source]]
    return result


def _corner(image: Images, rng: np.random.Generator) -> Images:
    size = image.shape[1]
    side = max(1, size // CORNER)
    top, left = rng.integers(0, 2, 2) * (size - side)
    picture = Image.fromarray(np.ascontiguousarray(image[:, top : top + side, left : left + side].transpose(1, 2, 0)))
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def _blended(image: Images, other: Images) -> Images:
    return ((image.astype(np.uint16) + other) // 2).astype(np.uint8)
