"""From an image file to the graph's uint8 input. Training's evaluation and every runtime use this one path."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ssod_edge.config import Preprocess
from ssod_edge.errors import ImageError, UsageError

#: What `load_image` takes.
ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]"

#: Largest width * height that is decoded: 256 MiB of RGB, and Pillow's own default warning limit.
MAX_PIXELS = 89_478_485

# Pillow warns of what is refused here anyway. Once, because `catch_warnings` in the threads that decode would undo
# each other's filters; and last, so that a filter of the host program wins.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)

#: The filters of `Preprocess.interpolation`.
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

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


def load_image(source: ImageLike) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    The EXIF orientation is applied. An alpha channel is dropped, colours as stored, which is what the usual
    training pipelines do. 16-bit grayscale keeps its high byte (value >> 8). 32-bit integers are read as 16-bit
    values (0..65535) and floating point as 0..1; a picture outside that range is refused, because its scale
    cannot be known. Of an animation the first frame is read (of a PIL image, its current frame).

    Args:
        source: path, encoded bytes, PIL image, or uint8 array [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4]
            (RGBA). A PIL image is not modified.

    Returns:
        A decoded PIL image of mode RGB. A source that is already one is returned as it is.

    Raises:
        ImageError: the image cannot be read (missing, empty, truncated, no image, more than `MAX_PIXELS`
            pixels, unsupported mode or dtype); the message holds its name and the reason.
    """
    # Pillow's decoders raise whatever a damaged file leads them to (OSError, SyntaxError, struct.error, ...).
    try:
        if isinstance(source, Image.Image):
            return _decode(source)
        if isinstance(source, np.ndarray):
            return _to_rgb(_from_array(source))
        with _open(source) as file:
            if not file.read(1):
                raise ImageError("it is empty")
            file.seek(0)
            with Image.open(file) as image:
                return _decode(image)
    except Exception as error:
        raise ImageError(f"{_name(source)}: {_reason(error)}") from error


def preprocess(
    image: Image.Image, settings: Preprocess, out: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Centre crop and resize in one pass.

    The crop is the centred square whose side is `crop_pct` times the shorter side of the image. At its border the
    filter sees the pixels beyond it, as if the whole image had been resized first.

    Args:
        image: RGB, from `load_image`.
        settings: input size, crop and interpolation.
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
    resized = _square(image, size, settings.crop_pct, RESAMPLE[settings.interpolation])
    for channel, band in enumerate("RGB"):  # band by band: half the time of unpacking [S, S, 3] and transposing it
        out[channel] = np.frombuffer(resized.tobytes("raw", band), np.uint8).reshape(size, size)
    return out


def via(image: Image.Image, size: int) -> Image.Image:
    """The picture reduced to its centred square at `size` x `size` pixels (bicubic).

    The `via32` protocol passes every image through this before `preprocess`, so that a difference in native
    resolution cannot tell in-distribution images from others.

    Raises:
        UsageError: `size` is below 1, or the image is not RGB.
    """
    if size < 1:
        raise UsageError(f"via: size must be at least 1 pixel, got {size}")
    return _square(image, size, 1.0, Image.Resampling.BICUBIC)


def _square(image: Image.Image, size: int, crop_pct: float, resample: Image.Resampling) -> Image.Image:
    if image.mode != "RGB":
        raise UsageError(f"image must have mode RGB, got {image.mode}; pass it through load_image first")
    width, height = image.size
    side = crop_pct * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), resample, box=(left, top, left + side, top + side))


def _open(source: str | os.PathLike[str] | bytes) -> BinaryIO:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_fifo():  # open() would wait for a writer, for ever
            raise ImageError("a pipe, not a file")
        return open(path, "rb")
    raise ImageError(f"expected a path, encoded bytes, a PIL image or a uint8 array, got {type(source).__name__}")


def _name(source: object) -> str:
    """What an error message calls it: a file by its name in quotes, the rest by its kind."""
    if isinstance(source, Image.Image):
        file = getattr(source, "filename", "")
        return f"'{file}'" if file else "PIL image"
    if isinstance(source, (str, os.PathLike)):
        return f"'{os.fspath(source)}'"
    if isinstance(source, np.ndarray):
        return "image array"
    return "image bytes" if isinstance(source, (bytes, bytearray, memoryview)) else "image"


def _reason(error: Exception) -> str:
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that Pillow reads"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"too many pixels (the limit is {MAX_PIXELS}); reduce it first"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"damaged or unsupported image data ({error or type(error).__name__})"


def _decode(image: Image.Image) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"too many pixels ({image.width} x {image.height}, the limit is {MAX_PIXELS}); reduce it first"
        )
    if image.format == "EPS":  # Pillow would start Ghostscript on it
        raise ImageError("EPS is a program, not a picture; convert it to PNG first")
    image.load()
    rgb = _to_rgb(image)
    # After load(): Pillow turns some formats (TIFF) upright by itself, and then reports orientation 1.
    turn = _UPRIGHT.get(_orientation(image))
    if turn is None:
        return rgb
    rgb = rgb.transpose(turn)
    rgb.info.clear()  # or a second load_image would turn it again
    return rgb


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
