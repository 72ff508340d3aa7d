"""What becomes of damaged pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ssod_edge.bench.tools.damage import FORMATS, main, outcome


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index in range(3):
        pixels = rng.integers(0, 256, (90, 120, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.jpg")
    return tmp_path / "photos"


def test_every_damaged_file_has_one_outcome(photos: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    result = CliRunner().invoke(main, [str(photos), "--count", "40", "--json", str(rows)])
    assert result.exit_code == 0, result.output
    *formats, whole = json.loads(rows.read_text())["rows"]
    assert [row["format"] for row in formats] == list(FORMATS)
    for row in formats:
        assert sum(row.get(kind, 0) for kind in ("refused", "wrong", "off", "same")) == row["files"] == 40
    pytest.importorskip("simplejpeg", reason="this machine has no wheel of it")
    assert 0 < formats[0]["wrong_marked"] <= formats[0]["wrong"]
    assert whole == {"format": "whole photos", "files": 3, "marked": 0}


def test_outcomes() -> None:
    whole = Image.new("RGB", (20, 20), (100, 100, 100))

    def png(image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    other = whole.copy()
    other.paste((117, 100, 100), (0, 0, 20, 2))
    assert outcome(png(whole), whole) == ("same", False)
    assert outcome(png(other), whole) == ("off", False)
    other.paste((117, 100, 100), (0, 0, 20, 3))
    assert outcome(png(other), whole) == ("wrong", False)
    assert outcome(png(whole.resize((10, 10))), whole) == ("wrong", False)
    assert outcome(b"nothing", whole) == ("refused", False)
