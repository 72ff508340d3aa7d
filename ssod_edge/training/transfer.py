"""Training that keeps published features: the last layer by regression, then perhaps the upper blocks, gently."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from ssod_edge.errors import UsageError
from ssod_edge.terminal import image_bar
from ssod_edge.training.checkpoint import BEST
from ssod_edge.training.distributed import world_size
from ssod_edge.training.features import Features, features_of
from ssod_edge.training.regression import LinearHead, fit_head
from ssod_edge.training.session import Session, append_metrics, say


def tune(session: Session) -> None:
    """Train as `TrainConfig.tune` says, but for `all`; the run folder gets its checkpoint and a line of metrics.

    Raises:
        UsageError: several processes, or classes without training images.
        ImageError: an image cannot be read.
    """
    if world_size() > 1:
        raise UsageError(f"--tune {session.config.tune} runs in one process. Leave torchrun out, or use --tune all")
    session.begin_folder()
    started = time.monotonic()
    features = _features(session)
    read = time.monotonic()
    head = _fit(session, features)
    set_head(session, head)
    accuracy = _accuracy(session, head, features)
    say(
        f"head: {accuracy:.1%} of {len(session.splits.val)} validation images, {head.accuracy:.1%} of the training "
        f"images when left out of the fit ({read - started:.0f} s for features, {time.monotonic() - read:.0f} s)"
    )
    _write(session, accuracy, time.monotonic() - started, {"tuned": "head", "strength": head.strength})


def _features(session: Session) -> Features:
    """Of all images of the run, kept in the folder of runs."""
    count = len(session.source)
    with image_bar("features", count) as advance:
        return features_of(session.model, session.source, session.run.parent, session.config.workers, advance)


def _fit(session: Session, features: Features) -> LinearHead:
    train, source = session.splits.train, session.source
    return fit_head(features.plain[train], features.disturbed[train], source.labels[train], len(source.classes))


def set_head(session: Session, head: LinearHead) -> None:
    """Put a fitted last layer into the model."""
    classifier = session.model.classifier
    with torch.no_grad():
        classifier.weight.copy_(torch.from_numpy(head.weight))
        if classifier.bias is not None:
            classifier.bias.copy_(torch.from_numpy(head.bias))


def _accuracy(session: Session, head: LinearHead, features: Features) -> float:
    val = session.splits.val
    right = head.logits(features.plain[val]).argmax(axis=1) == session.source.labels[val]
    return float(np.mean(right))


def _write(session: Session, accuracy: float, seconds: float, facts: dict[str, Any]) -> None:
    row = {"epoch": 1, "val_accuracy": accuracy, "seconds": round(seconds, 3), **facts}
    append_metrics(session.run / "metrics.jsonl", {**row, "started_from": session.started_from})
    session.save(BEST, 1, accuracy, meta=facts)
