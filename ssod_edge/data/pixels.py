"""From an image file to the graph's uint8 input. Training's evaluation and every runtime use this one path."""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ssod_edge.config import Preprocess
from ssod_edge.data.jpeg import decode_jpeg
from ssod_edge.data.named import Via
from ssod_edge.data.png import pixels_are_whole
from ssod_edge.errors import EngineError, ImageError, MissingExtraError, UsageError
from ssod_edge.optional import load
from ssod_edge.sources import is_address, without_secrets

#: Largest width * height that is decoded: Pillow's own default warning limit.
MAX_PIXELS = 89_478_485
#: Longest side that is decoded, a JPEG's. Pillow keeps an address for each row: a picture of one column is all rows.
MAX_SIDE = 65_535
#: Largest file that is read: MAX_PIXELS of RGB and a megabyte of other things.
MAX_BYTES = 3 * MAX_PIXELS + 2**20
#: Pillow's decoders that are written in Python: text PPM, PPM of odd depths, BMP of runs. They take up to 3 s for this
#: many pixels.
SLOW_DECODERS = ("ppm_plain", "ppm", "bmp_rle")
MAX_SLOW_PIXELS = 1_000_000
#: Scans of a progressive JPEG of MAX_PIXELS; a smaller picture may have more. Programs write about ten. A few bytes
#: make another scan, which takes up to 0.15 s.
MAX_SCANS = 20

#: What is decoded, in Pillow's names; "JPEG" stands for MPO too. Of the others some take seconds and gigabytes for a
#: small file, and none is what a camera writes. The usual ones come first: Pillow loads the rest once they are asked.
FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000"),
    *(("AVIF",) if find_spec("PIL._avif") else ()),  # not in every Pillow
)

# Pillow warns of what is refused here anyway. Once, because `catch_warnings` in the threads that decode would undo
# each other's filters; and last, so that a filter of the host program wins.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)

#: The filters of `Preprocess.interpolation`.
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
#: How far each reaches, in pixels of the smaller picture.
SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}

Damaged: TypeAlias = Callable[[str], object]
#: Left, top, right and bottom in pixels, with fractions.
Box: TypeAlias = tuple[float, float, float, float]

#: How the files of the extra `heic` begin, after four bytes: what a phone writes, and other pictures in its container.
_HEIF = [b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")]

_ORIENTATION_TAG = 0x0112
# Not `ImageOps.exif_transpose`: it copies a picture that needs no turn, and writes the EXIF anew after turning, which a
# damaged tag beside the orientation stops.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Those of them that leave width and height as they are.
_STANDING = [_UPRIGHT[number] for number in (2, 3, 4)]


@dataclass(frozen=True)
class Picture:
    """An image of a data set as it is stored.

    Attributes:
        content: the file; a PIL image where there is none.
        name: what an error calls it.
    """

    content: bytes | Image.Image
    name: str

    @property
    def sha256(self) -> str:
        """Hex: of the file; of the RGB pixels where there is none."""
        content = self.content
        return hashlib.sha256(content if isinstance(content, bytes) else load_image(content).tobytes()).hexdigest()


@dataclass(frozen=True)
class Stored:
    """An image that is no file of this machine, by its name. `read` gives the file, or raises whatever is wrong."""

    name: str
    read: Callable[[], bytes]


#: What `load_image` takes.
ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8] | Picture | Stored"


def read_pixels(
    source: ImageLike,
    settings: Preprocess,
    out: npt.NDArray[np.uint8] | None = None,
    via: Via | None = None,
    damaged: Damaged | None = None,
) -> npt.NDArray[np.uint8]:
    """From a source to the graph's input: `load_image`, `equalise` if something is given for it, and `preprocess`."""
    if via is None:
        return preprocess(load_image(source, settings, damaged), settings, out)
    whole = replace(settings, input_size=via.size, crop_pct=1.0, fit="crop")
    return preprocess(equalise(load_image(source, whole, damaged), via), settings, out)


def load_image(source: ImageLike, settings: Preprocess | None = None, damaged: Damaged | None = None) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    The EXIF orientation is applied. An alpha channel is dropped, colours as stored, which is what the usual
    training pipelines do. 16-bit grayscale keeps its high byte (value >> 8). 32-bit integers are read as 16-bit
    values (0..65535) and floating point as 0..1; a picture outside that range is refused, because its scale
    cannot be known. Of an animation the first frame is read (of a PIL image, its current frame).

    From version 2 of the settings on, a JPEG file is decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 of its size at
    which what `preprocess` looks at is still twice as large as its result. The largest picture that is allowed takes
    several times the 256 MiB of its pixels while it is decoded.

    Args:
        source: path, encoded bytes, PIL image, or uint8 array [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4]
            (RGBA). A PIL image is not modified.
        settings: what the image is read for: its region is cut out, and what is larger than needed may come reduced.
            None gives all of the image, in full.
        damaged: called with what is wrong with a JPEG that could be decoded, perhaps to other pixels than were taken.

    Returns:
        A decoded PIL image of mode RGB. A source that is already one, and has no region to cut, is returned as it is.

    Raises:
        ImageError: the image cannot be read (missing, empty, truncated, none of `FORMATS`, above `MAX_PIXELS`,
            `MAX_SIDE` or `MAX_BYTES`, unsupported mode or dtype, a HEIC picture without the extra `heic`), or the
            region does not lie within it; the message holds its name and the reason.
    """
    name = _name(source)
    # Pillow's decoders raise whatever a damaged file leads them to (OSError, SyntaxError, struct.error, ...).
    try:
        if isinstance(source, (Picture, Stored)):
            source = source.content if isinstance(source, Picture) else source.read()
        if isinstance(source, Image.Image):
            return _decode(source, settings)
        if isinstance(source, np.ndarray):
            return _decode(_from_array(source), settings)
        with _open(source) as file:
            if not (size := file.seek(0, os.SEEK_END)):
                raise ImageError("it is empty")
            if size > MAX_BYTES:
                raise ImageError(f"the file is larger than {MAX_BYTES} bytes; reduce the picture, or save it as JPEG")
            with _identify(file) as image:
                if image.format == "PNG" and not pixels_are_whole(file):
                    raise ImageError("damaged image data (a checksum of its pixels is wrong)")
                return _decode(image, settings, file if image.format in ("JPEG", "MPO") else None, damaged)
    except Exception as error:
        raise ImageError(f"{name}: {_reason(error)}") from error


def preprocess(
    image: Image.Image, settings: Preprocess, out: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Fit and resize in one pass.

    With fit "crop" what counts is the centred square whose side is `crop_pct` times the shorter side of the image. At
    its border the filter sees the pixels beyond it, as if the whole image had been resized first. The other fits keep
    all of the image, whatever `crop_pct` is.

    Args:
        image: RGB, from `load_image` with these settings.
        settings: input size, fit, crop and interpolation.
        out: uint8 [3, S, S] to write into, for example one row of a batch.

    Returns:
        uint8 [3, S, S], C-contiguous (`out` where it is given).

    Raises:
        UsageError: the image is not RGB, or `out` has another shape, dtype or layout.
    """
    size = settings.input_size
    if out is None:
        out = np.empty((3, size, size), np.uint8)
    elif out.shape != (3, size, size) or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise UsageError(
            f"out must be a C-contiguous uint8 array of shape (3, {size}, {size}), got {out.dtype} {out.shape}"
        )
    box = _centre(image, settings.crop_pct) if settings.fit == "crop" else (0, 0, image.width, image.height)
    resized = fit_box(image, box, settings)
    for channel, band in enumerate("RGB"):  # band by band: half the time of unpacking [S, S, 3] and transposing it
        out[channel] = np.frombuffer(resized.tobytes("raw", band), np.uint8).reshape(size, size)
    return out


def fit_box(image: Image.Image, box: Box, settings: Preprocess) -> Image.Image:
    """The part of an RGB image within a box (left, top, right, bottom) as S x S.

    It is stretched to the square; with fit "pad" it keeps its ratio, between bars in the mean colour.
    """
    _check_rgb(image)
    size, resample = settings.input_size, RESAMPLE[settings.interpolation]
    if settings.fit != "pad":
        return _resize(image, (size, size), resample, box)
    width, height = box[2] - box[0], box[3] - box[1]
    longer = max(width, height)
    inner = max(1, round(size * width / longer)), max(1, round(size * height / longer))
    square = Image.new("RGB", (size, size), tuple(round(255 * value) for value in settings.mean))
    square.paste(_resize(image, inner, resample, box), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return square


def equalise(image: Image.Image, via: Via) -> Image.Image:
    """The centred square of an RGB picture at one size (bicubic), and once through one codec.

    An evaluation passes every image through this before `preprocess`, so that a difference in native resolution, or in
    how images were stored, cannot tell in-distribution images from others.

    Raises:
        UsageError: the image is not RGB.
    """
    _check_rgb(image)
    square = _resize(image, (via.size, via.size), Image.Resampling.BICUBIC, _centre(image, 1.0))
    if via.jpeg is None:
        return square
    file = io.BytesIO()
    square.save(file, "JPEG", quality=via.jpeg)
    stored: Image.Image = Image.open(file)
    stored.load()  # of three channels, as it was written
    return stored


def _resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling, box: Box) -> Image.Image:
    """Pillow's resize, along the rows first: which way it goes first is up to its release, and rounding depends on it.

    Pillow up to 12 goes along the rows first. From 13 on it goes the cheaper way, so that a picture in portrait format
    would have other pixels on a device than where its model was trained.
    """
    left, top, right, bottom = box
    reach = max(SUPPORT.values()) * max(1.0, (bottom - top) / size[1])  # rows that the second pass looks at
    first, last = max(0, math.floor(top - reach)), min(image.height, math.ceil(bottom + reach))
    rows = image if (first, last) == (0, image.height) else image.crop((0, first, image.width, last))
    wide = rows.resize((size[0], rows.height), resample, (left, 0, right, rows.height))
    return wide.resize(size, resample, (0, top - first, size[0], bottom - first))


def _check_rgb(image: Image.Image) -> None:
    if image.mode != "RGB":
        raise UsageError(f"image must have mode RGB, got {image.mode}; pass it through load_image first")


def _centre(image: Image.Image, crop_pct: float) -> Box:
    """The box of the centred square of `crop_pct` times the shorter side."""
    width, height = image.size
    side = crop_pct * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a picture does that `load_image` knows, or that it says more of than that it is none."""
    try:
        with _open(path) as file, _identify(file):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:  # whatever a damaged header leads Pillow's decoders to
        return True


def _open(source: str | os.PathLike[str] | bytes) -> BinaryIO:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_fifo():  # open() would wait for a writer, for ever
            raise ImageError("a pipe, not a file")
        return open(path, "rb")
    raise ImageError(f"expected a path, encoded bytes, a PIL image or a uint8 array, got {type(source).__name__}")


def _identify(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(4)
        if file.read(8) not in _HEIF:
            raise
    try:
        pillow_heif = load("pillow_heif", "a HEIC picture")
    except (MissingExtraError, EngineError) as error:
        raise ImageError(str(error)) from error
    pillow_heif.register_heif_opener()
    return Image.open(file, formats=("HEIF",))


def _name(source: object) -> str:
    """What an error message calls it: a file by its name in quotes, the rest by its kind."""
    if isinstance(source, Image.Image):
        file = getattr(source, "filename", "")
        return f"'{file}'" if file else "PIL image"
    if isinstance(source, Picture):
        return source.name
    if isinstance(source, Stored):
        return f"'{source.name}'"
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        return f"'{without_secrets(name) if is_address(name) else name}'"
    if isinstance(source, np.ndarray):
        return "image array"
    return "image bytes" if isinstance(source, (bytes, bytearray, memoryview)) else "image"


def _reason(error: Exception) -> str:
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in a format that is read ({', '.join(FORMATS)}); save it as JPEG or PNG"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"too many pixels (the limit is {MAX_PIXELS}); reduce it first"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"damaged or unsupported image data ({error or type(error).__name__})"


def _decode(
    image: Image.Image, settings: Preprocess | None, jpeg: BinaryIO | None = None, damaged: Damaged | None = None
) -> Image.Image:
    """RGB, upright, and the region of the settings; `jpeg`: its file, where it is one."""
    width, height = image.size
    if not width * height:
        raise ImageError(f"it has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"too many pixels ({width} x {height}, the limit is {MAX_PIXELS}); reduce it first")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"too long ({width} x {height}, the limit is {MAX_SIDE} a side); cut it into parts first")
    if any(tile[0] in SLOW_DECODERS for tile in getattr(image, "tile", ())) and width * height > MAX_SLOW_PIXELS:
        raise ImageError(f"a kind of {image.format} that is read up to {MAX_SLOW_PIXELS} pixels; save it as PNG")
    if image.format == "EPS":  # Pillow would start Ghostscript on it
        raise ImageError("EPS is a program, not a picture; convert it to PNG first")
    rgb, damage, scale = None, None, 1
    if jpeg is not None:
        scale = 1 if settings is None else _scale(image.size, settings)
        if scale > 1:
            image.draft(None, (width // scale, height // scale))
        jpeg.seek(0)
        content = jpeg.read()
        scans = content.count(b"\xff\xda")
        if scans > MAX_SCANS and scans * width * height > MAX_SCANS * MAX_PIXELS:
            raise ImageError(f"a JPEG of {scans} scans, each of which takes as long as a picture; save it anew")
        rgb, damage = decode_jpeg(content, image)
    if rgb is None:
        image.load()
        rgb = _to_rgb(image)
    if damage is not None and damaged is not None:
        damaged(damage)
    # After load(): Pillow turns some formats (TIFF) upright by itself, and then reports orientation 1.
    turn = _UPRIGHT.get(_orientation(image))
    if turn is not None:
        rgb = rgb.transpose(turn)
        rgb.info.clear()  # or a second load_image would turn it again
    if settings is None or settings.roi is None:
        return rgb
    full = rgb.size if scale == 1 else (width, height) if turn is None or turn in _STANDING else (height, width)
    return _region(rgb, settings.roi, full, scale)


def _scale(size: tuple[int, int], settings: Preprocess) -> int:
    """By how much a JPEG of a size may come reduced."""
    if settings.version < 2:
        return 1
    sides = size if settings.roi is None else settings.roi[2:]
    used = max(sides) if settings.fit == "pad" else min(sides) * (settings.crop_pct if settings.fit == "crop" else 1)
    fits = (scale for scale in (8, 4, 2) if used >= 2 * scale * settings.input_size and min(size) >= scale)
    return next(fits, 1)


def _region(image: Image.Image, roi: tuple[int, int, int, int], full: tuple[int, int], scale: int) -> Image.Image:
    """A region in pixels of the full picture, of one that is reduced, to whole pixels of that."""
    left, top, width, height = roi
    if left + width > full[0] or top + height > full[1]:
        raise ImageError(
            f"the region {left},{top},{width},{height} does not lie within its {full[0]} x {full[1]} pixels; give "
            "pictures of the camera that it was set for, or another --roi"
        )
    return image.crop((left // scale, top // scale, -(-(left + width) // scale), -(-(top + height) // scale)))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF: the picture itself is whole, and viewers show it as stored
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bit(image)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> npt.NDArray[np.uint8]:
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    limit = 1 if image.mode == "F" else 65535
    if not (low >= 0 and high <= limit):
        raise ImageError(f"values {low} to {high} in mode {image.mode}; expected 0 to {limit}, save it as 8 or 16 bit")
    scaled = np.rint(pixels * 255) if image.mode == "F" else pixels >> 8
    return np.asarray(scaled, np.uint8)


def _from_array(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    if pixels.dtype != np.uint8:
        raise ImageError(f"an array must be uint8 with values 0 to 255, got {pixels.dtype}")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)) or pixels.size == 0:
        raise ImageError(f"an array must have shape [H, W] or [H, W, 1, 3 or 4], got {list(pixels.shape)}")
    return Image.fromarray(pixels)
