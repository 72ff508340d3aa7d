"""How a network is trained unless somebody says otherwise: what each recipe sets, and what options mean beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

from ssod_edge.config import AUTO_EPOCHS, NO_WEIGHTS, OUTLIERS, PUBLISHED, LossConfig, TrainConfig, from_dict
from ssod_edge.errors import UsageError

#: What the recipes but the paper's teach: made images and no patches. Until a network is good, most of the patches that
#: Eq. 12 calls OOD are of images it gets wrong, and they undo what the made ones teach (docs/lab/detection.md).
#: Of the kinds "rotate" finds unknown objects best; where training images lie in all orientations, it costs little.
_MADE_IMAGES = {"method": "ce", "outliers": OUTLIERS}
#: Settings that a recipe changes; an option on the command line wins over them.
RECIPES: dict[str, dict[str, Any]] = {
    "short": {"weights": PUBLISHED, "tune": "auto", "class_weights": "balanced", "loss": _MADE_IMAGES},
    "scratch": {"lr": 0.05, "batch_size": 64, "epochs": 30, "weight_decay": 5e-4, "loss": _MADE_IMAGES},
    # The method of the paper, patches alone. Appendix A.4: AdamW at 1e-4, halved every 30 epochs, 256 images a batch,
    # 224 px. Epochs are not given there.
    "paper": {"lr": 1e-4, "batch_size": 256, "epochs": 60, "weight_decay": 0.01, "loss": {"warmup_epochs": 0.0}},
}

#: What --epochs auto brings along with recipe "short". At 128 photos a step, a thousand of them are eight steps an
#: epoch; docs/lab/results.md has both side by side.
_AUTO = {"batch_size": 32, "lr": 5e-4}

#: Where a method with patches is given: their loss has to wait. While next to no patch is labelled ID, LWB gives these
#: few half of it, and MobileNetV3 stops learning (docs/lab/results.md).
PATCH_WARMUP_EPOCHS = {"scratch": 10.0}

#: Settings of `LossConfig` that say how patches are labelled and weighed.
PATCH_SETTINGS = {"gamma", "alpha", "patch_balance"}

#: Settings that only training of the whole network reads: --tune all is meant where one of them is given.
WHOLE_SETTINGS = {
    *("batch_size", "weight_decay", "half_size_epochs", "crop_scale_min", "compile"),
    *("epochs", "lr", *(field.name for field in dataclasses.fields(LossConfig))),
}


def train_config(recipe: str, options: dict[str, Any]) -> TrainConfig:
    """Settings from a recipe and the options given beside it; those that are None are left to the recipe.

    A method that is given comes without the recipe's made outliers: it trains what its name says, and outliers that are
    named beside it. With random weights, and where one of `WHOLE_SETTINGS` is given, the whole network is trained;
    where it is not, made images are not used either.

    Raises:
        UsageError: an unknown recipe or key, a value out of range, a setting of patches where none are trained on and
            no method was given, or one of `WHOLE_SETTINGS` where the whole network is not trained.
    """
    if recipe not in RECIPES:
        raise UsageError(f"recipe must be one of {', '.join(RECIPES)}, got '{recipe}'")
    given = {key: value for key, value in options.items() if value is not None}
    base = dict(RECIPES[recipe])
    asked = {field.name: given.pop(field.name) for field in dataclasses.fields(LossConfig) if field.name in given}
    loss = {**base.pop("loss", {}), **asked}
    if "method" in asked:
        loss["outliers"] = asked.get("outliers", ())
    if asked.get("method", "ce") != "ce" and recipe in PATCH_WARMUP_EPOCHS:
        loss.setdefault("warmup_epochs", PATCH_WARMUP_EPOCHS[recipe])
    whole = sorted(WHOLE_SETTINGS & {*asked, *given})
    if "tune" not in given and (whole or given.get("weights", base.get("weights", NO_WEIGHTS)) == NO_WEIGHTS):
        base["tune"] = "all"
    if recipe == "short" and given.get("epochs") == AUTO_EPOCHS:
        base |= _AUTO
    tune = given.get("tune", base.get("tune", "all"))
    if tune != "all":
        if whole:
            raise UsageError(
                f"{', '.join(whole)}: only training of the whole network reads this. Add --tune all, or leave it out"
            )
        base, loss = {**base, "head": "blocks"}, {"method": "ce"}
    config: TrainConfig = from_dict(TrainConfig, {**base, **given, "recipe": recipe, "loss": loss})
    unused = sorted(PATCH_SETTINGS & set(asked))
    if unused and "method" not in asked and config.loss.method == "ce":
        raise UsageError(
            f"{', '.join(unused)}: a setting of background patches, which recipe '{recipe}' does not train on. "
            "Add --method ssod (or lbf, both)"
        )
    return config
