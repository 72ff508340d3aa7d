"""Small pictures in every format and kind that is read, and some that are not."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from ssod_edge.data.pixels import load_image
from ssod_edge.errors import ImageError

SIZE = (75, 60)


@dataclass(frozen=True)
class Made:
    """A picture as a file.

    Attributes:
        kind: format and what is special, as "JPEG progressive".
        content: the file.
        pixels: uint8 [H, W, 3] of it whole; None where it is refused.
    """

    kind: str
    content: bytes
    pixels: np.ndarray | None

    @property
    def format(self) -> str:
        return self.kind.partition(" ")[0]


def made_pictures() -> list[Made]:
    """One of each kind."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
    rgb = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (SIZE[1], SIZE[0]), np.uint8)))
    files = {
        **_jpegs(rgb), **_pngs(rgb, alpha), **_tiffs(rgb, rng),
        "WEBP lossy": _saved(rgb, "WEBP", quality=80),
        "WEBP lossless": _saved(alpha, "WEBP", lossless=True),
        "WEBP animated": _saved(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)]),
        "GIF plain": _saved(rgb, "GIF"),
        "GIF animated": _saved(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)], loop=0),
        "GIF transparent": _saved(alpha, "GIF"),
        **{f"BMP {mode}": _saved(rgb.convert(mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")},
        "PPM binary": _saved(rgb, "PPM"),
        "P3 text": b"P3 2 2 255 " + b" ".join(b"%d" % n for n in range(12)) + b"\n",
        "JPEG2000 plain": _saved(rgb, "JPEG2000"),
        "ICO nested": _saved(rgb, "ICO"),
        "PDF nested": _saved(rgb, "PDF"),
        "EPS program": _saved(rgb, "EPS"),
        "SVG text": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><rect width='9' height='9'/></svg>",
    }  # fmt: skip
    return [Made(kind, content, _pixels(content)) for kind, content in files.items()]


def _pixels(content: bytes) -> np.ndarray | None:
    try:
        return np.asarray(load_image(content))
    except ImageError:
        return None


def _saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _jpegs(rgb: Image.Image) -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation
    exif[0x010E] = "a description " * 20
    large = rgb.resize((640, 512))
    return {
        "JPEG plain": _saved(rgb, "JPEG"),
        "JPEG large": _saved(large, "JPEG", quality=70),
        "JPEG progressive": _saved(large, "JPEG", progressive=True),
        "JPEG grey": _saved(rgb.convert("L"), "JPEG"),
        "JPEG cmyk": _saved(rgb.convert("CMYK"), "JPEG"),
        "JPEG full": _saved(rgb, "JPEG", subsampling=0, quality=95, restart_marker_rows=1),
        "JPEG turned": _saved(rgb, "JPEG", exif=exif, icc_profile=b"profile" * 100),
        "JPEG several": _saved(rgb, "MPO", save_all=True, append_images=[rgb.rotate(180)]),
    }


def _pngs(rgb: Image.Image, alpha: Image.Image) -> dict[str, bytes]:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "words " * 50, zip=True)
    modes = {mode: _saved(rgb.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB")}
    high = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    return {
        **{f"PNG {mode}": content for mode, content in modes.items()},
        "PNG alpha": _saved(alpha, "PNG"),
        "PNG deep": _saved(high, "PNG"),
        "PNG text": _saved(rgb, "PNG", pnginfo=info, icc_profile=b"profile" * 100),
        "PNG animated": _saved(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)]),
        "PNG bomb": png(30_000, 30_000, zlib.compress(bytes(100_000))),
        "PNG textbomb": png(8, 8, zlib.compress(bytes(200)), (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 24)))),
    }


def _tiffs(rgb: Image.Image, rng: np.random.Generator) -> dict[str, bytes]:
    kinds = {
        name: _saved(rgb, "TIFF", compression=name)
        for name in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits", "tiff_adobe_deflate")
    }
    numbers = rng.random((SIZE[1], SIZE[0]), np.float32)
    return {
        **{f"TIFF {name}": content for name, content in kinds.items()},
        "TIFF cmyk": _saved(rgb.convert("CMYK"), "TIFF"),
        "TIFF float": _saved(Image.fromarray(numbers), "TIFF"),
        "TIFF deep": _saved(Image.fromarray((numbers * 65535).astype(np.uint16)), "TIFF"),
        "TIFF pages": _saved(rgb, "TIFF", save_all=True, append_images=[rgb.rotate(90)]),
    }


def png(width: int, height: int, data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8-bit grey whose header says this size, whatever its data are; every checksum fits."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body
