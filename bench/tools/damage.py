"""How many damaged pictures are refused, how many are decoded to something else, and how many of these are marked.

python -m ssod_edge.bench.tools.damage PHOTOS.tar... --json bench/results/damage.json
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from ssod_edge.bench.tools.command import Tool, json_option, write_rows
from ssod_edge.data.pixels import load_image
from ssod_edge.data.sources import open_dataset
from ssod_edge.errors import ImageError, UsageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
#: A pixel is off from here on (of 255), and a picture wrong if more than this share of them is.
OFF, WRONG = 16, 0.1
#: Bytes at the beginning that stay: the damage is to the picture.
HEAD = 64


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """One of: up to five bits flipped, a block of zeros, the end cut off, a block left out."""
    data, n = bytearray(content), len(content)
    block = min(int(rng.choice([64, 512, 4096])), n // 2)
    start = int(rng.integers(HEAD, n - block))
    match rng.integers(4):
        case 0:
            for place in rng.integers(HEAD, n, rng.integers(1, 6)):
                data[place] ^= 1 << int(rng.integers(8))
        case 1:
            data[start : start + block] = bytes(block)
        case 2:
            del data[int(rng.integers(n // 10, n)) :]
        case _:
            del data[start : start + block]
    return bytes(data)


def outcome(content: bytes, whole: Image.Image) -> tuple[str, bool]:
    """What becomes of a damaged picture ("refused", "wrong", "off", "same"), and whether it is marked."""
    marks: list[str] = []
    try:
        image = load_image(content, damaged=marks.append)
    except ImageError:
        return "refused", False
    if image.size != whole.size:
        return "wrong", bool(marks)
    off = (np.abs(np.asarray(image, np.int16) - np.asarray(whole, np.int16)).max(2) > OFF).mean()
    return "wrong" if off > WRONG else "off" if off else "same", bool(marks)


def compare(photos: Sequence[bytes], file_format: str, count: int) -> dict[str, Any]:
    """Counts of each outcome over `count` damaged files of a format, and of those that are marked (`wrong_marked`)."""
    rng, found = np.random.default_rng(0), Counter[str]()
    for _ in range(count):
        photo = photos[int(rng.integers(len(photos)))]
        if file_format != "JPEG":
            file = io.BytesIO()
            load_image(photo).save(file, file_format)
            photo = file.getvalue()
        kind, marked = outcome(damage(photo, rng), load_image(photo))
        found.update([kind, f"{kind}_marked"] if marked else [kind])
    return {"format": file_format, "files": count, **found}


@click.command(cls=Tool)
@click.argument("data", nargs=-1, required=True)
@click.option("--count", default=1000, show_default=True, help="Damaged files of each format.")
@json_option
def main(data: tuple[str, ...], count: int, json_file: Path | None) -> None:
    """Damage photos in every format, and look at what is read of them; then at the whole photos."""
    photos = []
    for source in (open_dataset(name, labelled=False) for name in data):
        photos += [source.picture(index).content for index in range(len(source))]
    files = [photo for photo in photos if isinstance(photo, bytes) and len(photo) > 4 * HEAD]
    if count < 1 or not files:
        raise UsageError(f"it takes a data set of files and at least one of each format, got {len(files)} and {count}")
    rows = [compare(files, file_format, count) for file_format in FORMATS]
    marks: list[str] = []
    for photo in files:
        load_image(photo, damaged=marks.append)
    rows.append({"format": "whole photos", "files": len(files), "marked": len(marks)})
    for row in rows:
        click.echo(", ".join(f"{key} {value}" for key, value in row.items()))
    write_rows(json_file, "damage", rows)


if __name__ == "__main__":
    main()
