"""The command as a user starts it: names, what is missing, signals, and what it leaves."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from colour import paint
from places import ROOT
from served import eventually

from ssod_edge.cli import main
from ssod_edge.errors import UsageError
from ssod_edge.runtime.field.monitor import read_monitor
from ssod_edge.serve.command import ServeOptions, listen, name_exports, name_paths
from ssod_edge.serve.limits import Limits
from ssod_edge.serve.models import Keeping

#: No PyTorch on a device.
START = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from ssod_edge.cli import main
main(prog_name="ssod-edge")
"""


@contextmanager
def started(
    *arguments: str | Path, blocked: tuple[str, ...] = ("torch", "torchvision", "timm"), **env: str
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`ssod-edge serve` in a process of its own, and its port."""
    process = subprocess.Popen(
        [sys.executable, "-c", START.format(blocked=blocked), "serve", *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving "), (line, process.communicate())
        yield process, int(line.rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


def post(port: int, body: bytes, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/v1/predict", body, {"Content-Type": "image/png", **headers})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def queued(port: int) -> int:
    """Images inside the server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    return int(float(page.partition("ssod_edge_queue_images{")[2].splitlines()[0].split()[-1]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_peace(export: Path, tmp_path: Path, number: int) -> None:
    grey, monitor, kept = paint(tmp_path / "grey.png", "grey").read_bytes(), tmp_path / "m.json", tmp_path / "unknown"
    with started(f"colours={export}", "--monitor", monitor, "--collect", kept) as (process, port):
        status, answer = post(port, grey)
        assert (status, answer["model"], answer["verdicts"][0]["known"]) == (200, "colours", False)
        idle = http.client.HTTPConnection("127.0.0.1", port)
        idle.connect()
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (0, "", "")
    assert read_monitor(monitor).unknown == 1 == len(list(kept.glob("*.png")))


def test_a_signal_is_heard_from_the_first_line_on(export: Path) -> None:
    with started(export) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def test_what_is_in_flight_is_finished_at_the_end(export: Path, tmp_path: Path) -> None:
    red = paint(tmp_path / "red.png", "red", (3000, 3000)).read_bytes()
    with started(export) as (process, port):
        answers: list[tuple[int, dict]] = []
        clients = [threading.Thread(target=lambda: answers.append(post(port, red))) for _ in range(6)]
        for client in clients:
            client.start()
        assert eventually(lambda: queued(port) + len(answers) == 6)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        for client in clients:
            client.join()
    assert [status for status, _ in answers] == [200] * 6


def test_a_missing_package_is_said_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssod_edge.optional.is_there", lambda module: module != "uvicorn")
    result = CliRunner().invoke(main, ["serve", "/nowhere"])
    assert (result.exit_code, result.output) == (
        3,
        "error: ssod-edge serve needs the package 'uvicorn', which is not installed. "
        "Install it with: pip install 'ssod-edge[serve]'\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{export}/nowhere"], "does not exist"),
        (["{export}", "{export}"], "two exports are called 'export-of-a-test'; give NAME=EXPORT"),
        (["a b={export}"], "cannot be a model's name"),
        (["{export}", "--host", "0.0.0.0"], "give a token with --token-file"),
        (["{export}", "--token-file", "/nowhere"], "cannot be read"),
        (["{export}", "--host", "192.0.2.1", "--insecure"], "cannot listen on 192.0.2.1:8000"),
        (["{export}", "--collect-most", "3"], "belongs to --collect DIR"),
        (["{export}", "--max-mb", "nan"], "max-mb"),
        (["a={export}", "b={export}", "--monitor", "x.json"], "give NAME=PATH for one of the models a, b"),
    ],
)
def test_wrong_arguments_are_one_line(
    export: Path, tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSOD_EDGE_TOKEN", raising=False)
    place = export.rename(tmp_path / "export-of-a-test")
    result = CliRunner().invoke(main, ["serve", *(argument.format(export=place) for argument in arguments)])
    assert result.exit_code == 2 and message in result.output, result.output
    assert "Traceback" not in result.output


def test_a_taken_port_is_named_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError) as caught:
            listen("127.0.0.1", port)
    fix = "Give another --host or --port"
    assert str(caught.value) == f"cannot listen on 127.0.0.1:{port} (Address already in use). {fix}"


def test_names_of_models(tmp_path: Path) -> None:
    (tmp_path / "runs" / "clothes" / "export").mkdir(parents=True)
    clothes = tmp_path / "runs" / "clothes"
    assert name_exports([str(clothes)]) == {"clothes": clothes}
    assert name_exports([str(clothes / "export")]) == {"clothes": clothes / "export"}
    assert name_exports([f"a={clothes}", "b=other"]) == {"a": clothes, "b": Path("other")}
    assert name_paths("--collect", ["some/dir"], ["a"]) == {"a": "some/dir"} == name_paths("-", ["a=some/dir"], ["a"])
    assert name_paths("--collect", ["x=y"], ["a"]) == {"a": "x=y"}
    for given in (["c=x"], ["x"], ["a=x", "a=y"], ["a="]):
        with pytest.raises(UsageError):
            name_paths("--collect", given, ["a", "b"])


def test_a_token_never_stands_on_the_command_line(export: Path, tmp_path: Path) -> None:
    assert not any(
        "token" in option for p in main.commands["serve"].params for option in p.opts if "file" not in option
    )
    red = paint(tmp_path / "red.png", "red").read_bytes()
    with started(export, "--host", "0.0.0.0", SSOD_EDGE_TOKEN="a-token-of-some-length") as (_, port):
        assert post(port, red)[0] == 401
        assert post(port, red, Authorization="Bearer a-token-of-some-length")[0] == 200


def test_what_is_written_of_it_names_options_that_exist() -> None:
    options = {option for p in main.commands["serve"].params for option in p.opts} | {"--requests", "--json", "--now"}
    for file in (ROOT / "docs" / "serve.md", ROOT / "examples" / "systemd" / "ssod-edge.service"):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", file.read_text())) - {"--data-binary"} <= options


def test_defaults_stand_once() -> None:
    """Those of the command line are those of the settings."""
    shown = {str(p.name): p.default for p in main.commands["serve"].params}
    for settings in (Limits(), ServeOptions(), Keeping()):
        for name, value in vars(settings).items():
            if name not in ("collect", "monitor"):
                assert not value or shown[name] == value, name
