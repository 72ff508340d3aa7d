"""Limits of containers: what control groups of both versions allow, and who is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssod_edge import machine
from ssod_edge.runtime.open import open_runner

#: Fields of a line of /proc/self/mountinfo: the group at the mount's top, where it is mounted, its kind and options.
MOUNT = "31 23 0:28 {top} {place} rw,relatime shared:5 - {kind} cgroup rw{options}\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def v2(root: Path, group: str, files: dict[str, str], top: str = "/") -> None:
    mount = MOUNT.format(top=top, place="/sys/fs/cgroup", kind="cgroup2", options="")
    write(root, {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": mount})
    write(root, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


def v1(root: Path, group: str, files: dict[str, str], top: str = "/") -> None:
    mounts = "".join(
        MOUNT.format(top=top, place=f"/sys/fs/cgroup/{name}", kind="cgroup", options=f",{name}")
        for name in ("cpu,cpuacct", "memory")
    )
    write(root, {"proc/self/cgroup": f"4:memory:{group}\n1:cpu,cpuacct:{group}\n0::/\n", "proc/self/mountinfo": mounts})
    write(root, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


def test_half_a_core_by_version_2(root: Path) -> None:
    v2(root, "/", {"cpu.max": "50000 100000\n", "memory.max": "512000000\n", "cpu.stat": "throttled_usec 2500000\n"})
    assert (machine.cpu_quota(), machine.available_cores(), machine.engine_threads(None)) == (0.5, 1, 1)
    assert (machine.memory_limit_mb(), machine.throttled_s()) == (512, 2.5)


def test_a_core_and_a_half_by_version_1(root: Path) -> None:
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}
    v1(
        root,
        "/",
        {**files, "memory/memory.limit_in_bytes": "1000000000\n", "cpu,cpuacct/cpu.stat": "throttled_time 5\n"},
    )
    assert (machine.cpu_quota(), machine.available_cores(), machine.engine_threads(None)) == (1.5, 2, 2)
    assert (machine.memory_limit_mb(), machine.throttled_s()) == (1000, 0.0)


def test_no_limit_leaves_the_engines_their_choice(root: Path) -> None:
    v2(root, "/", {"cpu.max": "max 100000\n", "memory.max": "max\n"})
    assert (machine.cpu_quota(), machine.memory_limit_mb(), machine.engine_threads(None)) == (None, None, None)
    assert (machine.available_cores(), machine.throttled_s()) == (64, None)
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}
    v1(root, "/", {**files, "memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert (machine.cpu_quota(), machine.memory_limit_mb()) == (None, None)


def test_a_limit_of_more_than_there_is_changes_nothing(root: Path) -> None:
    v2(root, "/", {"cpu.max": "12800000 100000\n"})
    assert (machine.available_cores(), machine.engine_threads(None)) == (64, None)


def test_asked_for_threads_stay(root: Path) -> None:
    v2(root, "/", {"cpu.max": "50000 100000\n"})
    assert machine.engine_threads(8) == 8


def test_the_tightest_of_all_groups_around_holds(root: Path) -> None:
    files = {"pod/cpu.max": "200000 100000\n", "pod/box/cpu.max": "400000 100000\n", "cpu.max": "max 100000\n"}
    v2(root, "/pod/box", files)
    assert machine.cpu_quota() == 2


@pytest.mark.parametrize("make", [v1, v2])
def test_a_container_without_a_namespace_of_its_own_sees_its_group_at_the_mount(make, root: Path) -> None:
    files = {"cpu.max": "50000 100000\n", "cpu,cpuacct/cpu.cfs_quota_us": "50000\n"}
    make(root, "/docker/abc", {**files, "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, top="/docker/abc")
    assert machine.cpu_quota() == 0.5


@pytest.mark.parametrize("text", ["", "max", "x y", "50000", "0 100000", "50000 0", "-5 100000"])
def test_what_no_kernel_writes_is_no_limit(text: str, root: Path) -> None:
    v2(root, "/", {"cpu.max": text, "memory.max": "-1", "cpu.stat": "nothing"})
    assert (machine.cpu_quota(), machine.memory_limit_mb(), machine.throttled_s()) == (None, None, None)
    assert machine.available_cores() == 64


def test_a_system_without_control_groups(root: Path) -> None:
    assert (machine.cpu_quota(), machine.memory_limit_mb(), machine.throttled_s()) == (None, None, None)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "eager"])
def test_engines_start_as_many_threads_as_a_container_may_use(
    engine: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue("small_run" if engine == "eager" else "export")
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    with open_runner(folder, engine=engine, allow_untrained=True) as runner:
        assert runner.details["threads"] == "1"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, machine.SPIN), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_that_wait_leave_the_cores_to_others(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # whatever is set here is put back in the end
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    machine.limit_threads()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_the_commands_tell_the_libraries_of_numpy_and_pytorch(tmp_path: Path) -> None:
    code = (
        "import os; from ssod_edge import machine; machine.cpu_quota = lambda: 0.5; "
        "os.sched_getaffinity = lambda _: {0, 1}; from ssod_edge.cli import main; "
        "main(['doctor', '--json'], standalone_mode=False); print(os.environ['OMP_NUM_THREADS'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    *report, threads = done.stdout.strip().splitlines()
    assert threads == "1", done.stderr
    assert json.loads("\n".join(report))["cpu"]["quota"] == 0.5
