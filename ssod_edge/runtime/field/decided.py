"""What people decided of collected images (`review`), so that the like of it is not collected again."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path

import numpy as np

from ssod_edge.errors import UsageError
from ssod_edge.json_reader import from_json, parse_json
from ssod_edge.runtime.field.descriptors import WIDTH, Floats, from_base64, unit
from ssod_edge.runtime.field.shelf import Collected

#: The log of decisions in a collected folder, a line an image; the images themselves are gone from there.
DECISIONS = "decisions.jsonl"
#: So many decisions, the newest, are looked at: 10 MB of memory.
MOST = 10_000

_NAME = re.compile(r"\d{8}T\d{6}Z-([0-9a-f]{16})\.")


class Decided:
    """The images of a folder that were given to a class or discarded, as they were when the log was read."""

    def __init__(self, folder: Path) -> None:
        try:
            rows = (folder / DECISIONS).read_bytes().splitlines()[-MOST:]
        except FileNotFoundError:
            rows = []
        lines = []
        self._hashes: set[str] = set()
        for row in rows:
            with suppress(UsageError):  # cut short by a kill, of another release, or an image without a line
                values = parse_json(row)
                if (name := _NAME.match(str(values.get("file")))) is not None:
                    self._hashes.add(name[1])
                line: Collected = from_json(Collected, values.get("collected"), "collected")
                lines.append((line.described_by, unit(from_base64(line.descriptor))))
        self._kinds = np.array([kind for kind, _ in lines], object)
        self._vectors = np.stack([vector for _, vector in lines] or [np.zeros(WIDTH, np.float32)])[: len(lines)]

    def likeness(self, vector: Floats, kind: str) -> float:
        """The highest cosine of one of them with a descriptor of this kind; 0 where there is none."""
        cosines = np.where(self._kinds == kind, self._vectors @ vector, np.float32(0))
        return float(cosines.max(initial=0))

    def holds(self, content: bytes) -> bool:
        """Whether one of them had the bytes of this file, whatever model described it."""
        return hash_of(content) in self._hashes


def hash_of(content: bytes) -> str:
    """What the name of a collected image says of its bytes."""
    return hashlib.sha256(content).hexdigest()[:16]
