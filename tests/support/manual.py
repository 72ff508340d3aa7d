"""The manual as tests read it: the fenced blocks of its pages, and the commands in them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

import click
from markdown_it import MarkdownIt
from places import ROOT

from ssod_edge.cli import main

#: README.md and the pages of docs/, without the lab's record of experiments.
PAGES = tuple(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
SHELLS = ("bash", "console", "sh")
#: An indented block has no language; one with a command in it counts as a shell's.
INDENTED = "indented"


@dataclass(frozen=True)
class Block:
    """A block of code in a page.

    Attributes:
        page: its path in the repository.
        line: of the block, from 1.
        language: "bash" is run, "console" shows what cannot run here (a camera, a board, a GPU, a root's rights).
        text: what is in it.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order; of all where none is named."""
    found = []
    for token in MarkdownIt("commonmark").parse((ROOT / page).read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            language = token.info.split()[0] if token.info.strip() else INDENTED
            found.append(Block(page, (token.map or [0])[0] + 1, language, token.content))
    return [block for block in found if not languages or block.language in languages]


def inline_code(page: str) -> Iterator[str]:
    """What stands between backquotes in the text of a page."""
    for token in MarkdownIt("commonmark").parse((ROOT / page).read_text(encoding="utf-8")):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


def lines(block: Block) -> list[str]:
    """The commands of a block: continued lines joined, without prompts, comments and what a command has printed."""
    whole = block.text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in whole):
        whole = [line.removeprefix("$ ") for line in whole if line.startswith("$ ")]
    return [line.strip() for line in whole if line.strip() and not line.lstrip().startswith("#")]


def words(line: str) -> list[list[str]]:
    """A line of a shell as its commands, each as words: "a 'b c' | d > e" -> [[a, "b c"], [d], [e]]."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("();<>|&"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def is_plain(line: str) -> bool:
    """Whether a line is one command, without pipes, variables and the like."""
    return not re.search(r"[|&;<>$`]", line)


def calls(block: Block) -> list[list[str]]:
    """The arguments of each `ssod-edge` in a block of a shell, or in an indented one."""
    found = []
    for line in lines(block):
        if "ssod-edge" in line:
            for command in words(line):
                while command and (re.match(r"\w+=", command[0]) or command[0] in ("sudo", "time")):
                    command = command[1:]
                if command and command[0] == "ssod-edge":
                    found.append(command[1:])
    return found


def parse(arguments: list[str]) -> None:
    """Raises click.UsageError for a command or an option that is not there, or a value that is none; runs nothing."""
    name, *rest = arguments or ["--help"]
    if name.startswith("-"):
        rest = arguments
        command: click.Command = main
    elif name in main.commands:
        command = main.commands[name]
    else:
        raise click.UsageError(f"there is no command '{name}'")
    try:
        with main.make_context("ssod-edge", ["doctor"]) as above:
            command.make_context(name, rest, parent=None if command is main else above)
    except click.exceptions.Exit:
        pass  # --help


def imported(code: str) -> Iterator[str]:
    """The modules and names that Python code imports from here, and what it takes from `ssod_edge` by a dot."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ssod_edge":
            yield f"ssod_edge.{node.attr}"


def is_there(name: str) -> bool:
    """Whether a module, or a name of one, can be imported."""
    try:
        if importlib.util.find_spec(name):
            return True
    except ModuleNotFoundError:
        pass
    module, _, attribute = name.rpartition(".")
    return bool(module) and hasattr(importlib.import_module(module), attribute)
