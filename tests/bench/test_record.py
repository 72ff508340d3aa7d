"""The bench's record: the environment, the JSON face, and what counts as moved."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import GOLDEN

from ssod_edge.bench import environment, memory
from ssod_edge.bench.compare import compare, noise_of
from ssod_edge.bench.record import LATER_KEYS, RECORD_KEYS, ROW_KEYS, load_record
from ssod_edge.bench.report import print_comparison
from ssod_edge.errors import EngineError, UsageError
from ssod_edge.files import write_json
from ssod_edge.terminal import Screen

GOLDEN_FILE = GOLDEN / "bench.json"


def test_environment_of_this_machine() -> None:
    found = environment.describe_environment(threads=3)
    assert found["threads"] == 3
    assert found["packages"]["numpy"] == np.__version__
    assert found["cpu"]["usable_cores"] >= 1
    assert found["memory_mb"] > 100
    assert set(found["cpu"]["flags"]) <= set(environment.FLAGS)
    json.dumps(found, allow_nan=False)


def test_environment_of_a_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp\n\nprocessor\t: 1\nModel\t\t: Board 4\n",
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1510400\n",
        "sys/class/thermal/thermal_zone0/temp": "48500\n",
        "sys/class/thermal/thermal_zone1/temp": "51250\n",
        "sys/class/thermal/thermal_zone2/temp": "invalid\n",
        "sys/class/thermal/thermal_zone3/temp": "--5\n",
        "sys/class/thermal/thermal_zone4/temp": "5\u00b2\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(environment, "PROC", tmp_path / "proc")
    monkeypatch.setattr(environment, "SYS", tmp_path / "sys")
    found = environment.describe_environment(None)
    assert found["machine"] == "NVIDIA Jetson Orin Nano"
    assert found["cpu"]["flags"] == ["asimd", "asimdhp", "asimddp"]
    assert found["cpu"]["model"] == "Board 4"
    state = {key: found["state"][key] for key in ("governor", "clock_mhz", "temperature_c")}
    assert state == {"governor": "schedutil", "clock_mhz": 1510.4, "temperature_c": 51.2}


def test_a_clock_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
    path.parent.mkdir(parents=True)
    path.write_text("15\u00b2")
    monkeypatch.setattr(environment, "PROC", tmp_path)
    monkeypatch.setattr(environment, "SYS", tmp_path)
    assert environment.describe_state()["clock_mhz"] is None


def test_environment_where_nothing_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PROC", tmp_path)
    monkeypatch.setattr(environment, "SYS", tmp_path)
    state = environment.describe_state()
    assert (state["governor"], state["clock_mhz"], state["temperature_c"]) == (None, None, None)


def test_gpus_are_listed_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.describe_gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Some GPU, 580.1, 1500 MHz, 40'\n")
    tool.chmod(0o755)
    assert environment.describe_gpus() == ["Some GPU, 580.1, 1500 MHz, 40"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert environment.describe_gpus() == []


@pytest.mark.parametrize(("load", "warned"), [(None, False), (0.9, False), (1.2, True)])
def test_a_busy_machine_is_told_of(load: float | None, warned: bool) -> None:
    found = environment.busy_warning({"state": {"load_1min": load}, "cpu": {"usable_cores": 2}})
    assert (found is not None) == warned


def test_memory_is_that_of_the_engine_in_a_process_of_its_own(export: Path) -> None:
    ballast = np.ones(40_000_000)  # 320 MB here must not count there
    megabytes = memory.measure_rss(export, "onnx-fp32", 1, 1)
    assert ballast.sum() > 0
    assert 5 < megabytes < 200


def test_memory_of_what_cannot_be_opened(export: Path) -> None:
    with pytest.raises(EngineError, match=r"memory of 'nothing'.*has no artifact 'nothing'"):
        memory.measure_rss(export, "nothing", 1, None)


@pytest.fixture
def golden() -> dict[str, Any]:
    return load_record(GOLDEN_FILE)


def test_golden_record_has_the_stable_keys(golden: dict[str, Any]) -> None:
    assert tuple(golden) == RECORD_KEYS
    assert all(tuple(row) == ROW_KEYS for row in golden["rows"])
    stable = (
        *("artifact", "sha256", "engine", "precision", "device", "batch", "latency_ms", "stages_ms", "throughput_ips"),
        *("size_mb", "rss_mb", "top1", "agreement", "auroc", "fpr_at_id_tpr95", "decision_flips", "status", "error"),
    )
    assert tuple(golden["rows"][0])[: len(stable)] == stable
    assert list(golden["rows"][0]["latency_ms"]) == ["p50", "p90", "p99", "mean", "min", "max", "n"]


def test_a_record_of_an_earlier_release_is_read(golden: dict[str, Any], tmp_path: Path) -> None:
    for row in golden["rows"]:
        for key in LATER_KEYS:
            del row[key]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(golden))
    for key in LATER_KEYS:
        assert [row[key] for row in load_record(old)["rows"]] == [None] * len(golden["rows"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.pop("rows"), "is not a bench record"),
        (lambda r: r["rows"][0].pop("status"), "lack keys"),
        (lambda r: r.update(schema_version=99), "schema version 99"),
        (lambda r: r.update(rows=3), "lack keys"),
        (lambda r: r["rows"][0].update(sha256=[]), r"rows\[0\].sha256 must be text, got \[\]\). Make it again"),
        (lambda r: r["rows"][1].update(batch="1"), r"rows\[1\].batch must be an integer"),
        (lambda r: r["rows"][0]["latency_ms"].update(p50="1"), r"rows\[0\].latency_ms.p50 must be a finite number"),
        (lambda r: r["rows"][0]["repeats_ms"].update(p50=[None]), r"rows\[0\].repeats_ms.p50\[0\] must be a finite"),
        (lambda r: r["method"].update(quick=float("nan")), "method.quick must be a finite number, got NaN"),
        (lambda r: r.update(data=[]), "data must be an object"),
        (lambda r: r.update(schema_version=True), "schema version True"),
        (lambda r: r["environment"].pop("cpu"), "damaged .KeyError: 'cpu'"),
        (lambda r: r["environment"].update(packages=[]), "environment.packages must be an object"),
        (lambda r: r["rows"][0].update(repeats_ms={}), "damaged .KeyError: 'p50'"),
        (lambda r: r["data"].update(ood=[]), "damaged .AttributeError"),
        (lambda r: r["data"].update(reference=[]), "damaged .TypeError"),
    ],
)
def test_records_that_cannot_be_used(golden: dict[str, Any], tmp_path: Path, edit: Any, message: str) -> None:
    edit(golden)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(golden))
    with pytest.raises(UsageError, match=message):
        load_record(path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[]"])
def test_files_that_are_no_records(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "old.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="bench record"):
        load_record(path)


def test_a_record_survives_the_disk(golden: dict[str, Any], tmp_path: Path) -> None:
    assert load_record(write_json(tmp_path / "new.json", golden)) == golden


def row_of(record: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in record["rows"] if row["artifact"] == name)


def figures_of(record: dict[str, Any], old: dict[str, Any]) -> set[tuple[str, str]]:
    return {(change.artifact, change.figure) for change in compare(old, record).changes}


def test_noise_is_the_larger_spread_and_at_least_two_percent() -> None:
    assert noise_of([1.0, 1.1, 1.05], [1.0, 1.3, 1.2], 1.05) == pytest.approx(0.3)
    assert noise_of([1.0, 1.4, 1.05], [1.0, 1.3, 1.2], 1.05) == pytest.approx(0.4)
    assert noise_of([10.0, 10.0], [10.1], 10.0) == pytest.approx(0.2)


def test_the_same_record_has_not_moved(golden: dict[str, Any]) -> None:
    assert compare(golden, copy.deepcopy(golden)) == compare(golden, golden)
    assert compare(golden, golden).changes == ()
    assert compare(golden, golden).notes == ()


@pytest.mark.parametrize(("factor", "moved"), [(1.05, False), (0.95, False), (1.2, True), (0.8, True)])
def test_latency_moves_beyond_the_spread_of_the_repeats(golden: dict[str, Any], factor: float, moved: bool) -> None:
    new = copy.deepcopy(golden)
    row = row_of(new, "openvino-fp32")
    row["repeats_ms"]["p90"] = [10.0, 10.5, 11.0]  # a spread of 1 on a figure of 10
    row["latency_ms"]["p90"] = 10.0 * factor
    row_of(golden, "openvino-fp32")["latency_ms"]["p90"] = 10.0
    row_of(golden, "openvino-fp32")["repeats_ms"]["p90"] = [9.9, 10.0, 10.1]
    assert figures_of(new, golden) == ({("openvino-fp32", "p90 ms")} if moved else set())


def test_accuracy_moves_with_one_image_and_memory_with_five_percent(golden: dict[str, Any]) -> None:
    new = copy.deepcopy(golden)
    row_of(new, "openvino-fp32")["top1"] += 1 / 800
    row_of(new, "openvino-fp32")["decision_flips"] += 1
    row_of(new, "openvino-fp32")["rss_mb"] *= 1.04
    assert figures_of(new, golden) == {("openvino-fp32", "top1"), ("openvino-fp32", "decision_flips")}
    row_of(new, "openvino-fp32")["rss_mb"] *= 1.04
    assert ("openvino-fp32", "rss_mb") in figures_of(new, golden)


def test_accuracy_on_other_images_is_not_compared(golden: dict[str, Any]) -> None:
    new = copy.deepcopy(golden)
    new["data"]["id"]["fingerprint"] = "other"
    row_of(new, "openvino-fp32")["top1"] = 0.1
    comparison = compare(golden, new)
    assert comparison.changes == ()
    assert any("images differ" in note for note in comparison.notes)


def test_agreement_with_another_backend_is_not_compared(golden: dict[str, Any]) -> None:
    """A record that names no reference is of a release that knew only the eager one."""
    new = copy.deepcopy(golden)
    assert golden["data"].pop("reference") == "eager"
    row_of(new, "openvino-fp32")["decision_flips"] += 1
    assert figures_of(new, golden) == {("openvino-fp32", "decision_flips")}
    new["data"]["reference"] = "onnx-fp32"
    comparison = compare(golden, new)
    assert comparison.changes == () and any("against different backends" in note for note in comparison.notes)


def test_the_cost_of_unknown_is_compared(golden: dict[str, Any]) -> None:
    new = copy.deepcopy(golden)
    golden["cost_of_unknown"]["openvino"].update(ratio=1.0, repeats=[0.99, 1.0, 1.01])
    new["cost_of_unknown"]["openvino"].update(ratio=1.015, repeats=[1.01, 1.015, 1.02])
    assert figures_of(new, golden) == set()
    new["cost_of_unknown"]["openvino"]["ratio"] = 1.03
    assert figures_of(new, golden) == {("openvino: fused / plain", "ratio")}
    new["cost_of_unknown"]["openvino"] = None
    assert figures_of(new, golden) == set()


def test_what_surrounds_the_figures_is_noted(golden: dict[str, Any]) -> None:
    new = copy.deepcopy(golden)
    new["environment"]["cpu"]["model"] = "Another CPU"
    new["environment"]["packages"].pop("openvino")
    new["export"]["run"] = "second"
    new["rows"] = [row for row in new["rows"] if row["artifact"] != "onnx-fp16"]
    row_of(new, "onnx-fp32").update(status="failed", error="why", latency_ms=None, stages_ms=None, repeats_ms=None)
    notes = "\n".join(compare(golden, new).notes)
    for part in (
        "Another CPU",
        "openvino: ",
        "second",
        "onnx-fp16 batch 1 is no longer",
        "onnx-fp32 was ok and is failed",
    ):
        assert part in notes
    assert "onnx-fp16 batch 1 is new" in "\n".join(compare(new, golden).notes)


def shown(show: Any, *values: Any) -> str:
    console = Screen(width=160, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    show(*values, console)
    return console.export_text()


def test_comparison_on_screen(golden: dict[str, Any]) -> None:
    assert "Nothing moved beyond the noise." in shown(print_comparison, compare(golden, golden))
    new = copy.deepcopy(golden)
    row_of(new, "openvino-fp32")["latency_ms"]["p50"] *= 2
    text = shown(print_comparison, compare(golden, new))
    assert "+100.0%" in text
    assert "p50 ms" in text
