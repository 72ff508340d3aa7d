"""Writing and hashing files so that a reader never meets half a file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssod_edge.errors import OutputError


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def make_directory(path: str | os.PathLike[str]) -> Path:
    """Create a folder and its parents.

    Raises:
        OutputError: it cannot be created, or is a file.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create the folder '{path}': {error.strerror}. Choose another with -o/--out."
        ) from error
    return path


def write_atomic(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it over `path`.

    A kill, a full disk or an error at any instant leaves the previous file, whole.

    Raises:
        OutputError: the folder is read-only, the disk is full, or the rename failed.
    """
    path = Path(path)
    make_directory(path.parent)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write '{path}': {error.strerror or error}. "
            "Free some space or choose another folder; an earlier file of that name is unchanged."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write a JSON document atomically, with a final newline. NaN and infinity are refused."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
