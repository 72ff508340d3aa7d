"""Which files of a folder or a .tar file are images, in which order, and of which class: one rule for every command."""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO

from ssod_edge.config import IMAGE_SUFFIXES
from ssod_edge.errors import UsageError
from ssod_edge.terminal import printable

EXPECTED = "Give a folder of CLASS/IMAGE files, a .tar file of one, 'demo', 'torch/...' or 'hfds/...'"

#: Folders that systems leave beside pictures; their thumbnails and notes are no images of anybody's class.
SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
#: Files that systems leave there.
SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
#: Names of splits, which are not classes.
SPLITS = ("train", "val", "valid", "validation", "test")
#: A link that leads to a link, and so on, ends here.
MOST_LINKS = 40


def sort_key(name: str) -> tuple[list[str | int], str]:
    """Numbers in a name by their value, letters without their case; of names that are then equal, the name itself.

    Without the second part, "A" beside "a" and "1" beside "01" would come in the order of a set, another one in each
    process.
    """
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def same_name(name: str) -> str:
    """One spelling of a name: an accented letter may be one character, or a letter and a mark, and both look alike."""
    return unicodedata.normalize("NFC", name)


def is_shown(name: str) -> bool:
    """Whether no part of a path is hidden (`._0001.jpg`, `.thumbs/`) or a system's."""
    return not any((part[:1] == "." and part != ".") or part in SYSTEM_FOLDERS for part in name.split("/"))


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_other(name: str) -> bool:
    """Whether a file that is shown is neither an image nor a system's."""
    return not is_image(name) and posixpath.basename(name).lower() not in SYSTEM_FILES


def left_out(others: Collection[str]) -> str:
    """What a command says of files that are no images by their names; nothing where there are none."""
    if not others:
        return ""
    suffixes = sorted({os.path.splitext(name)[1].lower() or "no suffix" for name in others})
    files = "1 file that is no image" if len(others) == 1 else f"{len(others)} files that are no images"
    return printable(f"left out: {files} ({', '.join(suffixes[:5])}{', ...' if len(suffixes) > 5 else ''})")


def walk_images(folder: str, others: set[str] | None = None) -> Iterator[str]:
    """Paths of the images below a folder: each folder's own first, by name. Links to folders are followed, but
    for one that leads to a folder above it. `others` gets the paths of the other files, see `is_other`.

    Raises:
        UsageError: a folder cannot be read.
    """

    def failed(error: OSError) -> None:
        raise UsageError(f"the folder '{error.filename}' cannot be read: {error.strerror}") from error

    above: dict[str, tuple[str, ...]] = {}
    for parent, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        chain = (*above.get(parent, ()), os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if is_shown(name))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(parent, name)) not in chain]
        above.update((os.path.join(parent, name), chain) for name in folders)
        for name in sorted(names):
            path = os.path.join(parent, name)
            # A pipe or socket would wait for ever; a link that leads nowhere stays, to be reported.
            if not is_shown(name) or (os.path.exists(path) and not os.path.isfile(path)):
                continue
            if is_image(name):
                yield path
            elif others is not None and is_other(name):
                others.add(path)


class FolderReader:
    """The images of a folder. Attributes: names, below it and in order; others, the paths of files that are none."""

    def __init__(self, root: str):
        self._root = root
        self.others: set[str] = set()
        self.names = sorted((os.path.relpath(path, root) for path in walk_images(root, self.others)), key=sort_key)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        return open(os.path.join(self._root, self.names[index]), "rb"), -1

    def filename(self, index: int) -> str:
        return self.names[index]

    def empty_folders(self) -> list[str]:
        """Folders of the first level that hold no image."""
        used = {name.split("/")[0] for name in self.names}
        return sorted(p.name for p in Path(self._root).iterdir() if p.is_dir() and p.name not in used | SYSTEM_FOLDERS)


class TarReader:
    """The images of a .tar file; of a member that was packed twice the last one, as unpacking would have it.

    Args:
        path: of the file. It is opened anew in each process, because a forked one shares its parent's position.

    Attributes:
        names: of the members, in order.
        others: names of members that are no images.

    Raises:
        UsageError: it is no .tar file, is cut short, or holds a link to something that it does not hold.
    """

    def __init__(self, path: str):
        self._path, self._pid = path, -1
        self._tar: tarfile.TarFile | None = None
        try:
            with tarfile.open(path) as tar:
                members = {_plain(member.name): member for member in tar}
        except (tarfile.TarError, EOFError) as error:
            raise UsageError(f"'{path}' is no .tar file, or is cut short ({error}). Copy or pack it again") from error
        files = {name: member for name, member in members.items() if member.isfile()}
        links = {name: member for name, member in members.items() if _is_link(member) and is_shown(name)}
        ends = {name: self._end(name, members) for name in links}
        files |= {name: files[end] for name, end in ends.items() if end in files}
        for name, end in ends.items():
            if name not in files:  # it leads to a folder
                files |= self._below(name, end, links[name], files)
        self.names = sorted((name for name in files if is_shown(name) and is_image(name)), key=sort_key)
        self.others = {name for name in files if is_shown(name) and is_other(name)}
        self._members = [files[name] for name in self.names]
        # What is shown is the name in the archive ("./a/1.png").
        self._shown = [m.name if _plain(m.name) == n else n for n, m in zip(self.names, self._members, strict=True)]

    def _end(self, name: str, members: dict[str, tarfile.TarInfo]) -> str:
        """The name that a link leads to in the end; it may be that of nothing in the archive."""
        for _ in range(MOST_LINKS):
            member = members.get(name)
            if member is None or not _is_link(member):
                return name
            base = "" if member.islnk() else posixpath.dirname(name)
            name = _plain(posixpath.normpath(posixpath.join(base, member.linkname)))
        raise UsageError(f"'{name}' in '{self._path}' is a link that leads round in a circle. Pack it without")

    def _below(
        self, name: str, end: str, link: tarfile.TarInfo, files: dict[str, tarfile.TarInfo]
    ) -> dict[str, tarfile.TarInfo]:
        """The files of the folder that a link leads to, under the link's name."""
        found = {name + key[len(end) :]: member for key, member in files.items() if key.startswith(f"{end}/")}
        if not found and (is_image(name) or not posixpath.splitext(name)[1]):
            raise UsageError(
                f"'{name}' in '{self._path}' is a link to '{link.linkname}', which the archive does not hold. "
                "Pack what it leads to (tar --dereference)"
            )
        return found

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        if self._tar is None or self._pid != os.getpid():
            self._tar, self._pid = tarfile.open(self._path), os.getpid()  # noqa: SIM115
        file = self._tar.extractfile(self._members[index])
        assert file is not None
        return file, -1

    def filename(self, index: int) -> str:
        return self._shown[index]

    def empty_folders(self) -> list[str]:
        return []


def _plain(name: str) -> str:
    return name.removeprefix("./").rstrip("/")


def _is_link(member: tarfile.TarInfo) -> bool:
    return member.issym() or member.islnk()


def class_names(names: Sequence[str]) -> list[str]:
    """The class of each image: the folder that it lies in."""
    return [posixpath.basename(posixpath.dirname(name)) for name in names]


def check_layout(source: str, reader: FolderReader | TarReader) -> None:
    """Raises UsageError unless every image is CLASS/IMAGE and every class folder holds one.

    A .tar file may have one folder around all of it.
    """
    names = reader.names
    if isinstance(reader, TarReader):
        depth = shared_depth([posixpath.dirname(name) for name in names])  # above the class folders
        names = [name.split("/", depth)[-1] for name in names]
    strays = [name for name in names if "/" not in name]
    if strays and len(strays) == len(names):
        raise UsageError(f"'{source}' holds images, but no class folders. {EXPECTED}")
    if strays:
        raise UsageError(f"'{strays[0]}' of '{source}' is in no class folder. Move it into one, or remove it")
    deep = next((name for name in names if name.count("/") > 1), None)
    if deep is not None:
        first = {name.split("/")[0] for name in names}
        if deep.split("/")[0] in SPLITS and "train" in first:
            fix = f"Give '{Path(source) / 'train'}'" if Path(source).is_dir() else "Pack each as a .tar file of its own"
            raise UsageError(f"'{source}' holds splits, not classes. {fix}")
        raise UsageError(
            f"'{deep}' of '{source}' is in a folder below its class folder. Move it up: expected CLASS/IMAGE.jpg"
        )
    empty = [name for name in reader.empty_folders() if name[:1] != "."]
    if empty:
        raise UsageError(f"class folder '{empty[0]}' of '{source}' holds no images. Add some or remove it")


def shared_depth(names: Sequence[str]) -> int:
    """How many folders, from the top, all of the names have in common."""
    folders = [name.split("/")[:-1] for name in names]
    first, last = min(folders), max(folders)  # what these two share, all of them share
    pairs = zip(first, last, strict=False)
    return next((depth for depth, (one, other) in enumerate(pairs) if one != other), len(first))
