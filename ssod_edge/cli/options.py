"""Options that several commands have, and those of training, which are made from the settings themselves."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin

import click

from ssod_edge.config import FITS, LossConfig, TrainConfig, setting_types
from ssod_edge.data.named import parse_named_data, parse_via
from ssod_edge.recipes import RECIPES, train_config

T = TypeVar("T")
Decorator = Callable[[Any], Any]


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator; `--help` shows them in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def check_paths(
    run: str | None = None,
    weights: str | None = None,
    begun: str | None = None,
    resumed: str | None = None,
    placed: str | None = None,
    **data: Any,
) -> None:
    """Find out before the seconds that importing torch takes whether the paths that are named are there.

    Args:
        run: a run folder or a checkpoint.
        weights: of `train` and `export`.
        begun: a run or an export that training begins from.
        resumed: a run that training goes on with.
        placed: the folder that runs are to lie in.
        data: data sets by option; None, one, or several by name.

    Raises:
        UsageError: one is not there, or a file is where a folder is to be made.
        OutputError: `placed` cannot be written to.
    """
    from ssod_edge.config import NO_WEIGHTS, PUBLISHED
    from ssod_edge.data.sources import check_there
    from ssod_edge.errors import UsageError
    from ssod_edge.files import check_folder

    if begun is not None and not os.path.exists(begun):
        raise UsageError(f"--from '{begun}' does not exist. Give the folder of a run or of an export")
    if run is not None and not os.path.exists(run):
        raise UsageError(f"checkpoint '{run}' does not exist. Train one with: ssod-edge train DATA")
    if resumed is not None and not os.path.exists(resumed):
        raise UsageError(f"there is no run '{resumed}' to resume; give the folder of a run, such as runs/NAME")
    if placed is not None:
        check_folder(placed)
    for given in data.values():
        for name in given.values() if isinstance(given, dict) else [given]:
            if name is not None:
                check_there(name)
    if weights not in (None, "", PUBLISHED, NO_WEIGHTS) and not os.path.exists(str(weights)):
        raise UsageError(f"weights file '{weights}' does not exist")


def take(cls: type[T], options: dict[str, Any]) -> T:
    """A dataclass of the options that bear the names of its fields; they leave `options`."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return cls(**{name: options.pop(name) for name in names if name in options})


def given(besides: tuple[str, ...] = ()) -> list[str]:
    """The options that stand on the command line."""
    ctx, typed = click.get_current_context(), click.core.ParameterSource.COMMANDLINE
    options = [option for option in ctx.command.params if option.name not in besides]
    return [option.opts[-1] for option in options if ctx.get_parameter_source(str(option.name)) is typed]


def newest(what: str) -> Decorator:
    """--backbone and --runs, which stand for a run or an export that is not named."""
    runs = click.option("--runs", default="runs", help="Folder of runs.")
    return together(click.option("--backbone", help=what), runs)


COUNT = click.IntRange(min=1)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
backbone = click.option(
    "--backbone", default="mobilenetv3", help="Network: one of the paper's Table 6, or a model of timm."
)
size = click.option("--size", type=COUNT, help="Input height and width in pixels. Default: the backbone's.")
shape = together(
    click.option(
        "--fit",
        type=click.Choice(FITS),
        help="How a picture becomes a square. `crop` keeps its centre, `squash` all of it in another ratio, `pad` all "
        "of it between bars. Default: crop.",
    ),
    click.option(
        "--roi",
        metavar="X,Y,W,H",
        callback=lambda _context, _option, text: None if text is None else _region(text),
        help="Look at this region alone. In pixels of the upright picture; for a camera that does not move.",
    ),
)
threads = click.option("--threads", type=COUNT, help="Threads of an engine. Default: its own choice.")
tpr = click.option("--tpr", type=float, default=0.95, help="Share of known images that a threshold keeps known.")
vary = click.option(
    "--vary", multiple=True, metavar="SETTING=VALUE,...", help="Train with each value; repeat for a grid."
)


def _take_via(context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    """Two settings of `NamedData`: the size, which is returned, and the quality."""
    via = None if text is None else parse_via(text)
    context.params["via_jpeg"] = None if via is None else via.jpeg
    return None if via is None else via.size


via = click.option(
    "--via",
    "via_size",
    metavar="SIDE[,jpegQUALITY]",
    callback=_take_via,
    help="Every image, known and unknown, is first resized to so many pixels (32), and saved as one JPEG (32,jpeg75).",
)
named_data = together(
    click.option("--id", "id_data", metavar="DATA", help="Known images (ID). Default: the run's validation split."),
    click.option(
        "--ood",
        "ood_data",
        multiple=True,
        metavar="NAME=DATA",
        callback=lambda _context, _option, items: parse_named_data(items) or None,
        help="Unknown images (OOD), under a name of your choice; may be given several times.",
    ),
    via,
)
baselines = together(
    click.option("--baselines", metavar="all|NAME,...", help="Also run pytorch-ood's detectors, and show their cost."),
    click.option("--fit-images", type=COUNT, help="Training images that these are fitted on. Default: all."),
)


def _region(text: str) -> tuple[int, ...]:
    """ "0,120,640,480" -> its numbers; `Preprocess` says what they may be."""
    try:
        left, top, width, height = map(int, text.split(","))
    except ValueError:
        raise click.BadParameter(f"expected four numbers of pixels, such as 0,120,640,480, got '{text}'") from None
    return left, top, width, height


_TYPES = setting_types()
_DEFAULTS = {recipe: train_config(recipe, {"backbone": "", "data": ""}) for recipe in RECIPES}


def train_options(recipe: str = "short", many_seeds: bool = False) -> Decorator:
    """The settings of `ssod_edge.config.TrainConfig` and its loss, under the same names.

    Args:
        recipe: the default one.
        many_seeds: the command has --seeds: --seed is not shown, and an error there.
    """
    more: dict[str, dict[str, Any]] = {"recipe": {"default": recipe}, "seed": {"hidden": many_seeds}}
    options = []
    for cls in (TrainConfig, LossConfig):
        texts = _attributes(cls)
        for field in dataclasses.fields(cls):
            if field.metadata.get("option", True):
                help = texts.get(field.name, "") + _default_text(field.name)
                flags = "--" + field.name.replace("_", "-")
                settings = {**_value(_TYPES[field.name]), **more.get(field.name, {})}
                if "auto" in field.metadata:
                    settings |= {"metavar": "N|auto", "type": _CountOrAuto(field.metadata["auto"])}
                if "metavar" in field.metadata:
                    settings |= {"metavar": field.metadata["metavar"], "type": str}
                options.append(click.option(flags, help=help, **settings))
    return together(*options)


class _CountOrAuto(click.types.IntParamType):
    """A whole number, or "auto" for the value that stands for it."""

    def __init__(self, auto: int):
        self.auto = auto

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return self.auto if value == "auto" else int(super().convert(value, param, ctx))


def _attributes(cls: type) -> dict[str, str]:
    """Attribute -> what the docstring of its class says of it, as a sentence."""
    found = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE)
    return {name: text[0].upper() + " ".join(text[1:].split()) for name, text in found}


def _default_text(name: str) -> str:
    """The default of a setting with the first recipe, and where another one has another."""
    words = {recipe: _words({**vars(config), **vars(config.loss)}[name]) for recipe, config in _DEFAULTS.items()}
    first, *_ = words.values()
    if name in ("recipe", "precision") or not first:  # --recipe shows its own; a GPU decides the other
        return ""
    others = ", ".join(f"{recipe}: {text}" for recipe, text in words.items() if text != first)
    return f" Default: {first} ({others})." if others else f" Default: {first}."


def _words(value: Any) -> str:
    """A value as it is written on the command line; nothing for a flag, and for what is not there."""
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _value(kind: Any) -> dict[str, Any]:
    """How an option takes a value of a type. An option that is left out is None: the recipe's."""
    if kind is bool:
        return {"is_flag": True, "default": None}
    if get_origin(kind) is Literal:
        return {"type": click.Choice(get_args(kind))}
    if get_origin(kind) is tuple:
        kinds = get_args(get_args(kind)[0])
        return {"metavar": "KIND,...|none", "callback": lambda _context, _option, text: _split_kinds(text, kinds)}
    return {"type": kind if kind in (int, float) else click.Path()}


def _split_kinds(text: str | None, kinds: tuple[str, ...]) -> tuple[str, ...] | None:
    """ "a, b" -> ("a", "b"), and "none" -> (). Nothing at all is refused: it would train without any."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise click.BadParameter(f"no kind in '{text}'; give some of {', '.join(kinds)}, or none")
    return () if names == ("none",) else names
