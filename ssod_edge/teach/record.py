"""What a taught export says of its lessons, in the `source` of its spec."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ssod_edge.export.versions import next_number
from ssod_edge.json_reader import read_json
from ssod_edge.runtime.export import Export
from ssod_edge.spec import SPEC_NAME, TRUNK_SHA256, Spec
from ssod_edge.teach.photos import Photos, counts_of
from ssod_edge.teach.proof import Proof


@dataclass(frozen=True)
class TaughtExport:
    """What a lesson made. It can be used as the path of its folder.

    Attributes:
        folder: of the new export.
        spec: that was written there.
        unreadable: messages of the photos that were left out.
    """

    folder: Path
    spec: Spec
    unreadable: tuple[str, ...] = ()

    def __fspath__(self) -> str:
        return os.fspath(self.folder)

    @property
    def proof(self) -> dict[str, Any]:
        """Figures of the lesson, see `ssod_edge.teach.proof.Proof`."""
        return dict(self.spec.taught["proof"])


def source_record(
    parent: Export, photos: Photos, forgotten: tuple[str, ...], proof: Proof, in_place: bool
) -> dict[str, Any]:
    """The spec's `source` of the new version."""
    spec = parent.spec
    facts = {key: value for key, value in spec.source.items() if key not in ("checkpoint_sha256", "weights_sha256")}
    if trunk := spec.source.get(TRUNK_SHA256, spec.source.get("checkpoint_sha256")):
        facts[TRUNK_SHA256] = trunk
    sha256 = str(read_json(parent.folder / SPEC_NAME).get("sha256"))
    lesson = {
        "photos": counts_of(photos.labels, photos.classes),
        "new": list(photos.classes[len(photos.classes) - photos.added :]),
        "data": photos.data,
        "data_fingerprint": photos.fingerprint,
        "forgotten": list(forgotten),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "proof": proof.record,
    }
    entry = {
        "version": spec.version,
        "sha256": sha256,
        "reference_sha256": spec.reference_sha256,
        "taught": _short(spec.taught),
    }
    return {
        **facts,
        "version": next_number(parent) if in_place else spec.version + 1,
        "parent_sha256": sha256,
        "lineage": [*spec.lineage, entry],
        "taught": lesson,
    }


def _short(lesson: Mapping[str, Any]) -> dict[str, Any]:
    """A lesson as later versions remember it: not what each class lost."""
    if not lesson:
        return {}
    return {**lesson, "proof": {key: value for key, value in lesson["proof"].items() if key != "lost"}}
