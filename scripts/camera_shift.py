"""A new camera, and 50 unlabelled frames of it: what a new threshold repairs, and what moving the features' mean does.

    python scripts/camera_shift.py RUN --id DATA --near DATA --far DATA --json FILE [--features FILE]

RUN was trained with --tune head, and its data is where it was. All images are shown under each disturbance of
`ssod_edge.data.disturbances`. Of the known ones 50 are drawn as the frames, the others are judged; several draws, of
all classes and of two. `--features` keeps what the network says of the images, for a second run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssod_edge.data.disturbances import shift
from ssod_edge.data.images import whole_dataset
from ssod_edge.data.sources import model_labels
from ssod_edge.detect.metrics import conformal_threshold, detection_metrics
from ssod_edge.detect.sums import ScoreSum
from ssod_edge.evaluation.shift import CASES, SEED, UNDISTURBED
from ssod_edge.export.graph.score import fit_data, ship_score, want_score
from ssod_edge.export.graph.source import Source, from_run
from ssod_edge.files import write_json
from ssod_edge.training.folding import folded
from ssod_edge.training.model import normalise

#: Images of each set.
MOST = {"id": 400, "near": 125, "far": 300}
FRAMES, DRAWS, CLASSES = 50, 5, 2
#: What is done with the frames: nothing; a new threshold; the mean of all features is moved to that of the training
#: images, and then a new threshold; the same for the distance alone; and by how far each frame lies from the training
#: mean of the class that it is given, so that the mix of classes does not matter where those are right.
METHODS = ("none", "threshold", "mean", "distance's mean", "mean by class")
MOVE_ALL, MOVE_DISTANCE = ("mean", "mean by class"), ("mean", "distance's mean", "mean by class")

Array = np.ndarray


def features_of(trunk: Any, settings: Any, pixels: Array) -> Array:
    """float32 [n, D] of uint8 [n, 3, S, S]."""
    found = []
    with torch.inference_mode():
        for part in torch.from_numpy(pixels).split(32):
            x = normalise(part, settings).contiguous(memory_format=torch.channels_last)
            found.append(trunk.features(x).numpy())
    return np.concatenate(found)


def shifted_features(source: Source, sets: dict[str, str]) -> dict[str, Array]:
    """Set -> float32 [1 + len(CASES), n, D], undisturbed first; and "labels" int64 [n] of the set "id"."""
    found: dict[str, Array] = {}
    settings, trunk = source.model.preprocess, folded(source.model)
    for name, data in sets.items():
        images = whole_dataset(data, labelled=name == "id")
        chosen = np.sort(np.random.default_rng(SEED).permutation(images.indices)[: MOST[name]])
        pixels, labels = images.read(settings, chosen)
        if name == "id":
            found["labels"] = model_labels(labels, images.source.classes, source.model.classes)
        versions = [features_of(trunk, settings, pixels)]
        for case in CASES:
            moved = np.stack([shift(one, *case, (SEED, int(i))) for one, i in zip(pixels, chosen, strict=True)])
            versions.append(features_of(trunk, settings, moved))
            print(name, *case, flush=True)
        found[name] = np.stack(versions)
    return found


class Judge:
    """What ships, in fp32, with another mean of the features and another threshold."""

    def __init__(self, source: Source):
        shipped = ship_score(source, want_score(source, "gen+mahalanobispp", None, print), print)
        data = fit_data(source, print)
        assert isinstance(shipped.detector, ScoreSum) and shipped.out_of_fold is not None and source.folds is not None
        self.score, self.weight, self.bias = shipped.detector, data.weight, data.bias
        n = len(source.folds.images)
        self.mean = data.features[:n].mean(axis=0)
        labels = data.labels[:n]
        self.means = np.stack([data.features[:n][labels == label].mean(axis=0) for label in range(len(self.bias))])
        thresholds = source.images.thresholds
        assert thresholds is not None
        known = data.features[source.folds.rows(thresholds.indices)]
        self.threshold = conformal_threshold(self.scores(known, 0, "none") + shipped.out_of_fold.change).value

    def logits(self, z: Array, by: Array | int, method: str) -> Array:
        """Of features [n, D], moved by [D] where the method moves those of the classifier."""
        return (z - by if method in MOVE_ALL else z) @ self.weight.T + self.bias

    def scores(self, z: Array, by: Array | int, method: str) -> Array:
        """Likewise; moved where the method moves those of the distance."""
        return self.score.score(z - by if method in MOVE_DISTANCE else z, self.logits(z, by, method), np.zeros(len(z)))

    def figures(self, method: str, frames: Array, sets: dict[str, Array], labels: Array) -> dict[str, float]:
        """Of known ("id"), near and far images, given the frames [50, D]; `labels` of the known ones."""
        given = self.logits(frames, 0, "none").argmax(axis=1)
        by = frames.mean(axis=0) - (self.means[given].mean(axis=0) if method == "mean by class" else self.mean)
        scores = {name: self.scores(z, by, method) for name, z in sets.items()}
        threshold = self.threshold
        if method != "none":
            threshold = conformal_threshold(self.scores(frames, by, method)).value
        found = {"accuracy": float((self.logits(sets["id"], by, method).argmax(1) == labels).mean())}
        for name, values in scores.items():
            found[f"accepted_{name}"] = float((values <= threshold).mean())
            if name != "id":
                found[f"auroc_{name}"] = detection_metrics(scores["id"], values, bootstrap=0)["auroc"]
        return found


def draws(labels: Array, mix: str) -> list[Array]:
    """The frames of each draw, of all classes or of `CLASSES` of them: positions [50]."""
    found = []
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(labels))
        if mix == "two classes":
            classes = rng.permutation(np.unique(labels))
            while np.isin(labels, classes[:CLASSES]).sum() < FRAMES:  # too few images of them
                classes = np.roll(classes, 1)
            order = order[np.isin(labels[order], classes[:CLASSES])]
        found.append(order[:FRAMES])
    return found


def measure(judge: Judge, found: dict[str, Array]) -> list[dict[str, Any]]:
    """A row for each case, mix of classes and method, a mean over the draws."""
    labels, rows = found["labels"], []
    for number, (kind, strength) in enumerate([(UNDISTURBED, UNDISTURBED), *CASES]):
        sets = {name: found[name][number] for name in MOST}
        for mix in ("all classes", "two classes"):
            for method in METHODS:
                each = []
                for frames in draws(labels, mix):
                    rest = np.setdiff1d(np.arange(len(labels)), frames)
                    judged = sets | {"id": sets["id"][rest]}
                    each.append(judge.figures(method, sets["id"][frames], judged, labels[rest]))
                means = {key: round(float(np.mean([row[key] for row in each])), 4) for key in each[0]}
                rows.append({"kind": kind, "strength": strength, "frames": mix, "method": method, **means})
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    """Means over the kinds of each strength, and the kind of which the fewest are accepted."""
    for strength in dict.fromkeys(row["strength"] for row in rows):
        for mix in dict.fromkeys(row["frames"] for row in rows):
            for method in METHODS:
                chosen = [r for r in rows if (r["strength"], r["frames"], r["method"]) == (strength, mix, method)]
                keys = [key for key in chosen[0] if isinstance(chosen[0][key], float)]
                means = ", ".join(f"{key} {100 * np.mean([row[key] for row in chosen]):.1f}" for key in keys)
                least = min(chosen, key=lambda row: row["accepted_id"])
                worst = f"least accepted {100 * least['accepted_id']:.1f} ({least['kind']})"
                print(f"{strength}, frames of {mix}, {method}: {means}; {worst}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    for name in MOST:
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--json", required=True)
    parser.add_argument("--features", help="an .npz file, read if it is there")
    given = parser.parse_args()
    source, sets = from_run(given.run), {name: getattr(given, name) for name in MOST}
    if given.features and Path(given.features).is_file():
        found = dict(np.load(given.features))
    else:
        found = shifted_features(source, sets)
        if given.features:
            np.savez(given.features, **found)
    rows = measure(Judge(source), found)
    table(rows)
    write_json(given.json, {"data": source.facts["data"], **sets, "frames": FRAMES, "draws": DRAWS, "rows": rows})


if __name__ == "__main__":
    main()
