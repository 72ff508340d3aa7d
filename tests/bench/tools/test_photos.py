"""The comparison of reading photos in full with reading them reduced."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ssod_edge.bench.tools import photos
from ssod_edge.bench.tools.photos import main


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for index in range(3):
        pixels = rng.integers(0, 256, (80, 100, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / "a" / f"{index}.jpg")
    return tmp_path / "photos"


def test_agreement_and_times_of_both_ways(
    export: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "LARGE", (400, 300))
    rows = tmp_path / "rows.json"
    options = ["--times", "3,9", "--photos", "2", "--rounds", "2", "--json", str(rows)]
    result = CliRunner().invoke(main, [str(export), str(data), *options])
    assert result.exit_code == 0, result.output
    record = json.loads(rows.read_text())
    native, small, large, *times = record["rows"]
    assert native["shorter_side"] == "as it is" and native["reduced"] == 1.0, "80 rows are 5 times the input"
    assert small["reduced"] == 0.0 == small["score_difference"] and small["class_agreement"] == 1.0
    assert large["reduced"] == 1.0 and 0 < large["pixel_difference"] < 20 and large["photos"] == 2
    assert [row["size"] for row in times] == ["100 x 80", "400 x 300", "400 x 300"]
    assert times[1]["bytes"] < times[2]["bytes"]
    for row in times:
        assert min(value for name, value in row.items() if name.endswith("_ms")) > 0


def test_no_photos_are_wrong_usage(export: Path, data: Path) -> None:
    result = CliRunner().invoke(main, [str(export), str(data), "--photos", "0"])
    assert result.exit_code == 2 and "at least one photo and one round, got 0 and 15" in result.stderr
