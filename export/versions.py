"""Versions of an export: what a lesson in place replaces is kept beside it, and can be swapped in again.

`EXPORT.versions/NUMBER-HASH` is a whole export folder for each. Its files are hard links to those that were in EXPORT,
so that a kept version takes no room until EXPORT has others. That is safe, because no file of an export is ever
changed: a new one is written beside it and takes its name (`ssod_edge.files.write_atomic`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ssod_edge.errors import BusyError, UsageError
from ssod_edge.export.staging import remove, remove_all_left, staged
from ssod_edge.files import exclusive, real_path
from ssod_edge.runtime.export import Export
from ssod_edge.spec import SPEC_NAME, Spec


def versions_folder(place: Path) -> Path:
    """Where the versions of an export are kept."""
    place = real_path(place)
    return place.with_name(f"{place.name}.versions")


def name_of(spec: Spec) -> str:
    """What a version is called: two of one number differ in the hash, which `calibrate` does not change."""
    return f"{spec.version}-{spec.reference_sha256[:8]}"


def recorded_name(entry: Mapping[str, Any]) -> str:
    """The same of a version in the record of a later one (`Spec.lineage`)."""
    return f"{entry['version']}-{entry['reference_sha256'][:8]}"


def kept_versions(place: Path) -> list[Export]:
    """Those that lie beside an export, the first one first; the one that is in use may be among them."""
    folder = versions_folder(place)
    names = sorted(path for path in folder.iterdir() if path.name[:1] != ".") if folder.is_dir() else []
    found = [export for path in names if (export := Export.in_place(path)) is not None]
    return sorted(found, key=lambda export: export.spec.version)


def others(place: Path, current: Spec | None) -> list[Export]:
    """Kept versions but for the one that is in use."""
    return [export for export in kept_versions(place) if current is None or name_of(export.spec) != name_of(current)]


def next_number(export: Export) -> int:
    """Of the version that comes next in the place of an export."""
    return 1 + max([export.spec.version, *(kept.spec.version for kept in kept_versions(export.folder))])


def size_on_disk(place: Path) -> int:
    """Bytes that kept versions take beside what the export itself takes: a file with several names counts once."""
    inodes: dict[tuple[int, int], int] = {}
    for folder in (versions_folder(place), real_path(place)):
        for path in folder.rglob("*"):
            with suppress(OSError):  # it went this instant
                found = path.stat()
                if path.is_file():
                    inodes[found.st_dev, found.st_ino] = found.st_size if folder != real_path(place) else 0
    return sum(inodes.values())


def keep(place: Path) -> Path | None:
    """Keep an export as a version; hold `exclusive` of its folder's parent. None where it is damaged.

    Raises:
        OutputError: it cannot be written.
    """
    found = Export.in_place(place)
    if found is None:
        return None
    target = versions_folder(place) / name_of(found.spec)
    with staged(target) as folder:
        _fill(folder, found)
    return target


def check_unchanged(place: Path, export: Export) -> None:
    """Raises BusyError where the model in a place is no longer that of the export that was opened there."""
    now = Export.in_place(place)
    if now is None or now.spec.reference_sha256 != export.spec.reference_sha256:
        raise BusyError(
            f"'{place}' was exported, taught or rolled back meanwhile, and nothing is released. Do it again"
        )


def roll_back(folder: str | os.PathLike[str], to: str | None = None) -> tuple[Spec | None, Spec]:
    """Swap an earlier version in by one rename; the one that was in use is kept, and can be swapped in the same way.

    What has the files of the former version open goes on with them.

    Args:
        folder: an export folder, or the run folder that holds it.
        to: the number or name of a version (`name_of`); None takes the one that the export was taught from.

    Returns:
        the spec that was in use, None where it was damaged; and the one that is now.

    Raises:
        UsageError: no such version.
        ArtifactError: a file of it is damaged.
        OutputError: it cannot be written. In every case the export is unchanged.
    """
    place = real_path(Export.place(folder))
    before = Export.in_place(place)
    chosen = _choose(place, before, to)
    chosen.check_all()
    with ExitStack() as publishing, staged(place) as new:
        _fill(new, chosen)
        publishing.enter_context(exclusive(place.parent))
        if before is not None:
            check_unchanged(place, before)
        keep(place)
    return None if before is None else before.spec, chosen.spec


def prune(place: Path, most: int) -> list[str]:
    """Remove the oldest kept versions beyond `most`, the one in use not counted; returns their names."""
    folder, current = versions_folder(place), Export.in_place(place)
    if not folder.is_dir():
        return []
    remove_all_left(folder)
    kept = others(place, None if current is None else current.spec)
    gone = [export.folder for export in kept[: max(0, len(kept) - most)]]
    for path in gone:
        remove(path)
    return [path.name for path in gone]


def _choose(place: Path, current: Export | None, to: str | None) -> Export:
    """The version to swap in; see `roll_back`."""
    found = others(place, None if current is None else current.spec)
    names = ", ".join(name_of(export.spec) for export in found) or "none"
    if to is not None:
        chosen = [export for export in found if to in (str(export.spec.version), name_of(export.spec))]
        what = f"version {to}"
        if not chosen and current is not None and to in (str(current.spec.version), name_of(current.spec)):
            raise UsageError(f"{what} is in use already; kept beside '{place}': {names}")
    elif current is None and not found:
        Export.at(place)  # says what is wrong
        raise UsageError(f"'{place}' is no export")
    elif current is None:
        raise UsageError(f"'{place}' is damaged or not there: name a version with --to; kept beside it: {names}")
    elif not current.spec.lineage:
        raise UsageError(f"version {current.spec.version} in '{place}' was not taught; kept beside it: {names}")
    else:
        parent = current.spec.lineage[-1]
        chosen = [export for export in found if name_of(export.spec) == recorded_name(parent)]
        what = f"version {parent['version']}, which '{place}' was taught from,"
    if not chosen:
        fix = "Name one with --to" if found else f"See: ssod-edge history {place}"
        raise UsageError(f"{what} is not kept beside '{place}'; kept: {names}. {fix}")
    if len(chosen) > 1:
        raise UsageError(f"several versions are called {to}: {names}. Give the name of one, with its hash")
    return chosen[0]


def _fill(folder: Path, export: Export) -> None:
    """Put the files of an export into a folder, as further names of them; a copy where the file system has no links."""
    for name in (SPEC_NAME, *export.spec.files):
        source, target = export.folder / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not source.is_file():
            continue  # of a version that is kept as it is, damaged or not; one that is swapped in was checked
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
