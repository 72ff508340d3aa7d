"""Disturbances of the graph's input: what is fitted with, and what is tested with."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from ssod_edge.data.disturbances import SHIFTS, STRENGTHS, Pixels, disturbed_copy, shift
from ssod_edge.errors import UsageError

#: Shifts that draw nothing.
FIXED = {"lighter", "darker", "contrast", "warm", "blur", "jpeg", "resolution"}


def photo(seed: int = 0, size: int = 48) -> Pixels:
    """Smooth shapes and some texture, of middle tones."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size] / size
    shape = 120 + 60 * np.sin(7 * rows + seed) * np.cos(5 * columns) + 25 * np.sin(45 * rows) * np.cos(37 * columns)
    colours = np.array([1.0, 0.9, 0.7]).reshape(3, 1, 1)
    return np.clip(shape * colours + rng.normal(0, 1, (3, size, size)), 0, 255).astype(np.uint8)


def change(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@pytest.mark.parametrize("size", [1, 2, 48])
@pytest.mark.parametrize("kind", SHIFTS)
def test_a_shift_keeps_the_form_and_leaves_the_photo_alone(kind: str, size: int) -> None:
    pixels = photo(size=size)
    before = pixels.copy()
    for strength in STRENGTHS:
        shifted = shift(pixels, kind, strength, 0)
        assert (shifted.shape, shifted.dtype) == (pixels.shape, np.uint8) and shifted.flags.c_contiguous
        assert not np.shares_memory(shifted, pixels)
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize("kind", SHIFTS)
def test_strong_changes_more_than_mild_and_mild_changes_something(kind: str) -> None:
    for seed in range(4):
        pixels = photo(seed)
        mild, strong = (change(pixels, shift(pixels, kind, strength, (0, seed))) for strength in STRENGTHS)
        assert 0.2 < mild < 50 and strong > 1.1 * mild


@pytest.mark.parametrize("kind", SHIFTS)
def test_a_shift_depends_on_its_seed_alone(kind: str) -> None:
    pixels = photo()
    once = shift(pixels, kind, "mild", (3, 7))
    assert np.array_equal(shift(pixels, kind, "mild", (3, 7)), once)
    others = [shift(pixels, kind, "mild", (3, index)) for index in range(8, 16)]
    assert all(np.array_equal(other, once) for other in others) == (kind in FIXED)


def test_shifts_differ_from_each_other() -> None:
    pixels = photo()
    made = {shift(pixels, kind, strength, 0).tobytes() for kind in SHIFTS for strength in STRENGTHS}
    assert len(made) == len(SHIFTS) * len(STRENGTHS)


def test_other_processes_make_the_same_bytes() -> None:
    code = (
        "import hashlib, numpy as np; from ssod_edge.data.disturbances import *\n"
        "x = np.arange(3 * 20 * 20, dtype=np.uint8).reshape(3, 20, 20)\n"
        "made = [shift(x, kind, 'strong', (1, 2)) for kind in SHIFTS] + [disturbed_copy(x, np.random.default_rng(5))]\n"
        "print(hashlib.sha256(b''.join(m.tobytes() for m in made)).hexdigest())"
    )
    pixels = np.arange(3 * 20 * 20, dtype=np.uint8).reshape(3, 20, 20)
    made = [shift(pixels, kind, "strong", (1, 2)) for kind in SHIFTS] + [
        disturbed_copy(pixels, np.random.default_rng(5))
    ]
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert shown == hashlib.sha256(b"".join(m.tobytes() for m in made)).hexdigest()


def test_shifts_do_what_their_names_say() -> None:
    pixels = photo()
    mean = {kind: shift(pixels, kind, "mild", 0).astype(float).mean(axis=(1, 2)) for kind in SHIFTS}
    plain = pixels.astype(float).mean(axis=(1, 2))
    assert mean["lighter"] == pytest.approx(1.25 * plain, rel=0.03)
    assert mean["darker"] == pytest.approx(0.7 * plain, rel=0.01)
    assert mean["warm"][0] > plain[0] and mean["warm"][2] < plain[2]
    assert shift(pixels, "contrast", "mild", 0).std() < pixels.std()
    assert (shift(pixels, "noise", "mild", 0).astype(int) - pixels).std() == pytest.approx(8, rel=0.1)
    flat = np.full((3, 40, 40), 100, np.uint8)
    for kind in ("blur", "resolution", "rotation", "motion", "contrast"):
        assert np.array_equal(shift(flat, kind, "strong", 0), flat), "nothing but detail changes"
    specked = (shift(flat, "specks", "strong", 0) != flat).any(axis=0).mean()
    assert specked == pytest.approx(0.02, abs=0.01)
    shadowed = shift(flat, "shadow", "strong", 0)
    assert shadowed.min() < 40 and shadowed.max() > 90


def test_a_copy_is_drawn_from_its_generator() -> None:
    pixels = photo()
    copies = [disturbed_copy(pixels, np.random.default_rng(seed)) for seed in range(12)]
    assert all(copy.shape == pixels.shape and copy.dtype == np.uint8 for copy in copies)
    assert len({copy.tobytes() for copy in copies}) == 12
    assert np.array_equal(disturbed_copy(pixels, np.random.default_rng(3)), copies[3])
    assert all(1 < change(pixels, copy) < 70 for copy in copies)


def test_copies_reach_as_far_as_the_mild_light_and_not_as_the_strong() -> None:
    flat = np.full((3, 8, 8), 100, np.uint8)
    means = [disturbed_copy(flat, np.random.default_rng(seed))[1].mean() for seed in range(300)]
    assert min(means) < 70 + 5 and max(means) > 125
    assert min(means) > 55 + 5


@pytest.mark.parametrize(
    "pixels", [np.zeros((3, 4, 4), np.float32), np.zeros((4, 4, 3), np.uint8), np.zeros((3, 4), np.uint8)]
)
def test_other_arrays_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"must be uint8 \[3, S, S\]"):
        shift(pixels, "blur", "mild", 0)
    with pytest.raises(UsageError, match=r"must be uint8 \[3, S, S\]"):
        disturbed_copy(pixels, np.random.default_rng(0))


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="one of lighter, darker, .*got 'fog'"):
        shift(photo(), "fog", "mild", 0)
    with pytest.raises(UsageError, match="mild or strong, got 'wild'"):
        shift(photo(), "blur", "wild", 0)  # type: ignore[arg-type]
