"""A folder of collected images: a line for each in an index, and what stays when the budget is full.

The folder holds the images and `INDEX`, a JSON line for each (`Collected`). The line is written first, so a kill at any
instant leaves whole images that have one, and at most a line without an image, which counts for nothing. Images without
a line (the index was lost, or somebody put them there) stay, and count in the budget. Processes take turns by a lock.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ssod_edge.data.layout import is_image, is_shown
from ssod_edge.errors import UsageError
from ssod_edge.files import json_text, write_atomic
from ssod_edge.json_reader import from_json, parse_json
from ssod_edge.runtime.field.descriptors import WIDTH, Floats, from_base64, unit

INDEX = "collected.jsonl"


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A line of the index.

    Attributes:
        file: name of the image in the folder.
        time: when it was kept, UTC.
        source: the path, or where a frame came from, without user, password and query.
        frame: of a video or stream, its number.
        class_name, confidence, ood_score, threshold, known, p_known: the verdict (`Verdict`).
        engine, precision, artifact: what ran.
        artifact_sha256: of its files' hashes.
        score: that says "unknown".
        weight: of the image by its verdict, in (0, 1].
        described_by: `Describer.kind`: what the descriptor was made of.
        descriptor: base64 of int8 [WIDTH].
    """

    file: str
    time: str
    source: str
    frame: int | None
    class_name: str
    confidence: float
    ood_score: float
    threshold: float
    known: bool
    p_known: float | None
    engine: str
    precision: str
    artifact: str
    artifact_sha256: str
    score: str
    weight: float
    described_by: str
    descriptor: str


class Shelf:
    """What a folder holds, as it was when it was read.

    Attributes:
        lines: of each image that has one.
        sizes: bytes of these images, in the same order.
        loose: bytes of each image without a line.
        written: lines of the file.
    """

    def __init__(self, folder: Path) -> None:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if is_shown(entry.name) and is_image(entry.name) and entry.is_file()]
            self.loose = {entry.name: entry.stat().st_size for entry in shown}
        try:
            text = (folder / INDEX).read_bytes().splitlines()
        except FileNotFoundError:
            text = []
        self.written = len(text)
        found: dict[str, Collected] = {}
        for row in text:
            with suppress(UsageError):  # cut short by a kill, or of another release: then its image has no line
                line: Collected = from_json(Collected, parse_json(row))
                from_base64(line.descriptor)
                found[line.file] = line
        self.lines = [line for name, line in found.items() if name in self.loose]
        self.sizes = np.array([self.loose.pop(line.file) for line in self.lines], np.int64)
        self.weights = np.array([line.weight for line in self.lines], np.float64)
        self.kinds = np.array([line.described_by for line in self.lines], object)
        self.vectors = np.stack(
            [unit(from_base64(line.descriptor)) for line in self.lines] or [np.zeros(WIDTH, np.float32)]
        )
        self.vectors = self.vectors[: len(self.lines)]
        self.near = np.array([self._near(row) for row in range(len(self.lines))], np.float32)

    def similar(self, vector: Floats, kind: str) -> Floats:
        """The cosine of each image with a descriptor; 0 where that is of another kind."""
        cosines: Floats = np.where(self.kinds == kind, self.vectors @ vector, np.float32(0))
        return cosines

    def _near(self, row: int, among: npt.NDArray[np.bool_] | None = None) -> float:
        """The highest cosine of an image with another one."""
        cosines = self.similar(self.vectors[row], self.kinds[row])
        cosines[row] = 0
        return float(cosines.max(where=True if among is None else among, initial=0))

    def place(self, line: Collected, size: int, most: int, room: int) -> list[str] | None:
        """Put an image in, and take out what no longer fits: the least informative one, until all is in the budget.

        Returns:
            the names of the files that go; None where the new image would be among them, and nothing was changed.
        """
        if size > room - sum(self.loose.values()):
            return None
        before = dict(vars(self))
        vector, last = unit(from_base64(line.descriptor)), len(self.lines)
        cosines = self.similar(vector, line.described_by)
        self.lines = [*self.lines, line]
        self.sizes, self.weights = np.append(self.sizes, size), np.append(self.weights, line.weight)
        self.kinds = np.append(self.kinds, line.described_by)
        self.vectors = np.concatenate([self.vectors, vector[None]])
        self.near = np.append(np.maximum(self.near, cosines), cosines.max(initial=0)).astype(np.float32)
        stays = np.ones(last + 1, bool)
        while stays.sum() > most - len(self.loose) or self.sizes[stays].sum() > room - sum(self.loose.values()):
            worth = np.where(stays, self.weights * (1 - self.near.clip(0, 1)), np.inf)
            least = int(worth.argmin())
            if least == last:
                vars(self).update(before)
                return None
            stays[least] = False
            lonelier = stays & (self.similar(self.vectors[least], self.kinds[least]) >= self.near - 1e-6)
            for row in np.flatnonzero(lonelier).tolist():
                self.near[row] = self._near(row, stays)
        gone = [self.lines[row].file for row in np.flatnonzero(~stays)]
        self.lines = [self.lines[row] for row in np.flatnonzero(stays)]
        for name in ("sizes", "weights", "kinds", "vectors", "near"):
            setattr(self, name, getattr(self, name)[stays])
        return gone


def to_text(line: Collected) -> str:
    """A line of the index."""
    return json_text(asdict(line))


def write_index(folder: Path, shelf: Shelf) -> None:
    """Leave lines without an image out of the index; call it within `exclusive`."""
    text = "".join(f"{to_text(line)}\n" for line in shelf.lines)
    write_atomic(folder / INDEX, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    shelf.written = len(shelf.lines)


def remove_remains(folder: Path) -> None:
    """Remove the temporary files of a killed process; call it within `exclusive`."""
    for path in folder.glob(".*"):
        if re.match(rf"\.(\d{{8}}T\d{{6}}Z-|{re.escape(INDEX)}\.)", path.name):
            path.unlink(missing_ok=True)
