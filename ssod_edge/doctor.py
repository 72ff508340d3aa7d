"""`ssod-edge doctor`: what is installed, which engines and devices work, and what installs the rest."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

from ssod_edge import __version__
from ssod_edge.bench.environment import describe_cores, describe_cpu, describe_gpus, memory_mb
from ssod_edge.errors import EXIT_MISSING, EXIT_OK, EXTRAS
from ssod_edge.optional import DISTRIBUTIONS, is_there
from ssod_edge.probe import BUILDER, PROBES
from ssod_edge.runtime.open import PLAN_ENGINES

Status = Literal["ok", "failed", "missing"]

#: What every install has.
BASE = ("numpy", "PIL", "click", "rich")
#: Engines that this release runs exports on; one of them has to work.
RUNTIMES = (*PLAN_ENGINES, "onnxruntime", "openvino")
#: What each extra is for, as the report says it.
PURPOSES = {
    "train": "train, eval and export",
    "onnx": "export, and ONNX Runtime",
    "openvino": "OpenVINO",
    "int8": "export --int8",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
    "jetson": "running on a GPU",
    "report": "the plots of eval and bench",
    "video": "videos and cameras in predict",
    "serve": "serve",
    "ray": "verdicts on a Ray cluster",
    "baselines": "eval --baselines",
    "buckets": "images in a bucket",
    "parquet": "Parquet files",
    "heic": "HEIC pictures",
}
#: Of no use without a GPU, and each on machines of its own.
GPU_EXTRAS = ("tensorrt", "tensorrt-rtx", "jetson")
#: A driver that hangs is given up after this time.
PROBE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Package:
    """A package ssod-edge can use. `version` is None where it is not installed."""

    name: str
    version: str | None
    extra: str | None
    install: str | None


@dataclass(frozen=True)
class Engine:
    """One device of one engine, after a tiny model ran on it (or did not).

    Attributes:
        device: the engine's name for it; empty where the engine itself is missing or broken.
        detail: what the device is, or why it does not work.
        install: the command that installs the engine; None unless it is missing.
    """

    engine: str
    device: str
    status: Status
    detail: str
    install: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything `doctor` found out; cpu, gpus and memory_mb as in a bench record."""

    ssod_edge: str
    python: str
    platform: str
    cpu: dict[str, Any]
    gpus: list[str]
    memory_mb: int | None
    packages: tuple[Package, ...]
    engines: tuple[Engine, ...]

    @property
    def working_runtimes(self) -> tuple[str, ...]:
        """Engines an export can run on here."""
        found = {e.engine for e in self.engines if e.status == "ok" and e.device != BUILDER}
        return tuple(sorted(found & set(RUNTIMES)))


def examine() -> Report:
    """Look at this machine; tries every engine in a process of its own, all at the same time."""
    with ThreadPoolExecutor(len(PROBES)) as pool:
        engines = [engine for found in pool.map(try_engine, PROBES) for engine in found]
    return Report(
        ssod_edge=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        cpu=describe_cpu(),
        gpus=describe_gpus(),
        memory_mb=memory_mb(),
        packages=tuple(package(module) for module in (*BASE, *EXTRAS)),
        engines=tuple(engines),
    )


def package(module: str) -> Package:
    """Which version of a module's package is installed, and the command for it if none is."""
    name = DISTRIBUTIONS.get(module, module)
    extra = EXTRAS.get(module)
    try:
        version: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        # The module may come in a package of another name (onnxruntime-gpu, a vendor's wheel).
        version = "unknown" if is_there(module) else None
    install = None if version else install_command(module)
    return Package(name=name, version=version, extra=extra, install=install)


def install_command(module: str) -> str:
    """The pip command that brings a module."""
    if module in EXTRAS:
        return f"pip install 'ssod-edge[{EXTRAS[module]}]'"
    return f"pip install {DISTRIBUTIONS.get(module, module)}"


def try_engine(name: str) -> list[Engine]:
    """Run one engine's probe (`ssod_edge.probe`) in a new process and read its outcomes."""
    if not is_there(name):
        return [Engine(name, "", "missing", "not installed", install_command(name))]
    # The child searches for modules where this process does: not in the folder the user happens to be in.
    code = f"import sys; sys.path[:] = {sys.path!r}; from ssod_edge.probe import main; main({name!r})"
    try:
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [Engine(name, "", "failed", f"gave no answer within {PROBE_TIMEOUT_S} s")]
    try:
        outcomes = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        why = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return [Engine(name, "", "failed", f"the process ended with code {child.returncode}: {why}")]
    return [Engine(name, device, status, detail) for device, status, detail in outcomes]


def run_doctor(as_json: bool) -> int:
    """Print the report; returns the exit code: 3 if no engine can run an export here, else 0."""
    report = examine()
    if as_json:
        document = {**asdict(report), "working_runtimes": report.working_runtimes}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        show(report)
    return EXIT_OK if report.working_runtimes else EXIT_MISSING


def show(report: Report) -> None:
    """Print the report as tables."""
    from rich.table import Table
    from rich.text import Text

    from ssod_edge.terminal import Screen, printable

    console = Screen(soft_wrap=True)
    console.print(Text.assemble((f"ssod-edge {report.ssod_edge}", "bold"), printable(f", Python {report.python}")))
    console.print(report.platform)
    memory = "" if report.memory_mb is None else f", {report.memory_mb / 1000:.1f} GB memory"
    console.print(f"{report.cpu['model']}, {describe_cores(report.cpu)}{memory}")
    console.print(f"CPU features: {' '.join(report.cpu['flags']) or 'unknown'}")
    for gpu in report.gpus:
        console.print(f"GPU: {gpu}")
    console.print()

    table = Table("engine", "device", "status", "detail", title="Engines, each tried", title_justify="left")
    colour = {"ok": "green", "failed": "red", "missing": "yellow"}
    for engine in report.engines:
        status = Text(engine.status, colour[engine.status])
        table.add_row(engine.engine, engine.device, status, engine.detail)
    console.print(table, soft_wrap=False)

    table = Table("package", "version", "needed for", title="Packages", title_justify="left")
    for entry in report.packages:
        purpose = PURPOSES[entry.extra] if entry.extra else "everything"
        table.add_row(entry.name, entry.version or Text("missing", "yellow"), purpose)
    console.print(table, soft_wrap=False)

    for line in advice(report):
        console.print(line)


def advice(report: Report) -> list[str]:
    """The last lines of the report: what runs here, and the commands that bring what is missing."""
    lines = []
    if report.working_runtimes:
        lines.append(f"Exports run here with: {', '.join(report.working_runtimes)}")
    else:
        lines.append("No engine can run an export here; 'ssod-edge[onnx]' or 'ssod-edge[openvino]' brings one.")
    extras = sorted({e.extra for e in report.packages if e.extra and e.extra not in GPU_EXTRAS and e.install})
    if extras:
        lines.append(f"Install what is missing: pip install 'ssod-edge[{','.join(extras)}]'")
    if report.gpus and not set(PLAN_ENGINES) & set(report.working_runtimes):
        lines.append(
            "To run on the GPU: pip install 'ssod-edge[tensorrt]'; on a Jetson, whose JetPack has TensorRT: "
            "pip install 'ssod-edge[jetson]' in an environment made with --system-site-packages"
        )
    return lines
