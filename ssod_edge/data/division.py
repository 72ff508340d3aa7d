"""How the images of a run are divided: by its settings, with what belongs together on one side, and what is said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.config import TrainConfig, from_dict
from ssod_edge.data.copies import ALIKE, Copies, joined
from ssod_edge.data.groups import describe_groups, image_groups
from ssod_edge.data.sources import ImageSource
from ssod_edge.data.splits import Indices, Splits, read_splits, split_dataset
from ssod_edge.errors import UsageError
from ssod_edge.json_reader import read_json
from ssod_edge.terminal import printable

#: Settings that decide how images are divided.
DECIDE = ("val", "group", "val_fraction", "calib_fraction", "seed")
#: Pairs that are named in a message.
NAMED = 3


@dataclass(frozen=True)
class Division:
    """Attributes:
    splits: of the images.
    groups: int64 [n], the images that belong together: bursts and copies; None where each stands for itself.
    lines: what the user is told.
    record: of the copies, for splits.json.
    """

    splits: Splits
    groups: Indices | None
    lines: tuple[str, ...]
    record: dict[str, Any]


def divide(source: ImageSource, config: TrainConfig, copies: Copies, earlier: Splits | None = None) -> Division:
    """Divide images; those without groups and copies exactly as `split_dataset` alone does.

    Validation images that come with the data stay where they are, also where they are copies of others. Where copies
    leave too few groups of a class to divide, they are divided as if they were none, with a warning.

    Args:
        source: the images.
        config: the settings in `DECIDE` count.
        copies: among the images.
        earlier: splits that are to be kept, of `earlier_splits`.

    Raises:
        UsageError: as `split_dataset` and `image_groups`.
    """
    named = image_groups(source, config.group)
    groups = named if source.fixed_splits is not None else _together(source, named, copies)
    lines = [] if named is None else [describe_groups(named)]
    fractions = config.val_fraction, config.calib_fraction, config.seed
    if earlier is not None:
        splits = earlier
    else:
        try:
            splits = split_dataset(source, *fractions, groups)
        except UsageError as error:
            if groups is named:
                raise
            splits = split_dataset(source, *fractions, named)
            lines.append(f"warning: copies are not kept together; with them {error}")
    across = copies.across(splits.train, np.concatenate([splits.val, splits.calib]))
    labels = copies.pairs[source.labels[copies.pairs[:, 0]] != source.labels[copies.pairs[:, 1]]]
    record = {
        "exact": copies.exact,
        "near": copies.near,
        "near_from_cosine": ALIKE,
        "in_two_splits": len(np.unique(across[:, 1])),
        "other_labels": [[source.source(index) for index in pair] for pair in labels.tolist()],
    }
    return Division(splits, groups, (*lines, *_describe(source, copies, across, labels)), record)


def _together(source: ImageSource, named: Indices | None, copies: Copies) -> Indices | None:
    """The groups that have a name, and those of copies, as one."""
    if not len(copies.pairs):
        return named
    groups = copies.groups
    if source.given_val is not None:  # a copy is no reason to move an image to the other side
        groups = 2 * groups + np.isin(np.arange(len(source)), source.given_val)
    return groups if named is None else joined(named, groups)


def _describe(source: ImageSource, copies: Copies, across: Indices, labels: Indices) -> Iterator[str]:
    """How many copies there are, and what is wrong with some of them."""
    if len(copies.pairs):
        near = "" if copies.near is None else f", and {copies.near} look nearly like another"
        yield f"copies: {copies.exact} of {len(source)} images have the bytes of another one{near}"
    if count := len(labels):
        what = "pair of copies has" if count == 1 else "pairs of copies have"
        yield f"warning: {count} {what} two labels: {_name(source, labels, True)}. Keep the right one"
    if count := len(np.unique(across[:, 1])):
        what = "image that is held out has" if count == 1 else "images that are held out have"
        fix = "Name what belongs together with --group" if source.given_val is None else "Keep one of each"
        yield (
            f"warning: {count} {what} a copy that is trained on, so that figures flatter: "
            f"{_name(source, across, False)}. {fix}"
        )


def _name(source: ImageSource, pairs: Indices, classes: bool) -> str:
    """The first pairs by the names of their files, for a terminal."""

    def image(index: int) -> str:
        label = f" ({source.classes[source.labels[index]]})" if classes else ""
        return f"'{printable(source.source(index))}'{printable(label)}"

    named = [" and ".join(map(image, pair)) for pair in pairs[:NAMED].tolist()]
    return "; ".join([*named, "..."] if len(pairs) > NAMED else named)


def earlier_splits(folder: Path, config: TrainConfig, source: ImageSource) -> Splits | None:
    """The splits that a run has on record, if it divided these images by these settings.

    An earlier release, which looked for no copies, may have divided them in another way; and so does a run without
    features, which finds fewer.
    """
    try:
        record, settings = read_json(folder / "splits.json"), from_dict(TrainConfig, read_json(folder / "config.json"))
        here = {"data_fingerprint": source.fingerprint, **source.val_record}
        if any(record.get(key) != value for key, value in here.items()):
            return None
        if any(getattr(settings, name) != getattr(config, name) for name in DECIDE):
            return None
        return read_splits(folder, source, str(record.get("splits_hash")))
    except (OSError, ValueError, UsageError):
        return None
