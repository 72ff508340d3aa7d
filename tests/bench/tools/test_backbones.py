"""The survey of timm's families: one that fits, one that is refused, one that is too large, one that does not exist."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from ssod_edge.bench.tools import backbones


@pytest.mark.slow
def test_the_smallest_of_each_family_is_built_and_exported(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    families = ["mambaout", "efficientvit_msra", "vgg", "nobody"]
    result = CliRunner().invoke(backbones.main, [*families, "--json", str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["status"] for row in rows] == ["fits", "refused", "left out", "left out"]
    fits, refused, large, nobody = rows
    assert fits["backbone"] == "test_mambaout" and fits["input_size"] == 128 and "not pooled" in fits["no_patches"]
    assert set(fits["artifacts"]) == {"onnx-fp32", "onnx-fp16", "openvino-fp32", "openvino-fp16"}
    assert 0 < fits["artifacts"]["onnx-fp32"] < 1e-5 < fits["artifacts"]["onnx-fp16"] < 1e-2
    assert "more than one linear layer" in refused["reason"]
    assert large["parameters"] > 30e6 and "more than 30 million" in large["reason"]
    assert "no family 'nobody'" in nobody["reason"]
    assert "test_mambaout" in result.output and "'left out': 2" in result.output


def test_what_crashes_is_a_row(monkeypatch):
    def crash(name):
        raise AssertionError("H % block")

    monkeypatch.setattr(backbones, "_source", crash)
    (row,) = backbones.measure(["mambaout"], 30)
    assert (row["status"], row["reason"]) == ("crashed", "AssertionError: H % block")
