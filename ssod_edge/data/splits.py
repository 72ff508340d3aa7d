"""Which images of a data set train, which choose, and which set thresholds; recorded with the run, by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ssod_edge.errors import UsageError
from ssod_edge.json_reader import from_json, read_json

Indices = NDArray[np.int64]

#: Images from which a 95% conformal threshold exists: ceil(0.95 * (n + 1)) <= n.
MIN_CALIB = 19
#: Images that a held-out split has where no fraction is given, and the bounds of its share of all.
HELD_OUT, LEAST_SHARE, MOST_SHARE = 200, 0.05, 0.15
#: Of validation images that come with the data: from so many on, half of them set thresholds.
LARGE_VAL = 2 * HELD_OUT


@dataclass(frozen=True)
class Splits:
    """Disjoint indices: train; val (choices); calib (thresholds and INT8, nothing else)."""

    train: Indices
    val: Indices
    calib: Indices

    @property
    def hash(self) -> str:
        """SHA-256 of the three index lists, hex."""
        digest = hashlib.sha256()
        for part in (self.train, self.val, self.calib):
            digest.update(np.sort(part).astype("<i8").tobytes() + b"|")
        return digest.hexdigest()


class Labelled(Protocol):
    """What is divided: a data set, by the labels of its images.

    Attributes:
        name: how the user named it.
        classes: class names in label order.
        labels: int64 [n]; -1 where an OOD set has no classes.
        fixed_splits: splits that come with the data, or None.
        given_val: int64, images that the data keeps for validation; None leaves that to `split_dataset`.
    """

    name: str
    classes: tuple[str, ...]
    labels: Indices
    fixed_splits: Splits | None
    given_val: Indices | None

    def __len__(self) -> int: ...


def split_dataset(
    source: Labelled,
    val_fraction: float | None,
    calib_fraction: float | None,
    seed: int,
    groups: Indices | None = None,
) -> Splits:
    """Split the training data by class, seeded; a data set's own splits win.

    Where the data has validation images, the calibration split is a share of the others; without a fraction, and from
    `LARGE_VAL` validation images on, it is half of these, since they are as new to the network as those that it meets.

    Args:
        val_fraction, calib_fraction: of the images to divide, in (0, 1). None is `HELD_OUT` images, within
            `LEAST_SHARE` and `MOST_SHARE`, and for calib at least `MIN_CALIB` if that is no more than a third.
        groups: int64 [n]; images of one group come into one split. None: each is its own.

    Raises:
        UsageError: a class has too few images or groups, so that one of the splits would lack it; a group of the
            validation images has others too.
    """
    if source.fixed_splits is not None:
        return source.fixed_splits
    everything = np.arange(len(source))
    if source.given_val is None:
        return Splits(*_divide(source, everything, (val_fraction, calib_fraction), seed, groups))
    val, rest = np.sort(source.given_val), np.setdiff1d(everything, source.given_val)
    if groups is not None and len(both := np.intersect1d(groups[val], groups[rest])):
        raise UsageError(
            f"{len(both)} groups of '{source.name}' have images both for training and for validation. Move the images "
            "of a group to one side, or leave --group out"
        )
    if calib_fraction is None and len(val) >= LARGE_VAL and _units(source, val, groups).min() >= 2:
        return Splits(rest, *_divide(source, val, (0.5,), seed, groups))
    train, calib = _divide(source, rest, (calib_fraction,), seed, groups)
    return Splits(train, val, calib)


def _units(source: Labelled, members: Indices, groups: Indices | None) -> Indices:
    """int64 [classes]: how many groups, or images where there are none, some images of each class are of."""
    units = members if groups is None else groups[members]
    pairs = np.unique(np.stack([source.labels[members], units]), axis=1)
    return np.bincount(pairs[0], minlength=len(source.classes))


def _divide(
    source: Labelled, members: Indices, fractions: Sequence[float | None], seed: int, groups: Indices | None
) -> list[Indices]:
    """Some images as those that are left, and a part for each fraction; every part has images of every class."""
    units, needed = _units(source, members, groups), len(fractions) + 1
    if units.min() < needed:
        label, what = int(units.argmin()), "image(s)" if groups is None else "group(s)"
        why = "for training, validation and calibration" if needed == 3 else "for training and calibration"
        fix = "" if groups is None else ". Add images, or use a --group that divides further"
        raise UsageError(
            f"class '{source.classes[label]}' of '{source.name}' has {units[label]} {what}; at least {needed} are "
            f"needed {why}{fix}"
        )
    labels = source.labels[members]
    counts = _counts(np.bincount(labels, minlength=len(source.classes)), fractions)
    if groups is None:
        part_of = _draw_images(labels, counts, seed)
    else:
        part_of = _draw_groups(labels, counts, seed, groups[members])
        for number, name in enumerate(source.classes):
            if len(np.unique(part_of[labels == number])) < needed:
                raise UsageError(
                    f"the groups of '{source.name}' cannot be divided so that every split has class '{name}'. "
                    "Use a --group that divides further, or add images"
                )
    return [members[part_of == part] for part in range(needed)]


def _counts(sizes: Indices, fractions: Sequence[float | None]) -> Indices:
    """int64 [parts, classes]: how many images each part has of the `sizes` of each class; the last sets thresholds."""
    n = int(sizes.sum())
    usual = min(max(HELD_OUT / n, LEAST_SHARE), MOST_SHARE)
    counts = np.zeros((len(fractions), len(sizes)), np.int64)
    for part, fraction in enumerate(fractions):
        wanted = np.maximum(1, np.rint((usual if fraction is None else fraction) * sizes))
        is_calib = part == len(fractions) - 1
        if fraction is None and is_calib and wanted.sum() < MIN_CALIB <= n / 3:
            wanted = np.ceil(MIN_CALIB / n * sizes)
        counts[part] = np.minimum(wanted, sizes - counts.sum(0) - (len(fractions) - part))
    return counts


def _draw_images(labels: Indices, counts: Indices, seed: int) -> Indices:
    """int64 [n]: the part of each image, 0 for what is left, k for row k - 1 of `counts`."""
    part_of = np.zeros(len(labels), np.int64)
    for label, wanted in enumerate(counts.T):
        members = np.random.default_rng((seed, label)).permutation(np.flatnonzero(labels == label))
        parts = np.repeat(np.arange(len(wanted) + 1), [len(members) - wanted.sum(), *wanted])
        part_of[members] = parts
    return part_of


def _draw_groups(labels: Indices, counts: Indices, seed: int, groups: Indices) -> Indices:
    """As `_draw_images`, whole groups at a time: those that bring a part nearer to its counts, in a seeded order.

    A class that a part then lacks is brought by the smallest group that has it. No part takes a group that leaves fewer
    groups of a class than there are parts to come.
    """
    _, group_of = np.unique(groups, return_inverse=True)
    pairs, images = np.unique(np.stack([group_of, labels]), axis=1, return_counts=True)
    starts = np.searchsorted(pairs[0], np.arange(1, pairs[0].max() + 1))
    classes, sizes = np.split(pairs[1], starts), np.split(images, starts)  # of each group
    left = np.bincount(pairs[1], minlength=counts.shape[1])
    order = np.random.default_rng(seed).permutation(len(classes))
    smallest_first = sorted(order.tolist(), key=lambda group: int(sizes[group].sum()))
    part_of_group = np.zeros(len(classes), np.int64)
    for part, wanted in enumerate(counts, 1):
        have, later = np.zeros_like(wanted), len(counts) - part + 1
        for lacking, candidates in ((False, order.tolist()), (True, smallest_first)):
            for group in candidates:
                label, size = classes[group], sizes[group]
                if part_of_group[group] or (left[label] <= later).any():
                    continue
                gap = wanted[label] - have[label]
                nearer = ((abs(gap - size) - abs(gap)) / np.maximum(wanted[label], 1)).sum() < 0
                if (have[label] == 0).any() if lacking else nearer:
                    part_of_group[group] = part
                    have[label] += size
                    left[label] -= 1
    return part_of_group[group_of]


def read_splits(
    folder: str | Path, source: Labelled, splits_hash: str, fix: str = "name the ID images with --id"
) -> Splits:
    """The splits that training recorded in a run folder.

    Args:
        folder: the run folder, with its splits.json.
        source: the training data, unchanged since.
        splits_hash: of the splits, from the checkpoint's metadata.
        fix: what the user can do where there are none, as the end of the message.

    Raises:
        UsageError: splits.json is missing, damaged or edited, so that it may name images that were trained on.
    """
    path = Path(folder) / "splits.json"
    try:
        record = read_json(path)
        held_out = [from_json(tuple[int, ...], record.get(part), part) for part in ("val", "calib")]
        val, calib = (np.array(indices, np.int64) for indices in held_out)
        train = np.setdiff1d(np.arange(len(source)), np.concatenate([val, calib]))  # all the others
    except (OSError, ValueError) as error:
        raise UsageError(f"'{folder}' has no readable splits.json ({error}); {fix}") from error
    splits = Splits(train, val, calib)
    if splits.hash != splits_hash:
        raise UsageError(f"'{path}' was changed after training: its hash is not the checkpoint's. Restore it, or {fix}")
    return splits
