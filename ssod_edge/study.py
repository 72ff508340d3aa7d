"""A study: a grid of training runs, each evaluated, and a table with means and deviations over seeds."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import click

from ssod_edge.checkpoint import BEST, LAST, load_checkpoint
from ssod_edge.config import LossConfig, TrainConfig
from ssod_edge.errors import ArtifactError, TrainingError, UsageError
from ssod_edge.evaluate import evaluate
from ssod_edge.evaluation_data import parse_named_data
from ssod_edge.export.run import ExportOptions, export_run
from ssod_edge.files import make_directory, write_atomic, write_json
from ssod_edge.train import load_config, resume_run, start_run

#: In OUT: what was asked for, and what came of it.
STUDY, TABLE = "study.json", "study.md"
#: In each run's folder: its evaluation, and what with; what was asked of its export.
EVALUATION, EXPORT = "study-eval.json", "study-export.json"
#: Settings that are the study's own to make, or one value of which would not do.
_FIXED = {"data", "name", "seed", "loss", "preprocess"}


@dataclass(frozen=True)
class Cell:
    """One training run of a grid. Attributes: settings that vary, in order, as they were written; the seed."""

    settings: tuple[tuple[str, str], ...]
    seed: int

    @property
    def label(self) -> str:
        """The settings in words, the same for all seeds."""
        return " ".join(f"{key}={value}" for key, value in self.settings) or "as given"

    @property
    def name(self) -> str:
        """Of its run folder."""
        return "-".join([*(f"{key}={value}" for key, value in self.settings), f"seed={self.seed}"])


#: In the table: whichever score each run's export ships.
SHIPPED = "shipped"


def parse_grid(vary: Sequence[str], seeds: str) -> list[Cell]:
    """("gamma=0.9,0.95", "method=ce,ssod"), "0,1" -> the cells of the grid, seed by seed.

    Whoever stops early has every setting with the first seed. A value that is a list joins its parts with "+"
    ("outliers=none,rotate+zoom").

    Raises:
        UsageError: an unknown setting, one given twice, no value, or a value of the wrong type.
    """
    axes: dict[str, list[str]] = {}
    for item in vary:
        key, _, values = item.partition("=")
        key = key.strip().replace("-", "_")
        parts = [value.strip() for value in values.split(",")]
        if not all(parts) or key in axes or len(set(parts)) < len(parts):
            raise UsageError(f"expected --vary SETTING=VALUE,VALUE,... with a setting of its own, got '{item}'")
        for part in parts:
            convert(key, part)
        axes[key] = parts
    numbers = seeds.split(",")
    if not all(number.strip().isdigit() for number in numbers) or len(set(numbers)) < len(numbers):
        raise UsageError(f"expected --seeds N,N,... with different whole numbers, got '{seeds}'")
    grid = list(itertools.product(*([(key, value) for value in values] for key, values in axes.items())))
    return [Cell(settings, int(number)) for number in numbers for settings in grid]


def convert(key: str, text: str) -> Any:
    """The value of a training setting from text.

    Raises:
        UsageError: no such setting, or a value of the wrong type.
    """
    kinds = {**get_type_hints(TrainConfig), **get_type_hints(LossConfig), "size": int}
    kinds = {name: kind for name, kind in kinds.items() if name not in _FIXED}
    if key not in kinds:
        raise UsageError(f"unknown setting '{key}' in --vary. Known: {', '.join(sorted(kinds))}")
    kind = kinds[key]
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
    except (KeyError, ValueError):
        raise UsageError(f"--vary {key}: '{text}' is no {kind.__name__}") from None
    if str(kind).startswith("tuple"):
        return () if text == "none" else tuple(text.split("+"))
    return text


def run_study(
    data: str,
    out: str,
    vary: Sequence[str],
    seeds: str,
    id_data: str | None,
    ood: tuple[str, ...],
    via_size: int | None,
    baselines: str | None,
    fit_images: int | None,
    options: Mapping[str, Any],
    score: str | None = None,
) -> bool:
    """The command `study`: train and evaluate what is not done yet, then write the table.

    Args:
        data: to train on.
        out: folder of the study; its runs lie in it.
        vary, seeds: see `parse_grid`.
        id_data, ood, via_size, baselines, fit_images: as `ssod_edge.evaluate.run_eval`.
        options: of `train`, for all runs.
        score: each run is exported with it ("auto" chooses one for each) before it is evaluated; None exports nothing.

    Returns:
        whether every run of the grid has its figures.

    Raises:
        UsageError: a wrong grid, or a folder that holds a study of other settings.
    """
    cells = parse_grid(vary, seeds)
    ExportOptions(score=score)  # a name that is none, before hours of training
    given = {key: value for key, value in options.items() if value is not None}
    if "seed" in given:
        raise UsageError("a study takes --seeds, not --seed")
    both = [key for key, _ in cells[0].settings if key in given and key not in ("recipe", "backbone")]
    if both:
        raise UsageError(f"{', '.join(both)} cannot be given both with --vary and as an option")
    asked = {
        "id_data": id_data, "ood_data": parse_named_data(ood), "via_size": via_size,
        "baselines": baselines, "fit_images": fit_images,
    }  # fmt: skip
    folder = make_directory(Path(out))
    if score is not None:
        asked["score"] = score
    _check_same_study(folder, {"data": data, "options": json.loads(json.dumps(given))})
    rows, failed = [], []
    for number, cell in enumerate(cells, 1):
        click.echo(f"[{number} of {len(cells)}] {cell.name}", err=True)
        try:
            run = _trained(cell, data, folder, given)
            if score is not None:
                _exported(run, score)
            rows.append({"settings": cell.label, "seed": cell.seed, **_evaluated(run, asked)})
        except TrainingError as error:
            click.echo(f"failed: {error}", err=True)
            failed.append({"settings": cell.label, "seed": cell.seed, "error": str(error)})
        _write(folder, {"data": data, "options": given, "evaluation": asked}, rows, failed)
    click.echo((folder / TABLE).read_text(encoding="utf-8"))
    return not failed


def _check_same_study(folder: Path, asked: dict[str, Any]) -> None:
    """Runs that were trained with other settings would stand in one table with these."""
    try:
        record = json.loads((folder / STUDY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{folder / STUDY}' is damaged ({error}); remove it to write it anew") from error
    changed = [key for key in asked if record.get(key) != asked[key]]
    if changed:
        raise UsageError(
            f"'{folder}' holds a study with other {' and '.join(changed)}: {record.get(changed[0])}. "
            "Choose another folder with -o"
        )


def _trained(cell: Cell, data: str, folder: Path, given: Mapping[str, Any]) -> Path:
    """The finished run of a cell: as it lies there, gone on with, or trained now."""
    run = folder / cell.name
    if not (run / LAST).exists():
        options = {"recipe": "short", **given, "size": given.get("size"), "name": cell.name, "seed": cell.seed}
        return start_run(data, folder, {**options, **{key: convert(key, value) for key, value in cell.settings}})
    epoch = load_checkpoint(run / LAST)[1]["progress"]["epoch"]
    return resume_run(run) if epoch < load_config(run).epochs else run


def _exported(run: Path, score: str) -> None:
    """An fp32 ONNX export with a score, as it lies there if it is of these weights and was asked for the same."""
    record = run / EXPORT
    asked = {"score": score, "epoch": load_checkpoint(run / BEST)[1]["epoch"]}
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) == asked:
        return
    export_run(run, precisions=("fp32",), engines=("onnxruntime",), score=score)
    write_json(record, asked)


def _evaluated(run: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The report of `evaluate`, from the last time if it was asked the same of the same weights."""
    path = run / EVALUATION
    weights = load_checkpoint(run / BEST)[1]["epoch"]
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["asked"] == asked and stored["epoch"] == weights:
            return dict(stored["report"])
    arguments: dict[str, Any] = {key: value or None for key, value in asked.items() if key != "score"}
    report, _ = evaluate(run, bootstrap=0, **arguments)
    if asked.get("score") is not None:
        report["mean"][SHIPPED] = report["mean"][report["default_score"]]
    write_json(path, {"asked": asked, "epoch": weights, "report": report})
    return report


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds: mean and sample standard deviation (None of one seed) of accuracy and of each score's mean AUROC.

    Args:
        rows: reports of `ssod_edge.evaluate.evaluate` with `settings` and `seed`.

    Returns:
        a row for each setting, in the order in which they came first: `settings`, `seeds`, `accuracy`, and `auroc` and
        `fpr_at_id_tpr95` by score; each figure is {"mean", "sd"}, in [0, 1].
    """
    table = []
    for label in dict.fromkeys(row["settings"] for row in rows):
        group = [row for row in rows if row["settings"] == label]
        scores = [name for name in group[0]["mean"] if all(name in row["mean"] for row in group)]
        table.append(
            {
                "settings": label,
                "seeds": [row["seed"] for row in group],
                "accuracy": _spread([row["id_accuracy"] for row in group]),
                **{
                    key: {name: _spread([row["mean"][name][key] for row in group]) for name in scores}
                    for key in ("auroc", "fpr_at_id_tpr95")
                },
            }
        )
    return table


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def _write(folder: Path, study: dict[str, Any], rows: list[dict[str, Any]], failed: list[dict[str, Any]]) -> None:
    summary = summarise(rows)
    write_json(folder / STUDY, {**study, "summary": summary, "runs": rows, "failed": failed})
    text = markdown(summary, failed)
    write_atomic(folder / TABLE, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def markdown(summary: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]]) -> str:
    """The table: accuracy, and the AUROC of each score as a mean over OOD sets, in percent, with deviations."""
    scores = list(dict.fromkeys(name for row in summary for name in row["auroc"]))
    lines = ["| " + " | ".join(["settings", "seeds", "accuracy", *scores]) + " |", "|---" * (3 + len(scores)) + "|"]
    for row in summary:
        cells = [row["settings"], str(len(row["seeds"])), _percent(row["accuracy"])]
        cells += [_percent(row["auroc"].get(name)) for name in scores]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\nfailed: {row['settings']}, seed {row['seed']}: {row['error']}" for row in failed]
    return "\n".join(lines) + "\n"


def _percent(figure: Mapping[str, float | None] | None) -> str:
    if figure is None or figure["mean"] is None:
        return ""
    deviation = f" ± {100 * figure['sd']:.1f}" if figure["sd"] is not None else ""
    return f"{100 * figure['mean']:.1f}{deviation}"
