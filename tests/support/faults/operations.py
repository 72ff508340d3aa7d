"""Work that writes files, and what has to be true of them after it was stopped in the middle."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from faults import templates
from faults.children import counted, done, import_all, is_short
from faults.damage import Rng, any_of, link_tree
from faults.fault import Fault, about, below
from ssod_edge.export.versions import name_of, versions_folder
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.field.monitor import read_monitor
from ssod_edge.runtime.field.shelf import INDEX, Shelf

#: Files of the user's that lie in an export folder.
MINE = {"notes.txt": "mine", "photos/deep/a.txt": "mine too"}
#: Names of what is being written; features that are kept have such a name too.
HIDDEN = re.compile(r"\.(?!features$).*")


class Operation(ABC):
    """A command, and what it works on.

    Attributes:
        name: in the summary.
        steps, lasts: that it takes when nothing stops it; known after `measure`.
    """

    name: str

    def __init__(self, folder: Path):
        self.folder = folder
        self.work = folder / "work"
        self.steps, self.lasts = 0, 0.0

    @abstractmethod
    def prepare(self) -> None:
        """Fill `work`, which is not there."""

    @abstractmethod
    def command(self) -> tuple[object, ...]:
        """What is run."""

    @abstractmethod
    def check(self) -> str:
        """Raises Fault unless what there was or what was to be is there, whole; says which."""

    def again(self) -> tuple[object, ...]:
        """What is run after it was stopped."""
        return self.command()

    def measure(self) -> None:
        """Run it once."""
        if not self.steps:
            self.fresh()
            _, self.steps, self.lasts = counted(self.command(), self.work)
            if self.check() != "new":
                raise Fault(f"{self.name} does nothing")

    def fresh(self) -> None:
        """Work that has not begun."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.prepare()

    def finish(self) -> None:
        """Run it again, as a user does who saw it stopped: it ends well, and nothing is left over."""
        for path in self.work.rglob(".*"):
            if path.is_file() and not path.is_symlink():
                os.utime(path, (0, 0))  # as if it had been left an hour ago
        done(self.again())
        if self.check() != "new":
            raise Fault(f"{self.name}: the next run changes nothing")
        self.check_nothing_left()

    def check_nothing_left(self) -> None:
        left = [str(path.relative_to(self.work)) for path in self.work.rglob("*") if HIDDEN.fullmatch(path.name)]
        if left:
            raise Fault(f"{self.name}: left over: {left}")


def whole(place: Path, old: dict[str, bytes]) -> str:
    """Raises Fault unless an export is the old one, to the byte, or another one with all of its files."""
    export = Export.at(place)
    export.check_all()
    export.reference()
    # What is hidden is a file that was being written.
    held = {name: content for name, content in below(place).items() if name not in MINE and name[0] != "."}
    files = {name: old[name] for name in old if name not in MINE}
    if held == files:
        return "old"
    if set(held) != {"ssod.json", *export.spec.files}:
        raise Fault(f"files of two exports: {sorted(held)}")
    return "new"


class OfExport(Operation):
    """Work on `door`, an export in which files of the user's lie."""

    old: dict[str, bytes]

    @property
    def door(self) -> Path:
        return self.work / "door"

    def template(self) -> Path:
        return templates.colours(self.folder)

    def prepare(self) -> None:
        link_tree(self.template(), self.door)
        self.add_mine()

    def add_mine(self) -> None:
        for name, text in MINE.items():
            path = self.door / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.old = below(self.door)

    def check(self) -> str:
        for name, text in MINE.items():
            if not (self.door / name).is_file() or (self.door / name).read_text() != text:
                raise Fault(f"{self.name}: the user's '{name}' is gone")
        return whole(self.door, self.old)


class Deploy(OfExport):
    name = "export --from"

    def command(self) -> tuple[object, ...]:
        bundle = templates.bundle(self.folder) / "bundle.tar"
        return ("export", "--from", bundle, "-o", self.door, "--target", "onnx", "--fp32")


class Calibrate(OfExport):
    name = "calibrate"

    def command(self) -> tuple[object, ...]:
        return ("calibrate", self.door, "--id", templates.colour_photos(self.folder), "--artifact", "onnx-fp32")


class Rollback(OfExport):
    name = "rollback"

    def prepare(self) -> None:
        link_tree(templates.versions(self.folder), self.work)
        self.add_mine()
        self._in_use = name_of(Export.at(self.door).spec)
        self._names = sorted(path.name for path in versions_folder(self.door).iterdir())

    def command(self) -> tuple[object, ...]:
        return ("rollback", self.door, "--to", next(name for name in self._names if name != self._in_use))

    def again(self) -> tuple[object, ...]:
        if name_of(Export.at(self.door).spec) == self._in_use:
            return self.command()
        return ("rollback", self.door, "--to", self._in_use)

    def check(self) -> str:
        for name in self._names:
            kept = Export.at(versions_folder(self.door) / name)
            kept.check_all()
            if name_of(kept.spec) != name:
                raise Fault(f"{self.name}: version {name} is {name_of(kept.spec)}")
        return super().check()

    def finish(self) -> None:
        done(self.again())
        self.check()
        done(("history", self.door, "--keep", 5))
        self.check_nothing_left()


class Collect(Operation):
    name = "predict --collect"

    def prepare(self) -> None:
        self.work.mkdir()

    def command(self) -> tuple[object, ...]:
        photos = templates.odd_photos(self.folder)
        return ("predict", templates.colours(self.folder), photos, "--engine", "onnxruntime", "--json",
                "--collect", self.work / "kept", "--collect-most", 15)  # fmt: skip

    def check(self) -> str:
        kept = self.work / "kept"
        if not kept.exists():
            return "old"
        shelf = Shelf(kept)
        named = {line.file for line in shelf.lines}
        images = {path.name for path in kept.iterdir() if path.name[0] != "." and path.name != INDEX}
        if shelf.loose or named != images:
            raise Fault(f"{self.name}: lines of {sorted(named)}, images {sorted(images)}, loose {shelf.loose}")
        for name in images:
            with Image.open(kept / name) as image:
                image.load()
        if len(images) > 16:
            raise Fault(f"{self.name}: {len(images)} images in a folder for 15")
        return "new" if images else "old"


class Monitor(Operation):
    name = "predict --monitor"

    def prepare(self) -> None:
        link_tree(templates.watched(self.folder), self.work)
        self._before = self._images()

    def _images(self) -> int:
        return read_monitor(str(self.work / "monitor.json")).images

    def command(self) -> tuple[object, ...]:
        photos = templates.colour_photos(self.folder)
        return ("predict", templates.colours(self.folder), photos, "--monitor", self.work / "monitor.json")

    def check(self) -> str:
        return "old" if self._images() == self._before else "new"


class Review(Operation):
    name = "review --folders"

    def prepare(self) -> None:
        link_tree(templates.collected(self.folder), self.work)
        self._all = _pictures(self.work)
        done(("review", self.work / "kept", "--folders"))
        for group in sorted((self.work / "kept" / "groups").glob("group-*")):
            group.rename(group.with_name({0: "mug", 1: "bowl"}.get(int(group.name[-1]) % 3, "cup")))

    def command(self) -> tuple[object, ...]:
        return ("review", self.work / "kept", "--folders", "--done")

    def check(self) -> str:
        if _pictures(self.work) < self._all:
            raise Fault(f"{self.name}: pictures are lost")
        log = self.work / "kept" / "decisions.jsonl"
        for line in log.read_text().splitlines() if log.exists() else ():
            json.loads(line)
        return "new" if log.exists() else "old"

    def finish(self) -> None:
        if (self.work / "kept" / "groups").exists():  # else it was stopped behind the last step
            super().finish()


def _pictures(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in folder.rglob("*.jpg")}


class ExportRun(OfExport):
    name = "export"

    @property
    def door(self) -> Path:
        return self.work / "runs" / "run" / "export"

    def prepare(self) -> None:
        link_tree(templates.exported(self.folder), self.work)
        self.add_mine()

    def command(self) -> tuple[object, ...]:
        return ("export", self.work / "runs" / "run", "--target", "onnx", "--fp32", "--score", "energy")


class Teach(ExportRun):
    name = "teach"

    def command(self) -> tuple[object, ...]:
        return ("teach", self.door, templates.lesson_photos(self.folder) / "new", *templates.FREELY)

    def finish(self) -> None:
        if Export.at(self.door).spec.taught:
            done(("rollback", self.door))
        done(self.command())
        self.check()
        done(("history", self.door, "--keep", 5))
        self.check_nothing_left()


class Train(Operation):
    """A run of the whole network; the weights of a run that was stopped are those of one that was not."""

    name = "train --resume"

    def prepare(self) -> None:
        self.work.mkdir()

    def command(self) -> tuple[object, ...]:
        return templates.train_all(self.folder, self.work / "runs")

    @property
    def run(self) -> Path:
        return self.work / "runs" / "run"

    def again(self) -> tuple[object, ...]:
        return ("train", "--resume", self.run) if (self.run / "config.json").exists() else self.command()

    def check(self) -> str:
        found = {}
        for name in ("best", "last"):
            path = self.run / f"{name}.safetensors"
            if path.exists():
                found[name] = weights(path)
        expected = getattr(self, "_expected", None)
        if expected is None:
            self._expected = expected = found
        return "new" if found == expected else "old"


class TrainHead(Train):
    name = "train --tune head"

    def command(self) -> tuple[object, ...]:
        return templates.train_head(self.folder, self.work / "runs")

    def prepare(self) -> None:
        templates.run(self.folder)
        self.work.mkdir()


def weights(checkpoint: Path) -> dict[str, bytes]:
    """The tensors of a checkpoint, read to the end."""
    from ssod_edge.training.checkpoint import load_checkpoint

    return {name: tensor.numpy().tobytes() for name, tensor in load_checkpoint(checkpoint)[0].items()}


QUICK: tuple[Callable[[Path], Operation], ...] = (Deploy, Calibrate, Rollback, Collect, Monitor, Review)
SLOW: tuple[Callable[[Path], Operation], ...] = (ExportRun, Teach, Train, TrainHead)


@functools.cache
def operations(folder: Path) -> list[Operation]:
    """All of them, measured once for all parts; where the campaign is short, those that take no second."""
    return [make(folder) for make in (QUICK if is_short(folder) else (*QUICK, *SLOW))]


def make_templates(folder: Path) -> None:
    """Make what they begin with, in a process of its own: this one opens no engine, and can be forked."""
    names = [templates.colours, templates.colour_photos, templates.versions, templates.bundle, templates.watched,
             templates.collected, templates.odd_photos]  # fmt: skip
    if not is_short(folder):
        names.append(templates.exported)
    done(lambda: [make(folder) for make in names])


class OperationAttempts:
    """What the parts begin with that stop an operation in the middle."""

    def __init__(self, folder: Path):
        import_all(folder)
        make_templates(folder)
        self._operations = operations(folder)

    def begin(self, rng: Rng) -> Operation:
        """One of the operations, as if nothing had been done."""
        operation: Operation = any_of(rng, self._operations)
        with about(operation.name):
            operation.measure()
            operation.fresh()
        return operation
