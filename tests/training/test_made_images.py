"""Made images: what each kind keeps and what it breaks."""

from __future__ import annotations

import pytest
import torch

from ssod_edge.config import OUTLIERS
from ssod_edge.training.made_images import blend, make_outliers, rotate, shuffle, zoom


def pictures(n=12, size=18):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [18, 19, 2])
@pytest.mark.parametrize("kind", OUTLIERS)
def test_every_kind_makes_images_of_the_same_shape_that_are_new(kind, size):
    image = pictures(size=size)
    torch.manual_seed(0)
    made = make_outliers(image, (kind,), 30)
    assert made.shape == (30, 3, size, size) and made.dtype == torch.uint8
    assert not (made[:, None] == image[None]).flatten(2).all(2).any(), "an image came back as it was"
    torch.manual_seed(0)
    assert torch.equal(make_outliers(image, (kind,), 30), made), "training seeds every step anew"


def test_turned_images_turn_back():
    image = pictures()
    turned = rotate(image)
    matches = torch.stack([(turned == image.rot90(k, (2, 3))).flatten(1).all(1) for k in range(4)])
    assert not matches[0].any() and matches.any(0).all() and matches[1:].any(1).all(), "each by 90, 180 or 270"


def test_shuffled_quadrants_are_all_there():
    image = pictures(n=50)
    shuffled = shuffle(image)
    quadrants = lambda x: {x[:, i : i + 9, j : j + 9].numpy().tobytes() for i in (0, 9) for j in (0, 9)}  # noqa: E731
    for before, after in zip(image, shuffled, strict=True):
        assert quadrants(before) == quadrants(after) and not torch.equal(before, after)
    odd = shuffle(pictures(size=19))
    assert torch.equal(odd[:, :, 18], pictures(size=19)[:, :, 18]), "what the grid does not cover stays"


def test_zoomed_crops_are_smooth_and_of_the_image():
    image = pictures(size=48)
    image[0] = torch.arange(48).mul(5).to(torch.uint8)  # a ramp from left to right
    made = zoom(image)
    assert made[1:].float().diff(dim=3).abs().mean() < 0.5 * image[1:].float().diff(dim=3).abs().mean()
    width = made[0, 0, 0].float()
    assert (width.diff() >= 0).all() and 235 / 8 < width[-1] - width[0] < 235 * 0.4, "a sixth to three eighths of it"


def test_blended_images_are_the_mean_of_two():
    image = pictures()
    expected = (image[3].int() + image[2].int()) // 2
    assert torch.equal(blend(image, image.roll(1, dims=0))[3], expected.to(torch.uint8))


@pytest.mark.parametrize(("n", "count", "kinds"), [(8, 4, OUTLIERS), (2, 1, ("blend",)), (1, 1, ("blend",))])
def test_no_training_image_comes_back_however_few_there_are_to_blend(n, count, kinds):
    image = pictures(n)
    for seed in range(20):
        torch.manual_seed(seed)
        made = make_outliers(image, kinds, count)
        assert not (made[:, None] == image[None]).flatten(2).all(2).any()


def test_kinds_come_in_turn():
    image = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    image[:, :, 0] = 200  # a stripe on top
    made = make_outliers(image, ("rotate", "blend"), 10)
    assert (made[1::2] == image[0]).all(), "the blend of equal images is that image"
    assert not (made[::2] == image[0]).flatten(1).all(1).any()
    assert make_outliers(image, ("rotate", "blend"), 1).shape[0] == 1
