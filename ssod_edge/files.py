"""Writing and hashing files so that a reader never meets half a file."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ssod_edge.errors import BusyError, OutputError, UsageError
from ssod_edge.json_reader import is_unicode
from ssod_edge.sources import is_address, without_secrets


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def real_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path behind links, as far as it exists; of links that go round in a circle, the path itself.

    `Path.resolve` raises a RuntimeError of these.
    """
    return Path(os.path.realpath(path))


@contextmanager
def unicode_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """A path for a library in C++: where its name has bytes that are not UTF-8, by a link to its folder, which is gone
    after the block; of a file with such a name itself, by a link to it with the same suffix.

    Raises:
        UsageError: there is no place for the link.
    """
    path = os.path.abspath(path)
    if is_unicode(path):
        yield path
        return
    around, name = os.path.split(path)
    with ExitStack() as stack:
        try:
            link = os.path.join(stack.enter_context(temporary_folder()), "link")
            if is_unicode(name):
                os.symlink(around, link)
                link = os.path.join(link, name)
            else:
                suffix = os.path.splitext(name)[1]
                link += suffix if is_unicode(suffix) else ""
                os.symlink(path, link)
        except OSError as error:
            raise UsageError(
                f"the name of '{path}' is not UTF-8, and no link to it can be made ({error}). Rename it"
            ) from error
        yield link


#: A folder in memory that containers have where their disk is read-only too.
SHARED_MEMORY = "/dev/shm"


def temporary_parent() -> str | None:
    """Where temporary files can go: None is the system's place for them; else memory, in a container whose disk is
    read-only.

    Raises:
        OutputError: there is no such place.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        if os.access(SHARED_MEMORY, os.W_OK):
            return SHARED_MEMORY
        raise OutputError(
            "no folder for temporary files can be written to. Mount one at /tmp, or set TMPDIR to one"
        ) from error
    return None


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that is gone after the block.

    Raises:
        OutputError: see `temporary_parent`.
    """
    return tempfile.TemporaryDirectory(prefix="ssod-edge-", dir=temporary_parent())


def make_directory(path: str | os.PathLike[str]) -> Path:
    """Create a folder and its parents.

    Raises:
        OutputError: it cannot be created, or is a file.
        UsageError: it is an address.
    """
    _check_place(path)
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the folder '{path}': {error.strerror}. Choose another folder.") from error
    return path


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Find out before the work whether a folder can be made there, or written to; makes none.

    Raises:
        OutputError: what would hold it is read-only.
        UsageError: it is an address, or a file is in the way.
    """
    _check_place(path)
    path = Path(path)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UsageError(f"'{there}' is a file; give another folder than '{path}'")
    if not os.access(there, os.W_OK):
        raise OutputError(f"cannot write into '{there}': it is read-only. Choose another folder.")
    return path


def _check_place(path: str | os.PathLike[str]) -> None:
    """Raises UsageError for an address, which would become a folder that is called as its scheme is."""
    if is_address(os.fspath(path)):
        raise UsageError(f"'{without_secrets(os.fspath(path))}' is an address; give a path on this machine")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for the same folder, which exists; it leaves no file behind.

    Where the folder may not be read, or the file system has no locks, the block is entered at once.
    """
    handle: int | None = None
    try:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


#: Lock files that this process holds: the system's locks are the process's, so it would not keep itself out.
_claimed: set[Path] = set()


@contextmanager
def claim(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock file while a piece of work lasts. It is gone afterwards, and one left by a kill holds nobody up.

    Where its folder is read-only, or the file system has no locks, the block is entered at once. Processes that were
    forked inside the block do not hold the lock. The library `filelock` keeps none of the last three: its locks pass to
    forked processes, its file stays, and where there are no locks it raises.

    Args:
        path: of the lock file; its folder is made.
        what: the work, for the error: "the run 'x' is being trained".
        wait: until no other process holds it, instead of raising.

    Raises:
        BusyError: another process, or an outer block of this one, holds it.
        OutputError: the folder cannot be made.
    """
    path = real_path(path)
    if path in _claimed:
        raise BusyError(f"{what} by this process already")
    handle = _lock(path, what, wait)
    _claimed.add(path)
    try:
        yield
    finally:
        _claimed.discard(path)
        if handle is not None:
            with suppress(OSError):
                path.unlink()
            os.close(handle)


def _lock(path: Path, what: str, wait: bool) -> int | None:
    """Descriptor of the locked file; None where there are no locks."""
    while True:
        make_directory(path.parent)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the folder was removed this instant
        except OSError:
            return None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BusyError(f"{what} by another process. Wait for it, or stop it") from None
            with suppress(OSError):
                path.unlink()
            return None
        os.close(handle)  # whoever held it has removed the file since: there is another, or none


def check_output(path: str | os.PathLike[str]) -> Path:
    """Find out before the work whether `write_atomic` can write a file; makes its folder.

    Raises:
        OutputError: its folder cannot be made or written to.
        UsageError: `path` is "-", an address or a folder.
    """
    _check_place(path)
    if os.fspath(path) == "-":
        raise UsageError("'-' is not the name of an output file; /dev/stdout writes to standard output")
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"cannot write '{path}': it is a folder. Give the name of a file.")
    folder = make_directory(Path(os.path.realpath(path)).parent)
    if not os.access(folder, os.W_OK) and (path.is_file() or not path.exists()):  # a device is written to in place
        raise OutputError(f"cannot write '{path}': its folder is read-only. {_ACCESS}.")
    return path


def write_atomic(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a temporary file, flush it to disk, then rename it over `path`.

    A kill, a full disk or an error at any instant leaves the previous file, whole. A link stays, and the file it leads
    to is replaced. A device or pipe, which must not be replaced, is sent the finished bytes. A new file may be read by
    whom the umask says, as one of `open`; an earlier one keeps its mode.

    Raises:
        OutputError: the folder is read-only, the disk is full, or the rename failed.
        UsageError: `path` is "-", an address or a folder.
    """
    path = check_output(path)
    try:
        mode = _mode(path)
        if _is_open_file(path) or (mode is not None and not stat.S_ISREG(mode)):
            _send(path, write)
        else:
            _replace(Path(os.path.realpath(path)), write)
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, "Choose another place")
        raise OutputError(
            f"cannot write '{path}': {error.strerror or error}. {fix}; an earlier file of that name is unchanged."
        ) from error
    return path


_SPACE, _ACCESS = "Free some space or choose another place", "Choose a place that you may write to"
_FIXES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EROFS: _ACCESS,
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
}


def _mode(path: Path) -> int | None:
    """What `path` leads to, through links; None if there is nothing yet."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_open_file(path: Path) -> bool:
    """Whether it is a name for an open file of this process: /dev/stdout, /dev/fd/3."""
    return path.is_symlink() and os.path.abspath(path).startswith(("/dev/", "/proc/"))


def _send(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file elsewhere, and send its bytes into `path`."""
    with temporary_folder() as folder:
        temporary = Path(folder) / f"output{path.suffix}"
        write(temporary)
        with open(path, "ab") as stream:  # a redirected /dev/stdout keeps what it already holds
            stream.write(temporary.read_bytes())


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, and rename it over `path`."""
    make_directory(path.parent)
    _remove_left_over(path)
    temporary = beside(path, f".{path.name}.", path.suffix)
    mode = _mode(path)
    try:
        temporary.touch(exist_ok=False)  # tempfile would keep it from everybody else
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(stat.S_IMODE(mode))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


#: Seconds after which a temporary file that nobody writes to is what a kill left.
_LEFT_OVER_S = 3600
#: Files of which this process has looked for such, which takes a look at the whole folder.
_looked_for: set[Path] = set()


def _remove_left_over(path: Path) -> None:
    """Remove what writes of this file left that were killed."""
    if path in _looked_for:
        return
    _looked_for.add(path)
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}{re.escape(path.suffix)}")
    with suppress(OSError):
        for found in os.scandir(path.parent):
            if ours.fullmatch(found.name) and time.time() - found.stat(follow_symlinks=False).st_mtime > _LEFT_OVER_S:
                os.unlink(found.path)


def beside(path: Path, prefix: str, suffix: str = "") -> Path:
    """The path of a temporary file or folder, not there yet, in the same folder as `path`."""
    return path.with_name(f"{prefix}{secrets.token_hex(8)}{suffix}")


def copy_into(source: Path, folder: Path) -> Path:
    """Copy a file into a folder under its name, or where another file has that, under a name with more in it.

    No file is overwritten, and one with the same bytes there is the copy already. What a kill leaves half done is
    hidden.

    Returns:
        the copy.

    Raises:
        OSError: it cannot be read or written.
    """
    target = free_path(folder, source)
    if target.exists():
        return target
    temporary = beside(target, ".copy.")
    try:
        shutil.copy2(source, temporary)
        try:
            os.link(temporary, target)  # a rename would replace what has come there since
        except FileExistsError:
            if target.exists():
                return copy_into(source, folder)
            raise  # a link that leads nowhere
        except OSError:  # a file system without links
            temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def free_path(folder: Path, source: Path) -> Path:
    """Where a file goes in a folder: under its name, and with more in it where a file of other bytes has that."""
    path = folder / source.name
    if path.exists() and not os.path.samefile(path, source) and sha256_file(path) != sha256_file(source):
        path = folder / f"{source.stem}-{sha256_file(source)[:16]}{source.suffix}"
    return path


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file whole or not at all; see `write_atomic`."""
    return write_atomic(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write a JSON document atomically, with a final newline. NaN and infinity are refused."""
    text = json_text(value, indent=2) + "\n"
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def json_text(value: Any, indent: int | None = None) -> str:
    """A JSON document that `ssod_edge.json_reader` takes: of a name that is not UTF-8 it holds what can be shown."""
    text = json.dumps(value, indent=indent, allow_nan=False)
    if "\\ud" not in text:
        return text
    found = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", "\ufffd", found) if not is_unicode(found) else text


def append_lines(path: str | os.PathLike[str], lines: Sequence[str]) -> None:
    """Add whole lines to a file of lines, and flush it to disk; it is made if it is not there.

    A kill leaves at most one line cut short, the last one, and the next call begins on a new line. An error leaves the
    file as it was. Hold a lock where other processes write to it too.

    Raises:
        OutputError: the folder is read-only, or the disk is full.
    """
    data = "".join(f"{line}\n" for line in lines).encode()
    try:
        with open(path, "ab+", buffering=0) as file:  # what a buffer keeps would be written after the error, too
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                data = b"\n" + data
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file.fileno(), end)
                raise
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, "Choose another place")
        raise OutputError(f"cannot write '{path}': {error.strerror or error}. {fix}; it is as it was.") from error


def same_data(data: str, recorded: object) -> bool:
    """Whether a data set that a user names is the one of a record: by its name, or as the same folder or file."""
    return isinstance(recorded, str) and (data == recorded or real_path(data) == real_path(recorded))
