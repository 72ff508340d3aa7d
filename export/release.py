"""A folder that appears whole or not at all."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from glob import escape
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.errors import ArtifactError, OutputError, SsodEdgeError, UsageError
from ssod_edge.export.engines.artifact import PRECISIONS, TARGETS
from ssod_edge.files import beside, exclusive, make_directory
from ssod_edge.runtime.open import why_not_here
from ssod_edge.runtime.verify import load_reference
from ssod_edge.spec import SPEC_NAME, Artifact, Spec, check_files, load_spec

#: Of the range of a reference's logits and scores: a tenth of what verification lets an fp32 artifact differ by.
REFERENCE_NOISE = 1e-4
#: Of Linux's fcntl.h and fs.h.
AT_FDCWD, RENAME_EXCHANGE = -100, 2
#: Keys of a spec's `source`: checksums of the weights, and the names that their run and file go by.
CHECKSUMS = ("checkpoint_sha256", "weights_sha256")
NAMES = ("run", "weights")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `folder`; it takes that name when the block ends without an error.

    An earlier export of that name is replaced. Files beside it that no spec lists are carried over. What exports into
    `folder` left that were killed, for want of memory for example, is removed.

    Raises:
        UsageError: `folder` is a file, or holds something else than an export.
        OutputError: it cannot be written; what was there before is unchanged.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"'{folder}' is a file; give a folder for the export")
    if folder.is_dir() and not (folder / SPEC_NAME).exists() and any(folder.iterdir()):
        raise UsageError(f"'{folder}' holds other files than an export; give a new or empty folder")
    make_directory(folder.parent)
    try:
        with exclusive(folder.parent):
            _remove_left_over(folder)
            temporary = beside(folder, _prefix(folder))
            temporary.mkdir()
            mark = os.open(temporary, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(mark, fcntl.LOCK_EX)  # until this process ends, however it does
    except OSError as error:
        raise OutputError(f"cannot write into '{folder.parent}': {error.strerror}. Choose another folder.") from error
    try:
        yield temporary
        _publish(temporary, folder)
    except OSError as error:
        raise OutputError(
            f"cannot write '{folder}': {error.strerror or error}. Free some space or choose another folder; "
            "an earlier export is unchanged."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(mark)


def _prefix(folder: Path) -> str:
    return f".{folder.name}.ssod-edge-"


def _remove_left_over(folder: Path) -> None:
    """Remove temporary folders that no process holds; call it inside `exclusive`, where no new one appears."""
    for left in folder.parent.glob(f"{escape(_prefix(folder))}*"):
        with suppress(OSError):  # held, not a folder, or not ours
            mark = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(mark)


def earlier_export(place: Path) -> tuple[Path, Spec] | None:
    """The export that is there; None if there is none, or it is damaged."""
    try:
        return place, load_spec(place)
    except SsodEdgeError:
        return None


def without_names(source: Mapping[str, Any]) -> dict[str, Any]:
    """A spec's `source` to compare with another: a run that was copied or renamed holds the same weights.

    Where a checksum says which weights they are, what they are called says nothing.
    """
    names = NAMES if any(source.get(key) for key in CHECKSUMS) else ()
    return {key: value for key, value in source.items() if key not in names}


def keep_earlier(place: Path, folder: Path, spec: Spec, say: Callable[[str], None]) -> Spec:
    """Carry over what an earlier export has and this one did not make again; say what is lost."""
    found = earlier_export(place)
    if found is None:
        return spec
    earlier = found[1]
    identity = attrgetter("backbone", "classes", "preprocess", "score_name", "trained")
    same = (
        identity(earlier) == identity(spec)
        and without_names(earlier.source) == without_names(spec.source)
        and _same_reference(place, earlier, folder, spec)
    )
    made = {artifact.name: artifact for artifact in spec.artifacts}
    for old in earlier.artifacts:
        if old.name in made:
            new = made[old.name].threshold
            if same and old.threshold and new and old.threshold.data != new.data:
                say(f"{old.name}: its threshold from {old.threshold.data} is replaced; set it again with calibrate")
        elif not same:
            say(f"removed {old.name}: it is of another model, score or calibration split")
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


def _same_reference(place: Path, earlier: Spec, folder: Path, spec: Spec) -> bool:
    """Whether two exports have the same images, and numbers for them that differ by rounding at most.

    The same network on another number of threads, or another release of PyTorch, gives other last bits.
    """
    try:
        old, new = load_reference(place, earlier), load_reference(folder, spec)
    except ArtifactError:
        return False
    if not np.array_equal(old.pop("image"), new.pop("image")):
        return False
    return all(np.allclose(old[name], new[name], rtol=0, atol=REFERENCE_NOISE * np.ptp(new[name])) for name in new)


def that_run_here(spec: Spec, say: Callable[[str], None]) -> list[Artifact]:
    """The artifacts without those that were built for another machine, which are named."""
    found = []
    for artifact in spec.artifacts:
        if reason := why_not_here(artifact):
            say(f"{artifact.name} is verified on its first run, not here: {reason}")
            say(f"{artifact.name} has no threshold until there: ssod-edge calibrate DIR --id DATA")
        else:
            found.append(artifact)
    return found


def _publish(temporary: Path, folder: Path) -> None:
    for path in (*temporary.rglob("*"), temporary):
        _flush(path)
    if folder.exists():
        temporary.chmod(stat.S_IMODE(folder.stat().st_mode) | stat.S_IRWXU)
    if not folder.exists():
        temporary.rename(folder)
        return
    old = temporary
    if not _exchange(temporary, folder):
        old = beside(folder, f".{folder.name}.old.")
        folder.rename(old)
        try:
            temporary.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
    for name in _unlisted(old):
        if not (folder / name).exists():
            (old / name).rename(folder / name)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that a kill leaves either there, and a reader always finds one.

    False, and nothing is done, where the C library or the file system cannot (Linux's RENAME_EXCHANGE).
    """
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def _unlisted(folder: Path) -> list[str]:
    """Names in an export folder that its spec does not account for."""
    try:
        spec: Spec | None = load_spec(folder)
    except Exception:  # a damaged spec lists nothing
        spec = None
    files = [name for artifact in spec.artifacts for name in artifact.files] + [*spec.shared_files] if spec else []
    listed = {Path(name).parts[0] for name in files}
    return [path.name for path in folder.iterdir() if path.name not in listed]


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
