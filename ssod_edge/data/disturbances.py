"""Known photos as another day or camera would give them: copies for fitting, and named shifts for testing.

All act on the graph's input, after `ssod_edge.data.pixels.preprocess`. So they mean the same for a photo of any size,
and on every engine. What is tested with must not be what was fitted with: the shifts have other forms or strengths than
the copies, and four of them (gamma, shadow, motion, specks) and the rotation are in no copy at all.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ssod_edge.errors import UsageError

Pixels: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Strength: TypeAlias = Literal["mild", "strong"]

STRENGTHS: tuple[Strength, ...] = ("mild", "strong")

#: Of a copy that detectors are fitted with. Factors, drawn evenly on a logarithmic scale between 1 / value and value:
#: of the light, of the contrast about the mean, of the colours about grey, and of red and blue each.
LIGHT, CONTRAST, SATURATION, GAIN = 1.5, 1.5, 1.6, 1.18
#: Likewise, drawn evenly: standard deviation of noise in grey levels, radius of a box blur in pixels, side of the small
#: image as a share, JPEG quality.
NOISE, BOX, SCALE, QUALITY = (3.0, 12.0), (0.4, 1.4), (0.4, 0.8), (20, 71)

#: First of the numbers that copies and shifts are drawn from: no copy draws what a shift does.
_COPY_SEED, _SHIFT_SEED = 0, 7_405_926
#: ITU-R BT.601, in thousandths.
_LUMA = (299, 587, 114)


def disturbed_copy(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """What detectors and heads are fitted with beside a photo: other light, contrast and colours, and one damage.

    The damage is noise, a box blur, a smaller scale or JPEG.

    Args:
        pixels: uint8 [3, S, S], the graph's input.
        rng: draws the strengths, the kind of damage and the noise.

    Returns:
        uint8 [3, S, S], a new array.

    Raises:
        UsageError: not uint8 of shape [3, S, S].
    """
    _check(pixels)
    light, contrast, saturation, red, blue = np.exp(
        rng.uniform(-1, 1, 5) * np.log((LIGHT, CONTRAST, SATURATION, GAIN, GAIN))
    ).tolist()
    grey = _grey(pixels)
    coloured = grey + np.float32(saturation) * (pixels.astype(np.float32) - grey)
    gains = np.array([red, 1, blue], np.float32).reshape(3, 1, 1)
    lit = _round(_contrasted(coloured, _mean(pixels), contrast) * gains * np.float32(light))
    return _DAMAGES[rng.integers(len(_DAMAGES))](lit, rng)


def seeded_copy(pixels: Pixels) -> Pixels:
    """`disturbed_copy`, the same one for the same pixels, wherever they lie in a data set."""
    return disturbed_copy(pixels, np.random.default_rng((_COPY_SEED, zlib.crc32(pixels.tobytes()))))


def shift(pixels: Pixels, kind: str, strength: Strength, seed: int | Sequence[int]) -> Pixels:
    """One photo under a named shift, the same bytes for the same arguments.

    Where a shift has a direction or noise, both strengths have the same. JPEG's bytes also depend on Pillow's libjpeg.

    Args:
        pixels: uint8 [3, S, S], the graph's input.
        kind: of `SHIFTS`.
        strength: of `STRENGTHS`.
        seed: whole numbers from 0 on. Give (seed, index of the image), so that an image has its shift in every subset.

    Returns:
        uint8 [3, S, S], a new array.

    Raises:
        UsageError: no such kind or strength, or not uint8 of shape [3, S, S].
    """
    if kind not in SHIFTS:
        raise UsageError(f"kind must be one of {', '.join(SHIFTS)}, got '{kind}'")
    if strength not in STRENGTHS:
        raise UsageError(f"strength must be {' or '.join(STRENGTHS)}, got '{strength}'")
    _check(pixels)
    numbers = [seed] if isinstance(seed, int) else list(seed)
    rng = np.random.default_rng([_SHIFT_SEED, zlib.crc32(kind.encode()), *numbers])
    form, mild, strong = SHIFTS[kind]
    return form(pixels, mild if strength == "mild" else strong, rng)


def _check(pixels: Pixels) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(pixels) != 3 or pixels.shape[1] != pixels.shape[2]:
        raise UsageError(f"pixels must be uint8 [3, S, S], got {pixels.dtype} {list(pixels.shape)}")


def _round(values: NDArray[Any]) -> Pixels:
    rounded: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded


def _grey(pixels: Pixels) -> Floats:
    """[S, S]. Sums of integers: they are the same on every machine."""
    red, green, blue = (weight * plane.astype(np.int32) for weight, plane in zip(_LUMA, pixels, strict=True))
    grey: Floats = (red + green + blue).astype(np.float32) / np.float32(1000)
    return grey


def _mean(pixels: Pixels) -> float:
    """Of the grey levels."""
    sums = (weight * int(plane.sum(dtype=np.int64)) for weight, plane in zip(_LUMA, pixels, strict=True))
    return float(sum(sums) / (1000 * pixels[0].size))


def _contrasted(values: Floats, mean: float, factor: float) -> Floats:
    contrasted: Floats = np.float32(mean) + np.float32(factor) * (values - np.float32(mean))
    return contrasted


def _picture(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _pixels(picture: Image.Image) -> Pixels:
    pixels: Pixels = np.asarray(picture).transpose(2, 0, 1).copy()
    return pixels


def _noisy(pixels: Pixels, sigma: float, rng: np.random.Generator) -> Pixels:
    """Sensor noise: Gaussian, of each pixel and colour."""
    return _round(pixels + np.float32(sigma) * rng.standard_normal(pixels.shape, np.float32))


def _jpeg(pixels: Pixels, quality: int, _: np.random.Generator) -> Pixels:
    file = io.BytesIO()
    _picture(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as picture:
        return _pixels(picture)


def _rescaled(pixels: Pixels, side: int, down: Image.Resampling, up: Image.Resampling) -> Pixels:
    size = pixels.shape[1]
    return _pixels(_picture(pixels).resize((side, side), down).resize((size, size), up))


def _copy_noise(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return _noisy(pixels, rng.uniform(*NOISE), rng)


def _copy_blur(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return _pixels(_picture(pixels).filter(ImageFilter.BoxBlur(rng.uniform(*BOX))))


def _copy_scale(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    side = max(1, round(pixels.shape[1] * rng.uniform(*SCALE)))
    return _rescaled(pixels, side, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def _copy_jpeg(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return _jpeg(pixels, int(rng.integers(*QUALITY)), rng)


_DAMAGES = (_copy_noise, _copy_blur, _copy_scale, _copy_jpeg)


def _light(pixels: Pixels, factor: float, _: np.random.Generator) -> Pixels:
    return _round(pixels * np.float32(factor))


def _contrast(pixels: Pixels, factor: float, _: np.random.Generator) -> Pixels:
    return _round(_contrasted(pixels.astype(np.float32), _mean(pixels), factor))


def _gains(pixels: Pixels, gains: tuple[float, float, float], _: np.random.Generator) -> Pixels:
    """White balance: red, green and blue."""
    return _round(pixels * np.array(gains, np.float32).reshape(3, 1, 1))


def _blur(pixels: Pixels, sigma: float, _: np.random.Generator) -> Pixels:
    return _pixels(_picture(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def _resolution(pixels: Pixels, divisor: int, _: np.random.Generator) -> Pixels:
    side = max(1, round(pixels.shape[1] / divisor))
    return _rescaled(pixels, side, Image.Resampling.BOX, Image.Resampling.BILINEAR)


def _rotation(pixels: Pixels, degrees: float, rng: np.random.Generator) -> Pixels:
    """To either side. What turns into view is the mirror image of what lies at the edge."""
    size = pixels.shape[1]
    pad = size // 4 + 1
    wide = _picture(np.pad(pixels, ((0, 0), (pad, pad), (pad, pad)), "symmetric"))
    turned = wide.rotate(degrees * (1 if rng.integers(2) else -1), Image.Resampling.BILINEAR)
    return _pixels(turned.crop((pad, pad, pad + size, pad + size)))


def _gamma(pixels: Pixels, gamma: float, rng: np.random.Generator) -> Pixels:
    """Darker or lighter middle tones, black and white unchanged."""
    exponent = gamma if rng.integers(2) else 1 / gamma
    return _round(255 * (np.arange(256) / 255) ** exponent)[pixels]


def _shadow(pixels: Pixels, depth: float, rng: np.random.Generator) -> Pixels:
    """Light that falls from one side of the image to the other, in any direction, by a share of it."""
    steps = np.linspace(-0.5, 0.5, pixels.shape[1])
    angle = rng.uniform(0, 2 * math.pi)
    across = math.cos(angle) * steps + math.sin(angle) * steps[:, None]
    reach = (abs(math.cos(angle)) + abs(math.sin(angle))) / 2
    return _round(pixels * (1 - depth * (0.5 + across / (2 * reach))))


def _motion(pixels: Pixels, length: int, rng: np.random.Generator) -> Pixels:
    """The mean over a straight move of so many pixels, an odd number."""
    size, reach, angle = pixels.shape[1], length // 2, rng.uniform(0, math.pi)
    wide = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach)), "symmetric").astype(np.float32)
    total = np.zeros(pixels.shape, np.float32)
    for step in range(-reach, reach + 1):
        top, left = reach + round(step * math.sin(angle)), reach + round(step * math.cos(angle))
        total += wide[:, top : top + size, left : left + size]
    return _round(total / np.float32(length))


def _specks(pixels: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    """Black and white pixels, as of dust, rain or a bad line."""
    draw = rng.random(pixels.shape[1:])
    specked: Pixels = pixels.copy()
    specked[:, draw < share / 2] = 0
    specked[:, draw > 1 - share / 2] = 255
    return specked


#: Kind of shift -> its form, and the value of each of `STRENGTHS`.
SHIFTS: dict[str, tuple[Callable[[Pixels, Any, np.random.Generator], Pixels], Any, Any]] = {
    "lighter": (_light, 1.25, 1.45),
    "darker": (_light, 0.7, 0.55),
    "contrast": (_contrast, 0.7, 0.5),
    "warm": (_gains, (1.12, 1.0, 0.82), (1.25, 1.0, 0.65)),
    "blur": (_blur, 1.0, 2.0),
    "noise": (_noisy, 8.0, 16.0),
    "jpeg": (_jpeg, 25, 12),
    "resolution": (_resolution, 2, 3),
    "rotation": (_rotation, 5.0, 10.0),
    "gamma": (_gamma, 1.4, 1.9),
    "shadow": (_shadow, 0.45, 0.7),
    "motion": (_motion, 5, 9),
    "specks": (_specks, 0.005, 0.02),
}
