"""Few photos: what share of new known images a threshold out of fold accepts, and the accuracy, by photos a class.

    python scripts/few_images.py RUN --id DATA --json FILE

RUN was trained with --tune head, and its data is where it was. From its training images N of each class are drawn,
several times; the last layer, the detectors and the threshold are fitted to these as `train` and `export` do.
"""

from __future__ import annotations

import argparse

import numpy as np

from ssod_edge.data.images import whole_dataset
from ssod_edge.data.sources import model_labels
from ssod_edge.detect.fit import FitData
from ssod_edge.detect.folds import Folds, out_of_fold_parts
from ssod_edge.detect.metrics import conformal_threshold
from ssod_edge.detect.regression import fit_head
from ssod_edge.detect.sums import ScoreSum, fit_score
from ssod_edge.export.graph.reference import run_eager
from ssod_edge.export.graph.score import fit_data
from ssod_edge.export.graph.source import from_run
from ssod_edge.files import write_json

SCORE = "gen+mahalanobispp+residual"
EACH, DRAWS = (10, 20, 50), 6


def measure(data: FitData, chosen: np.ndarray, new: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """(share accepted, accuracy) of new images, of what is fitted to `chosen` of the n images and their copies."""
    features, labels = new
    n = len(data.features) // 2
    known, classes = data.labels[chosen], len(data.bias)
    head = fit_head(data.features[chosen], data.features[n + chosen], known, classes)
    part = data.of(np.concatenate([chosen, n + chosen])).with_head(head.weight, head.bias)
    counts = np.ones(len(chosen), np.float32)
    folds = Folds(np.arange(len(chosen)), head.fold, head.fold_weight, head.fold_bias, counts, head.strength)
    parts, _ = out_of_fold_parts(SCORE.split("+"), part, folds)
    score = fit_score(SCORE, part, parts)
    assert isinstance(score, ScoreSum)
    threshold = conformal_threshold(score.add(parts)).value
    logits = head.logits(features)
    accepted = score.score(features, logits, np.zeros(len(features))) <= threshold
    return float(accepted.mean()), float((logits.argmax(1) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--id", required=True, help="known images that the run has not seen")
    parser.add_argument("--json", required=True)
    given = parser.parse_args()
    source = from_run(given.run)
    data, test = fit_data(source, print), whole_dataset(given.id, labelled=True)
    images, found = test.read(source.model.preprocess, test.indices)
    new = run_eager(source.model, images)[2], model_labels(found, test.source.classes, source.model.classes)
    n, rows = len(data.features) // 2, []
    for each in (*EACH, None):
        figures = []
        for seed in range(1 if each is None else DRAWS):
            order = np.random.default_rng(seed).permutation(n)
            classes = (order[data.labels[order] == label][:each] for label in np.unique(data.labels))
            figures.append(measure(data, np.sort(np.concatenate([*classes])), new))
        accepted, accuracy = zip(*figures, strict=True)
        rows.append({"each": each, "images": n, "accepted": accepted, "accuracy": accuracy})
        spread = [f"{100 * np.mean(values):.1f} ± {100 * np.std(values):.1f}" for values in (accepted, accuracy)]
        print(f"{each or 'all'} of each class: accepted {spread[0]}, accuracy {spread[1]}", flush=True)
    write_json(given.json, {"data": source.facts["data"], "id": given.id, "score": SCORE, "rows": rows})


if __name__ == "__main__":
    main()
