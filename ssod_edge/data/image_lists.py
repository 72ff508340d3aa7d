"""Lists of images with their hashes, so that a protocol's images can be found again, here and elsewhere.

A list is a text file in the format of `sha256sum`: a line is a SHA-256, two spaces, and the image's name within its
data set. Of a folder, `cd FOLDER && sha256sum -c LIST` checks it without this package. Where a data set is one archive
of pixels (torchvision's CIFAR-10 or SVHN), the hash is of the RGB pixels and the name is the index.

The same images may lie in a folder, in a .tar file of its contents ("./a/1.png") or in one of the folder
("FOLDER/a/1.png"): folders that all the images lie in do not count, neither for the choice nor for a list.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ssod_edge.data.layout import shared_depth
from ssod_edge.data.pixels import load_image
from ssod_edge.data.readers import ReaderImages
from ssod_edge.data.splits import Indices
from ssod_edge.errors import UsageError
from ssod_edge.files import write_atomic

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def choose_seeded(source: ReaderImages, count: int, seed: int) -> Indices:
    """Choose images at random, whatever the order in which a file system lists them.

    The images with the smallest SHA-256 of seed and name are taken, so that the choice stays where images are added
    that are not chosen. Folders that all images lie in are left out of the name.

    Args:
        count: how many; all, if there are no more.

    Returns:
        int64 [min(count, n)], ascending.
    """
    names = _names(source)
    depth = shared_depth(names)
    keys = [hashlib.sha256(f"{seed}/{_below(name, depth)}".encode(errors="surrogateescape")).digest() for name in names]
    return np.sort(np.array(sorted(range(len(source)), key=keys.__getitem__)[:count], dtype=np.int64))


def write_image_list(
    source: ReaderImages, indices: Indices, file: Path, advance: Callable[[int], None] = lambda n: None
) -> Path:
    """Read the images and write their list.

    Args:
        indices: int64 [n] of `source`.
        advance: called with 1 after each image.

    Raises:
        ImageError: an image cannot be read; nothing is written.
        UsageError: a file name with a line break.
    """
    names, lines = _names(source), []
    for index in indices.tolist():
        name = names[index]
        if "\n" in name or "\r" in name:
            raise UsageError(f"the name {name!r} in '{source.name}' has a line break; rename the file")
        picture = source.picture(index)
        load_image(picture)  # a list names what can be read
        lines.append(f"{picture.sha256}  {name}\n")
        advance(1)
    content = "".join(lines).encode(errors="surrogateescape")
    write_atomic(file, lambda temporary: temporary.write_bytes(content))
    return file


def find_listed(source: ReaderImages, list_file: str) -> tuple[Indices, list[str]]:
    """The images of a data set that a list names, in its order.

    Returns:
        their indices, int64 [n], and the n hashes that they had.

    Raises:
        UsageError: no such list, a line that is none of one, a name twice, or an image that the data set lacks.
    """
    try:
        text = Path(list_file).read_bytes().decode(errors="surrogateescape").removeprefix("\ufeff")
    except OSError as error:
        raise UsageError(f"the image list '{list_file}' cannot be read: {error.strerror}") from error
    listed = []
    for number, line in enumerate(filter(None, text.split("\n")), 1):
        match = _LINE.fullmatch(line)
        if not match:
            raise UsageError(f"line {number} of '{list_file}' is not 'SHA256  NAME', as sha256sum writes it")
        listed.append((match[1], match[2]))
    if not listed:
        raise UsageError(f"the image list '{list_file}' is empty")
    hashes: dict[int, str] = {}
    for (expected, name), index in zip(listed, _match(source, [name for _, name in listed]), strict=True):
        if index is None:
            raise UsageError(f"'{source.name}' has no image '{name}', which '{list_file}' names")
        if index in hashes:
            raise UsageError(f"'{list_file}' names '{name}' twice")
        hashes[index] = expected
    return np.array(list(hashes), dtype=np.int64), list(hashes.values())


def _match(source: ReaderImages, wanted: list[str]) -> list[int | None]:
    """The index of each name, None for one that is not there.

    Names fit as they are, or without the folders that all of the data set, or all of the list, lies in.
    """
    names, wanted = _names(source), [name.removeprefix("./") for name in wanted]
    depth = shared_depth(names)
    known = {_below(name, depth): index for index, name in enumerate(names)}
    known |= {name: index for index, name in enumerate(names)}
    found = [[known.get(_below(name, cut)) for name in wanted] for cut in range(shared_depth(wanted) + 1)]
    return min(found, key=lambda indices: indices.count(None))


def _below(name: str, depth: int) -> str:
    """A name without its first folders."""
    return name.split("/", depth)[-1]


def _names(source: ReaderImages) -> list[str]:
    """Of the images within their data set: no part of the path at which the data set lies here."""
    names = enumerate(map(source.source, range(len(source))))
    return [str(index) if name == f"{source.name}[{index}]" else name.removeprefix("./") for index, name in names]
