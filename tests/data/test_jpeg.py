"""JPEG through simplejpeg: Pillow's pixels to the last bit, and what Pillow does not tell of damage."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import ssod_edge.data.jpeg
from ssod_edge.config import Preprocess
from ssod_edge.data.jpeg import decode_jpeg
from ssod_edge.data.pixels import load_image
from ssod_edge.errors import ImageError, MissingExtraError
from ssod_edge.runtime.predict import Predictor

pytest.importorskip("simplejpeg", reason="this machine has no wheel of it")


def photo(height: int = 203, width: int = 317) -> Image.Image:
    """Coarse and fine detail, in colour."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (height // 20 + 1, width // 20 + 1, 3)).repeat(20, 0).repeat(20, 1)[:height, :width]
    return Image.fromarray((coarse + rng.integers(0, 56, coarse.shape)).astype(np.uint8))


def encode(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


KINDS = {
    "4:2:0": encode(photo()),
    "4:2:2": encode(photo(), subsampling=1),
    "4:4:4": encode(photo(), subsampling=0, quality=97),
    "progressive": encode(photo(), progressive=True),
    "rgb": encode(photo(), keep_rgb=True),
    "gray": encode(photo().convert("L")),
    "cmyk": encode(photo().convert("CMYK")),
    "small": encode(photo(7, 5)),
    "one pixel": encode(photo(1, 1)),
    "narrow": encode(photo(300, 1)),
}


def test_a_jpeg_of_many_scans_is_refused_at_once() -> None:
    """Each scan of a few bytes takes as long as a whole picture."""
    file = io.BytesIO()
    Image.new("L", (2000, 2000)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    scans = content[:last] + content[last:-2] * 600 + content[-2:]
    load_image(content[:last] + content[last:-2] * 3 + content[-2:])
    with pytest.raises(ImageError, match="JPEG of 60. scans"):
        load_image(scans)


@pytest.mark.parametrize(("mode", "size"), [("CMYK", (64, 64)), ("RGB", (7, 7))])
def test_damage_is_told_of_what_pillow_decodes_too(mode: str, size: tuple[int, int]) -> None:
    pytest.importorskip("simplejpeg")
    file, found = io.BytesIO(), []
    pixels = np.random.default_rng(0).integers(0, 256, (*size, len(mode)), np.uint8)
    Image.fromarray(pixels, mode).save(file, "JPEG", quality=95)
    content = bytearray(file.getvalue())
    load_image(bytes(content), damaged=found.append)
    assert not found
    for start in range(content.rindex(b"\xff\xda") + 16, len(content) - 8, 4):
        damaged = bytes(content[:start]) + bytes(6) + bytes(content[start + 6 :])
        with contextlib.suppress(ImageError):
            load_image(damaged, damaged=found.append)
    assert found


def test_strict_images_needs_what_tells_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssod_edge.data.jpeg.simplejpeg", None)
    runner = SimpleNamespace(spec=SimpleNamespace(preprocess=None), artifact=SimpleNamespace(threshold=None))
    Predictor(runner)
    with pytest.raises(MissingExtraError, match="pip install simplejpeg"):
        Predictor(runner, strict_images=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 12, 25, 50, 500])
def test_the_pixels_are_pillows_at_every_scale(kind: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Preprocess(input_size=size, fit="pad")
    found = load_image(KINDS[kind], settings)
    monkeypatch.setattr(ssod_edge.data.jpeg, "simplejpeg", None)
    expected = load_image(KINDS[kind], settings)
    assert found.size == expected.size and found.tobytes() == expected.tobytes()


def test_what_pillow_alone_can_decode_is_left_to_it() -> None:
    taken = {}
    for kind, content in KINDS.items():
        with Image.open(io.BytesIO(content)) as image:
            taken[kind] = decode_jpeg(content, image)[0] is not None
    assert [kind for kind, was in taken.items() if not was] == ["cmyk", "small", "one pixel"]


def damaged() -> bytes:
    """A JPEG whose lower half is decoded from the wrong place."""
    content = KINDS["4:2:0"]
    return content[: len(content) // 2] + content[len(content) // 2 + 400 :]


@pytest.mark.parametrize("as_file", [False, True])
def test_damage_is_told_and_the_pixels_are_what_they_were(as_file: bool, tmp_path: Path) -> None:
    told: list[str] = []
    source = tmp_path / "a.jpg"
    source.write_bytes(damaged())
    found = load_image(source if as_file else damaged(), damaged=told.append)
    with Image.open(source) as expected:
        assert found.tobytes() == expected.tobytes()
    assert len(told) == 1 and told[0].startswith("damaged image data (Corrupt JPEG data: "), told
    load_image(KINDS["4:2:0"], damaged=told.append)
    assert len(told) == 1


def test_a_file_that_is_cut_short_is_refused_as_before() -> None:
    told: list[str] = []
    with pytest.raises(ImageError, match="truncated"):
        load_image(KINDS["4:2:0"][:-3000], damaged=told.append)
    assert not told


def test_without_it_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssod_edge.data.jpeg, "simplejpeg", None)
    told: list[str] = []
    load_image(damaged(), damaged=told.append)
    assert not told


def test_a_warning_that_is_not_of_damage_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some phones write scans whose parameters libjpeg finds odd."""

    class Odd:
        @staticmethod
        def decode_jpeg(*_: object, **__: object) -> None:
            raise ValueError("Invalid SOS parameters for sequential JPEG")

    monkeypatch.setattr(ssod_edge.data.jpeg, "simplejpeg", Odd)
    told: list[str] = []
    assert load_image(KINDS["4:2:0"], damaged=told.append).size == (317, 203)
    assert not told
