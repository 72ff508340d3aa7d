"""The images of an evaluation: which ones a run may be judged on, fitted on and calibrated on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ssod_edge.data.layout import is_training_part
from ssod_edge.data.negatives import PARTS
from ssod_edge.data.sources import ImageSource, check_classes, open_dataset
from ssod_edge.data.splits import MIN_CALIB, Indices
from ssod_edge.detect.sums import FittedScore
from ssod_edge.errors import SsodEdgeError, UsageError
from ssod_edge.files import real_path, same_data
from ssod_edge.spec import Spec
from ssod_edge.terminal import printable, tell
from ssod_edge.training.run import Run


def calibration_images(run: Run) -> tuple[ImageSource, Indices] | None:
    """The run's calibration split, or all images that have folds where it is small; None, and a line that says why,
    where there is neither.
    """
    try:
        source, splits = run.splits("there are no thresholds without them")
        calib = splits.calib
        if len(calib) < MIN_CALIB and run.folds is not None:
            calib = run.folds.images
        if len(calib) < MIN_CALIB:
            raise UsageError(
                f"the calibration split has {len(calib)} images, and a 95% threshold needs {MIN_CALIB}. "
                "Train with a larger --calib-fraction"
            )
    except UsageError as error:
        tell(f"no figures at a threshold: {error}", err=True)
        return None
    return source, calib


def shipped_score(run: Run, failed: str) -> tuple[Spec | None, FittedScore | None]:
    """The run's export and the state of its score; None, and a line, where no export of this checkpoint can be read."""
    try:
        export = run.export
        return (None, None) if export is None else (export.spec, export.score_state(run.model.classifier.in_features))
    except SsodEdgeError as error:
        tell(f"{failed}: {printable(str(error))}", err=True)
        return None, None


def baseline_images(run: Run, names: list[str], fit_images: int | None) -> tuple[ImageSource, Indices]:
    """Training images for the baselines that are fitted."""
    source, splits = run.splits(f"leave out the baselines that are fitted on it: {', '.join(names)}")
    return source, choose_images(source.labels, splits.train, fit_images)


def id_images(run: Run, id_data: str | None) -> tuple[ImageSource, Indices]:
    """The images of known classes: the run's validation split, or those that are named."""
    if id_data is None:
        source, splits = run.splits("name the ID images with --id")
        return source, splits.val
    source = open_dataset(id_data)
    check_classes(id_data, source.classes, run.model.classes)
    return source, np.arange(len(source))


def held_out_negatives(run: Run) -> tuple[ImageSource, Indices, dict[str, Any]] | None:
    """The negatives that nothing but an evaluation sees, and what the report says of them.

    None where the run has none; None, and a line that says why, where they cannot be read.
    """
    try:
        found = run.negatives("put them back")
    except UsageError as error:
        tell(f"no figures of the held-out negatives: {error}", err=True)
        return None
    if found is None:
        return None
    learnt_from, chosen_by, held_out = (len(found.parts[part]) for part in PARTS)
    counts = {"learnt_from": learnt_from, "chosen_by": chosen_by, "held_out": held_out}
    return found.source, found.parts["test"], {"data": found.name, **counts}


def warn_of_known_images(
    ood_data: Mapping[str, str], ood_sources: Mapping[str, ImageSource], source: ImageSource, meta: Mapping[str, Any]
) -> None:
    """Say so where an OOD set is the ID or the training data: its figures would mean nothing."""
    known = {source.name: source.fingerprint, str(meta.get("data")): meta.get("data_fingerprint")}
    for name, data in ood_data.items():
        taught = meta.get("negatives")
        if taught and (ood_sources[name].fingerprint == meta.get("negatives_fingerprint") or _overlap(data, taught)):
            tell(
                f"warning: the OOD set '{name}' ({data}) holds negatives that the network learnt from, so that its "
                "figures flatter; those of the held-out ones are in the table too",
                err=True,
            )
        for id_data, fingerprint in known.items():
            if ood_sources[name].fingerprint == fingerprint or _overlap(data, id_data):
                tell(
                    f"warning: the OOD set '{name}' ({data}) holds images of the in-distribution data '{id_data}'; "
                    "its figures mean nothing. Name images of other things",
                    err=True,
                )
                break


def warn_of_used_images(source: ImageSource, id_data: str | None, meta: Mapping[str, Any], spec: Spec | None) -> None:
    """Say so where the ID images are not new to the network, or to the score that its export ships.

    Args:
        source: the ID images.
        id_data: how the user named them; None where they are the run's validation split.
        meta: of the checkpoint.
        spec: of its export, if there is one.
    """
    if id_data is None:
        if spec is None or not spec.choice:
            return
        message = (
            f"note: '{spec.score_name}' was chosen by these validation images (export --score auto); name others "
            "with --id for figures that no choice has seen"
        )
    elif (
        same_data(id_data, meta.get("data"))
        or is_training_part(id_data, meta.get("data"))
        or source.fingerprint == meta.get("data_fingerprint")
    ):
        message = (
            f"warning: the network was trained on '{id_data}', or on images of the same names, so that these are not "
            "figures for new images. Leave --id out for the run's validation split, or name other images"
        )
    elif spec is not None and source.fingerprint[:12] in f"{spec.detector.get('data')}, {spec.choice.get('known')}":
        message = f"warning: '{spec.score_name}' was fitted to or chosen by a part of '{id_data}'; name other images"
    else:
        return
    tell(message, err=True)


def _overlap(one: str, other: str) -> bool:
    """Whether two folders are the same, or one lies in the other."""
    a, b = real_path(one), real_path(other)
    return a.is_dir() and b.is_dir() and (a.is_relative_to(b) or b.is_relative_to(a))


def choose_images(labels: Indices, indices: Indices, n: int | None, seed: int = 0) -> Indices:
    """n of the training images, seeded, as evenly over the classes as they allow; None takes all.

    Args:
        labels: int64, of the whole data set.
        indices: int64, its training split.

    Raises:
        UsageError: fewer than one image a class.
    """
    if n is None or n >= len(indices):
        return indices
    rng, classes = np.random.default_rng(seed), np.unique(labels[indices])
    check_fit_images(n, len(classes))
    shuffled = rng.permutation(indices)
    turn = np.empty(len(shuffled), np.int64)  # the how manieth of its class each one is
    for label in classes:
        members = labels[shuffled] == label
        turn[members] = np.arange(members.sum())
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:n]])


def check_fit_images(n: int, classes: int) -> None:
    """Raises UsageError for fewer than one image a class."""
    if n < classes:
        raise UsageError(f"--fit-images {n} is fewer than one image for each of the {classes} classes")
