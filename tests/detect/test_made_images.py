"""Made images: what each kind keeps and what it breaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from places import ROOT

from ssod_edge.config import OUTLIERS
from ssod_edge.detect.made_images import CHOICE_KINDS, TRAINING_KINDS, make_for_choices, make_for_training
from ssod_edge.errors import UsageError


def pictures(n=12, size=18):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def made_of_each(kind, image):
    return TRAINING_KINDS[kind](image, torch.arange(len(image)))


def test_training_takes_the_kinds_of_the_settings():
    assert tuple(TRAINING_KINDS) == OUTLIERS


def test_pixels_and_randomness_stay_as_they_are():
    """Resumed runs repeat their steps, and recorded choices stay; what is interpolated may differ by a rounding."""
    golden = np.load(ROOT / "tests" / "golden" / "made_images.npz")
    image = golden["image"]
    found = {"choices": make_for_choices(image)}
    found |= {f"choices.{kind}": make_for_choices(image, 1, (kind,)) for kind in CHOICE_KINDS}
    for kinds in (*((kind,) for kind in OUTLIERS), OUTLIERS):
        torch.manual_seed(3)
        found[f"training.{','.join(kinds)}"] = make_for_training(torch.from_numpy(image), kinds, 7).numpy()
        found[f"next.{','.join(kinds)}"] = torch.rand(1).numpy()
    torch.manual_seed(3)
    found["training.alone"] = make_for_training(torch.from_numpy(image[:1]), ("blend",), 2).numpy()
    assert set(found) == set(golden) - {"image"}
    for name, values in found.items():
        rounded = name == "choices" or any(kind in name for kind in ("zoom", "texture", "mosaic"))
        bound = 1 if rounded and not name.startswith("next") else 0
        np.testing.assert_allclose(values.astype(float), golden[name], rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("size", [18, 19, 2])
@pytest.mark.parametrize("kind", OUTLIERS)
def test_every_kind_makes_images_of_the_same_shape_that_are_new(kind, size):
    image = pictures(size=size)
    torch.manual_seed(0)
    made = make_for_training(image, (kind,), 30)
    assert made.shape == (30, 3, size, size) and made.dtype == torch.uint8
    assert not (made[:, None] == image[None]).flatten(2).all(2).any(), "an image came back as it was"
    torch.manual_seed(0)
    assert torch.equal(make_for_training(image, (kind,), 30), made), "training seeds every step anew"


def test_turned_images_turn_back():
    image = pictures()
    turned = made_of_each("rotate", image)
    matches = torch.stack([(turned == image.rot90(k, (2, 3))).flatten(1).all(1) for k in range(4)])
    assert not matches[0].any() and matches.any(0).all() and matches[1:].any(1).all(), "each by 90, 180 or 270"


def test_shuffled_quadrants_are_all_there():
    image = pictures(n=50)
    shuffled = made_of_each("shuffle", image)
    quadrants = lambda x: {x[:, i : i + 9, j : j + 9].numpy().tobytes() for i in (0, 9) for j in (0, 9)}  # noqa: E731
    for before, after in zip(image, shuffled, strict=True):
        assert quadrants(before) == quadrants(after) and not torch.equal(before, after)
    odd = made_of_each("shuffle", pictures(size=19))
    assert torch.equal(odd[:, :, 18], pictures(size=19)[:, :, 18]), "what the grid does not cover stays"


def test_zoomed_crops_are_smooth_and_of_the_image():
    image = pictures(size=48)
    image[0] = torch.arange(48).mul(5).to(torch.uint8)  # a ramp from left to right
    made = made_of_each("zoom", image)
    assert made[1:].float().diff(dim=3).abs().mean() < 0.5 * image[1:].float().diff(dim=3).abs().mean()
    width = made[0, 0, 0].float()
    assert (width.diff() >= 0).all() and 235 / 8 < width[-1] - width[0] < 235 * 0.4, "a sixth to three eighths of it"


def test_blended_images_are_the_mean_of_two():
    image = pictures(n=2)
    expected = ((image[0].int() + image[1].int()) // 2).to(torch.uint8)
    assert all(torch.equal(made, expected) for made in made_of_each("blend", image))


@pytest.mark.parametrize(("n", "count", "kinds"), [(8, 4, OUTLIERS), (2, 1, ("blend",)), (1, 1, ("blend",))])
def test_no_training_image_comes_back_however_few_there_are_to_blend(n, count, kinds):
    image = pictures(n)
    for seed in range(20):
        torch.manual_seed(seed)
        made = make_for_training(image, kinds, count)
        assert not (made[:, None] == image[None]).flatten(2).all(2).any()


def test_kinds_come_in_turn():
    image = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    image[:, :, 0] = 200  # a stripe on top
    made = make_for_training(image, ("rotate", "blend"), 10)
    assert (made[1::2] == image[0]).all(), "the blend of equal images is that image"
    assert not (made[::2] == image[0]).flatten(1).all(1).any()
    assert make_for_training(image, ("rotate", "blend"), 1).shape[0] == 1


@pytest.mark.parametrize("kind", CHOICE_KINDS)
def test_kinds_of_made_images(kind):
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
    images[:, 0] //= 4  # little red
    made = make_for_choices(images, seed=1, kinds=(kind,))
    assert made.shape == images.shape and made.dtype == np.uint8
    np.testing.assert_array_equal(made, make_for_choices(images, seed=1, kinds=(kind,)))
    assert all((one != other).mean() > 0.3 for one, other in zip(made, images, strict=True))
    assert made[:, 0].mean() < 60 < made[:, 1].mean()  # the colours are those of the images
    with pytest.raises(UsageError, match="got 'holes'"):
        make_for_choices(images, kinds=("holes",))


def test_a_texture_keeps_the_spectrum_of_its_image():
    image = np.full((1, 3, 16, 16), 128, np.uint8) + (40 * np.sin(np.arange(16) * np.pi / 2)).astype(np.uint8)
    made = make_for_choices(image, kinds=("texture",))
    spectra = [np.abs(np.fft.fft2(picture[0, 0].astype(float))) for picture in (image, made)]
    np.testing.assert_allclose(spectra[1], spectra[0], atol=0.02 * spectra[0].max())


def test_images_for_choices_are_made_of_the_images_and_nothing_else():
    known = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    made = make_for_choices(known)
    assert made.shape == known.shape and made.dtype == np.uint8
    np.testing.assert_array_equal(made, make_for_choices(known))
    for index in (0, 3):
        assert not np.array_equal(made[index], known[index])
        np.testing.assert_array_equal(np.sort(made[index], axis=None), np.sort(known[index], axis=None))
    blends = [(known[2].astype(int) + other) // 2 for other in known]
    assert [np.array_equal(made[2], blend) for blend in blends].count(True) == 1
    assert not np.array_equal(made[2], known[2])
    assert made[1].std() < known[1].std(), "a corner blown up has less detail"
