"""A folder that appears whole or not at all."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from ssod_edge.errors import OutputError, UsageError
from ssod_edge.files import beside, check_folder, exclusive, make_directory, real_path
from ssod_edge.spec import SPEC_NAME, load_spec

#: Of Linux's fcntl.h and fs.h.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `folder`; it takes that name when the block ends without an error.

    An earlier export of that name is replaced. Files beside it that no spec lists are carried over. What exports into
    `folder` left that were killed, for want of memory for example, is removed.

    Raises:
        UsageError: `folder` is a file, or holds something else than an export.
        OutputError: it cannot be written; what was there before is unchanged.
    """
    folder = real_path(folder)
    check_place(folder)
    make_directory(folder.parent)
    try:
        with exclusive(folder.parent):
            _put_back(folder)
            temporary = beside(folder, _prefix(folder))
            _remove_left_over(folder.parent, f"{escape(_prefix(folder))}*")
            temporary.mkdir()
            mark = os.open(temporary, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(mark, fcntl.LOCK_EX)  # until this process ends, however it does
    except OSError as error:
        raise OutputError(f"cannot write into '{folder.parent}': {error.strerror}. Choose another folder.") from error
    try:
        yield temporary
        _publish(temporary, folder)
    except OSError as error:
        raise OutputError(
            f"cannot write '{folder}': {error.strerror or error}. Free some space or choose another folder; "
            "an earlier export is unchanged."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(mark)


def check_place(folder: Path) -> None:
    """Find out before the work whether an export can go there.

    Raises:
        UsageError: `folder` is a file, or holds something else.
        OutputError: where it would lie is read-only.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"'{folder}' is a file; give a folder for the export")
    if folder.is_dir() and not (folder / SPEC_NAME).exists() and any(folder.iterdir()):
        raise UsageError(f"'{folder}' holds other files than an export; give a new or empty folder")
    check_folder(folder.parent)


def remove(folder: Path) -> None:
    """Remove an export folder: no longer there, or there and whole; what a kill leaves `remove_all_left` removes."""
    gone = beside(folder, _prefix(folder))
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_all_left(place: Path) -> None:
    """Remove what was left in a folder of exports by processes that were killed."""
    with exclusive(place):
        _remove_left_over(place, ".*.ssod-edge-*")


def _old_prefix(folder: Path) -> str:
    return f".{folder.name}.old."


def _put_back(folder: Path) -> None:
    """Where two folders cannot be swapped, a kill between two renames leaves an export under another name only."""
    left = sorted(folder.parent.glob(f"{escape(_old_prefix(folder))}*"), key=lambda path: path.stat().st_mtime)
    if left and not folder.exists():
        left.pop().rename(folder)
    for old in left:
        for name in _unlisted(old):
            if not os.path.lexists(folder / name):
                (old / name).rename(folder / name)
        shutil.rmtree(old, ignore_errors=True)


def _prefix(folder: Path) -> str:
    return f".{folder.name}.ssod-edge-"


def _remove_left_over(place: Path, pattern: str) -> None:
    """Remove temporary folders that no process holds; call it inside `exclusive`, where no new one appears."""
    for left in place.glob(pattern):
        with suppress(OSError):  # held, not a folder, or not ours
            mark = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(mark)


def _publish(temporary: Path, folder: Path) -> None:
    for path in (*temporary.rglob("*"), temporary):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if not folder.exists():
        temporary.rename(folder)
        return
    temporary.chmod(stat.S_IMODE(folder.stat().st_mode) | stat.S_IRWXU)
    for name in _unlisted(folder):  # before the swap: a kill at any instant leaves them in the folder's place
        if not os.path.lexists(temporary / name):
            _link(folder / name, temporary / name)
    old = temporary
    if not _exchange(temporary, folder):
        old = beside(folder, _old_prefix(folder))
        folder.rename(old)
        try:
            temporary.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
    for name in _unlisted(old):  # what came meanwhile
        if not os.path.lexists(folder / name):
            (old / name).rename(folder / name)
    shutil.rmtree(old, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """Give a file, or a folder of files, one more name; a copy where the file system has no links."""
    if source.is_dir() and not source.is_symlink():
        target.mkdir()
        for path in source.iterdir():
            _link(path, target / path.name)
        shutil.copystat(source, target)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that a kill leaves either there, and a reader always finds one.

    False, and nothing is done, where the C library or the file system cannot (Linux's RENAME_EXCHANGE).
    """
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def _unlisted(folder: Path) -> list[str]:
    """Names in an export folder that its spec does not account for."""
    files: list[str] = []
    with suppress(Exception):  # a damaged spec lists nothing
        files = [*load_spec(folder).files]
    listed = {Path(name).parts[0] for name in files}
    return [path.name for path in folder.iterdir() if path.name not in listed]
