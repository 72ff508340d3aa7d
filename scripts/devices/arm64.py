"""What goes onto a device, on a 64-bit Arm Debian that qemu emulates: its tests, and verdicts equal to this machine's.

make arm64                                            # a small export of random weights, made first
make arm64 EXPORT=DIR PHOTOS=DIR [LESSON=DIR]         # your own; LESSON has CLASS/IMAGE folders

Needs Linux, root, debootstrap and qemu-user-static (Debian, Ubuntu). The Debian and the wheels are kept in
~/.cache/ssod-edge (`debian_root.py`), what is made in build/arm64. SUITE names another release than bookworm,
BOARD=pi4 another processor than pi5's. Times in an emulator say nothing about a board, so none are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from debian_root import MissingError, Mount, alone, arm_programs, check_machine, download, enter, is_arm, make_root
from trial import (
    ROOT,
    StepError,
    Steps,
    agreement,
    checked,
    compare,
    here,
    make_material,
    make_wheel,
    released,
    verdicts,
)

BUILD = ROOT / "build" / "arm64"
PACKAGES = ("python3", "python3-venv", "libgomp1")
EXTRAS = "openvino,teach,video"
PHOTOS = "../material/photos-seen"
ENGINES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Processor:
    """A board's, as qemu and Linux know it."""

    name: str
    midr: int
    features: str


BOARDS = {
    "pi4": Processor("cortex-a72", 0x410FD083, "fp asimd evtstrm crc32 cpuid"),
    "pi5": Processor(
        "cortex-a76",
        0x414FD0B1,
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    ),
}
#: Seconds after which a command is taken to hang.
LONGEST = 3600
#: Tests of what goes onto a device; they need no torch. Those of several processes are left out: they hang in qemu 7.2.
TESTS = (
    "runtime/test_open.py",
    "runtime/test_predict.py",
    "runtime/test_verify.py",
    "runtime/test_calibrate.py",
    "runtime/test_written.py",
    "runtime/test_golden.py",
    "runtime/engines/test_tensorrt.py",
    "data/test_jpeg.py",
    "data/test_pixels.py",
    "data/test_png.py",
    "detect/test_confidence.py",
    "detect/test_scores.py",
    "export/test_bundle.py",
    "export/test_deploy.py",
    "test_face.py",
    "test_spec.py",
)
#: A program that begins with its input closed finds it open there: the emulator's own file takes the place.
NOT_THERE = ("runtime/test_predict.py::test_streams_that_are_closed", "test_face.py::test_the_import_is_quick")
NOT_RUN = "not run: a real board, its speed, cameras, GPUs and accelerators; TensorRT (docs/jetson.md); int8"


def board_files(folder: Path, processor: Processor, cores: int) -> list[Mount]:
    """What of /proc and /sys qemu shows as the machine outside has it, as it is on a board.

    ONNX Runtime looks for Arm processors in /proc/cpuinfo, and crashes where there are none. OpenVINO reads MIDR_EL1 to
    choose its kernels, and crashes where the masks of the topology are missing.
    """
    shutil.rmtree(folder, ignore_errors=True)
    system = folder / "sys" / "devices" / "system" / "cpu"
    every, all_cores = f"0-{cores - 1}" if cores > 1 else "0", f"{(1 << cores) - 1:x}"
    files = {"possible": every, "present": every, "online": every, "kernel_max": "255"}
    for core in range(cores):
        inside = {"core_id": f"{core}", "physical_package_id": "0"}
        inside |= dict.fromkeys(("core_siblings", "package_cpus"), all_cores)
        inside |= dict.fromkeys(("core_siblings_list", "package_cpus_list"), every)
        inside |= dict.fromkeys(("thread_siblings", "core_cpus"), f"{1 << core:x}")
        inside |= dict.fromkeys(("thread_siblings_list", "core_cpus_list"), f"{core}")
        files |= {f"cpu{core}/topology/{name}": text for name, text in inside.items()}
        files[f"cpu{core}/regs/identification/midr_el1"] = f"{processor.midr:#018x}"
    for name, text in files.items():
        (system / name).parent.mkdir(parents=True, exist_ok=True)
        (system / name).write_text(text + "\n")
    lines = (
        f"processor\t: {core}\nBogoMIPS\t: 108.00\nFeatures\t: {processor.features}\n"
        f"CPU implementer\t: {processor.midr >> 24:#04x}\nCPU architecture: 8\n"
        f"CPU variant\t: {processor.midr >> 20 & 0xF:#x}\nCPU part\t: {processor.midr >> 4 & 0xFFF:#05x}\n"
        f"CPU revision\t: {processor.midr & 0xF}\n\n"
        for core in range(cores)
    )
    (folder / "cpuinfo").write_text("".join(lines))
    return [Mount(folder / "cpuinfo", "/proc/cpuinfo"), Mount(folder / "sys", "/sys")]


class Board:
    """The emulated Debian: BUILD is in /trial, the repository in /src, a virtual environment in /ssod."""

    def __init__(self, suite: str, processor: Processor) -> None:
        self.processor = processor
        self.root = make_root("arm64", suite, PACKAGES)
        self.mounts = [
            Mount(BUILD / "material", "/trial/material"),
            Mount(BUILD / "board", "/trial/board", writable=True),
        ]
        self.mounts += [Mount(BUILD / "dist", "/dist"), Mount(ROOT, "/src")]
        cores = os.cpu_count() or 1
        self.mounts += [Mount(Path("/sys"), "/sys")] if is_arm() else board_files(BUILD / "files", processor, cores)

    def call(self, *command: object, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {
            "HOME": "/tmp",
            "QEMU_CPU": self.processor.name,
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        options = {"capture_output": True, "cwd": "/trial/board", **options}
        mounts = [*self.mounts, *options.pop("more", ())]
        try:
            return enter(self.root, [str(word) for word in command], mounts, environment, timeout=LONGEST, **options)
        except subprocess.TimeoutExpired:
            raise StepError(f"no end within {LONGEST} s") from None

    def run(self, *arguments: object) -> str:
        return checked(self.call("/ssod/bin/ssod-edge", *arguments))

    def install(self, wheel: Path) -> str:
        """A virtual environment with the wheels, kept until others are wanted; ours is put in anew each time."""
        wanted = (f"{wheel}[{EXTRAS}]", "pytest", "hypothesis")
        wheels = download(self.root, "arm64", wanted)
        stamp, names = self.root / "ssod" / "wheels", sorted(path.name for path in wheels.glob("*.whl"))
        pip = ["/ssod/bin/python", "-m", "pip", "install", "--quiet", "--no-index", "--find-links", "/wheels"]
        pip += ["--disable-pip-version-check", "--no-compile"]
        more = [Mount(wheels, "/wheels")]
        if not stamp.is_file() or stamp.read_text() != "\n".join(names):
            shutil.rmtree(self.root / "ssod", ignore_errors=True)
            checked(self.call("python3", "-m", "venv", "/ssod"))
            checked(self.call(*pip, f"/dist/{wheel.name}[{EXTRAS}]", *wanted[1:], more=more))
            stamp.write_text("\n".join(names))
        checked(self.call(*pip, "--no-deps", "--force-reinstall", f"/dist/{wheel.name}", more=more))
        return self.run("--version").strip()

    def versions(self) -> str:
        code = (
            "import platform; from importlib.metadata import version as v; print(f'{platform.machine()}, "
            "Python {platform.python_version()},', *(f'{n} {v(n)}' for n in ('numpy', 'pillow', 'simplejpeg', "
            "'onnxruntime', 'openvino', 'scikit-learn')))"
        )
        return checked(self.call("/ssod/bin/python", "-c", code)).strip()

    def test(self) -> str:
        command = ["/ssod/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/src/pyproject.toml"]
        command += ["-o", "faulthandler_timeout=600", "-o", "faulthandler_exit_on_timeout=true", "--tb=short"]
        command += [f"/src/tests/{name}" for name in TESTS] + [f"--deselect=tests/{name}" for name in NOT_THERE]
        log = BUILD / "tests.log"
        with log.open("w") as file:
            done = self.call(*command, cwd="/tmp", capture_output=False, stdout=file, stderr=subprocess.STDOUT)
        last = log.read_text().strip().splitlines()[-1:]
        if done.returncode != 0:
            raise StepError(f"{' '.join(last)}; see {log}")
        return last[0]


def go_through(steps: Steps, board: Board) -> None:
    """From the bundle to verdicts, on this machine and on the board."""
    desk = here(BUILD / "here")

    def both(*arguments: object) -> str:
        """`arguments` make an export folder in both places; they end with its name."""
        desk(*arguments)
        board.run(*arguments)
        return released(BUILD / "board" / str(arguments[-1]))

    def same(export: str, engine: str, at_the_desk: str = "") -> str:
        there = verdicts(board.run, export, PHOTOS, engine)
        return compare(verdicts(desk, at_the_desk or export, PHOTOS, engine), there)

    def teach() -> str:
        said = both("teach", "door", "../material/lesson", "--alike", "--max-drop", 20, "-o", "taught")
        two = (verdicts(desk, export, PHOTOS, ENGINES[0]) for export in ("taught", "../board/taught"))
        return f"{said}; {agreement(*two)}"

    steps("export --from, both engines", lambda: both("export", "--from", "../material/door.tar", "-o", "door"))
    if (BUILD / "material" / "calib").is_dir():
        steps("calibrate", lambda: both("calibrate", "--id", "../material/calib", "door"))
    for engine in ENGINES:
        steps(f"predict, {engine}", lambda: same("door", engine))  # noqa: B023 - it is called at once
    if (BUILD / "material" / "lesson").is_dir():
        steps("teach", teach)
        for engine in ENGINES:
            name = f"predict what was taught there, {engine}"
            steps(name, lambda: same("taught", engine, "../board/taught"))  # noqa: B023
    steps("bench --quick", lambda: bench(board))
    steps("tests", board.test)


def bench(board: Board) -> str:
    """It runs through; its times are an emulator's and are thrown away."""
    board.run("bench", "door", "--quick", "--threads", 1, "--id", "../material/photos-seen", "--json", "bench.json")
    rows = json.loads((BUILD / "board" / "bench.json").read_text())["rows"]
    return ", ".join(f"{row['artifact']} {row['status']}" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--export", type=Path, help="an export folder, or a run folder")
    parser.add_argument("--photos", type=Path, help="a folder of photos to judge")
    parser.add_argument("--lesson", type=Path, help="CLASS/IMAGE folders to teach")
    options = parser.parse_args()
    if (options.export is None) != (options.photos is None):
        parser.error("--export and --photos go together")
    suite, board = os.environ.get("SUITE", "bookworm"), os.environ.get("BOARD", "pi5")
    if board not in BOARDS:
        parser.error(f"BOARD is {' or '.join(BOARDS)}, got '{board}'")
    try:
        check_machine("arm64")
    except MissingError as error:
        print(f"make arm64: {error}", file=sys.stderr)
        return 3
    with alone():
        return trial_of(options, suite, BOARDS[board])


def trial_of(options: argparse.Namespace, suite: str, processor: Processor) -> int:
    shutil.rmtree(BUILD, ignore_errors=True)
    for name in ("here", "board"):
        (BUILD / name).mkdir(parents=True)
    make_material(BUILD / "material", options.export, options.photos, options.lesson)
    steps = Steps()
    with arm_programs():
        board = Board(suite, processor)
        print(board.install(make_wheel(BUILD / "dist")), flush=True)
        print(f"Debian {suite}; {board.versions()}" + ("" if is_arm() else f"; qemu as a {processor.name}"), flush=True)
        go_through(steps, board)
    print("\n".join(["", *steps.lines, NOT_RUN]))
    return 1 if steps.failed else 0


if __name__ == "__main__":
    sys.exit(main())
