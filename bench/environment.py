"""What the machine was like while it was measured: without this a latency means nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import ssod_edge
from ssod_edge.machine import affine_cores, cpu_quota, memory_limit_mb, throttled_s

#: Distributions whose version can change a figure.
PACKAGES = ("numpy", "Pillow", "torch", "timm", "onnx", "onnxruntime", "openvino", "nncf", "tensorrt", "pycuda")

#: CPU flags that decide which kernels an engine picks (x86, then ARM).
FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "fphp", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)

#: Settings of the environment that change the number of threads or the kernels.
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_AFFINITY", "MKL_NUM_THREADS", "ONEDNN_MAX_CPU_ISA")

SYS = Path("/sys")
PROC = Path("/proc")


def describe_environment(threads: int | None) -> dict[str, Any]:
    """Versions, processor, settings and state of this machine, and the threads that engines were told, JSON-ready.

    What cannot be read is None.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ssod_edge": ssod_edge.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": read_text(PROC / "device-tree/model") or platform.machine(),
        "packages": installed_versions(),
        "cpu": describe_cpu(),
        "threads": threads,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "memory_mb": memory_mb(),
        "gpu": describe_gpus(),
        "state": describe_state(),
    }


def installed_versions() -> dict[str, str]:
    """Version of each of PACKAGES that is installed. Nothing is imported."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def describe_cpu() -> dict[str, Any]:
    """Model name, cores (as the system has them, and as this process may use), the quota of processor time in cores
    (None: no limit), and those of FLAGS it has.
    """
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "model": info.get("model name") or info.get("Model") or platform.processor() or None,
        "cores": os.cpu_count(),
        "usable_cores": affine_cores(),
        "quota": cpu_quota(),
        "flags": [flag for flag in FLAGS if flag in flags],
    }


def describe_cores(cpu: dict[str, Any]) -> str:
    """In words, of what `describe_cpu` gave."""
    quota = cpu.get("quota")  # not in records of before
    return f"{cpu['usable_cores']} cores" + ("" if quota is None else f" (a container's limit allows {quota:g})")


def describe_state() -> dict[str, Any]:
    """What changes from minute to minute: load, governor, clock in MHz, temperature in degrees Celsius, and how
    long in all a container's limit has held it up.
    """
    return {
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "governor": read_text(SYS / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "clock_mhz": _clock_mhz(),
        "temperature_c": _temperature(),
        "throttled_s": throttled_s(),
    }


def memory_mb() -> int | None:
    """Memory that this process may use in MB (10**6 bytes): the machine's, or the limit of its container."""
    limit = memory_limit_mb()
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**6
    except (AttributeError, OSError, ValueError):
        return limit
    return physical if limit is None else min(physical, limit)


def describe_gpus() -> list[str]:
    """One line for each NVIDIA GPU that nvidia-smi lists: name, driver, clock, temperature."""
    query = "--query-gpu=name,driver_version,clocks.sm,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def busy_warning(environment: dict[str, Any]) -> str | None:
    """A sentence when other work was running at the start, else None."""
    load, cores = environment["state"]["load_1min"], environment["cpu"]["usable_cores"]
    if load is None or cores is None or load <= 0.5 * cores:
        return None
    return f"the machine was busy when this began (load {load:.1f} on {cores} cores): do not trust these latencies"


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo, and those that stand after all processors (ARM)."""
    fields: dict[str, str] = {}
    for line in (read_text(PROC / "cpuinfo") or "").splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _clock_mhz() -> float | None:
    kilohertz = read_text(SYS / "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    text = str(int(kilohertz) / 1000) if kilohertz and kilohertz.isdecimal() else _cpuinfo().get("cpu MHz")
    try:
        return round(float(text), 1) if text else None
    except ValueError:
        return None


def _temperature() -> float | None:
    """The hottest thermal zone."""
    values = [read_text(path) for path in sorted(SYS.glob("class/thermal/thermal_zone*/temp"))]
    degrees = [int(value) / 1000 for value in values if value and value.removeprefix("-").isdecimal()]
    return round(max(degrees), 1) if degrees else None


def read_text(path: Path) -> str | None:
    """What a file of the system says; None where it is not there or empty."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \t\r\n\0") or None
    except OSError:
        return None
