"""`eval --leave-out`: what a run does with a class that nobody taught, by leaving out each of its own in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ssod_edge.config import UNTOUCHED, score_parts
from ssod_edge.data.sources import ImageSource, model_labels
from ssod_edge.data.splits import Indices
from ssod_edge.detect.fit import FitData
from ssod_edge.detect.folds import Folds, out_of_fold_parts
from ssod_edge.detect.regression import STRENGTHS, fit_head
from ssod_edge.errors import UsageError
from ssod_edge.evaluation.left_out import MOST_CLASSES, expectation
from ssod_edge.files import real_path
from ssod_edge.terminal import image_bar
from ssod_edge.training.features import compute_features, fitting_data, kept_features
from ssod_edge.training.run import Run

#: Training images of a run without folds that this looks at, drawn, seeded.
MOST_IMAGES = 2000
FIX = "or leave --leave-out out: it fits the last layer anew on the training images"


@dataclass(frozen=True)
class TaughtImages:
    """The images that the classes of a run are left out of.

    Attributes:
        run: the run.
        source: its data.
        images: int64 [n], ascending: those with folds, or of its training split.
    """

    run: Run
    source: ImageSource
    images: Indices

    @classmethod
    def of(cls, run: Run, fix: str = f"train on your own photos, {FIX}", most: int = MOST_IMAGES) -> TaughtImages:
        """Of a run.

        Args:
            fix: what the user can do where its training data is not at hand, as the end of the message.
            most: of a run without folds, so many training images at most.

        Raises:
            UsageError: its training data is not at hand, or has fewer than three classes.
        """
        source, splits = run.splits(fix)
        if run.folds is not None:
            images = run.folds.images
        else:
            images = np.sort(np.random.default_rng(0).permutation(splits.train)[:most])
        if (classes := len(np.unique(source.labels[images]))) < 3:
            raise UsageError(
                f"--leave-out needs three classes or more, because two must be left to tell apart, got {classes}. "
                "Leave it out, and give photos of other things: --ood NAME=DATA"
            )
        return cls(run, source, images)

    @property
    def stand_in(self) -> bool:
        """Whether the features have learnt the classes that are left out; a branch's are not read."""
        return self.run.meta.get("tuned") not in UNTOUCHED

    def expect(self, score: str, workers: int = 1) -> dict[str, Any]:
        """What to expect of a score: the JSON face of `eval --leave-out`, without photos of other things.

        Args:
            score: that ships; see `ssod_edge.config.score_parts`.
            workers: processes that read images.

        Returns:
            `score`, `images` (n), `stand_in`, `without_branch` (whether there is one, which has learnt the classes),
            `new_class` and `disturbed` of `expectation`, and of the classes left out `mean` and `worst` (least AUROC,
            most accepted).

        Raises:
            UsageError: too few images of a class.
            ImageError: an image cannot be read.
        """
        data, folds = self.fitted_on(workers)
        classes = self.run.model.classes
        out_of_fold = out_of_fold_parts(score_parts(score), data, folds)
        with image_bar("leaving classes out", min(MOST_CLASSES, len(classes))) as advance:
            found = expectation(score, data, folds, classes, out_of_fold, advance)
        aurocs, accepted = ([row[key] for row in found["new_class"].values()] for key in ("auroc", "accepted"))
        return {
            "score": score,
            "images": len(self.images),
            "stand_in": self.stand_in,
            "without_branch": self.run.model.branch is not None,
            **found,
            "mean": {"auroc": float(np.mean(aurocs)), "accepted": float(np.mean(accepted))},
            "worst": {"auroc": min(aurocs), "accepted": max(accepted)},
        }

    def fitted_on(self, workers: int = 1) -> tuple[FitData, Folds]:
        """The features of the images and of a disturbed copy of each, and the parts that are left out of a fit."""
        run, images = self.run, self.images
        kept = kept_features(run.model, self.source, real_path(run.folder).parent)
        if kept is not None:
            plain, disturbed = kept.plain[images], kept.disturbed[images]
        else:
            with image_bar("features", len(images)) as advance:
                found = compute_features(run.model, self.source, images, workers, advance)
            plain, disturbed = found.plain, found.disturbed
        labels = model_labels(self.source.labels[images], self.source.classes, run.model.classes)
        data = fitting_data(
            run.model, np.concatenate([plain, disturbed]), np.tile(labels, 2), str(run.meta.get("tuned"))
        )
        if run.folds is not None:
            return data, run.folds
        width, classes = run.model.branch_width, len(run.model.classes)
        # Training has searched for the strength on the backbone's features already.
        strengths = (float(run.meta["strength"]),) if width else STRENGTHS
        head = fit_head(plain[:, width:], disturbed[:, width:], labels, classes, strengths=strengths)
        if width:
            backbone = data.features[:, width:]
            weight, bias = head.weight.astype(np.float32), head.bias.astype(np.float32)
            data = replace(data, features=backbone, weight=weight, bias=bias, logits=backbone @ weight.T + bias)
        if not len(head.fold):
            raise UsageError(f"--leave-out needs two training images of each class or more. Add some, {FIX}")
        counts = np.ones(len(images), np.float32)
        return data, Folds(images, head.fold, head.fold_weight, head.fold_bias, counts, head.strength)


def other_photos(score: str, report: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """OOD set -> `images`, `auroc`, and `accepted`, which is None without a threshold.

    Args:
        score: by name.
        report: of an evaluation, with `results`, `mean` and `deployment`.

    Returns:
        None where the evaluation has not got the score: one with a state, of a run without an export.
    """
    rows = [row for row in report["results"] if row["score"] == score]
    if len(rows) < len(report["ood_data"]):
        return None
    at_threshold = (report["deployment"] or {}).get(score, {"ood": {}})["ood"]
    return {
        row["ood"]: {
            "images": row["n_ood"],
            "auroc": row["auroc"],
            "accepted": at_threshold.get(row["ood"], {}).get("false_accept"),
        }
        for row in rows
    }
