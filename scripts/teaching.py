"""What `ssod-edge teach` makes of few photos: new classes, each by itself, from some photos of it, in several draws.

Usage: python scripts/teaching.py EXPORT --new DATA --test DATA [--photos 5,10,20,50] [--draws 5] [--max-drop 1]

EXPORT holds `features.npz`. NEW has classes that the model does not know; TEST has those and the known ones. Prints for
each class and number of photos, as means over the draws: the share of its other photos (of NEW and of TEST) that are
given the class, and accepted too; the points of accuracy that the known classes lose on TEST; how many of these are
accepted; the first and the third for a last layer that is fitted to all classes from the start, with the same photos;
AUROC of known photos of TEST against those of classes that stay unknown, before and after.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from sklearn.metrics import roc_auc_score

from ssod_edge.data.disturbances import seeded_copy
from ssod_edge.data.images import whole_dataset
from ssod_edge.data.sources import model_labels
from ssod_edge.detect.regression import fit_layer
from ssod_edge.files import write_json
from ssod_edge.runtime.export import Export
from ssod_edge.teach.fitted import Fitted, Lesson, fit_lesson
from ssod_edge.teach.photos import Photos
from ssod_edge.teach.teach import FEW, SPENT, Model, TeachOptions


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


def lesson(model: Model, name: str, plain: np.ndarray, copies: np.ndarray, max_drop: float) -> Fitted:
    """The model after these photos of a new class."""
    m, n = len(model.spec.classes), len(plain)
    photos = Photos.none((*model.spec.classes, name), plain.shape[1], model.spec.preprocess)
    photos = replace(photos, plain=plain, disturbed=copies, labels=np.full(n, m), added=1)
    few = (m,) if n < FEW else ()
    most = SPENT * max_drop / 100
    return fit_lesson(Lesson(model.stored, model.heads, model.row, photos, model.spec.score_name, few, most))


def from_the_start(model: Model, new: np.ndarray, copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last layer that training fits to all stored images and these photos; each class counts alike."""
    plain, disturbed, labels = model.stored.taught
    m = len(model.spec.classes)
    labels = np.concatenate([labels, np.full(len(new), m)])
    counts = (len(labels) / ((m + 1) * np.bincount(labels)))[labels].astype(np.float32)
    images = np.concatenate([plain, new]), np.concatenate([disturbed, copies])
    return fit_layer(*images, labels, m + 1, counts, model.stored.folds.strength)


def percent_auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """AUROC of scores in %."""
    labels = np.repeat([0, 1], [len(known), len(unknown)])
    return 100 * float(roc_auc_score(labels, np.concatenate([known, unknown])))


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
    m = len(model.spec.classes)
    (new, copies), new_labels, new_classes = features(model, options.new, copies=True)
    (test,), test_labels, test_classes = features(model, options.test, copies=False)
    numbers = model_labels(test_labels, test_classes, model.spec.classes)
    known, labels = test[numbers >= 0], numbers[numbers >= 0]
    was, _, score = model.say_of(known)
    before = float((was.argmax(axis=1) == labels).mean())
    kept = float((score <= model.threshold.value).mean())
    rows: dict[str, dict[str, list[dict[str, float]]]] = {}
    for number, name in enumerate(new_classes):
        mine = np.flatnonzero(new_labels == number)
        still = test[(numbers < 0) & ~is_of(test_labels, test_classes, name)]
        found_before = percent_auroc(score, model.say_of(still)[2]) if len(still) else float("nan")
        for count in (count for count in map(int, options.photos.split(",")) if count < len(mine)):
            for draw in range(options.draws):
                order = np.random.default_rng((count, draw)).permutation(mine)
                chosen, others = order[:count], order[count:]
                shown = np.concatenate([new[others], test[is_of(test_labels, test_classes, name)]])
                fitted = lesson(model, name, new[chosen], copies[chosen], options.max_drop)
                threshold = fitted.threshold(model.threshold.target_tpr, "stored features").value
                logits, _, scores = fitted.say_of(shown)
                answers, _, after = fitted.say_of(known)
                weight, bias = from_the_start(model, new[chosen], copies[chosen])
                joint = (known @ weight.T + bias).argmax(axis=1)
                row = {
                    "recall": 100 * float((logits.argmax(axis=1) == m).mean()),
                    "accepted_as_it": 100 * float(((logits.argmax(axis=1) == m) & (scores <= threshold)).mean()),
                    "lost": 100 * (before - float((answers.argmax(axis=1) == labels).mean())),
                    "known_accepted": 100 * float((after <= threshold).mean()),
                    "from_start_recall": 100 * float(((shown @ weight.T + bias).argmax(axis=1) == m).mean()),
                    "from_start_lost": 100 * (before - float((joint == labels).mean())),
                }
                if len(still):
                    row |= {
                        "still_unknown_auroc_before": found_before,
                        "still_unknown_auroc": percent_auroc(after, fitted.say_of(still)[2]),
                    }
                rows.setdefault(name, {}).setdefault(str(count), []).append(row)
            found = rows[name][str(count)]
            means = {key: float(np.mean([row[key] for row in found])) for key in found[0]}
            print(f"{name}, {count} photos: " + ", ".join(f"{key} {value:.1f}" for key, value in means.items()))
    print(f"before: accuracy {before:.1%}, {kept:.1%} of {len(known)} known photos accepted")
    if options.json:
        record = {"accuracy_before": before, "known_accepted_before": kept, "known": m, "max_drop": options.max_drop}
        write_json(options.json, {**record, "draws": rows})


def is_of(labels: np.ndarray, classes: tuple[str, ...], name: str) -> np.ndarray:
    """Whether each photo is of the class of this name."""
    return labels == (classes.index(name) if name in classes else -1)


if __name__ == "__main__":
    main()
