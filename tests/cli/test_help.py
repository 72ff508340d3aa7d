"""`--help` fits on a screen, and `--help-all` leaves nothing out."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner

from ssod_edge.cli import main
from ssod_edge.cli.help import Command

#: Lines.
SCREEN = 40
LONG = sorted(name for name, command in main.commands.items() if isinstance(command, Command))


def shown(*arguments: str) -> str:
    """What a terminal of 80 columns shows; click leaves two of them empty."""
    done = CliRunner().invoke(main, arguments, terminal_width=78)
    assert done.exit_code == 0, done.output
    return done.output


def flags(text: str) -> set[str]:
    """The long options that a list of options begins its lines with."""
    return set(re.findall(r"^  (?:-\w, )?(--[a-z0-9-]+)", text.partition("\nOptions:\n")[2], re.MULTILINE))


def visible(name: str) -> list[click.Option]:
    return [param for param in main.commands[name].params if isinstance(param, click.Option) and not param.hidden]


def everyday(name: str) -> frozenset[str]:
    command = main.commands[name]
    assert isinstance(command, Command)
    return command.everyday


@pytest.mark.parametrize("name", [None, *main.commands])
def test_help_fits_on_a_screen(name: str | None) -> None:
    text = shown(*([name] if name else []), "--help")
    assert text.count("\n") <= SCREEN
    assert max(map(len, text.splitlines())) <= 78


def test_commands_of_many_options_have_two_helps() -> None:
    assert LONG == ["eval", "export", "predict", "reproduce", "serve", "study", "train"]


@pytest.mark.parametrize("name", LONG)
def test_help_has_the_options_of_everyday_and_counts_the_others(name: str) -> None:
    text = shown(name, "--help")
    wanted = {option.opts[-1] for option in visible(name) if option.name in everyday(name)}
    assert flags(text) == {*wanted, "--help", "--help-all"}
    left = len(visible(name)) - len(wanted)
    assert left > 0 and f"{left} more options, and more about these: main {name} --help-all" in " ".join(text.split())


@pytest.mark.parametrize("name", LONG)
def test_everyday_options_are_options(name: str) -> None:
    assert everyday(name) <= {option.name for option in visible(name)}


@pytest.mark.parametrize("name", LONG)
def test_help_all_has_every_option_in_full(name: str) -> None:
    text = shown(name, "--help-all")
    assert flags(text) == {*(option.opts[-1] for option in visible(name)), "--help", "--help-all"}
    words = re.sub(r"\s+", "", text)
    for option in visible(name):
        assert option.help and re.sub(r"\s+", "", option.help) in words
    assert re.sub(r"\s+", "", main.commands[name].help or "") in words


def test_help_has_the_first_sentence_and_the_default() -> None:
    text = " ".join(shown("train", "--help").split())
    assert "--epochs N|auto Passes over the training photos. Default: 10 (scratch: 30, paper: 60)." in text
    assert "1,000 training steps" not in text and "torchrun" not in text


def test_help_all_is_wrong_usage_where_help_has_all() -> None:
    assert CliRunner().invoke(main, ["doctor", "--help-all"]).exit_code == 2
