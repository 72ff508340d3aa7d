"""Whole commands, timed from the shell."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from PIL import Image

from ssod_edge.bench.tools.startup import main


def test_whole_commands_are_timed(export: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    rows = tmp_path / "rows.json"
    arguments = [str(export), str(tmp_path / "red.png"), "--runs", "1"]
    result = CliRunner().invoke(main, [*arguments, "--json", str(rows)])
    assert result.exit_code == 0, result.output
    found = json.loads(rows.read_text())["rows"]
    assert [row["command"].split()[0] for row in found] == ["--help", "predict", "predict"]
    assert all(0.01 < row["median_s"] <= row["max_s"] for row in found)


def test_a_command_that_fails_is_shown_and_not_timed(export: Path) -> None:
    result = CliRunner().invoke(main, [str(export), "none.png", "--runs", "1"])
    assert result.exit_code == 2 and "ended with 1" in result.stderr and "none.png" in result.stderr
