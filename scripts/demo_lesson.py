"""The end of `make demo`: a digit that the model was never taught is met, looked at, taught, and judged all along.

python scripts/demo_lesson.py meet FOLDER                    # writes what a camera meets: eights among known digits
python scripts/demo_lesson.py look COLLECTED                 # names groups of `review --folders`, as a person would
python scripts/demo_lesson.py photos FOLDER COLLECTED        # writes what a desk has: known digits, and those eights
python scripts/demo_lesson.py compare BEFORE TAUGHT TRAINED  # what each says of images that none of them has met
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import ssod_edge
from ssod_edge.data.demo import DemoSet, digit_instances
from ssod_edge.files import write_json

DIGIT = "8"
#: In "near" the eights stand at even places, and each of these has another handwriting.
EIGHTS = [2 * number for number in range(len(digit_instances("near", int(DIGIT))))]
#: Known digits that are trained on again at the desk.
AT_THE_DESK = range(2000)
#: What the camera meets; all others are there to judge by.
MET, MET_KNOWN = EIGHTS[: len(EIGHTS) // 2], range(80)
COLUMNS = ("before", "taught", "trained on")
JUDGED = {
    "eights": ("near", EIGHTS[len(EIGHTS) // 2 :]),
    "digits 0 to 7": ("test", range(len(MET_KNOWN), 680)),
    "nines": ("near", [place + 1 for place in EIGHTS]),
}


def meet(folder: Path) -> None:
    """Write eights and known digits as PNG files, named after what they show."""
    for split, places in (("near", MET), ("test", MET_KNOWN)):
        _write(split, places, folder, by_class=False)
    print(f"{len(MET)} eights and {len(MET_KNOWN)} known digits in '{folder}'")


def look(collected: Path) -> None:
    """Gather the eights of groups that are mostly eights in a folder of that name, and discard their other images.

    This stands for a person who looks at the pictures: what they show is read from the names of their files.
    """
    lines = (collected / "collected.jsonl").read_text(encoding="utf-8").splitlines()
    sources = {line["file"]: line["source"] for line in map(json.loads, lines)}
    groups = collected / "groups"
    counts: Counter[str] = Counter()
    for group in sorted(path for path in groups.iterdir() if path.is_dir()):
        names = [path.name for path in group.iterdir()]
        eights = [name for name in names if re.search(f"digit-{DIGIT}", sources[name])]
        if 2 * len(eights) <= len(names):
            continue  # keeps its name: undecided
        counts["groups"] += 1
        for name in names:
            target = groups / (DIGIT if name in eights else "discard")
            target.mkdir(exist_ok=True)
            (group / name).rename(target / name)
            counts[target.name] += 1
        group.rmdir()
    print(
        f"This script stands for a person who looks at the groups: it knows the digits by the names of their files. "
        f"{counts['groups']} groups show mostly eights; their {counts[DIGIT]} eights go into the folder '{DIGIT}', the "
        f"{counts['discard']} other images in them into 'discard'."
    )


def photos(folder: Path, collected: Path) -> None:
    """Write CLASS/IMAGE files of known digits that were trained on, and of the eights that were collected."""
    _write("train", AT_THE_DESK, folder, by_class=True)
    shutil.copytree(collected / "classes" / DIGIT, folder / DIGIT)
    eights = len(list((folder / DIGIT).iterdir()))
    print(f"{len(AT_THE_DESK)} known digits and {eights} eights in '{folder}'")


def _write(split: str, places: list[int] | range, folder: Path, by_class: bool) -> None:
    images = DemoSet(split)
    for place in places:
        drawing = images.drawing(place)
        target = folder / drawing.what.removeprefix("digit-") if by_class else folder
        target.mkdir(parents=True, exist_ok=True)
        drawing.image.save(target / f"{split}-{place:04}-{drawing.what}.png")


def compare(*exports: Path) -> None:
    """Print what an export, and what became of it by a lesson and by training, say of each set that is judged by.

    The figures are in `lesson.json` in the folder of the first, too.
    """
    table = Table(title="Images that were not met before", title_justify="left")
    for column in ("", *COLUMNS):
        table.add_column(column)
    said = [{name: _verdicts(folder, *where) for name, where in JUDGED.items()} for folder in exports]
    rows = {
        f"eights known as {DIGIT}": ("eights", lambda truth, name: name == DIGIT),
        "eights known as another digit": ("eights", lambda truth, name: name not in (None, DIGIT)),
        "eights unknown": ("eights", lambda truth, name: name is None),
        "digits 0 to 7, right and known": ("digits 0 to 7", lambda truth, name: name == truth),
        f"digits 0 to 7, known as {DIGIT}": ("digits 0 to 7", lambda truth, name: name == DIGIT),
        "nines, never taught: unknown": ("nines", lambda truth, name: name is None),
    }
    record: dict[str, Any] = {"images": {name: len(places) for name, (_, places) in JUDGED.items()}}
    for title, (name, right) in rows.items():
        shares = [sum(right(*verdict) for verdict in sets[name]) / len(sets[name]) for sets in said]
        record[title] = dict(zip(COLUMNS, shares, strict=True))
        table.add_row(title, *(f"{share:.1%}" for share in shares))
    write_json(exports[0] / "lesson.json", record)
    console = Console(highlight=False)
    console.print()
    console.print(table)


def _verdicts(folder: Path, split: str, places: list[int] | range) -> list[tuple[str, str | None]]:
    """What each image shows, and the class that it is known as; None: unknown."""
    images, found = DemoSet(split), []
    with ssod_edge.open(folder) as model:
        for place in places:
            drawing = images.drawing(place)
            verdict = model.predict(drawing.image)
            found.append((drawing.what.removeprefix("digit-"), verdict.class_name if verdict.known else None))
    return found


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    {"meet": meet, "look": look, "photos": photos, "compare": compare}[command](*map(Path, paths))
