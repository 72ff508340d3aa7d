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
from ssod_edge.files import same_data
from ssod_edge.terminal import printable

EXPECTED = (
    "Give a folder of CLASS/IMAGE files (or of train/, val/ and test/ folders of them), a .tar file of one, a .csv or "
    ".parquet file of paths and labels, 'demo', 'torch/...' or 'hfds/...'"
)

#: Folders that systems leave beside pictures; their thumbnails and notes are no images of anybody's class.
SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
#: Files that systems leave there.
SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
#: Names of parts of a data set, which are not classes, and the part that each means.
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
#: Files that hold a whole data set, so that FILE/test is a part of one.
DATA_FILES = (".tar", ".csv", ".parquet")
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


class FileReader:
    """What readers of files have in common.

    Attributes:
        names: of the images, in order.
        others: names of files that are no images.
        given_val: positions of the images that the data set keeps for validation; None where it names none.
        above: how many folders, from the top, lie above the class folders.
        in_parts: whether the last of these is a part's.
        untouched: what a command says of a part that it leaves alone; empty where there is none.
    """

    names: list[str]
    others: set[str]
    given_val: list[int] | None = None
    above = 0
    in_parts = False
    untouched = ""

    def keep(self, positions: Sequence[int]) -> None:
        """Leave these images alone in it."""
        self.names = [self.names[position] for position in positions]

    def filename(self, index: int) -> str:
        return self.names[index]

    def empty_folders(self) -> list[str]:
        """Class folders that hold no image."""
        return []


class FolderReader(FileReader):
    """The images of a folder; their names are below it."""

    def __init__(self, root: str):
        self._root = root
        self.others = set()
        self.names = sorted((os.path.relpath(path, root) for path in walk_images(root, self.others)), key=sort_key)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        return open(os.path.join(self._root, self.names[index]), "rb"), -1

    def empty_folders(self) -> list[str]:
        level = 1 if self.in_parts else 0
        used = {"/".join(name.split("/")[: level + 1]) for name in self.names}
        above = {""} if level == 0 else {name.split("/")[0] for name in self.names}
        folders = (os.path.join(top, p.name) for top in above for p in Path(self._root, top).iterdir() if p.is_dir())
        return sorted(f for f in folders if f not in used and os.path.basename(f) not in SYSTEM_FOLDERS)


class TarReader(FileReader):
    """The images of a .tar file; of a member that was packed twice the last one, as unpacking would have it.

    Args:
        path: of the file. It is opened anew in each process, because a forked one shares its parent's position.

    Raises:
        UsageError: it is no .tar file, is cut short, or holds a link to something that it does not hold.
    """

    def __init__(self, path: str):
        self._path, self._pid = path, -1
        self._tar: tarfile.TarFile | None = None
        try:
            with tarfile.open(path) as tar:
                members = {_plain(member.name): member for member in tar}
        except Exception as error:
            raise UsageError(
                f"'{path}' is no .tar file, or is cut short ({tar_damage(error)}). Copy or pack it again"
            ) from error
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
        raise UsageError(f"'{name}' in '{self._path}' is a link that leads back to itself. Pack the archive without it")

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

    def keep(self, positions: Sequence[int]) -> None:
        super().keep(positions)
        self._members = [self._members[position] for position in positions]
        self._shown = [self._shown[position] for position in positions]

    def filename(self, index: int) -> str:
        return self._shown[index]


def tar_damage(error: Exception) -> str:
    """What is wrong with an archive that `tarfile` raised this of; what is not of the archive is raised again.

    A damaged header raises whatever it leads to: thousands that each belong to the next one, a RecursionError.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    if isinstance(error, RecursionError):
        return "headers that each belong to the next one"
    return str(error).partition(":\n")[0] or type(error).__name__


def _plain(name: str) -> str:
    return name.removeprefix("./").rstrip("/")


def _is_link(member: tarfile.TarInfo) -> bool:
    return member.issym() or member.islnk()


def class_names(names: Sequence[str]) -> list[str]:
    """The class of each image: the folder that it lies in."""
    return [posixpath.basename(posixpath.dirname(name)) for name in names]


def split_part(name: str) -> tuple[str, str | None]:
    """FILE/test -> (FILE, "test"), where FILE is a file of a whole data set; (name, None) of any other name."""
    parent, _, last = name.rstrip("/").rpartition("/")
    is_part = last.lower() in PARTS and parent.lower().endswith(DATA_FILES) and os.path.isfile(parent)
    return (parent, last.lower()) if is_part else (name, None)


def is_training_part(data: str, recorded: object) -> bool:
    """Whether a data set that a user names is the train part (DATA/train) of the one of a record (DATA)."""
    parent, _, last = data.rstrip("/").rpartition("/")
    return PARTS.get(last.lower()) == "train" and same_data(parent, recorded)


def choose_parts(source: str, parts: Sequence[str], part: str | None) -> tuple[list[int], list[int] | None, str]:
    """Which images of a data set in parts are read: those of one part, or those of train and val; never both and test.

    Args:
        source: how the user named the data set.
        parts: of each image, as it is spelled there ("train", "Valid").
        part: the one that is asked for.

    Returns:
        positions of the images; those of val among them (None without any, and of one part); what is to be said of
        the images of test (empty without any).

    Raises:
        UsageError: there is no such part.
    """
    meaning = [PARTS[name.lower()] for name in parts]
    wanted = ("train", "val") if part is None else (PARTS[part],)
    kept = [position for position, name in enumerate(meaning) if name in wanted]
    if wanted[0] not in meaning:
        raise UsageError(f"'{source}' has no images of '{wanted[0]}'; it has those of: {', '.join(sorted(set(parts)))}")
    if part is not None:
        return kept, None, ""
    val = [place for place, position in enumerate(kept) if meaning[position] == "val"]
    test = [name for name, means in zip(parts, meaning, strict=True) if means == "test"]
    note = f"not used: {len(test)} images of '{test[0]}' (ssod-edge eval RUN --id {source}/{test[0]})" if test else ""
    return kept, val or None, note


def divide_files(source: str, reader: FileReader, part: str | None = None) -> None:
    """Find out how deep the class folders lie; of files in PART/CLASS/IMAGE, keep what `choose_parts` says of them.

    A .tar file may have folders around all of it.

    Raises:
        UsageError: `part` is asked for and there is none; folders of other names lie beside the parts.
    """
    if isinstance(reader, TarReader):
        reader.above = shared_depth([posixpath.dirname(name) for name in reader.names])
    names = [name.split("/", reader.above)[-1] for name in reader.names]
    first = [name.split("/")[0] for name in names]
    deep = any(name.count("/") > 1 and top.lower() in PARTS for name, top in zip(names, first, strict=True))
    if not deep or (part is None and "train" not in map(str.lower, first)):
        if part is not None:
            raise UsageError(f"'{source}' holds no folders train/, val/ and test/ of CLASS/IMAGE files")
        return
    if other := next((name for name in first if name.lower() not in PARTS), None):
        raise UsageError(
            f"'{other}' of '{source}' lies beside the parts of a data set ({', '.join(sorted(set(first) - {other}))}). "
            "Move it away: expected train/, val/ and test/ alone"
        )
    kept, reader.given_val, reader.untouched = choose_parts(source, first, part)
    reader.keep(kept)
    reader.above, reader.in_parts = reader.above + 1, True


def check_layout(source: str, reader: FileReader) -> None:
    """Raises UsageError unless every image is CLASS/IMAGE and every class folder holds one."""
    names = [name.split("/", reader.above)[-1] for name in reader.names]
    strays = [name for name in names if "/" not in name]
    if strays and len(strays) == len(names):
        raise UsageError(f"'{source}' holds images, but no class folders. {EXPECTED}")
    if strays:
        raise UsageError(f"'{strays[0]}' of '{source}' is in no class folder. Move it into one, or remove it")
    deep = next((name for name in names if name.count("/") > 1), None)
    if deep is not None:
        if deep.split("/")[0].lower() in PARTS:
            part = deep.split("/")[0]
            raise UsageError(f"'{source}' holds parts of a data set, but no 'train'. Name one: {source}/{part}")
        raise UsageError(
            f"'{deep}' of '{source}' is in a folder below its class folder. Move it up: expected CLASS/IMAGE.jpg"
        )
    empty = [name for name in reader.empty_folders() if posixpath.basename(name)[:1] != "."]
    if empty:
        raise UsageError(f"class folder '{empty[0]}' of '{source}' holds no images. Add some or remove it")


def shared_depth(names: Sequence[str]) -> int:
    """How many folders, from the top, all of the names have in common."""
    folders = [name.split("/")[:-1] for name in names]
    first, last = min(folders), max(folders)  # what these two share, all of them share
    pairs = zip(first, last, strict=False)
    return next((depth for depth, (one, other) in enumerate(pairs) if one != other), len(first))
