"""Editing `ssod.json` as a release would have written it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssod_edge.spec import SPEC_NAME, spec_hash

#: A version in the lineage of a later one, and the record of a lesson.
FIRST: dict[str, Any] = {"version": 1, "sha256": "0" * 64, "reference_sha256": "0" * 64, "taught": {}}
LESSON: dict[str, Any] = {
    "photos": {"mug": 5}, "new": ["mug"], "forgotten": [], "time": None, "data": None,
    "proof": {"accuracy": [0.9, 0.9], "new": {"mug": {"recall": 0.5}}},
}  # fmt: skip


def edit_spec(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the file's object in place, and give it the hash that belongs to it."""
    values = json.loads((folder / SPEC_NAME).read_text())
    change(values)
    (folder / SPEC_NAME).write_bytes(with_hash(values))


def with_hash(values: dict[str, Any]) -> bytes:
    """The file, with the hash that belongs to what it says."""
    values = {name: value for name, value in values.items() if name != "sha256"}
    return json.dumps({**values, "sha256": spec_hash(values)}).encode()


def earlier_spec(folder: Path, version: int) -> None:
    """Make the file what a release of schema 1, 2 or 3 wrote."""
    values = json.loads((folder / SPEC_NAME).read_text())
    gone = ["sha256", "outputs", "temperature", *(["detector", "choice"] if version < 3 else [])]
    for name in gone:
        del values[name]
    values["schema_version"] = version
    for artifact in values["artifacts"]:
        if artifact["threshold"] is not None:
            del artifact["threshold"]["id_highest"]
            if version < 3:
                del artifact["threshold"]["id_quantiles"]
        if version < 2:
            del artifact["build"]
    for name in ("fit", "roi", "version"):
        del values["preprocess"][name]
    (folder / SPEC_NAME).write_text(json.dumps(values))
