"""Help that fits on a screen: `--help` has the options of everyday use, `--help-all` all of them in full."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import click


class Command(click.Command):
    """A command of many options.

    Its `--help` shows the first two paragraphs of its text and the options of everyday use, each with the first
    sentence of its help and its default. `--help-all` shows all of the text and of every option.
    """

    def __init__(self, *args: Any, everyday: str = "", **kwargs: Any):
        """Takes the arguments of `click.Command`.

        Args:
            everyday: the options that `--help` shows, by the names that the function takes, with spaces between.
        """
        super().__init__(*args, **kwargs)
        self.everyday = frozenset(everyday.split())

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), HELP_ALL]

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """What the command does, and of what; details are for `--help-all`."""
        everyday = copy.copy(self)
        everyday.help = "\n\n".join(inspect.cleandoc(self.help or "").split("\n\n")[:2])
        super(Command, everyday).format_help_text(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option) and not param.hidden]
        helps = {*ctx.help_option_names, *HELP_ALL.opts}
        shown = [option for option in options if option.name in self.everyday or helps.intersection(option.opts)]
        with formatter.section("Options"):
            formatter.write_dl([record for option in shown if (record := _short(option).get_help_record(ctx))])
        left = len(options) - len(shown)
        with formatter.indentation():
            formatter.write_text(f"{left} more options, and more about these: {ctx.command_path} --help-all")


def _short(option: click.Option) -> click.Option:
    """The same option with the first sentence of its help, and the one that tells the default."""
    short = copy.copy(option)
    first, *rest = re.split(r"(?<=\.) (?=[A-Z`])", option.help or "")
    short.help = " ".join([first, *(sentence for sentence in rest if sentence.startswith("Default: "))])
    return short


def _print_all(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    """As `--help`, by click's own way of listing the options."""
    if not wanted or ctx.resilient_parsing:
        return
    formatter = ctx.make_formatter()
    ctx.command.format_usage(ctx, formatter)
    click.Command.format_help_text(ctx.command, ctx, formatter)
    click.Command.format_options(ctx.command, ctx, formatter)
    click.echo(formatter.getvalue().rstrip("\n"), color=ctx.color)
    ctx.exit()


HELP_ALL = click.Option(
    ["--help-all"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    show_default=False,
    callback=_print_all,
    help="Show every option, in full, and exit.",
)
