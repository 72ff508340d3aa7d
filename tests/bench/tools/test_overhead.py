"""The runners against their engines' own benchmarks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from colour import edit_spec

from ssod_edge.bench.tools import overhead
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
        assert 0.2 < row["bare_ratio"] < 20 and len(row["bare_ratios"]) == 2


def test_a_benchmark_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="benchmark_app failed"):
        overhead.benchmark_app(tmp_path / "none.xml", 64, 1)


@pytest.mark.parametrize("option", [("--rounds", "0"), ("--seconds", "0"), ("--seconds", "nan")])
def test_wrong_numbers_are_wrong_usage(export: Path, option: tuple[str, str]) -> None:
    result = CliRunner().invoke(overhead.main, [str(export), *option])
    assert result.exit_code == 2 and "at least one round" in result.stderr


def test_an_export_of_plans_alone_has_nothing_to_compare(export: Path) -> None:
    edit_spec(export, lambda spec: replace(spec, artifacts=()))
    result = CliRunner().invoke(overhead.main, [str(export)])
    assert result.exit_code == 2 and "no artifact of OpenVINO or ONNX Runtime" in result.stderr
