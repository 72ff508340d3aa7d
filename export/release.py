"""The one way an export comes out: made beside its place, proved, joined with what an earlier one has, swapped."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.detect.metrics import check_target_tpr
from ssod_edge.errors import ArtifactError, UsageError, VerificationError
from ssod_edge.export.engines.artifact import CPU_TARGETS, PRECISIONS, TARGETS
from ssod_edge.export.engines.tensorrt import PlanOptions
from ssod_edge.export.staging import staged
from ssod_edge.export.versions import check_unchanged, keep, name_of
from ssod_edge.files import exclusive, real_path
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import open_runner, why_not_here
from ssod_edge.runtime.runner import Runner
from ssod_edge.runtime.verify import Verification, check_passed, verify_runner
from ssod_edge.spec import SPEC_NAME, Artifact, Spec, check_files, save_spec

#: Of the range of a reference's logits and scores: a tenth of what verification lets an fp32 artifact differ by.
REFERENCE_NOISE = 1e-4
#: Keys of a spec's `source`: checksums of the weights, and the names that their run and file go by.
CHECKSUMS = ("checkpoint_sha256", "weights_sha256")
NAMES = ("run", "weights")

Say = Callable[[str], None]
#: Gives open runners their thresholds, and returns the figures of those it had to verify for that, by artifact.
Fit = Callable[[Sequence[Runner]], Mapping[str, Verification]]


@dataclass(frozen=True)
class Targets:
    """What to make.

    Attributes:
        precisions: of `PRECISIONS`; of none, those that the bundle holds.
        engines: of `TARGETS`.
        target_tpr: share of in-distribution images that must stay known, in (0, 1).
        plans: how TensorRT's plans are built.
    """

    precisions: tuple[str, ...] = ()
    engines: tuple[str, ...] = CPU_TARGETS
    target_tpr: float = 0.95
    plans: PlanOptions = field(default_factory=PlanOptions)

    def __post_init__(self) -> None:
        for name, known in (("precisions", PRECISIONS), ("engines", TARGETS)):
            given = getattr(self, name)
            if not set(given) <= set(known) or not (given or name == "precisions"):
                raise UsageError(f"{name} must be some of {', '.join(known)}, got {', '.join(given) or 'none'}")
        check_target_tpr(self.target_tpr)


class Draft:
    """An export that is being made. Attributes: its folder, which is a temporary one; its spec so far."""

    def __init__(self, folder: Path, say: Say):
        self.folder, self._say = folder, say
        self.spec: Spec

    def write(self, spec: Spec) -> None:
        """What was made, before any threshold or figure."""
        self.spec = spec
        save_spec(spec, self.folder)

    def prove(self, fit: Fit, together: bool, optional: Collection[str] = ()) -> None:
        """Fit each artifact's threshold on its own scores, verify it at that threshold, and write both down.

        Artifacts that were built for another machine are named and left as they are.

        Args:
            fit: see `Fit`.
            together: open all artifacts at once, so that `fit` reads its images once; else one at a time, because a
                device may have room for no more.
            optional: precisions whose artifacts are left out, with a line, where they drifted.

        Raises:
            VerificationError: an artifact drifted beyond its tolerance.
        """
        here, failures = [], list[str]()
        for artifact in self.spec.artifacts:
            if reason := why_not_here(artifact):
                self._say(f"{artifact.name} is verified on its first run, not here: {reason}")
                self._say(f"{artifact.name} has no threshold until there: ssod-edge calibrate DIR --id DATA")
            else:
                here.append(artifact)
        for group in [here] if together else [[artifact] for artifact in here]:
            with ExitStack() as stack:
                runners = [
                    stack.enter_context(open_runner(self.folder, artifact=a.name, allow_untrained=True, verify=False))
                    for a in group
                ]
                figures = fit(runners)
                for runner in runners:
                    done = figures.get(runner.artifact.name) or verify_runner(runner, self.folder)
                    self.spec = self.spec.with_artifact(replace(runner.artifact, verification=done.to_dict()))
                    try:
                        check_passed(runner.artifact, done)
                    except VerificationError as error:
                        if runner.artifact.precision in optional:
                            self._leave_out(runner.artifact, error)
                        else:
                            failures.append(str(error))
        if failures:
            raise VerificationError("nothing is released: " + "\n".join(failures))

    def _leave_out(self, artifact: Artifact, error: VerificationError) -> None:
        """Take an artifact and the files that it alone has out of the draft, and say so."""
        self._say(f"left out: {error}")
        self.spec = replace(self.spec, artifacts=tuple(a for a in self.spec.artifacts if a.name != artifact.name))
        kept = {name for other in self.spec.artifacts for name in other.files}
        for path in (self.folder / name for name in artifact.files.keys() - kept):
            path.unlink()
            if path.parent != self.folder and not any(path.parent.iterdir()):
                path.parent.rmdir()


@contextmanager
def release(place: Path, say: Say, replaces: Export | None = None) -> Iterator[Draft]:
    """Make an export; when the block ends without an error, it takes its place by one rename.

    Artifacts of an earlier export in that place that were not made again are kept, if they are of the same model.

    Args:
        place: the export folder.
        say: gets a line for each step.
        replaces: the export in that place that this one is a new version of: it is kept whole as the version before
            (`ssod_edge.export.versions`), and none of its artifacts in this one.

    Raises:
        UsageError: `place` is a file, or holds something else than an export, or another one than `replaces`.
        OutputError: it cannot be written. In every case an earlier export is unchanged.
    """
    with ExitStack() as publishing, staged(place) as folder:
        draft = Draft(folder, say)
        yield draft
        # Another process may be exporting to the same place: what it has published by now is kept too.
        publishing.enter_context(exclusive(real_path(place).parent))
        if replaces is None:
            draft.write(_keep_earlier(place, Export(folder, draft.spec), say))
        else:
            check_unchanged(place, replaces)
            draft.write(draft.spec)
            keep(place)


def without_names(source: Mapping[str, Any]) -> dict[str, Any]:
    """A spec's `source` to compare with another: a run that was copied or renamed holds the same weights.

    Where a checksum says which weights they are, what they are called says nothing.
    """
    names = NAMES if any(source.get(key) for key in CHECKSUMS) else ()
    return {key: value for key, value in source.items() if key not in names}


def _keep_earlier(place: Path, new: Export, say: Say) -> Spec:
    """Carry over what an earlier export has and this one did not make again; say what is lost."""
    folder, spec, found = new.folder, new.spec, Export.in_place(place)
    if found is None:
        if (place / SPEC_NAME).is_file():
            say(f"the export that was in '{place}' is damaged: nothing of it is kept")
        return spec
    earlier = found.spec
    identity = attrgetter("backbone", "classes", "preprocess", "score_name", "trained", "outputs")
    same = (
        identity(earlier) == identity(spec)
        and math.isclose(earlier.temperature, spec.temperature, rel_tol=REFERENCE_NOISE)
        and without_names(earlier.source) == without_names(spec.source)
        and _same_reference(found, new)
    )
    # Of lessons nothing is lost: neither what one made, nor what another one replaces.
    if (earlier.taught or spec.taught) and (kept := keep(place)):
        say(f"the export that was there is kept in '{kept}': ssod-edge rollback {place} --to {name_of(earlier)}")
    made = {artifact.name: artifact for artifact in spec.artifacts}
    for old in earlier.artifacts:
        if old.name in made:
            fitted = made[old.name].threshold
            if same and old.threshold and fitted and old.threshold.data != fitted.data:
                say(f"{old.name}: its threshold from {old.threshold.data} is replaced; set it again with calibrate")
        elif not same:
            say(f"removed {old.name}: it is of another model, score, calibration split or set of outputs")
        else:
            try:
                check_files(place, old)
            except ArtifactError as error:
                say(f"removed {old.name}: {error}")
                continue
            for name in old.files:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copy2(place / name, folder / name)
            spec = spec.with_artifact(old)
            say(f"kept {old.name} of the earlier export")
    order = sorted(spec.artifacts, key=lambda a: (TARGETS.index(a.engine), PRECISIONS.index(a.precision)))
    return replace(spec, artifacts=tuple(order))


def _same_reference(one: Export, other: Export) -> bool:
    """Whether two exports have the same images, and numbers for them that differ by rounding at most.

    The same network on another number of threads, or another release of PyTorch, gives other last bits.
    """
    try:
        old, new = one.reference(), other.reference()
    except ArtifactError:
        return False
    if not np.array_equal(old.pop("image"), new.pop("image")):
        return False
    return all(np.allclose(old[name], new[name], rtol=0, atol=REFERENCE_NOISE * np.ptp(new[name])) for name in new)
