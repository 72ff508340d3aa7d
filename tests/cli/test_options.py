"""Options of training come from the settings: names, types, choices, help, and defaults as each recipe gives them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest
from click.testing import CliRunner

from ssod_edge.cli import main
from ssod_edge.config import AUTO_EPOCHS, LossConfig, TrainConfig, setting_types
from ssod_edge.errors import UsageError
from ssod_edge.recipes import PATCH_WARMUP_EPOCHS, RECIPES, train_config
from ssod_edge.studies.study import convert

FIELDS = {field.name: field for cls in (TrainConfig, LossConfig) for field in dataclasses.fields(cls)}
SETTINGS = [name for name, field in FIELDS.items() if "option" not in field.metadata]
COMMANDS = ("train", "study", "reproduce")
DATA = {"backbone": "resnet18", "data": "photos"}


def option(command: str, setting: str) -> click.Option:
    """Of a command, by its setting's name, which is that of its flag too."""
    (found,) = (param for param in main.commands[command].params if f"--{setting.replace('_', '-')}" in param.opts)
    assert isinstance(found, click.Option) and found.name == setting
    return found


def value(recipe: str, setting: str, **more: Any) -> Any:
    """What a recipe really gives."""
    config = train_config(recipe, {**DATA, **more})
    return getattr(config if hasattr(config, setting) else config.loss, setting)


def test_fields_that_are_no_options_say_so() -> None:
    own = {"backbone", "data", "name", "lr_warmup_fraction", "clip_grad", "loss", "preprocess"}
    own |= {"begun_from", "begun_sha256"}
    assert set(FIELDS) - set(SETTINGS) == own
    assert len(SETTINGS) == 29


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_every_setting_and_nothing_unknown_beside_them(command: str) -> None:
    names = {str(param.name) for param in main.commands[command].params}
    assert set(SETTINGS) <= names
    beside = {
        "train": {"data", "backbone", "size", "fit", "roi", "name", "out", "resume", "begun_from"},
        "study": {"data", "backbone", "size", "out", "seeds", "vary", "score"},
        "reproduce": {"table", "backbone", "size", "out", "seeds", "vary", "root", "check", "folder", "images"},
    }[command]
    evaluation = {"id_data", "ood_data", "via_size", "baselines", "fit_images"}
    assert names - set(SETTINGS) - beside <= evaluation


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_is_of_its_fields_type(command: str, setting: str) -> None:
    kind, found = setting_types()[setting], option(command, setting)
    if get_origin(kind) is Literal:
        assert isinstance(found.type, click.Choice) and tuple(found.type.choices) == get_args(kind)
    else:
        assert found.is_flag == (kind is bool)
        assert isinstance(found.type, click.types.IntParamType) == (kind is int)
        assert isinstance(found.type, click.types.FloatParamType) == (kind is float)
    # One that is not given leaves the setting to the recipe; which recipe, each command says.
    own = "paper" if command == "reproduce" else "short"
    assert main.commands[command].make_context(command, [*ARGUMENTS[command]]).params[setting] == (
        own if setting == "recipe" else None
    )


ARGUMENTS = {"train": ["x"], "study": ["x", "-o", "y"], "reproduce": ["cifar10", "--root", "x", "-o", "y"]}


@pytest.mark.parametrize("setting", SETTINGS)
def test_its_help_is_a_sentence_of_the_fields_docstring(setting: str) -> None:
    cls = TrainConfig if hasattr(TrainConfig, setting) else LossConfig
    text = str(option("train", setting).help)
    assert re.match(r"[A-Z].{10,}\.", text)
    said = text.partition(" Default: ")[0]
    assert said[1:] in " ".join(str(cls.__doc__).split())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_default_in_the_help_is_what_the_recipe_gives(setting: str, recipe: str) -> None:
    found = option("train", setting)
    default = re.search(r" Default: (\S+)(?: \((.*)\))?\.$", str(found.help))
    if setting in ("recipe", "precision") or found.is_flag:
        assert default is None
        return
    if value(recipe, setting) is None:  # what it stands for is a sentence
        assert " Default: " in str(found.help) or setting == "val"
        return
    assert default is not None, found.help
    others = dict(item.split(": ") for item in (default[2] or "").split(", ") if item)
    shown = ["x", found.opts[0], others.get(recipe, default[1])]
    assert main.commands["train"].make_context("train", shown).params[setting] == value(recipe, setting)


@pytest.mark.parametrize("command", COMMANDS)
def test_epochs_are_a_number_or_auto(command: str) -> None:
    for text, expected in (("auto", AUTO_EPOCHS), ("3", 3)):
        context = main.commands[command].make_context(command, [*ARGUMENTS[command], "--epochs", text])
        assert context.params["epochs"] == expected
    with pytest.raises(click.BadParameter, match="'many' is not a valid integer"):
        main.commands[command].make_context(command, [*ARGUMENTS[command], "--epochs", "many"])


def test_a_gpu_decides_the_precision() -> None:
    assert str(option("train", "precision").help).endswith(" Default: bf16 on a GPU, else fp32.")


def test_what_a_method_changes_is_said_where_it_is() -> None:
    assert f"--recipe scratch {value('scratch', 'warmup_epochs', method='ssod'):g}." in str(
        option("train", "warmup_epochs").help
    )
    assert PATCH_WARMUP_EPOCHS.keys() == {"scratch"} and value("short", "outliers", method="ssod") == ()
    assert "with --method only those named here" in str(option("train", "outliers").help)


@pytest.mark.parametrize("setting", ["recipe", "epochs", "gamma", "compile", "method", "outliers", "weights", "size"])
def test_a_grid_takes_every_setting(setting: str) -> None:
    texts = {"recipe": "paper", "epochs": "3", "gamma": "0.9", "compile": "true", "method": "ce", "size": "64",
             "outliers": "zoom+blend", "weights": "w.pth"}  # fmt: skip
    values = {**texts, "epochs": 3, "gamma": 0.9, "compile": True, "size": 64, "outliers": ("zoom", "blend")}
    assert convert(setting, texts[setting]) == values[setting]
    assert convert("epochs", "auto") == AUTO_EPOCHS
    with pytest.raises(UsageError, match="unknown setting"):
        convert("loss", "1")


def test_the_list_of_commands_is_in_whole_sentences() -> None:
    listed = CliRunner().invoke(main, ["--help"], terminal_width=80).output.partition("Commands:")[2]
    assert listed.count("\n") == len(main.commands) + 1 and "..." not in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "typo"], "data set 'typo' does not exist"),
        (["train", "typo/train"], "data set 'typo/train' does not exist"),
        (["train", "demo", "--weights", "typo.pth"], "weights file 'typo.pth' does not exist"),
        (["train", "demo", "--val", "typo"], "data set 'typo' does not exist"),
        (["train", "demo", "--negatives", "typo.tar"], "data set 'typo.tar' does not exist"),
        (["train", "torch/CIFAR10:typo"], "does not exist"),
        (["eval", "typo"], "checkpoint 'typo' does not exist"),
        (["eval", "--ood", "a=typo"], "data set 'typo' does not exist"),
        (["eval", "--id", "typo@list.txt"], "data set 'typo@list.txt' does not exist"),
        (["train", "demo", "--from", "typo"], "--from 'typo' does not exist"),
        (["study", "typo", "-o", "out"], "data set 'typo' does not exist"),
        (["study", "demo", "-o", "out", "--ood", "a=typo"], "data set 'typo' does not exist"),
        (["report", "typo"], "'typo' does not exist"),
        (["report", ".", "--ood", "a=typo"], "data set 'typo' does not exist"),
        (["export", "typo"], "checkpoint 'typo' does not exist"),
        (["export", "--id", "typo"], "data set 'typo' does not exist"),
        (["export", "--weights", "typo.pth", "--backbone", "mobilenetv3"], "weights file 'typo.pth' does not exist"),
        (["export", "--from", "typo.tar"], "'typo.tar' does not exist"),
        (["bench", "--id", "typo"], "data set 'typo' does not exist"),
        (["calibrate", "typo", "--id", "demo"], "'typo' does not exist"),
        (["train", "--resume", "typo"], "there is no run 'typo' to resume"),
        (["explain", "typo", "photo.jpg"], "checkpoint 'typo' does not exist"),
        (["train", "demo", "-o", "a-file/runs"], "a-file' is a file; give another folder than 'a-file/runs'"),
        (["study", "demo", "-o", "a-file"], "'a-file' is a file"),
        (["export", "-o", "a-file"], "'a-file' is a file"),
        (["export", "-o", "a-file/export"], "a-file' is a file"),
        (["export", "-o", "rtsp://user:SECRET@host/a"], "error: 'rtsp:/host' is an address"),
    ],
)
def test_wrong_paths_are_told_before_torch_is_imported(tmp_path: Path, arguments: list[str], message: str) -> None:
    """So also where the run that it would make exists already."""
    (tmp_path / "a-file").touch()
    code = "import sys; sys.modules['torch'] = None; from ssod_edge.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr, done.stderr
