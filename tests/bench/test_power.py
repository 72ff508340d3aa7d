"""The power of a board: which sensors count, what they add up to, and that there may be none."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ssod_edge.bench.power import PERIOD_S, PowerMeter, rails


def sensor(root: Path, number: int, driver: str, *channels: tuple[str, int, int]) -> Path:
    """A chip of the kernel's hwmon; channels are (label, mV, mA)."""
    chip = root / f"hwmon{number}"
    chip.mkdir(parents=True)
    (chip / "name").write_text(f"{driver}\n")
    for index, (label, millivolts, milliamperes) in enumerate(channels, 1):
        (chip / f"in{index}_label").write_text(f"{label}\n")
        (chip / f"in{index}_input").write_text(f"{millivolts}\n")
        (chip / f"curr{index}_input").write_text(f"{milliamperes}\n")
    return chip


def test_the_module_s_own_rail_is_all_that_counts(tmp_path: Path) -> None:
    sensor(tmp_path, 0, "nct1008", ("VDD_IN", 1, 1))
    sensor(tmp_path, 1, "ina3221", ("VDD_IN", 19_000, 500), ("VDD_CPU_GPU_CV", 19_000, 200))
    with PowerMeter(tmp_path) as meter:
        time.sleep(3 * PERIOD_S)
    figures = meter.figures(ms_per_image=4.0)
    assert figures is not None and figures["rails"] == ["VDD_IN"] and figures["samples"] >= 1
    assert figures["mean_w"] == pytest.approx(9.5) and figures["mj_per_image"] == pytest.approx(38.0)


def test_without_such_a_rail_the_others_add_up(tmp_path: Path) -> None:
    sensor(
        tmp_path, 3, "ina3221", ("VDD_GPU_SOC", 20_000, 300), ("VDD_CPU_CV", 20_000, 100), ("VIN_SYS_5V0", 5_000, 800)
    )
    sensor(tmp_path, 4, "ina3221", ("VDDQ_VDD2_1V8AO", 5_000, 700))
    assert sorted(rails(tmp_path)) == ["VDD_CPU_CV", "VDD_GPU_SOC", "VIN_SYS_5V0"]
    with PowerMeter(tmp_path) as meter:
        time.sleep(3 * PERIOD_S)
    figures = meter.figures(1.0)
    assert figures is not None and figures["mean_w"] == pytest.approx(12.0)


@pytest.mark.parametrize("answer", ["", "1\u00b2", "--5"])
def test_a_sensor_that_does_not_answer_gives_no_smaller_sum(tmp_path: Path, answer: str) -> None:
    chip = sensor(tmp_path, 0, "ina3221", ("VDD_GPU_SOC", 20_000, 300), ("VDD_CPU_CV", 20_000, 100))
    (chip / "curr2_input").write_text(answer)
    with PowerMeter(tmp_path) as meter:
        time.sleep(3 * PERIOD_S)
        assert meter._thread.is_alive()
    assert meter.figures(1.0) is None


def test_most_machines_report_nothing(tmp_path: Path) -> None:
    with PowerMeter(tmp_path / "none") as meter:
        pass
    assert meter.rails == {} and meter.figures(1.0) is None
