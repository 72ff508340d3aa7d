"""The frame of every command: what it returns is the exit code; what it raises, one line on stderr and an exit code."""

from __future__ import annotations

import io
import os
import sys
import traceback
from typing import Any

import click

from ssod_edge import __version__
from ssod_edge.errors import EXIT_INTERRUPTED, EXIT_SOME_FAILED, SsodEdgeError
from ssod_edge.machine import limit_threads
from ssod_edge.optional import failed_import

#: What a command that was interrupted leaves. `train`, `bench` and `predict` say it themselves.
LEFT = {
    "export": "an export that was there is as it was",
    "calibrate": "the export is as it was",
    "teach": "the export is as it was",
    "study": "the same command goes on with the runs that are there",
    "eval": "no figures were written",
    "report": "no page was written",
}


class Commands(click.Group):
    """The group of commands: lists them in the order of work, and turns results and errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            try:
                # A name that the terminal's encoding has no letters for must not cost the whole table.
                if isinstance(sys.stdout, io.TextIOWrapper):
                    sys.stdout.reconfigure(errors="backslashreplace")
                code = super().invoke(ctx)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # a full disk or a closed pipe shows here, not after the exit code is set
            if code:
                ctx.exit(code)
        except click.ClickException as error:
            from ssod_edge.sources import scrubbed
            from ssod_edge.terminal import printable_lines

            error.message = printable_lines(scrubbed(error.message))  # type: ignore[misc]  # it quotes the arguments
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            # The reader (head, less) has gone: point stdout elsewhere, or the flush at exit complains.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctx.exit(EXIT_SOME_FAILED)
        except (KeyboardInterrupt, Exception) as error:
            if ctx.params.get("debug"):
                _say(traceback.format_exc().rstrip())
            message, code = describe(error)
            if isinstance(error, KeyboardInterrupt) and ctx.invoked_subcommand in LEFT:
                message = f"{message}: {LEFT[ctx.invoked_subcommand]}"
            _say(message)
            ctx.exit(code)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # `--help` itself could not be written
            message, code = describe(error)
            _say(message)
            sys.exit(code)


def _say(text: str) -> None:
    from ssod_edge.sources import scrubbed
    from ssod_edge.terminal import tell  # rich takes a while, and most calls need none of it

    tell(scrubbed(text), err=True)


def describe(error: BaseException) -> tuple[str, int]:
    """What the user reads for an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    error = failed_import(error) or error
    if isinstance(error, SsodEdgeError):
        return f"error: {error}", error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "error: out of memory. Use a smaller batch or input size, or free some memory.", EXIT_SOME_FAILED
    if isinstance(error, OSError):
        where = f" '{error.filename}'" if error.filename else ""
        return f"error: {error.strerror or error}{':' if where else ''}{where}", EXIT_SOME_FAILED
    text = str(error) or "no message"
    return (
        f"error: {type(error).__name__}: {text}\nThis should not happen; see where it comes from with: "
        "ssod-edge --debug COMMAND ...",
        EXIT_SOME_FAILED,
    )


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", message="ssod-edge %(version)s")
@click.option("--debug", is_flag=True, envvar="SSOD_EDGE_DEBUG", show_default=False, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Train, check and ship image classifiers that know when to say "unknown"."""
    limit_threads()
