"""splits.json: the images that training held out, or a message."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pictures import Labels, write_folder

from ssod_edge.data.groups import describe_groups, image_groups
from ssod_edge.data.sources import open_dataset
from ssod_edge.data.splits import Splits, read_splits, split_dataset
from ssod_edge.errors import UsageError


@pytest.mark.parametrize(
    ("val", "message"),
    [
        ([1, 2], None),
        ([2, 1], None),
        ([1, 1, 2], "was changed after training"),
        ([True, 2], r"val\[0\] must be an integer, got true"),
        ([1.0, 2], r"val\[0\] must be an integer, got 1.0"),
        ([[1], [2]], r"val\[0\] must be an integer"),
        ([1, 2**70], r"val\[1\] must be an integer of at most 64 bits"),
        ({"1": 2}, "val must be a list"),
        (None, "val must be a list"),
        ([1, 3], "was changed after training"),
        ([1, 999], "was changed after training"),
    ],
)
def test_the_held_out_images(tmp_path: Path, val: object, message: str | None) -> None:
    source = open_dataset(str(write_folder(tmp_path / "data", per_class=4)))
    others = np.setdiff1d(np.arange(len(source)), [0, 1, 2])
    splits = Splits(others, np.array([1, 2]), np.array([0]))
    (tmp_path / "splits.json").write_text(json.dumps({"val": val, "calib": [0]}))
    if message is None:
        assert read_splits(tmp_path, source, splits.hash).hash == splits.hash
        return
    with pytest.raises(UsageError, match=f"{message}.*name the ID images with --id"):
        read_splits(tmp_path, source, splits.hash)


def sizes(source: Labels, val: float | None = None, calib: float | None = None) -> list[int]:
    splits = split_dataset(source, val, calib, 0)
    parts = (splits.train, splits.val, splits.calib)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(source)))
    assert all((np.bincount(source.labels[part], minlength=len(source.classes)) > 0).all() for part in parts)
    return [len(part) for part in parts]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([5000] * 10, [45000, 2500, 2500]),  # 5%
        ([500] * 4, [1600, 200, 200]),  # 200 each
        ([100] * 4, [280, 60, 60]),  # 15%
        ([20] * 4, [48, 12, 20]),  # 19 for a threshold
        ([10] * 4, [24, 8, 8]),  # 19 would be more than a third
        ([3] * 5, [5, 5, 5]),
        ([300, 10, 3], [217, 48, 48]),
    ],
)
def test_without_fractions_the_held_out_splits_follow_the_number_of_images(
    counts: list[int], expected: list[int]
) -> None:
    assert sizes(Labels(*counts)) == expected


def test_fractions_that_are_given_are_taken_as_they_are() -> None:
    assert sizes(Labels(20, 20), 0.05, 0.05) == [36, 2, 2]
    assert sizes(Labels(20, 20), 0.05, None) == [32, 2, 6]


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together_and_every_class_is_everywhere(seed: int) -> None:
    source = Labels(80, 40, 20)
    groups = image_groups(source, r"video\d+")
    assert groups is not None and len(np.unique(groups)) == 35
    splits = split_dataset(source, None, None, seed, groups)
    parts = (splits.train, splits.val, splits.calib)
    assert sorted(np.concatenate(parts).tolist()) == list(range(140))
    assert sum(len(np.unique(groups[part])) for part in parts) == 35
    for part in parts[1:]:
        assert np.bincount(source.labels[part], minlength=3).tolist() == [12, 4, 4], "15%, by fours"
    assert split_dataset(source, None, None, seed, groups).hash == splits.hash
    assert split_dataset(source, None, None, seed + 1, groups).hash != splits.hash


def test_a_group_may_have_images_of_several_classes() -> None:
    source = Labels(40, 40)
    groups = np.tile(np.arange(10), 8)  # each video shows both
    splits = split_dataset(source, 0.2, 0.2, 0, groups)
    found = [set(groups[part].tolist()) for part in (splits.train, splits.val, splits.calib)]
    assert [len(part) for part in found] == [6, 2, 2] and len(set.union(*found)) == 10


def test_groups_that_cannot_be_divided_are_refused() -> None:
    source = Labels(12, 12)
    with pytest.raises(
        UsageError, match="class 'c1' of 'labels' has 1 group.*at least 3 .*--group that divides further"
    ):
        split_dataset(source, 0.1, 0.1, 0, np.array([*range(12), *[99] * 12]))
    crossed = np.array([0] * 4 + [1] * 4 + [2] * 4 + [0] * 4 + [3] * 4 + [4] * 4)  # 0 has both classes
    splits = split_dataset(source, 0.3, 0.3, 0, crossed)
    assert {0} == set(crossed[splits.train].tolist())
    given = Labels(12, 12)
    given.given_val = np.array([0, 1, 12, 13])
    with pytest.raises(UsageError, match="2 groups of 'labels' have images both for training and for validation"):
        split_dataset(given, None, None, 0, np.arange(24) // 3)


def test_groups_come_from_names_or_from_the_data() -> None:
    source = Labels(6, 6)
    for pattern in (r"(video\d+)_", r"video\d+"):
        assert image_groups(source, pattern).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert image_groups(source, None) is None
    some = image_groups(source, r"(video0)")
    assert len(np.unique(some)) == 9 and len(np.unique(some[:4])) == 1
    assert describe_groups(some) == (
        "groups: 1 of up to 4 images, and 8 images on their own; each group lies in one split"
    )
    source.group_names = ("a", "b", "") * 4
    assert len(np.unique(image_groups(source, None))) == 2 + 4
    with pytest.raises(UsageError, match=r"regular expression, got '\(' "):
        image_groups(source, "(")
    with pytest.raises(UsageError, match="is found in no image of 'labels'; one is 'c0/video0_0.png'"):
        image_groups(source, "burst")
