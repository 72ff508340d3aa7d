"""`ssod-edge teach`: a new export of an old one, with classes more or less, proved and verified. Needs no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.data.layout import same_name
from ssod_edge.data.pixels import ImageLike
from ssod_edge.detect.detectors import Array
from ssod_edge.detect.fit import Labels
from ssod_edge.detect.scores import ood_scores
from ssod_edge.detect.stored import StoredFeatures, load_features, save_features
from ssod_edge.detect.sums import FittedScore, save_score
from ssod_edge.errors import ArtifactError, UsageError, VerificationError
from ssod_edge.export.release import Draft, Say, release
from ssod_edge.export.staging import check_place
from ssod_edge.export.versions import check_unchanged
from ssod_edge.files import claim, real_path, sha256_file, unicode_path, write_atomic
from ssod_edge.memory import give_back_freed_memory
from ssod_edge.optional import load
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.field.review import CLASSES, GROUP_LIST
from ssod_edge.runtime.field.shelf import INDEX
from ssod_edge.runtime.verify import TOLERANCES
from ssod_edge.spec import (
    DETECTOR_NAME,
    FEATURES_NAME,
    REFERENCE_NAME,
    Spec,
    Threshold,
    check_files,
)
from ssod_edge.teach.artifacts import QUANTISED, make_artifacts
from ssod_edge.teach.fitted import Fitted, Lesson, fit_lesson, outputs, without_classes
from ssod_edge.teach.given import Given, check_names, open_photos
from ssod_edge.teach.graph import Trunk, check_teachable
from ssod_edge.teach.learnt import without_copies
from ssod_edge.teach.photos import Photos, check_new, counts_of, read_photos
from ssod_edge.teach.proof import Answers, Proof, check, prove
from ssod_edge.teach.record import TaughtExport, source_record
from ssod_edge.teach.rows import Heads

#: What a threshold was fitted on, as its record begins.
FROM_FEATURES = "stored features"
#: Images of a reference.
REFERENCE_IMAGES = 256
#: Share of `max_drop` that a new class may take of the known ones, out of fold: held-out images may lose a little more.
SPENT = 0.75
#: A class that was taught from fewer photos has its distances lessened (`FitData.few`).
FEW = 200


@dataclass(frozen=True)
class TeachOptions:
    """What to teach, and what it may cost.

    Attributes:
        data: CLASS/IMAGE folders, or what else `open_photos` takes; None teaches nothing.
        forget: names of classes to take out.
        max_drop: points of the other classes' accuracy that may be lost. Where a new class looks like a known one, up
            to this much is given for it.
        alike: teach a class although its photos or its name look like those of a known one.
    """

    data: Given | None = None
    forget: tuple[str, ...] = ()
    max_drop: float = 1.0
    alike: bool = False

    def __post_init__(self) -> None:
        if self.data is None and not self.forget:
            raise UsageError("there is nothing to teach: give DATA, CLASS/IMAGE folders of photos, or --forget CLASS")
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"max_drop must lie between 0 and 100 points, got {self.max_drop}")


class Model:
    """An export as it is taught: its graphs, its features, and what it says."""

    def __init__(self, export: Export):
        import onnx

        self.export, self.spec = export, export.spec
        self.graphs = {a.precision: a for a in self.spec.artifacts if a.engine == "onnxruntime"}
        if not self.spec.features:
            raise UsageError(
                f"'{export.folder}' holds no features of the images that it was fitted on, so it cannot be taught: "
                "it was exported with --no-features, with --id, or by an earlier release. Export its run again"
            )
        if "fp32" not in self.graphs or self.graphs["fp32"].threshold is None:
            raise UsageError(
                f"'{export.folder}' holds no ONNX graph in fp32 with a threshold. Export with --fp32, for every target "
                "or with --target onnx"
            )
        self.stored = load_features(export.folder, self.spec)
        width = self.stored.plain.shape[1]
        self.state: FittedScore | None = export.score_state(width)
        self.rows = len(self.spec.classes) + 1 + (0 if self.state is None else self.state.rows)
        with unicode_path(check_files(export.folder, self.graphs["fp32"])) as name:
            self.trunk = Trunk(onnx.load(name), self.rows)
        m, folds = len(self.spec.classes), self.stored.folds
        weight, bias = self.trunk.weight, self.trunk.bias
        self.heads = Heads(weight[:m], bias[:m], folds.weight, folds.bias)
        self.row: Array = np.append(weight[m], bias[m]).astype(np.float32)

    @property
    def threshold(self) -> Threshold:
        """Of the fp32 graph."""
        threshold = self.graphs["fp32"].threshold
        assert threshold is not None
        return threshold

    def say_of(self, features: Array) -> tuple[Array, Array, Array]:
        """Logits, id_logit and score of features [n, D]."""
        return outputs(features, self.heads.weight, self.heads.bias, self.row, self.state, self.spec.score_name)


def teach(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    options: TeachOptions,
    say: Say = lambda line: None,
) -> TaughtExport:
    """Make a new version of an export.

    Args:
        folder: an export folder, or the run folder that holds it.
        out: the new export folder; the old one is not changed. None teaches in place: the new version takes the old
            one's place by one rename, and the old one is kept beside it (`ssod_edge.export.versions`).
        options: what to teach.
        say: gets a line for each step.

    Raises:
        UsageError: an export that cannot be taught, or photos that cannot teach it; BusyError: one that is being
            taught by another process.
        MissingExtraError: onnx, onnxruntime or scikit-learn is not installed.
        ArtifactError: a file of the export is damaged.
        VerificationError: more would be lost than may be, or an artifact drifted; nothing is released.
        OutputError: the new folder cannot be written. In every case the old export is unchanged.
    """
    _check_installed()
    export = Export.at(folder)
    place = real_path(export.folder if out is None else out)
    if out is not None and place == real_path(export.folder):
        raise UsageError(
            f"'{out}' is the export that is taught: leave out -o to teach in place, or name another folder"
        )
    if not export.spec.trained:
        raise UsageError("untrained weights cannot be taught: their features mean nothing")
    check_place(place)
    _check_data(options.data, export)
    with claim(place.with_name(f".{place.name}.teaching"), f"'{place}' is being taught"):
        export = Export.at(folder)  # as it is now that it is ours
        try:
            return _teach(export, place, options, say)
        except ArtifactError:
            check_unchanged(export.folder, export)  # files of two versions
            raise


def teach_open(
    folder: Path | None,
    new: str | Mapping[str, Iterable[ImageLike]],
    images: Iterable[ImageLike] | None = None,
    out: str | os.PathLike[str] | None = None,
    say: Say = lambda line: None,
    forget: str | Sequence[str] = (),
    **options: Any,
) -> TaughtExport:
    """`Predictor.teach`; see there. `folder` is the one that the model was opened from."""
    if folder is None:
        raise UsageError("a checkpoint cannot be taught: export it, and open the export")
    if isinstance(new, str):
        if images is None:
            raise UsageError(f"give images of '{new}', or class -> images of several classes")
        new = {new: images}
    elif images is not None:
        raise UsageError("give the images of several classes as class -> images, and nothing after it")
    gone = (forget,) if isinstance(forget, str) else tuple(forget)
    return teach(folder, out, TeachOptions(new or None, gone, **options), say)


def _teach(export: Export, place: Path, options: TeachOptions, say: Say) -> TaughtExport:
    """See `teach`; nobody else teaches into this place."""
    started = time.monotonic()
    in_place = place == real_path(export.folder)
    model = Model(export)
    if (tuned := model.spec.features.get("tuned")) is not None:
        what = "taught a branch" if tuned == "branch" else "tuned the features to"
        say(
            f"note: training {what} the classes that it had. Another class may look more like these than with features "
            "left alone (train --tune head); the figures below are of images that training has not seen"
        )
    gone = _forgotten(model.spec.classes, options.forget)
    stored, heads = without_classes(model.stored, model.heads, gone) if len(gone) else (model.stored, model.heads)
    classes = tuple(name for number, name in enumerate(model.spec.classes) if number not in gone)
    photos = Photos.none(classes, stored.plain.shape[1], model.spec.preprocess)
    if options.data is not None:
        images = open_photos(options.data)
        check_names(images.source, classes, options.alike)
        photos = read_photos(images, classes, model.spec.preprocess, model.trunk, say)
        photos = without_copies(photos, stored, len(classes), options.alike, say)
        if not len(photos.labels) and not len(gone):
            raise UsageError(f"the model has learnt all photos of '{photos.data}' already. Add new ones")
        say(f"features of {len(photos.labels)} photos and a disturbed copy of each, {time.monotonic() - started:.1f} s")
    check_teachable(model.spec.score_name, len(model.spec.classes), len(photos.classes))
    logits, _, score = model.say_of(photos.plain)
    known_before = score <= model.threshold.value
    if not options.alike:
        stay = np.setdiff1d(np.arange(len(model.spec.classes)), gone)
        taken_for = np.where(np.isin(logits.argmax(axis=1), gone), -1, np.searchsorted(stay, logits.argmax(axis=1)))
        check_new(photos, len(classes), taken_for, known_before & (taken_for >= 0))
    few = _few(model.spec, photos)
    fitted = fit_lesson(
        Lesson(stored, heads, model.row, photos, model.spec.score_name, few, SPENT * options.max_drop / 100)
    )
    n = len(fitted.scores)
    description = f"{FROM_FEATURES} of {n} images, out of fold, {len(photos.labels)} of them taught"
    _say_replaced(model.spec, say)
    threshold = fitted.threshold(model.threshold.target_tpr, description)
    proof = _prove(model, stored, heads, fitted, photos, threshold, known_before, options.max_drop)
    for line in proof.lines():
        say(line)
    say(f"fitted and proved, {time.monotonic() - started:.1f} s")
    source, unreadable = source_record(export, photos, options.forget, proof, in_place), photos.unreadable
    with release(place, say, export if in_place else None) as draft:
        _write(draft, model, fitted, photos, threshold, source, say)
        del model, stored, heads, fitted, photos  # what is proved is in files, and engines take memory of their own
        give_back_freed_memory()
        draft.prove(lambda runners: {}, together=False, optional=(QUANTISED,))
    return TaughtExport(place, draft.spec, unreadable)


def _say_replaced(spec: Spec, say: Say) -> None:
    """Name the thresholds that were set on the user's images: the new ones come from features."""
    run = str(spec.source.get("splits_hash"))[:12]
    for artifact in spec.artifacts:
        data = FROM_FEATURES if artifact.threshold is None else artifact.threshold.data
        if not data.startswith(FROM_FEATURES) and run not in data:
            say(f"{artifact.name}: its threshold from {data} is replaced; set it again with calibrate")


def _check_data(data: Given | None, export: Export) -> None:
    """Raises UsageError where the photos are the export itself, the run that it lies in, or not yet reviewed."""
    if not isinstance(data, str):
        return
    place = Path(data)
    if real_path(data) in (real_path(export.folder), export.run_folder):
        raise UsageError(
            f"'{data}' is the model itself, not photos. Give DATA, CLASS/IMAGE folders of photos, after it"
        )
    if (place / INDEX).is_file():
        raise UsageError(
            f"'{data}' is what predict --collect kept, which is not sorted into classes yet. Sort it with: ssod-edge "
            f"review {data}; and teach '{place / CLASSES}'"
        )
    if (place / GROUP_LIST).is_file():
        raise UsageError(
            f"'{data}' are groups that are not named yet. Rename them, then: ssod-edge review {place.parent} "
            f"--folders --done; and teach '{place.parent / CLASSES}'"
        )


def _check_installed() -> None:
    for module in ("onnx", "onnxruntime", "sklearn"):
        load(module, "teaching an export", "teach")


def _forgotten(classes: tuple[str, ...], names: Sequence[str]) -> Labels:
    """Numbers of classes by their names."""
    numbers = {same_name(name): number for number, name in enumerate(classes)}
    for name in names:
        if same_name(name) not in numbers:
            raise UsageError(f"--forget '{name}': the model has no such class; it has: {', '.join(classes)}")
    return np.unique(np.array([numbers[same_name(name)] for name in names], np.int64))


def _few(spec: Spec, photos: Photos) -> tuple[int, ...]:
    """Numbers of the classes that were taught from few photos, now or before."""
    taught = dict(spec.features.get("taught", {}))
    for name, count in counts_of(photos.labels, photos.classes).items():
        if name in taught or name not in spec.classes:
            taught[name] = taught.get(name, 0) + count
    return tuple(number for number, name in enumerate(photos.classes) if 0 < taught.get(name, 0) < FEW)


def _prove(
    model: Model,
    stored: StoredFeatures,
    heads: Heads,
    fitted: Fitted,
    photos: Photos,
    threshold: Threshold,
    known_before: np.ndarray[Any, np.dtype[np.bool_]],
    max_drop: float,
) -> Proof:
    """Compare before and after, on images of the classes that were there and that stay; see `check` for errors."""
    m, old = heads.classes, len(stored.folds.images)
    held = stored.held_out
    features = stored.plain[held].astype(np.float32)
    labels = np.concatenate([stored.labels[stored.folds.images], stored.labels[held]])
    in_folds = stored.folds.logits(stored.plain[stored.folds.images].astype(np.float32))
    was = outputs(features, heads.weight, heads.bias, model.row, model.state, model.spec.score_name)
    now = fitted.say_of(features)
    no_score = np.zeros(old, np.float32)
    before = Answers.of(
        np.concatenate([in_folds, was[0]]), np.concatenate([no_score, was[2]]), model.threshold.value, labels
    )
    after = Answers.of(
        np.concatenate([fitted.logits[:old], now[0]]),
        np.concatenate([fitted.scores[:old], now[2]]),
        threshold.value,
        labels,
    )
    held_out = np.arange(len(labels)) >= old
    proof = prove(before, after, labels, held_out, photos.classes)
    new = {}
    for label in range(m, len(photos.classes)):
        mine = np.flatnonzero(photos.labels == label)
        right = fitted.logits[old + mine].argmax(axis=1) == label
        accepted = right & (fitted.scores[old + mine] <= threshold.value)
        new[photos.classes[label]] = {
            "photos": len(mine),
            "recall": float(right.mean()),
            "accepted": float(accepted.mean()),
            "known_before": float(known_before[mine].mean()),
        }
    proof = replace(proof, new=new)
    check(proof, before, after, held_out, max_drop)
    return proof


def _write(
    draft: Draft, model: Model, fitted: Fitted, photos: Photos, threshold: Threshold, source: dict[str, Any], say: Say
) -> None:
    """Every file of the new export; the spec has no figures yet."""
    folder, spec = draft.folder, model.spec
    detector: dict[str, Any] = {}
    if fitted.state is not None:
        taught = f"{spec.detector['data']}, and {len(photos.labels)} photos that were taught"
        saved = save_score(fitted.state, folder / DETECTOR_NAME)
        counts = {"images": len(fitted.scores), "disturbed_copies": len(fitted.scores)}
        detector = {"sha256": sha256_file(saved), "data": taught, **counts, "settings": fitted.state.settings}
    features = sha256_file(save_features(fitted.stored, folder / FEATURES_NAME))
    earlier = spec.features.get("taught", {})
    lesson = {
        name: earlier.get(name, 0) + count
        for name, count in source["taught"]["photos"].items()
        if name in earlier or name not in spec.classes
    }
    kept = {name: count for name, count in earlier.items() if name in photos.classes}
    reference = _write_reference(folder / REFERENCE_NAME, model, fitted, photos)
    new = replace(
        spec,
        classes=photos.classes,
        reference_sha256=sha256_file(reference),
        source=source,
        detector=detector,
        choice={},
        expected={},
        temperature=fitted.temperature,
        features={
            **spec.features,
            "sha256": features,
            "images": len(fitted.stored.labels),
            "held_out": len(fitted.stored.held_out),
            "taught": kept | lesson,
        },
        artifacts=(),
    )
    draft.write(replace(new, artifacts=tuple(make_artifacts(folder, model, fitted, photos.classes, threshold, say))))


def _write_reference(path: Path, model: Model, fitted: Fitted, photos: Photos) -> Path:
    """Images of the old reference and new photos, and what NumPy computes for them from their features.

    Raises:
        VerificationError: the old graph's features do not give what PyTorch said of the old reference.
    """
    old = model.export.reference()
    with np.load(model.export.folder / REFERENCE_NAME, allow_pickle=False) as file:
        labels = file["label"].astype(np.int64) if "label" in file else np.full(len(old["image"]), -1)
    n = len(old["image"])
    kept = np.linspace(0, n - 1, max(1, min(n, REFERENCE_IMAGES - len(photos.shown)))).astype(int)  # of every class
    images = old["image"][kept]
    features = model.trunk.features(images)
    logits, id_logit, _ = model.say_of(features)
    worst = max(np.abs(logits - old["logits"][kept]).max(), np.abs(id_logit - old["id_logit"][kept]).max())
    allowed = TOLERANCES["fp32"].logit * (1 + np.abs(old["logits"]).max())
    if not worst <= allowed:
        raise VerificationError(
            f"the features of '{model.export.folder}' do not give its reference: a logit differs by {worst:.3g}, at "
            f"most {allowed:.3g} allowed. Export the run again"
        )
    numbers = {same_name(name): number for number, name in enumerate(photos.classes)}
    table = np.array([*(numbers.get(same_name(name), -1) for name in model.spec.classes), -1], np.int64)
    features = np.concatenate([features, photos.plain[photos.places]])
    logits, id_logit, score = fitted.say_of(features)
    arrays: dict[str, Any] = {
        "image": np.concatenate([images, photos.shown]),
        "label": np.concatenate([table[labels[kept]], photos.labels[photos.places]]),
        "logits": logits,
        "id_logit": id_logit,
    }
    arrays |= {f"score_{name}": values for name, values in ood_scores(logits, id_logit).items()}
    arrays[f"score_{fitted.name}"] = score
    return write_atomic(path, lambda temporary: np.savez_compressed(temporary, **arrays))
