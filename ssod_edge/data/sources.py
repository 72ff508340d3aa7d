"""Where images come from: what a data set's name opens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ssod_edge.config import Preprocess
from ssod_edge.data.image_lists import find_listed
from ssod_edge.data.layout import EXPECTED, same_name, split_part
from ssod_edge.data.pixels import Picture
from ssod_edge.data.readers import Pictures, ReaderImages, check_labels
from ssod_edge.data.splits import Indices, Labelled, Splits
from ssod_edge.errors import ImageError, UsageError

#: Ending of a list of images, apart from one of classes.
IMAGE_LIST_SUFFIX = ".sha256"


class ImageSource(Labelled, Protocol):
    """Labelled images by index.

    Attributes, beside those of `Labelled`:
        hflip_ok: whether a mirrored image keeps its label.
        left_out: what a command says of files that are no images or that are not used; empty where there are none.
        group_names: of the group of each image (a burst, a video), "" for none; None where the data names none.
        val_record: "val_data" and "val_fingerprint" of validation images that are another data set; else empty.
        fingerprint: hash of class names, file names and labels (hex); of an image's content it knows nothing.
    """

    hflip_ok: bool
    left_out: str
    group_names: tuple[str, ...] | None
    val_record: dict[str, str]
    fingerprint: str

    def picture(self, index: int) -> Picture: ...
    def image(self, index: int, settings: Preprocess | None = None) -> Image.Image: ...
    def source(self, index: int) -> str: ...


def open_dataset(name: str, labelled: bool = True) -> ImageSource:
    """Open images by name.

    Args:
        name: an ImageFolder directory, or one of train/, val/ and test/ folders of that layout, of which the last is
            not read; a .tar file of either; a .csv or .parquet file of paths and labels (`ssod_edge.data.tables`);
            FILE/PART, one part of such a file ("photos.tar/test"); "demo" or "demo:SPLIT"; "torch/NAME:ROOT"
            (torchvision, training part; "torch/NAME:ROOT:test" for the test part); "hfds/NAME" or "hfds/NAME:SPLIT"
            (Hugging Face). "NAME@LIST" has only the classes that LIST names: a text file, or a list that ships here
            ("imagenet-objects"); with LIST.sha256 the images that a list of `ssod_edge.data.image_lists` names,
            unchanged.
        labelled: False accepts images without classes (an OOD set).

    Raises:
        UsageError: nothing there, no images, an empty class, or a label outside the class list.
        MissingExtraError: a package the data set needs is not installed.
    """
    if name == "demo" or name.startswith("demo:"):
        return DemoImages(name)
    name, chosen = _split_list(name)
    if not name:  # Path("") would be the current folder
        raise UsageError("the name of the data set is empty. " + EXPECTED)
    source = ReaderImages(name)
    if labelled:
        check_labels(source)
    if chosen is None:
        return source
    if chosen.endswith(IMAGE_LIST_SUFFIX):
        return ListedImages(source, *find_listed(source, chosen), f"{name}@{chosen}")
    return ListedClasses(source, read_class_list(chosen, source.classes), f"{name}@{chosen}")


def check_there(name: str) -> None:
    """Raises UsageError where `open_dataset` would look for a path that is not there; it costs next to nothing."""
    data = "" if name == "demo" or name.startswith("demo:") else _split_list(name)[0]
    if not _is_there(data):
        raise UsageError(f"data set '{data}' does not exist. {EXPECTED}")


def open_training_data(name: str, val: str | None = None, val_fingerprint: str | None = None) -> ImageSource:
    """The images of a training run, with the validation images of another data set where there is one.

    Args:
        name, val: what `open_dataset` takes.
        val_fingerprint: that `val` had when this was recorded.

    Raises:
        UsageError: as `open_dataset`; both have validation images; `val` has classes that are not trained, or is the
            training data itself, or was changed.
    """
    source = open_dataset(name)
    if val is None:
        return source
    others = open_dataset(val)
    if val_fingerprint not in (None, others.fingerprint):
        raise UsageError(f"the validation data set '{val}' changed since training")
    return JoinedImages(source, others)


def model_labels(labels: Indices, classes: Sequence[str], known: Sequence[str]) -> Indices:
    """Labels of a data set (-1 for none) in a model's numbering, by class name; -1 for a class it does not know."""
    numbers = {same_name(name): number for number, name in enumerate(known)}
    table = np.array([*(numbers.get(same_name(name), -1) for name in classes), -1], np.int64)
    return table[labels]


def check_classes(id_data: str, found: tuple[str, ...], classes: tuple[str, ...]) -> None:
    """Raises UsageError unless the model knows every class of the ID images; it may know more."""
    known = set(map(same_name, classes))
    if unknown := [name for name in found if same_name(name) not in known]:
        raise UsageError(
            f"the class '{unknown[0]}' of '{id_data}' is none of the model's ({', '.join(classes[:4])}, ...). Give "
            "images of known classes; a list keeps some of a data set's (DATA@LIST)"
        )


def _split_list(name: str) -> tuple[str, str | None]:
    """DATA@LIST -> (DATA, LIST), and (name, None) without a list.

    A path may have an "@" of its own. So nothing is split off a path that is there, nor where DATA is none that is;
    of several that are, the list that is there counts.
    """
    if os.path.exists(name):
        return name, None
    splits = [(name[:place], name[place + 1 :]) for place, letter in enumerate(name) if letter == "@"]
    splits = [(data, chosen) for data, chosen in splits if _is_there(data)]
    named = [split for split in splits if _class_list(split[1]).is_file()] or splits[-1:]
    return named[0] if named else (name, None)


def _is_there(data: str) -> bool:
    """Whether a data set's path exists; of a Hugging Face name, True. No name at all is an error of its own."""
    data = split_part(data)[0]
    if data.startswith("torch/"):
        data = [*data.split(":"), "."][1]
    return not data or data.startswith("hfds/") or os.path.exists(data)


def _class_list(name: str) -> Path:
    """The file of a list: this one, or one that ships here."""
    return Path(name) if os.path.isfile(name) else Path(__file__).parent / "lists" / f"{name}.txt"


class ChosenImages(Pictures):
    """Some images of a source; labels and class names stay those of the source."""

    def __init__(self, source: ImageSource, indices: Indices, name: str):
        self.name = name
        self._source, self._indices = source, indices
        self.classes, self.hflip_ok, self.left_out = source.classes, source.hflip_ok, source.left_out
        self.labels = source.labels[self._indices]
        if source.given_val is not None:
            val = np.flatnonzero(np.isin(indices, source.given_val))
            self.given_val = val if len(val) else None
        if source.group_names is not None:
            self.group_names = tuple(source.group_names[index] for index in indices.tolist())
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + self._indices.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def picture(self, index: int) -> Picture:
        return self._source.picture(int(self._indices[index]))

    def source(self, index: int) -> str:
        return self._source.source(int(self._indices[index]))


class JoinedImages(Pictures):
    """The images of two data sets, those to train on and those to validate on; classes are those of the first.

    The fingerprint is of the first alone, so that it is recognised where it is named; `val_record` has the other.
    """

    def __init__(self, training: ImageSource, validation: ImageSource):
        one, other = training.name, validation.name
        if training.given_val is not None or training.fixed_splits is not None:
            raise UsageError(f"'{one}' has validation images of its own. Leave --val out, or name its training part")
        if validation.given_val is not None or validation.fixed_splits is not None:
            raise UsageError(f"--val '{other}' has parts of its own. Name one of them: {other}/val")
        if training.fingerprint == validation.fingerprint:
            raise UsageError(f"--val '{other}' has the images of '{one}'. Name others, or leave --val out")
        labels = model_labels(validation.labels, validation.classes, training.classes)
        if (labels < 0).any():
            name = validation.classes[validation.labels[int(np.argmin(labels))]]
            raise UsageError(f"--val '{other}' has the class '{name}', which '{one}' has no images of to train on")
        self._sources, self.name, self.classes = (training, validation), one, training.classes
        self.hflip_ok, self.fingerprint = training.hflip_ok, training.fingerprint
        self.left_out = "; ".join(filter(None, (training.left_out, validation.left_out)))
        self.labels = np.concatenate([training.labels, labels])
        self.given_val = np.arange(len(training), len(self.labels))
        self.val_record = {"val_data": other, "val_fingerprint": validation.fingerprint}
        if training.group_names is not None or validation.group_names is not None:
            names = (source.group_names or ("",) * len(source) for source in self._sources)
            self.group_names = tuple(name for group in names for name in group)

    def __len__(self) -> int:
        return len(self.labels)

    def _find(self, index: int) -> tuple[ImageSource, int]:
        first = self._sources[0]
        return (first, index) if index < len(first) else (self._sources[1], index - len(first))

    def picture(self, index: int) -> Picture:
        source, place = self._find(index)
        return source.picture(place)

    def source(self, index: int) -> str:
        source, place = self._find(index)
        return source.source(place)


class ListedClasses(ChosenImages):
    """The images of some classes of a source, which has no others: labels count the chosen ones, in its order."""

    def __init__(self, source: ImageSource, chosen: Sequence[int], name: str):
        kept = np.unique(chosen)
        super().__init__(source, np.flatnonzero(np.isin(source.labels, kept)), name)
        self.classes = tuple(source.classes[label] for label in kept)
        self.labels = np.searchsorted(kept, self.labels).astype(np.int64)


class ListedImages(ChosenImages):
    """The images that a list names (`data.image_lists`), each of which must still have the hash recorded there."""

    def __init__(self, source: ReaderImages, indices: Indices, hashes: Sequence[str], name: str):
        super().__init__(source, indices, name)
        self._hashes = tuple(hashes)
        self.fingerprint = hashlib.sha256("\n".join(self._hashes).encode()).hexdigest()

    def picture(self, index: int) -> Picture:
        """The image as it is stored. Raises ImageError if it cannot be read, or is another one than the list's."""
        picture = super().picture(index)
        found = picture.sha256
        if found != self._hashes[index]:
            raise ImageError(
                f"'{self.source(index)}' of '{self.name}' is not the image that the list was made with (its SHA-256 "
                f"is {found[:12]}..., expected {self._hashes[index][:12]}...). Restore it, or make a new list"
            )
        return picture


def read_class_list(name: str, classes: tuple[str, ...]) -> list[int]:
    """Label indices named by a list: one class index or class name a line, "#" starts a comment.

    A name wins over an index: "2" is the class named 2, where there is one.

    Raises:
        UsageError: no such list, one that is not UTF-8 text or names no class, or a line that names none.
    """
    path = _class_list(name)
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in (Path(__file__).parent / "lists").glob("*.txt")))
        raise UsageError(f"there is no class list '{name}'. Give a text file, or one of: {shipped}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"class list '{name}' is not UTF-8 text ({error}). Give one class a line") from error
    numbers = {same_name(known): number for number, known in enumerate(classes)}
    chosen = []
    for line in lines:
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        index = numbers.get(same_name(entry), int(entry) if entry.isdecimal() else -1)
        if not 0 <= index < len(classes):
            raise UsageError(f"class list '{name}' names '{entry}', which is none of the {len(classes)} classes")
        chosen.append(index)
    if not chosen:
        raise UsageError(f"class list '{name}' names no class. Write one class index or class name a line")
    return chosen


class DemoImages(Pictures):
    """The embedded data set: "demo" is train + val + calib, "demo:SPLIT" one split of it."""

    hflip_ok = False

    def __init__(self, name: str):
        from ssod_edge.data.demo import DemoSet

        _, _, split = name.partition(":")
        self.name = name
        parts = [DemoSet(part) for part in ([split] if split else ["train", "val", "calib"])]
        self._images = [(part, index) for part in parts for index in range(len(part))]
        self.labels = np.concatenate([part.labels for part in parts])
        self.classes = parts[0].classes
        self.fingerprint = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()
        if not split:
            ends = np.cumsum([len(part) for part in parts])
            self.fixed_splits = Splits(*np.split(np.arange(len(self.labels)), ends[:-1]))

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Picture:
        part, offset = self._images[index]
        return Picture(part.image(offset), part.source(offset))

    def source(self, index: int) -> str:
        part, offset = self._images[index]
        return part.source(offset)
