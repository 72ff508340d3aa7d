"""The runners against their engines' own benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ssod_edge.bench import overhead
from ssod_edge.errors import EngineError


def test_each_engine_is_timed_beside_its_own_benchmark(export: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    options = ["--artifact", "openvino-fp32", "--artifact", "onnx-fp32", "--seconds", "0.3", "--rounds", "2"]
    result = CliRunner().invoke(overhead.main, [str(export), *options, "--json", str(rows)])
    assert result.exit_code == 0, result.output
    record = json.loads(rows.read_text())
    assert [row["engine"] for row in record["rows"]] == ["openvino", "onnxruntime"]
    for row in record["rows"]:
        assert row["own_ms"] > 0 and row["runner_ms"] > 0 and len(row["ratios"]) == 2
        assert 0.2 < row["ratio"] < 20  # two shared cores, a tiny network


def test_a_benchmark_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="benchmark_app failed"):
        overhead.benchmark_app(tmp_path / "none.xml", 64, 1)


def test_wrong_numbers_are_wrong_usage(export: Path) -> None:
    result = CliRunner().invoke(overhead.main, [str(export), "--rounds", "0"])
    assert result.exit_code == 2 and "at least one round" in result.stderr
