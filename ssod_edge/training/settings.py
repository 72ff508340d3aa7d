"""The settings of a new run, from the options that a user gives."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ssod_edge.config import NO_WEIGHTS, PUBLISHED, Preprocess, TrainConfig, resolve_backbone
from ssod_edge.data.layout import DATA_FILES, PARTS
from ssod_edge.json_reader import from_json
from ssod_edge.recipes import RECIPES, train_config
from ssod_edge.training.begun import Begun
from ssod_edge.training.checkpoint import is_checkpoint, load_checkpoint
from ssod_edge.training.model import backbone_preprocess


def run_config(data: str, options: dict[str, Any], runs: str | Path = "runs") -> TrainConfig:
    """The settings of `start_run`.

    Args:
        data: to train on.
        options: of `train_config`, and `size`; beside `begun_from`, the backbone may be None.
        runs: folder of runs, where that of a taught export is looked for.

    Raises:
        UsageError: no such backbone, a value out of range, or one that contradicts `begun_from`.
        ArtifactError: the checkpoint that training is to start from cannot be read.
    """
    options = {**options, "data": data}
    asked = {"input_size": options.pop("size"), "fit": options.pop("fit", None), "roi": options.pop("roi", None)}
    if (begun_from := options.get("begun_from")) is not None:
        options = Begun.at(begun_from, runs).options(options, asked)
    else:
        options["backbone"] = resolve_backbone(options["backbone"])
        options["preprocess"] = _preprocess(options, asked)
    options["preprocess"] = asdict(options["preprocess"])
    if options.get("precision") is None:
        # bf16 is slower than fp32 on CPUs without the instructions for it, and for MobileNetV3 on all.
        options["precision"] = "bf16" if torch.cuda.is_available() else "fp32"
    return train_config(options.pop("recipe"), options)


def _preprocess(options: dict[str, Any], asked: dict[str, Any]) -> Preprocess:
    """Of the weights that training starts from, but for what is asked for."""
    weights = options.get("weights") or RECIPES.get(options["recipe"], {}).get("weights", NO_WEIGHTS)
    if weights not in (PUBLISHED, NO_WEIGHTS) and is_checkpoint(weights):  # whose images go through what they did
        preprocess = from_json(Preprocess, load_checkpoint(Path(weights))[1]["preprocess"], "preprocess")
    else:
        preprocess = backbone_preprocess(options["backbone"], asked["input_size"], weights != NO_WEIGHTS)
    return preprocess.changed(**asked)


def default_name(config: TrainConfig) -> str:
    """Run folder name: "<backbone>-<data set>"."""
    # Of "." and "..", the folder's own name.
    path = os.path.abspath(config.data) if os.path.exists(config.data) else config.data.replace(":", "-")
    name = _base(path)
    if PARTS.get(name.lower()) and (around := _base(os.path.dirname(path))):  # there is one in every data set
        name = f"{around}-{name}"
    return f"{config.backbone}-{name or 'data'}"


def _base(path: str) -> str:
    base, suffix = os.path.splitext(Path(path).name)
    return base if suffix in DATA_FILES else base + suffix
