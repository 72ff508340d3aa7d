"""The `calibrate` command: new thresholds for an export, from the user's in-distribution images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from ssod_edge.data.inputs import list_images
from ssod_edge.data.pixels import ImageLike
from ssod_edge.detect.metrics import check_target_tpr
from ssod_edge.errors import (
    EXIT_OK,
    EXIT_SOME_FAILED,
    ArtifactError,
    EngineError,
    ImageError,
    MissingExtraError,
    UsageError,
    VerificationError,
)
from ssod_edge.files import check_output, same_data
from ssod_edge.runtime.calibrate import calibrate, trained_on
from ssod_edge.runtime.open import find_export, open_runner
from ssod_edge.spec import SPEC_NAME, Artifact, Spec, load_spec

#: Draws the images afresh for each artifact, and takes the message of each one that cannot be read.
Draw = Callable[[Callable[[str], Any]], Iterator[ImageLike]]


def run_calibrate(folder: str, data: str, tpr: float = 0.95, artifact: str | None = None) -> int:
    """Refit the threshold of one artifact, or of every artifact; returns the exit code.

    Each artifact is fitted on its own scores and verified at its new threshold. One that is damaged, cannot run
    here, or fails, keeps its old threshold and is reported.

    Args:
        folder: an export folder, or the run folder that holds it.
        data: a folder of in-distribution images, or what `ssod_edge.data.sources.open_dataset` takes (which needs
            torch). Of the data the run was trained on, the calibration split is taken.
        tpr: share of in-distribution images to keep known, in (0, 1).
        artifact: the name of the only one to calibrate.

    Raises:
        UsageError: untrained weights, no such artifact or data, or too few images.
        OutputError: the export cannot be written to.
    """
    export = find_export(folder)
    spec = load_spec(export)
    if not spec.trained:
        raise UsageError("untrained weights have no threshold: their scores mean nothing. Train a model and export it.")
    check_target_tpr(tpr)
    check_output(export / SPEC_NAME)
    targets = spec.artifacts if artifact is None else (spec.artifact(artifact),)
    draw, description = _id_images(data, spec, export)
    unreadable: dict[str, None] = {}
    code = EXIT_OK
    for target in targets:
        try:
            # Not verified on opening: an old threshold may be what fails, and the new one is verified.
            with open_runner(export, artifact=target.name, verify=False) as runner:
                failed = unreadable.setdefault
                done = calibrate(runner, export, draw(failed), tpr, description, failed)
        except (ArtifactError, EngineError, MissingExtraError, VerificationError) as error:
            click.echo(f"{target.name}: not calibrated: {error}", err=True)
            code = max(code, error.exit_code)
            continue
        print(_line(target, done))
    for message in unreadable:
        click.echo(f"left out: {message}", err=True)
    return code or (EXIT_SOME_FAILED if unreadable else EXIT_OK)


def _line(before: Artifact, after: Artifact) -> str:
    old = "none" if before.threshold is None else f"{before.threshold.value:.4f}"
    new, figures = after.threshold, after.verification
    assert new is not None and figures is not None
    return (
        f"{after.name}: threshold {old} -> {new.value:.4f}, keeps {new.fitted_tpr:.1%} of {new.n} images known "
        f"(target {new.target_tpr:.0%}); {figures['decision_flips']} of {figures['n']} reference images change sides "
        "against the trained model"
    )


def _trained_on(data: str, spec: Spec, export: Path) -> bool:
    """Whether a folder holds the images of the training, wherever they lie now."""
    if same_data(data, spec.source.get("data")):
        return True
    if not (export.resolve().parent / "splits.json").is_file():
        return False  # a device: it has no PyTorch to open a data set with, and no splits to keep to
    from ssod_edge.data.sources import open_dataset

    try:
        return open_dataset(data, labelled=False).fingerprint == spec.source.get("data_fingerprint")
    except (UsageError, MissingExtraError):
        return False


def _id_images(data: str, spec: Spec, export: Path) -> tuple[Draw, str]:
    """How to draw the images, and what they are, for the record."""
    if Path(data).is_dir() and not _trained_on(data, spec, export):
        paths = list_images([data])
        return lambda failed: iter(paths), f"folder '{Path(data).name}', {len(paths)} images"
    from ssod_edge.data.sources import open_dataset
    from ssod_edge.data.splits import read_splits

    dataset = open_dataset(data, labelled=False)
    indices: list[int] = list(range(len(dataset)))
    description = f"'{data}', fingerprint {dataset.fingerprint[:12]}"
    splits_hash = spec.source.get("splits_hash")  # none where the weights were trained elsewhere
    if splits_hash and dataset.fingerprint == spec.source.get("data_fingerprint"):
        if not (export.resolve().parent / "splits.json").is_file():
            raise trained_on(data)
        indices = read_splits(export.resolve().parent, dataset, str(splits_hash)).calib.tolist()
        description = f"'{data}', calib split {str(splits_hash)[:12]}"

    def draw(failed: Callable[[str], Any]) -> Iterator[ImageLike]:
        for index in indices:
            try:
                yield dataset.image(index)
            except ImageError as error:
                failed(str(error))

    return draw, description
