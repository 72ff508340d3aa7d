"""`eval --mistakes`: copies of the images that got the wrong class, named so that a person sees what was what."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ssod_edge.config import IMAGE_SUFFIXES
from ssod_edge.csv_table import path_cell, write_csv
from ssod_edge.data.pixels import load_image
from ssod_edge.data.sources import ImageSource
from ssod_edge.data.splits import Indices
from ssod_edge.errors import OutputError, UsageError
from ssod_edge.files import beside, make_directory, real_path
from ssod_edge.runtime.written import file_part

#: The table beside the copies, and its columns.
TABLE = "mistakes.csv"
COLUMNS = ("file", "image", "label", "class_name", "confidence", "label_confidence", "ood_score", "p_known", "known")


def check_mistakes(folder: str | Path) -> Path:
    """Find out before the work whether `save_mistakes` can make a folder.

    Raises:
        UsageError: there is a file, or something in it.
        OutputError: it cannot be made.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"'{path}' is not empty, and mistakes of two evaluations must not mix. Give a new folder")
    parent = make_directory(real_path(path).parent)
    if not os.access(parent, os.W_OK):
        raise OutputError(f"cannot make '{path}': '{parent}' is read-only. Choose another place")
    return path


def save_mistakes(
    folder: str | Path, mistakes: Sequence[Mapping[str, Any]], images: tuple[ImageSource, Indices]
) -> Path:
    """Copy the images of mistakes into a new folder, with a table of what was said of each; it appears whole.

    `0003_shirt_as_dress_97_IMG12.jpg` is the third of the list: a shirt that was taken for a dress, with a confidence
    of 97%. An image that is no file comes as PNG.

    Args:
        folder: not there yet, or empty.
        mistakes: of `ssod_edge.evaluation.known.judge_known`, the most confident first.
        images: those of the evaluation, as they are read.

    Raises:
        UsageError, OutputError: as `check_mistakes`; the disk is full.
        ImageError: an image cannot be read.
    """
    path = check_mistakes(folder)
    source, indices = images
    width = max(4, len(str(len(mistakes))))
    making = beside(real_path(path), f".{path.name}.")
    try:
        making.mkdir()
        rows = []
        for number, mistake in enumerate(mistakes, 1):
            content, suffix = _file(source, int(indices[mistake["index"]]))
            name = f"{number:0{width}}_{_described(mistake)}{suffix}"
            if isinstance(content, bytes):
                (making / name).write_bytes(content)
            else:
                content.save(making / name)
            row = {**mistake, "file": name, "image": path_cell(mistake["image"])}
            rows.append([row[column] for column in COLUMNS])
        write_csv(making / TABLE, COLUMNS, rows)
        if path.is_dir():
            path.rmdir()  # it is empty
        making.rename(real_path(path))
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror or error}. Choose another place") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return path


def _described(mistake: Mapping[str, Any]) -> str:
    label, answer = file_part(mistake["label"], 50), file_part(mistake["class_name"], 50)
    stem = file_part(Path(mistake["image"]).stem, 80)
    return f"{label}_as_{answer}_{100 * mistake['confidence']:.0f}_{stem}"


def _file(source: ImageSource, index: int) -> tuple[bytes | Image.Image, str]:
    """The image as it is stored, and its suffix; a PIL image where there is no file."""
    picture, suffix = source.picture(index), Path(source.source(index)).suffix.lower()
    if isinstance(picture.content, bytes) and suffix in IMAGE_SUFFIXES:
        return picture.content, suffix
    return load_image(picture), ".png"
