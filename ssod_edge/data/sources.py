"""Where images come from: what a data set's name opens."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssod_edge.config import IMAGE_SUFFIXES
from ssod_edge.data.image_lists import find_listed
from ssod_edge.data.pixels import load_image
from ssod_edge.data.splits import Splits
from ssod_edge.errors import ImageError, UsageError

Indices = NDArray[np.int64]

#: Ending of a list of images, apart from one of classes.
IMAGE_LIST_SUFFIX = ".sha256"

_EXPECTED = "Give a folder of CLASS/IMAGE files, a .tar file of one, 'demo', 'torch/...' or 'hfds/...'"


class ImageSource(Protocol):
    """Labelled images by index.

    Attributes:
        name: how the user named it.
        classes: class names in label order.
        labels: int64 [n]; -1 where an OOD set has no classes.
        hflip_ok: whether a mirrored image keeps its label.
        fingerprint: hash of class names, file names and labels (hex); of an image's content it knows nothing.
        fixed_splits: splits that come with the data, or None.
    """

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> Indices: ...
    @property
    def hflip_ok(self) -> bool: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def fixed_splits(self) -> Splits | None: ...

    def __len__(self) -> int: ...
    def image(self, index: int) -> Image.Image: ...
    def source(self, index: int) -> str: ...


def open_dataset(name: str, labelled: bool = True) -> ImageSource:
    """Open images by name.

    Args:
        name: an ImageFolder directory; a .tar file in that layout; "demo" or "demo:SPLIT"; "torch/NAME:ROOT"
            (torchvision, training part; "torch/NAME:ROOT:test" for the test part); "hfds/NAME" or
            "hfds/NAME:SPLIT" (Hugging Face). Everything but the demo is read through timm. "NAME@LIST" has only the
            classes that LIST names: a text file, or a list that ships here ("imagenet-objects"); with LIST.sha256 the
            images that a list of `ssod_edge.data.image_lists` names, unchanged.
        labelled: False accepts images without classes (an OOD set).

    Raises:
        UsageError: nothing there, no images, an empty class, or a label outside the class list.
        MissingExtraError: a package the data set needs is not installed.
    """
    if name == "demo" or name.startswith("demo:"):
        return DemoImages(name)
    name, chosen = _split_list(name)
    if not name:  # Path("") would be the current folder
        raise UsageError("the name of the data set is empty. " + _EXPECTED)
    source = ReaderImages(name)
    if labelled:
        _check_labels(source)
    if chosen is None:
        return source
    if chosen.endswith(IMAGE_LIST_SUFFIX):
        return ListedImages(source, *find_listed(source, chosen), f"{name}@{chosen}")
    return ListedClasses(source, read_class_list(chosen, source.classes), f"{name}@{chosen}")


def model_labels(labels: Indices, classes: Sequence[str], known: Sequence[str]) -> Indices:
    """Labels of a data set (-1 for none) in a model's numbering, by class name; -1 for a class it does not know."""
    numbers = {name: number for number, name in enumerate(known)}
    table = np.array([*(numbers.get(name, -1) for name in classes), -1], np.int64)
    return table[labels]


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
    if data.startswith("torch/"):
        data = [*data.split(":"), "."][1]
    return not data or data.startswith("hfds/") or os.path.exists(data)


def _class_list(name: str) -> Path:
    """The file of a list: this one, or one that ships here."""
    return Path(name) if os.path.isfile(name) else Path(__file__).parent / "lists" / f"{name}.txt"


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


class ChosenImages:
    """Some images of a source; labels and class names stay those of the source."""

    fixed_splits = None

    def __init__(self, source: ImageSource, indices: Indices, name: str):
        self.name = name
        self._source, self._indices = source, indices
        self.classes, self.hflip_ok = source.classes, source.hflip_ok
        self.labels = source.labels[self._indices]
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + self._indices.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> Image.Image:
        return self._source.image(int(self._indices[index]))

    def source(self, index: int) -> str:
        return self._source.source(int(self._indices[index]))


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
        self._reader, self._hashes = source, tuple(hashes)
        self.fingerprint = hashlib.sha256("\n".join(self._hashes).encode()).hexdigest()

    def image(self, index: int) -> Image.Image:
        """RGB image. Raises ImageError if it cannot be read, or is another one than the list's."""
        image, found = self._reader.image_and_hash(int(self._indices[index]))
        if found != self._hashes[index]:
            raise ImageError(
                f"'{self.source(index)}' of '{self.name}' is not the image that the list was made with (its SHA-256 "
                f"is {found[:12]}..., expected {self._hashes[index][:12]}...). Restore it, or make a new list"
            )
        return image


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
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"class list '{name}' is not UTF-8 text ({error}). Give one class a line") from error
    chosen = []
    for line in lines:
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        index = classes.index(entry) if entry in classes else int(entry) if entry.isdecimal() else -1
        if not 0 <= index < len(classes):
            raise UsageError(f"class list '{name}' names '{entry}', which is none of the {len(classes)} classes")
        chosen.append(index)
    if not chosen:
        raise UsageError(f"class list '{name}' names no class. Write one class index or class name a line")
    return chosen


class DemoImages:
    """The embedded data set: "demo" is train + val + calib, "demo:SPLIT" one split of it."""

    hflip_ok = False

    def __init__(self, name: str):
        from ssod_edge.data.demo import demo_set

        _, _, split = name.partition(":")
        self.name = name
        self._parts = [demo_set(part) for part in ([split] if split else ["train", "val", "calib"])]
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self.labels = np.concatenate([np.asarray(part.labels, dtype=np.int64) for part in self._parts])
        self.classes = self._parts[0].classes
        self.fingerprint = hashlib.sha256("".join(part.fingerprint for part in self._parts).encode()).hexdigest()
        self.fixed_splits = None
        if not split:
            self.fixed_splits = Splits(*(np.arange(a, b) for a, b in zip(self._starts, self._starts[1:], strict=False)))

    def __len__(self) -> int:
        return len(self.labels)

    def _locate(self, index: int) -> tuple[Any, int]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part], int(index - self._starts[part])

    def image(self, index: int) -> Image.Image:
        part, offset = self._locate(index)
        return part.image(offset)  # type: ignore[no-any-return]

    def source(self, index: int) -> str:
        part, offset = self._locate(index)
        return str(part.source(offset))


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
        raise UsageError(f"data set '{name}' does not exist. {_EXPECTED}")
    if path.is_file() and path.suffix != ".tar":
        raise UsageError(f"data set '{name}' is a file, and no .tar file. {_EXPECTED}")
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


def _check_labels(source: ReaderImages) -> None:
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
            raise UsageError(f"'{source.name}' holds images, but no class folders. {_EXPECTED}")
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
