"""Readers of data sets: folders, tar files, torchvision and Hugging Face, through timm; and what is wrong with them."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssod_edge.config import IMAGE_SUFFIXES
from ssod_edge.data.pixels import load_image
from ssod_edge.data.splits import Indices
from ssod_edge.errors import ImageError, UsageError

EXPECTED = "Give a folder of CLASS/IMAGE files, a .tar file of one, 'demo', 'torch/...' or 'hfds/...'"


class ReaderImages:
    """Images through timm's reader: folders, tar files, torchvision and Hugging Face data sets."""

    hflip_ok = True
    fixed_splits = None

    def __init__(self, name: str):
        self.name = name
        self._reader, self.labels, self.classes = _open_reader(name)
        if len(self.labels) == 0:
            raise _no_images(name)
        self._pid = os.getpid()
        # File names are bytes: one that is not UTF-8 comes with surrogates.
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for index in range(len(self)):
            digest.update(f"{self.source(index)}\0{self.labels[index]}\n".encode(errors="surrogateescape"))
        self.fingerprint = digest.hexdigest()

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
        if self._pid != os.getpid():
            self._forget_open_files()
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

    def _forget_open_files(self) -> None:
        """A forked worker must not share a tar file's position with its parent."""
        self._pid = os.getpid()
        state = getattr(self._reader, "tar_state", None)
        for tar in state.values() if isinstance(state, dict) else [state] if state else []:
            tar.tf = None
            for child in tar.children.values():
                child.tf = None


def _open_reader(name: str) -> tuple[Any, Indices, tuple[str, ...]]:
    """(reader, labels, class names) of a folder, tar file, torchvision or Hugging Face data set."""
    if name.startswith("torch/"):
        return _open_torchvision(name)
    if name.startswith("hfds/"):
        return _open_hugging_face(name)
    return _open_path(name)


def _open_path(name: str) -> tuple[Any, Indices, tuple[str, ...]]:
    """(reader, labels, class names) of a folder or tar file, hidden files left out."""
    from timm.data.readers import create_reader
    from timm.data.readers.img_extensions import add_img_extensions

    path = Path(name)
    if not path.exists():
        raise UsageError(f"data set '{name}' does not exist. {EXPECTED}")
    if path.is_file() and path.suffix != ".tar":
        raise UsageError(f"data set '{name}' is a file, and no .tar file. {EXPECTED}")
    add_img_extensions(sorted(IMAGE_SUFFIXES))  # timm knows three; its tar reader takes no list of its own
    try:
        reader = create_reader("", root=name, **({"cache_tarinfo": False} if path.is_file() else {}))
    except tarfile.TarError as error:
        raise UsageError(f"'{name}' is no .tar file, or is cut short ({error}). Copy or pack it again") from error
    except (RuntimeError, ValueError) as error:
        raise _no_images(name) from error
    if path.is_dir():
        labels, classes = np.array([s[1] for s in reader.samples], dtype=np.int64), _names(reader.class_to_idx)
    else:
        labels, classes = np.asarray(reader.targets, dtype=np.int64), _names(reader.class_name_to_idx)
    shown = [index for index, file in enumerate(reader.filenames()) if not _is_hidden(file)]
    if len(shown) < len(labels):
        reader.samples = [reader.samples[index] for index in shown]
        used, labels = np.unique(labels[shown], return_inverse=True)
        classes = tuple(classes[label] for label in used)
    return reader, labels, classes


def _is_hidden(file: str) -> bool:
    """Whether a name in a path begins with a dot: `._0001.jpg` and `.thumbs/` are a system's notes, not images."""
    return any(part[:1] == "." and part != "." for part in file.split("/"))


def _no_images(name: str) -> UsageError:
    suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
    return UsageError(
        f"'{name}' holds no images ({suffixes}). Expected CLASS/IMAGE.jpg folders, or a .tar file of them"
    )


def _names(class_to_index: dict[str, int]) -> tuple[str, ...]:
    return tuple(sorted(class_to_index, key=lambda name: class_to_index[name]))


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
    _check_layout(source)
    lowest, highest = int(source.labels.min()), int(source.labels.max())
    if lowest < 0 or highest >= len(source.classes):
        wrong = lowest if lowest < 0 else highest
        raise UsageError(f"'{source.name}' has the label {wrong}, outside its {len(source.classes)} classes")
    missing = set(range(len(source.classes))) - set(np.unique(source.labels).tolist())
    if missing:
        raise UsageError(f"class '{source.classes[min(missing)]}' of '{source.name}' holds no images")


def _check_layout(source: ReaderImages) -> None:
    """Raises UsageError unless every image of a folder is CLASS/IMAGE: timm takes the innermost folder as the class."""
    stray = [label for label, name in enumerate(source.classes) if name in ("", ".")]
    if stray:
        if len(source.classes) == 1:
            raise UsageError(f"'{source.name}' holds images, but no class folders. {EXPECTED}")
        file = source.source(int(np.flatnonzero(source.labels == stray[0])[0]))
        raise UsageError(f"'{file}' of '{source.name}' is in no class folder. Move it into one, or remove it")
    path = Path(source.name)
    if not path.is_dir():
        return
    files = [source.source(index) for index in range(len(source))]
    deep = next((file for file in files if file.count("/") > 1), None)
    if deep is not None:
        if deep.split("/")[0] in ("train", "val", "valid", "validation", "test") and (path / "train").is_dir():
            raise UsageError(f"'{source.name}' holds splits, not classes. Give '{path / 'train'}'")
        raise UsageError(
            f"'{deep}' of '{source.name}' is in a folder below its class folder. Move it up: expected CLASS/IMAGE.jpg"
        )
    used = {file.split("/")[0] for file in files}
    empty = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name not in used and p.name[:1] != ".")
    if empty:
        raise UsageError(f"class folder '{empty[0]}' of '{source.name}' holds no images. Add some or remove it")
