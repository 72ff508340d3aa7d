"""splits.json: the images that training held out, or a message."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pictures import write_folder

from ssod_edge.data.sources import open_dataset
from ssod_edge.data.splits import Splits, read_splits
from ssod_edge.errors import UsageError


@pytest.mark.parametrize(
    ("val", "message"),
    [
        ([1, 2], None),
        ([2, 1], None),
        ([1, 1, 2], "was changed after training"),
        ([True, 2], r"val\[0\] must be an integer, got true"),
        ([1.0, 2], r"val\[0\] must be an integer, got 1.0"),
        ([[1], [2]], r"val\[0\] must be an integer"),
        ([1, 2**70], r"val\[1\] must be an integer of at most 64 bits"),
        ({"1": 2}, "val must be a list"),
        (None, "val must be a list"),
        ([1, 3], "was changed after training"),
        ([1, 999], "was changed after training"),
    ],
)
def test_the_held_out_images(tmp_path: Path, val: object, message: str | None) -> None:
    source = open_dataset(str(write_folder(tmp_path / "data", per_class=4)))
    others = np.setdiff1d(np.arange(len(source)), [0, 1, 2])
    splits = Splits(others, np.array([1, 2]), np.array([0]))
    (tmp_path / "splits.json").write_text(json.dumps({"val": val, "calib": [0]}))
    if message is None:
        assert read_splits(tmp_path, source, splits.hash).hash == splits.hash
        return
    with pytest.raises(UsageError, match=f"{message}.*name the ID images with --id"):
        read_splits(tmp_path, source, splits.hash)
