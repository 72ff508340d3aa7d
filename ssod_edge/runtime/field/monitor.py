"""What a model meets in the field: a file of fixed size with counts of its OOD scores, and whether they drifted.

No image, name or time of an image is kept. Several processes may write to one file, and a kill leaves it whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.errors import ArtifactError, OutputError, SsodEdgeError, UsageError
from ssod_edge.files import check_output, exclusive, write_json
from ssod_edge.json_reader import from_json, read_json
from ssod_edge.runtime.field.drift import CALM, MEMORY, DriftState, Reference, advance, fits, new_state, reference
from ssod_edge.runtime.predict import Predictor, Verdict
from ssod_edge.spec import Artifact, Spec, Threshold

SCHEMA_VERSION = 1
#: Scores wait in memory for this long at most before they are written, so a kill loses no more. Seldom enough for an SD
#: card.
FLUSH_S = 5.0
#: And no more than this many of them.
_FLUSH_IMAGES = 4096
#: More than an artifact's scores, which are fp32, can be, and fewer than overflow in what is computed of them.
_LARGEST_SCORE, _MOST_IMAGES = 1e39, 2**53


@dataclass(frozen=True, kw_only=True)
class Record:
    """The file.

    Attributes:
        schema_version: of this format.
        artifact, backbone, score: what made the scores.
        identity: hash of the artifact's files, score and threshold, which decide its scores and what they are compared
            with: scores of another one cannot be added.
        threshold: with the ID quantiles that are compared with.
        images: with a score.
        unknown: of these, above the threshold.
        failed: images that could not be read.
        interruptions: how often a camera or stream has stopped giving frames for a while.
        lowest, highest: scores; None before the first image.
        histogram: counts in the bins of `ssod_edge.runtime.field.drift.Reference.edges`. Those of several files of one
            artifact may be added up.
        drift: the test.
    """

    schema_version: int = SCHEMA_VERSION
    artifact: str
    backbone: str
    score: str
    identity: str
    threshold: Threshold
    images: int = 0
    unknown: int = 0
    failed: int = 0
    interruptions: int = 0
    lowest: float | None = None
    highest: float | None = None
    histogram: tuple[int, ...]
    drift: DriftState

    @staticmethod
    def complete(values: dict[str, Any]) -> dict[str, Any]:
        """A file of a release that did not count interruptions."""
        return {"interruptions": 0, **values}

    def __post_init__(self) -> None:
        counts = (self.images, self.unknown, self.failed, self.interruptions, *self.histogram)
        if min(counts) < 0 or max(counts) > _MOST_IMAGES or sum(self.histogram) != self.images:
            raise UsageError("its counts do not add up")
        ends = [score for score in (self.lowest, self.highest) if score is not None]
        if len(ends) != 2 * (self.images > 0) or ends != sorted(ends):
            raise UsageError("its lowest and highest score do not fit its number of images")
        if self.images and not sum(self.drift.recent[-1]) > 0:
            raise UsageError("it has images, and none of them are recent")


class Monitor(AbstractContextManager["Monitor"]):
    """Adds verdicts to a monitor file. A context manager; use it from one thread at a time::

        with ssod_edge.open("runs/demo") as model, Monitor("drift.json", model) as monitor:
            verdict = monitor.add(model.predict("photo.jpg"))
            if monitor.drifted: ...

    Args:
        path: the file; made if it is not there, else gone on with.
        model: whose verdicts they are.
        say: takes one line at each change between drifted and not, and the first problem with the file after it was
            opened, which is then not raised: verdicts matter more. None says nothing, and raises.

    Attributes:
        record: what the file held when scores were last written, at most `FLUSH_S` seconds ago.
        drifted: as of then.
        problem: the error that `say` was told of; None while all is well.

    Raises:
        UsageError: the artifact has no ID quantiles to compare with, or the file is another artifact's.
        ArtifactError: the file is damaged.
        OutputError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], model: Predictor, say: Callable[[str], Any] | None = None) -> None:
        self._path = check_output(path)
        if self._path.exists() and not self._path.is_file():
            raise UsageError(f"'{path}' is no regular file, and a monitor file is read as well as written")
        self._empty = _new_record(model.runner.spec, model.runner.artifact)
        self._bins = reference(self._empty.threshold)
        spec = model.runner.spec
        self._version = ""
        if spec.taught:
            self._version = f" (it is version {spec.version} now, taught from {spec.lineage[-1]['version']})"
        self._say = say
        self._scores: list[float] = []
        self._failed = self._interruptions = 0
        self._flushed = time.monotonic()
        self.problem: SsodEdgeError | None = None
        self.record = self._merge()

    @property
    def drifted(self) -> bool:
        return self.record.drift.drifted

    def __exit__(self, *_: object) -> None:
        self.flush()

    def add(self, verdict: Verdict) -> Verdict:
        """Count a verdict, and hand it on; one with an error counts as failed."""
        self.add_score(verdict.ood_score)
        return verdict

    def add_score(self, ood_score: float | None) -> None:
        """Count the OOD score of one image; None is an image that failed.

        Raises:
            UsageError: a score that is not finite.
        """
        if ood_score is None:
            self._failed += 1
        elif math.isfinite(ood_score):
            self._scores.append(ood_score)
        else:
            raise UsageError(f"an OOD score must be finite, got {ood_score}")
        if len(self._scores) >= _FLUSH_IMAGES or time.monotonic() - self._flushed >= FLUSH_S:
            self.flush()

    def add_interruptions(self, n: int) -> None:
        """Count that a camera or stream has stopped giving frames for a while, so many times."""
        self._interruptions += n

    def flush(self) -> None:
        """Write what has been added. What cannot be written is lost, so that memory stays bounded."""
        try:
            if self._scores or self._failed or self._interruptions:
                before, self.record = self.drifted, self._merge()
                if self.drifted != before and self._say is not None:
                    self._say(_change(self.record, self._path))
        except SsodEdgeError as error:
            if self._say is None:
                raise
            if self.problem is None:
                self._say(f"error: {error} The verdicts go on without the monitor.")
            self.problem = error
        finally:
            self._scores, self._failed, self._interruptions = [], 0, 0
            self._flushed = time.monotonic()

    def _merge(self) -> Record:
        """Add the waiting scores to what the file holds by now, while no other process does."""
        try:
            with exclusive(Path(os.path.realpath(self._path)).parent):
                record = self._empty
                if self._path.exists():
                    record = read_monitor(self._path)
                    if record.identity != self._empty.identity:
                        raise UsageError(
                            f"'{self._path}' holds scores of another artifact ({record.artifact} of {record.backbone}, "
                            f"score {record.score}), or of this one before it was exported, calibrated, taught or "
                            f"rolled back{self._version}. Give another name, or delete it to start over"
                        )
                record = replace(record, interruptions=record.interruptions + self._interruptions)
                record = _add(record, self._scores, self._failed, self._bins)
                write_json(self._path, asdict(record))
        except OSError as error:
            raise OutputError(
                f"cannot write '{self._path}': {error.strerror or error}. Choose another place."
            ) from error
        return record


def read_monitor(path: str | os.PathLike[str]) -> Record:
    """Read a monitor file.

    Raises:
        UsageError: there is none.
        ArtifactError: damaged, no monitor file, or of a newer release.
    """
    fix = "Give another name, or delete it to start over."
    try:
        values = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"'{path}' does not exist. Make one with: ssod-edge predict ... --monitor FILE") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' cannot be read as a monitor file ({error}). {fix}") from error
    version = values.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        raise ArtifactError(f"'{path}' was written by a newer release. Install a newer one (docs/install.md)")
    try:
        record: Record = from_json(Record, values)
        threshold = record.threshold
        if max(map(abs, (threshold.value, *threshold.id_quantiles))) > _LARGEST_SCORE or threshold.n > _MOST_IMAGES:
            raise UsageError("its threshold is larger than any score")
        bins = reference(threshold) if threshold.id_quantiles else None
        if bins is None or len(record.histogram) != len(bins.id_shares) or not fits(record.drift, len(bins.gaps)):
            raise UsageError("its bins are not those of its threshold")
    except UsageError as error:
        raise ArtifactError(f"'{path}' is damaged or no monitor file ({error}). {fix}") from error
    return record


def _new_record(spec: Spec, artifact: Artifact) -> Record:
    threshold = artifact.threshold
    if threshold is None or not threshold.id_quantiles:
        why = "has no threshold" if threshold is None else "was given its threshold by an earlier release"
        raise UsageError(
            f"{artifact.name} {why}, so there are no in-distribution scores to compare with. Fit them with: "
            "ssod-edge calibrate DIR --id DATA"
        )
    bins = reference(threshold)
    # Without what a threshold of an earlier release has not: its monitors go on.
    given = {key: value for key, value in asdict(threshold).items() if value is not None}
    facts = [sorted(artifact.files.values()), spec.score_name, given]
    return Record(
        artifact=artifact.name,
        backbone=spec.backbone,
        score=spec.score_name,
        identity=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        threshold=threshold,
        histogram=(0,) * len(bins.id_shares),
        drift=new_state(len(bins.gaps)),
    )


def _add(record: Record, scores: list[float], failed: int, bins: Reference) -> Record:
    if not scores:
        return replace(record, failed=record.failed + failed)
    values, limit = np.array(scores), record.threshold.value
    hits = np.bincount(np.searchsorted(bins.edges, values), minlength=len(record.histogram))
    known = [score for score in (record.lowest, record.highest) if score is not None]
    return replace(
        record,
        images=record.images + len(scores),
        unknown=record.unknown + int((values > limit).sum()),
        failed=record.failed + failed,
        lowest=min([*known, *scores]),
        highest=max([*known, *scores]),
        histogram=tuple((np.array(record.histogram) + hits).tolist()),
        drift=advance(record.drift, scores, limit, bins, record.images),
    )


def _change(record: Record, path: Path) -> str:
    if not record.drift.drifted:
        return f"drift: over; {CALM} images brought no further evidence of it"
    recent = record.drift.recent_unknown / sum(record.drift.recent[-1])
    return (
        f"drift: the scores are no longer those of in-distribution images, as of image {record.drift.alarm_at}; "
        f"{recent:.1%} of the last {min(record.images, MEMORY[-1])} or so are unknown, "
        f"{1 - record.threshold.target_tpr:.1%} would be usual. See: ssod-edge monitor {path}"
    )
