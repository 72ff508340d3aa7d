"""Copies are found, kept on one side of a split where that can be, and spoken of."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from pictures import Labels, write_folder

import ssod_edge.data.copies
from ssod_edge.config import TrainConfig
from ssod_edge.data.copies import MOST_ALIKE, Copies, exact_copies, joined, near_copies, near_pairs
from ssod_edge.data.division import divide, earlier_splits
from ssod_edge.data.sources import open_dataset
from ssod_edge.data.splits import split_dataset
from ssod_edge.errors import UsageError
from ssod_edge.files import write_json

CONFIG = TrainConfig(backbone="any", data="any", val_fraction=0.2, calib_fraction=0.2)


def alone(n: int) -> Copies:
    return Copies(np.arange(n), np.zeros((0, 2), np.int64))


def features_of(labels: np.ndarray, noise: float = 1.0, gap: float = 3.0, width: int = 64) -> np.ndarray:
    """[n, width] of images that differ from their class's mean by noise."""
    rng = np.random.default_rng(0)
    means = gap * rng.normal(size=(labels.max() + 1, width))
    return (means[labels] + noise * rng.normal(size=(len(labels), width))).astype(np.float32)


def near(z: np.ndarray, other: int) -> np.ndarray:
    """Nearly the features of another image: the cosine of their differences from the mean is about 0.95."""
    return z[other] + 0.3 * np.random.default_rng(other).normal(size=z.shape[1]).astype(np.float32)


def test_images_with_the_same_bytes_are_copies_whatever_their_names_and_labels(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", per_class=6)
    shutil.copy(folder / "class0" / "02.png", folder / "class0" / "90.png")
    shutil.copy(folder / "class0" / "02.png", folder / "class2" / "91.png")
    (folder / "class1" / "00.png").write_bytes(b"")  # no picture, and no copy of the other
    (folder / "class1" / "01.png").unlink()
    (folder / "class1" / "01.png").symlink_to(tmp_path / "gone.png")
    source = open_dataset(str(folder))
    copies = exact_copies(source)
    names = [source.source(index) for index in range(len(source))]
    first, *others = (names.index(name) for name in ("class0/02.png", "class0/90.png", "class2/91.png"))
    assert copies.exact == 2 and sorted(map(tuple, copies.pairs.tolist())) == [(first, other) for other in others]
    assert len(np.unique(copies.groups)) == len(source) - 2
    assert len(np.unique(copies.groups[[first, *others]])) == 1


def test_near_copies_are_found_in_blocks_and_other_images_of_a_class_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat(np.arange(3), 40)
    z = features_of(labels)
    z[[5, 77, 119]] = [near(z, 20), near(z, 42), near(z, 0)]
    z[[6, 8]] = near(z, 5)  # a copy of a copy, twice
    expected = {(0, 119), (42, 77), (5, 20), (5, 6), (5, 8), (6, 20), (8, 20), (6, 8)}
    for block in (7, 256):
        monkeypatch.setattr(ssod_edge.data.copies, "BLOCK", block)
        assert set(map(tuple, near_pairs(z, labels).tolist())) <= expected
        copies = near_copies(z, labels, alone(120))
        assert copies.groups[42] == copies.groups[77] and copies.groups[0] != copies.groups[1]
        assert copies.groups[5] == copies.groups[6] == copies.groups[8]
        assert copies.near == len(np.unique(copies.pairs)) == 8


def test_many_features_are_mixed_first_and_lose_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat(np.arange(4), 100)
    z = features_of(labels, width=2000)
    rng = np.random.default_rng(1)
    for index in range(0, 400, 4):  # cosines from 0.83 to 0.99
        z[index] = z[index + 2] + rng.uniform(0.15, 0.65) * rng.normal(size=2000)
    mixed = near_pairs(z, labels)
    monkeypatch.setattr(ssod_edge.data.copies, "ROUGH", 2000)
    assert 60 < len(mixed) < 100 and np.array_equal(mixed, near_pairs(z, labels))


def test_what_all_images_of_a_class_share_makes_no_copies() -> None:
    labels = np.repeat(np.arange(2), 30)
    z = features_of(labels, noise=0.2, gap=5.0)  # about the mean of all, the cosines within a class are 0.99
    assert len(near_pairs(z, labels)) == 0
    z[3], z[40] = z[7], z[11]  # of 40 the label is wrong: it is like all of the first class, and a copy of one
    assert set(map(tuple, near_pairs(z, labels).tolist())) == {(3, 7), (11, 40)}


def test_a_row_of_images_that_are_each_like_the_next_is_no_single_group() -> None:
    rng, n = np.random.default_rng(0), 60
    turn = np.linspace(0, 3 * np.pi, n)[:, None]
    one, other = rng.normal(size=(2, 400))
    z = np.concatenate([np.cos(turn) * one + np.sin(turn) * other, 2 * rng.normal(size=(n, 400))]).astype(np.float32)
    z -= z.mean(axis=0)
    copies = near_copies(z, np.zeros(2 * n, np.int64), alone(2 * n))
    sizes = np.bincount(copies.groups)
    assert 2 <= sizes.max() < n / 3
    directions = z / np.linalg.norm(z, axis=1, keepdims=True)
    for group in np.flatnonzero(sizes > 1):
        members = directions[copies.groups == group]
        assert (members @ members.T).min() > 0.8, "any two are alike"


def test_a_group_has_at_most_one_image_more_than_neighbours_are_kept() -> None:
    z = features_of(np.zeros(200, np.int64))
    z[:90] = z[0] + 1e-3 * np.random.default_rng(1).normal(size=(90, 64))
    copies = near_copies(z, np.zeros(200, np.int64), alone(200))
    assert 2 <= np.bincount(copies.groups).max() <= MOST_ALIKE + 1 and copies.near == 90


def test_exact_and_near_copies_become_one_group() -> None:
    labels = np.zeros(30, np.int64)
    z = features_of(labels)
    z[9], z[4] = z[2], near(z, 2)
    groups = np.arange(30)
    groups[9] = 2
    copies = near_copies(z, labels, Copies(groups, np.array([[2, 9]]), 1))
    assert len(np.unique(copies.groups[[2, 4, 9]])) == 1 and len(np.unique(copies.groups)) == 28
    assert (copies.exact, copies.near) == (1, 2)


def test_joined_groups_reach_through_both() -> None:
    assert joined(np.array([0, 0, 1, 2, 3]), np.array([5, 6, 6, 7, 8])).tolist() == [0, 0, 0, 2, 3]
    assert len(np.unique(joined(np.array([3, 2, 1, 0]), np.array([0, 1, 2, 0])))) == 3


def test_without_copies_images_are_divided_as_before() -> None:
    source = Labels(40, 20)
    division = divide(source, CONFIG, alone(60))
    assert division.splits.hash == split_dataset(source, 0.2, 0.2, 0).hash
    assert division.groups is None and division.lines == () and division.record["in_two_splits"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_copies_lie_in_one_split(seed: int) -> None:
    source, pairs = Labels(40, 20), np.arange(60).reshape(30, 2)
    division = divide(source, replace(CONFIG, seed=seed), Copies(pairs[:, :1].repeat(2, axis=1).ravel(), pairs, 0, 60))
    for part in (division.splits.val, division.splits.calib):
        assert part.tolist() == pairs[np.isin(pairs[:, 0], part)].ravel().tolist()
        assert np.bincount(source.labels[part]).tolist() == [8, 4]
    assert division.lines == ("copies: 0 of 60 images have the bytes of another one, and 60 look nearly like another",)


def test_copies_join_the_groups_that_have_names() -> None:
    source, groups = Labels(20, 20), np.arange(40)
    groups[11] = 1
    copies = Copies(groups, np.array([[1, 11]]), 1)
    division = divide(source, replace(CONFIG, group=r"(\d)\.png"), copies)  # 0 to 9, by the last digit
    assert division.groups is not None and len(np.unique(division.groups)) == 10
    division = divide(source, replace(CONFIG, group=r"(\d+)\.png"), copies)
    assert division.groups is not None and division.groups[1] == division.groups[11]
    assert len(np.unique(division.groups)) == 39


def test_copies_with_two_labels_are_named() -> None:
    source, groups = Labels(10, 10), np.arange(20)
    groups[12] = 3
    division = divide(source, CONFIG, Copies(groups, np.array([[3, 12]]), 1))
    assert division.lines[1] == (
        "warning: 1 pair of copies has two labels: 'c0/video0_3.png' (c0) and 'c1/video3_12.png' (c1). "
        "Keep the right one"
    )
    assert division.record["other_labels"] == [["c0/video0_3.png", "c1/video3_12.png"]]


def test_copies_on_both_sides_of_given_validation_images_are_counted_and_stay() -> None:
    source, groups = Labels(20, 20), np.arange(40)
    source.given_val = np.array([0, 1, 2, 20, 21, 22])
    groups[[1, 9, 10]] = 1
    pairs = np.array([[1, 9], [1, 10]])
    division = divide(source, replace(CONFIG, val_fraction=None), Copies(groups, pairs, 2))
    assert division.splits.val.tolist() == source.given_val.tolist()
    assert division.groups is not None and division.groups[9] == division.groups[10] != division.groups[1]
    line = division.lines[-1]
    assert "warning: 1 image that is held out has a copy that is trained on" in line and "Keep one of each" in line
    assert "'c0/video2_9.png' and 'c0/video0_1.png'" in line and division.record["in_two_splits"] == 1


def test_images_that_copies_would_leave_too_few_of_are_divided_with_a_warning() -> None:
    source, groups = Labels(20, 4), np.arange(24)
    groups[20:] = 20
    copies = Copies(groups, np.array([[20, 21], [20, 22], [20, 23]]), 3)
    division = divide(source, CONFIG, copies)
    assert division.splits.hash == split_dataset(source, 0.2, 0.2, 0).hash
    assert any("warning: copies are not kept together" in line and "'c1'" in line for line in division.lines)
    assert division.record["in_two_splits"] == 2
    with pytest.raises(UsageError, match="'c1' of 'labels' has 2 image"):
        divide(Labels(20, 2), CONFIG, alone(22))


def test_a_run_that_goes_on_keeps_the_splits_on_record_also_where_those_part_copies(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", per_class=12)
    for name in ("03", "04", "05", "06", "07"):
        shutil.copy(data / "class0" / "02.png", data / "class0" / f"{name}.png")
    source, run = open_dataset(str(data)), tmp_path / "run"
    splits = split_dataset(source, 0.2, 0.2, 0)  # as an earlier release did, without a look at copies
    held_out = {"val": splits.val.tolist(), "calib": splits.calib.tolist()}
    write_json(run / "splits.json", {"data_fingerprint": source.fingerprint, "splits_hash": splits.hash, **held_out})
    write_json(run / "config.json", asdict(CONFIG))
    copies = exact_copies(source)
    assert divide(source, CONFIG, copies).splits.hash != splits.hash
    kept = earlier_splits(run, CONFIG, source)
    assert kept is not None and kept.hash == splits.hash
    division = divide(source, CONFIG, copies, kept)
    assert division.splits.hash == splits.hash and division.record["in_two_splits"] > 0
    assert "have a copy that is trained on" in division.lines[-1] or "has a copy that is trained" in division.lines[-1]
    assert earlier_splits(run, replace(CONFIG, seed=1), source) is None
    assert earlier_splits(tmp_path, CONFIG, source) is None
    (data / "class1" / "00.png").rename(data / "class1" / "other.png")
    assert earlier_splits(run, CONFIG, open_dataset(str(data))) is None
