"""Images that are no files of this machine: members of .tar files, and objects in a bucket, which fsspec reads."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from glob import has_magic
from typing import IO, Any

from ssod_edge.data.layout import is_image, is_shown, tar_damage
from ssod_edge.data.pixels import MAX_BYTES, Stored
from ssod_edge.errors import ImageError, MissingExtraError, UsageError
from ssod_edge.optional import load
from ssod_edge.sources import is_bucket, without_secrets

#: How the names of files end that hold many images.
SHARDS = (".tar", ".tar.gz", ".tgz")


def is_shard(name: str) -> bool:
    """Whether a path or an address is that of a .tar file, by its name."""
    return name.lower().endswith(SHARDS)


def bucket_names(address: str) -> list[str]:
    """What an address of a bucket stands for: a pattern for what it matches, a folder for the images below it.

    Of a pattern .tar files are taken too; names that begin with a dot are left out, as in folders of this machine.

    Args:
        address: such as "s3://bucket/photos", "s3://bucket/shards/*.tar" or "s3://bucket/1.jpg".

    Returns:
        addresses, sorted by name.

    Raises:
        UsageError: it cannot be listed, or holds no images.
        MissingExtraError: fsspec is not installed, or what it needs for this kind of address.
    """
    shown = without_secrets(address)
    system, path = _file_system(address)
    try:
        if has_magic(path):
            matches = sorted(system.glob(path))
            found = [name for match in matches for name in ([match] if _is_named(match) else system.find(match))]
        elif _is_named(path) or not system.isdir(path):
            return [address]
        else:
            found = system.find(path)
    except Exception as error:  # each file system has errors of its own
        raise UsageError(f"'{shown}' cannot be listed: {_reason(error)}") from error
    depth = len(path.split("*")[0].rpartition("/")[0])
    names = [str(name) for name in found if _is_named(name) and is_shown(str(name)[depth:].lstrip("/"))]
    if not has_magic(path):
        names = [name for name in names if is_image(name)]
    if not names:
        raise UsageError(f"'{shown}' holds no images" if not has_magic(path) else f"no image matches '{shown}'")
    return [system.unstrip_protocol(name) for name in sorted(dict.fromkeys(names))]


def bucket_image(address: str) -> Stored:
    """An object of a bucket, which is fetched whenever it is read."""

    def read() -> bytes:
        try:
            system, path = _file_system(address)
            return bytes(system.cat_file(path, end=MAX_BYTES + 1))
        except Exception as error:  # each file system has errors of its own
            raise ImageError(_reason(error)) from error

    return Stored(without_secrets(address), read)


class Shard:
    """The images of a .tar file, in its order: one at a time is in memory.

    What is damaged or cut short gives an image more, under the name of the file, whose `read` says so.

    Args:
        name: a path or an address.

    Attributes:
        images: that were found so far.
        share: of the file's bytes that were read or passed over, in [0, 1].
    """

    def __init__(self, name: str):
        self._name = name
        self.shown = without_secrets(name)
        self.images, self.share = 0, 0.0

    def wanted(self, name_is: Callable[[str], bool]) -> Iterator[Stored]:
        """Those of the images whose names are wanted; of the others no bytes are read."""
        try:
            with _open(self._name) as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r:*") as tar:
                    while (member := tar.next()) is not None:
                        tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                        self.share = file.tell() / size
                        plain = member.name.removeprefix("./")
                        if not (is_shown(plain) and is_image(plain)) or member.isdir():
                            continue
                        self.images += 1
                        if name_is(name := f"{self.shown}/{plain}"):
                            yield Stored(name, _content(tar, member))
                    _check_end(tar)
            if not self.images:
                raise ImageError("it holds no images")
        except Exception as error:  # damage raises whatever it leads to
            if name_is(self.shown):
                yield Stored(self.shown, _raises(error))


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], bytes]:
    """What gives the bytes of a member, which are read at once: the file goes on to the next."""
    if not member.isreg():
        return _raises(ImageError("it is a link. Pack what it leads to: tar --dereference --hard-dereference"))
    file = tar.extractfile(member)
    assert file is not None
    data = file.read(MAX_BYTES + 1)
    return lambda: data


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises ImageError where an archive does not end as one does: `tarfile` takes a damaged header for the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise ImageError("its contents are damaged from here on. Copy or pack it again")


def _raises(error: Exception) -> Callable[[], bytes]:
    def read() -> bytes:
        raise error if isinstance(error, ImageError) else ImageError(_reason(error))

    return read


def _open(name: str) -> IO[bytes]:
    if not is_bucket(name):
        return open(name, "rb")
    system, path = _file_system(name)
    file: IO[bytes] = system.open(path, "rb")
    return file


def _file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, which it keeps, and the path in it."""
    core = load("fsspec.core", "an address of a bucket")
    try:
        system, path = core.url_to_fs(address)
    except ImportError as error:  # such as s3fs
        wanted = re.search(r"nstall (\w+)", str(error))
        fix = f". Install it with: pip install {wanted[1]}" if wanted else ""
        raise MissingExtraError(
            f"'{without_secrets(address)}' needs a package that is not installed ({error}){fix}"
        ) from error
    except Exception as error:
        raise UsageError(f"'{without_secrets(address)}' cannot be opened: {_reason(error)}") from error
    return system, str(path)


def _is_named(name: str) -> bool:
    """Whether a name is that of an image or a .tar file."""
    return is_image(name) or is_shard(name)


def _reason(error: Exception) -> str:
    if isinstance(error, tarfile.TarError):
        return f"it is no .tar file, or is cut short ({tar_damage(error)}). Copy or pack it again"
    if isinstance(error, FileNotFoundError):
        return "there is no such file or folder"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
