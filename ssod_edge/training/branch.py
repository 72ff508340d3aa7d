"""A small branch on the maps of an untouched network: it learns on maps that are computed once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssod_edge.data.sources import ImageSource
from ssod_edge.errors import UsageError
from ssod_edge.training.features import BATCH, Features
from ssod_edge.training.folding import folded
from ssod_edge.training.lesson import (
    DISTURBED,
    PLAIN,
    VERSIONS,
    Advance,
    Further,
    Lesson,
    Pace,
    Standardised,
    check_room,
    in_half,
    learn,
    versions_of,
)
from ssod_edge.training.model import SSODClassifier
from ssod_edge.training.stages import BranchShape

#: So many stages are read, the last ones; channels that each map is brought to (docs/lab/results.md).
STAGES, WIDTH = 4, 64


class SmallBranch(Further):
    """A branch beside a backbone that stays as it is."""

    name, what = "branch", "branch"
    pace = Pace(epochs=25, rate=1e-3, decay=0.05, head_rate=1e-4)

    def __init__(self, model: SSODClassifier, images: int):
        self.model = model
        stages = tuple(place for place in model.stages if isinstance(place, int))[-STAGES:]
        if not stages:
            raise UsageError(
                f"a branch reads the stages of the network, and --head {model.head_kind} reads none of "
                f"'{model.backbone_name}'. Leave --head out, or use --tune head or all"
            )
        self.shape = BranchShape(stages, WIDTH)
        size, device = model.preprocess.input_size, model.classifier.weight.device
        with torch.inference_mode():
            _, maps, _ = model.eval().read_backbone(torch.zeros(1, 3, size, size, device=device))
        self._shapes = [m.shape[1:] for m in model.maps_of(self.shape, maps)]
        floats = sum(shape.numel() for shape in self._shapes)
        check_room(VERSIONS * images * (2 * floats + 4 * model.classifier.in_features), images)
        #: float16 [N, 3, C, h, w] of each stage.
        self.maps: list[Tensor] = []
        #: float32 [N, 3, Dall], of the backbone alone.
        self.untouched = torch.empty(0)

    def read(self, source: ImageSource, workers: int, advance: Advance) -> Features:
        trunk, layer, count = folded(self.model.eval()), self.model.classifier, len(source)
        self.maps = [torch.empty((count, VERSIONS, *shape), dtype=torch.float16) for shape in self._shapes]
        self.untouched = torch.empty((count, VERSIONS, layer.in_features))
        with torch.inference_mode():
            for x, index in versions_of(self.model, source, workers, advance):
                _, found, z = trunk.read_backbone(x)
                for kept, one in zip(self.maps, trunk.maps_of(self.shape, found), strict=True):
                    kept[index] = in_half(one).unflatten(0, (-1, VERSIONS))
                self.untouched[index] = z.float().cpu().unflatten(0, (-1, VERSIONS))
        return Features(*(self.untouched[:, version].numpy() for version in (PLAIN, DISTURBED)))

    def learn(
        self, features: Features, lesson: Lesson, finished: Callable[[int, float], None], advance: Advance
    ) -> None:
        torch.manual_seed(lesson.seed)
        self.model.add_branch(self.shape)
        branch, layer = self.model.branch, self.model.classifier
        assert branch is not None
        head = Standardised.of(layer, features, lesson.train)
        own = nn.Parameter(layer.weight[:, : self.shape.features].detach().clone())

        def logits(index: Tensor, version: Tensor) -> Tensor:
            z = self.untouched[index, version].to(own.device)
            return F.linear(branch(self._at(index, version)), own) + head.logits(z)

        branch.train()
        learn(lesson, self.pace, [*branch.parameters(), own], head, logits, finished, advance)
        branch.eval()
        head.put_back(layer)
        with torch.no_grad():
            layer.weight[:, : self.shape.features] = own

    def features(self) -> Features:
        branch, parts = self.model.branch, []
        assert branch is not None
        with torch.inference_mode():
            for version in (PLAIN, DISTURBED):
                z = self.untouched[:, version].numpy()
                batches = (slice(start, start + 2 * BATCH) for start in range(0, len(z), 2 * BATCH))
                found = [branch(self._at(batch, version)).cpu().numpy() for batch in batches]
                parts.append(np.concatenate([np.concatenate(found), z], axis=1))
        return Features(*parts)

    def _at(self, index: Tensor | slice, version: Tensor | int) -> list[Tensor]:
        """The maps of some images in one version each."""
        device = self.model.classifier.weight.device
        return [m[index, version].to(device).float().contiguous(memory_format=torch.channels_last) for m in self.maps]
