"""What more views of each photo, and more or fewer passes, bring a last layer and a branch: by photos left out in turn.

    python scripts/branch_views.py RUN --json FILE [--crops 4]

RUN was trained by `ssod-edge train --tune head`, and its data is where it was. All of its photos are divided into four
parts; each part is judged, as it is and disturbed, by what the other three taught.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from ssod_edge.data.disturbances import seeded_copy
from ssod_edge.data.sources import ImageSource
from ssod_edge.detect.regression import ITERATIONS, LEAST_DEVIATION
from ssod_edge.detect.side_by_side import fitting
from ssod_edge.files import write_json
from ssod_edge.training.batches import ASPECT_MIN, EvalImages, augment
from ssod_edge.training.branch import SmallBranch
from ssod_edge.training.features import Features
from ssod_edge.training.folding import folded
from ssod_edge.training.lesson import DISTURBED, MIRRORED, PLAIN, Lesson
from ssod_edge.training.model import SSODClassifier, normalise
from ssod_edge.training.objective import class_weights
from ssod_edge.training.run import Run

#: Least area of a crop; parts that photos are divided into; the strength of the last layer's fit.
SCALE, PARTS, STRENGTH = 0.5, 4, 1e-2
#: Images of a batch when reading.
READ = 16


class Views:
    """Features [N, V, D], and a branch that keeps the maps, of V views of each photo: as it is, mirrored, disturbed,
    crops."""

    def __init__(self, source: ImageSource, model: SSODClassifier, crops: int):
        self.model, self.part, self.labels = model, SmallBranch(model, 1), np.asarray(source.labels)
        images, trunk, count, views = EvalImages(source, None, model.preprocess), folded(model), len(source), 3 + crops
        self.z = torch.empty((count, views, model.classifier.in_features))
        maps: list[Tensor] = []
        with torch.inference_mode():
            for start in range(0, count, READ):
                rows = slice(start, min(start + READ, count))
                pixels = torch.stack([self._views(images, index, crops) for index in range(rows.start, rows.stop)])
                x = normalise(pixels.flatten(0, 1), model.preprocess).contiguous(memory_format=torch.channels_last)
                _, read, z = trunk.read_backbone(x)
                found = trunk.maps_of(self.part.shape, read)
                maps = maps or [torch.empty((count, views, *m.shape[1:]), dtype=torch.float16) for m in found]
                self.z[rows] = z.unflatten(0, (-1, views))
                for kept, one in zip(maps, found, strict=True):
                    kept[rows] = one.half().unflatten(0, (-1, views))
        self.part.maps, self.part.untouched = maps, self.z

    def _views(self, images: EvalImages, index: int, crops: int) -> Tensor:
        """uint8 [V, 3, S, S]; every second crop is disturbed too."""
        plain = images[index][0]
        views = [plain, plain.flip(2), torch.from_numpy(seeded_copy(plain.numpy()))]
        size = math.ceil(images.settings.input_size / (SCALE * ASPECT_MIN) ** 0.5)
        picture = images.source.image(index, replace(images.settings, input_size=size, crop_pct=1.0))
        for number in range(crops):
            crop = augment(picture, images.settings, np.random.default_rng((7, number, index)), SCALE, 0.5)
            views.append(torch.from_numpy(seeded_copy(crop) if number % 2 else crop))
        return torch.stack(views)

    def plain(self) -> Features:
        return Features(*(self.z[:, version].numpy() for version in (PLAIN, DISTURBED)))


def fit(views: Views, train: np.ndarray, versions: Sequence[int]) -> SSODClassifier:
    """A copy of the model whose last layer is fitted to some views; two of them as `fit_layer` does."""
    z, labels = (
        np.concatenate([views.z[train, v].numpy() for v in versions]),
        np.tile(views.labels[train], len(versions)),
    )
    mean, deviation = z.mean(axis=0), np.maximum(z.std(axis=0), LEAST_DEVIATION)
    by_class = class_weights(views.labels[train], "balanced")
    assert by_class is not None
    layer = LogisticRegression(C=2 * STRENGTH / len(versions), max_iter=ITERATIONS, tol=1e-3)
    with fitting():
        layer.fit((z - mean) / deviation, labels, by_class.numpy()[labels])
    weight, model = layer.coef_ / deviation, copy.deepcopy(views.model)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(weight))
        model.classifier.bias.copy_(torch.from_numpy(layer.intercept_ - weight @ mean))
    return model


def learn(views: Views, model: SSODClassifier, train: np.ndarray, versions: Sequence[int], epochs: int) -> Features:
    """Teach the model a branch; the features after that."""
    part = copy.copy(views.part)
    part.model, part.pace = model, replace(part.pace, epochs=epochs)
    lesson = Lesson(views.labels, train, 0, "balanced", tuple(versions))
    part.learn(views.plain(), lesson, lambda epoch, loss: None, lambda n: None)
    return part.features()


def judge(model: SSODClassifier, features: Features, labels: np.ndarray, left: np.ndarray) -> dict[str, float]:
    """Accuracy and log loss of photos as they are, and accuracy of disturbed copies."""
    with torch.inference_mode():
        plain, disturbed = (model.head(torch.from_numpy(z[left]))[0] for z in (features.plain, features.disturbed))
    right, known = torch.from_numpy(labels[left]), len(left)
    return {
        "accuracy": int((plain.argmax(1) == right).sum()) / known,
        "disturbed_accuracy": int((disturbed.argmax(1) == right).sum()) / known,
        "loss": float(F.cross_entropy(plain, right)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--crops", type=int, default=4)
    parser.add_argument("--json", required=True)
    given = parser.parse_args()
    run, started = Run.at(given.run), time.monotonic()
    views = Views(run.splits("go to the folder where it was trained")[0], run.model.eval(), given.crops)
    print(f"views: {time.monotonic() - started:.0f} s", flush=True)
    ours, all_views = [PLAIN, MIRRORED, DISTURBED], list(range(3 + given.crops))
    heads = {"head, two views": [PLAIN, DISTURBED], "head, three views": ours, "head, all views": all_views}
    branches: dict[str, tuple[list[int], int]] = {
        **{f"branch, three views, {epochs} passes": (ours, epochs) for epochs in (10, 15, 25, 40)},
        "branch, all views, 25 passes": (all_views, 25),
        "branch, not mirrored, 25 passes": ([PLAIN, DISTURBED], 25),
    }
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in (*heads, *branches)}
    for train, left in StratifiedKFold(PARTS, shuffle=True, random_state=0).split(views.labels, views.labels):
        for name, versions in heads.items():
            figures[name].append(judge(fit(views, train, versions), views.plain(), views.labels, left))
        for name, (versions, epochs) in branches.items():
            model = fit(views, train, [PLAIN, DISTURBED])
            features = learn(views, model, train, versions, epochs)
            figures[name].append(judge(model, features, views.labels, left))
            print(name, figures[name][-1], flush=True)
    means: dict[str, Any] = {
        name: {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}
        for name, rows in figures.items()
    }
    write_json(given.json, {"run": given.run, "crops": given.crops, "photos": len(views.labels), "means": means})


if __name__ == "__main__":
    main()
