"""What is damaged, killed and raced for: made once in a folder, and linked from there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from faults.fault import call

#: What `teach` is told, so that a lesson of few photos is released.
FREELY = ("--alike", "--max-drop", "20")
#: Settings of a network that trains in seconds.
SMALL = ("--backbone", "test_efficientnet", "--size", "32", "--workers", "0")


def _once(folder: Path, name: str, make: Callable[[Path], object]) -> Path:
    """`folder/templates/NAME`, which `make` fills the first time; what a kill left of an earlier time is made anew."""
    place, done = folder / "templates" / name, folder / "templates" / f"{name}.done"
    if not done.exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        make(place)
        done.touch()
    return place


def _run(*arguments: object) -> None:
    ended = call(*arguments)
    assert ended.code == 0, (arguments, ended)


def colours(folder: Path) -> Path:
    """The colour classifier's export, both engines in both precisions."""

    def make(place: Path) -> None:
        from colour import write_export

        write_export(place)

    return _once(folder, "colours", make)


def colour_photos(folder: Path) -> Path:
    """Its images, in class folders."""

    def make(place: Path) -> None:
        from colour import write_colours

        write_colours(place, 8)

    return _once(folder, "colour-photos", make)


def odd_photos(folder: Path) -> Path:
    """Images of which it knows none."""

    def make(place: Path) -> None:
        from collected import picture

        for number in range(24):
            picture(number // 3, number).save(place / f"{number:02}.png")

    return _once(folder, "odd-photos", make)


def versions(folder: Path) -> Path:
    """The colour classifier's export as `door`; beside it, in `door.versions`, two versions that differ in a hash."""

    def make(place: Path) -> None:
        from colour import colour_images, edit_spec, write_reference

        from ssod_edge.export.versions import keep

        door = shutil.copytree(colours(folder), place / "door")
        keep(door)
        (door / "reference.npz").unlink()
        write_reference(door, colour_images(41, seed=1))
        edit_spec(door, lambda spec: spec, rehash=True)
        keep(door)

    return _once(folder, "versions", make)


def bundle(folder: Path) -> Path:
    """`bundle.tar` of the colour classifier."""

    def make(place: Path) -> None:
        from ssod_edge.export.bundle import write_bundle

        write_bundle(colours(folder), place / "bundle.tar")

    return _once(folder, "bundle", make)


def watched(folder: Path) -> Path:
    """`monitor.json` of the colour classifier, which has seen images."""

    def make(place: Path) -> None:
        _run("predict", colours(folder), colour_photos(folder), "--monitor", place / "monitor.json")

    return _once(folder, "watched", make)


def collected(folder: Path) -> Path:
    """What `predict --collect` keeps, with a line each."""

    def make(place: Path) -> None:
        from collected import write_collected

        write_collected(place / "kept", {7: 5, 10: 4, 3: 2})

    return _once(folder, "collected", make)


def lesson_photos(folder: Path) -> Path:
    """`old`: photos of five classes; `new`: a few of a sixth one; `held`: of the five, to calibrate with."""

    def make(place: Path) -> None:
        from lesson import write_photos

        for name, classes, each, seed in (("old", "abcde", 30, 1), ("new", "f", 5, 1), ("held", "abcde", 8, 2)):
            write_photos(place / name, classes, each, seed=seed)

    return _once(folder, "lesson-photos", make)


def run(folder: Path) -> Path:
    """`runs/run`, the last layer of a network of random weights trained, with its features in `runs/.features`."""

    def make(place: Path) -> None:
        import torch
        from lesson import CLASSES, SIZE
        from safetensors.torch import save_file

        from ssod_edge.config import Preprocess
        from ssod_edge.training.model import build_model

        torch.manual_seed(3)
        model = build_model("test_efficientnet", CLASSES, Preprocess(input_size=SIZE))
        save_file(model.backbone.state_dict(), place / "weights.safetensors")
        _run(*train_head(folder, place / "runs"))

    return _once(folder, "run", make)


def train_head(folder: Path, runs: Path) -> tuple[object, ...]:
    """The command that trained it."""
    weights = folder / "templates" / "run" / "weights.safetensors"
    given = (lesson_photos(folder) / "old", *SMALL, "--weights", weights, "--tune", "head")
    return ("train", *given, "-o", runs, "--name", "run")


def exported(folder: Path) -> Path:
    """`runs/run` with an export of one artifact that can be taught."""

    def make(place: Path) -> None:
        shutil.copytree(run(folder) / "runs", place / "runs")
        _run("export", place / "runs" / "run", *export_options())

    return _once(folder, "exported", make)


def export_options() -> tuple[str, ...]:
    """What makes an export in seconds."""
    return ("--target", "onnx", "--fp32", "--score", "gen+mahalanobispp+residual")


def unfinished(folder: Path) -> Path:
    """`runs/run`, a run of the whole network that was interrupted after one of its two epochs."""

    def make(place: Path) -> None:
        from ssod_edge.training.loop import _Loop

        step = _Loop._train_batch

        def until_the_second(loop: _Loop, *given: object) -> object:
            if loop.progress.epoch == 1:
                raise KeyboardInterrupt
            return step(loop, *given)

        with mock.patch.object(_Loop, "_train_batch", until_the_second):
            assert call(*train_all(folder, place / "runs")).code == 130

    return _once(folder, "unfinished", make)


def train_all(folder: Path, runs: Path) -> tuple[object, ...]:
    """The command that began it."""
    given = (lesson_photos(folder) / "held", *SMALL, "--weights", "none", "--epochs", "2", "--batch-size", "8")
    return ("train", *given, "-o", runs, "--name", "run")
