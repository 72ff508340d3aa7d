"""The price of "unknown" beside the plain classifier, of each artifact."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from colour import edit_spec

from ssod_edge.bench.tools import price


def test_every_artifact_is_priced_beside_its_plain_classifier(export: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    options = ["--seconds", "0.01", "--rounds", "3", "--json", str(rows)]
    result = CliRunner().invoke(price.main, [str(export), *options])
    assert result.exit_code == 0, result.output
    record = json.loads(rows.read_text())
    names = [row["artifact"] for row in record["rows"]]
    assert names == ["onnx-fp32", "openvino-fp32", "onnx-fp16", "openvino-fp16"]
    for row in record["rows"]:
        for turns in (row["price"], row["runner"]):
            assert len(turns["ratios"]) == 3 and min(turns["ratios"]) <= turns["ratio"] <= max(turns["ratios"])
            assert turns["interval"][0] <= turns["ratio"] <= turns["interval"][1] and min(turns["ms"]) > 0


def test_another_exports_plain_classifier_tells_what_a_branch_costs(export: Path, tmp_path: Path, monkeypatch) -> None:
    other, used = tmp_path / "other", []
    shutil.copytree(export, other)
    cut = price.export_plain
    monkeypatch.setattr(price, "export_plain", lambda of, *rest: (used.append(of.folder), cut(of, *rest))[1])
    monkeypatch.setattr(price, "pairs_of", lambda spec: [price.Pair("onnxruntime", "fp32")])
    options = ["--seconds", "0.01", "--rounds", "1", "--plain", str(other)]
    result = CliRunner().invoke(price.main, [str(export), *options])
    assert result.exit_code == 0 and used == [other], result.output


def test_the_interval_holds_the_median_of_other_rounds() -> None:
    rng = np.random.default_rng(0)
    bounds = [price.interval(rng.normal(1.02, 0.01, 21).tolist()) for _ in range(60)]
    held = sum(low <= 1.02 <= high for _, low, high in bounds)
    assert 50 <= held < 60
    assert all(low <= middle <= high for middle, low, high in bounds)


@pytest.mark.parametrize("option", [("--rounds", "0"), ("--seconds", "0")])
def test_wrong_numbers_are_wrong_usage(export: Path, option: tuple[str, str]) -> None:
    result = CliRunner().invoke(price.main, [str(export), *option])
    assert result.exit_code == 2 and "at least one round" in result.stderr


def test_an_export_of_plans_alone_has_no_price(export: Path) -> None:
    edit_spec(export, lambda spec: replace(spec, artifacts=()))
    result = CliRunner().invoke(price.main, [str(export)])
    assert result.exit_code == 2 and "no export has an artifact" in result.stderr
