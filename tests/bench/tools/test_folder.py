"""The comparison of `predict` with its two stages alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from colour import write_colours

from ssod_edge.bench.tools.folder import main


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_colours(tmp_path / "photos")


def test_both_stages_and_the_whole_are_timed(export: Path, photos: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    result = CliRunner().invoke(main, [str(export), str(photos), "--rounds", "2", "--json", str(rows)])
    assert result.exit_code == 0, result.output
    record = json.loads(rows.read_text())
    assert [row["engine"] for row in record["rows"]] == ["openvino", "onnxruntime"]
    for row in record["rows"]:
        assert row["images"] == 8  # twelve, in whole batches
        assert min(row["read_ips"], row["run_ips"], row["both_ips"]) > 0
        assert row["ratio"] > 0 and row["ratio_to_shared_cores"] > 0
    assert record["environment"]["cpu"]


def test_too_few_images_are_wrong_usage(export: Path, photos: Path) -> None:
    result = CliRunner().invoke(main, [str(export), str(photos / "red" / "0.png")])
    assert result.exit_code == 2 and "at least one round and 8 images, got 7 and 1" in result.stderr
