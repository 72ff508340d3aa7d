"""Damaged exports, runs, bundles, records and counts: an error in the project's words, or the same results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from places import GOLDEN
from specs import with_hash

from faults import templates
from faults.children import is_short
from faults.damage import BYTES, Rng, any_of, damage_file, edit_json, link_tree, write_over
from faults.fault import Ended, Fault, about, call
from ssod_edge.bench.compare import compare
from ssod_edge.bench.record import load_record
from ssod_edge.bench.report import print_comparison
from ssod_edge.errors import UsageError
from ssod_edge.files import sha256_file
from ssod_edge.spec import SPEC_NAME
from ssod_edge.terminal import Screen

Command = tuple[object, ...]


@dataclass(frozen=True)
class Scene:
    """Something that is damaged, and what reads it.

    Attributes:
        template: makes it, in a folder.
        files: patterns of the files to damage.
        commands: of a copy of it -> what is called, in turn, until one fails.
        hashed: what is read is compared with a hash, so that results are the same or there are none.
        weight: how often it is taken.
        result: a checkpoint below the copy that is the result, in place of what is printed.
    """

    template: Callable[[Path], Path]
    files: tuple[str, ...]
    commands: Callable[[Path, Rng], list[Command]]
    hashed: bool = False
    weight: int = 10
    result: str | None = None


def scenes(folder: Path) -> dict[str, Scene]:
    """All of them, by name."""
    photos = templates.colour_photos(folder)
    lesson = folder if is_short(folder) else templates.lesson_photos(folder)  # not read in a short one

    def export(copy: Path, rng: Rng) -> list[Command]:
        named = any_of(rng, (("--engine", "onnxruntime"), ("--engine", "openvino"), ("--artifact", "onnx-fp16"), ()))
        then = (("history", copy), ("package", copy, "-o", copy / "x.tar"), ("calibrate", copy, "--id", photos),
                ("teach", copy, photos), ("report", copy, "--id", photos, "-o", copy / "r.html"))  # fmt: skip
        return [("predict", copy, photos / "red", "--json", *named), any_of(rng, then)]

    def lessons(copy: Path, rng: Rng) -> list[Command]:
        return [("teach", copy / "runs" / "run", lesson / "new", *templates.FREELY)]

    def kept(copy: Path, rng: Rng) -> list[Command]:
        into = ("predict", templates.colours(folder), photos, "--collect", copy / "kept", "--engine", "onnxruntime")
        return [("review", copy / "kept", "--folders"), into, ("review", copy / "kept", "--folders", "--done")]

    def counted(copy: Path, rng: Rng) -> list[Command]:
        file = copy / "monitor.json"
        seen = ("predict", templates.colours(folder), photos / "red", "--monitor", file, "--engine", "onnxruntime")
        return [("monitor", file), ("monitor", file, "--json"), seen, ("monitor", file)]

    def judged(copy: Path, rng: Rng) -> list[Command]:
        read = ("predict", copy / "runs" / "run", lesson / "new", "--json", "--engine", "eager")
        return [any_of(rng, (read, ("eval", copy / "runs" / "run", "--json", copy / "e.json", "--score", "energy")))]

    def deployed(copy: Path, rng: Rng) -> list[Command]:
        return [("export", "--from", copy / "bundle.tar", "-o", copy / "new", "--target", "onnx", "--fp32"),
                ("predict", copy / "new", photos / "red", "--json")]  # fmt: skip

    runs = "runs/run/"
    return {
        "export": Scene(templates.colours, ("*", "*/*"), export, hashed=True, weight=40),
        "spec": Scene(templates.colours, (SPEC_NAME,), export, weight=30),
        "versions": Scene(templates.versions, ("door/*", "door.versions/*/*"), _rollback, weight=10),
        "bundle": Scene(templates.bundle, ("*",), deployed, hashed=True),
        "monitor": Scene(templates.watched, ("*",), counted, weight=20),
        "collected": Scene(templates.collected, ("kept/*",), kept, weight=15),
        "taught": Scene(templates.exported, (runs + "export/*",), lessons, weight=1),
        "run": Scene(templates.run, (runs + "*",), judged, weight=3),
        "resumed": Scene(templates.unfinished, (runs + "*",), _resume, weight=6, result=runs + "best.safetensors"),
        "cache": Scene(templates.run, ("runs/.features/*", "runs/.features/*/*"),
                       lambda copy, rng: [_anew(folder, copy)], hashed=True, weight=4,
                       result=runs + "best.safetensors"),
    }  # fmt: skip


def _rollback(copy: Path, rng: Rng) -> list[Command]:
    names = sorted(path.name for path in (copy / "door.versions").iterdir())
    door = copy / "door"
    return [("history", door, "--json"), ("rollback", door, "--to", any_of(rng, names)),
            ("history", door, "--keep", 1), ("history", door)]  # fmt: skip


def _resume(copy: Path, rng: Rng) -> list[Command]:
    return [("train", "--resume", copy / "runs" / "run")]


def _anew(folder: Path, copy: Path) -> Command:
    shutil.rmtree(copy / "runs" / "run")
    return templates.train_head(folder, copy / "runs")


class Attempts:
    """One file of a scene is damaged, or of a record of `bench`."""

    #: Left out where a campaign is short: they train networks.
    LONG = ("taught", "run", "resumed", "cache")

    def __init__(self, folder: Path):
        short = is_short(folder)
        self._scenes = {name: s for name, s in scenes(folder).items() if not short or name not in self.LONG}
        self._names = [name for name, scene in self._scenes.items() for _ in range(scene.weight)] + ["record"] * 15
        self._folder, self._work = folder, folder / "artifacts"
        self._expected: dict[tuple[str, ...], Any] = {}

    def attempt(self, rng: Rng) -> str:
        name = any_of(rng, self._names)
        if name == "record":
            return f"record {self._record(rng)}"
        scene, kind = self._scenes[name], int(rng.integers(1 << 30))
        copy = self._copy(scene)
        # A copy of the generator: the commands of a whole scene are those of the damaged one.
        commands = scene.commands(copy, np.random.default_rng(kind))
        expected = [self._whole(scene, commands[0])] if scene.hashed else []
        if scene.hashed:
            copy = self._copy(scene)
            scene.commands(copy, np.random.default_rng(kind))
        paths = sorted({p for pattern in scene.files for p in copy.glob(pattern) if p.is_file()})
        path = any_of(rng, paths)
        how = self._rehashed(rng, copy) if name == "spec" else damage_file(rng, path, paths)
        for number, command in enumerate(commands):
            with about(name, how, *command):
                ended = call(*command)
                end = ended.end()
                if number == 0 and expected and ended.code == 0 and self._results(scene, ended) != expected[0]:
                    raise Fault(f"other results, and nothing says so\n{ended.out[:1000]}\n{ended.err[-500:]}")
            if ended.code != 0:
                break
        return f"{name} {end}"

    def _copy(self, scene: Scene) -> Path:
        shutil.rmtree(self._work, ignore_errors=True)
        return link_tree(scene.template(self._folder), self._work)

    def _whole(self, scene: Scene, command: Command) -> Any:
        """The results of a command on what is whole."""
        key = tuple(map(str, command))
        if key not in self._expected:
            ended = call(*command)
            if ended.code != 0:
                raise Fault(f"the whole one fails too: {command}: {ended}")
            self._expected[key] = self._results(scene, ended)
        return self._expected[key]

    def _results(self, scene: Scene, ended: Ended) -> Any:
        return ended.out if scene.result is None else weights(self._work / scene.result)

    def _rehashed(self, rng: Rng, copy: Path) -> str:
        """Damage that the hash in the spec, or those in it of other files, do not tell."""
        path = copy / SPEC_NAME
        values = json.loads(path.read_text())
        if rng.random() < 0.8:
            changed = edit_json(rng, {key: value for key, value in values.items() if key != "sha256"})
            try:
                write_over(path, with_hash(changed))
            except (ValueError, AttributeError):  # no object, or what has no hash
                write_over(path, json.dumps(changed).encode())
            return f"{SPEC_NAME}: {_difference(values, changed)}"
        change = any_of(rng, BYTES)
        reference = copy / "reference.npz"
        write_over(reference, change(rng, reference.read_bytes()))
        values["reference_sha256"] = sha256_file(reference)
        for artifact in values["artifacts"]:
            artifact["verification"] = None
        write_over(path, with_hash(values))
        return f"reference.npz: {change.__name__}, with its hash"

    def _record(self, rng: Rng) -> str:
        """A record for `bench --compare`."""
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        path = self._work / "bench.json"
        shutil.copy(GOLDEN / "bench.json", path)
        with about("record", damage_file(rng, path, [GOLDEN / "image.npz"])):
            end = call("bench", self._work / "nothing", "--compare", path).end()
            try:
                record = load_record(path)
            except UsageError:
                return end
            print_comparison(compare(record, load_record(GOLDEN / "bench.json")), Screen())
            print_comparison(compare(load_record(GOLDEN / "bench.json"), record), Screen())
            return "read"


def weights(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds; of two such files the header may be in another order."""
    from ssod_edge.training.checkpoint import load_checkpoint

    tensors, meta = load_checkpoint(checkpoint)
    return {**meta, **{name: tensor.numpy().tobytes() for name, tensor in tensors.items()}}


def _difference(old: Any, new: Any, place: str = "") -> str:
    """Where two documents differ first, and what stands there now."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        pairs = [(old[key], new[key], f"{place}.{key}") for key in old]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(one, other, f"{place}[{number}]") for number, (one, other) in enumerate(zip(old, new, strict=True))]
    else:
        pairs = []
    for one, other, name in pairs:
        if one != other:
            return _difference(one, other, name)
    return f"{place} = {str(new)[:200]}"
