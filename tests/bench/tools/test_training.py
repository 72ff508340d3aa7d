"""The cost of the OOD loss in training: measured on real steps, recorded with what ran."""

from __future__ import annotations

import json

from click.testing import CliRunner

from ssod_edge.bench.tools.training import main
from ssod_edge.ops import kernel_in_use


def test_both_kinds_of_step_are_timed_and_recorded(tmp_path):
    args = ["--backbone", "test_efficientnet", "--size", "64", "--batch", "8", "--rounds", "4"]
    result = CliRunner().invoke(main, [*args, "--json", str(tmp_path / "rows.json")], catch_exceptions=False)
    assert result.exit_code == 0
    record = json.loads((tmp_path / "rows.json").read_text())
    (row,) = record["rows"]
    assert row["backbone"] == "test_efficientnet" and row["rounds"] == 4 and row["cross_entropy_ms"] > 0
    assert ("compiled" in row) == (kernel_in_use("cpu") == "compiled")
    for name in {"reference", "compiled"} & set(row):
        assert row[name]["ms"] > 0 and row[name]["ratio_range"][0] <= row[name]["ratio"] <= row[name]["ratio_range"][1]
    assert record["environment"]["packages"]["torch"]


def test_a_backbone_that_does_not_fit_ends_with_its_exit_code():
    result = CliRunner().invoke(main, ["--backbone", "test_vit", "--rounds", "1"])
    assert result.exit_code == 2 and "has none: its features have shape" in result.stderr
