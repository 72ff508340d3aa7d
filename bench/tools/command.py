"""What the tools' commands share: errors as exit codes, and the file that keeps the rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ssod_edge.bench.environment import describe_environment
from ssod_edge.errors import SsodEdgeError
from ssod_edge.files import write_json

json_option = click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where the rows go.")


class Tool(click.Command):
    """A command that ends with the message and the exit code of an SsodEdgeError."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SsodEdgeError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)


def called(tool: str) -> list[str]:
    """The command that is running, of the tool of this name."""
    return ["python", "-m", f"ssod_edge.bench.tools.{tool}", *sys.argv[1:]]


def write_rows(json_file: Path | None, tool: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Keep the rows with the command, its `settings` and the machine, if there is a file to write."""
    if json_file is not None:
        record = {"command": called(tool), **settings, "environment": describe_environment(None), "rows": rows}
        write_json(json_file, record)
