"""A folder that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ssod_edge.errors import OutputError, UsageError
from ssod_edge.files import make_directory
from ssod_edge.spec import SPEC_NAME, Spec, load_spec


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `folder`; it takes that name when the block ends without an error.

    An earlier export of that name is replaced. Files beside it that no spec lists are carried over.

    Raises:
        UsageError: `folder` is a file, or holds something else than an export.
        OutputError: it cannot be written; what was there before is unchanged.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"'{folder}' is a file; give a folder for the export")
    if folder.is_dir() and not (folder / SPEC_NAME).exists() and any(folder.iterdir()):
        raise UsageError(f"'{folder}' holds other files than an export; give a new or empty folder")
    make_directory(folder.parent)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
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


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for the same folder, which exists; it leaves no file behind.

    Where the file system has no locks, the block is entered at once.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _publish(temporary: Path, folder: Path) -> None:
    temporary.chmod(0o755)
    for path in (*temporary.rglob("*"), temporary):
        _flush(path)
    if not folder.exists():
        temporary.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    for name in _unlisted(old):
        if not (folder / name).exists():
            (old / name).rename(folder / name)
    shutil.rmtree(old, ignore_errors=True)


def _unlisted(folder: Path) -> list[str]:
    """Names in an export folder that its spec does not account for."""
    try:
        spec: Spec | None = load_spec(folder)
    except Exception:  # a damaged spec lists nothing
        spec = None
    listed = {Path(name).parts[0] for artifact in spec.artifacts for name in artifact.files} if spec else set()
    return [path.name for path in folder.iterdir() if path.name not in listed]


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
