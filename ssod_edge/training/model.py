"""A timm model with one linear layer on its features, which has one more row: the OOD head."""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import Any, cast

import timm
import timm.data
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ssod_edge.config import ALIASES, Head, Preprocess, resolve_backbone
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.memory import keep_freed_memory
from ssod_edge.training.published import packaged_weights, unavailable
from ssod_edge.training.stages import Branch, BranchShape, Place, find_stages, pooled, stage_maps

_OWN = "model.backbone."  # before a backbone's keys in a checkpoint of ssod-edge
_CHOOSE = "Choose another; most of timm's have one linear classifier on pooled features"
# What holds no pooling layer of the head: stages of the trunk.
_TRUNK = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Conv2d, nn.Linear)
_POOLS = ("SelectAdaptivePool2d", "FastAdaptiveAvgPool2d", "AdaptiveAvgPool2d")


class SSODClassifier(nn.Module):
    """Classes and ID logit from one feature vector: [logits | s] = z @ [W; w_ood].T + [b; b_ood].

    z is what the timm model's own classifier reads, of width D. With the head "stages" the pooled means of its stages'
    maps come before that, with "blocks" those of every block in them too, and before them what a branch makes of some
    of these maps, if there is one: z = [branch | stages | last], of width Dall.

    Attributes:
        backbone: the timm model; its classifier is the `nn.Linear` [M, D], or nothing if the head is not "last".
        linear: `nn.Linear` [M, Dall], or None with the head "last".
        head_kind: what the last layer reads: "blocks", "stages" or "last".
        stages: which of `ssod_edge.training.stages.stage_maps` are read; none with the head "last".
        widths: of their maps.
        branch: reads some of the stages' maps too; None: there is none.
        last_width: D.
        ood: `nn.Linear` [1, Dall], the OOD row; its output s is the ID logit of Eq. 13 and 15.
        classes: the M class names.
        preprocess: what the input image goes through; mean and std are applied by `normalise`.
        backbone_name: timm's name.
        no_patches: why `patch_features` has no meaning for this backbone; empty where it has one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        backbone_name: str,
        classes: tuple[str, ...],
        preprocess: Preprocess,
        head: Head = "last",
    ):
        super().__init__()
        self.backbone = backbone
        self.backbone_name = backbone_name
        self.classes = tuple(classes)
        self.preprocess = preprocess
        self.linear: nn.Linear | None = None
        self.head_kind = head
        self.stages: tuple[Place, ...] = ()
        self.widths: tuple[int, ...] = ()
        self.branch: Branch | None = None
        classifier: object = cast(Any, backbone).get_classifier()
        if not isinstance(classifier, nn.Linear):
            kind = type(classifier).__name__
            raise UsageError(f"backbone '{backbone_name}' ends in {kind}, not in one nn.Linear. {_CHOOSE}")
        self.last_width = classifier.in_features
        self.no_patches = _check_backbone(self)
        if head != "last":
            self.stages, self.widths = find_stages(backbone, backbone_name, preprocess.input_size, head == "blocks")
            self.linear = nn.Linear(sum(self.widths) + self.last_width, len(classes))
            nn.init.normal_(self.linear.weight, std=0.01)
            nn.init.zeros_(self.linear.bias)
            cast(Any, backbone).reset_classifier(0)
        self.ood = nn.Linear(self.classifier.in_features, 1)
        # A zero row makes s = 0 for every image: undecided until the OOD loss moves it.
        nn.init.zeros_(self.ood.weight)
        nn.init.zeros_(self.ood.bias)

    @property
    def classifier(self) -> nn.Linear:
        """The last layer, `nn.Linear` [M, Dall]."""
        return self.linear if self.linear is not None else cast(nn.Linear, cast(Any, self.backbone).get_classifier())

    @property
    def branch_width(self) -> int:
        """How many features the branch makes, the first ones; 0 without a branch."""
        return 0 if self.branch is None else self.branch.shape.features

    def add_branch(self, shape: BranchShape) -> None:
        """Let the last layer and the OOD row read a new branch too; it does not change what they say until it learns.

        Raises:
            UsageError: the head does not read the stages that the branch does.
        """
        if not set(shape.stages) <= set(self.stages) or not shape.stages or self.linear is None:
            raise UsageError(f"a branch reads stages of '{self.backbone_name}' that --head {self.head_kind} leaves out")
        channels = [self.widths[self.stages.index(stage)] for stage in shape.stages]
        self.branch = Branch(shape, channels).to(self.linear.weight.device)
        self.linear, self.ood = (_wider(layer, shape.features) for layer in (self.linear, self.ood))

    def features(self, x: Tensor) -> Tensor:
        """Features z [N, Dall] of a normalised image [N, 3, S, S]."""
        return self.forward_train(x, patches=0)[0]

    def head_weight(self) -> tuple[Tensor, Tensor]:
        """The fused last layer: weight [M+1, Dall] and bias [M+1], the OOD row last."""
        classifier = self.classifier
        bias = classifier.bias if classifier.bias is not None else classifier.weight.new_zeros(len(self.classes))
        return torch.cat([classifier.weight, self.ood.weight]), torch.cat([bias, self.ood.bias])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits fp32 [N, M], id_logit fp32 [N]) of a normalised image [N, 3, S, S]."""
        return self.head(self.features(x))

    def head(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(logits fp32 [N, M], id_logit fp32 [N]) of features [N, Dall]."""
        weight, bias = self.head_weight()
        with torch.autocast(device_type=z.device.type, enabled=False):
            out = F.linear(z.float(), weight.float(), bias.float())
        return out[:, :-1], out[:, -1]

    def forward_train(self, x: Tensor, patches: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Pooled and patch features by one pass, for all terms of the loss.

        Args:
            x: normalised images [N, 3, S, S].
            patches: the first so many images also give their patch features; None: all, 0: none.

        Returns:
            features [N, Dall]; patch features [n, H, W, Dall], or None.
        """
        feature_map, maps, z = self.read_backbone(x)
        if self.branch is not None:
            found = self.branch.at_places(self.maps_of(self.branch.shape, maps))
            z = torch.cat([self.branch.pooled(found), z], dim=1)
            maps = [found, found, *maps]  # at one place its mean and its maximum are the same
        if patches == 0:
            return z, None
        grid = self.patch_features(feature_map[:patches])
        # Each map averaged onto the last one's grid: where the sides divide, the mean over patches is the pooled mean.
        on_grid = [F.adaptive_avg_pool2d(m[:patches], grid.shape[1:3]).permute(0, 2, 3, 1) for m in maps]
        return z, torch.cat([*on_grid, grid], dim=3) if maps else grid

    def read_backbone(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """What comes of the backbone alone, of normalised images [N, 3, S, S].

        Returns:
            the last map; those of `stages`; the features [N, Dall] but the branch's.
        """
        feature_map, maps = stage_maps(self.backbone, x, self.stages)
        last = cast(Tensor, cast(Any, self.backbone).forward_head(feature_map, pre_logits=True))
        return feature_map, maps, torch.cat([*map(pooled, maps), last], dim=1) if maps else last

    def maps_of(self, shape: BranchShape, maps: list[Tensor]) -> list[Tensor]:
        """What a branch of this shape reads of the maps of `stages`."""
        return [maps[self.stages.index(stage)] for stage in shape.stages]

    def patch_features(self, feature_map: Tensor) -> Tensor:
        """The backbone's pre-logits at every location of its last map: [N, C, H, W] -> [N, H, W, D]."""
        return cast(Tensor, unpooled_head(self.backbone).forward_head(feature_map, pre_logits=True)).permute(0, 2, 3, 1)


def _wider(layer: nn.Linear, count: int) -> nn.Linear:
    """The same layer with so many inputs more, before the others, that it does not heed."""
    wider = nn.Linear(count + layer.in_features, layer.out_features, device=layer.weight.device)
    with torch.no_grad():
        wider.weight[:, :count] = 0
        wider.weight[:, count:] = layer.weight
        wider.bias.copy_(layer.bias)
    return wider


def unpooled_head(backbone: nn.Module) -> Any:
    """A view of a timm model that shares every parameter and whose head does not pool.

    Pooling and flattening become the identity, and batch norm inside the head uses its running statistics
    without updating them, so that `forward_head` acts on each location of a feature map by itself.
    """

    def view(module: nn.Module) -> nn.Module:
        if type(module).__name__ in _POOLS or isinstance(module, nn.Flatten):
            return nn.Identity()
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        children = {name: view(child) for name, child in module.named_children() if not isinstance(child, _TRUNK)}
        if not is_norm and all(children[name] is module._modules[name] for name in children):
            return module
        shared = copy.copy(module)
        shared._modules = {**module._modules, **children}
        if is_norm:
            shared.training = False
        return shared

    return view(backbone)


def normalise(image: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 [N, 3, S, S] -> fp32, (image / 255 - mean) / std, as one multiply and one add."""
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    scale = (1.0 / (255.0 * std)).to(image.device).view(1, 3, 1, 1)
    shift = (-mean / std).to(image.device).view(1, 3, 1, 1)
    return image.float() * scale + shift


def backbone_preprocess(backbone: str, input_size: int | None = None, pretrained: bool = False) -> Preprocess:
    """The preprocessing that timm records for a backbone: mean, std and interpolation.

    Args:
        input_size: in pixels; None takes timm's.
        pretrained: also take its centre crop; a model trained here sees whole images.

    Raises:
        UsageError: no such backbone.
    """
    _, cfg = _look_up(backbone)
    settings = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
    return Preprocess(
        input_size=settings["input_size"][-1] if input_size is None else input_size,
        crop_pct=settings["crop_pct"] if pretrained else 1.0,
        interpolation="bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
    )


def _look_up(given: str) -> tuple[str, Any]:
    """timm's name and record of a backbone; raises UsageError if there is none."""
    name = resolve_backbone(given)
    try:
        if timm.is_model(name) and (cfg := timm.get_pretrained_cfg(name)) is not None:  # None: a name of timm's past
            return name, cfg
    except RuntimeError:  # a tag that it has no weights of
        known = ", ".join(timm.list_pretrained(name.partition(".")[0])) or "none"
        raise UsageError(f"timm has no weights '{given}'; of this model it has: {known}") from None
    close = [*difflib.get_close_matches(given, ALIASES), *difflib.get_close_matches(given, timm.list_models(), 5)]
    hint = f"Similar: {', '.join(list(dict.fromkeys(close))[:5])}" if close else f"Give one of {', '.join(ALIASES)}"
    raise UsageError(f"unknown backbone '{given}'. {hint}, or another model of timm (timm.list_models() names them)")


def build_model(
    backbone: str,
    classes: tuple[str, ...],
    preprocess: Preprocess,
    pretrained: bool = False,
    weights: str | Path | None = None,
    head: Head = "last",
    branch: BranchShape | None = None,
) -> SSODClassifier:
    """Make a classifier from a timm backbone.

    Args:
        backbone: an alias of `ssod_edge.config.ALIASES` or any timm model with one linear classifier.
        classes: class names, in label order.
        preprocess: stored with the model.
        pretrained: load published weights, from a package that holds them or through timm.
        weights: a local .safetensors or .pth state dict, or a checkpoint of ssod-edge, whose OOD row is left out;
            so is a classifier of another width.
        head: what the last layer reads: "last", the features of the timm model's own, "stages", every stage's too, or
            "blocks", every block's in them too.
        branch: of a new branch beside the backbone; None: without one.

    Raises:
        UsageError: no such backbone, one whose classifier is not one linear layer (the message says why), or published
            weights that cannot be downloaded; no such weights file.
        ArtifactError: the weights file is unreadable or of another model.
    """
    if len(classes) < 2:
        raise UsageError(f"a classifier needs at least 2 classes, got {len(classes)}. Give a folder for each class")
    keep_freed_memory()
    name, cfg = _look_up(backbone)
    other_size = cfg.fixed_input_size and cfg.input_size[-1] != preprocess.input_size
    size = {"img_size": preprocess.input_size} if other_size else {}
    if pretrained and (packaged := packaged_weights(name)) is not None:
        pretrained, weights = False, packaged
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=len(classes), **size)
    except MemoryError:
        raise
    except Exception as error:  # a download fails in many ways, and each family has its own rules for sizes
        failed = _why_not_built(name, len(classes), size) if pretrained else error
        if failed is None:
            raise unavailable(name, error) from error
        if size:
            raise _wrong_size(name, preprocess.input_size, failed, "Choose another --size") from error
        raise UsageError(f"backbone '{name}' cannot be built: {failed}") from error
    classifier = cast(Any, model).get_classifier()
    if isinstance(classifier, nn.Linear) and not (pretrained and len(classes) == model.default_cfg["num_classes"]):
        # Some timm families scale this layer by 1/sqrt(classes): with ten of them MobileNetV3 would begin with
        # confident, wrong logits.
        nn.init.normal_(classifier.weight, std=0.01)
    if weights is not None:
        load_weights(model, weights)
    classified = SSODClassifier(model, name, classes, preprocess, head)
    if branch is not None:
        classified.add_branch(branch)
    return classified


def _why_not_built(name: str, classes: int, size: dict[str, int]) -> Exception | None:
    """What fails without any weights too; None if it is the weights alone."""
    try:
        timm.create_model(name, num_classes=classes, **size)
    except Exception as error:
        return error
    return None


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a timm state dict, or the backbone of a checkpoint of ssod-edge, without unpickling objects.

    Raises:
        UsageError: there is no such file.
        ArtifactError: an unreadable file, or keys that do not fit beyond the classifier.
    """
    state = _read_state(Path(path))
    if any(name.startswith(_OWN) for name in state):
        state = {name.removeprefix(_OWN): value for name, value in state.items() if name.startswith(_OWN)}
    own = model.state_dict()
    if "_conv_stem.weight" in state and len(state) == len(own):  # the first port of EfficientNet, in timm's order
        state = dict(zip(own, state.values(), strict=True))
    classifier = cast(Any, model).default_cfg["classifier"]
    head_keys = {f"{classifier}.weight", f"{classifier}.bias"}
    state = {k: v for k, v in state.items() if not (k in head_keys and k in own and v.shape != own[k].shape)}
    wrong = sorted(k for k in own.keys() - head_keys if k not in state or state[k].shape != own[k].shape)
    extra = sorted(state.keys() - own.keys())
    if wrong or extra:
        one_size = cast(Any, model).default_cfg.get("fixed_input_size")
        raise ArtifactError(
            f"'{path}' holds weights of another model: {len(wrong)} missing or of another shape "
            f"({', '.join(wrong[:3])}), {len(extra)} unknown ({', '.join(extra[:3])})"
            + (", or of this one at another --size" if one_size and not extra else "")
        )
    model.load_state_dict(state, strict=False)


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        raise UsageError(f"weights '{path}' are a folder. Give a file, of a run its best.safetensors")
    if not path.is_file():
        raise UsageError(f"weights file '{path}' does not exist")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
            if not all(isinstance(value, Tensor) for value in state.values()):
                raise TypeError("not tensors alone")
    except Exception as error:
        # torch's own text recommends weights_only=False, which would run what the file says.
        raise ArtifactError(
            f"'{path}' cannot be read as weights: expected tensors by name, in a .safetensors or .pth file"
        ) from error
    return cast(dict[str, Tensor], state)


def check_size(model: SSODClassifier, size: int, fix: str) -> Tensor:
    """The feature map of one image of this size; the backbone is as before.

    Args:
        size: in pixels.
        fix: what to do about a backbone that does not run at it, for the error.

    Raises:
        UsageError: it does not.
    """
    backbone = cast(Any, model.backbone)
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            image = torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)
            return cast(Tensor, backbone.forward_features(image.to(next(model.parameters()).device)))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _wrong_size(model.backbone_name, size, error, fix) from error
    finally:
        backbone.train(was_training)


def _wrong_size(name: str, size: int, error: Exception, fix: str) -> UsageError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return UsageError(f"backbone '{name}' does not run at {size} px ({reason}). {fix}")


def _check_backbone(model: SSODClassifier) -> str:
    """Why this backbone has no patches; empty if it has.

    Raises:
        UsageError: the classifier is not one linear layer on `features` and nothing after it, or the backbone does not
            run at the input size.
    """
    backbone, read = cast(Any, model.backbone), []
    size = model.preprocess.input_size
    feature_map = check_size(model, size, "Choose another --size")
    usual = (backbone.default_cfg.get("input_size") or (3, 224, 224))[-1]
    if usual != size and not backbone.default_cfg.get("fixed_input_size"):
        feature_map = check_size(model, usual, "Choose another")  # a map of one patch would hide that a head mixes them
    hook = model.classifier.register_forward_hook(lambda _, given, out: read.append((given[0], out)))
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            logits, z = backbone.forward_head(feature_map), backbone.forward_head(feature_map, pre_logits=True)
            # A norm on the way, or the mean of two classifiers, would be missing from the fused layer.
            if len(read) != 1 or not (torch.equal(read[0][0], z) and torch.equal(read[0][1], logits)):
                raise UsageError(
                    f"backbone '{model.backbone_name}' is not supported: its head is more than one linear layer on its "
                    f"features {list(z.shape)}. {_CHOOSE}"
                )
            return _patch_mismatch(model, feature_map)
    finally:
        hook.remove()
        backbone.train(was_training)


def _patch_mismatch(model: SSODClassifier, feature_map: Tensor) -> str:
    """Why the head on an unpooled 1x1 map differs from the pooled head on it; empty if it does not."""
    if feature_map.dim() != 4:
        return f"its features have shape {list(feature_map.shape)}, not [N, C, H, W]"
    patch = feature_map[:, :, :1, :1]
    try:
        unpooled = unpooled_head(model.backbone).forward_head(feature_map, pre_logits=True)
        if unpooled.dim() != 4:
            return f"its head gives {list(unpooled.shape)} on a map that is not pooled"
        if unpooled.shape[2:] != feature_map.shape[2:]:
            return "its head mixes neighbouring patches"
        pooled = cast(Any, model.backbone).forward_head(patch, pre_logits=True)
        alone = model.patch_features(patch)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        return f"its head cannot act on one patch ({str(error).splitlines()[0]})"
    if alone.shape != (1, 1, 1, model.classifier.in_features) or pooled.shape != alone[0, 0].shape:
        return (
            f"its head gives {list(alone.shape)} at one patch for a classifier of {model.classifier.in_features} inputs"
        )
    if not torch.allclose(alone[0, 0], pooled, rtol=1e-3, atol=1e-4):
        return "its head gives other features at a patch than on the same patch pooled"
    return ""
