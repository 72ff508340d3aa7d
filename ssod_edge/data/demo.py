"""The embedded data set: handwritten digits on photographs, drawn on the fly, with three kinds of unknown.

Known are the digits 0 to 7. Unknown are the digits 8 and 9 ("near"), photo crops without a digit ("photos") and
shapes and textures ("shapes"). The digits (8 x 8 pixels) and the two photographs ship inside scikit-learn, so
nothing is downloaded. Every image depends on (split, index) alone.

The splits share nothing that a network could memorise: each digit instance and each tile of the photographs belongs
to exactly one of "train", "val", "calib" and "test". The unknowns use the tiles of "test" and, for "near", digits
that no other split has.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ssod_edge.errors import UsageError
from ssod_edge.files import make_directory, write_atomic
from ssod_edge.optional import load

#: Height and width of every image in pixels.
IMAGE_SIZE = 64

#: The known classes, in label order.
CLASSES: tuple[str, ...] = ("0", "1", "2", "3", "4", "5", "6", "7")

#: Number of images in each split.
SPLIT_SIZES = {"train": 8000, "val": 800, "calib": 800, "test": 1000, "near": 500, "photos": 500, "shapes": 500}

#: Splits of known classes, and the sets of unknowns.
ID_SPLITS = ("train", "val", "calib", "test")
OOD_SPLITS = ("near", "photos", "shapes")

#: Kinds of image in "shapes"; image i is of kind i % len.
_OUTLINED = ("circle", "polygon", "star")
SHAPES = (*_OUTLINED, "stripes", "checkerboard", "noise", "clouds", "gradient")

# Changes whenever the drawing changes, so that a fingerprint never stands for two different sets.
_VERSION = "demo-1"

_UNKNOWN_DIGITS = (8, 9)
_DIGIT_SIZE = (26, 46)  # side of the digit's 8 x 8 grid after upsampling, pixels
_CONTRAST = (70.0, 160.0)  # luminance between digit and background, of 255
_CHROMA = 60.0  # largest colour cast of the digit per channel, of 255
_OPACITY = (0.8, 1.0)
_CROP_SIDE = (36, 70)  # side of the photo crop that becomes one image, source pixels
_GAIN = (0.7, 1.2)  # brightness of the photo crop

# Each photograph is cut into tiles; tile (row, column) belongs to _TILE_OWNERS[column + slant * row + start], modulo
# its length. These slants and starts give every split the same mean and spread of brightness and of detail within
# 20%: a threshold set on "calib" is worth something on "test" only if the two look alike.
_TILE_ROWS, _TILE_COLUMNS = 6, 8
_TILE_OWNERS = ("train", "val", "train", "calib", "train", "test")
_PHOTOS = {"china.jpg": (-1, 1), "flower.jpg": (1, 4)}
# Shares of each known digit's instances, in the order of ID_SPLITS.
_DIGIT_SHARES = (0.64, 0.11, 0.11, 0.14)

_LUMINANCE = np.array([0.299, 0.587, 0.114])
# Upsampled digits are soft; a smooth step gives them the edge of a pen stroke.
_STROKE = [round(255 * t * t * (3 - 2 * t)) for t in (min(max((v - 60) / 120, 0.0), 1.0) for v in range(256))]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tile:
    """A rectangle of one photograph: file name, (left, top, right, bottom) in its pixels, and the pixels."""

    photo: str
    box: tuple[int, int, int, int]
    image: Image.Image


@dataclass(frozen=True)
class Drawing:
    """What image i of a split is made of.

    Attributes:
        what: "digit-3", "photo-china" or a kind of shape.
        tile: where the background comes from; None if it is not a photo.
        instance: row of scikit-learn's digits; None without a digit.
        image: RGB, IMAGE_SIZE x IMAGE_SIZE.
    """

    what: str
    tile: Tile | None
    instance: int | None
    image: Image.Image


class DemoSet:
    """One split of the embedded data set.

    Args:
        split: "train", "val", "calib" or "test" (known), "near", "photos" or "shapes" (unknown).

    Attributes, of `ssod_edge.data.sources.ImageSource`:
        labels: int64 [len], 0 to 7 for known digits, -1 for every unknown.

    Raises:
        UsageError: an unknown split.
        MissingExtraError: scikit-learn is not installed.
    """

    hflip_ok = False  # a mirrored digit is no digit
    classes = CLASSES

    def __init__(self, split: str) -> None:
        if split not in SPLIT_SIZES:
            raise UsageError(f"split of the demo data must be one of {', '.join(SPLIT_SIZES)}, got '{split}'")
        _sklearn_datasets()
        self.name = f"demo:{split}"
        self.split = split
        size = SPLIT_SIZES[split]
        self.labels = np.arange(size) % len(CLASSES) if split in ID_SPLITS else np.full(size, -1)
        # The 0 is of a seed that nobody could choose.
        self.fingerprint = hashlib.sha256(f"{_VERSION} {split} 0 {size}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Image `index`: RGB, IMAGE_SIZE x IMAGE_SIZE. Always the same pixels, in whatever order they are asked for.

        Raises:
            IndexError: index is outside 0 .. len - 1.
        """
        return self.drawing(index).image

    def source(self, index: int) -> str:
        """A name for image `index` that says what it shows, e.g. "demo:test/00012-digit-4"."""
        return f"{self.name}/{index:05d}-{self.drawing(index).what}"

    def drawing(self, index: int) -> Drawing:
        """Image `index` together with the digit instance and the photo tile it is made of."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0 .. {len(self) - 1} for {self.name}, got {index}")
        rng = np.random.default_rng((0, list(SPLIT_SIZES).index(self.split), index))
        if self.split == "shapes":
            return _draw_shape(rng, SHAPES[index % len(SHAPES)])
        if self.split == "photos":
            tile, background = _background(rng, "test")
            return Drawing(f"photo-{tile.photo.removesuffix('.jpg')}", tile, None, background)
        digits = _UNKNOWN_DIGITS if self.split == "near" else tuple(range(len(CLASSES)))
        digit = digits[index % len(digits)]
        pool = digit_instances(self.split, digit)
        instance = pool[index // len(digits) % len(pool)]
        tile, background = _background(rng, "test" if self.split == "near" else self.split)
        _draw_digit(rng, background, instance)
        return Drawing(f"digit-{digit}", tile, instance, background)


def write_demo_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Write two PNG files of the test split and of each set of unknowns, named after what they show.

    Returns:
        The paths, known first, e.g. "known-digit-3-1.png", "unknown-stripes-2.png".

    Raises:
        OutputError: the folder cannot be written.
    """
    folder, paths = make_directory(folder), []
    for name in ("test", *OOD_SPLITS):
        verdict = "known" if name in ID_SPLITS else "unknown"
        for number, index in ((1, 0), (2, 5)):  # of another class or shape
            drawing = DemoSet(name).drawing(index)
            path = folder / f"{verdict}-{drawing.what}-{number}.png"
            paths.append(write_atomic(path, partial(drawing.image.save, format="PNG")))
    return paths


@cache
def digit_instances(split: str, digit: int) -> tuple[int, ...]:
    """Rows of scikit-learn's digits that show `digit` and belong to `split`."""
    rows = np.flatnonzero(_digits()[1] == digit)
    owned = {"near": rows}
    if digit not in _UNKNOWN_DIGITS:
        rows = np.random.default_rng((0, digit)).permutation(rows)
        ends = np.round(np.cumsum(_DIGIT_SHARES) * len(rows)).astype(int)
        owned = dict(zip(ID_SPLITS, np.split(rows, ends[:-1]), strict=True))
    return tuple(owned[split].tolist()) if split in owned else ()


@cache
def photo_tiles(split: str) -> tuple[Tile, ...]:
    """The photo tiles that belong to one of ID_SPLITS. No two splits share a pixel."""
    tiles = []
    for photo, (slant, start) in _PHOTOS.items():
        image = _photo(photo)
        for row, column in np.ndindex(_TILE_ROWS, _TILE_COLUMNS):
            if _TILE_OWNERS[(column + slant * row + start) % len(_TILE_OWNERS)] == split:
                left, right = (image.width * (column + step) // _TILE_COLUMNS for step in (0, 1))
                top, bottom = (image.height * (row + step) // _TILE_ROWS for step in (0, 1))
                # A crop of its own: resizing part of the whole photo would read past the tile's edge.
                box = (left, top, right, bottom)
                tiles.append(Tile(photo, box, image.crop(box)))
    return tuple(tiles)


def _sklearn_datasets() -> Any:
    return load("sklearn.datasets", "the demo data set")


@cache
def _digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images uint8 [1797, 10, 10], ink 0 to 255 with a border of one empty pixel, and their digits int64 [1797]."""
    bunch = _sklearn_datasets().load_digits()
    ink = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return np.pad(ink, ((0, 0), (1, 1), (1, 1))), bunch.target.astype(np.int64)


@cache
def _photo(name: str) -> Image.Image:
    return Image.fromarray(np.asarray(_sklearn_datasets().load_sample_image(name)))


def _background(rng: np.random.Generator, split: str) -> tuple[Tile, Image.Image]:
    """A crop of one of the split's tiles, at IMAGE_SIZE, perhaps mirrored and somewhat darker or brighter."""
    tiles = photo_tiles(split)
    tile = tiles[rng.integers(len(tiles))]
    side = rng.uniform(*_CROP_SIDE)
    left = rng.uniform(0, tile.image.width - side)
    top = rng.uniform(0, tile.image.height - side)
    crop = tile.image.resize(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain = rng.uniform(*_GAIN)
    return tile, crop.point([min(255, round(value * gain)) for value in range(256)] * 3)


def _draw_digit(rng: np.random.Generator, image: Image.Image, instance: int) -> None:
    """Composite one handwritten digit onto `image` in place, in a colour that differs from what it covers."""
    ink = Image.fromarray(_digits()[0][instance])
    # The grid is 8 of the 10 pixels; its empty border may hang over the edge of the image, the ink may not.
    grid = int(rng.integers(_DIGIT_SIZE[0], _DIGIT_SIZE[1] + 1))
    size = round(grid * 10 / 8)
    border = (size - grid) // 2
    left, top = (int(v) for v in rng.integers(-border, IMAGE_SIZE - size + border + 1, 2))
    box = (max(left, 0), max(top, 0), min(left + size, IMAGE_SIZE), min(top + size, IMAGE_SIZE))
    opacity = rng.uniform(*_OPACITY)
    alpha = ink.resize((size, size), Image.Resampling.BICUBIC).point([round(v * opacity) for v in _STROKE])
    colour = _contrasting(rng, np.asarray(image.resize((1, 1), Image.Resampling.BOX, box=box))[0, 0])
    image.paste(colour, (left, top), alpha)


def _contrasting(rng: np.random.Generator, background: npt.NDArray[np.uint8]) -> tuple[int, ...]:
    """A random colour whose luminance is _CONTRAST away from that of `background` (RGB), on a side where it fits."""
    luminance = float(background @ _LUMINANCE)
    contrast = rng.uniform(*_CONTRAST)
    fits = [luminance + sign * contrast for sign in (-1, 1) if 0 <= luminance + sign * contrast <= 255]
    level = fits[rng.integers(len(fits))] if fits else (255.0 if luminance < 128 else 0.0)
    cast = rng.uniform(-_CHROMA, _CHROMA, 3)
    colour = level + cast - cast @ _LUMINANCE
    return tuple(np.clip(colour, 0, 255).astype(int).tolist())


def _draw_shape(rng: np.random.Generator, kind: str) -> Drawing:
    """A filled shape on a photo crop or a plain colour, or a texture that fills the image."""
    if kind not in _OUTLINED:
        low, high = rng.uniform(0, 255, (2, 3))
        pixels = low + _texture(rng, kind).reshape(IMAGE_SIZE, IMAGE_SIZE, -1) * (high - low)
        return Drawing(kind, None, None, Image.fromarray(pixels.astype(np.uint8)))
    tile: Tile | None
    if rng.random() < 0.5:
        tile, image = _background(rng, "test")
    else:
        tile, image = None, Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tuple(rng.integers(0, 256, 3).tolist()))
    # Drawn at four times the size and reduced: Pillow's polygons have jagged edges.
    mask = Image.new("L", (4 * IMAGE_SIZE, 4 * IMAGE_SIZE))
    radius = rng.uniform(0.18, 0.36) * mask.width
    centre = rng.uniform(radius, mask.width - radius, 2)
    ImageDraw.Draw(mask).polygon(_outline(rng, kind, radius, centre).ravel().tolist(), fill=255)
    colour = _contrasting(rng, np.asarray(image.resize((1, 1), Image.Resampling.BOX))[0, 0])
    image.paste(colour, (0, 0), mask.reduce(4))
    return Drawing(kind, tile, None, image)


def _outline(rng: np.random.Generator, kind: str, radius: float, centre: Floats) -> Floats:
    """Corners (x, y) of a circle, a convex polygon or a star: [corners, 2]."""
    corners = {"circle": 48, "polygon": int(rng.integers(3, 7)), "star": 2 * int(rng.integers(4, 8))}[kind]
    angles = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
    radii = np.full(corners, radius)
    if kind == "star":
        radii[1::2] *= rng.uniform(0.35, 0.6)
    points: Floats = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return points


def _texture(rng: np.random.Generator, kind: str) -> Floats:
    """The share of the second of two colours at each pixel, 0 to 1: [IMAGE_SIZE, IMAGE_SIZE], of noise [..., 3]."""
    weight: Floats
    if kind == "noise":
        weight = rng.random((IMAGE_SIZE, IMAGE_SIZE, 3))
    elif kind == "checkerboard":
        cells = (np.arange(IMAGE_SIZE) + rng.integers(0, IMAGE_SIZE)) // rng.integers(5, 15)
        weight = np.add.outer(cells, cells) % 2.0
    elif kind == "clouds":
        coarse = rng.integers(0, 256, (int(rng.integers(3, 12)),) * 2, dtype=np.uint8)
        fine = Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        weight = np.asarray(fine) / 255.0
    else:
        waves = rng.uniform(3, 10) if kind == "stripes" else 0.0
        angle = rng.uniform(0, 2 * np.pi)
        axis = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE - 0.5
        ramp = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]  # distance along a random direction
        if kind == "stripes":
            weight = np.clip(0.5 + 2 * np.sin(2 * np.pi * (waves * ramp + rng.uniform(0, 1))), 0, 1)
        else:
            weight = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    return weight
