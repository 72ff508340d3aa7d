"""Images of what must be unknown, given by the user: cleaned of known ones, and split in three."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.config import Preprocess
from ssod_edge.data.groups import image_groups
from ssod_edge.data.images import Subset
from ssod_edge.data.layout import same_name
from ssod_edge.data.pixels import Picture, load_image
from ssod_edge.data.readers import Pictures
from ssod_edge.data.sources import ChosenImages, ImageSource, open_dataset
from ssod_edge.data.splits import Indices
from ssod_edge.errors import ImageError, UsageError
from ssod_edge.json_reader import from_json, read_json

#: Learnt from; those that a score is chosen by; seen by nothing but an evaluation.
PARTS = ("train", "choice", "test")
#: The parts of five images in a row: 60, 20 and 20%.
_TURN = ("train", "choice", "train", "test", "train")
#: Fewer teach nothing that could be measured: two would be left for the evaluation.
LEAST_NEGATIVES = 10


@dataclass(frozen=True)
class Negatives:
    """Images that must be unknown.

    Attributes:
        name: of the data set, as the user named it.
        fingerprint: of it.
        source: those of its images that are used.
        parts: of `PARTS` -> int64, ascending, of `source`.
        listed: the same, as they are counted in the whole data set.
    """

    name: str
    fingerprint: str
    source: ImageSource
    parts: Mapping[str, Indices]
    listed: Mapping[str, Indices]

    @classmethod
    def of(cls, name: str, opened: ImageSource, listed: Mapping[str, Indices]) -> Negatives:
        """Of some images of a data set, by the part of each."""
        kept = np.sort(np.concatenate([listed[part] for part in PARTS]))
        parts = {part: np.searchsorted(kept, listed[part]) for part in PARTS}
        return cls(name, opened.fingerprint, ChosenImages(opened, kept, opened.name), parts, listed)

    @property
    def hash(self) -> str:
        """SHA-256 of the parts, hex."""
        return _hash(self.listed)

    @property
    def record(self) -> dict[str, str]:
        """For the checkpoint: by this they are found again."""
        return {
            "negatives": self.name,
            "negatives_fingerprint": self.fingerprint,
            "negatives_hash": self.hash,
        }

    def were_learnt_otherwise(self, meta: Mapping[str, Any]) -> bool:
        """Whether a whole network, by its checkpoint's metadata, learnt from another part of the same data set."""
        same = meta.get("negatives_fingerprint") == self.fingerprint
        return same and meta.get("negatives_hash") != self.hash and "tuned" not in meta

    def subset(self, part: str) -> Subset:
        """The images of a part."""
        return Subset(self.source, self.parts[part], f"negatives of '{self.name}', {part} part {self.hash[:12]}")

    def __str__(self) -> str:
        learnt, chosen, held_out = (len(self.parts[part]) for part in PARTS)
        return (
            f"{learnt + chosen + held_out} negatives of '{self.name}': {learnt} to learn from, {chosen} to choose a "
            f"score by, {held_out} for the evaluation"
        )


def open_negatives(
    name: str, known: ImageSource, settings: Preprocess, group: str | None, seed: int, say: Callable[[str], None]
) -> Negatives:
    """Open images of what must be unknown for a training run. Every image is read, and every file of `known`.

    Left out, and said so, is what cannot be read, what is the very file of a known image, and all but one of images
    that are the same file.

    Args:
        name: what `ssod_edge.data.sources.open_dataset` takes; classes are not needed.
        known: the images of the run.
        settings: the preprocessing that they are read for.
        group: as `TrainConfig.group`; images of one group come into one part.
        seed: of the parts.
        say: gets a line for what is left out.

    Raises:
        UsageError: nothing there, most of them known images, too few, or too few groups.
    """
    try:
        opened = open_dataset(name, labelled=False)
    except UsageError as error:
        raise UsageError(f"--negatives: {error}") from error
    if opened.left_out:
        say(f"negatives: {opened.left_out}")
    kept = _usable(name, opened, known, settings, say)
    if both := sorted({*map(same_name, _names_of(opened, kept))} & {*map(same_name, known.classes)}):
        say(f"warning: negatives of '{name}' bear the name of a known class ('{both[0]}'); are they known?")
    listed = _divide(opened.labels[kept], _groups(opened, group)[kept], seed)
    if not all(len(part) for part in listed.values()):
        raise UsageError(f"the negatives of '{name}' are of too few groups to be divided in three. Add others")
    return Negatives.of(name, opened, {part: kept[chosen] for part, chosen in listed.items()})


def read_negatives(folder: str | Path, meta: Mapping[str, Any], fix: str) -> Negatives | None:
    """The negatives of a run as they were split when it was trained; None where it had none.

    Args:
        folder: of the run, with its splits.json.
        meta: of its checkpoint.
        fix: what the user can do where they cannot be had, as the end of the message.

    Raises:
        UsageError: they, or splits.json, are gone or were changed.
    """
    if (recorded := meta.get("negatives")) is None:
        return None
    name, path = str(recorded), Path(folder) / "splits.json"
    try:
        opened = open_dataset(name, labelled=False)
    except UsageError as error:
        raise UsageError(
            f"{error}. '{name}' is the path of the negatives that was recorded at training, relative to the folder "
            f"in which train was started: go there, or {fix}"
        ) from error
    if opened.fingerprint != meta.get("negatives_fingerprint"):
        raise UsageError(f"the negatives '{name}' changed since training; {fix}")
    try:
        record = from_json(dict[str, tuple[int, ...]], read_json(path).get("negatives_parts"), "negatives_parts")
        listed = {part: np.array(record[part], np.int64) for part in PARTS}
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"'{folder}' has no readable splits.json ({error}); {fix}") from error
    if _hash(listed) != meta.get("negatives_hash"):
        raise UsageError(f"'{path}' was changed after training: the parts of the negatives are others. Restore it")
    return Negatives.of(name, opened, listed)


class WithNegatives(Pictures):
    """Known images, and after them negatives, whose label is -1: for training that reads both."""

    def __init__(self, known: ImageSource, negatives: Negatives):
        self._sources = known, negatives.source
        self.name, self.classes, self.hflip_ok = known.name, known.classes, known.hflip_ok
        self.fingerprint = known.fingerprint
        self.labels = np.concatenate([known.labels, np.full(len(negatives.source), -1, np.int64)])

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Picture:
        known, negatives = self._sources
        return known.picture(index) if index < len(known) else negatives.picture(index - len(known))

    def source(self, index: int) -> str:
        known, negatives = self._sources
        return known.source(index) if index < len(known) else negatives.source(index - len(known))


def _hash(listed: Mapping[str, Indices]) -> str:
    digest = hashlib.sha256()
    for part in PARTS:
        digest.update(np.sort(listed[part]).astype("<i8").tobytes() + b"|")
    return digest.hexdigest()


def _usable(
    name: str, opened: ImageSource, known: ImageSource, settings: Preprocess, say: Callable[[str], None]
) -> Indices:
    """The images that can be read, that are no known ones, and of which there is no other before them."""
    hashes, seen, unreadable = _hashes(known), set[str](), list[str]()
    kept, known_too, copies = list[int](), list[int](), list[int]()
    for index in range(len(opened)):
        try:
            picture = opened.picture(index)
            load_image(picture, settings)
        except ImageError as error:
            unreadable.append(str(error))
            continue
        digest = picture.sha256
        (known_too if digest in hashes else copies if digest in seen else kept).append(index)
        seen.add(digest)
    if 2 * len(known_too) > len(opened):
        raise UsageError(
            f"{len(known_too)} of the {len(opened)} images of --negatives '{name}' are images of '{known.name}', which "
            "are known. Name images of other things; a list keeps some classes of a data set (DATA@LIST)"
        )
    reasons = {"known": len(known_too), "duplicate": len(copies), "unreadable": len(unreadable)}
    left_out = ", ".join(f"{count} {why}" for why, count in reasons.items() if count)
    left_out += f" ({unreadable[0]})" if unreadable else ""
    if len(kept) < LEAST_NEGATIVES:
        raise UsageError(
            f"it takes at least {LEAST_NEGATIVES} negatives, to learn from, to choose by and to evaluate on; '{name}' "
            f"has {len(kept)}{', without ' * bool(left_out)}{left_out}. Add some, or leave --negatives out"
        )
    if left_out:
        say(f"negatives left out: {left_out}")
    return np.array(kept, np.int64)


def _hashes(source: ImageSource) -> set[str]:
    """SHA-256 of every picture that can be read, hex."""
    found = set()
    for index in range(len(source)):
        try:
            found.add(source.picture(index).sha256)
        except ImageError:
            continue  # named when it is trained on
    return found


def _names_of(source: ImageSource, kept: Indices) -> list[str]:
    return [source.classes[label] for label in np.unique(source.labels[kept]) if 0 <= label < len(source.classes)]


def _groups(source: ImageSource, pattern: str | None) -> Indices:
    """The group of each image; where a pattern fits none of them, each is its own."""
    try:
        found = image_groups(source, pattern)
    except UsageError:
        found = None
    return np.arange(len(source)) if found is None else found


def _divide(labels: Indices, groups: Indices, seed: int) -> dict[str, Indices]:
    """Positions of each part, seeded; whole groups, and of each class as much as of the others."""
    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    order = np.random.default_rng((seed, len(PARTS))).permutation(len(first))
    order = order[np.argsort(labels[first[order]], kind="stable")]
    turn: Sequence[str] = np.resize(_TURN, len(order)).tolist()
    part_of = dict(zip(order.tolist(), turn, strict=True))
    chosen = np.array([part_of[group] for group in group_of.tolist()])
    return {part: np.flatnonzero(chosen == part) for part in PARTS}
