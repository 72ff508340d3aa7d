"""Evaluation of a trained model: ID accuracy, and every score against every OOD set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from ssod_edge.config import AUTO_SCORE, DEFAULT_SCORE, ScoreName
from ssod_edge.data.named import NamedData
from ssod_edge.data.sources import ImageSource, model_labels, open_dataset
from ssod_edge.data.splits import Indices
from ssod_edge.detect.choice import unasked_score
from ssod_edge.detect.folds import Folds
from ssod_edge.detect.metrics import conformal_threshold, deployment_metrics, detection_metrics
from ssod_edge.detect.scores import ood_scores
from ssod_edge.detect.sums import FittedScore
from ssod_edge.errors import MissingExtraError, UsageError
from ssod_edge.evaluation.baseline_recipes import parse_names
from ssod_edge.evaluation.baselines import Baselines
from ssod_edge.evaluation.expect import TaughtImages, other_photos
from ssod_edge.evaluation.images import (
    baseline_images,
    calibration_images,
    held_out_negatives,
    id_images,
    shipped_score,
    warn_of_known_images,
    warn_of_used_images,
)
from ssod_edge.evaluation.known import judge_known, shipped_temperature
from ssod_edge.evaluation.mistakes import check_mistakes, save_mistakes
from ssod_edge.evaluation.pictures import save_evaluation, save_histograms
from ssod_edge.evaluation.report import print_details
from ssod_edge.evaluation.shift import ShiftedImages, judge_shifted, sample, shift_rows
from ssod_edge.evaluation.summary import print_summary
from ssod_edge.files import check_output, real_path, write_json
from ssod_edge.spec import Spec, Threshold
from ssod_edge.terminal import image_bar, printable, tell
from ssod_edge.training.model import SSODClassifier
from ssod_edge.training.outputs import Outputs, collect
from ssod_edge.training.run import Run

#: Score or detector -> [N], larger = more OOD.
Scores = dict[str, NDArray[np.floating[Any]]]
#: Images, and which of them.
ImageSet = tuple[ImageSource, Indices]

#: Images of a pass through the network.
BATCH_SIZE = 64
#: OOD sets that come with the embedded data set: digits 8 and 9, photos without a digit, shapes.
DEMO_OOD = {"near": "demo:near", "photos": "demo:photos", "shapes": "demo:shapes"}

#: Name of the OOD set of held-out negatives, and of what the report says of them.
NEGATIVES = "negatives"


@dataclass(frozen=True)
class EvalOptions(NamedData):
    """What an evaluation is asked for, beside the images; without `ood_data` a run of the demo has the demo's.

    Attributes:
        baselines: "all" or "NAME[,NAME...]": detectors of pytorch-ood to run beside the built-in scores.
        fit_images: how many training images they are fitted on; None: the whole training split.
        bootstrap: resamples of the confidence intervals.
        shift_images: how many of the known images are also shown under `ssod_edge.data.disturbances.SHIFTS`, seeded; 0
            leaves that out.
        leave_out: whether each known class is left out in turn, to say what a new one will do.
    """

    baselines: str | None = None
    fit_images: int | None = None
    bootstrap: int = 1000
    shift_images: int = 200
    leave_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift_images < 0:
            raise UsageError(f"shift_images must be 0 or more, got {self.shift_images}")

    def baseline_names(self) -> tuple[str, ...]:
        """The detectors; raises UsageError if there is none of a name, or `fit_images` without any."""
        if self.baselines is not None:
            return parse_names(self.baselines)
        if self.fit_images is not None:
            raise UsageError("--fit-images says what baselines are fitted on; name them with --baselines")
        return ()


def evaluate(run: str | Path, options: EvalOptions | None = None, workers: int = 1) -> tuple[dict[str, Any], Found]:
    """Evaluate a run folder or checkpoint file. A score with a state that the run's export ships is evaluated too.

    Args:
        workers: processes that read images.

    Returns:
        The JSON face: `id_accuracy`, `default_score` (what the export ships; `energy` without one), `ships` (the same,
        but what an export would take where there is none: "auto" if it would choose), `ood_row_trained`, `negatives`
        (of a run that has any: how many were learnt from, chosen by, held out), `results` (a row for each OOD set and
        score), `mean` (AUROC and both FPRs of each score over the OOD sets), `deployment` (score ->
        `deployment_metrics` at the threshold of the run's calibration split; None without one), `classification` (of
        the ID images, class by class: `judge_known`), `shift` (`shift_rows`), with `leave_out` also that
        (`TaughtImages.expect`, and `other_photos`), with baselines also `baselines` (detector -> its cost, or its
        error) and `baselines_setup`; and what was read.

    Raises:
        UsageError: data that cannot be opened, or has classes that the model does not know; no such baseline; classes
            to leave out, without training data.
        ArtifactError: a checkpoint that cannot be read.
        MissingExtraError: baselines without pytorch-ood.
    """
    options, opened = options or EvalOptions(), Run.at(run)
    names, model, meta = options.baseline_names(), opened.model, opened.meta
    if torch.cuda.is_available():
        model.cuda()
    peers = Baselines(names, model, BATCH_SIZE) if names else None
    spec, state = shipped_score(opened, "the score of the export is left out")
    source, indices = id_images(opened, options.id_data)
    warn_of_used_images(source, options.id_data, meta, spec)
    ood, ood_data = _open_ood(meta, options, source)
    sets, ood_data, of_negatives = _image_sets(opened, (source, indices), ood, ood_data)
    fit = baseline_images(opened, peers.to_fit, options.fit_images) if peers and peers.to_fit else None
    expected = TaughtImages.of(opened).expect(_named(_ships(opened, spec)), workers) if options.leave_out else None
    judge = _Judge(model, peers, state, opened.folds, {"via": options.via, "workers": workers})
    found = _read(judge, sets, fit, calibration_images(opened))
    if opened.folds is not None and spec is not None and state is not None:
        _take_threshold(found, spec)
    report = {
        "run": Path(run).name,
        "backbone": model.backbone_name,
        "classes": list(model.classes),
        "epoch": meta["epoch"],
        "input_size": model.preprocess.input_size,
        **options.said,
        "id_data": source.name if options.id_data else f"{source.name} (validation split)",
        "ood_data": dict(ood_data),
        "default_score": spec.score_name if spec else DEFAULT_SCORE,
        "ships": _ships(opened, spec),
        "ood_row_trained": bool(model.ood.weight.any()),
        **of_negatives,
        **_figures(found, options.protocol, options.bootstrap, model.classes),
    }
    report["classification"] = _known(found, report["default_score"], model.classes, spec)
    report["shift"] = _shift(model, sets["id"], found, Shipped(report["default_score"], state), options, workers)
    if expected is not None:
        report["leave_out"] = {**expected, "other_photos": other_photos(expected["score"], report)}
    if peers:
        report |= {"baselines": peers.describe(), "baselines_setup": _setup(found.outputs["id"], fit)}
    return report, found


def _open_ood(
    meta: Mapping[str, Any], options: EvalOptions, known: ImageSource
) -> tuple[dict[str, ImageSource], Mapping[str, str]]:
    """Name of an OOD set -> its images, and how it was named. All are opened before the first image is run: a wrong
    name shows at once.
    """
    demo = DEMO_OOD if str(meta["data"]).partition(":")[0] == "demo" else {}
    ood_data = demo if options.ood_data is None else options.ood_data
    ood = {name: open_dataset(data, labelled=False) for name, data in ood_data.items()}
    warn_of_known_images(ood_data, ood, known, meta)
    for images in (known, *ood.values()):
        if images.left_out:
            tell(f"'{printable(images.name)}': {images.left_out}", err=True)
    return ood, ood_data


def _image_sets(
    run: Run, known: ImageSet, ood: Mapping[str, ImageSource], ood_data: Mapping[str, str]
) -> tuple[dict[str, ImageSet], Mapping[str, str], dict[str, Any]]:
    """ "id" and each OOD set -> its images; name -> how it was named; and what the report says of held-out negatives,
    which are an OOD set of a run that has any.
    """
    sets = {"id": known, **{name: (images, np.arange(len(images))) for name, images in ood.items()}}
    found = None if NEGATIVES in ood_data else held_out_negatives(run)
    if found is None:
        return sets, ood_data, {}
    source, held_out, facts = found
    named = {**ood_data, NEGATIVES: f"{facts['data']} (held-out negatives)"}
    return {**sets, NEGATIVES: (source, held_out)}, named, {NEGATIVES: facts}


def _take_threshold(found: Found, spec: Spec) -> None:
    """Give a score whose state was fitted on the calibration images its export's threshold, which is out of fold."""
    thresholds = {a.precision: a.threshold for a in spec.artifacts if a.threshold is not None}
    found.thresholds.pop(spec.score_name, None)
    if thresholds:
        found.thresholds[spec.score_name] = thresholds.get("fp32", next(iter(thresholds.values())))


def _ships(run: Run, spec: Spec | None) -> str:
    """The score of the run's export; without one, what an export that names none would take."""
    if spec is not None:
        return spec.score_name
    try:
        _, splits = run.splits("")
    except UsageError:
        return DEFAULT_SCORE
    return unasked_score(run.outliers, len(splits.train), len(splits.val), str(run.meta.get("tuned", "")))


def _named(ships: str) -> str:
    """A score by name, for one that is yet to be chosen."""
    return DEFAULT_SCORE if ships == AUTO_SCORE else ships


@dataclass(frozen=True)
class Found:
    """What an evaluation has read.

    Attributes:
        outputs: "id" and each OOD set -> what the model says of its images.
        scores: likewise -> its scores.
        thresholds: score -> its threshold; empty without calibration images.
        sets: "id" and each OOD set -> its images, in the order of the outputs.
        calibration: outputs of the calibration images, out of fold where they were trained on; None without any.
    """

    outputs: dict[str, Outputs]
    scores: dict[str, Scores]
    thresholds: dict[str, Threshold]
    sets: Mapping[str, ImageSet]
    calibration: Outputs | None


@dataclass(frozen=True)
class _Judge:
    """What scores images. `reading`: arguments of `collect`; the others as in `evaluate`."""

    model: SSODClassifier
    peers: Baselines | None
    state: FittedScore | None
    folds: Folds | None
    reading: Mapping[str, Any]

    def __call__(self, images: ImageSet, trained: bool = False, **options: Any) -> tuple[Outputs, Scores]:
        """Outputs and scores; `trained`: the last layer was fitted on these images, if there are folds."""
        peers = self.peers
        outputs = collect(self.model, *images, **self.reading, **options, watch=peers.watch if peers else None)
        if trained and self.folds is not None:
            rows = self.folds.rows(images[1])
            id_logit = self.folds.id_logit(outputs.features, outputs.id_logit, rows)
            outputs = replace(outputs, logits=self.folds.logits(outputs.features, rows), id_logit=id_logit)
        scores: Scores = {str(name): s for name, s in ood_scores(outputs.logits, outputs.id_logit).items()}
        if self.state is not None:
            scores[self.state.name] = self.state.score(outputs.features, outputs.logits, outputs.id_logit)
        return outputs, scores | (peers.scores(outputs.features, outputs.logits) if peers else {})


def _read(judge: _Judge, sets: Mapping[str, ImageSet], fit: ImageSet | None, calibration: ImageSet | None) -> Found:
    """Fit the baselines, then score every image of every set. A baseline that fails on one set is left out of all."""
    peers, model = judge.peers, judge.model
    total = sum(len(chosen) for _, chosen in (*sets.values(), *filter(None, (fit, calibration))))
    with image_bar("evaluating", total) as advance:
        options: dict[str, Any] = {"batch_size": BATCH_SIZE, "advance": advance}
        if peers and fit:
            outputs = collect(model, *fit, **judge.reading, **options)
            peers.fit(outputs.features, outputs.logits, outputs.labels)
        held_out, known = judge(calibration, trained=True, **options) if calibration else (None, {})
        found = {name: judge(images, **options) for name, images in sets.items()}
    failed = peers.failed if peers else set()
    kept = {name: {s: v for s, v in scores.items() if s not in failed} for name, (_, scores) in found.items()}
    data = f"calibration split of {calibration[0].name}" if calibration else ""
    thresholds = {score: conformal_threshold(known[score], data=data) for score in kept["id"] if score in known}
    outputs = {name: outputs for name, (outputs, _) in found.items()}
    labels = model_labels(outputs["id"].labels, sets["id"][0].classes, model.classes)
    outputs["id"] = replace(outputs["id"], labels=labels)
    return Found(outputs, kept, thresholds, sets, held_out)


def _figures(found: Found, protocol: str, bootstrap: int, classes: tuple[str, ...]) -> dict[str, Any]:
    """The part of the report that is computed."""
    known, outputs = found.scores["id"], found.outputs["id"]
    unknown = {name: scores for name, scores in found.scores.items() if name != "id"}
    results = [
        {"ood": name, "score": score, "protocol": protocol, **detection_metrics(known[score], values, bootstrap)}
        for name, scores in unknown.items()
        for score, values in scores.items()
    ]
    return {
        "n_id": len(outputs.labels),
        "id_accuracy": outputs.accuracy,
        "results": results,
        "mean": _means(results),
        "deployment": _deployment(found, unknown, classes),
    }


def _deployment(found: Found, unknown: Mapping[str, Scores], classes: tuple[str, ...]) -> dict[str, Any] | None:
    """Score -> what it does at its threshold; None without calibration images."""
    if not found.thresholds:
        return None
    deployed, outputs = {}, found.outputs["id"]
    for score, known in found.scores["id"].items():
        if (threshold := found.thresholds.get(score)) is None:
            continue
        ood = {name: scores[score] for name, scores in unknown.items()}
        deployed[score] = deployment_metrics(known, ood, threshold, outputs.correct, outputs.labels, classes)
    return deployed


def _known(found: Found, score: str, classes: tuple[str, ...], spec: Spec | None) -> dict[str, Any]:
    """The known images class by class, by the score that ships."""
    temperature = shipped_temperature(spec, found.calibration)
    scores, threshold = found.scores["id"][score], found.thresholds.get(score)
    return judge_known(found.outputs["id"], found.sets["id"], classes, temperature, scores, threshold)


@dataclass(frozen=True)
class Shipped:
    """The default score. Attributes: its name; its state, None of one without."""

    name: str
    state: FittedScore | None

    def score(self, outputs: Outputs) -> NDArray[np.floating[Any]]:
        """[N], larger = more OOD."""
        if self.state is not None:
            return self.state.score(outputs.features, outputs.logits, outputs.id_logit)
        return ood_scores(outputs.logits, outputs.id_logit)[cast(ScoreName, self.name)]


def _shift(
    model: SSODClassifier, known: ImageSet, found: Found, shipped: Shipped, options: EvalOptions, workers: int
) -> list[dict[str, Any]]:
    """`shift_rows` of a sample of the known images at the shipped score's threshold; nothing if none are asked for."""
    if options.shift_images == 0:
        return []
    source, indices = known
    chosen = sample(len(indices), options.shift_images)
    outputs = found.outputs["id"]
    images = ShiftedImages(source, indices[chosen], model.preprocess, options.via)
    with image_bar("shifting", len(chosen)) as advance:
        shifted = judge_shifted(model, images, outputs.labels[chosen], shipped.score, workers, advance)
    threshold = found.thresholds.get(shipped.name)
    undisturbed = found.scores["id"][shipped.name][chosen], outputs.correct[chosen]
    return shift_rows(shifted, undisturbed, None if threshold is None else threshold.value)


def _setup(outputs: Outputs, fit: ImageSet | None) -> dict[str, Any]:
    """What the costs of the baselines are to be read against."""
    return {
        "library": f"pytorch-ood {metadata.version('pytorch-ood')}",
        "fit_data": None if fit is None else f"{len(fit[1])} training images of {fit[0].name}",
        "network_ms_per_image": outputs.ms_per_image,
        "batch_size": BATCH_SIZE,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
    }


def _means(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Score -> unweighted mean over the OOD sets."""
    means: dict[str, dict[str, float]] = {}
    for score in dict.fromkeys(row["score"] for row in results):
        rows = [row for row in results if row["score"] == score]
        keys = ("auroc", "fpr_at_id_tpr95", "fpr_at_ood_tpr95")
        means[score] = {key: float(np.mean([row[key] for row in rows])) for key in keys}
    return means


def run_eval(
    run: str | None,
    options: EvalOptions,
    backbone: str | None = None,
    runs: str = "runs",
    json_file: str | None = None,
    png_file: str | None = None,
    pictures: str | None = None,
    mistakes: str | None = None,
    details: bool = False,
) -> None:
    """The command `eval`: evaluate, print what it comes to, write JSON and pictures.

    Args:
        run: run folder or checkpoint; None: the newest run under `runs`, of this backbone if one is given.
        json_file, png_file: of figures and histograms; None leaves them to the run's folder.
        pictures: folder of all pictures; None makes no others.
        mistakes: new folder of copies of the images that got the wrong class; None makes none.
        details: print all of it; without, what fits on a screen. What baselines bring is a detail.
    """
    if run and backbone:
        raise UsageError("give a run, or --backbone for the newest run of it, not both")
    opened = Run.at(run) if run else Run.newest(runs, backbone)
    report_file = Path(json_file or opened.folder / f"eval-{options.protocol}.json")
    png = Path(png_file or opened.folder / f"eval-{options.protocol}.png")
    # Files that cannot be written are found before hours of evaluation and not after.
    check_output(report_file)
    check_output(png)
    if real_path(report_file) == real_path(png) and not png.is_char_device():  # /dev/null takes both
        raise UsageError(f"--json and --png name the same file, '{png}'; give each its own")
    if pictures:
        check_output(Path(pictures) / "roc.png")
    if mistakes:
        check_mistakes(mistakes)
    report, found = evaluate(run or opened.folder, options)
    written = [write_json(report_file, report)]  # before anything is printed: a closed pipe ends the command there
    try:
        written.append(save_histograms(found.scores, report["default_score"], png, report["equalised"]))
        if pictures:
            auroc = {(row["ood"], row["score"]): row["auroc"] for row in report["results"]}
            kind = report["equalised"]
            written += save_evaluation(found.scores, auroc, found.outputs, report["classes"], pictures, kind)
    except MissingExtraError as error:
        if png_file or pictures:
            raise
        tell(f"no histograms: {error}", err=True)
    finally:
        (print_details if details or options.baselines else print_summary)(report)
    if mistakes:
        written.append(save_mistakes(mistakes, report["classification"]["mistakes"], found.sets["id"]))
    tell("written: " + ", ".join(str(path) for path in written), err=True)
