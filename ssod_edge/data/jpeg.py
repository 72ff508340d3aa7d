"""JPEG files through libjpeg-turbo itself, which tells of damage where Pillow does not. The pixels are the same."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image

try:
    simplejpeg: Any = import_module("simplejpeg")
except ImportError:  # a machine that it has no wheel for
    simplejpeg = None

#: How libjpeg begins to speak of damage. Its other warnings are of habits of some cameras.
DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG")
#: Above it one scale of n/8 alone gives a size.
LEAST_SIDE = 8


def tells_damage() -> bool:
    """Whether damage of a JPEG can be told on this machine."""
    return simplejpeg is not None


def decode_jpeg(content: bytes, image: Image.Image) -> tuple[Image.Image | None, str | None]:
    """What Pillow makes of a JPEG, and whether the file is damaged.

    Args:
        content: the file.
        image: it, opened by Pillow; its size is the one that is wanted, in full or from `draft`.

    Returns:
        RGB, and None; or None, for Pillow to decode it, and what is damaged, if that is why.
    """
    width, height = image.size
    if simplejpeg is None or image.mode not in ("RGB", "L", "CMYK"):
        return None, None
    taken = image.mode != "CMYK" and max(image.size) >= LEAST_SIDE
    size = {"min_width": width, "min_height": height} if taken else {}  # else it is only asked about damage
    try:
        pixels = simplejpeg.decode_jpeg(content, "CMYK" if image.mode == "CMYK" else "RGB", strict=True, **size)
    except ValueError as error:
        return None, f"damaged image data ({error})" if str(error).startswith(DAMAGE) else None
    same: bool = taken and pixels.shape == (height, width, 3) and pixels.dtype == np.uint8
    return (Image.fromarray(pixels), None) if same else (None, None)
