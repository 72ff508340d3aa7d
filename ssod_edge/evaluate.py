"""Evaluation of a trained model: ID accuracy, and every score against every OOD set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from ssod_edge.checkpoint import find_run, load_model
from ssod_edge.config import DEFAULT_SCORE, SCORES
from ssod_edge.data import EvalImages, load_batches
from ssod_edge.errors import MissingExtraError, UsageError
from ssod_edge.files import check_output, write_json
from ssod_edge.metrics import detection_metrics
from ssod_edge.model import SSODClassifier, normalise
from ssod_edge.pictures import save_evaluation, save_histograms
from ssod_edge.progress import image_bar
from ssod_edge.scores import ood_scores
from ssod_edge.sources import ImageSource, Indices, open_dataset, read_splits

#: OOD sets that come with the embedded data set: digits 8 and 9, photos without a digit, shapes.
DEMO_OOD = {"near": "demo:near", "photos": "demo:photos", "shapes": "demo:shapes"}


@dataclass(frozen=True)
class Outputs:
    """What the model says of N images.

    Attributes:
        logits: float32 [N, M].
        id_logit: float32 [N].
        labels: int64 [N]; -1 where there are none.
        features: float32 [N, D], the pooled features that the last layer reads.
    """

    logits: NDArray[np.float32]
    id_logit: NDArray[np.float32]
    labels: NDArray[np.int64]
    features: NDArray[np.float32]

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in [0, 1]."""
        return float((self.logits.argmax(axis=1) == self.labels).mean())


@torch.no_grad()
def collect(
    model: SSODClassifier,
    source: ImageSource,
    indices: Indices | None = None,
    via_size: int | None = None,
    batch_size: int = 64,
    workers: int = 1,
    advance: Callable[[int], None] = lambda n: None,
) -> Outputs:
    """Run a model in fp32 over images, in order.

    Args:
        model: in any mode; it is left in eval mode.
        source, indices, via_size: as `EvalImages`.
        advance: called with the size of each finished batch.

    Raises:
        ImageError: an image cannot be read.
    """
    model.eval()
    device = next(model.parameters()).device
    logits, id_logits, labels, features = [], [], [], []
    images = EvalImages(source, indices, model.preprocess, via_size)
    for image, label, _ in load_batches(images, workers, batch_size=batch_size):
        x = normalise(image.to(device), model.preprocess).contiguous(memory_format=torch.channels_last)
        z = model.features(x)
        batch_logits, batch_id = model.head(z)
        logits.append(batch_logits.cpu().numpy())
        id_logits.append(batch_id.cpu().numpy())
        labels.append(label.numpy())
        features.append(z.float().cpu().numpy())
        advance(len(label))
    return Outputs(*(np.concatenate(parts) for parts in (logits, id_logits, labels, features)))


def evaluate(
    run: str | Path,
    id_data: str | None = None,
    ood_data: Mapping[str, str] | None = None,
    via_size: int | None = None,
    bootstrap: int = 1000,
    batch_size: int = 64,
    workers: int = 1,
    keep: dict[str, Outputs] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate a run or checkpoint file.

    Args:
        run: run folder or checkpoint.
        id_data: ID images, labelled with the model's classes; None: the run's validation split.
        ood_data: name -> OOD images; None: those of the demo, if the run was trained on it.
        via_size: every image is first resized to this many pixels ("via32"); None is protocol "native".
        bootstrap: resamples of the confidence intervals.
        keep: gets the model's outputs on each set, under "id" and the OOD sets' names.

    Returns:
        The JSON face: `id_accuracy`, `ood_row_trained`, `results` (a row for each OOD set and score) and `mean`
        (AUROC and FPR of each score over the OOD sets); and the raw scores, {"id": {score: values}, NAME: {score:
        values}}.

    Raises:
        UsageError: data that cannot be opened, or whose classes are not the model's.
        ArtifactError: a checkpoint that cannot be read.
    """
    model, meta = load_model(run)
    if torch.cuda.is_available():
        model.cuda()
    source, indices = _id_images(run, meta, id_data, model.classes)
    if ood_data is None:
        ood_data = DEMO_OOD if str(meta["data"]).startswith("demo") else {}
    # Every set is opened before the first image is run: a wrong name shows at once.
    ood_sources = {name: open_dataset(data, labelled=False) for name, data in ood_data.items()}
    _warn_of_known_images(ood_data, ood_sources, source, meta)
    total = len(indices if indices is not None else source) + sum(len(s) for s in ood_sources.values())
    with image_bar("evaluating", total) as advance:
        id_outputs = collect(model, source, indices, via_size, batch_size, workers, advance)
        if keep is not None:
            keep["id"] = id_outputs
        raw: dict[str, dict[Any, NDArray[np.float32]]] = {"id": ood_scores(id_outputs.logits, id_outputs.id_logit)}
        for name, ood_source in ood_sources.items():
            outputs = collect(model, ood_source, None, via_size, batch_size, workers, advance)
            raw[name] = ood_scores(outputs.logits, outputs.id_logit)
            if keep is not None:
                keep[name] = outputs
    protocol = _protocol(via_size)
    results = [
        {
            "ood": name,
            "score": score,
            "protocol": protocol,
            **detection_metrics(raw["id"][score], raw[name][score], bootstrap),
        }
        for name in ood_sources
        for score in SCORES
    ]
    report = {
        "run": Path(run).name,
        "backbone": model.backbone_name,
        "classes": list(model.classes),
        "epoch": meta["epoch"],
        "input_size": model.preprocess.input_size,
        "protocol": protocol,
        "id_data": source.name if id_data else f"{source.name} (validation split)",
        "ood_data": dict(ood_data),
        "n_id": len(id_outputs.labels),
        "id_accuracy": id_outputs.accuracy,
        "default_score": DEFAULT_SCORE,
        "ood_row_trained": bool(model.ood.weight.any()),
        "results": results,
        "mean": _means(results),
    }
    return report, raw


def _id_images(
    run: str | Path, meta: dict[str, Any], id_data: str | None, classes: tuple[str, ...]
) -> tuple[ImageSource, Indices | None]:
    if id_data is not None:
        source = open_dataset(id_data)
        if source.classes != classes:
            raise UsageError(
                f"the classes of '{id_data}' ({', '.join(source.classes[:4])}, ...) are not the model's "
                f"({', '.join(classes[:4])}, ...)"
            )
        return source, None
    data = meta.get("data")
    if data is None:
        raise UsageError(f"'{run}' records no training data, so it has no validation split; name ID images with --id")
    try:
        source = open_dataset(str(data))
    except UsageError as error:
        raise UsageError(
            f"{error}. '{data}' is the path that was recorded at training, relative to the folder of that time: "
            "go there, or name the ID images with --id"
        ) from error
    if source.fingerprint != meta["data_fingerprint"]:
        raise UsageError(f"the data set '{data}' changed since training; name the ID images with --id")
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    return source, read_splits(folder, source, meta["splits_hash"]).val


def _warn_of_known_images(
    ood_data: Mapping[str, str], ood_sources: Mapping[str, ImageSource], source: ImageSource, meta: Mapping[str, Any]
) -> None:
    """Say so where an OOD set is the ID or the training data: its figures would mean nothing."""
    known = {source.name: source.fingerprint, str(meta.get("data")): meta.get("data_fingerprint")}
    for name, data in ood_data.items():
        for id_data, fingerprint in known.items():
            if ood_sources[name].fingerprint == fingerprint or _overlap(data, id_data):
                click.echo(
                    f"warning: the OOD set '{name}' ({data}) holds images of the in-distribution data '{id_data}'; "
                    "its figures mean nothing. Name images of other things",
                    err=True,
                )
                break


def _overlap(one: str, other: str) -> bool:
    """Whether two folders are the same, or one lies in the other."""
    a, b = Path(one).resolve(), Path(other).resolve()
    return a.is_dir() and b.is_dir() and (a.is_relative_to(b) or b.is_relative_to(a))


def _means(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Score -> unweighted mean over the OOD sets."""
    means: dict[str, dict[str, float]] = {}
    for score in SCORES if results else ():
        rows = [row for row in results if row["score"] == score]
        means[score] = {key: float(np.mean([row[key] for row in rows])) for key in ("auroc", "fpr_at_id_tpr95")}
    return means


def run_eval(
    run: str | None,
    runs: str,
    backbone: str | None,
    ood: tuple[str, ...],
    via_size: int | None,
    json_file: str | None,
    png_file: str | None,
    pictures: str | None = None,
    **options: Any,
) -> None:
    """The command `eval`: evaluate, print the table, write JSON and pictures."""
    if run and backbone:
        raise UsageError("give a run, or --backbone for the newest run of it, not both")
    folder = Path(run) if run else find_run(runs, backbone)
    target = folder if folder.is_dir() else folder.parent
    protocol = _protocol(via_size)
    report_file = Path(json_file or target / f"eval-{protocol}.json")
    png = Path(png_file or target / f"eval-{protocol}.png")
    _check_outputs(report_file, png)
    if pictures:
        check_output(Path(pictures) / "roc.png")
    outputs: dict[str, Outputs] = {}
    report, raw = evaluate(folder, ood_data=parse_named_data(ood) or None, via_size=via_size, keep=outputs, **options)
    print_report(report)
    written = [write_json(report_file, report)]
    try:
        written.append(save_histograms(raw, report["default_score"], png))
    except MissingExtraError as error:
        if png_file:
            raise
        click.echo(f"no histograms: {error}", err=True)
    if pictures:
        auroc = {(row["ood"], row["score"]): row["auroc"] for row in report["results"]}
        known, features = outputs["id"], {name: part.features for name, part in outputs.items()}
        correct = known.logits.argmax(axis=1) == known.labels
        written += save_evaluation(raw, auroc, correct, features, known.labels, report["classes"], pictures)
    click.echo("written: " + ", ".join(str(path) for path in written), err=True)


def _protocol(via_size: int | None) -> str:
    return f"via{via_size}" if via_size else "native"


def _check_outputs(report_file: Path, png: Path) -> None:
    """Find files that cannot be written before hours of evaluation and not after."""
    check_output(report_file)
    check_output(png)
    if report_file.resolve() == png.resolve() and not png.is_char_device():  # /dev/null takes both
        raise UsageError(f"--json and --png name the same file, '{png}'; give each its own")


def parse_named_data(items: tuple[str, ...]) -> dict[str, str]:
    """("NAME=DATA", ...) -> {NAME: DATA}.

    Raises:
        UsageError: no "=", an empty part, a name given twice, or the name "id".
    """
    named: dict[str, str] = {}
    for item in items:
        name, equals, data = item.partition("=")
        if not (name and equals and data) or name in named or name == "id":
            raise UsageError(f"expected --ood NAME=DATA with a name of its own (not 'id'), got '{item}'")
        named[name] = data
    return named


def print_report(report: Mapping[str, Any]) -> None:
    """The report as a table on the terminal; figures in percent."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{report['run']}  ({report['backbone']}, {report['input_size']} px, protocol {report['protocol']})\n"
        f"ID accuracy [bold]{100 * report['id_accuracy']:.2f}%[/bold] on {report['n_id']} images "
        f"of {report['id_data']}",
        highlight=False,
    )
    if not report["results"]:
        console.print("No OOD set was given; add some with --ood NAME=DATA")
        return
    table = Table(title="AUROC % (FPR % at 95% ID accepted), larger AUROC is better")
    table.add_column("OOD set")
    for score in SCORES:
        table.add_column(score + (" *" if score == report["default_score"] else ""), justify="right", no_wrap=True)
    for name in report["ood_data"]:
        rows = {row["score"]: row for row in report["results"] if row["ood"] == name}
        table.add_row(name, *(_cell(rows[score]) for score in SCORES))
    table.add_section()
    table.add_row("mean", *(_cell(report["mean"][score]) for score in SCORES))
    console.print(table)
    console.print("* the score that an export ships by default")
    if not report["ood_row_trained"]:
        console.print("`ssod` is constant, and `posterior` ranks as `msp`: the OOD row of this model was not trained")


def _cell(row: Mapping[str, float]) -> str:
    return f"{100 * row['auroc']:.1f} ({100 * row['fpr_at_id_tpr95']:.1f})"
