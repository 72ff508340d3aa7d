"""Image reading and preprocessing: one path, the same bytes everywhere, and an ImageError for everything else."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from places import GOLDEN

from ssod_edge.config import FITS, IMAGE_SUFFIXES, Preprocess
from ssod_edge.data.named import Via
from ssod_edge.data.pixels import (
    FORMATS,
    MAX_BYTES,
    MAX_PIXELS,
    MAX_SIDE,
    equalise,
    load_image,
    preprocess,
    read_pixels,
)
from ssod_edge.errors import ImageError, UsageError

GOLDEN_FILE = GOLDEN / "image.npz"
ORIENTATION = 0x0112


def picture(height: int = 47, width: int = 61) -> np.ndarray:
    """uint8 [H, W, 3] without symmetry: a ramp, a product and a chequerboard."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(7 * x + 3 * y) % 256, (x * y) % 256, np.where((x // 5 + y // 3) % 2, 255, 20)], 2).astype(
        np.uint8
    )


def encode(image: np.ndarray | Image.Image, file_format: str, **options: object) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be this large and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# ---------------------------------------------------------------- sources


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    array = picture()
    data = encode(array, "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with Image.open(path) as opened:
        sources = [path, str(path), data, bytearray(data), memoryview(data), opened, Image.fromarray(array), array]
        for source in sources:
            np.testing.assert_array_equal(pixels(load_image(source)), array)


def test_a_jpeg_file_its_bytes_and_its_decoded_array_give_the_same_input(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(picture(600, 800), "JPEG", quality=80))
    whole = Preprocess(input_size=32, version=1)
    expected = read_pixels(path, whole)
    with Image.open(path) as opened:
        for source in (path.read_bytes(), opened, np.asarray(opened)):
            np.testing.assert_array_equal(read_pixels(source, whole), expected)


def test_an_rgb_image_is_returned_without_a_copy() -> None:
    image = Image.fromarray(picture())
    assert load_image(image) is image


def test_a_source_is_not_modified() -> None:
    array = picture()
    palette = Image.fromarray(array).convert("P")
    palette.info["transparency"] = 0
    before = palette.tobytes()
    load_image(palette)
    load_image(array)
    assert palette.mode == "P" and palette.tobytes() == before and palette.info == {"transparency": 0}
    np.testing.assert_array_equal(array, picture())


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_gray_arrays_become_rgb(shape: tuple[int, ...]) -> None:
    array = np.arange(35, dtype=np.uint8).reshape(shape)
    np.testing.assert_array_equal(pixels(load_image(array)), np.repeat(array.reshape(5, 7, 1), 3, 2))


def test_arrays_need_not_be_contiguous() -> None:
    array = picture()[::2, ::-3]
    np.testing.assert_array_equal(pixels(load_image(array)), array)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((4, 4), bool), "bool"),
        (np.zeros((4, 4), np.uint16), "uint16"),
        (np.zeros((3, 8, 8), np.uint8), r"\[3, 8, 8\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"\[1, 8, 8, 3\]"),
        (np.zeros(8, np.uint8), r"\[8\]"),
        (np.zeros((0, 8, 3), np.uint8), r"\[0, 8, 3\]"),
        (np.array(3, np.uint8), r"\[\]"),
    ],
)
def test_other_arrays_are_refused_by_name(array: np.ndarray, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        load_image(array)


@pytest.mark.parametrize("source", [None, 3, ["a.png"], io.BytesIO(b"")])
def test_other_types_are_refused_by_name(source: object) -> None:
    with pytest.raises(ImageError, match=type(source).__name__):
        load_image(source)  # type: ignore[arg-type]


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_8_bit_modes_convert_as_pillow_does(mode: str) -> None:
    image = Image.fromarray(picture()).convert(mode)
    np.testing.assert_array_equal(pixels(load_image(image)), np.asarray(image.convert("RGB")))


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (220, 30, 30))
    found = pixels(load_image(encode(red.convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(found.astype(int) - (220, 30, 30)).max() <= 6


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_dropped_and_the_stored_colours_stay(file_format: str) -> None:
    rgba = np.dstack([picture(), (picture()[:, :, 0] // 2)])
    data = encode(rgba, file_format, **({"lossless": True, "exact": True} if file_format == "WEBP" else {}))
    np.testing.assert_array_equal(pixels(load_image(data)), picture())
    np.testing.assert_array_equal(pixels(load_image(rgba)), picture())


def test_gray_with_alpha_keeps_its_gray() -> None:
    gray = Image.fromarray(picture()[:, :, 0])
    image = gray.copy()
    image.putalpha(100)
    assert image.mode == "LA"
    np.testing.assert_array_equal(pixels(load_image(encode(image, "PNG"))), np.asarray(gray.convert("RGB")))


@pytest.mark.parametrize("transparency", [1, b"\x00\x80\xff"])
def test_a_palette_with_transparency_keeps_its_colours_and_warns_of_nothing(transparency: int | bytes) -> None:
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 3).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    data = encode(image, "PNG", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pixels(load_image(data))
    palette = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    np.testing.assert_array_equal(found, palette[np.arange(12).reshape(3, 4) % 3])


SIXTEEN = (np.arange(12, dtype=np.uint16) * 5461).reshape(3, 4)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_high_byte(file_format: str) -> None:
    found = pixels(load_image(encode(SIXTEEN, file_format)))
    np.testing.assert_array_equal(found, np.repeat((SIXTEEN >> 8)[:, :, None], 3, 2))


def test_big_endian_16_bit_and_32_bit_integers_read_alike() -> None:
    big = Image.frombytes("I;16B", (4, 3), SIXTEEN.astype(">u2").tobytes())
    wide = Image.fromarray(SIXTEEN.astype(np.int32))
    assert (big.mode, wide.mode) == ("I;16B", "I")
    for image in (big, wide):
        np.testing.assert_array_equal(pixels(load_image(image))[:, :, 0], SIXTEEN >> 8)


def test_floats_from_0_to_1_are_scaled_and_rounded() -> None:
    image = Image.fromarray(np.array([[0, 0.5, 1, 0.002]], np.float32))
    np.testing.assert_array_equal(pixels(load_image(encode(image, "TIFF")))[0, :, 1], [0, 128, 255, 1])


@pytest.mark.parametrize(
    "values",
    [np.array([[0, 255.0]], np.float32), np.array([[-0.1, 1]], np.float32), np.array([[np.nan, 1]], np.float32)],
)
def test_floats_of_unknown_scale_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ImageError, match="mode F; expected 0 to 1"):
        load_image(Image.fromarray(values))


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_beyond_16_bit_are_refused(value: int) -> None:
    with pytest.raises(ImageError, match="mode I; expected 0 to 65535"):
        load_image(encode(Image.fromarray(np.array([[0, value]], np.int32)), "TIFF"))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_is_read(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert pixels(load_image(data))[4, 4].tolist() == [255, 0, 0]


# ---------------------------------------------------------------- orientation


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(file_format: str, orientation: int, tmp_path: Path) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"turned.{file_format.lower()}"
    path.write_bytes(encode(picture(), file_format, exif=exif))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    loaded = load_image(path)
    np.testing.assert_array_equal(pixels(loaded), expected)
    assert loaded.size == ((61, 47) if orientation < 5 else (47, 61))
    np.testing.assert_array_equal(pixels(load_image(loaded)), expected)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    np.testing.assert_array_equal(pixels(load_image(encode(picture(), "PNG", exif=exif))), picture())


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encode(picture(), "PNG", exif=b"Exif\x00\x00" + b"nonsense that is no TIFF header")
    np.testing.assert_array_equal(pixels(load_image(data)), picture())


def test_a_damaged_tag_beside_the_orientation_does_not_keep_a_picture_lying() -> None:
    """A description that is a floating-point number: Pillow reads it, and cannot write it again."""
    turn, odd = (struct.pack("<HHII", *entry) for entry in ((ORIENTATION, 3, 1, 6), (0x010E, 11, 1, 0)))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + odd + turn + bytes(4)
    found = pixels(load_image(encode(picture(), "PNG", exif=exif)))
    np.testing.assert_array_equal(found, np.rot90(picture(), -1))


# ---------------------------------------------------------------- bad input


def refused(source: object, *words: str) -> None:
    """The source gives an ImageError whose one-line message has all these words."""
    with pytest.raises(ImageError) as caught:
        load_image(source)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "missing.jpg", "missing.jpg", "no such file")
    refused(str(tmp_path), tmp_path.name, "is a directory")
    refused(tmp_path / ("long" * 100), "name too long")
    refused("zero\0byte.png", "null byte")
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    refused(loop, "loop.png", "symbolic links")


def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encode(picture(), "PNG"))
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything
        os.seteuid(65534)
    try:
        refused(path, "secret.png", "permission denied")
    finally:
        os.seteuid(user)


def test_empty_and_foreign_files_are_named(tmp_path: Path) -> None:
    for name, content, reason in [
        ("empty.jpg", b"", "empty"),
        ("text.jpg", b"this is not an image", "not an image"),
        ("zeros.png", bytes(1000), "not an image"),
        ("drawing.eps", encode(picture(), "EPS"), "not an image"),
    ]:
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, name, reason)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "image bytes: it is empty"),
        (
            bytearray(b"no image"),
            f"image bytes: not an image in a format that is read ({', '.join(FORMATS)}); save it as JPEG or PNG",
        ),
        (np.zeros((4, 4, 3)), "image array: an array must be uint8 with values 0 to 255, got float64"),
        (5, "image: expected a path, encoded bytes, a PIL image or a uint8 array, got int"),
        (None, "image: expected a path, encoded bytes, a PIL image or a uint8 array, got NoneType"),
    ],
)
def test_what_has_no_name_is_called_by_its_kind(source: object, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(source)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_truncated_images_are_refused(file_format: str, share: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    data = encode(Image.fromarray(noise), file_format)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(share * len(data))])
    refused(path, "cut.img")


def fits_file() -> bytes:
    return b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800)


@pytest.mark.parametrize("content", [fits_file(), b"qoif" + struct.pack(">IIBB", 9, 9, 3, 0) + bytes(99), b"8BPS\0\1"])
def test_formats_that_are_no_photos_are_refused_with_those_that_are(content: bytes) -> None:
    refused(content, "not an image in a format that is read", "JPEG, PNG, GIF", "WEBP", "save it as JPEG or PNG")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def test_a_heic_picture_names_the_extra_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    refused(HEIC, "a HEIC picture needs", "pip install 'ssod-edge[heic]'")


def test_a_heic_picture_is_read_with_the_extra() -> None:
    heif = pytest.importorskip("pillow_heif", reason="needs the extra heic")
    file = io.BytesIO()
    heif.from_pillow(Image.fromarray(smooth(120, 160))).save(file, quality=90)
    found = pixels(load_image(file.getvalue()))
    assert np.abs(found.astype(int) - smooth(120, 160)).mean() < 3
    refused(HEIC)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES - {".heic", ".heif"}))
def test_every_suffix_of_an_image_is_a_format_that_is_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".avif" and "AVIF" not in FORMATS:
        pytest.skip("this Pillow reads no AVIF")
    Image.fromarray(smooth(40, 60)).convert("L" if suffix == ".pgm" else "RGB").save(path)
    assert load_image(path).size == (60, 40)


def test_a_long_picture_and_a_large_file_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    refused(png_header(1, MAX_SIDE + 1), f"1 x {MAX_SIDE + 1}", str(MAX_SIDE), "cut it into parts")
    path = tmp_path / "large.png"
    path.write_bytes(encode(picture(), "PNG"))
    os.truncate(path, MAX_BYTES)
    load_image(path)
    os.truncate(path, MAX_BYTES + 1)  # a hole, which takes no room
    refused(path, "large.png", f"larger than {MAX_BYTES} bytes", "save it as JPEG")


def test_what_pillow_decodes_in_python_is_read_up_to_a_size() -> None:
    small = b"P3\n2 1\n255\n" + b"9 8 7 " * 2
    np.testing.assert_array_equal(pixels(load_image(small)), [[[9, 8, 7]] * 2])
    for header in (b"P3\n1001 1000\n255\n", b"P6\n1001 1000\n100\n"):
        refused(header + bytes(4_000_000), "PPM", "1000000 pixels", "save it as PNG")
    assert load_image(b"P6\n1001 1000\n255\n" + bytes(3_003_000)).size == (1001, 1000)


@pytest.mark.parametrize("size", [(0, 0), (0, 7), (7, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    refused(Image.new("RGB", size), f"no pixels ({size[0]} x {size[1]})")
    refused(np.zeros((*size, 3), np.uint8), "must have shape")
    for mode in ("L", "RGBA", "I;16", "F", "P"):
        refused(Image.new(mode, size), "no pixels")


@pytest.mark.parametrize("size", [(20000, 20000), (MAX_PIXELS + 1, 1)])
def test_decompression_bombs_are_refused_before_they_are_decoded(size: tuple[int, int]) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(png_header(*size), "too many pixels")
    assert limit == Image.MAX_IMAGE_PIXELS


BOMBS = """
import sys, warnings
from concurrent.futures import ThreadPoolExecutor
from ssod_edge.errors import ImageError
from ssod_edge.data.pixels import load_image
before = list(warnings.filters)
def load(path):
    try:
        load_image(path)
    except ImageError as error:
        return str(error)
with ThreadPoolExecutor(4) as pool:
    print(*pool.map(load, sys.argv[1:] * 4), sep="\\n")
assert list(warnings.filters) == before
"""


def test_a_bomb_is_one_message_with_one_limit(tmp_path: Path) -> None:
    """Of 100 and 400 million pixels Pillow warns of the first and refuses the second, each with its own limit."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, side in zip(paths, (10_000, 20_000), strict=True):
        path.write_bytes(png_header(side, side))
    done = subprocess.run([sys.executable, "-c", BOMBS, *map(str, paths)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert done.stderr == "" and len(lines) == 8
    for line in lines:
        assert "too many pixels (" in line and f"the limit is {MAX_PIXELS}); reduce it first" in line
        assert str(2 * MAX_PIXELS) not in line


def test_a_bomb_is_an_image_error_when_the_host_makes_warnings_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(png_header(10000, 10000), "too many pixels")


def test_the_limit_holds_when_the_host_has_switched_off_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    refused(png_header(30000, 30000), "too many pixels", "30000 x 30000", str(MAX_PIXELS))
    with Image.open(io.BytesIO(png_header(30000, 30000))) as image:
        refused(image, "too many pixels")


def test_a_closed_pil_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "closed.png"
    path.write_bytes(encode(picture(), "PNG"))
    image = Image.open(path)
    image.close()
    refused(image, "closed.png")


SEEDS = {
    name: encode(image, name.split("-")[0])
    for name, image in {
        "JPEG-rgb": Image.fromarray(picture(15, 17)),
        "JPEG-cmyk": Image.fromarray(picture(15, 17)).convert("CMYK"),
        "PNG-rgb": Image.fromarray(picture(15, 17)),
        "PNG-p": Image.fromarray(picture(15, 17)).convert("P"),
        "GIF-p": Image.fromarray(picture(15, 17)).convert("P"),
        "TIFF-f": Image.fromarray(np.linspace(0, 1, 30, dtype=np.float32).reshape(5, 6)),
        "BMP-rgb": Image.fromarray(picture(15, 17)),
        "WEBP-rgb": Image.fromarray(picture(15, 17)),
    }.items()
}


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SEEDS)), st.data())
def test_damaged_bytes_give_an_image_or_an_image_error(name: str, data: st.DataObject) -> None:
    content = bytearray(SEEDS[name])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    try:
        image = load_image(bytes(content))
    except ImageError as error:
        assert str(error).startswith("image bytes: ")
    else:
        assert image.mode == "RGB" and image.tobytes()


# ---------------------------------------------------------------- preprocess and via


def test_the_crop_is_the_centred_square_of_crop_pct() -> None:
    array = picture(20, 34)
    image = load_image(array)
    # Without a change of scale the filter has nothing to do, so the crop shows bare.
    np.testing.assert_array_equal(preprocess(image, Preprocess(input_size=20)), array[:, 7:27].transpose(2, 0, 1))
    half = preprocess(image, Preprocess(input_size=10, crop_pct=0.5))
    np.testing.assert_array_equal(half, array[5:15, 12:22].transpose(2, 0, 1))


def test_pixels_beyond_the_crop_and_the_filters_reach_have_no_influence() -> None:
    array = picture(40, 40)
    framed = np.full_like(array, 255)  # crop 5..35, scale 30 / 16, bicubic reach 2 * 30 / 16 < 4
    framed[1:39, 1:39] = array[1:39, 1:39]
    settings_ = Preprocess(input_size=16, crop_pct=0.75)
    np.testing.assert_array_equal(preprocess(load_image(array), settings_), preprocess(load_image(framed), settings_))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_reduction_is_antialiased(interpolation: str) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = preprocess(load_image(stripes), Preprocess(input_size=8, interpolation=interpolation))[:, :, 1:-1]
    assert np.abs(inner.astype(int) - 128).max() <= 8


def test_interpolations_differ() -> None:
    image = load_image(picture())
    bicubic, bilinear = (preprocess(image, Preprocess(input_size=16, interpolation=i)) for i in ("bicubic", "bilinear"))
    assert (bicubic != bilinear).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3)])
@pytest.mark.parametrize("crop_pct", [0.1, 0.875, 1.0])
def test_the_smallest_images_work(size: tuple[int, int], crop_pct: float) -> None:
    image = load_image(encode(Image.new("RGB", size, (9, 99, 199)), "PNG"))
    for found in (image, equalise(image, Via(32))):
        result = preprocess(found, Preprocess(input_size=24, crop_pct=crop_pct))
        np.testing.assert_array_equal(result, np.broadcast_to(np.uint8([9, 99, 199])[:, None, None], (3, 24, 24)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(0.01, 1), st.integers(1, 40))
def test_any_geometry_fits(height: int, width: int, crop_pct: float, size: int) -> None:
    result = preprocess(load_image(picture(height, width)), Preprocess(input_size=size, crop_pct=crop_pct))
    assert result.shape == (3, size, size) and result.dtype == np.uint8 and result.flags.c_contiguous


def test_out_is_one_row_of_a_batch() -> None:
    batch = np.zeros((3, 3, 16, 16), np.uint8)
    image, size = load_image(picture()), Preprocess(input_size=16)
    row = batch[1]
    assert preprocess(image, size, out=row) is row
    np.testing.assert_array_equal(batch[1], preprocess(image, size))
    assert not batch[0].any() and not batch[2].any()


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((3, 16, 16), np.float32),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((16, 16, 3), np.uint8).transpose(2, 0, 1),
    ],
)
def test_a_wrong_out_is_refused(out: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"out must be a C-contiguous uint8 array of shape \(3, 16, 16\)"):
        preprocess(load_image(picture()), Preprocess(input_size=16), out=out)


def test_other_modes_are_refused() -> None:
    with pytest.raises(UsageError, match="mode RGB, got L"):
        preprocess(Image.new("L", (8, 8)), Preprocess(input_size=8))
    with pytest.raises(UsageError, match="mode RGB, got CMYK"):
        equalise(Image.new("CMYK", (8, 8)), Via(32))
    with pytest.raises(UsageError, match="at least 1"):
        Via(0)


def test_via_removes_native_resolution() -> None:
    image = load_image(picture(300, 400))
    small = equalise(image, Via(32))
    assert small.size == (32, 32)
    np.testing.assert_array_equal(pixels(equalise(small, Via(32))), pixels(small))
    native, reduced = (preprocess(i, Preprocess(input_size=128)).astype(int) for i in (image, small))
    assert np.abs(np.diff(reduced, axis=2)).mean() < 0.5 * np.abs(np.diff(native, axis=2)).mean()


def test_via_removes_the_codec() -> None:
    """A picture that was a JPEG before and one that never was come out alike in what a JPEG leaves: blocks."""
    rng = np.random.default_rng(0)
    plain = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    file = io.BytesIO()
    plain.save(file, "JPEG", quality=75)
    once = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    assert np.array_equal(np.asarray(equalise(plain, Via(64, 75))), np.asarray(once)), "one JPEG by Pillow, and no more"
    again = equalise(once, Via(64, 75))
    changed, before = (
        np.abs(np.asarray(a, int) - np.asarray(b, int)).mean() for a, b in ((once, again), (plain, once))
    )
    assert again.mode == "RGB" and again.size == (64, 64) and changed < 0.2 * before
    settings = Preprocess(input_size=16)
    for source in (plain, file.getvalue()):
        expected = preprocess(equalise(load_image(source), Via(32, 40)), settings)
        assert np.array_equal(read_pixels(source, replace(settings, version=1), via=Via(32, 40)), expected)


# ---------------------------------------------------------------- reduced decoding


def smooth(height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] without fine detail or symmetry, which looks the same at any scale."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    return np.stack([255 * x, 255 * y, 120 + 100 * np.sin(9 * x + 5 * y)], 2).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "options", "scale"),
    [
        ((128, 900), {}, 2),
        ((127, 900), {}, 1),
        ((256, 300), {}, 4),
        ((255, 300), {}, 2),
        ((512, 512), {}, 8),
        ((2000, 1600), {}, 8),
        ((256, 300), {"crop_pct": 0.9}, 2),
        ((256, 300), {"crop_pct": 0.9, "fit": "squash"}, 4),
        ((100, 256), {"fit": "pad"}, 4),
        ((512, 512), {"version": 1}, 1),
        ((512, 512), {"roi": (0, 0, 256, 300)}, 4),
        ((512, 512), {"roi": (0, 0, 128, 300), "fit": "pad"}, 4),
    ],
)
def test_a_jpeg_comes_at_the_smallest_scale_that_is_twice_the_input(
    shape: tuple[int, int], options: dict[str, Any], scale: int
) -> None:
    settings_ = Preprocess(input_size=32, **options)
    data = encode(smooth(*shape), "JPEG", quality=95)
    sides = settings_.roi[2:] if settings_.roi else shape[::-1]
    assert load_image(data, settings_).size == tuple(-(-side // scale) for side in sides)
    assert load_image(data).size == shape[::-1], "without settings it is whole"


def jpegs() -> dict[str, bytes]:
    """The kinds of JPEG that cameras and programs write, of one picture of odd sides."""
    image = Image.fromarray(smooth(407, 531))
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    return {
        "plain": encode(image, "JPEG", quality=95),
        "progressive": encode(image, "JPEG", quality=95, progressive=True),
        "cmyk": encode(image.convert("CMYK"), "JPEG", quality=95),
        "gray": encode(image.convert("L"), "JPEG", quality=95),
        "turned": encode(image, "JPEG", quality=95, exif=turned),
        "mpo": encode(image, "MPO", quality=95, save_all=True, append_images=[image]),
    }


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("kind", sorted(jpegs()))
def test_a_reduced_jpeg_gives_nearly_the_pixels_of_the_whole_one(kind: str, fit: Any) -> None:
    for region in (None, (31, 47, 300, 310)):
        settings_ = Preprocess(input_size=24, fit=fit, roi=region)
        data = jpegs()[kind]
        small, whole = load_image(data, settings_), load_image(data, replace(settings_, version=1))
        assert small.width < whole.width / 3
        difference = read_pixels(data, settings_).astype(int) - read_pixels(data, replace(settings_, version=1))
        assert np.abs(difference).max() <= 10 and np.abs(difference).mean() < 2


@pytest.mark.parametrize("region", [(0, 0, 1, 407), (530, 406, 1, 1), (527, 3, 4, 400)])
def test_the_narrowest_region_of_a_reduced_picture_has_a_pixel(region: tuple[int, int, int, int]) -> None:
    found = load_image(jpegs()["plain"], Preprocess(input_size=24, fit="pad", roi=region))
    whole = np.asarray(load_image(jpegs()["plain"]))[region[1] :, region[0] :][: region[3], : region[2]]
    assert min(found.size) >= 1
    assert np.abs(pixels(found).mean((0, 1)) - whole.mean((0, 1))).max() < 10


def test_only_a_file_is_reduced() -> None:
    data, settings_ = jpegs()["plain"], Preprocess(input_size=24)
    with Image.open(io.BytesIO(data)) as opened:
        assert load_image(opened, settings_).size == load_image(np.asarray(opened), settings_).size == (531, 407)
    assert load_image(encode(smooth(407, 531), "PNG"), settings_).size == (531, 407)


def test_via_reads_at_its_own_size() -> None:
    """Of the model's 100 pixels nothing would be reduced, and of 8 pixels' too much if a crop of it were taken."""
    data = jpegs()["plain"]
    for size, via_size in ((100, 24), (8, 100)):
        settings_ = Preprocess(input_size=size, crop_pct=0.5)
        expected = preprocess(equalise(load_image(data, Preprocess(input_size=via_size)), Via(via_size)), settings_)
        np.testing.assert_array_equal(read_pixels(data, settings_, via=Via(via_size)), expected)


# ---------------------------------------------------------------- fit and region


def test_squash_takes_all_of_the_picture_whatever_the_crop() -> None:
    array = picture(20, 34)
    image = load_image(array)
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(preprocess(image, Preprocess(input_size=16, fit="squash", crop_pct=0.5)), expected)


@pytest.mark.parametrize(("height", "width"), [(20, 40), (40, 20), (3, 40), (1, 500), (30, 30)])
def test_pad_keeps_the_ratio_between_bars_in_the_mean_colour(height: int, width: int) -> None:
    settings_ = Preprocess(input_size=20, fit="pad", mean=(0.2, 0.5, 0.9), crop_pct=0.5)
    bars = np.uint8([51, 128, 230])
    found = preprocess(Image.new("RGB", (width, height), (255, 0, 0)), settings_).transpose(1, 2, 0)
    rows, columns = (max(1, round(20 * side / max(height, width))) for side in (height, width))
    top, left = (20 - rows) // 2, (20 - columns) // 2
    expected = np.tile(bars, (20, 20, 1))
    expected[top : top + rows, left : left + columns] = (255, 0, 0)  # to the edge: nothing rings into the bars
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["array", "png", "pil"])
def test_a_region_is_cut_from_the_upright_picture(kind: str) -> None:
    array = picture(40, 60)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    lying = Image.fromarray(np.ascontiguousarray(np.rot90(array)))
    source = {"array": array, "png": encode(lying, "PNG", exif=exif), "pil": Image.fromarray(array)}[kind]
    found = load_image(source, Preprocess(input_size=8, roi=(7, 3, 20, 30)))
    np.testing.assert_array_equal(pixels(found), array[3:33, 7:27])


@pytest.mark.parametrize("turn", [1, 6])
def test_a_region_outside_of_a_picture_is_an_error(turn: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    data = encode(smooth(407, 531), "JPEG", exif=exif)
    width, height = (531, 407) if turn == 1 else (407, 531)
    load_image(data, Preprocess(input_size=24, roi=(0, 0, width, height)))
    for region in ((1, 0, width, height), (0, 1, width, height), (width, 0, 1, 1)):
        with pytest.raises(ImageError) as caught:
            load_image(data, Preprocess(input_size=24, roi=region))
        words = ("image bytes: the region", ",".join(map(str, region)), f"{width} x {height} pixels", "--roi")
        assert all(word in str(caught.value) for word in words), caught.value


# ---------------------------------------------------------------- golden bytes


def golden_results(jpeg: bytes) -> dict[str, np.ndarray]:
    image = load_image(picture())
    return {
        "bicubic": preprocess(image, Preprocess(input_size=16, crop_pct=0.875)),
        "bilinear": preprocess(image, Preprocess(input_size=16, interpolation="bilinear")),
        "enlarged": preprocess(load_image(picture(9, 7)), Preprocess(input_size=16)),
        "via8": preprocess(equalise(image, Via(8)), Preprocess(input_size=16)),
        "photo": read_pixels(jpeg, Preprocess(input_size=16, version=1)),
    }


def test_the_bytes_are_those_of_the_golden_file() -> None:
    """Pillow's resize may differ by one level between releases; more would be another model input."""
    with np.load(GOLDEN_FILE) as golden:
        results = golden_results(golden["jpeg"].tobytes())
        assert set(golden) == {*results, "jpeg"}
        for name, result in results.items():
            difference = np.abs(result.astype(int) - golden[name])
            assert difference.max() <= 1, f"{name}: {difference.max()} levels"


if __name__ == "__main__":  # python tests/test_image.py rewrites the golden file
    JPEG = encode(picture(60, 80), "JPEG", quality=90)
    np.savez_compressed(GOLDEN_FILE, jpeg=np.frombuffer(JPEG, np.uint8), **golden_results(JPEG))
    sys.stdout.write(f"wrote {GOLDEN_FILE}\n")


@pytest.mark.parametrize("size", [(96, 272), (272, 96), (300, 400), (400, 300)])
def test_rows_are_resized_first_whatever_pillow_finds_cheaper(size: tuple[int, int]) -> None:
    """Rounding after the first pass depends on which one it is, by up to 20 levels in noise."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    settings = Preprocess(160, crop_pct=0.875)
    side = 0.875 * min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    wide = Image.fromarray(noise).resize((160, size[1]), Image.Resampling.BICUBIC, (left, 0, left + side, size[1]))
    expected = np.asarray(wide.resize((160, 160), Image.Resampling.BICUBIC, (0, top, 160, top + side)))
    found = preprocess(Image.fromarray(noise), settings)
    assert np.abs(found.transpose(1, 2, 0).astype(int) - expected).max() <= 1
