"""Every setting, as frozen dataclasses. The names are the same on the command line and on disk."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from ssod_edge.errors import UsageError

#: The paper's backbones (Table 6) and the timm models they stand for.
ALIASES = {
    "mobilenetv3": "mobilenetv3_large_100",
    "regnet": "regnety_008_tv",
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "densenet121": "densenet121",
}

#: What a file name that is an image ends in, in data sets and in folders given to `predict`.
IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"))

Method = Literal["ssod", "lbf", "both", "ce"]
Balance = Literal["lwb", "lw", "dr"]
Outlier = Literal["rotate", "shuffle", "zoom", "blend"]
Precision = Literal["fp32", "bf16"]
Kernel = Literal["auto", "reference"]
ScoreName = Literal["ssod", "msp", "maxlogit", "energy", "posterior"]
DetectorName = Literal["vim", "mahalanobis", "rmd", "knn", "react", "ash", "scale"]

METHODS: tuple[str, ...] = get_args(Method)
BALANCES: tuple[str, ...] = get_args(Balance)
OUTLIERS: tuple[str, ...] = get_args(Outlier)
KERNELS: tuple[str, ...] = get_args(Kernel)
#: Scores of the logits and the ID logit alone.
SCORES: tuple[str, ...] = get_args(ScoreName)
#: Those that need the OOD row, which only training with the OOD loss gives a meaning.
NEED_OOD_ROW = ("ssod", "posterior")
#: Scores with a state that is fitted on training features, see `ssod_edge.detect.detectors`.
DETECTORS: tuple[str, ...] = get_args(DetectorName)
#: Everything that an export can ship, alone or as parts of a sum ("energy+rmd").
SHIPPED_SCORES = (*SCORES, *DETECTORS)
#: `export --score` of this name chooses one of them on held-out data.
AUTO_SCORE = "auto"

#: The score an artifact ships until a study has chosen another one for it.
DEFAULT_SCORE: ScoreName = "energy"


def resolve_backbone(name: str) -> str:
    """timm's name for a backbone: an alias of the paper's Table 6, or a timm name as it is."""
    return ALIASES.get(name, name)


#: Detectors whose rows read changed features, in a Gemm of their own.
OWN_GEMM = ("react", "ash")


def score_parts(name: str) -> tuple[str, ...]:
    """The scores that a shipped score is the sum of: "energy+rmd" -> ("energy", "rmd"); of most, the one itself.

    Raises:
        UsageError: a part that is no score, the same one twice, or two that each need a Gemm of their own.
    """
    parts = tuple(name.split("+"))
    if unknown := [part for part in parts if part not in SHIPPED_SCORES]:
        raise UsageError(
            f"score must be one of {', '.join(SHIPPED_SCORES)}, or a sum of some such as energy+rmd, got '{unknown[0]}'"
        )
    if len(set(parts)) < len(parts):
        raise UsageError(f"the score '{name}' has one part twice")
    if set(OWN_GEMM) <= set(parts):
        raise UsageError(f"{' and '.join(OWN_GEMM)} cannot be in one sum: each has a Gemm of its own, got '{name}'")
    return parts


def has_state(name: str) -> bool:
    """Whether a shipped score is fitted on training features: a detector, and every sum."""
    return len(score_parts(name)) > 1 or name in DETECTORS


def check_gamma(gamma: float) -> None:
    """Raises UsageError unless 0.5 < gamma < 1 (at 0.5 the two label regions of Eq. 12 meet)."""
    if not 0.5 < gamma < 1.0:
        raise UsageError(f"gamma must satisfy 0.5 < gamma < 1, got {gamma}")


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the graph's input: one centre crop and one resize, then uint8 RGB.

    Attributes:
        input_size: height and width of the input in pixels.
        crop_pct: share of the shorter side that the centre crop keeps, in (0, 1].
        interpolation: "bicubic" or "bilinear".
        mean, std: per RGB channel, of values scaled to [0, 1]; applied inside the graph.
    """

    input_size: int = 224
    crop_pct: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.input_size < 1:
            raise UsageError(f"input_size must be at least 1 pixel, got {self.input_size}")
        if not 0 < self.crop_pct <= 1:
            raise UsageError(f"crop_pct must be in (0, 1], got {self.crop_pct}")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise UsageError(f"interpolation must be 'bicubic' or 'bilinear', got '{self.interpolation}'")
        if len(self.mean) != 3 or len(self.std) != 3 or any(s <= 0 for s in self.std):
            raise UsageError("mean and std must have three values each, and std must be positive")


@dataclass(frozen=True)
class LossConfig:
    """L = CE(logits, y) + alpha * OOD loss + the terms that a setting below switches on.

    Attributes:
        method: what background patches teach. "ssod": the OOD row (Eq. 12 to 14 of the paper); "lbf": features, whose
            L2 norm shrinks (arXiv 2510.12259); "both"; or "ce", nothing.
        gamma: confidence from which a patch is ID; below 1 - gamma it is OOD. 0.5 < gamma < 1.
        alpha: weight of the OOD loss (Table 4). 0 leaves it out.
        balance: "lwb", "lw" or "dr" (Table 5).
        norm_weight: weight of the mean L2 norm of background features, where the method has it.
        outliers: kinds of images that are made from training images and no class describes
            (`ssod_edge.detect.made_images`). The OOD row learns to tell them from the training images, on the pooled
            feature that is read at inference.
        outlier_share: made images of a batch, as a share of its own; in (0, 1].
        outlier_weight: weight of that term.
        warmup_epochs: epochs of cross-entropy alone, before any other term; patch labels mean nothing until then.
    """

    method: Method = "ssod"
    gamma: float = 0.95
    alpha: float = 1.0
    balance: Balance = "lwb"
    norm_weight: float = 0.05
    outliers: tuple[Outlier, ...] = ()
    outlier_share: float = 0.5
    outlier_weight: float = 1.0
    warmup_epochs: float = 1.0

    def __post_init__(self) -> None:
        check_gamma(self.gamma)
        for name, choices in (("method", METHODS), ("balance", BALANCES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, got '{getattr(self, name)}'")
        unknown = [kind for kind in self.outliers if kind not in OUTLIERS]
        if unknown or len(set(self.outliers)) < len(self.outliers):
            raise UsageError(
                f"outliers must be different ones of {', '.join(OUTLIERS)}, got '{','.join(self.outliers)}'"
            )
        if not 0 < self.outlier_share <= 1:
            raise UsageError(f"outlier_share must be in (0, 1], got {self.outlier_share}")
        for name in ("alpha", "norm_weight", "outlier_weight", "warmup_epochs"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name} must be 0 or more, got {getattr(self, name)}")

    @property
    def trains_row_on_patches(self) -> bool:
        """Whether background patches teach the OOD row."""
        return self.method in ("ssod", "both") and self.alpha > 0

    @property
    def shrinks_background(self) -> bool:
        """Whether the norm of background features is part of the loss."""
        return self.method in ("lbf", "both") and self.norm_weight > 0

    @property
    def labels_patches(self) -> bool:
        """Whether a term of the loss is over patches."""
        return self.trains_row_on_patches or self.shrinks_background

    @property
    def trains_row_on_outliers(self) -> bool:
        """Whether images that were made teach the OOD row."""
        return bool(self.outliers) and self.outlier_weight > 0

    @property
    def trains_row(self) -> bool:
        """Whether anything moves the OOD row, so that `ssod` and `posterior` say something."""
        return self.trains_row_on_patches or self.trains_row_on_outliers

    @property
    def is_plain(self) -> bool:
        """Whether this is cross-entropy and nothing else."""
        return not (self.trains_row or self.shrinks_background)


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        backbone: timm model name (aliases resolved).
        data: what `ssod_edge.data.sources.open_dataset` takes.
        recipe: "short" (AdamW, a warm-up and a cosine), "scratch" (the same schedule with SGD, which gets a network
            without pretrained weights further in few epochs) or "paper" (AdamW at 1e-4, halved every 30 epochs).
        epochs, batch_size, lr, weight_decay: the optimizer's. batch_size is per process.
        val_fraction, calib_fraction: shares of the training data kept for choices and for thresholds.
        half_size_epochs: first epochs trained at half the input size, at about a quarter of the cost; the last
            epochs, validation and deployment use the full size.
        crop_scale_min: smallest area of a random training crop, as a share of the image.
        hflip: probability of mirroring a training image.
        kernel: what samples the patches; see `ssod_edge.ops.kernel_in_use`.
        precision: "bf16" autocast or "fp32".
    """

    backbone: str
    data: str
    name: str = ""
    recipe: Literal["short", "scratch", "paper"] = "short"
    epochs: int = 10
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    lr_warmup_fraction: float = 0.1
    clip_grad: float = 5.0
    val_fraction: float = 0.05
    calib_fraction: float = 0.05
    half_size_epochs: int = 0
    crop_scale_min: float = 0.5
    hflip: float = 0.5
    precision: Precision = "fp32"
    kernel: Kernel = "auto"
    workers: int = 1
    seed: int = 0
    compile: bool = False
    sync_bn: bool = False
    pretrained: bool = False
    weights: str | None = None
    loss: LossConfig = LossConfig()
    preprocess: Preprocess = Preprocess()

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UsageError(f"epochs must be at least 1, got {self.epochs}")
        if self.batch_size < 2:
            raise UsageError(f"batch_size must be at least 2 (batch norm needs two images), got {self.batch_size}")
        if self.recipe not in RECIPES:
            raise UsageError(f"recipe must be one of {', '.join(RECIPES)}, got '{self.recipe}'")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"precision must be 'fp32' or 'bf16', got '{self.precision}'")
        if self.kernel not in KERNELS:
            raise UsageError(f"kernel must be one of {', '.join(KERNELS)}, got '{self.kernel}'")
        if not 0 < self.lr < float("inf"):
            raise UsageError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed must be 0 or more and below 2**32, got {self.seed}")
        if not 0 <= self.half_size_epochs < self.epochs:
            raise UsageError(f"half_size_epochs must be 0 or more and below epochs, got {self.half_size_epochs}")
        if self.half_size_epochs and self.preprocess.input_size < 2:
            raise UsageError("half_size_epochs needs an input_size of at least 2 pixels, got 1")
        if self.workers < 0:
            raise UsageError(f"workers must be 0 or more, got {self.workers}")
        for field in ("val_fraction", "calib_fraction", "crop_scale_min"):
            if not 0 < getattr(self, field) <= 1:
                raise UsageError(f"{field} must be in (0, 1], got {getattr(self, field)}")
        if self.val_fraction + self.calib_fraction >= 1:
            raise UsageError("val_fraction and calib_fraction leave no images to train on")
        if not 0 <= self.hflip <= 1:
            raise UsageError(f"hflip must be in [0, 1], got {self.hflip}")
        if self.pretrained and self.weights:
            raise UsageError("--pretrained and --weights exclude each other")


#: Kinds of made images that training takes where none are named. "rotate" finds unknown objects best; where training
#: images lie in all orientations, it costs little (docs/detection.md).
DEFAULT_OUTLIERS = OUTLIERS

#: Settings that a recipe changes; an option on the command line wins over them.
RECIPES: dict[str, dict[str, Any]] = {
    # Made images and no patches: until a network is good, most of the patches that Eq. 12 calls OOD are of images it
    # gets wrong, and they undo what the made ones teach (docs/detection.md).
    "short": {"loss": {"method": "ce", "outliers": DEFAULT_OUTLIERS}},
    "scratch": {
        "lr": 0.05,
        "batch_size": 64,
        "epochs": 30,
        "weight_decay": 5e-4,
        "loss": {"method": "ce", "outliers": DEFAULT_OUTLIERS},
    },
    # The method of the paper, patches alone. Appendix A.4: AdamW at 1e-4, halved every 30 epochs, 256 images a batch,
    # 224 px. Epochs are not given there.
    "paper": {"lr": 1e-4, "batch_size": 256, "epochs": 60, "weight_decay": 0.01, "loss": {"warmup_epochs": 0.0}},
}

#: Where a method with patches is given: their loss has to wait. While next to no patch is labelled ID, LWB gives these
#: few half of it, and MobileNetV3 stops learning (docs/results.md).
PATCH_WARMUP_EPOCHS = {"scratch": 10.0}

#: Settings of `LossConfig` that say how patches are labelled and weighed.
PATCH_SETTINGS = {"gamma", "alpha", "balance", "norm_weight"}

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON-ready values; `from_dict` reads it back."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Build a configuration dataclass from a mapping.

    Raises:
        UsageError: an unknown key, or a value outside its range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UsageError(f"unknown {cls.__name__} key: {', '.join(unknown)}. Known keys: {', '.join(sorted(fields))}")
    nested = {"loss": LossConfig, "preprocess": Preprocess}
    prepared: dict[str, Any] = {}
    for key, value in values.items():
        if key in nested and isinstance(value, dict):
            value = from_dict(nested[key], value)
        elif isinstance(value, list):
            value = tuple(value)
        prepared[key] = value
    try:
        return cls(**prepared)
    except TypeError as error:
        raise UsageError(f"{cls.__name__}: {error}") from error


def train_config(recipe: str, options: dict[str, Any]) -> TrainConfig:
    """Settings from a recipe and the options given beside it; those that are None are left to the recipe.

    A method that is given comes without the recipe's made outliers: it trains what its name says, and outliers that are
    named beside it.

    Raises:
        UsageError: an unknown recipe or key, a value out of range, or a setting of patches where none are trained on
            and no method was given.
    """
    if recipe not in RECIPES:
        raise UsageError(f"recipe must be one of {', '.join(RECIPES)}, got '{recipe}'")
    loss_keys = {field.name for field in dataclasses.fields(LossConfig)}
    given = {key: value for key, value in options.items() if value is not None}
    base = dict(RECIPES[recipe])
    asked = {key: given.pop(key) for key in loss_keys & set(given)}
    loss = {**base.pop("loss", {}), **asked}
    if "method" in asked:
        loss["outliers"] = asked.get("outliers", ())
    if asked.get("method", "ce") != "ce" and recipe in PATCH_WARMUP_EPOCHS:
        loss.setdefault("warmup_epochs", PATCH_WARMUP_EPOCHS[recipe])
    config: TrainConfig = from_dict(TrainConfig, {**base, **given, "recipe": recipe, "loss": loss})
    unused = sorted(PATCH_SETTINGS & set(asked))
    if unused and "method" not in asked and config.loss.method == "ce":
        raise UsageError(
            f"{', '.join(unused)}: a setting of background patches, and recipe '{recipe}' trains on none by itself. "
            "Add --method ssod (or lbf, both)"
        )
    return config
