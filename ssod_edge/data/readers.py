"""Readers of data sets: folders, tar files, torchvision and Hugging Face, through timm; and what is wrong with them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssod_edge.config import IMAGE_SUFFIXES
from ssod_edge.data.layout import EXPECTED, FolderReader, TarReader, check_layout, class_names, sort_key
from ssod_edge.data.pixels import load_image
from ssod_edge.data.splits import Indices, Splits
from ssod_edge.errors import ImageError, UsageError


class ReaderImages:
    """Images through timm's reader: folders, tar files, torchvision and Hugging Face data sets."""

    hflip_ok = True
    fixed_splits: Splits | None = None

    def __init__(self, name: str):
        self.name = name
        self._reader, self.labels, self.classes = _open_reader(name)
        if len(self.labels) == 0:
            raise _no_images(name)
        # File names are bytes: one that is not UTF-8 comes with surrogates.
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for index in range(len(self)):
            digest.update(f"{self.source(index)}\0{self.labels[index]}\n".encode(errors="surrogateescape"))
        self.fingerprint = digest.hexdigest()

    @property
    def layout(self) -> FolderReader | TarReader | None:
        """The files, of a folder or .tar file."""
        return self._reader if isinstance(self._reader, (FolderReader, TarReader)) else None

    def __len__(self) -> int:
        return len(self.labels)

    def source(self, index: int) -> str:
        filename = getattr(self._reader, "filename", None)
        return str(filename(index)) if callable(filename) else f"{self.name}[{index}]"

    def image(self, index: int) -> Image.Image:
        """RGB image. Raises ImageError, naming the file, if it cannot be read."""
        return self._load(index)[0]

    def image_and_hash(self, index: int) -> tuple[Image.Image, str]:
        """RGB image and its SHA-256 (hex): of the file; of the RGB pixels where the reader hands out no file.

        Raises:
            ImageError: it cannot be read.
        """
        image, content = self._load(index)
        return image, hashlib.sha256(image.tobytes() if content is None else content).hexdigest()

    def _load(self, index: int) -> tuple[Image.Image, bytes | None]:
        """RGB image, and its file where there is one."""
        try:
            item = self._reader[index][0]
            if isinstance(item, Image.Image):
                return load_image(item), None
            with item:
                content = item.read()
            return load_image(content), content
        except ImageError as error:
            reason = str(error).partition(": ")[2]  # without load_image's name for bytes
            raise ImageError(f"'{self.source(index)}' of '{self.name}': {reason}") from error
        except Exception as error:  # readers and their decoders raise whatever a damaged file leads them to
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ImageError(f"'{self.source(index)}' of '{self.name}': {reason}") from error


def _open_reader(name: str) -> tuple[Any, Indices, tuple[str, ...]]:
    """(reader, labels, class names) of a folder, tar file, torchvision or Hugging Face data set."""
    if name.startswith("torch/"):
        return _open_torchvision(name)
    if name.startswith("hfds/"):
        return _open_hugging_face(name)
    return _open_path(name)


def _open_path(name: str) -> tuple[Any, Indices, tuple[str, ...]]:
    """(reader, labels, class names) of a folder or tar file."""
    path = Path(name)
    if not path.exists():
        raise UsageError(f"data set '{name}' does not exist. {EXPECTED}")
    if path.is_file() and path.suffix != ".tar":
        raise UsageError(f"data set '{name}' is a file, and no .tar file. {EXPECTED}")
    reader = FolderReader(name) if path.is_dir() else TarReader(name)
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


def _open_hugging_face(name: str) -> tuple[Any, Indices, tuple[str, ...]]:
    from timm.data.readers import create_reader

    rest, _, split = name.partition(":")
    try:
        reader = create_reader(rest, root=None, split=split or "train")
    except ImportError as error:
        raise UsageError("Hugging Face data sets need the package 'datasets': pip install datasets") from error
    except Exception as error:
        raise UsageError(f"Hugging Face data set '{name}' cannot be opened: {error}") from error
    labels = np.asarray(reader.dataset[reader.label_key], dtype=np.int64)
    feature = reader.dataset.features[reader.label_key]
    classes = getattr(feature, "names", None) or [str(i) for i in range(int(labels.max()) + 1)]
    return reader, labels, tuple(classes)


def check_labels(source: ReaderImages) -> None:
    """Raises UsageError for a wrong layout, an empty class, or a label outside the class list."""
    if source.layout is not None:
        check_layout(source.name, source.layout)
    lowest, highest = int(source.labels.min()), int(source.labels.max())
    if lowest < 0 or highest >= len(source.classes):
        wrong = lowest if lowest < 0 else highest
        raise UsageError(f"'{source.name}' has the label {wrong}, outside its {len(source.classes)} classes")
    missing = set(range(len(source.classes))) - set(np.unique(source.labels).tolist())
    if missing:
        raise UsageError(f"class '{source.classes[min(missing)]}' of '{source.name}' holds no images")
