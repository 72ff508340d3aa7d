"""What `make arm64` and `make container` share: a small export to try, and what ran on one machine against another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Between processors a sum is rounded in another order.
TOLERANCE = 1e-3
#: A fit stops within its tolerance, and on another processor elsewhere within it (on two of one maker too).
ALIKE = 0.9

Run = Callable[..., str]


class StepError(Exception):
    """What did not work, with the end of what it printed."""


def make_wheel(folder: Path) -> Path:
    """The wheel without compiled code."""
    environment = {**os.environ, "SSOD_EDGE_EXT": "none"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(command, env=environment, check=True)
    (wheel,) = folder.glob("ssod_edge-*-none-any.whl")
    return wheel


def make_material(
    material: Path, export: Path | None = None, photos: Path | None = None, lesson: Path | None = None
) -> None:
    """In `material` door.tar, photos-seen and lesson. Without an export a small one of made photos, and calib."""
    material.mkdir(parents=True)
    if export is None:
        from lesson import train_run, write_photos  # of tests/support

        run = train_run(material)
        here(material)("export", run, "--score", "gen+mahalanobispp+residual", "--fp32")
        export, photos = run, write_photos(material / "new", "abcdef", 3, seed=11)
        write_strange(photos / "strange")
        lesson = write_photos(material / "taught", "fb", 5, seed=12)
        write_photos(material / "calib", "abcde", 8, seed=13)
    assert photos is not None
    here(material)("package", export.absolute(), "-o", "door.tar")
    for name, folder in (("photos-seen", photos), ("lesson", lesson)):
        if folder is not None:
            shutil.copytree(folder, material / name)


def write_strange(folder: Path) -> None:
    """Large JPEG files that no class describes."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rows, columns = np.indices((900, 1200))
    pictures = {"black": rows * 0, "white": rows * 0 + 255, "stripes": ((rows + columns) % 128 < 64) * 255}
    pictures["noise"] = np.random.default_rng(0).integers(0, 256, (90, 120)).repeat(10, 0).repeat(10, 1)
    for name, picture in pictures.items():
        Image.fromarray(picture.astype(np.uint8)).convert("RGB").save(folder / f"{name}.jpg", quality=90)


def here(cwd: Path) -> Run:
    """Runs `ssod-edge` on this machine."""

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "ssod_edge", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return checked(subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False))

    return run


def checked(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode != 0:
        words = (done.stdout + done.stderr).strip()
        raise StepError(f"exit code {done.returncode}: ...\n{words[-1500:]}")
    return done.stdout


def verdicts(run: Run, export: str, photos: str, engine: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run("predict", export, photos, "--json", "--engine", engine).splitlines()]


def released(folder: Path) -> str:
    """What an export folder holds."""
    artifacts = json.loads((folder / "ssod.json").read_text())["artifacts"]
    return f"{', '.join(artifact['name'] for artifact in artifacts)}, each verified on the reference images"


def compare(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> str:
    """Raises StepError where an image has another verdict, or a score further away than TOLERANCE."""
    if not one or len(one) != len(other):
        raise StepError(f"{len(one)} images here and {len(other)} there")
    for a, b in zip(one, other, strict=True):
        for key in ("image", "class_name", "known", "error"):
            if a[key] != b[key]:
                raise StepError(f"{a['image']}: {key} is {a[key]!r} here and {b[key]!r} there")
    pairs = [(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in ("ood_score", "confidence")]
    apart = [abs(x - y) / max(1, abs(x)) for x, y in pairs]
    if not all(difference <= TOLERANCE for difference in apart):  # NaN too
        raise StepError(f"scores are {max(apart):.1g} apart, at most {TOLERANCE:g} is right")
    known = sum(bool(verdict["known"]) for verdict in one)
    return f"{len(one)} images, {known} of them known: each verdict as on this machine, scores within {max(apart):.0e}"


def agreement(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> str:
    """Of two models that were fitted alike. Raises StepError where fewer than ALIKE of the verdicts are the same."""
    said = [[verdict["known"] and verdict["class_name"] for verdict in verdicts] for verdicts in (one, other)]
    same = sum(a == b for a, b in zip(*said, strict=True))
    if same < ALIKE * len(one):
        raise StepError(f"taught on this machine, {same} of {len(one)} verdicts are the same")
    return f"taught on this machine instead, {same} of {len(one)} verdicts are the same"


class Steps:
    """What ran and what did not."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failed = 0

    def __call__(self, name: str, work: Callable[[], str]) -> None:
        print(f"... {name}", flush=True)
        try:
            line = f"ran     {name}: {work()}"
        except StepError as error:
            self.failed += 1
            line = f"FAILED  {name}: {error}"
        print(line, flush=True)
        self.lines.append(line.splitlines()[0])
