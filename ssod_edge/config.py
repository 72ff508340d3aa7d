"""Every setting, as frozen dataclasses. The names are the same on the command line and on disk."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from ssod_edge.errors import UsageError
from ssod_edge.json_reader import from_json, is_unicode

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

#: What a file name that is an image ends in, in data sets and in folders given to `predict`: names of the formats that
#: `ssod_edge.data.pixels` decodes.
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".ppm", ".pgm", ".pnm", ".tif", ".tiff", ".webp"),
        *(".jp2", ".j2k", ".avif", ".heic", ".heif"),
    )
)

#: Backbones whose published weights come with the extra `train`, so that no hub has to be reached.
PACKAGED = {"efficientnet_lite0": "tf_efficientnet_lite0"}

Recipe = Literal["short", "scratch", "paper"]
Head = Literal["last", "stages", "blocks"]
Tune = Literal["auto", "head", "branch", "upper", "all"]
Method = Literal["ssod", "lbf", "both", "ce"]
Balance = Literal["lwb", "lw", "dr"]
ClassWeights = Literal["none", "balanced"]
Outlier = Literal["rotate", "shuffle", "zoom", "blend"]
Precision = Literal["fp32", "bf16"]
Kernel = Literal["auto", "reference"]
ScoreName = Literal["ssod", "msp", "maxlogit", "energy", "gen", "posterior"]
DetectorName = Literal["vim", "residual", "mahalanobis", "rmd", "mahalanobispp", "rmdpp", "knn"]

METHODS: tuple[str, ...] = get_args(Method)
BALANCES: tuple[str, ...] = get_args(Balance)
CLASS_WEIGHTS: tuple[str, ...] = get_args(ClassWeights)
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

#: The score of a model whose images are not at hand.
DEFAULT_SCORE: ScoreName = "energy"
#: The score of a model whose images are at hand, until the evidence is for another: doubt between the classes, or far
#: from all of them.
PRIOR_SCORE = "gen+mahalanobispp"
#: The same where training has left published features alone: or outside of what all training images span. Features that
#: were tuned to the known classes span little else, and a class that looks like these lies in it
#: (docs/lab/detection.md).
UNTOUCHED_SCORE = f"{PRIOR_SCORE}+residual"
#: What a run's `tuned` says where training has left the backbone alone.
UNTOUCHED = ("head", "branch")


def prior_score(tuned: str) -> str:
    """`UNTOUCHED_SCORE` or `PRIOR_SCORE`, by a run's `tuned`: see `UNTOUCHED`."""
    return UNTOUCHED_SCORE if tuned in UNTOUCHED else PRIOR_SCORE


def resolve_backbone(name: str) -> str:
    """timm's name for a backbone: an alias, or a timm name as it is."""
    return {**ALIASES, **PACKAGED}.get(name, name)


def score_parts(name: str) -> tuple[str, ...]:
    """The scores that a shipped score is the sum of: "energy+rmd" -> ("energy", "rmd"); of most, the one itself.

    Raises:
        UsageError: a part that is no score, or the same one twice.
    """
    parts = tuple(name.split("+"))
    if unknown := [part for part in parts if part not in SHIPPED_SCORES]:
        raise UsageError(
            f"score must be one of {', '.join(SHIPPED_SCORES)}, or a sum of some such as energy+rmd, got '{unknown[0]}'"
        )
    if len(set(parts)) < len(parts):
        raise UsageError(f"the score '{name}' has one part twice")
    return parts


def has_state(name: str) -> bool:
    """Whether a shipped score is fitted on training features: a detector, and every sum."""
    return len(score_parts(name)) > 1 or name in DETECTORS


def check_gamma(gamma: float) -> None:
    """Raises UsageError unless 0.5 < gamma < 1 (at 0.5 the two label regions of Eq. 12 meet)."""
    if not 0.5 < gamma < 1.0:
        raise UsageError(f"gamma must satisfy 0.5 < gamma < 1, got {gamma}")


def check(config: object, name: str, good: bool, expected: str) -> None:
    """Raises UsageError unless the value of a setting is good, with what was expected and what it is."""
    if not good:
        value = getattr(config, name)
        shown = f"'{value}'" if isinstance(value, str) else value
        raise UsageError(f"{name} must be {expected}, got {shown}")


def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression that is meant by `group`; raises UsageError where it is none."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"group must be a regular expression, got '{pattern[:100]}' ({error})") from error


#: What `Preprocess.version` counts: 1 decodes every image in full; 2 decodes a large JPEG at a reduced scale.
PIXELS_VERSION = 2
Fit = Literal["crop", "squash", "pad"]
FITS: tuple[str, ...] = get_args(Fit)


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the graph's input: a region, a fit and one resize, then uint8 RGB.

    Attributes:
        input_size: height and width of the input in pixels.
        crop_pct: share of the shorter side that the centre crop keeps, in (0, 1]; for fit "crop" alone.
        interpolation: "bicubic" or "bilinear".
        mean, std: per RGB channel, of values scaled to [0, 1]; applied inside the graph.
        fit: how what is no square becomes one. "crop" keeps the centred square; "squash" keeps everything and its
            sides change their ratio; "pad" keeps everything and the ratio, between bars in the mean colour.
        roi: the region that is looked at, x, y, width and height in pixels of the upright image, for a camera that
            does not move; None for all of it.
        version: of the way from a file to pixels, at most `PIXELS_VERSION`. What was made with an earlier one keeps it.
    """

    input_size: int = 224
    crop_pct: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    fit: Fit = "crop"
    roi: tuple[int, int, int, int] | None = None
    version: int = PIXELS_VERSION

    def __post_init__(self) -> None:
        check(self, "input_size", self.input_size >= 1, "at least 1 pixel")
        check(self, "crop_pct", 0 < self.crop_pct <= 1, "in (0, 1]")
        check(self, "interpolation", self.interpolation in ("bicubic", "bilinear"), "'bicubic' or 'bilinear'")
        if len(self.mean) != 3 or len(self.std) != 3 or any(s <= 0 for s in self.std):
            raise UsageError("mean and std must have three values each, and std must be positive")
        check(self, "fit", self.fit in FITS, f"one of {', '.join(FITS)}")
        if self.roi is not None and (len(self.roi) != 4 or min(self.roi[:2]) < 0 or min(self.roi[2:]) < 1):
            raise UsageError(f"roi must be x, y, width, height in pixels, such as 0,120,640,480, got {self.roi}")
        if not 1 <= self.version <= PIXELS_VERSION:
            raise UsageError(
                f"preprocessing of version {self.version}; this release knows 1 to {PIXELS_VERSION}. "
                "Install a newer one (docs/install.md)"
            )

    def changed(self, **settings: Any) -> Preprocess:
        """With these settings in place of its own; None leaves one as it is."""
        return dataclasses.replace(self, **{name: value for name, value in settings.items() if value is not None})

    @staticmethod
    def complete(values: dict[str, Any]) -> dict[str, Any]:
        """The JSON of an earlier release with the fields that it had no need of (`ssod_edge.json_reader`)."""
        earlier = values.keys() == {"input_size", "crop_pct", "interpolation", "mean", "std"}
        return {**values, "fit": "crop", "roi": None, "version": 1} if earlier else values


#: `train`, `study` and `reproduce` have every field of the two classes below as an option, whose help is the field's
#: line in the docstring (`ssod_edge.cli.options`); but not those that bear this.
NO_OPTION = {"option": False}


@dataclass(frozen=True)
class LossConfig:
    """L = CE(logits, y) + alpha * OOD loss + the terms that a setting below switches on.

    Spoiled copies of training images (`ssod_edge.detect.made_images`) teach the OOD row on the pooled feature, which
    is what is read at inference. `lbf` is arXiv 2510.12259: the mean L2 norm of background features.

    Attributes:
        method: what patches of background teach. `ce`: nothing; classes are learnt by cross-entropy, unknowns from
            spoiled copies (--outliers). `ssod`: the paper's way, they train the output that says "unknown". `lbf`:
            their features become small. `both`: ssod and lbf.
        gamma: confidence from which a patch shows a known thing, in (0.5, 1); below 1 - gamma it is background (Eq. 12
            of the paper).
        alpha: weight of what patches teach about "unknown" (Eq. 14); 0 leaves it out.
        patch_balance: how the few patches of known things count beside the many of background (Table 5). `lwb`: half
            each; `lw`: background weighted down to their number; `dr`: as many of each, drawn at random.
        outliers: training also shows the network spoiled copies of your photos (turned, shuffled, zoomed, blended) and
            teaches it to call them unknown. Which kinds, comma-separated; with --method only those named here.
        outlier_share: spoiled copies in a batch, as a share of its photos, in (0, 1].
        warmup_epochs: epochs that teach the classes alone, before anything about "unknown"; with a --method of patches
            and --recipe scratch 10.
    """

    method: Method = "ssod"
    gamma: float = 0.95
    alpha: float = 1.0
    patch_balance: Balance = "lwb"
    outliers: tuple[Outlier, ...] = ()
    outlier_share: float = 0.5
    warmup_epochs: float = 1.0

    def __post_init__(self) -> None:
        check_gamma(self.gamma)
        check(self, "method", self.method in METHODS, f"one of {', '.join(METHODS)}")
        check(self, "patch_balance", self.patch_balance in BALANCES, f"one of {', '.join(BALANCES)}")
        unknown = [kind for kind in self.outliers if kind not in OUTLIERS]
        if unknown or len(set(self.outliers)) < len(self.outliers):
            raise UsageError(
                f"outliers must be different ones of {', '.join(OUTLIERS)}, got '{','.join(self.outliers)}'"
            )
        check(self, "outlier_share", 0 < self.outlier_share <= 1, "in (0, 1]")
        for name in ("alpha", "warmup_epochs"):
            check(self, name, 0 <= getattr(self, name) < float("inf"), "0 or more")

    @staticmethod
    def complete(values: dict[str, Any]) -> dict[str, Any]:
        """The settings of an earlier release, which called `patch_balance` `balance` and had two weights more."""
        values = {key: value for key, value in values.items() if key not in ("norm_weight", "outlier_weight")}
        if "balance" not in values or "patch_balance" in values:
            return values
        return {"patch_balance" if key == "balance" else key: value for key, value in values.items()}

    @property
    def trains_row_on_patches(self) -> bool:
        """Whether background patches teach the OOD row."""
        return self.method in ("ssod", "both") and self.alpha > 0

    @property
    def shrinks_background(self) -> bool:
        """Whether the norm of background features is part of the loss."""
        return self.method in ("lbf", "both")

    @property
    def labels_patches(self) -> bool:
        """Whether a term of the loss is over patches."""
        return self.trains_row_on_patches or self.shrinks_background

    @property
    def trains_row_on_outliers(self) -> bool:
        """Whether images that were made teach the OOD row."""
        return bool(self.outliers)

    @property
    def trains_row(self) -> bool:
        """Whether anything moves the OOD row, so that `ssod` and `posterior` say something."""
        return self.trains_row_on_patches or self.trains_row_on_outliers

    @property
    def is_plain(self) -> bool:
        """Whether this is cross-entropy and nothing else."""
        return not (self.trains_row or self.shrinks_background)


#: Values of `TrainConfig.weights` that are no file.
PUBLISHED, NO_WEIGHTS = "published", "none"
#: `TrainConfig.epochs` of --epochs auto, and the fewest that it stands for.
AUTO_EPOCHS, FEWEST_AUTO_EPOCHS = -1, 10


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        backbone: timm model name (aliases resolved).
        data: what `ssod_edge.data.sources.open_dataset` takes.
        val: validation photos of their own, as DATA. Then DATA is for training and calibration alone.
        group: regular expression that finds the burst, video or camera of a photo in its name. It is searched for in
            the name within DATA ("cat/video3_0012.jpg"); what its first group matches counts, or without one all of
            it. Photos of one never lie in two splits. Default: the column `group` of a table.
        negatives: photos of what must be unknown, as DATA without classes. Such as the empty belt, a hand, another
            product: 60% are learnt from, 20% choose the score, and eval judges by the rest. Default: none.
        name: of the run folder.
        recipe: where the other settings come from. `short`: AdamW, for few epochs. `scratch`: SGD, which gets a network
            without pretrained weights further. `paper`: the SSOD paper's, Appendix A.4.
        epochs: passes over the training photos. `auto`, from published weights: as many as make 1,000 training steps,
            but 10 to 40, and fewer where the validation photos gain nothing for a quarter of them; the weights or their
            running average are kept, by the same photos; 32 photos in a step and --lr 5e-4 with --recipe short.
        batch_size: photos in a training step, for each process.
        lr: peak learning rate.
        weight_decay: weight decay of the optimizer.
        lr_warmup_fraction: share of the steps in which the learning rate rises.
        clip_grad: largest norm of the gradient.
        val_fraction: share of the photos kept back to choose the best epoch and score by. Default: what makes 200
            photos, from 0.05 to 0.15.
        calib_fraction: share of the photos kept back for thresholds and int8. Default: as --val-fraction, but at least
            the 19 photos that a threshold for 95% needs where that is no more than a third.
        class_weights: how the classes count in the loss. `balanced`: each as much as the others, whatever number of
            photos it has; `none`: each photo as much as the others.
        half_size_epochs: first epochs at half the input size, at about a quarter of the cost.
        crop_scale_min: smallest random crop of a training photo, as a share of its area.
        hflip: probability of mirroring a training photo.
        precision: number format of the computation. Default: bf16 on a GPU, else fp32.
        kernel: what samples the patches. `auto`: compiled code where it was built; `reference`: plain PyTorch.
        workers: processes that read photos.
        seed: of the splits, the order of photos, the augmentation and new weights.
        compile: use torch.compile.
        head: what the last layer reads. `blocks`: every block of the backbone; `stages`: the last of each stage;
            `last`: its last features alone.
        tune: how much of the network learns your photos. `head`: its last layer alone, in seconds. `branch`: after that
            a small branch beside the backbone. `upper`: the upper half of the backbone, gently. `all`: everything.
            `auto`: `head`, and `branch` where there are photos enough and held-out ones say that it pays.
        weights: what training starts from. `published`: timm's weights of the backbone; `none`: random ones; or a
            .safetensors or .pth file, or a run's checkpoint.
        begun_from: the run or export that training goes on from, whose checkpoint `weights` names (`train --from`).
        begun_sha256: of that run's checkpoint, or of a taught export's `ssod.json`.
        loss: what the network is taught.
        preprocess: the backbone's own, with --size, --fit and --roi.
    """

    backbone: str = dataclasses.field(metadata=NO_OPTION)
    data: str = dataclasses.field(metadata=NO_OPTION)
    val: str | None = dataclasses.field(default=None, metadata={"metavar": "DATA"})
    group: str | None = dataclasses.field(default=None, metadata={"metavar": "PATTERN"})
    negatives: str | None = dataclasses.field(default=None, metadata={"metavar": "DATA"})
    name: str = dataclasses.field(default="", metadata=NO_OPTION)
    recipe: Recipe = "short"
    epochs: int = dataclasses.field(default=10, metadata={"auto": AUTO_EPOCHS})
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    lr_warmup_fraction: float = dataclasses.field(default=0.1, metadata=NO_OPTION)
    clip_grad: float = dataclasses.field(default=5.0, metadata=NO_OPTION)
    val_fraction: float | None = None
    calib_fraction: float | None = None
    class_weights: ClassWeights = "none"
    half_size_epochs: int = 0
    crop_scale_min: float = 0.5
    hflip: float = 0.5
    precision: Precision = "fp32"
    kernel: Kernel = "auto"
    workers: int = 1
    seed: int = 0
    compile: bool = False
    head: Head = "last"
    tune: Tune = "all"
    weights: str = NO_WEIGHTS
    begun_from: str | None = dataclasses.field(default=None, metadata=NO_OPTION)
    begun_sha256: str = dataclasses.field(default="", metadata=NO_OPTION)
    loss: LossConfig = dataclasses.field(default=LossConfig(), metadata=NO_OPTION)
    preprocess: Preprocess = dataclasses.field(default=Preprocess(), metadata=NO_OPTION)

    def __post_init__(self) -> None:
        for name in ("data", "val", "negatives", "weights", "begun_from", "group", "name"):
            # It goes into records, which are text.
            check(self, name, is_unicode(getattr(self, name) or ""), "text in UTF-8; rename the file or folder")
        compiled(self.group or "")
        auto = self.epochs == AUTO_EPOCHS
        check(self, "epochs", self.epochs >= 1 or auto, "at least 1")
        if auto and self.weights == NO_WEIGHTS:
            raise UsageError(
                "epochs auto is for published weights; random ones need more epochs. Give a number to --epochs"
            )
        check(self, "batch_size", self.batch_size >= 2, "at least 2 (batch norm needs two images)")
        check(self, "recipe", self.recipe in get_args(Recipe), f"one of {', '.join(get_args(Recipe))}")
        check(self, "precision", self.precision in ("fp32", "bf16"), "'fp32' or 'bf16'")
        check(self, "kernel", self.kernel in KERNELS, f"one of {', '.join(KERNELS)}")
        check(self, "lr", 0 < self.lr < float("inf"), "positive")
        check(self, "weight_decay", 0 <= self.weight_decay < float("inf"), "0 or more")
        check(self, "seed", 0 <= self.seed < 2**32, "0 or more and below 2**32")
        fewest = FEWEST_AUTO_EPOCHS if auto else self.epochs
        check(self, "half_size_epochs", 0 <= self.half_size_epochs < fewest, "0 or more and below epochs")
        if self.half_size_epochs and self.preprocess.input_size < 2:
            raise UsageError("half_size_epochs needs an input_size of at least 2 pixels, got 1")
        check(self, "workers", self.workers >= 0, "0 or more")
        for name in ("val_fraction", "calib_fraction"):
            check(self, name, getattr(self, name) is None or 0 < getattr(self, name) <= 1, "in (0, 1]")
        check(self, "crop_scale_min", 0 < self.crop_scale_min <= 1, "in (0, 1]")
        check(self, "hflip", 0 <= self.hflip <= 1, "in [0, 1]")
        if (self.val_fraction or 0) + (self.calib_fraction or 0) >= 1:
            raise UsageError("val_fraction and calib_fraction leave no images to train on")
        check(self, "head", self.head in get_args(Head), f"one of {', '.join(get_args(Head))}")
        check(self, "tune", self.tune in get_args(Tune), f"one of {', '.join(get_args(Tune))}")
        if self.tune != "all" and self.weights == NO_WEIGHTS:
            raise UsageError(
                f"tune {self.tune} keeps the features of trained weights, and random weights have none to keep. Use "
                "--tune all"
            )
        check(self, "class_weights", self.class_weights in CLASS_WEIGHTS, f"one of {', '.join(CLASS_WEIGHTS)}")
        check(self, "weights", self.weights != "", f"'{PUBLISHED}', '{NO_WEIGHTS}' or a file")

    @staticmethod
    def complete(values: dict[str, Any]) -> dict[str, Any]:
        """The settings of an earlier release, which had `sync_bn`, and `pretrained` beside `weights`."""
        values = {name: value for name, value in values.items() if name != "sync_bn"}
        if "pretrained" not in values:
            return values
        published = values.pop("pretrained")
        return {**values, "weights": PUBLISHED if published else values.get("weights") or NO_WEIGHTS}

    @property
    def weights_file(self) -> str | None:
        """The file that training starts from, if it starts from one."""
        return None if self.weights in (PUBLISHED, NO_WEIGHTS) else self.weights


T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """A configuration of what `dataclasses.asdict` gave of it; what is missing has its default.

    Raises:
        UsageError: an unknown key, or a value of another type or outside its range.
    """
    made: T = from_json(cls, values, defaults=True)
    return made


def setting_types() -> dict[str, Any]:
    """Name -> type of every setting of `TrainConfig` and its loss; of one that may be None, the other type."""
    kinds = {**get_type_hints(TrainConfig), **get_type_hints(LossConfig)}
    return {name: get_args(kind)[0] if NoneType in get_args(kind) else kind for name, kind in kinds.items()}
