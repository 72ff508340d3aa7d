"""The images of a report, judged: by a run in PyTorch as `eval` does, or by an export's artifact without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssod_edge.config import Preprocess
from ssod_edge.data.named import NamedData
from ssod_edge.data.pixels import ImageLike
from ssod_edge.data.sources import ImageSource, check_classes, model_labels, open_dataset
from ssod_edge.data.splits import Indices
from ssod_edge.detect.scores import probabilities
from ssod_edge.errors import ArtifactError, ImageError, UsageError
from ssod_edge.files import real_path
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import is_installed, open_runner
from ssod_edge.runtime.predict import Predictor, Seen
from ssod_edge.spec import Spec, Threshold
from ssod_edge.terminal import image_bar, printable, tell

if TYPE_CHECKING:
    from ssod_edge.training.run import Run

#: The set of known images; every other one is of unknown ones.
KNOWN = "id"
#: File of the weights in a run folder (`ssod_edge.training.checkpoint.BEST`, which needs PyTorch).
WEIGHTS = "best.safetensors"


@dataclass(frozen=True)
class JudgedSet:
    """What a model says of n images.

    Attributes:
        data: how the set was named.
        source, indices: the images, int64 [n].
        labels: int64 [n], in the model's numbering; -1 in a set of unknown images.
        probs: float32 [n, M], over the temperature.
        scores: [n], larger = more OOD.
        features: float32 [n, D], what the last layer reads; None from an artifact.
    """

    data: str
    source: ImageSource
    indices: Indices
    labels: Indices
    probs: NDArray[np.float32]
    scores: NDArray[np.floating[Any]]
    features: NDArray[np.float32] | None = None

    @property
    def guesses(self) -> Indices:
        """int64 [n], the likeliest class."""
        found: Indices = self.probs.argmax(axis=1)
        return found

    @property
    def confidence(self) -> NDArray[np.float32]:
        """[n], the probability of it."""
        found: NDArray[np.float32] = self.probs.max(axis=1)
        return found


@dataclass(frozen=True)
class Judged:
    """What a report is made of.

    Attributes:
        name: of the run or export.
        place: its path, for commands.
        judge: what ran, in words.
        backbone, classes, preprocess: of the model.
        score: the one that ships.
        threshold: of it; None without calibration images.
        sets: `KNOWN` and each OOD set.
        temperature: of their probabilities.
        spec: of the export; None of a run without one.
        run: None of an export without its run, or without PyTorch.
        left_out: images that could not be read, as sentences.
    """

    name: str
    place: str
    judge: str
    backbone: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    score: str
    threshold: Threshold | None
    sets: dict[str, JudgedSet]
    temperature: float = 1.0
    spec: Spec | None = None
    run: Run | None = None
    left_out: tuple[str, ...] = ()

    @property
    def known(self) -> JudgedSet:
        """The known images."""
        return self.sets[KNOWN]

    @property
    def unknown(self) -> dict[str, JudgedSet]:
        """The other sets."""
        return {name: images for name, images in self.sets.items() if name != KNOWN}

    @property
    def correct(self) -> NDArray[np.bool_]:
        """bool [n], of the known images: whether the likeliest class is the label."""
        right: NDArray[np.bool_] = self.known.guesses == self.known.labels
        return right


def judge(path: str, data: NamedData, workers: int = 1) -> Judged:
    """Judge the images of a report by what is at `path`; a run that is there without PyTorch is judged by its export.

    Args:
        path: a run folder, a checkpoint, or an export folder.
        data: which images.
        workers: processes that read images for a run.

    Raises:
        UsageError: nothing there; images that cannot be opened, or of other classes; an export without known images.
        ArtifactError: what is there is damaged.
        EngineError, MissingExtraError, VerificationError: as `open_runner`.
    """
    place = Path(path)
    if not place.exists():
        raise UsageError(f"'{path}' does not exist. Give a run folder, a checkpoint, or an export folder")
    if _is_run(place):
        if is_installed("eager"):
            return _judge_run(path, data, workers)
        tell("PyTorch is not installed: the run is judged by its export, whose images --id names", err=True)
    return _judge_export(path, data)


def _is_run(place: Path) -> bool:
    """Whether a checkpoint says what the path names: not of an export that was taught since."""
    if place.is_file():
        return True
    export = Export.in_place(Export.place(place))
    folder = place if (place / WEIGHTS).is_file() else real_path(place).parent
    return (folder / WEIGHTS).is_file() and not (export is not None and export.spec.taught)


def _judge_run(path: str, data: NamedData, workers: int) -> Judged:
    from ssod_edge.evaluation.evaluate import EvalOptions, evaluate
    from ssod_edge.training.run import Run

    options = EvalOptions(**vars(data), bootstrap=0, shift_images=0)
    report, found = evaluate(path, options, workers)
    run, score = Run.at(path), report["default_score"]
    try:
        spec = None if run.export is None else run.export.spec
    except ArtifactError:
        spec = None  # `evaluate` has said so
    temperature = report["classification"]["temperature"]["value"]
    sets = {}
    for name, (source, indices) in found.sets.items():
        outputs = found.outputs[name]
        labels = outputs.labels if name == KNOWN else np.full(len(indices), -1)
        probs = probabilities(outputs.logits / np.float32(temperature))
        named = report["id_data"] if name == KNOWN else report["ood_data"][name]
        sets[name] = JudgedSet(named, source, indices, labels, probs, found.scores[name][score], outputs.features)
    model = run.model
    return Judged(
        name=real_path(run.folder).name,
        place=path,
        judge=f"the checkpoint in PyTorch, {report['equalised']}",
        backbone=model.backbone_name,
        classes=model.classes,
        preprocess=model.preprocess,
        score=score,
        threshold=found.thresholds.get(score),
        sets=sets,
        temperature=temperature,
        spec=spec,
        run=run,
    )


def _judge_export(path: str, data: NamedData) -> Judged:
    export = Export.at(path)
    spec = export.spec
    if data.via is not None:
        raise UsageError("--via belongs to a run: an artifact is judged on images as they are")
    if data.id_data is None:
        raise UsageError("an export does not say which images are new to it; name known ones with --id DATA")
    opened = {KNOWN: open_dataset(data.id_data)}
    check_classes(data.id_data, opened[KNOWN].classes, spec.classes)
    named = {KNOWN: data.id_data, **(data.ood_data or {})}
    opened |= {name: open_dataset(where, labelled=False) for name, where in (data.ood_data or {}).items()}
    failed: list[str] = []
    with open_runner(export.folder) as runner, image_bar("judging", sum(map(len, opened.values()))) as advance:
        model = Predictor(runner)
        sets = {
            name: _judge_set(model, images, named[name], advance, failed, name == KNOWN)
            for name, images in opened.items()
        }
        artifact = runner.artifact
    return Judged(
        name=_name(export.folder),
        place=path,
        judge=f"its artifact {artifact.name}, images as they are",
        backbone=spec.backbone,
        classes=spec.classes,
        preprocess=spec.preprocess,
        score=spec.score_name,
        threshold=artifact.threshold,
        sets=sets,
        temperature=spec.temperature,
        spec=spec,
        left_out=tuple(failed),
    )


def _name(folder: Path) -> str:
    """Of an export: its folder's, or that of the run around it."""
    folder = real_path(folder)
    return folder.parent.name if folder.name == "export" else folder.name


def _judge_set(
    model: Predictor,
    source: ImageSource,
    data: str,
    advance: Callable[[int], None],
    failed: list[str],
    labelled: bool,
) -> JudgedSet:
    """Judge all images of a source; the message of one that cannot be read goes to `failed`."""
    drawn: list[int] = []
    kept: list[int] = []
    probs: list[Any] = []
    scores: list[float] = []

    def pictures() -> Iterator[ImageLike]:
        for index in range(len(source)):
            try:
                picture = source.picture(index)
            except ImageError as error:
                failed.append(str(error))
                continue
            drawn.append(index)
            yield picture

    def watch(seen: Seen) -> None:
        probs.append(seen.outputs["probs"].copy())

    model.watchers = [watch]
    for row, verdict in enumerate(model.predict_many(pictures())):
        advance(1)
        if verdict.ood_score is None:
            failed.append(str(verdict.error))
            continue
        kept.append(drawn[row])
        scores.append(verdict.ood_score)
    if not kept:
        raise UsageError(f"no image of '{data}' can be read ({failed[-1] if failed else 'it is empty'})")
    indices = np.array(kept, np.int64)
    labels = np.full(len(kept), -1)
    if labelled:
        labels = model_labels(source.labels[indices], source.classes, model.runner.spec.classes)
    return JudgedSet(data, source, indices, labels, np.stack(probs), np.array(scores, np.float32))


def names_of(images: JudgedSet) -> list[str]:
    """The file name of each image."""
    return [printable(images.source.source(int(index))) for index in images.indices]
