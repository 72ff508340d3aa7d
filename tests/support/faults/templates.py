"""What is damaged, killed and raced for: made once in a folder, and copied from there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path


def _once(folder: Path, name: str, make: Callable[[Path], object]) -> Path:
    """`folder/templates/NAME`, which `make` fills the first time; a kill leaves nothing half done."""
    place = folder / "templates" / name
    if not place.exists():
        begun = place.with_name(f".{name}")
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir(parents=True)
        make(begun)
        begun.rename(place)
    return place


def colours(folder: Path) -> Path:
    """The colour classifier's export, both engines in both precisions."""
    from colour import write_export

    return _once(folder, "colours", write_export)
