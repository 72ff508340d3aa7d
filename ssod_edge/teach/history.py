"""Which versions of an export there are: the one in use, those it comes from, and those that are kept beside it."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from typing import Any

from ssod_edge.errors import UsageError
from ssod_edge.export.versions import kept_versions, name_of, recorded_name
from ssod_edge.json_reader import read_json
from ssod_edge.runtime.export import Export
from ssod_edge.spec import REFERENCE_NAME, SPEC_NAME


def history(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The versions of an export, the newest first; what came before the kept ones is read from their records.

    Args:
        folder: an export folder, or the run folder that holds it. It may be damaged, if versions of it are kept.

    Returns:
        of each: "name", "version", "sha256" (of its spec), "reference_sha256", "parent"
        (the name of the one that it was taught from, or None), "classes" (None where it is not here),
        "taught" (the lesson; empty as exported), "time", "current", and "folder" (None where it is not here).

    Raises:
        UsageError: there is no export.
        ArtifactError: it is damaged, and nothing is kept beside it.
    """
    place = Export.place(folder)
    current, kept = Export.in_place(place), kept_versions(place)
    if current is None and not kept:
        Export.at(folder)  # says what is wrong
        raise UsageError(f"'{place}' is no export")
    here = [*([] if current is None else [current]), *kept]  # the one in use may be among the kept ones
    rows: dict[str, dict[str, Any]] = {}
    for export in here:
        rows.setdefault(name_of(export.spec), _row(export, export is current))
    for export in here:
        parent = None
        for entry in export.spec.lineage:
            rows.setdefault(recorded_name(entry), _recorded(entry, parent))
            parent = recorded_name(entry)
    return sorted(rows.values(), key=lambda row: (row["version"], row["time"] or ""), reverse=True)


def _recorded(entry: dict[str, Any], parent: str | None) -> dict[str, Any]:
    """The row of a version that is known by the record of a later one."""
    lesson = entry["taught"]
    return {
        "name": recorded_name(entry),
        "version": entry["version"],
        "sha256": entry["sha256"],
        "reference_sha256": entry["reference_sha256"],
        "parent": parent,
        "classes": None,
        "taught": lesson,
        "time": lesson.get("time"),
        "current": False,
        "folder": None,
    }


def _row(export: Export, current: bool) -> dict[str, Any]:
    """The row of a version that is here."""
    spec = export.spec
    # `calibrate` writes the spec anew, and a damaged export may have lost the other.
    files = [export.folder / name for name in (SPEC_NAME, REFERENCE_NAME)]
    written = min(file.stat().st_mtime for file in files if file.is_file())
    when = datetime.fromtimestamp(written, timezone.utc).isoformat(timespec="seconds")
    return {
        "name": name_of(spec),
        "version": spec.version,
        "sha256": read_json(export.folder / SPEC_NAME).get("sha256"),
        "reference_sha256": spec.reference_sha256,
        "parent": recorded_name(spec.lineage[-1]) if spec.lineage else None,
        "classes": list(spec.classes),
        "taught": spec.taught,
        "time": spec.taught.get("time", when),
        "current": current,
        "folder": str(export.folder),
    }
