"""Training that keeps published features: the last layer by regression, then perhaps a branch, or the upper blocks."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssod_edge.config import prior_score
from ssod_edge.data.splits import Indices
from ssod_edge.detect.regression import LinearHead, fit_head, fit_layer
from ssod_edge.errors import UsageError
from ssod_edge.terminal import image_bar
from ssod_edge.training.branch import SmallBranch
from ssod_edge.training.checkpoint import BEST, FOLDS
from ssod_edge.training.distributed import world_size
from ssod_edge.training.disturbed import FIT_IMAGES, Disturbed, judge_disturbed, some
from ssod_edge.training.features import Features, check_features, features_of, fitting_data, keep_features
from ssod_edge.training.labels import unseen_probs, write_labels
from ssod_edge.training.lesson import DISTURBED, MIRRORED, PLAIN, Further, Lesson
from ssod_edge.training.negatives import FittedRow, fit_row
from ssod_edge.training.objective import class_weights
from ssod_edge.training.session import Session, append_metrics, say
from ssod_edge.training.upper import UpperBlocks
from ssod_edge.training.validated import class_logits, write_validation

#: Photos for thresholds from which on `auto` tries what must not learn from them: with 100, the share of known photos
#: that is accepted is off by 2 points (one deviation). The last layer alone has fits that left each photo out.
LEAST_CALIB = 100


def tune(session: Session) -> None:
    """Train as `TrainConfig.tune` says, but for `all`; the run folder gets its checkpoint and a line of metrics.

    Raises:
        UsageError: several processes, too many images, or a backbone that has no such part to teach.
        ImageError: an image cannot be read.
    """
    config = session.config
    if world_size() > 1:
        raise UsageError(f"--tune {config.tune} runs in one process. Leave torchrun out, or use --tune all")
    check_features(session.model, session.source)
    further = None if config.tune == "head" else _further(session)
    session.begin_folder()
    started = time.monotonic()
    features = _features(session) if further is None else _read(session, further)
    session.keep_near_copies_together(features.plain)
    fitted = time.monotonic()
    taught = _teach(session, features, pool=further is None or config.tune == "auto")
    say(
        f"head: {taught.held_out} ({fitted - started:.0f} s for features of {len(session.source)} photos and disturbed "
        f"copies, {time.monotonic() - fitted:.0f} s for the head)"
    )
    probs = unseen_probs(taught.head, features.plain, taught.images)
    if probs is not None and (line := write_labels(session.run, session.source, probs)):
        say(line)
    was = "head" if session.published else "upper"
    facts: dict[str, Any] = {"tuned": was, "tried": {"head": taught.held_out.record}}
    if further is not None:
        taught = _try(session, further, taught, facts)
    head, images = taught.head, taught.images
    facts["strength"] = head.strength
    pooled = len(images) > len(session.splits.train)
    rows = fit_row(session, images, head.fold)
    if rows is not None:
        facts["row"] = rows.facts
    facts["disturbed"] = asdict(_say_disturbed(session, taught, facts["tuned"]))
    _say_classes(session, taught)
    folds = _folds(session, head, images, rows) if pooled else {}
    _write(session, taught.held_out.accuracy, time.monotonic() - started, facts, folds)


@dataclass(frozen=True)
class Taught:
    """A last layer that is in the model.

    Attributes:
        head: as it was fitted, before any tuning.
        images: that it was fitted on.
        features: of all images, as the network is now.
        held_out: what it says of validation images.
    """

    head: LinearHead
    images: Indices
    features: Features
    held_out: HeldOut


def _try(session: Session, further: Further, taught: Taught, facts: dict[str, Any]) -> Taught:
    """Teach a part of the network, and leave it as it was where `auto` is better off without; what was tried joins the
    facts.

    What it is weighed against is the last layer that would ship without it. That one may have learnt the images for
    thresholds too, which the part must not see: it begins with one that has not, but for the choice of its strength.
    """
    untouched, train = copy.deepcopy(session.model), session.splits.train
    if len(taught.images) > len(train):
        plain, disturbed, labels = taught.features.plain[train], taught.features.disturbed[train], session.source.labels
        counts, classes = _counts(session, train), len(session.source.classes)
        _put(session, *fit_layer(plain, disturbed, labels[train], classes, counts, taught.head.strength))
    after = replace(_learn(session, further, taught), images=train)
    facts["tried"][further.name] = after.held_out.record
    better = after.held_out.better_than(taught.held_out)
    if session.config.tune == "auto" and not better:
        session.model = untouched
        pooled = f". The {len(taught.images)} photos for training and for thresholds have taught the last layer"
        say(f"without the {further.what}: with it, no more held-out photos are right{pooled}")
        return taught
    if better:
        say(f"with the {further.what}: more held-out photos and disturbed copies are right than without")
    else:
        say(f"warning: with the {further.what} no more held-out photos are right. Without it: --tune head")
    if facts["tuned"] == "head":
        facts["tuned"] = further.name
    return after


def _say_disturbed(session: Session, taught: Taught, tuned: str) -> Disturbed:
    """Tell what becomes of the validation images."""
    features, val, fitted = taught.features, session.splits.val, some(taught.images, FIT_IMAGES)
    labels = session.source.labels
    both = np.concatenate([features.plain[fitted], features.disturbed[fitted]])
    training = fitting_data(session.model, both, np.tile(labels[fitted], 2), tuned)
    found = judge_disturbed(
        session.model,
        Features(features.plain[val], features.disturbed[val]),
        labels[val],
        training,
        prior_score(tuned),
    )
    say(str(found))
    return found


def _say_classes(session: Session, taught: Taught) -> None:
    """Tell of the validation images class by class; thresholds' images that the last layer has learnt count as new."""
    source, splits, features = session.source, session.splits, taught.features.plain
    if len(taught.images) > len(splits.train) and taught.head.left_out is not None:
        held_out = taught.head.left_out, source.labels[taught.images]
    else:
        held_out = class_logits(session.model, features[splits.calib]), source.labels[splits.calib]
    logits = class_logits(session.model, features[splits.val])
    for line in write_validation(session.run, source, splits.val, logits, held_out):
        say(line)


def _folds(session: Session, head: LinearHead, images: Indices, rows: FittedRow | None) -> dict[str, Tensor]:
    """What the checkpoint keeps of the fits without each part of the images (`ssod_edge.detect.folds.Folds`)."""
    counts = _counts(session, images)
    arrays = {"images": images, "fold": head.fold, "weight": head.fold_weight, "bias": head.fold_bias}
    arrays["counts"] = np.ones(len(images), np.float32) if counts is None else counts
    arrays["strength"] = np.array(head.strength)
    if rows is not None:
        arrays |= {"row": rows.fold_row, "row_bias": rows.fold_bias}
    return {f"{FOLDS}{name}": torch.from_numpy(array) for name, array in arrays.items()}


@dataclass(frozen=True)
class HeldOut:
    """What a network says of n validation images and a disturbed copy of each.

    Attributes:
        right: bool [2, n], whether it classifies them rightly; the copies last.
        loss: mean log loss of the images.
    """

    right: NDArray[np.bool_]
    loss: float

    @property
    def accuracy(self) -> float:
        """Of the images, in [0, 1]."""
        return float(self.right[0].mean())

    @property
    def record(self) -> dict[str, float]:
        """For the run."""
        images, copies = self.right.mean(axis=1).tolist()
        return {"images": self.right.shape[1], "accuracy": images, "disturbed_accuracy": copies, "loss": self.loss}

    def __str__(self) -> str:
        images, copies = self.right.mean(axis=1)
        return f"{images:.1%} of {self.right.shape[1]} validation images and {copies:.1%} of disturbed copies are right"

    def better_than(self, other: HeldOut) -> bool:
        """Whether more of the images and copies are right.

        More than that is not asked for: 200 images cannot prove a point or two, which is what tuning brings where it
        brings anything (docs/lab/results.md).
        """
        return bool(self.right.sum() > other.right.sum())


def _further(session: Session) -> Further | None:
    """What is taught beyond the last layer; None, and a line, where `auto` does without: no such part, too many images,
    or too few for a threshold of the part's own.
    """
    auto, calib = session.config.tune == "auto", len(session.splits.calib)
    if auto and session.pools and calib < LEAST_CALIB:
        say(
            f"the last layer alone learns: a branch would leave {calib} of {len(session.source)} photos for "
            f"thresholds, and {LEAST_CALIB} are asked for. Without it, all count"
        )
        return None
    kind: type[Further] = UpperBlocks if session.config.tune == "upper" else SmallBranch
    try:
        return kind(session.model, len(session.source))
    except UsageError as error:
        if not auto:
            raise
        say(f"the last layer alone learns: {error}")
        return None


def _learn(session: Session, further: Further, taught: Taught) -> Taught:
    """Teach a part, and keep the features of the changed network."""
    started = time.monotonic()
    model, source, config = session.model, session.source, session.config
    mirrored, epochs = source.hflip_ok and config.hflip > 0, further.pace.epochs
    versions = (PLAIN, MIRRORED, DISTURBED) if mirrored else (PLAIN, DISTURBED)  # if its class is the same
    lesson = Lesson(source.labels, session.splits.train, config.seed, config.class_weights, versions)
    with image_bar(further.what, epochs * len(lesson.train)) as advance:
        further.learn(taught.features, lesson, lambda epoch, loss: _say_epoch(epoch, epochs, loss), advance)
    features = further.features()
    keep_features(model, source, session.run.parent, features)
    after = _held_out(session, features)
    say(f"{further.name}: {after} ({time.monotonic() - started:.0f} s)")
    return replace(taught, features=features, held_out=after)


def _say_epoch(epoch: int, epochs: int, loss: float) -> None:
    if epoch % -(-epochs // 5) == 0 or epoch == epochs:  # five lines at most
        say(f"epoch {epoch}/{epochs}  loss {loss:.4f}")


def _held_out(session: Session, features: Features) -> HeldOut:
    """Of the validation images, by the model's last layer as it is."""
    val = session.splits.val
    labels = torch.from_numpy(np.asarray(session.source.labels[val])).to(session.device)
    with torch.inference_mode():
        plain, disturbed = (
            session.model.head(torch.from_numpy(z[val]).to(session.device))[0]
            for z in (features.plain, features.disturbed)
        )
        loss = float(torch.nn.functional.cross_entropy(plain, labels))
        right = torch.stack([logits.argmax(1) == labels for logits in (plain, disturbed)])
    return HeldOut(right.cpu().numpy(), loss)


def _features(session: Session) -> Features:
    """Of all images of the run, kept in the folder of runs."""
    count = len(session.source)
    with image_bar("features", count) as advance:
        return features_of(session.model, session.source, session.run.parent, session.config.workers, advance)


def _read(session: Session, further: Further) -> Features:
    """Of all images, kept in the folder of runs; and what a part of the network learns from."""
    source = session.source
    with image_bar("features", len(source)) as advance:
        features = further.read(source, session.config.workers, advance)
    keep_features(session.model, source, session.run.parent, features)
    return features


def _teach(session: Session, features: Features, pool: bool) -> Taught:
    """Fit a last layer, on the images for thresholds too if `pool` and that can be, and put it into the model."""
    head, images = None, session.splits.train
    if pool and session.pools:
        head, images = _fit_on(session, features, session.pooled), session.pooled
    if head is None or not len(head.fold):
        head, images = _fit_on(session, features, session.splits.train), session.splits.train
    _put(session, head.weight, head.bias)
    return Taught(head, images, features, _held_out(session, features))


def _put(session: Session, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
    """Make this the model's last layer."""
    classifier = session.model.classifier
    with torch.no_grad():
        classifier.weight.copy_(torch.from_numpy(weight))
        if classifier.bias is not None:
            classifier.bias.copy_(torch.from_numpy(bias))


def _fit_on(session: Session, features: Features, images: Indices) -> LinearHead:
    source = session.source
    groups = None if session.groups is None else session.groups[images]
    plain, disturbed, labels = features.plain[images], features.disturbed[images], source.labels[images]
    return fit_head(plain, disturbed, labels, len(source.classes), _counts(session, images), groups)


def _counts(session: Session, images: Indices) -> NDArray[np.float32] | None:
    """How much each image counts; None: all the same."""
    labels = session.source.labels[images]
    by_class = class_weights(labels, session.config.class_weights)
    return None if by_class is None else by_class.numpy()[labels]


def _write(
    session: Session, accuracy: float, seconds: float, facts: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    row = {"epoch": 1, "val_accuracy": accuracy, "seconds": round(seconds, 3), **facts}
    append_metrics(session.run / "metrics.jsonl", {**row, "started_from": session.started_from})
    session.save(BEST, 1, accuracy, tensors, facts)
