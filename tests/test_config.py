"""Settings: every value is checked where it is made, and JSON gives the same settings back."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from ssod_edge.config import (
    ALIASES,
    AUTO_EPOCHS,
    OUTLIERS,
    LossConfig,
    Preprocess,
    TrainConfig,
    from_dict,
    resolve_backbone,
)
from ssod_edge.errors import UsageError
from ssod_edge.recipes import RECIPES, train_config


def test_json_gives_the_same_settings_back():
    config = TrainConfig(
        "resnet18", "photos", loss=LossConfig(gamma=0.9, patch_balance="dr"), preprocess=Preprocess(96)
    )
    assert from_dict(TrainConfig, json.loads(json.dumps(asdict(config)))) == config


def test_settings_of_an_earlier_release_keep_their_meaning():
    earlier = {**asdict(TrainConfig("resnet18", "photos")), "val_fraction": 0.05, "calib_fraction": 0.05}
    earlier["loss"]["balance"] = earlier["loss"].pop("patch_balance")
    for new in ("val", "group", "class_weights"):
        del earlier[new]
    config = from_dict(TrainConfig, {**earlier, "loss": {**earlier["loss"], "balance": "dr"}})
    assert config.loss.patch_balance == "dr" and (config.val_fraction, config.calib_fraction) == (0.05, 0.05)
    assert config.class_weights == "none" and config.val is None and config.group is None
    with pytest.raises(UsageError, match="unknown LossConfig key: balance"):
        from_dict(LossConfig, {"balance": "dr", "patch_balance": "lw"})


def test_class_weights_are_balanced_by_the_short_recipe_alone():
    found = {recipe: train_config(recipe, {"backbone": "x", "data": "y"}).class_weights for recipe in RECIPES}
    assert found == {"short": "balanced", "scratch": "none", "paper": "none"}


@pytest.mark.parametrize("gamma", [0.5, 1.0, 0.0, -0.7, 1.5, float("nan")])
def test_gamma_outside_its_range_is_refused(gamma):
    with pytest.raises(UsageError, match="0.5 < gamma < 1"):
        LossConfig(gamma=gamma)


@pytest.mark.parametrize("gamma", [0.500001, 0.95, 0.999999])
def test_gamma_inside_its_range_is_taken(gamma):
    assert LossConfig(gamma=gamma).gamma == gamma


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (LossConfig, {"alpha": -1.0}, "alpha must be 0 or more"),
        (LossConfig, {"patch_balance": "none"}, "one of lwb, lw, dr"),
        (LossConfig, {"warmup_epochs": -1.0}, "warmup_epochs"),
        (Preprocess, {"input_size": 0}, "at least 1 pixel"),
        (Preprocess, {"crop_pct": 1.1}, "crop_pct"),
        (Preprocess, {"interpolation": "nearest"}, "'bicubic' or 'bilinear'"),
        (Preprocess, {"std": (0.1, 0.0, 0.1)}, "positive"),
        (TrainConfig, {"epochs": 0}, "epochs must be at least 1"),
        (TrainConfig, {"epochs": AUTO_EPOCHS}, "epochs auto is for published weights"),
        (TrainConfig, {"epochs": AUTO_EPOCHS, "weights": "published", "half_size_epochs": 10}, "below epochs"),
        (TrainConfig, {"batch_size": 1}, "batch_size must be at least 2 .*batch norm"),
        (TrainConfig, {"seed": -1}, "seed must be 0 or more"),
        (TrainConfig, {"seed": 2**32}, "below 2.*32"),
        (TrainConfig, {"weight_decay": -1.0}, "weight_decay must be 0 or more, got -1.0"),
        (TrainConfig, {"weight_decay": float("nan")}, "weight_decay must be 0 or more, got nan"),
        (TrainConfig, {"half_size_epochs": 1, "preprocess": {"input_size": 1}}, "half_size_epochs needs"),
        (TrainConfig, {"lr": 0.0}, "lr must be positive"),
        (TrainConfig, {"half_size_epochs": 10}, "below epochs"),
        (TrainConfig, {"val_fraction": 0.0}, "val_fraction"),
        (TrainConfig, {"class_weights": "equal"}, "class_weights must be 'none' or 'balanced'"),
        (TrainConfig, {"val_fraction": 0.5, "calib_fraction": 0.5}, "no images to train on"),
        (TrainConfig, {"hflip": 2.0}, "hflip"),
        (TrainConfig, {"workers": -1}, "workers"),
        (TrainConfig, {"precision": "fp16"}, "'fp32' or 'bf16'"),
        (TrainConfig, {"recipe": "long"}, "one of short, scratch, paper"),
        (TrainConfig, {"weights": ""}, "weights must be 'published', 'none' or a file"),
        (TrainConfig, {"learning": 1}, "unknown TrainConfig key: learning. Known keys: .*lr"),
    ],
)
def test_values_out_of_range_are_refused_by_name(cls, values, message):
    required = {"backbone": "resnet18", "data": "photos"} if cls is TrainConfig else {}
    with pytest.raises(UsageError, match=message):
        from_dict(cls, {**required, **values})


def test_missing_values_are_named():
    with pytest.raises(UsageError, match="backbone"):
        from_dict(TrainConfig, {"data": "photos"})


def test_aliases_are_the_papers_backbones_and_other_names_stay():
    assert resolve_backbone("regnet") == "regnety_008_tv" and len(ALIASES) == 7
    assert resolve_backbone("efficientnet_b0") == "efficientnet_b0"


@pytest.mark.parametrize(
    ("recipe", "loss", "method", "outliers"),
    [
        ("short", {}, "ce", ()),
        ("short", {"weights": "none"}, "ce", OUTLIERS),
        ("short", {"tune": "all"}, "ce", OUTLIERS),
        ("scratch", {"outliers": ("rotate",), "outlier_share": 0.25}, "ce", ("rotate",)),
        ("scratch", {"method": "both"}, "both", ()),
        ("short", {"method": "ce"}, "ce", ()),
        ("short", {"method": "ssod", "outliers": ("rotate",)}, "ssod", ("rotate",)),
        ("short", {"outliers": ()}, "ce", ()),
        ("paper", {}, "ssod", ()),
        ("paper", {"gamma": 0.9}, "ssod", ()),
    ],
)
def test_a_recipe_trains_on_made_images_and_a_method_on_what_its_name_says(recipe, loss, method, outliers):
    made = train_config(recipe, {"backbone": "resnet18", "data": "photos", **loss}).loss
    assert (made.method, made.outliers) == (method, outliers)
    assert made.warmup_epochs == (
        0.0 if recipe == "paper" else 10.0 if (recipe, method) == ("scratch", "both") else 1.0
    )


@pytest.mark.parametrize("setting", [{"gamma": 0.9}, {"alpha": 0.0}, {"patch_balance": "dr"}])
def test_a_setting_of_patches_without_patches_is_no_silent_one(setting):
    """Given beside `--method ce`, as in a grid, it stays."""
    options = {"backbone": "resnet18", "data": "photos", **setting}
    with pytest.raises(
        UsageError, match=f"{next(iter(setting))}: a setting of .* 'short' does not train on.* --method ssod"
    ):
        train_config("short", options)
    assert train_config("short", {**options, "method": "ce"}).loss.method == "ce"


def test_weights_of_the_loss_that_an_earlier_release_had_are_read_over():
    values = {"method": "lbf", "balance": "dr", "norm_weight": 0.3, "outlier_weight": 0.0}
    assert from_dict(LossConfig, values) == LossConfig(method="lbf", patch_balance="dr")


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ({"pretrained": False, "weights": None, "sync_bn": True}, "none"),
        ({"pretrained": True, "weights": None}, "published"),
        ({"pretrained": False, "weights": "w.pth"}, "w.pth"),
    ],
)
def test_the_weights_of_an_earlier_release_mean_what_they_meant(earlier, now):
    config = from_dict(TrainConfig, {"backbone": "b", "data": "d", **earlier})
    assert config.weights == now and config.weights_file == (now if now == "w.pth" else None)


@pytest.mark.parametrize("pattern", ["((", "a{99999999999999999999}", "(" * 5000 + ")" * 5000])
def test_a_group_that_is_no_pattern_is_told_with_the_settings(pattern: str) -> None:
    """Before weights are downloaded and images are listed."""
    with pytest.raises(UsageError, match="group must be a regular expression"):
        TrainConfig("resnet18", "photos", group=pattern)
