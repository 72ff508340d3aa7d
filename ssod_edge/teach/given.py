"""Photos as they are given to a lesson, by name or in memory, and what names their classes may have."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from ssod_edge.data.images import Subset, whole_dataset
from ssod_edge.data.inputs import list_images
from ssod_edge.data.layout import same_name
from ssod_edge.data.pixels import MAX_BYTES, ImageLike, Picture, load_image
from ssod_edge.data.readers import Pictures
from ssod_edge.data.sources import ImageSource
from ssod_edge.errors import ImageError, UsageError
from ssod_edge.terminal import printable

#: What `open_photos` takes.
Given: TypeAlias = str | Mapping[str, Iterable[ImageLike]]
#: What images in memory are called in messages and records.
IN_MEMORY = "images from Python"


def open_photos(data: Given) -> Subset:
    """Photos with classes.

    Args:
        data: what `ssod_edge.data.sources.open_dataset` takes; or class -> images: paths (of a folder, all in it),
            encoded bytes, PIL images or uint8 arrays [H, W, 3] (RGB), or one such path.

    Raises:
        UsageError: no such data, or a class without images.
    """
    if isinstance(data, str):
        return whole_dataset(data, labelled=True)
    source = GivenImages({name: _listed(images) for name, images in data.items()})
    return Subset(source, np.arange(len(source)), IN_MEMORY)


def _listed(images: Iterable[ImageLike] | str | os.PathLike[str]) -> list[ImageLike]:
    given = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    found: list[ImageLike] = []
    for image in given:
        folder = isinstance(image, (str, os.PathLike)) and os.path.isdir(image)
        found += list_images([os.fspath(image)]) if folder else [image]  # type: ignore[arg-type]
    return found


class GivenImages(Pictures):
    """Images of classes that a program has at hand; an `ImageSource`."""

    name = IN_MEMORY
    hflip_ok = True

    def __init__(self, images: Mapping[str, Sequence[ImageLike]]):
        for name, found in images.items():
            if not found:
                raise UsageError(f"no images of the class '{name}' were given. Add some or remove it")
        if not images:
            raise UsageError("there is nothing to teach: give images of a class")
        self.classes = tuple(images)
        self._images = [image for found in images.values() for image in found]
        self.labels = np.repeat(np.arange(len(images)), [len(found) for found in images.values()])
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for index, label in enumerate(self.labels.tolist()):
            digest.update(f"{self.source(index)}\0{label}\n".encode(errors="surrogateescape"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def source(self, index: int) -> str:
        image = self._images[index]
        if isinstance(image, (str, os.PathLike)):
            return os.fspath(image)
        return f"image {index + 1} of {len(self)}"

    def picture(self, index: int) -> Picture:
        """The image as it is given. Raises ImageError, naming it, if it cannot be read."""
        image, name = self._images[index], f"'{self.source(index)}'"
        try:
            if isinstance(image, (str, os.PathLike)):
                with open(image, "rb") as file:
                    return Picture(file.read(MAX_BYTES + 1), name)  # what is larger is refused
            return Picture(image if isinstance(image, bytes) else load_image(image), name)
        except OSError as error:
            raise ImageError(f"{name}: {error.strerror or error}") from error
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from error


def check_names(source: ImageSource, classes: tuple[str, ...], alike: bool) -> None:
    """Look at the names of the classes before anything is read.

    Args:
        source: of the photos.
        classes: of the model.
        alike: allow a name that differs from another one in case or in compatible letters alone, as A and a.

    Raises:
        UsageError: a name that cannot be one of a new class.
    """
    known = {same_name(name) for name in classes}
    seen = {_folded(name): name for name in classes}
    for name in source.classes:
        if same_name(name) in known:
            continue
        if reason := _refused(name):
            raise UsageError(
                f"'{printable(name)}' of '{source.name}' cannot be the name of a class: {reason}. Rename it"
            )
        other = seen.setdefault(_folded(name), name)
        if other != name and (not alike or same_name(other) == same_name(name)):
            raise UsageError(
                f"the class '{name}' of '{source.name}' is spelled like '{other}', but for case or for letters of "
                f"another width. If it is that class, call it '{other}'; if it is another one, add --alike"
            )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold().strip()


def _refused(name: str) -> str | None:
    """Why this is no name of a class; None if it is one."""
    if not name.strip():
        return "it is empty"
    if printable(name) != name:
        return "it has control characters, or bytes that are not UTF-8"
    if "/" in name or name.startswith("."):
        return "it could not be the name of a folder"
    return None
