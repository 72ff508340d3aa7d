"""How each detector of pytorch-ood is built for a classifier, and what it reads of it.

Every detector has the library's own settings, or its paper's rule where there is none; nothing is tuned, because no
OOD image may take part in a choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ssod_edge.errors import UsageError
from ssod_edge.training.model import SSODClassifier

#: What a detector reads: the class logits [N, M]; the pooled features [N, D]; the same as maps [N, D, 1, 1], where
#: the papers of activation shaping act; or images, for which it runs the network by itself.
LOGITS, FEATURES, MAPS, IMAGES = "logits", "features", "maps", "images"

#: Detectors of pytorch-ood that are not run, and why.
UNSUITED = {
    "Gram": "it reads every layer of a network that is a plain sequence of modules",
    "MCD": "it needs dropout, and the networks here have none",
    "MCM": "it needs text embeddings of a vision-language model",
    "MultiMahalanobis": "it reads every layer of a network that is a plain sequence of modules",
    "WeightedEBO": "it needs class weights that are trained with the VOS loss",
}


@dataclass(frozen=True)
class Network:
    """The parts of a classifier that detectors are built from.

    Attributes:
        model: in eval mode, without gradients to its parameters.
        head: a copy of the last layer on the CPU, [D] -> [M], without the OOD row.
    """

    model: SSODClassifier
    head: nn.Linear

    @property
    def std(self) -> list[float]:
        """Of the input's normalisation: a step in the input is meant in the units of the pixels."""
        return list(self.model.preprocess.std)

    def head_on_maps(self, maps: Tensor) -> Tensor:
        return self.head(maps.flatten(1))

    def feature_map(self, x: Tensor) -> Tensor:
        """[N, C, H, W], contiguous: RankFeat takes a view of it."""
        if self.model.stages:
            raise UsageError("it takes its logits from the last feature map, and this head reads every stage")
        backbone: Any = self.model.backbone
        maps = backbone.forward_features(x)
        if not isinstance(maps, Tensor) or maps.dim() != 4 or getattr(backbone, "output_fmt", "NCHW") != "NCHW":
            raise UsageError("it needs a feature map [N, C, H, W], and this backbone has none")
        return maps.contiguous()

    def logits_of_map(self, maps: Tensor) -> Tensor:
        backbone: Any = self.model.backbone
        return self.model.head(backbone.forward_head(maps, pre_logits=True))[0]


class _Leaf(nn.Module):
    """Hands on features that a gradient can be taken of."""

    def forward(self, z: Tensor) -> Tensor:
        return z.detach().requires_grad_()


@dataclass(frozen=True)
class Recipe:
    """How a detector is built and run.

    Attributes:
        reads: LOGITS, FEATURES, MAPS or IMAGES.
        build: from the module `pytorch_ood.detector` and the network.
        forward, backward: passes through the whole network that `predict` makes for a batch, beside the plain one.
        stores: whether it carries the training images' features, and not only what was computed from them.
        working_bytes: of its largest intermediate result, from the numbers of classes and features; None if small.
    """

    reads: str
    build: Callable[[Any, Network], Any]
    forward: int = 0
    backward: int = 0
    stores: bool = False
    working_bytes: Callable[[int, int], float] | None = None


def _vim_dimension(features: int) -> int:
    """The principal subspace's dimension, by the rule of ViM's official code (d / 2 below 768 features)."""
    return 1000 if features >= 2048 else 512 if features >= 768 else features // 2


def _nac(d: Any, n: Network) -> Any:
    leaf = _Leaf()
    return d.NACUE(nn.Sequential(leaf, n.head), layers=[leaf])


BASELINES = {
    "MaxSoftmax": Recipe(LOGITS, lambda d, n: d.MaxSoftmax(None)),
    "MaxLogit": Recipe(LOGITS, lambda d, n: d.MaxLogit(None)),
    "EnergyBased": Recipe(LOGITS, lambda d, n: d.EnergyBased(None)),
    "Entropy": Recipe(LOGITS, lambda d, n: d.Entropy(None)),
    # the paper sums over the 100 most likely of ImageNet's classes
    "GEN": Recipe(LOGITS, lambda d, n: d.GEN(None, M=min(100, n.head.out_features))),
    "KLMatching": Recipe(LOGITS, lambda d, n: d.KLMatching(None)),
    "OpenMax": Recipe(LOGITS, lambda d, n: d.OpenMax(None)),
    "TemperatureScaling": Recipe(LOGITS, lambda d, n: d.TemperatureScaling(None)),
    "KNN": Recipe(FEATURES, lambda d, n: d.KNN(None), stores=True),
    "NNGuide": Recipe(FEATURES, lambda d, n: d.NNGuide(None, n.head), stores=True),
    "ViM": Recipe(FEATURES, lambda d, n: d.ViM(None, _vim_dimension(n.head.in_features), n.head.weight, n.head.bias)),
    "Mahalanobis": Recipe(FEATURES, lambda d, n: d.Mahalanobis(None)),
    "RMD": Recipe(FEATURES, lambda d, n: d.RMD(None)),
    "GMM": Recipe(FEATURES, lambda d, n: d.GMM(None), working_bytes=lambda m, d: 24.0 * m * d * d),
    "SHE": Recipe(FEATURES, lambda d, n: d.SHE(None, n.head)),
    "DICE": Recipe(FEATURES, lambda d, n: d.DICE(None, n.head.weight, n.head.bias, p=0.9)),  # the paper's for CIFAR
    "LTS": Recipe(FEATURES, lambda d, n: d.LTS(None, n.head)),
    "fDBD": Recipe(FEATURES, lambda d, n: d.fDBD(None, n.head), working_bytes=lambda m, d: 4.0 * m * m * d),
    "NCI": Recipe(FEATURES, lambda d, n: d.NCI(None, n.head)),
    "PNML": Recipe(FEATURES, lambda d, n: d.PNML(None, n.head)),
    "NACUE": Recipe(FEATURES, _nac),
    # The papers of these two take the gradient of the last layer's weight alone, and that needs the features alone.
    "GradNorm": Recipe(FEATURES, lambda d, n: d.GradNorm(n.head, lambda name: name == "weight")),
    "GradUncertainty": Recipe(FEATURES, lambda d, n: d.GradUncertainty(n.head, lambda name: name == "weight")),
    "ReAct": Recipe(MAPS, lambda d, n: d.ReAct(None, n.head_on_maps)),
    "ASH": Recipe(MAPS, lambda d, n: d.ASH(None, n.head_on_maps)),
    "SCALE": Recipe(MAPS, lambda d, n: d.SCALE(None, n.head_on_maps)),
    "VRA": Recipe(MAPS, lambda d, n: d.VRA(None, n.head_on_maps)),
    "RankFeat": Recipe(IMAGES, lambda d, n: d.RankFeat(n.feature_map, n.logits_of_map), forward=1),
    "ODIN": Recipe(IMAGES, lambda d, n: d.ODIN(lambda x: n.model(x)[0], norm_std=n.std), forward=2, backward=1),
    "MahalanobisODIN": Recipe(
        IMAGES, lambda d, n: d.MahalanobisODIN(n.model.features, norm_std=n.std), forward=2, backward=1
    ),
}


def parse_names(text: str) -> tuple[str, ...]:
    """ "all" or "NAME[,NAME...]" -> detector names in the order of the table; letter case does not matter.

    Raises:
        UsageError: a name that is not there.
    """
    known = {name.lower(): name for name in (*BASELINES, *UNSUITED)}
    if text.strip().lower() == "all":
        return tuple(known.values())
    wanted = [name.strip().lower() for name in text.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(f"there is no baseline '{unknown[0]}'. Give all, or some of: {', '.join(known.values())}")
    return tuple(name for key, name in known.items() if key in wanted)
