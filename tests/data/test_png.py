"""Checksums of a PNG's pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssod_edge.data.pixels import load_image
from ssod_edge.data.png import pixels_are_whole
from ssod_edge.errors import ImageError


@pytest.fixture
def picture() -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_zeros_among_the_pixels_are_damage(picture: bytes) -> None:
    """Pillow makes pixels of them: more than there are to come, so that it never sees the end."""
    found = []
    for start in range(200, len(picture) - 5000, 500):
        damaged = picture[:start] + bytes(4000) + picture[start + 4000 :]
        with pytest.raises(ImageError, match=r"^image bytes: damaged image data \("):
            load_image(damaged)
        found.append(pixels_are_whole(io.BytesIO(damaged)))
    assert len(found) > 10 and not any(found)


def test_a_whole_one_is_read_and_its_place_in_the_file_stays(picture: bytes, tmp_path: Path) -> None:
    file = io.BytesIO(picture + b"anything behind the end")
    file.seek(33)
    assert pixels_are_whole(file) and file.tell() == 33
    (tmp_path / "a.png").write_bytes(picture)
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(Image.open(io.BytesIO(picture))))


def test_a_cut_is_left_to_the_decoder(picture: bytes) -> None:
    for length in (9, 30, 40, len(picture) // 2, len(picture) - 14):
        assert pixels_are_whole(io.BytesIO(picture[:length]))
    with pytest.raises(ImageError, match="truncated"):
        load_image(picture[: len(picture) // 2])
