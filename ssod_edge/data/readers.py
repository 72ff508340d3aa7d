"""Readers of data sets: folders, tar files, tables, torchvision and Hugging Face; and what is wrong with them."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from ssod_edge.config import IMAGE_SUFFIXES, Preprocess
from ssod_edge.data.layout import (
    DATA_FILES,
    EXPECTED,
    FileReader,
    FolderReader,
    TarReader,
    check_layout,
    class_names,
    divide_files,
    left_out,
    same_name,
    sort_key,
    split_part,
)
from ssod_edge.data.pixels import MAX_BYTES, Picture, load_image
from ssod_edge.data.splits import Indices, Splits
from ssod_edge.data.tables import TableReader
from ssod_edge.errors import ImageError, UsageError
from ssod_edge.json_reader import is_unicode


class Pictures:
    """What can be read of each image of a source, and what a source has unless it says otherwise."""

    left_out = ""
    fixed_splits: Splits | None = None
    given_val: Indices | None = None
    group_names: tuple[str, ...] | None = None
    val_record: dict[str, str] = {}  # noqa: RUF012 (never changed)

    def picture(self, index: int) -> Picture:
        raise NotImplementedError

    def image(self, index: int, settings: Preprocess | None = None) -> Image.Image:
        """RGB image, as `load_image` gives it. Raises ImageError, naming the file, if it cannot be read."""
        return load_image(self.picture(index), settings)


class ReaderImages(Pictures):
    """Images through a reader: folders, tar files, tables, torchvision and Hugging Face data sets."""

    hflip_ok = True

    def __init__(self, name: str):
        self.name = name
        self._reader, self.labels, self.classes = _open_reader(name)
        if len(self.labels) == 0:
            raise _no_images(name)
        others = "" if self.layout is None else left_out(self.layout.others)
        if isinstance(self._reader, (FileReader, TableReader)):
            self.left_out = "; ".join(filter(None, (others, self._reader.untouched)))
            self.given_val = None if self._reader.given_val is None else np.array(self._reader.given_val, np.int64)
            self.group_names = getattr(self._reader, "group_names", None)
        # File names are bytes: one that is not UTF-8 comes with surrogates.
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for index in range(len(self)):
            digest.update(f"{self.source(index)}\0{self.labels[index]}\n".encode(errors="surrogateescape"))
        self.fingerprint = digest.hexdigest()

    @property
    def layout(self) -> FileReader | None:
        """The files, of a folder or .tar file."""
        return self._reader if isinstance(self._reader, FileReader) else None

    def __len__(self) -> int:
        return len(self.labels)

    def source(self, index: int) -> str:
        filename = getattr(self._reader, "filename", None)
        return str(filename(index)) if callable(filename) else f"{self.name}[{index}]"

    def picture(self, index: int) -> Picture:
        """The image as it is stored. Raises ImageError, naming the file, if it cannot be read."""
        name = f"'{self.source(index)}' of '{self.name}'"
        try:
            item = self._reader[index][0]
            if isinstance(item, Image.Image):
                return Picture(item, name)
            with item:
                return Picture(item.read(MAX_BYTES + 1), name)  # what is larger is refused
        except Exception as error:  # readers raise whatever a damaged archive leads them to
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ImageError(f"{name}: {reason}") from error


def _open_reader(name: str) -> tuple[Any, Indices, tuple[str, ...]]:
    """(reader, labels, class names) of a folder, tar file, table, torchvision or Hugging Face data set."""
    if name.startswith("torch/"):
        return _open_torchvision(name)
    if name.startswith("hfds/"):
        reader = HubReader(name)
        return reader, reader.labels, reader.classes
    return _open_path(name)


def _open_path(name: str) -> tuple[Any, Indices, tuple[str, ...]]:
    """(reader, labels, class names) of a folder, tar file or table, or of one part of a file."""
    place, part = split_part(name)
    path = Path(place)
    if not path.exists():
        raise UsageError(f"data set '{name}' does not exist. {EXPECTED}")
    if path.is_file() and path.suffix.lower() not in DATA_FILES:
        raise UsageError(f"data set '{name}' is a file, but not a {', '.join(DATA_FILES)} file. {EXPECTED}")
    if path.is_file() and path.suffix.lower() != ".tar":
        table = TableReader(place, part)
        return table, table.labels, table.classes
    reader = FolderReader(place) if path.is_dir() else TarReader(place)
    if reader.names:
        divide_files(place, reader, part)
    found = class_names(reader.names)
    classes = sorted(set(found), key=sort_key)
    numbers = {name: number for number, name in enumerate(classes)}
    return reader, np.array([numbers[name] for name in found], dtype=np.int64), tuple(classes)


def _no_images(name: str) -> UsageError:
    suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
    return UsageError(
        f"'{name}' holds no images ({suffixes}). Expected CLASS/IMAGE.jpg folders, or a .tar file of them"
    )


def _open_torchvision(name: str) -> tuple[Any, Indices, tuple[str, ...]]:
    from timm.data import create_dataset

    parts = name.split(":")
    root, split = (parts[1] if len(parts) > 1 else "."), (parts[2] if len(parts) > 2 else "train")
    try:
        if parts[0].lower() == "torch/svhn":  # which timm does not know
            from torchvision.datasets import SVHN

            dataset = SVHN(root, split=split)
        else:
            dataset = create_dataset(parts[0], root=root, split=split, download=False)
    except (AssertionError, RuntimeError, ValueError, OSError) as error:
        raise UsageError(f"torchvision data set '{name}' cannot be opened: {error}") from error
    labels = getattr(dataset, "targets", getattr(dataset, "labels", getattr(dataset, "_labels", None)))
    if labels is None:
        raise UsageError(f"torchvision data set '{name}' lists no labels; convert it to CLASS/IMAGE folders")
    labels = np.asarray(labels, dtype=np.int64)
    classes = getattr(dataset, "classes", None) or [str(i) for i in range(int(labels.max()) + 1)]
    return dataset, labels, tuple(str(c) for c in classes)


class HubReader:
    """The rows of a Hugging Face data set.

    Args:
        name: "hfds/NAME" or "hfds/NAME:SPLIT".

    Attributes:
        labels: int64 [n]; -1 where there is none.
        classes: their names; empty without a column of labels.

    Raises:
        UsageError: it cannot be opened, or has not one column of images.
    """

    def __init__(self, name: str):
        try:
            import datasets
        except ImportError as error:
            raise UsageError("Hugging Face data sets need the package 'datasets': pip install datasets") from error
        path, _, split = name.removeprefix("hfds/").partition(":")
        try:
            rows = datasets.load_dataset(path, split=split or "train")
        except Exception as error:  # a download, a script and a file of rows each fail in their own ways
            raise UsageError(f"Hugging Face data set '{name}' cannot be opened: {error}") from error
        images = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if "image" not in images and len(images) != 1:
            raise UsageError(
                f"'{name}' must have one column of images or one called 'image'; it has: "
                f"{', '.join(images or rows.features) or 'no columns'}"
            )
        self._column = "image" if "image" in images else images[0]
        self._rows = rows.cast_column(self._column, datasets.Image(decode=False))
        self.labels, self.classes = _hub_labels(rows, datasets.ClassLabel)
        items = (row[self._column] for row in self._rows.select_columns([self._column]))
        self._names = [_row_name(index, item) for index, item in enumerate(items)]

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        item = self._rows[index][self._column]
        if item is None:
            raise ImageError("the row has no image")
        return (io.BytesIO(item["bytes"]) if item["bytes"] else open(item["path"], "rb")), -1

    def filename(self, index: int) -> str:
        return self._names[index]


def _row_name(index: int, item: dict[str, Any] | None) -> str:
    """The file that an image came from. Without one, its content: all rows of all such sets would have one name."""
    if item is None:
        return f"row {index}"
    if item["path"]:
        return str(item["path"])
    return f"row {index}, SHA-256 {hashlib.sha256(item['bytes']).hexdigest()[:12]}"


def _hub_labels(rows: Any, class_label: type) -> tuple[Indices, tuple[str, ...]]:
    """Labels and class names of the column that has them: `label`, else the only one that names classes."""
    features = rows.features
    named = [column for column, feature in features.items() if isinstance(feature, class_label)]
    column = "label" if "label" in features else named[0] if len(named) == 1 else None
    if column is None:
        return np.full(len(rows), -1, np.int64), ()
    values = rows[column]
    if column in named:
        classes = tuple(features[column].names)
        return np.array([-1 if value is None else value for value in values], np.int64), classes
    if any(isinstance(value, (list, dict)) for value in values):
        return np.full(len(rows), -1, np.int64), ()  # several labels an image, or boxes
    texts = [None if value is None else str(value) for value in values]
    classes = tuple(sorted({text for text in texts if text is not None}, key=sort_key))
    numbers = {text: number for number, text in enumerate(classes)}
    return np.array([-1 if text is None else numbers[text] for text in texts], np.int64), classes


def check_labels(source: ReaderImages) -> None:
    """Raises UsageError for a wrong layout, an empty class, or a label outside the class list."""
    if source.layout is not None:
        check_layout(source.name, source.layout)
    if len(set(map(same_name, source.classes))) < len(source.classes):
        twice = next(name for name in source.classes if same_name(name) != name)
        raise UsageError(
            f"'{source.name}' has two classes whose names look alike ('{same_name(twice)}'): an accented letter is one "
            "character in one, and a letter and a mark in the other. Move their images into one folder"
        )
    if odd := [name for name in source.classes if not is_unicode(name)]:
        raise UsageError(f"the class '{odd[0]}' of '{source.name}' has a name that is not UTF-8. Rename its folder")
    if isinstance(source._reader, (HubReader, TableReader)):
        if not source.classes:
            raise UsageError(
                f"'{source.name}' has no column of labels: call it 'label', a number or a text in each row"
            )
        if len(rows := np.flatnonzero(source.labels < 0)):
            first = source.source(int(rows[0]))
            raise UsageError(f"{len(rows)} images of '{source.name}' have no label, '{first}' first. Leave them out")
    lowest, highest = int(source.labels.min()), int(source.labels.max())
    if lowest < 0 or highest >= len(source.classes):
        wrong = lowest if lowest < 0 else highest
        raise UsageError(f"'{source.name}' has the label {wrong}, outside its {len(source.classes)} classes")
    missing = set(range(len(source.classes))) - set(np.unique(source.labels).tolist())
    if missing:
        raise UsageError(f"class '{source.classes[min(missing)]}' of '{source.name}' holds no images")
    if source.given_val is not None:
        training = set(np.delete(source.labels, source.given_val).tolist())
        only = sorted(set(source.labels[source.given_val].tolist()) - training)
        if only:
            raise UsageError(
                f"'{source.name}' has images of the class '{source.classes[only[0]]}' for validation and none to train "
                "on. Add some, or leave the class out"
            )
