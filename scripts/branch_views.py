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
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from ssod_edge.data.disturbances import seeded_copy
from ssod_edge.data.sources import ImageSource
from ssod_edge.detect.regression import LEAST_DEVIATION
from ssod_edge.detect.side_by_side import fitting
from ssod_edge.files import write_json
from ssod_edge.training.batches import ASPECT_MIN, EvalImages, augment
from ssod_edge.training.branch import SmallBranch
from ssod_edge.training.folding import folded
from ssod_edge.training.lesson import DISTURBED, MIRRORED, PLAIN
from ssod_edge.training.model import SSODClassifier, normalise
from ssod_edge.training.objective import class_weights
from ssod_edge.training.run import Run

#: Least area of a crop; parts that photos are divided into; the strength of the last layer's fit.
SCALE, PARTS, STRENGTH = 0.5, 4, 1e-2
#: Images of a batch, when reading and when learning.
READ, BATCH = 16, 64


class Views:
    """Features [N, V, D] and maps [N, V, C, h, w] of V views of each photo: as it is, mirrored, disturbed, crops."""

    def __init__(self, source: ImageSource, model: SSODClassifier, crops: int):
        self.model, self.part = model, SmallBranch(model, 1)
        self.labels = np.asarray(source.labels)
        images, trunk, count, views = EvalImages(source, None, model.preprocess), folded(model), len(source), 3 + crops
        self.z = torch.empty((count, views, model.classifier.in_features))
        self.maps = [torch.empty((count, views, *shape), dtype=torch.float16) for shape in self.part._shapes]
        with torch.inference_mode():
            for start in range(0, count, READ):
                rows = slice(start, min(start + READ, count))
                pixels = torch.stack([self._views(images, index, crops) for index in range(rows.start, rows.stop)])
                x = normalise(pixels.flatten(0, 1), model.preprocess).contiguous(memory_format=torch.channels_last)
                _, found, z = trunk.read_backbone(x)
                self.z[rows] = z.unflatten(0, (-1, views))
                for kept, maps in zip(self.maps, trunk.maps_of(self.part.shape, found), strict=True):
                    kept[rows] = maps.half().unflatten(0, (-1, views))

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

    def at(self, index: Tensor, version: Tensor | int) -> list[Tensor]:
        return [m[index, version].float().contiguous(memory_format=torch.channels_last) for m in self.maps]


class Head:
    """A last layer on features of mean 0 and deviation 1."""

    def __init__(self, views: Views, train: np.ndarray, versions: list[int]):
        z, labels = np.concatenate([views.z[train, v].numpy() for v in versions]), views.labels[train]
        by_class = class_weights(labels, "balanced")
        assert by_class is not None
        mean, deviation = z.mean(axis=0), np.maximum(z.std(axis=0), LEAST_DEVIATION)
        self.mean, self.deviation, self.by_class = torch.from_numpy(mean), torch.from_numpy(deviation), by_class
        model = LogisticRegression(C=2 * STRENGTH / len(versions), max_iter=300, tol=1e-3)
        with fitting():
            model.fit(
                (z - mean) / deviation, np.tile(labels, len(versions)), by_class.numpy()[np.tile(labels, len(versions))]
            )
        self.weight = nn.Parameter(torch.from_numpy(model.coef_.astype(np.float32)))
        self.bias = nn.Parameter(torch.from_numpy(model.intercept_.astype(np.float32)))

    def logits(self, z: Tensor) -> Tensor:
        return F.linear((z - self.mean) / self.deviation, self.weight, self.bias)


def learn(views: Views, head: Head, train: np.ndarray, versions: list[int], epochs: int) -> tuple[nn.Module, Tensor]:
    """A branch beside a head, which learns on, and the last layer's rows of the branch."""
    torch.manual_seed(0)
    model, pace = copy.deepcopy(views.model), SmallBranch.pace
    model.add_branch(views.part.shape)
    branch = model.branch
    assert branch is not None
    own = nn.Parameter(model.classifier.weight[:, : model.branch_width].detach().clone())
    groups = [{"params": [*branch.parameters(), own]}, {"params": [head.weight, head.bias], "lr": pace.head_rate}]
    optimizer = torch.optim.AdamW(groups, lr=pace.rate, weight_decay=pace.decay)
    steps, rates = epochs * (len(train) // BATCH), [pace.rate, pace.head_rate]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    rng, labels = np.random.default_rng(0), torch.from_numpy(views.labels)
    for _ in range(epochs):
        order = rng.permutation(train)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            index, version = (
                torch.from_numpy(order[start : start + BATCH]),
                torch.from_numpy(rng.choice(versions, BATCH)),
            )
            logits = F.linear(branch(views.at(index, version)), own) + head.logits(views.z[index, version])
            loss = F.cross_entropy(logits, labels[index], head.by_class)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*branch.parameters(), own, head.weight, head.bias], 5.0)
            optimizer.step()
            schedule.step()
    return branch.eval(), own.detach()


@torch.inference_mode()
def judge(views: Views, head: Head, left: np.ndarray, taught: tuple[nn.Module, Tensor] | None) -> dict[str, float]:
    """Accuracy and log loss of photos as they are, and accuracy of disturbed copies."""
    found, labels = {}, torch.from_numpy(views.labels[left])
    for name, version in (("plain", PLAIN), ("disturbed", DISTURBED)):
        parts = []
        for index in torch.from_numpy(left).split(2 * BATCH):
            logits = head.logits(views.z[index, version])
            parts.append(
                logits if taught is None else logits + F.linear(taught[0](views.at(index, version)), taught[1])
            )
        found[name] = torch.cat(parts)
    return {
        "accuracy": float((found["plain"].argmax(1) == labels).float().mean()),
        "disturbed_accuracy": float((found["disturbed"].argmax(1) == labels).float().mean()),
        "loss": float(F.cross_entropy(found["plain"], labels)),
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
            figures[name].append(judge(views, Head(views, train, versions), left, None))
        for name, (versions, epochs) in branches.items():
            head = Head(views, train, [PLAIN, DISTURBED])
            figures[name].append(judge(views, head, left, learn(views, head, train, versions, epochs)))
            print(name, figures[name][-1], flush=True)
    means: dict[str, Any] = {
        name: {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}
        for name, rows in figures.items()
    }
    write_json(given.json, {"run": given.run, "crops": given.crops, "photos": len(views.labels), "means": means})


if __name__ == "__main__":
    main()
