"""The frame of the command line: messages instead of tracebacks, exit codes, pipes, disks and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from ssod_edge import __version__, errors
from ssod_edge.cli import main
from ssod_edge.cli.group import LEFT, Commands, describe

COMMAND = [sys.executable, "-m", "ssod_edge"]


def run_raising(error: BaseException, *arguments: str, env: dict[str, str] | None = None, name: str = "work") -> Result:
    """Invoke a command that raises `error`, inside the same frame as every real command."""

    @click.group(cls=Commands)
    @click.option("--debug", is_flag=True, envvar="SSOD_EDGE_DEBUG")
    def group(debug: bool) -> None:
        pass

    @group.command(name)
    def work() -> None:
        raise error

    return CliRunner().invoke(group, [*arguments, name], env=env)


def test_version_and_help() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"ssod-edge {__version__}\n"
    listed = CliRunner().invoke(main, ["-h"]).output
    assert "doctor" in listed and "--debug" in listed


def test_commands_are_listed_in_the_order_of_work() -> None:
    order = [
        "train",
        "study",
        "reproduce",
        "eval",
        "report",
        "explain",
        "export",
        "bench",
        "package",
        "predict",
        "serve",
        "monitor",
        "review",
        "teach",
        "history",
        "rollback",
        "calibrate",
        "doctor",
    ]
    assert list(main.list_commands(click.Context(main))) == order


@pytest.mark.parametrize(
    ("given", "outliers"),
    [([], None), (["--outliers", "none"], ()), (["--outliers", "zoom, blend"], ("zoom", "blend"))],
)
def test_outliers_are_a_list_or_none(
    given: list[str], outliers: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("ssod_edge.training.loop.start_run", lambda data, out, options: seen.append(options))
    assert CliRunner().invoke(main, ["train", "demo", *given]).exit_code == 0
    assert seen[0]["outliers"] == outliers


@pytest.mark.parametrize("empty", ["", " ", ","])
def test_outliers_that_name_nothing_are_refused(empty: str) -> None:
    result = CliRunner().invoke(main, ["train", "demo", "--outliers", empty])
    assert result.exit_code == 2 and "give some of rotate, shuffle, zoom, blend, or none" in result.stderr


def test_unknown_command_and_option_are_wrong_usage() -> None:
    assert CliRunner().invoke(main, ["no-such-command"]).exit_code == 2
    assert CliRunner().invoke(main, ["doctor", "--no-such-option"]).exit_code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("gamma must satisfy 0.5 < gamma < 1, got 2"), 2),
        (errors.ImageError("cut short"), 1),
        (errors.OutputError("read-only"), 1),
        (errors.TrainingError("the loss is not finite"), 1),
        (errors.missing_extra("torch", "training"), 3),
        (errors.EngineError("no such device"), 3),
        (errors.ArtifactError("hash mismatch"), 4),
        (errors.VerificationError("drift"), 4),
        (errors.missing_extra("tensorrt", "exporting for tensorrt"), 3),
    ],
)
def test_errors_become_one_line_and_their_exit_code(error: errors.SsodEdgeError, code: int) -> None:
    result = run_raising(error)
    assert result.exit_code == code
    assert result.stderr == f"error: {error}\n"
    assert result.stdout == ""


def test_where_jetpack_has_it_no_wheel_is_to_hide_it() -> None:
    assert "On a Jetson not so: there JetPack 6.1" in str(errors.missing_extra("tensorrt", "a plan"))
    assert "Jetson" not in str(errors.missing_extra("torch", "training"))


def test_missing_optional_module_names_its_extra() -> None:
    result = run_raising(ModuleNotFoundError("No module named 'openvino.opset13'", name="openvino.opset13"))
    assert result.exit_code == 3
    assert "pip install 'ssod-edge[openvino]'" in result.stderr


def test_missing_unknown_module_is_reported_as_a_bug() -> None:
    result = run_raising(ModuleNotFoundError("No module named 'nowhere'", name="nowhere"))
    assert result.exit_code == 1
    assert "should not happen" in result.stderr


def test_file_errors_name_the_file() -> None:
    assert describe(PermissionError(13, "Permission denied", "/a/b")) == ("error: Permission denied: '/a/b'", 1)
    assert describe(OSError("odd")) == ("error: odd", 1)


def test_out_of_memory_says_what_to_do() -> None:
    class OutOfMemoryError(RuntimeError):
        """CUDA's error, by the name that torch gives it."""

    for error in (MemoryError(), OutOfMemoryError("CUDA out of memory")):
        result = run_raising(error)
        assert result.exit_code == 1
        assert "smaller batch" in result.stderr


def test_traceback_only_when_asked_for() -> None:
    quiet = run_raising(RuntimeError("boom"))
    assert quiet.exit_code == 1
    assert "Traceback" not in quiet.output
    assert "error: RuntimeError: boom" in quiet.stderr
    for loud in (
        run_raising(RuntimeError("boom"), "--debug"),
        run_raising(RuntimeError("boom"), env={"SSOD_EDGE_DEBUG": "1"}),
    ):
        assert loud.exit_code == 1
        assert "Traceback" in loud.stderr


def test_interrupt_ends_with_130() -> None:
    result = run_raising(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    result = run_raising(KeyboardInterrupt(), name="export")
    assert (result.exit_code, result.stderr) == (130, "interrupted: an export that was there is as it was\n")
    assert set(LEFT) <= set(main.commands)


def test_ctrl_c_in_a_running_command() -> None:
    child = subprocess.Popen([*COMMAND, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # Its probes run in children; once one is there the command is at work.
    children = Path(f"/proc/{child.pid}/task")
    deadline = time.monotonic() + 30
    while not any(path.read_text() for path in children.glob("*/children")):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert (child.returncode, stderr) == (130, "interrupted\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--json"]])
def test_full_disk_behind_stdout(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        child = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert child.returncode == 1
    assert child.stderr == "error: No space left on device\n"


def test_reader_that_goes_away_ends_the_command_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    child = subprocess.run([*COMMAND, "doctor", "--json"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (child.returncode, child.stderr) == (1, "")
