"""Random crops of training: how large the photo is read, and what each fit makes of it; images that cannot be read."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import write_images

from ssod_edge.config import Preprocess
from ssod_edge.data.pixels import load_image
from ssod_edge.data.sources import open_dataset
from ssod_edge.errors import ImageError
from ssod_edge.training.batches import EvalImages, TrainImages, augment, load_batches

SETTINGS = Preprocess(input_size=32)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A folder with one JPEG of 1200 x 900, of detail at every scale."""
    rng = np.random.default_rng(0)
    array = sum(rng.uniform(-30, 30, (900 // n, 1200 // n, 3)).repeat(n, 0).repeat(n, 1) for n in (2, 4, 12, 60))
    path = tmp_path / "photos" / "a" / "0.jpg"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.uint8(np.clip(array + 128, 0, 255))).save(path, quality=95)
    return tmp_path / "photos"


def test_the_smallest_crop_is_not_enlarged_because_the_photo_came_reduced(photo: Path) -> None:
    """The photo at 1/8 has 112 rows: enough for all of it, and 22 for a crop of 1/20 of it."""
    source = open_dataset(str(photo), labelled=False)
    assert load_image(photo / "a" / "0.jpg", SETTINGS).size == (150, 113)
    for epoch in range(8):
        found, expected = (
            TrainImages(source, settings, epoch, 0.05, 0.5)[0][0].numpy().astype(int)
            for settings in (SETTINGS, replace(SETTINGS, version=1))
        )
        assert np.abs(found - expected).mean() < 3
        assert found.std() > 0.9 * expected.std()


def ramps(width: int, height: int) -> Image.Image:
    """Red says how far to the right a pixel is, green how far down."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, 0 * x], 2).astype(np.uint8))


def spans(fit: str, crop_scale_min: float) -> np.ndarray:
    """Shares [20, 2] of the width and height of a picture of 4:1 that random crops show."""
    settings, rng, mean = replace(SETTINGS, fit=fit), np.random.default_rng(0), (124, 116, 104)
    crops = [augment(ramps(400, 100), settings, rng, crop_scale_min, 0.5) for _ in range(20)]
    shown = [crop[:2, (crop != np.array(mean)[:, None, None]).any(0)] for crop in crops]
    return np.array([np.ptp(values, axis=1) / 255 for values in shown])


def test_crops_keep_about_the_shape_that_the_fit_sees() -> None:
    assert spans("crop", 1.0)[:, 0].max() < 0.65, "near a square, of a picture of 4:1"
    for fit in ("squash", "pad"):
        whole = spans(fit, 1.0)
        assert whole.min() > 0.75, "all of both sides but for the jitter of the aspect"
        assert spans(fit, 0.2).min() < 0.6


def test_padded_crops_have_bars() -> None:
    settings = replace(SETTINGS, fit="pad")
    for _ in range(5):
        crop = augment(ramps(400, 100), settings, np.random.default_rng(1), 0.5, 0.0)
        for row in (0, 5, 26, 31):
            assert (crop[:, row] == np.array([[124], [116], [104]])).all()
        assert crop[2, 16].max() == 0


def test_a_photo_that_the_region_does_not_fit_is_named(photo: Path) -> None:
    source, settings = open_dataset(str(photo), labelled=False), replace(SETTINGS, roi=(0, 0, 1200, 900))
    assert TrainImages(source, settings, 0, 0.5, 0.5)[0][0].shape == (3, 32, 32)
    wrong = TrainImages(source, replace(settings, roi=(0, 0, 1201, 900)), 0, 0.5, 0.5)
    with pytest.raises(ImageError, match=r"'a/0.jpg' of .*the region 0,0,1201,900 does not lie within its 1200 x 900"):
        list(load_batches(wrong, 0, batch_size=1))


def test_an_image_that_cannot_be_read_leaves_no_process_behind(tmp_path):
    write_images(tmp_path, 14)
    (tmp_path / "a" / "000.png").write_bytes(b"no image")
    images = EvalImages(open_dataset(str(tmp_path)), None, Preprocess(input_size=16))
    with pytest.raises(ImageError) as raised:
        list(load_batches(images, 1, batch_size=2))
    assert not multiprocessing.active_children() and "000.png" in str(raised.value)
