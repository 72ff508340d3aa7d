"""What goes to a terminal: nothing from outside is markup or a control character, and every module prints one way."""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from house import MODULES
from places import GOLDEN
from rich.table import Table

from ssod_edge import terminal
from ssod_edge.bench import run as bench_run
from ssod_edge.bench.measurement import BenchOptions
from ssod_edge.bench.record import load_record
from ssod_edge.bench.run import BenchOutput, run_bench
from ssod_edge.cli import main
from ssod_edge.cli.group import describe
from ssod_edge.terminal import Screen, about, image_bar, printable, printable_lines

#: Closes no tag, names a style and a link, is an emoji code; clears the screen; turns the rest of a line around.
HOSTILE = "a[/x][red]b[/][link=file:/]:smile:\x1b[2J\x9b2J\x07\u202etxt"
SHOWN = "a[/x][red]b[/][link=file:/]:smile:\\x1b[2J\\x9b2J\\x07\\u202etxt"


def test_printable() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("a\nb\u2028\udcff") == "a\\nb\\u2028\ufffd"
    assert printable_lines("a\nb\r\n") == "a\nb\\r\n"


def test_text_on_a_screen_is_what_it_says() -> None:
    file = io.StringIO()
    screen = Screen(file=file, width=200, force_terminal=False)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    screen.print(HOSTILE, table)
    assert file.getvalue().count(SHOWN) == 4 and "\x1b" not in file.getvalue()


#: Lines with colours of our own, whose words from outside went through `printable`; help has none from outside, and
#: loads nothing.
COLOURED = {"ssod_edge.cli.help", "ssod_edge.runtime.field.stream", "ssod_edge.runtime.field.summary"}


def test_every_module_prints_through_the_one_that_makes_text_harmless() -> None:
    others = {}
    for name, path in MODULES.items():
        if name == "ssod_edge.terminal" or ".bench.tools." in name or name == "ssod_edge.bench.memory":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "click.echo", "click.secho", "Console", "Text.from_markup"):
                    others.setdefault(name, []).append(f"{called} in line {node.lineno}")
    assert others.keys() == COLOURED, others
    assert all(len(found) == 1 for found in others.values())


@pytest.fixture
def hostile_record(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A record whose OOD set and class have such names; `bench` measures it in no time."""
    record = load_record(GOLDEN / "bench.json")
    rates = {"n": 4, "false_accept": 0.5, "false_accept_ci": [0.1, 0.9]}
    for row in record["rows"]:
        row["deployment"] = {
            "id_tpr": 0.9, "id_tpr_ci": [0.8, 1.0], "selective_accuracy": None, "aurc": 0.1,
            "ood": {HOSTILE: rates}, "rejected_by_class": {HOSTILE: {"n": 3, "rate": 0.1}},
        }  # fmt: skip
    record["command"] = f"ssod-edge bench --ood '{HOSTILE}'"
    monkeypatch.setattr(bench_run, "bench", lambda *_, **__: record)
    return record


@pytest.mark.parametrize("as_markdown", [False, True])
def test_a_bench_survives_the_names_of_its_sets(
    hostile_record: dict[str, Any], export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_markdown: bool
) -> None:
    run_bench(str(export), BenchOptions(), BenchOutput(str(tmp_path / "a.json"), as_markdown=as_markdown))
    out = capsys.readouterr().out
    assert SHOWN in out.replace("\n", "") or not as_markdown
    assert "[/x][red]b" in out and not any(c in out for c in "\x1b\x9b\x07\u202e")
    assert json.loads((tmp_path / "a.json").read_text()) == hostile_record


def test_what_was_measured_is_written_before_it_is_printed(
    hostile_record: dict[str, Any], export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(bench_run, "print_record", broken)
    with pytest.raises(BrokenPipeError):
        run_bench(str(export), BenchOptions(), BenchOutput(str(tmp_path / "a.json")))
    assert json.loads((tmp_path / "a.json").read_text()) == hostile_record


def test_errors_cannot_steer_a_terminal() -> None:
    for arguments in (["monitor", HOSTILE], [HOSTILE], ["history", "a", HOSTILE], ["monitor", f"--{HOSTILE}"]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert "[/x][red]" in result.stderr and not any(c in result.stderr for c in "\x1b\x9b\x07\u202e"), arguments
    assert describe(ValueError("a\nb"))[0].startswith("error: ValueError: a\nb")


@pytest.mark.parametrize(
    "content",
    [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xd8\xff\xe0\0\x10JFIF", "a.jpg\n".encode("utf-16"), b"a.jpg\0b.jpg\0"],
    ids=["PNG", "JPEG", "UTF-16", "print0"],
)
@pytest.mark.parametrize("arguments", [["predict", "RUN", "-"], ["predict", "RUN", "a.png", "-", "--json"]])
def test_a_picture_on_standard_input_is_no_list(export: Path, content: bytes, arguments: list[str]) -> None:
    result = CliRunner().invoke(main, [str(export) if a == "RUN" else a for a in arguments], input=content)
    assert result.exit_code == 2 and "holds a picture or other bytes" in result.stderr and not result.stdout


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "10 s"), (44, "40 s"), (89, "90 s"), (95, "2 min"), (5399, "90 min"), (9000, "2.5 h")],
)
def test_a_guessed_time_is_said_as_roughly_as_it_is_known(seconds: float, said: str) -> None:
    assert about(seconds) == f"about {said}"


def test_off_a_terminal_longer_work_says_where_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with image_bar("pho\x1btos", 300) as advance:
        for _ in range(3):
            clock[0] += 20
            advance(100)
    assert re.fullmatch(r"pho\\x1btos: 200 of 300  about \d+ s left\n", capsys.readouterr().err)
