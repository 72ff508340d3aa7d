"""Which images the user means: files, folders, patterns, and a list on standard input."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ssod_edge.config import IMAGE_SUFFIXES
from ssod_edge.data.layout import left_out, same_name, walk_images
from ssod_edge.data.stored import bucket_names, is_shard
from ssod_edge.errors import UsageError
from ssod_edge.sources import is_address, is_bucket, without_secrets


def list_images(
    arguments: Sequence[str],
    stdin: Iterable[str] | None = None,
    failed: dict[str, str] | None = None,
    others: set[str] | None = None,
    stored: bool = False,
) -> list[str]:
    """The paths meant by the arguments, in their order; within a folder or pattern, sorted by name.

    A folder stands for the images anywhere below it, a pattern such as `photos/*.jpg` or `photos/**/*.png` for
    what it matches, and `-` for the files and folders named on standard input, one a line. A name that does not
    exist stays in the list: reading it will say so, and the other images go on. A search passes over files and
    folders whose names begin with a dot.

    Args:
        arguments: at least one.
        stdin: the lines that `-` stands for.
        failed: gets each argument and line that stands for no image, with the reason; it stays in the list. None
            raises the first of them.
        others: gets the paths of the files in folders that are no images, see `ssod_edge.data.layout.left_out`.
        stored: addresses in buckets are taken too (`ssod_edge.data.stored`): a pattern or a folder there stands for
            what it holds. A .tar file stays one name; `ssod_edge.data.listing.Listing` gives its images.

    Raises:
        UsageError: no argument, a folder without images, a pattern without a match, or an empty list; where `failed`
            is given, only if nothing else is left.
    """
    paths: list[str] = []
    for name, expand in _names(arguments, stdin or ()):
        try:
            if stored and is_bucket(name):
                paths += bucket_names(name) if expand is _expand else [name]
                continue
            _check_path(name)
            paths += expand(name, set() if others is None else others)
        except UsageError as error:
            if failed is None:
                raise
            failed[without_secrets(name)] = str(error)
            paths.append(without_secrets(name))
    if failed and set(paths) <= set(failed):
        raise UsageError(failed[paths[0]])
    if not paths:
        raise UsageError("no images were given. Name files, folders, a pattern, or - for a list on standard input")
    return paths


def _check_path(name: str) -> None:
    """Raises UsageError for what is no path of this machine."""
    shown = without_secrets(name)
    if not (is_address(name) or shown != name) or os.path.lexists(name):
        return
    if not is_address(name):
        raise UsageError(f"'{shown}' is a pipeline: give it alone, as --camera")
    if name.lower().startswith("file://"):
        raise UsageError(f"'{shown}' is an address of a file: give its path")
    raise UsageError(
        f"'{shown}' is written as an address, of a kind that no image is read from: download it first. A stream is "
        "given alone, as rtsp, rtmp, rtp, srt, http(s), udp or tcp"
    )


def known_images(folder: str, classes: Sequence[str], say: Callable[[str], object]) -> list[str]:
    """The images of a folder that a model's threshold may be fitted to.

    Where folders in it bear names of the model's classes, images in other folders are of something else, and would
    move the threshold: they are left out, which is said, as of files that are no images.

    Raises:
        UsageError: as `list_images`.
    """
    no_images: set[str] = set()
    paths, known = list_images([folder], others=no_images), set(map(same_name, classes))
    if note := left_out(no_images):
        say(note)
    folders = {path: os.path.relpath(path, folder).split("/")[:-1] for path in paths}
    kept = [path for path in paths if known & set(map(same_name, folders[path]))]
    if not kept or len(kept) == len(paths):
        return paths
    others = sorted({"/".join(folders[path]) or "." for path in set(paths) - set(kept)})
    say(
        f"left out: {len(paths) - len(kept)} of {len(paths)} images, in folders that are no class of the model "
        f"({', '.join(others[:5])}{', ...' if len(others) > 5 else ''})"
    )
    return kept


def _names(
    arguments: Sequence[str], stdin: Iterable[str]
) -> Iterator[tuple[str, Callable[[str, set[str]], list[str]]]]:
    """Each argument or line of the list, and what turns it into paths."""
    for argument in arguments:
        if argument != "-":
            yield argument, _expand
            continue
        lines = [line for text in stdin if (line := text.rstrip("\r\n").removeprefix("\ufeff"))]
        yield from ((line, _as_it_is) for line in lines) if lines else [(argument, _no_lines)]


def _as_it_is(name: str, others: set[str]) -> list[str]:
    """A line of a list: a bracket or a star in it is not a pattern."""
    return _folder(name, others) if Path(name).is_dir() else [name]


def _no_lines(_: str, others: set[str]) -> list[str]:
    raise UsageError("'-' was given, and standard input names no images; write one path a line")


def _expand(argument: str, others: set[str]) -> list[str]:
    if Path(argument).is_dir():
        return _folder(argument, others)
    if os.path.lexists(argument) or not glob.has_magic(argument):
        return [argument]
    matches = sorted(glob.glob(argument, recursive=True))  # Path.glob takes no absolute pattern
    images = [path for match in matches for path in (walk_images(match, others) if Path(match).is_dir() else [match])]
    if not images:
        raise UsageError(f"no image matches '{argument}'")
    # "**" matches a folder and also what lies in it.
    return list(dict.fromkeys(images))


def _folder(folder: str, others: set[str]) -> list[str]:
    images = list(walk_images(folder, others))
    if not images:
        if shard := next((name for name in sorted(os.listdir(folder)) if is_shard(name)), None):
            raise UsageError(f"the folder '{folder}' holds .tar files such as '{shard}': give '{folder}/*.tar'")
        raise UsageError(f"the folder '{folder}' holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return images
