"""README.md and docs/: each command is one that there is, and those of the first pages do what they say.

`make docs-test` runs the commands of all pages. A page writes what cannot run here as ```console.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import click
import pytest
from manual import (
    INDENTED,
    PAGES,
    SHELLS,
    Block,
    blocks,
    calls,
    imported,
    inline_code,
    is_there,
    lines,
    parse,
    words,
)
from places import ROOT

from ssod_edge.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Pages that `make test` runs, in one folder: a line that both have is run once.
FIRST_PAGES = ("README.md", "docs/quickstart.md")
ALL = "SSOD_EDGE_MANUAL" in os.environ


def targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_ones_that_there_are(page: str) -> None:
    """Name, options, values and the number of arguments, by click; nothing is run."""
    for block in blocks(page, *SHELLS, INDENTED):
        for arguments in calls(block):
            try:
                parse(arguments)
            except click.UsageError as error:
                pytest.fail(f"{block}: ssod-edge {' '.join(arguments)}: {error.format_message()}")


@pytest.mark.parametrize("page", PAGES)
def test_options_of_commands_in_the_text_are_ones_that_there_are(page: str) -> None:
    for code in inline_code(page):
        name, *rest = code.removeprefix("ssod-edge ").split() or [""]
        if name in main.commands:
            flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
            own = {flag for option in main.commands[name].params for flag in option.opts} | {"--help", "--help-all"}
            assert flags <= own, f"{page}: `{code}`"


@pytest.mark.parametrize("page", PAGES)
def test_targets_and_extras_are_ones_that_there_are(page: str) -> None:
    for block in blocks(page, *SHELLS, INDENTED):
        for line in lines(block):
            for command in words(line) if line.startswith(("make ", "pip ")) else []:
                named = [word for word in command[1:] if re.fullmatch(r"[a-z][a-z0-9-]*", word)]
                assert command[0] != "make" or set(named) <= targets(), f"{block}: {line}"
                wanted = re.findall(r"(?:^\.|\.whl|ssod-edge)\[([a-z0-9,-]+)\]", " ".join(command), re.MULTILINE)
                assert set(",".join(wanted).split(",")) - {""} <= extras(), f"{block}: {line}"


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles_and_what_it_imports_is_there(page: str) -> None:
    for block in blocks(page, "python"):
        compile(block.text, str(block), "exec")
        missing = [name for name in imported(block.text) if name.startswith("ssod_edge") and not is_there(name)]
        assert not missing, f"{block}: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_have_a_language_that_says_whether_they_run(page: str) -> None:
    for block in blocks(page):
        assert block.language != INDENTED or not calls(block), f"{block}: write it as ```bash, or ```console"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="the manual trains")
    from manual_place import write_data

    folder = tmp_path_factory.mktemp("manual")
    write_data(folder)
    return folder


def test_the_first_pages_run(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from manual_place import Place

    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    place = Place(quick=not ALL)
    for page in FIRST_PAGES:
        place.run_page(page)
    assert sum(line.startswith("ssod-edge") for line in place.done) >= 6


@pytest.mark.skipif(not ALL, reason="minutes: make docs-test")
@pytest.mark.parametrize("page", [page for page in PAGES if page not in FIRST_PAGES])
def test_a_page_runs(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    from manual_place import Place, make_run

    if not (template / "runs").exists():
        monkeypatch.chdir(template)
        make_run()
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    Place().run_page(page)


def made(text: str, language: str = "bash") -> Block:
    return Block("page.md", 1, language, text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ssod-edge train photos/ --name NAME  # trains", [["train", "photos/", "--name", "NAME"]]),
        ("ssod-edge train photos/ \\\n    --tune head\n", [["train", "photos/", "--tune", "head"]]),
        ("A=1 ssod-edge doctor | head && sudo ssod-edge doctor --json > x", [["doctor"], ["doctor", "--json"]]),
        ("$ ssod-edge doctor\nssod-edge 0.2.0\n", [["doctor"]]),
        ("ssod-edge train p --group 'video(\\d+)'", [["train", "p", "--group", "video(\\d+)"]]),
        ("pip install ssod-edge\n# ssod-edge doctor", []),
    ],
)
def test_commands_are_found(text: str, found: list[list[str]]) -> None:
    assert calls(made(text, "console")) == found


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train", "photos/", "--tun", "head"], ["train", "a", "--size", "x"], ["package"]]
)
def test_a_command_that_there_is_not_is_found_out(arguments: list[str]) -> None:
    with pytest.raises(click.UsageError):
        parse(arguments)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help-all"], ["--version"], ["train", "photos/"]])
def test_a_command_that_there_is_passes(arguments: list[str]) -> None:
    parse(arguments)


def test_names_that_python_imports_are_found_out() -> None:
    code = "import ssod_edge.errors\nfrom ssod_edge.runtime.open import open_runner, nothing\nssod_edge.open('x')"
    assert [name for name in imported(code) if not is_there(name)] == ["ssod_edge.runtime.open.nothing"]


def test_a_line_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="the manual trains")
    import manual_place

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(manual_place, "blocks", lambda *_: [made("ssod-edge predict runs/nothing new.jpg")])
    with pytest.raises(AssertionError, match=r"page.md:1: ssod-edge predict runs/nothing new.jpg\n.*does not exist"):
        manual_place.Place().run_page("page.md")


def test_training_is_made_small_and_what_begins_from_a_run_is_left_alone() -> None:
    pytest.importorskip("torch", reason="the manual trains")
    from manual_place import small

    assert small(["train", "photos/", "--epochs", "30", "--name", "N"])[:6] == ["train", "photos/", "--epochs", "1",
                                                                              "--name", "N"]  # fmt: skip
    assert "test_efficientnet" in small(["train", "photos/"])
    assert small(["train", "--resume", "runs/NAME"]) == ["train", "--resume", "runs/NAME"]
