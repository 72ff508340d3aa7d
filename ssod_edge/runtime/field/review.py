"""Sorting what was collected into classes: groups of what looks alike, decisions, and folders that a person renames.

`ssod_edge.runtime.field.review_page` shows the groups on a page, and ends with the same `carry_out`.

`--folders` makes `GROUPS` in the collected folder: images that look alike lie in one folder (hard links, so that they
take no room twice), and `groups.json` says which image was put where. `--done` compares that with what is there now:

- a folder with another name is a class, new or known: its images go to CLASS/IMAGE;
- images in a folder `discard`, and those that were deleted, are deleted from the collected folder too;
- a folder that kept its name is undecided, and its images stay collected.

For each image a decision is logged before anything is removed, so a kill at any instant loses nothing, and the same
command again goes on. Descriptors of different kinds (`ssod_edge.runtime.field.collect`) are grouped apart.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ssod_edge.config import Preprocess
from ssod_edge.data.layout import is_image, is_other, is_shown, same_name
from ssod_edge.data.pixels import read_pixels
from ssod_edge.errors import EXIT_OK, ArtifactError, ImageError, OutputError, UsageError
from ssod_edge.files import (
    append_lines,
    beside,
    claim,
    exclusive,
    free_path,
    make_directory,
    sha256_file,
    write_atomic,
    write_json,
)
from ssod_edge.json_reader import parse_json, read_json
from ssod_edge.optional import load
from ssod_edge.runtime.field.decided import DECISIONS
from ssod_edge.runtime.field.descriptors import Floats, of_pixels, unit
from ssod_edge.runtime.field.shelf import Collected, Shelf, write_index
from ssod_edge.terminal import printable, tell

GROUPS, CLASSES = "groups", "classes"
#: What was decided on the page and is not carried out yet.
DRAFT = "draft.jsonl"
#: The list of what was put where, in `GROUPS`.
GROUP_LIST = "groups.json"
#: Names of folders: of images that are like no other, and of what nobody needs.
SINGLES, DISCARD = "singles", "discard"
#: Groups are joined while the mean cosine between their images is at least this.
TOGETHER = {"pixels": 0.6, "features": 0.5}
BY_PIXELS = (
    "these images are sorted by their pixels, which tell little. To sort by what the network sees: "
    "ssod-edge export RUN --features pooled, and collect them again"
)


@dataclass(frozen=True)
class Decision:
    """What a person decided of an image; a line of the log is one of these, and `collected`, the line of the index.

    Attributes:
        file: its name in the collected folder.
        decision: "class" or "discarded".
        class_name: of a class; else None.
        group: the folder that it was put into; None for an image that the person added.
        time: UTC.
    """

    file: str
    decision: str
    class_name: str | None
    group: str | None
    time: str


@contextmanager
def reviewing(folder: str) -> Iterator[Path]:
    """The collected folder, while no other process reviews it.

    Raises:
        UsageError: nothing was collected there.
        BusyError: another process is at it.
        OutputError: the folder is read-only, or a file cannot be written; an OSError of the block becomes one.
    """
    place = Path(folder)
    if not place.is_dir():
        raise UsageError(f"'{folder}' is no folder. Make one with: ssod-edge predict ... --collect DIR")
    if not os.access(place, os.W_OK):
        raise OutputError(f"cannot write into '{folder}', where decisions are kept. Review a copy of it")
    try:
        with claim(place / ".review.lock", f"'{folder}' is being reviewed"):
            yield place
    except OSError as error:
        where = error.filename or folder
        raise OutputError(
            f"cannot write '{where}': {error.strerror or error}. Nothing is lost; run it again."
        ) from error


def run_review(folder: str, done: bool, out: str | None) -> int:
    """Make the folders, or take them as decisions; returns the exit code.

    Raises:
        UsageError: nothing was collected there; groups are waiting already, or none are; a file lies in a wrong place.
        BusyError: another process reviews it.
        ArtifactError: the list of the groups is damaged.
        OutputError: a file cannot be written.
        MissingExtraError: scikit-learn is not installed.
    """
    with reviewing(folder) as place, exclusive(place):
        for remains in place.glob(f".{GROUPS}.*"):  # of a run that was killed
            shutil.rmtree(remains)
        decide(place, Path(out) if out else place / CLASSES) if done else make_groups(place)
    return EXIT_OK


def make_groups(folder: Path) -> None:
    """Sort the collected images into folders of what looks alike, the largest first."""
    target = folder / GROUPS
    if target.exists():
        raise UsageError(
            f"'{target}' is there already. Rename its folders, then: ssod-edge review {folder} --folders --done; or "
            "delete it to sort anew"
        )
    if (folder / DRAFT).exists():
        raise UsageError(
            f"'{folder / DRAFT}' holds decisions of the page. Go on with: ssod-edge review {folder}; or delete it"
        )
    shelf = Shelf(folder)
    lines = {line.file: line for line in shelf.lines}
    groups, kinds = find_groups(folder, shelf)
    if not groups:
        raise UsageError(f"'{folder}' holds no collected images")
    placed = name_groups(groups)
    made = beside(target, f".{GROUPS}.")
    for group, names in placed.items():
        for name in names:
            _link(folder / name, make_directory(made / group) / name)
    write_json(made / GROUP_LIST, {name: group for group, names in placed.items() for name in names})
    made.rename(target)
    for group, names in placed.items():
        tell(f"{group}  {len(names):4} image{'s' if len(names) > 1 else ' '}  {taken_for(names, lines)}".rstrip())
    tell(
        f"Sorted by {' and '.join(kinds)} in '{target}'. Rename folders to classes or to '{DISCARD}', move images as "
        f"you like, then: ssod-edge review {folder} --folders --done"
    )
    if "pixels" in kinds:
        tell(f"note: {BY_PIXELS}")


def find_groups(folder: Path, shelf: Shelf, but: Collection[str] = frozenset()) -> tuple[list[list[str]], list[str]]:
    """Names of the collected images (`but` these) in groups of what looks alike, and what they were sorted by.

    The largest group comes first. One image alone is a group too. Images without a line that cannot be read, or whose
    name is no Unicode, are in none.
    """
    kinds: dict[str, dict[str, Floats]] = {}
    for row, line in enumerate(shelf.lines):
        if line.file not in but:
            kinds.setdefault(line.described_by, {})[line.file] = shelf.vectors[row]
    for name in sorted(shelf.loose.keys() - set(but)):
        with suppress(ImageError, UnicodeEncodeError):
            name.encode()
            pixels = read_pixels(folder / name, Preprocess(input_size=64))
            kinds.setdefault("pixels", {})[name] = unit(of_pixels(pixels))
    groups = [group for kind, vectors in kinds.items() for group in _alike(kind, vectors)]
    groups.sort(key=lambda group: (-len(group), group[0]))
    return groups, sorted({kind.split(":")[0] for kind in kinds})


def name_groups(groups: Sequence[Sequence[str]], first: int = 1) -> dict[str, list[str]]:
    """group-01, group-02, ... -> their images, from a number on, and `SINGLES` -> those that are like no other."""
    width = max(2, len(str(len(groups))))
    several = (group for group in groups if len(group) > 1)
    placed = {f"group-{n:0{width}}": list(group) for n, group in enumerate(several, first)}
    if singles := sorted(name for group in groups if len(group) == 1 for name in group):
        placed[SINGLES] = singles
    return placed


def _alike(kind: str, vectors: dict[str, Floats]) -> list[list[str]]:
    """Groups of names whose vectors look alike; every name is in one."""
    clusters = load("sklearn.cluster", "sorting images", "teach")
    names = list(vectors)
    if len(names) == 1:
        return [names]
    # In double precision, and not by its own cosine, which refuses a vector of zeros.
    points = np.stack([vectors[name] for name in names]).astype(np.float64)
    distances = np.clip(1 - points @ points.T, 0, 2)
    np.fill_diagonal(distances, 0)
    limit = 1 - TOGETHER[kind.split(":")[0]]
    model = clusters.AgglomerativeClustering(None, metric="precomputed", linkage="average", distance_threshold=limit)
    found: npt.NDArray[Any] = model.fit_predict(distances)
    return [[name for name, own in zip(names, found, strict=True) if own == group] for group in np.unique(found)]


def taken_for(names: Sequence[str], lines: dict[str, Collected]) -> str:
    """What the model said of a group."""
    own = [lines[name] for name in names if name in lines]
    said = Counter(line.class_name for line in own).most_common(2)
    unknown = sum(not line.known for line in own)
    text = ", ".join(f"{count} {name}" for name, count in said)
    return printable(f"{unknown} unknown; likeliest: {text}") if own else ""


def _link(source: Path, target: Path) -> None:
    """One more name for a file; a copy where the file system has no links. There already with the same bytes: done."""
    try:
        os.link(source, target)
    except FileExistsError:
        if not os.path.samefile(source, target) and sha256_file(source) != sha256_file(target):
            raise
    except OSError:
        write_atomic(target, lambda temporary: shutil.copyfile(source, temporary))


def decide(folder: Path, out: Path) -> None:
    """Take the folders as they are now as decisions."""
    groups = folder / GROUPS
    placed = _read_list(folder)
    found = _found(groups, placed)
    _check(groups, found, placed)
    named = [name for name in found if name not in placed.values() and name != DISCARD]
    classes = {name: [groups / name / file for file in found[name]] for name in named}
    there = {file for files in found.values() for file in files}
    deleted = [file for file in placed if file not in there and (folder / file).exists()]
    discarded = [groups / DISCARD / file for file in sorted({*deleted, *found.get(DISCARD, [])})]
    report = carry_out(folder, out, classes, discarded, placed)
    ending = beside(groups, f".{GROUPS}.")
    groups.rename(ending)
    shutil.rmtree(ending)
    for line in report:
        tell(line)


def carry_out(
    folder: Path, out: Path, classes: dict[str, list[Path]], discarded: Sequence[Path], placed: dict[str, str]
) -> list[str]:
    """Put images into their classes, log each decision, and take the images out of the collected folder.

    Call it within `exclusive`. After a kill at any instant, the same call ends the work.

    Args:
        folder: the collected folder.
        out: gets CLASS/IMAGE.
        classes: name -> its images, in the collected folder itself or linked from there.
        discarded: images that nobody needs; these files may be gone already.
        placed: image -> its group, for the log.

    Returns:
        the lines of the report.
    """
    lines = {line.file: line for line in Shelf(folder).lines}
    logged = _logged(folder / DECISIONS)
    counts: Counter[str] = Counter()
    for name, images in classes.items():
        target = _class_folder(out, name)
        for image in images:
            _link(image, free_path(target, image))
        _log(folder, [(image.name, target.name) for image in images], placed, lines, logged)
        counts[target.name] += len(images)
        _remove(folder, images)
    _log(folder, [(image.name, None) for image in discarded], placed, lines, logged)
    _remove(folder, discarded)
    write_index(folder, Shelf(folder))
    return _report(folder, out, counts, len(discarded), {line.class_name for line in lines.values()})


def _read_list(folder: Path) -> dict[str, str]:
    """Which image was put into which folder."""
    path = folder / GROUPS / GROUP_LIST
    try:
        placed = read_json(path)
    except FileNotFoundError:
        raise UsageError(
            f"there are no groups in '{folder}'. Make them with: ssod-edge review {folder} --folders"
        ) from None
    except UsageError as error:
        raise ArtifactError(f"'{path}' is damaged ({error}). Delete '{folder / GROUPS}' and sort anew.") from error
    return {name: str(group) for name, group in placed.items()}


def _found(groups: Path, placed: dict[str, str]) -> dict[str, list[str]]:
    """Folder -> its images, as they are now.

    Raises:
        UsageError: a file is no image, or does not lie in a folder, or in one too many.
    """
    found: dict[str, list[str]] = {}
    for entry in sorted(groups.iterdir()):
        if entry.is_dir():
            inside = sorted(entry.iterdir())
            wrong = [path for path in inside if path.is_dir() or (is_shown(path.name) and is_other(path.name))]
            if not is_shown(entry.name) and inside:
                wrong = [entry]
            found[entry.name] = [path.name for path in inside if is_shown(path.name) and is_image(path.name)]
        else:
            wrong = [entry] if entry.name != GROUP_LIST and is_shown(entry.name) and is_image(entry.name) else []
        if wrong:
            raise UsageError(f"'{wrong[0]}' is not in its place: expected images in folders, one deep. Move it away")
    return found


def _check(groups: Path, found: dict[str, list[str]], placed: dict[str, str]) -> None:
    """Raises UsageError where it is not clear what was meant."""
    where: dict[str, str] = {}
    for name, files in found.items():
        for file in files:
            if file in where and file in placed:
                raise UsageError(f"'{file}' is in '{where[file]}' and in '{name}'. Leave it in one of them")
            where[file] = name
            if name in placed.values() and file not in placed:
                raise UsageError(
                    f"'{groups / name / file}' was not collected, and its folder is not named after a class. Rename "
                    "the folder"
                )


def _class_folder(out: Path, name: str) -> Path:
    """The folder of a class; one whose name looks the same is the same."""
    made = make_directory(out)
    same = [path for path in made.iterdir() if path.is_dir() and same_name(path.name) == same_name(name)]
    return same[0] if same else make_directory(made / same_name(name))


def _logged(path: Path) -> set[tuple[str, str | None]]:
    """(file, class, or None where it was discarded) of each decision so far."""
    found: set[tuple[str, str | None]] = set()
    for row in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(UsageError):  # cut short by a kill
            values = parse_json(row)
            found.add((str(values.get("file")), values.get("class_name")))
    return found


def _log(
    folder: Path,
    decided: Sequence[tuple[str, str | None]],
    placed: dict[str, str],
    lines: dict[str, Collected],
    logged: set[tuple[str, str | None]],
) -> None:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows = []
    for file, name in decided:
        if (file, name) not in logged:
            decision = Decision(file, "discarded" if name is None else "class", name, placed.get(file), now)
            line = asdict(lines[file]) if file in lines else None
            rows.append(json.dumps({**asdict(decision), "collected": line}, allow_nan=False))
    if rows:
        append_lines(folder / DECISIONS, rows)


def _remove(folder: Path, images: Sequence[Path]) -> None:
    """Take images out of the collected folder, and then out of where they lie."""
    for image in images:
        (folder / image.name).unlink(missing_ok=True)
        image.unlink(missing_ok=True)


def _report(folder: Path, out: Path, counts: Counter[str], discarded: int, known: set[str]) -> list[str]:
    report = []
    for name, count in sorted(counts.items()):
        report.append(printable(f"{name}: {count} image{'s' if count > 1 else ''}"))
        alike = [other for other in known if other != name and other.casefold() == name.casefold()]
        if alike:
            report.append(printable(f"note: '{name}' is a new class beside '{alike[0]}', which the model knows"))
    shelf = Shelf(folder)
    left = len(shelf.lines) + len(shelf.loose)
    log = f"; log in '{folder / DECISIONS}'" if counts or discarded else ""
    report.append(f"{discarded} discarded, {left} undecided{log}")
    return [*report, f"Classes are in '{out}'"] if counts else report
