"""What was decided on the page of `review` and is not carried out yet: piles of images, steps, and undo.

The draft is a file of lines in the collected folder (`DRAFT`): the groups, then a line for each step, written before it
counts. So a closed page or a killed server loses nothing: the next one reads the lines again.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ssod_edge.data.layout import is_shown, same_name
from ssod_edge.errors import UsageError
from ssod_edge.files import append_lines
from ssod_edge.json_reader import from_json, parse_json
from ssod_edge.runtime.field.review import (
    BY_PIXELS,
    DISCARD,
    DRAFT,
    GROUPS,
    SINGLES,
    carry_out,
    find_groups,
    name_groups,
    taken_for,
)
from ssod_edge.runtime.field.shelf import Shelf
from ssod_edge.terminal import printable

#: Bytes of a folder's name.
LONGEST = 255
_GROUP = re.compile(r"group-(\d+)")


@dataclass(frozen=True)
class Step:
    """One decision; a line of the draft.

    Attributes:
        do: "class" or "discard"; "group": put into a group, undecided; "undo": take the last step back.
        name: of the class or group; of no meaning for the others. As it is asked for, a group of None is a new one.
        files: the images.
    """

    do: Literal["class", "group", "discard", "undo"]
    name: str | None = None
    files: tuple[str, ...] = ()


class Draft:
    """The piles that the collected images lie in.

    Args:
        folder: the collected folder. Call it within `exclusive`.
        out: where classes go; those that are there are suggested as names.

    Attributes:
        lines: of the images, by name.
        changes: how often it was changed; of two pages the one that shows an earlier number is out of date.
        touched: images of the last change.

    Raises:
        UsageError: the folder holds no images, or groups as folders.
        MissingExtraError: scikit-learn is not installed.
    """

    def __init__(self, folder: Path, out: Path):
        if (folder / GROUPS).exists():
            raise UsageError(
                f"'{folder / GROUPS}' is there. End that with: ssod-edge review {folder} --folders --done; or delete it"
            )
        self.folder, self.out = folder, out
        shelf = Shelf(folder)
        self.lines = {line.file: line for line in shelf.lines}
        self._there = {*self.lines, *shelf.loose}
        self._placed: dict[str, str] = {}
        self._steps: list[Step] = []
        self.changes, self.touched = 0, tuple[str, ...]()
        self._read()
        groups, kinds = find_groups(folder, shelf, but=self._placed)
        found = name_groups(groups, first=self._next_number())
        self._place(found)
        #: A line that is written with the next step: a page on which nothing was decided leaves no draft.
        self._unwritten = [json.dumps({"groups": found})] if found else []
        self.note = BY_PIXELS if "pixels" in kinds else ""
        if not self._placed:
            raise UsageError(f"'{folder}' holds no collected images")

    def _read(self) -> None:
        """Take the lines of an earlier page; what names images that are gone counts for nothing."""
        path = self.folder / DRAFT
        for row in path.read_bytes().splitlines() if path.exists() else ():
            with suppress(UsageError):  # cut short by a kill: then the step was not taken
                values = parse_json(row)
                if "groups" in values:
                    self._place(from_json(dict[str, tuple[str, ...]], values["groups"], "groups"))
                else:
                    self._take(from_json(Step, values))
        self._steps = [step for step in self._steps if set(step.files) & self._placed.keys()]

    def _place(self, groups: dict[str, Any]) -> None:
        self._placed |= {file: name for name, files in groups.items() for file in files if file in self._there}

    def _take(self, step: Step) -> None:
        last = self._steps.pop() if step.do == "undo" and self._steps else step
        if step.do != "undo":
            self._steps.append(step)
        self.touched, self.changes = last.files, self.changes + 1

    def __contains__(self, file: object) -> bool:
        return file in self._placed

    @property
    def decided(self) -> bool:
        """Whether there is anything to keep."""
        return bool(self._steps)

    def _where(self) -> dict[str, tuple[str, str | None]]:
        """Image -> kind and name of its pile."""
        found: dict[str, tuple[str, str | None]] = {file: ("group", name) for file, name in self._placed.items()}
        for step in self._steps:
            found |= {file: (step.do, step.name) for file in step.files if file in found}
        return found

    def piles(self) -> dict[tuple[str, str | None], list[str]]:
        """(kind, name) -> images: groups by their numbers, then classes by name, then what is discarded."""
        found: dict[tuple[str, str | None], list[str]] = {}
        for file, pile in self._where().items():
            found.setdefault(pile, []).append(file)
        order = {"group": 0, "class": 1, "discard": 2}

        def key(pile: tuple[str, str | None]) -> tuple[int, float, str]:
            kind, name = pile
            number = _GROUP.fullmatch(name or "") if kind == "group" else None
            last = float("inf") if kind == "group" else 0  # of the groups, `SINGLES`
            return order[kind], int(number[1]) if number else last, name or ""

        return {pile: found[pile] for pile in sorted(found, key=key)}

    def _next_number(self) -> int:
        names = [*self._placed.values(), *(step.name or "" for step in self._steps if step.do == "group")]
        return 1 + max((int(match[1]) for match in map(_GROUP.fullmatch, names) if match), default=0)

    def step(self, asked: Step) -> None:
        """Take a step, once it is written.

        Raises:
            UsageError: it cannot be taken; nothing is changed.
            OutputError: it cannot be written; nothing is changed.
        """
        if asked.do == "undo":
            if not self._steps:
                raise UsageError("there is nothing to undo")
            self._write(Step("undo"))
            return
        if not asked.files or not set(asked.files) <= self._placed.keys():
            raise UsageError("a step needs images of this folder")
        name = None
        if asked.do == "class":
            name = class_name(asked.name or "")
        elif asked.do == "group":
            name = f"group-{self._next_number():02}" if asked.name is None else asked.name
            if asked.name is not None and ("group", name) not in self.piles():
                raise UsageError(f"there is no group '{name}'")
        self._write(Step(asked.do, name, asked.files))

    def _write(self, step: Step) -> None:
        append_lines(self.folder / DRAFT, [*self._unwritten, json.dumps(asdict(step))])
        self._unwritten = []
        self._take(step)

    def said_of(self, files: Sequence[str]) -> str:
        """What the model said of these images, in words."""
        return taken_for(files, self.lines)

    def names(self) -> tuple[list[str], list[str]]:
        """Names to suggest: those that were given here or in an earlier review, and what the model said of images."""
        given = {name for kind, name in self.piles() if kind == "class" and name}
        if self.out.is_dir():
            given |= {same_name(path.name) for path in self.out.iterdir() if path.is_dir() and is_shown(path.name)}
        said = Counter(same_name(line.class_name) for line in self.lines.values())
        return sorted(given), sorted(said.keys() - given)

    def finish(self) -> list[str]:
        """Carry it out; call it within `exclusive`. Returns the lines of the report.

        Raises:
            OSError, OutputError: a file cannot be written; the draft stays, and the next call goes on.
        """
        classes: dict[str, list[Path]] = {}
        discarded: list[Path] = []
        for (kind, name), files in self.piles().items():
            # What collecting took away meanwhile, to stay in its budget, is no longer there to be decided.
            images = [self.folder / file for file in files if (self.folder / file).exists()]
            if kind == "class" and name and images:
                classes[name] = images
            elif kind == "discard":
                discarded = images
        report = carry_out(self.folder, self.out, classes, discarded, self._placed)
        (self.folder / DRAFT).unlink(missing_ok=True)
        return report


def class_name(text: str) -> str:
    """The class that somebody typed, as the name of its folder.

    Raises:
        UsageError: it cannot be one.
    """
    name = same_name(text.strip())
    if not name:
        raise UsageError("a class needs a name")
    if "/" in name or any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        raise UsageError(f"'{printable(name)}' cannot be the name of a folder: it holds '/' or a control character")
    if name == "." or not is_shown(name):
        raise UsageError(f"'{name}' would be a hidden folder, or is a system's: its images would not be read")
    if name in (DISCARD, SINGLES) or _GROUP.fullmatch(name):
        raise UsageError(f"'{name}' is what a review calls its own folders. Choose another name")
    if len(name.encode()) > LONGEST:
        raise UsageError(f"the name is longer than {LONGEST} bytes")
    return name
