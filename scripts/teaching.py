"""What `ssod-edge teach` makes of few photos: new classes, each by itself, from some photos of it, in several draws.

Usage: python scripts/teaching.py EXPORT --new DATA --test DATA [--photos 5,10,20,50] [--draws 5] [--max-drop 1]

EXPORT holds `features.npz`. NEW has classes that the model does not know; TEST has those and the known ones. Prints for
each class and number of photos the share of its other photos (of NEW and of TEST) that are given the class, and the
points of accuracy that the known classes lose on TEST; mean over the draws.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from ssod_edge.data.disturbances import seeded_copy
from ssod_edge.data.images import whole_dataset
from ssod_edge.data.sources import model_labels
from ssod_edge.files import write_json
from ssod_edge.runtime.export import Export
from ssod_edge.teach.rows import Taught, add_classes, spread
from ssod_edge.teach.teach import SPENT, Model, TeachOptions


def features(model: Model, data: str, copies: bool) -> tuple[list[np.ndarray], np.ndarray, tuple[str, ...]]:
    """Features of all photos, and of their copies where they are asked for; labels; class names."""
    images = whole_dataset(data)
    parts: list[list[np.ndarray]] = [[], []]
    labels = []
    for pixels, found in images.batches(model.spec.preprocess):
        parts[0].append(model.trunk.features(pixels))
        if copies:
            parts[1].append(model.trunk.features(np.stack([*map(seeded_copy, pixels)])))
        labels.append(found)
    return [np.concatenate(part) for part in parts if part], np.concatenate(labels), images.source.classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export")
    parser.add_argument("--new", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--photos", default="5,10,20,50")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--max-drop", type=float, default=TeachOptions.max_drop)
    parser.add_argument("--json")
    options = parser.parse_args()
    model = Model(Export.at(options.export))
    plain, disturbed, labels = model.stored.taught
    m, folds, heads = len(model.spec.classes), model.stored.folds, model.heads
    (new, copies), new_labels, new_classes = features(model, options.new, copies=True)
    (test,), test_labels, test_classes = features(model, options.test, copies=False)
    known = model_labels(test_labels, test_classes, model.spec.classes)
    # Rows of new classes do not depend on each other: each draw is one, and all of them are fitted at once.
    draws = []
    for label, name in enumerate(new_classes):
        mine = np.flatnonzero(new_labels == label)
        for count in map(int, options.photos.split(",")):
            for draw in range(options.draws if count < len(mine) else 0):
                order = np.random.default_rng((count, draw)).permutation(mine)
                draws.append((name, count, order[:count], order[count:]))
    taught = np.concatenate([chosen for _, _, chosen, _ in draws])
    started = time.monotonic()
    data = Taught(
        np.concatenate([plain, new[taught]]),
        np.concatenate([disturbed, copies[taught]]),
        np.concatenate([labels, *(np.full(len(draw[2]), m + place) for place, draw in enumerate(draws))]),
        np.concatenate([folds.fold, *(spread(len(draw[2]), heads.parts) for draw in draws)]),
    )
    fitted = add_classes(heads, data, len(draws), SPENT * options.max_drop / 100)
    seconds = time.monotonic() - started
    before = float(((test @ heads.weight.T + heads.bias).argmax(axis=1) == known)[known >= 0].mean())
    rows: dict[str, dict[str, list[list[float]]]] = {}
    for place, (name, count, _, others) in enumerate(draws):
        chosen = [*range(m), m + place]
        weight, bias = fitted.weight[chosen], fitted.bias[chosen]
        answers = (test @ weight.T + bias).argmax(axis=1)
        shown = np.concatenate(
            [(new[others] @ weight.T + bias).argmax(axis=1), answers[is_of(test_labels, test_classes, name)]]
        )
        lost = before - float((answers == known)[known >= 0].mean())
        rows.setdefault(name, {}).setdefault(str(count), []).append([float((shown == m).mean()), 100 * lost])
    for name, by_count in rows.items():
        for count, found in by_count.items():
            recall, lost = np.mean(found, axis=0)
            print(f"{name:12} {count:>3} photos: {recall:.1%} known as it, {lost:.2f} points lost")
    print(f"accuracy before: {before:.1%}; {len(draws)} rows in {seconds:.1f} s")
    if options.json:
        write_json(options.json, {"accuracy_before": before, "known": m, "recall_and_points_lost": rows})


def is_of(labels: np.ndarray, classes: tuple[str, ...], name: str) -> np.ndarray:
    """Whether each photo is of the class of this name."""
    return labels == (classes.index(name) if name in classes else -1)


if __name__ == "__main__":
    main()
