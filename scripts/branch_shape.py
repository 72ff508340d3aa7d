"""How wide a branch should be, what a distance may read beside it, and what tuned upper blocks do with the same photos.

    python scripts/branch_shape.py RUN --id DATA --ood NAME=DATA ... --json FILE [--widths 48,64,96]

RUN was trained by `ssod-edge train --tune head`, and its data is where it was. Everything learns from its training
split alone. Thresholds are those for 95 of 100 photos of its calibration split. `held_out` counts how many validation
photos and disturbed copies are right, by which the width was chosen. All are judged by the score that an export takes
by default, which is `gen+mahalanobispp` for tuned blocks.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ssod_edge.config import prior_score
from ssod_edge.data.images import whole_dataset
from ssod_edge.data.named import parse_named_data
from ssod_edge.data.sources import ImageSource, model_labels
from ssod_edge.detect.fit import FitData
from ssod_edge.detect.metrics import detection_metrics
from ssod_edge.detect.regression import fit_head
from ssod_edge.detect.sums import fit_score
from ssod_edge.files import write_json
from ssod_edge.training.branch import SmallBranch
from ssod_edge.training.features import Features, compute_features, distance_features
from ssod_edge.training.lesson import Further, Lesson
from ssod_edge.training.model import SSODClassifier
from ssod_edge.training.run import Run
from ssod_edge.training.stages import BranchShape
from ssod_edge.training.upper import UpperBlocks

#: Of known photos that are accepted.
TPR = 0.95


def judge(
    known: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    unknown: dict[str, np.ndarray],
    head: tuple[np.ndarray, np.ndarray],
    distance: int,
    score: str,
    hidden: int = 0,
) -> dict[str, Any]:
    """Accuracy of test photos, and the score's AUROC, and what is accepted where 95 of 100 validation photos are.

    Args:
        known: features of "train", "train_disturbed", "val", "val_disturbed" and "test".
        labels: of "train", "val" and "test".
        hidden: of so many features, the first ones, the detectors see nothing.
    """  # fmt: skip

    def outputs(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seen = np.concatenate([np.zeros_like(z[:, :hidden]), z[:, hidden:]], axis=1)
        return (z @ head[0].T + head[1]).astype(np.float32), np.zeros(len(z), np.float32), seen

    logits, id_logit, fitted = outputs(np.concatenate([known["train"], known["train_disturbed"]]))
    data = FitData(fitted, np.tile(labels["train"], 2), logits, *head, id_logit, distance)
    state = fit_score(score, data, outputs(known["val"]))

    def scores(z: np.ndarray) -> np.ndarray:
        found = outputs(z)
        return state.score(found[2], found[0], found[1])

    test, limit = scores(known["test"]), np.quantile(scores(known["val"]), TPR, method="higher")
    figures: dict[str, Any] = {
        "accuracy": float((outputs(known["test"])[0].argmax(1) == labels["test"]).mean()),
        "val_accuracy": float((outputs(known["val"])[0].argmax(1) == labels["val"]).mean()),
        "accepted": float((test <= limit).mean()),
        "disturbed_accepted": float((scores(known["val_disturbed"]) <= limit).mean()),
    }
    for name, z in unknown.items():
        found = scores(z)
        auroc = detection_metrics(test, found, bootstrap=0)["auroc"]
        figures[name] = {"auroc": auroc, "accepted": float((found <= limit).mean())}
    return figures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--id", required=True, help="known photos that the run has not seen")
    parser.add_argument("--ood", action="append", required=True, metavar="NAME=DATA")
    parser.add_argument("--widths", default="48,64,96")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", required=True)
    return parser.parse_args()


class Trial:
    """The photos of a run, and those that it is judged by."""

    def __init__(self, given: argparse.Namespace):
        run = Run.at(given.run)
        self.source, self.splits = run.splits("go to the folder where it was trained")
        self.model, self.given = run.model.eval(), given
        test = whole_dataset(given.id, labelled=True).source
        self.sets: dict[str, ImageSource] = {"own": self.source, "test": test}
        self.sets |= {name: whole_dataset(data).source for name, data in parse_named_data(given.ood).items()}
        self.labels = {"own": self.source.labels, "test": model_labels(test.labels, test.classes, self.source.classes)}

    def head(self, features: Features) -> SSODClassifier:
        """A copy of the model whose last layer is fitted to the training split."""
        train, labels = self.splits.train, self.labels["own"]
        fit = fit_head(features.plain[train], features.disturbed[train], labels[train], len(self.source.classes))
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            model.classifier.weight.copy_(torch.from_numpy(fit.weight))
            model.classifier.bias.copy_(torch.from_numpy(fit.bias))
        return model

    def further(self, kind: Callable[[SSODClassifier], Further], model: SSODClassifier) -> dict[str, Features]:
        """Teach a part of a model; the features of all sets after that."""
        part = kind(model)
        features, started = part.read(self.source, self.given.workers, ignored), time.process_time()
        lesson = Lesson(self.source.labels, self.splits.train, self.given.seed)
        part.learn(features, lesson, ignored, ignored)
        print(f"{part.name}: {time.process_time() - started:.0f} s of the processor", flush=True)
        found = {"own": part.features()}
        return found | {name: self.features(model, name) for name in self.sets if name != "own"}

    def features(self, model: SSODClassifier, name: str) -> Features:
        return compute_features(model, self.sets[name], workers=self.given.workers)

    def judge(
        self, model: SSODClassifier, found: dict[str, Features], tuned: str, last: int, hidden: int = 0
    ) -> dict[str, Any]:
        weight, bias = (part[:-1].detach().numpy() for part in model.head_weight())
        splits, labels, own = self.splits, self.labels, found["own"]
        known = {
            "train": own.plain[splits.train], "train_disturbed": own.disturbed[splits.train],
            "val": own.plain[splits.calib], "val_disturbed": own.disturbed[splits.calib], "test": found["test"].plain,
        }  # fmt: skip
        named = {name: part.plain for name, part in found.items() if name not in ("own", "test")}
        by_part = {"train": labels["own"][splits.train], "val": labels["own"][splits.calib], "test": labels["test"]}
        figures = judge(known, by_part, named, (weight, bias), last, prior_score(tuned), hidden)
        val = labels["own"][splits.val]
        right = [(z[splits.val] @ weight.T + bias).argmax(1) == val for z in (own.plain, own.disturbed)]
        return {"held_out": int(np.sum(right)), "of": 2 * len(val), **figures}


def ignored(*_: object) -> None:
    """Of progress."""


class OfWidth(SmallBranch):
    """A branch of another width."""

    def __init__(self, model: SSODClassifier, images: int, width: int):
        super().__init__(model, images)
        self.shape = BranchShape(self.shape.stages, width)


def main() -> None:
    given = parse()
    trial = Trial(given)
    record: dict[str, Any] = {**vars(given)}
    untouched = {name: trial.features(trial.model, name) for name in trial.sets}
    head = trial.head(untouched["own"])
    count, last = len(trial.source), trial.model.last_width
    record["head"] = trial.judge(head, untouched, "head", last)
    print("head", record["head"], flush=True)
    for width in map(int, given.widths.split(",")):
        model = copy.deepcopy(head)
        found = trial.further(lambda m, width=width: OfWidth(m, count, width), model)  # type: ignore[misc]
        record[f"branch {width}"] = trial.judge(model, found, "branch", last)
        print(f"branch {width}", record[f"branch {width}"], flush=True)
        record[f"branch {width}, the distance reads all"] = trial.judge(model, found, "branch", 0)
        hidden = trial.judge(model, found, "branch", last, model.branch_width)
        record[f"branch {width}, the logits alone read it"] = hidden
    model = copy.deepcopy(head)
    found = trial.further(lambda m: UpperBlocks(m, count), model)
    record["upper"] = trial.judge(model, found, "upper", distance_features(model, "upper"))
    print("upper", record["upper"], flush=True)
    write_json(given.json, record)


if __name__ == "__main__":
    main()
