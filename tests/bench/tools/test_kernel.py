"""The comparison of sampling steps: every contestant does the same work, and what is reported is what was timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ssod_edge import ops
from ssod_edge.bench.tools import kernel as bench


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_steps_agree(dtype: str) -> None:
    steps = bench.contestants("cifar", 3, dtype, torch.device("cpu"))
    assert ("kernel" in steps) == (ops.kernel_in_use("cpu") == "compiled")
    confidence, label, s = steps["eager"]()
    tolerance = 1e-5 if dtype == "fp32" else 2e-2  # eager rounds its logits to bf16
    for name in {"kernel", "torch.compile"} & set(steps):
        other = steps[name]()
        torch.testing.assert_close(other[0], confidence, rtol=0, atol=tolerance)
        torch.testing.assert_close(other[2].float(), s.float(), rtol=tolerance, atol=5 * tolerance)
        assert (other[1] == label).float().mean() > 0.97
    if "linear_cross_entropy" in steps:
        torch.testing.assert_close(torch.exp(-steps["linear_cross_entropy"]().float()), confidence, rtol=0, atol=0.05)
    assert steps["gemm"]().shape == (48, 11)


def test_the_rows_are_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f: f)
    arguments = ["--shape", "cifar", "--dtype", "fp32", "--images", "2", "--rounds", "3", "--device", "cpu"]
    result = CliRunner().invoke(bench.main, [*arguments, "--json", str(tmp_path / "rows.json")])
    assert result.exit_code == 0, result.output
    rows = {row["step"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert {"gemm", "eager", "torch.compile"} <= set(rows) and rows["gemm"]["ratio_to_gemm"] == 1
    for row in rows.values():
        assert (row["P"], row["D"], row["M"]) == (32, 512, 10)
        assert 0 < row["quartiles_ms"][0] <= row["median_ms"] <= row["quartiles_ms"][1]
    assert CliRunner().invoke(bench.main, ["--rounds", "0"]).exit_code == 2
