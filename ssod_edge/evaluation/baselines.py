"""The peers of the built-in scores: pytorch-ood's detectors on the same network and images, and what they cost.

Larger always means more likely OOD, which is pytorch-ood's convention too.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssod_edge.evaluation.baseline_recipes import BASELINES, FEATURES, IMAGES, LOGITS, MAPS, UNSUITED, Network, Recipe
from ssod_edge.optional import load
from ssod_edge.training.model import SSODClassifier

Floats = NDArray[np.floating[Any]]

COST_KEYS = (
    *("error", "reads", "settings", "ms_per_image", "forward_passes", "backward_passes"),
    *("state_mb", "fit_images", "fit_seconds", "stored_images"),
)

_LARGEST_BYTES = 4e9  # a detector whose working memory would be more is not run


@dataclass(eq=False)
class Baseline:
    """One detector while an evaluation runs. Once it has an `error`, it is left out."""

    name: str
    recipe: Recipe
    detector: Any = None
    error: str | None = None
    fit_images: int = 0
    fit_seconds: float = 0.0
    batch_seconds: list[float] = field(default_factory=list)  # per image, one entry a batch
    parts: list[Tensor] = field(default_factory=list)  # scores of the image set that is being read

    @property
    def needs_fit(self) -> bool:
        return self.error is None and self.detector.requires_fit

    def predict(self, x: Tensor) -> None:
        """Score one batch, and time it."""
        start = time.perf_counter()
        if self.recipe.reads == MAPS:
            scores = self.detector.predict_feature_maps(x[:, :, None, None])
        elif self.recipe.reads == LOGITS:
            scores = self.detector.predict_logits(x)
        else:  # without `predict_features`: what it is built on takes features, or it reads images
            scores = getattr(self.detector, "predict_features", self.detector.predict)(x)
        scores = scores.detach().cpu()
        self.batch_seconds.append((time.perf_counter() - start) / len(x))
        self.parts.append(scores)

    def fit(self, x: Tensor, y: Tensor, batch_size: int) -> None:
        start = time.perf_counter()
        if self.recipe.reads == LOGITS:
            self.detector.fit_logits(x, y)
        elif self.recipe.reads == MAPS:
            self.detector.fit_feature_maps(x[:, :, None, None], y)
        elif hasattr(self.detector, "fit_features"):
            self.detector.fit_features(x, y)
        else:
            self.detector.fit(list(zip(x.split(batch_size), y.split(batch_size), strict=True)))
        self.fit_images, self.fit_seconds = len(x), time.perf_counter() - start


class Baselines:
    """Detectors of pytorch-ood by name. One that fails says why and leaves the others alone.

    Args:
        names: of `parse_names`.
        model: in eval mode; its parameters stop taking gradients.
        batch_size: images that a detector scores at once.

    Raises:
        MissingExtraError: pytorch-ood is not installed.
    """

    def __init__(self, names: Sequence[str], model: SSODClassifier, batch_size: int = 64) -> None:
        library = load_library()
        model.requires_grad_(False)
        head = copy.deepcopy(model.classifier).float().cpu()
        if head.bias is None:
            head.bias = nn.Parameter(torch.zeros(head.out_features), requires_grad=False)
        self.network = Network(model, head)
        self.batch_size = batch_size
        self.all = [self._build(name, BASELINES[name], library) for name in names if name in BASELINES]
        self.unsuited = [name for name in names if name not in BASELINES]

    def _build(self, name: str, recipe: Recipe, library: ModuleType) -> Baseline:
        head = self.network.head
        size = recipe.working_bytes(head.out_features, head.in_features) if recipe.working_bytes else 0.0
        if size > _LARGEST_BYTES:
            return Baseline(name, recipe, error=f"it would need {size / 1e9:.0f} GB for {head.out_features} classes")
        baseline = Baseline(name, recipe)
        with _failing(baseline):
            baseline.detector = recipe.build(library, self.network)
        return baseline

    def working(self, *reads: str) -> Iterator[Baseline]:
        """Those that have not failed and read one of these."""
        return (b for b in self.all if b.error is None and b.recipe.reads in reads)

    @property
    def failed(self) -> set[str]:
        """Names of those that have no scores."""
        return {b.name for b in self.all if b.error is not None} | set(self.unsuited)

    @property
    def to_fit(self) -> list[str]:
        """Names of those that need training images."""
        return [b.name for b in self.all if b.needs_fit]

    def fit(self, features: Floats, logits: Floats, labels: NDArray[np.int64]) -> None:
        """Fit all that need it.

        Args:
            features: float32 [N, D], pooled, of training images.
            logits: float32 [N, M] of the same.
            labels: int64 [N], true classes.
        """
        z, y = torch.from_numpy(features), torch.from_numpy(labels)
        for baseline in [b for b in self.all if b.needs_fit]:
            x = torch.from_numpy(logits) if baseline.recipe.reads == LOGITS else z
            device = next(self.network.model.parameters()).device if baseline.recipe.reads == IMAGES else z.device
            with _failing(baseline):
                baseline.fit(x.to(device), y.to(device), self.batch_size)

    def watch(self, x: Tensor) -> None:
        """Score a normalised batch [N, 3, S, S] with the detectors that run the network by themselves."""
        for baseline in self.working(IMAGES):
            with _failing(baseline):
                baseline.predict(x)

    def scores(self, features: Floats, logits: Floats) -> dict[str, Floats]:
        """The scores of one image set: its features and logits, and what `watch` has seen of it.

        Args:
            features: float32 [N, D], pooled.
            logits: float32 [N, M].

        Returns:
            Detector -> [N], finite, larger = more OOD; without those that failed.
        """
        for reads, values in ((LOGITS, logits), (FEATURES, features), (MAPS, features)):
            for batch in torch.from_numpy(values).split(self.batch_size):
                for baseline in self.working(reads):
                    with _failing(baseline), torch.no_grad():
                        baseline.predict(batch)
        found = {}
        for baseline in self.working(LOGITS, FEATURES, MAPS, IMAGES):
            scores = torch.cat(baseline.parts).double().numpy()
            baseline.parts.clear()
            bad = int((~np.isfinite(scores)).sum())
            if scores.shape != (len(features),):
                baseline.error = f"it gave scores of shape {list(scores.shape)} for {len(features)} images"
            elif bad:
                baseline.error = f"{bad} of {len(scores)} scores are NaN or infinite"
            else:
                found[baseline.name] = scores
        return found

    def describe(self) -> dict[str, dict[str, Any]]:
        """Detector -> what it costs, JSON-ready, under `COST_KEYS`. Of one that failed all but `error` is None.

        - error: why there are no scores, or None.
        - reads: "logits", "features", "maps" (the pooled features as maps of one pixel) or "images".
        - settings: its hyper-parameters.
        - ms_per_image: median over the batches of the detector's own time, the network's first pass not included.
        - forward_passes, backward_passes: through the whole network, beside that first pass; included in the time.
        - state_mb: 1e6 bytes of arrays that it keeps, beside the network's own weights.
        - fit_images, fit_seconds: training images that it was fitted on, and how long that took.
        - stored_images: training images whose features it carries.
        """
        own = {tensor.untyped_storage().data_ptr() for tensor in self.network.head.state_dict().values()}
        own |= {tensor.untyped_storage().data_ptr() for tensor in self.network.model.state_dict().values()}
        found = {baseline.name: _describe(baseline, own) for baseline in self.all}
        return found | {name: dict.fromkeys(COST_KEYS) | {"error": UNSUITED[name]} for name in self.unsuited}


def _describe(baseline: Baseline, own: set[int]) -> dict[str, Any]:
    if baseline.error is not None:
        return dict.fromkeys(COST_KEYS) | {"error": baseline.error}
    detector, recipe = baseline.detector, baseline.recipe
    values = (
        None,
        recipe.reads,
        detector.get_hyperparameters(),
        1000 * float(np.median(baseline.batch_seconds)),
        recipe.forward,
        recipe.backward,
        state_bytes(detector, own) / 1e6,
        baseline.fit_images,
        baseline.fit_seconds,
        baseline.fit_images if recipe.stores else 0,
    )
    return dict(zip(COST_KEYS, values, strict=True))


@contextlib.contextmanager
def _failing(baseline: Baseline) -> Iterator[None]:
    """What a detector raises becomes its `error`."""
    try:
        yield
    except Exception as error:  # a library's detectors raise whatever their input leads them to
        lines = str(error).strip().splitlines()
        baseline.error = lines[0] if lines else f"{type(error).__name__} in pytorch-ood"
        baseline.parts.clear()


def state_bytes(detector: Any, own: set[int]) -> int:
    """Bytes of the arrays that a detector holds, itself and in its parts, each once.

    Args:
        own: addresses of the network's weights, which do not count.
    """
    return sum(size for address, size in dict(_arrays(detector, set())).items() if address not in own)


def _arrays(value: Any, seen: set[int]) -> Iterator[tuple[int, int]]:
    """(address, bytes) of every array within an object."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()
    elif isinstance(value, np.ndarray):
        base = value.base if isinstance(value.base, np.ndarray) else value
        yield base.__array_interface__["data"][0], base.nbytes
    elif isinstance(value, nn.Module):
        for tensor in value.state_dict().values():
            yield from _arrays(tensor, seen)
    elif id(value) not in seen and not isinstance(value, (type, ModuleType)):
        seen.add(id(value))
        inside = value if isinstance(value, (dict, list, tuple)) else getattr(value, "__dict__", {})
        for part in inside.values() if isinstance(inside, dict) else inside:
            yield from _arrays(part, seen)


def load_library() -> ModuleType:
    """pytorch-ood's module of detectors. Raises MissingExtraError if it is not installed."""
    module: ModuleType = load("pytorch_ood.detector", "eval --baselines")
    return module
