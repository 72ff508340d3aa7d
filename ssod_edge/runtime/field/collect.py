"""Keeping what a model does not know, for people to look at: whole pictures in a folder, within a budget.

Kept are unknown images, and the known ones that are least certain: of known images, the tenth (`UNSURE`) whose scores
lie next to the threshold. Near-duplicates of what is there are left out. When the budget is full, the least informative
image goes. How informative one is:

    weight * (1 - similarity to the most similar image that is kept)

The weight is 1 for an unknown image, and for a known one falls from 1 at the threshold to 0 at the end of that tenth,
by `p_known`: equal steps are equal shares of known images, whatever the score. So a folder fills with different things
rather than with many pictures of one, and of two that look alike the less certain one stays.

What a reviewer of this folder gave to a class or discarded does not come back, nor what looks like it
(`ssod_edge.runtime.field.decided`).

The similarity is the cosine of descriptors (`ssod_edge.runtime.field.descriptors`): of the graph's pooled features
where it gives them (`export --features pooled`), else of 16 x 16 grey pixels of what the graph saw.

What the folder holds, and how it outlives a kill: `ssod_edge.runtime.field.shelf`.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.config import IMAGE_SUFFIXES
from ssod_edge.data.pixels import ImageLike, Stored, load_image, read_pixels
from ssod_edge.errors import ImageError, OutputError, SsodEdgeError, UsageError
from ssod_edge.files import append_lines, exclusive, make_directory, write_atomic
from ssod_edge.runtime.field.decided import DECISIONS, Decided, hash_of
from ssod_edge.runtime.field.descriptors import Describer, Descriptor, to_base64, unit
from ssod_edge.runtime.field.shelf import INDEX, Collected, Shelf, remove_remains, to_text, write_index
from ssod_edge.runtime.predict import Predictor, Seen, Verdict
from ssod_edge.sources import without_secrets
from ssod_edge.spec import Threshold

#: The budget, if nothing else is said.
MOST, MEGABYTES = 500, 200.0
#: Of known images the share, next to the threshold, that counts as uncertain.
UNSURE = 0.1
#: Of a stream one frame is kept in this time at most: neighbouring frames show the same.
PERIOD_S = 1.0
#: From this cosine of descriptors on two images are near-duplicates: photos of different things stay below it, and most
#: that moved by a few pixels, or got other noise, above.
ALIKE = 0.9
QUALITY = 95


class Collector(AbstractContextManager["Collector"]):
    """Keeps what a model does not know. A context manager: within it, every verdict of the model is looked at::

        with ssod_edge.open("runs/demo") as model, Collector("unknown", model):
            model.predict("photo.jpg")

    Args:
        folder: made if it is not there, else gone on with; other processes may be at it too.
        model: whose verdicts they are.
        most: images that the folder may hold.
        megabytes: and their size, in millions of bytes.
        say: takes the first problem after the start, which is then not raised: verdicts matter more. None says
            nothing, and raises.

    Attributes:
        looked_at, kept, near_duplicates, decided: images so far that were unknown or uncertain, and what became of
            them; `decided` are those that are or look like one that a reviewer decided on.
        problem: the error that `say` was told of; None while all is well.

    Raises:
        UsageError: the artifact has no threshold, or the budget is none.
        OutputError: the folder cannot be made or written to; later, from `predict`, an image cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: Predictor,
        most: int = MOST,
        megabytes: float = MEGABYTES,
        say: Callable[[str], Any] | None = None,
    ) -> None:
        if most < 1 or not megabytes > 0:
            raise UsageError(f"a budget is at least 1 image and more than 0 MB, got {most} and {megabytes:g}")
        artifact = model.runner.artifact
        if artifact.threshold is None:
            raise UsageError(
                f"{artifact.name} has no threshold, so nothing is unknown to it. Fit one with: ssod-edge calibrate "
                "DIR --id DATA"
            )
        self._model, self._threshold, self._say = model, artifact.threshold, say
        self._describer = Describer(model.runner)
        self._most, self._room = most, int(megabytes * 1e6)
        self._folder = make_directory(folder)
        self._mutex, self._last = threading.Lock(), -np.inf
        self._decided_at: tuple[int, ...] | None = None
        self.looked_at = self.kept = self.near_duplicates = self.decided = 0
        self.problem: SsodEdgeError | None = None
        hashes = "".join(sorted(artifact.files.values()))
        self._facts: dict[str, Any] = {
            "artifact": artifact.name,
            "artifact_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
            "score": model.runner.spec.score_name,
        }
        if not os.access(self._folder, os.W_OK):
            raise OutputError(f"cannot write into '{folder}'. Choose a place that you may write to.")
        with exclusive(self._folder):
            remove_remains(self._folder)
            self._read()

    def __enter__(self) -> Collector:
        self._model.watchers.append(self.see)
        return self

    def __exit__(self, *_: object) -> None:
        self._model.watchers.remove(self.see)

    def see(self, seen: Seen) -> bool:
        """Keep an image if it is worth it; returns whether it was kept."""
        weight = weigh(seen.verdict, self._threshold)
        if weight <= 0:
            return False
        with self._mutex:
            if seen.time_s is not None and 0 <= seen.time_s - self._last < PERIOD_S:
                return False
            try:
                kept = self._look(seen, weight)
            except (SsodEdgeError, OSError) as error:
                self._fail(error)
                return False
            if kept and seen.time_s is not None:
                self._last = seen.time_s
            return kept

    def summary(self) -> str:
        """What became of the images, in one line."""
        total, size = len(self._shelf.lines) + len(self._shelf.loose), self._shelf.sizes.sum() / 1e6
        decided = f", and {self.decided} like those that a review decided on" if self.decided else ""
        return (
            f"collected: {self.kept} of {self.looked_at} images that were unknown or nearly so, "
            f"{self.near_duplicates} near-duplicates left out{decided}; '{self._folder}' holds {total} images "
            f"({size + sum(self._shelf.loose.values()) / 1e6:.1f} MB)"
        )

    def _look(self, seen: Seen, weight: float) -> bool:
        self.looked_at += 1
        descriptor = self._describer.describe(seen.pixels, seen.outputs)
        if self._is_there(descriptor):
            return False
        if (found := self._content(seen)) is None:
            return False
        content, suffix = found
        if self._decided.holds(content):
            self.decided += 1
            return False
        with exclusive(self._folder):
            if self._mark() != self._read_at:  # another process was here
                self._read()
                if self._is_there(descriptor):
                    return False
            now = datetime.now(timezone.utc)
            name = f"{now:%Y%m%dT%H%M%SZ}-{hash_of(content)}{suffix}"
            line = self._line(seen, name, now, weight, descriptor)
            return self._put(line, content)

    def _put(self, line: Collected, content: bytes) -> bool:
        shelf, path = self._shelf, self._folder / line.file
        gone = shelf.place(line, len(content), self._most, self._room)
        if gone is None:
            return False
        try:
            append_lines(self._folder / INDEX, [to_text(line)])
            write_atomic(path, lambda temporary: temporary.write_bytes(content))
        except SsodEdgeError:
            self._read()  # without it
            raise
        for name in gone:
            (self._folder / name).unlink(missing_ok=True)
        self.kept += 1
        shelf.written += 1
        if shelf.written > 2 * len(shelf.lines) + 64:
            write_index(self._folder, shelf)
        self._read_at = self._mark()
        return True

    def _is_there(self, descriptor: Descriptor) -> bool:
        vector, kind = unit(descriptor), self._describer.kind
        found = bool(self._shelf.similar(vector, kind).max(initial=0) >= ALIKE)
        decided = not found and self._decided.likeness(vector, kind) >= ALIKE
        self.near_duplicates += found
        self.decided += decided
        return found or decided

    def _read(self) -> None:
        self._shelf, self._read_at = Shelf(self._folder), self._mark()
        if (now := _stamp(self._folder / DECISIONS)) != self._decided_at:
            self._decided, self._decided_at = Decided(self._folder), now

    def _mark(self) -> tuple[int, ...]:
        """What changes whenever a process has kept an image, or a review has ended."""
        return _stamp(self._folder / INDEX)

    def _content(self, seen: Seen) -> tuple[bytes, str] | None:
        """The image as a file, and its suffix; None where the file is another one by now."""
        source: ImageLike = seen.source
        if isinstance(source, (str, os.PathLike, Stored)):
            suffix = Path(source.name if isinstance(source, Stored) else source).suffix.lower()
            settings = self._model.runner.spec.preprocess
            try:
                content = source.read() if isinstance(source, Stored) else Path(source).read_bytes()
                if not np.array_equal(read_pixels(content, settings), seen.pixels):
                    return None
            except (OSError, ImageError):
                return None
            if suffix in IMAGE_SUFFIXES:
                return content, suffix
            source = content
        if isinstance(source, bytes) and (usual := _suffix(source)) is not None:
            return source, usual
        file = io.BytesIO()
        load_image(source).save(file, "JPEG", quality=QUALITY, subsampling=0)
        return file.getvalue(), ".jpg"

    def _line(self, seen: Seen, name: str, now: datetime, weight: float, descriptor: Descriptor) -> Collected:
        verdict = seen.verdict.to_dict()
        known = {field.name: verdict[field.name] for field in fields(Collected) if field.name in verdict}
        return Collected(
            **{**known, **self._facts},
            file=name,
            time=now.isoformat(timespec="milliseconds"),
            source=os.fsencode(without_secrets(seen.verdict.image)).decode("utf-8", "replace"),
            frame=seen.frame,
            weight=round(weight, 6),
            described_by=self._describer.kind,
            descriptor=to_base64(descriptor),
        )

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, SsodEdgeError):
            error = OutputError(f"cannot collect in '{self._folder}': {getattr(error, 'strerror', None) or error}.")
        if self._say is None:
            raise error
        if self.problem is None:
            self._say(f"error: {error} The verdicts go on without collecting it.")
        self.problem = error


def weigh(verdict: Verdict, threshold: Threshold) -> float:
    """How much an image says by its verdict alone: 1 if it is unknown, else from 1 at the threshold down to 0."""
    if verdict.known is None:
        return 0.0
    if not verdict.known:
        return 1.0
    if verdict.p_known is None:  # of an early release
        return 0.0
    return min(1.0, max(0.0, 1 - (verdict.p_known - (1 - threshold.target_tpr)) / UNSURE))


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes whenever a file is written."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _suffix(content: bytes) -> str | None:
    """Of the usual formats; None of the others."""
    return ".jpg" if content[:2] == b"\xff\xd8" else ".png" if content[:4] == b"\x89PNG" else None
