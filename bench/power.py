"""What a board draws while it runs, by its own sensors: the INA3221 of a Jetson, through hwmon of the kernel."""

from __future__ import annotations

import statistics
import threading
from pathlib import Path
from typing import Any

from ssod_edge.bench.environment import read_text

HWMON = Path("/sys/class/hwmon")
DRIVER = "ina3221"
#: The rail that feeds the whole module, where a board has one (Orin NX, Orin Nano).
MODULE = "VDD_IN"
#: A rail that is fed by another one which is counted already (AGX Orin: VDDQ is part of the 5 V system rail).
WITHIN_ANOTHER = "VDDQ"
#: The sensor averages over some milliseconds; more often than this says nothing new.
PERIOD_S = 0.1


def rails(root: Path = HWMON) -> dict[str, tuple[Path, Path]]:
    """Rail -> its files, voltage in mV and current in mA; empty where the board reports none.

    Of a board with a rail for the whole module that one alone, otherwise all that add up to it.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for chip in sorted(root.glob("hwmon*")):
        if read_text(chip / "name") != DRIVER:
            continue
        for label in sorted(chip.glob("in*_label")):
            number, name = label.name[2 : -len("_label")], read_text(label)
            files = chip / f"in{number}_input", chip / f"curr{number}_input"
            if name and not name.startswith(WITHIN_ANOTHER) and all(file.is_file() for file in files):
                found[name] = files
    return {MODULE: found[MODULE]} if MODULE in found else found


class PowerMeter:
    """The mean power while the `with` block runs, sampled on a thread.

    Attributes:
        rails: what is added up; see `rails`.
    """

    def __init__(self, root: Path = HWMON) -> None:
        self.rails = rails(root)
        self._watts: list[float] = []
        self._stop = threading.Event()

    def __enter__(self) -> PowerMeter:
        self._stop.clear()
        self._thread = threading.Thread(target=self._sample, name="power", daemon=True)
        if self.rails:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self.rails:
            self._thread.join()

    def figures(self, ms_per_image: float) -> dict[str, Any] | None:
        """`mean_w`, `mj_per_image` (that times `ms_per_image`), `samples` and `rails`; None without a sensor."""
        if not self._watts:
            return None
        mean = statistics.fmean(self._watts)
        return {
            "mean_w": round(mean, 3),
            "mj_per_image": round(mean * ms_per_image, 3),
            "samples": len(self._watts),
            "rails": sorted(self.rails),
        }

    def _sample(self) -> None:
        while not self._stop.wait(PERIOD_S):
            values = [(read_text(voltage) or "", read_text(current) or "") for voltage, current in self.rails.values()]
            # A sensor that does not answer this time must not make the sum smaller.
            if all(mv.isdecimal() and ma.removeprefix("-").isdecimal() for mv, ma in values):
                self._watts.append(sum(int(mv) * int(ma) for mv, ma in values) / 1e6)
