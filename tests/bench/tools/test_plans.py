"""One command builds the plans of every backbone."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from ssod_edge.bench.tools import plans


@pytest.mark.slow
def test_a_plan_in_every_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx, which the extra 'dev' brings")
    pytest.importorskip("nncf", reason="needs the extra int8")
    monkeypatch.setattr(plans, "SYNTHETIC_IMAGES", 2)
    done = CliRunner().invoke(plans.main, ["lcnet_035", "--size", "32"])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [["lcnet_035", name] for name in ("fp32", "fp16", "int8")]
    assert len({row[-1] for row in rows}) == 3, "each has a key of its own"


@pytest.mark.slow
def test_without_nncf_int8_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx, which the extra 'dev' brings")
    monkeypatch.setattr(plans, "find_spec", lambda name: None)
    done = CliRunner().invoke(plans.main, ["lcnet_035", "--size", "32"])
    assert done.exit_code == 0, done.output
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["fp32", "fp16"]
    assert "int8 is left out" in done.stderr and "pip install 'ssod-edge[int8]'" in done.stderr
