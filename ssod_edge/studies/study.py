"""A study: a grid of training runs, each evaluated, and a table with means and deviations over seeds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ssod_edge.config import AUTO_EPOCHS, AUTO_SCORE, NEED_OOD_ROW, score_parts, setting_types
from ssod_edge.data.sources import check_classes, open_dataset
from ssod_edge.errors import ArtifactError, BusyError, MissingExtraError, OutputError, SsodEdgeError, UsageError
from ssod_edge.evaluation.baselines import load_library
from ssod_edge.evaluation.evaluate import EvalOptions, evaluate
from ssod_edge.evaluation.images import check_fit_images
from ssod_edge.export.engines.artifact import check_engines
from ssod_edge.export.graph.build import ExportOptions, export_run
from ssod_edge.files import claim, exclusive, make_directory, write_atomic, write_json
from ssod_edge.json_reader import from_json, read_json
from ssod_edge.spec import Spec
from ssod_edge.studies.summary import markdown, summarise
from ssod_edge.terminal import tell
from ssod_edge.training.checkpoint import BEST, LAST, load_checkpoint
from ssod_edge.training.loop import resume_run, start_run
from ssod_edge.training.run import Run, load_config
from ssod_edge.training.settings import run_config

#: In OUT: what was asked for, and what came of it.
STUDY, TABLE = "study.json", "study.md"
#: In each run's folder: its evaluation, and what with.
EVALUATION = "study-eval.json"
#: Settings that are the study's own to make, or one value of which would not do.
_FIXED = {"data", "name", "seed", "loss", "preprocess", "begun_from", "begun_sha256"}
#: Settings that may differ between a run and the same run begun now: where it lies, and what it ran on.
_OF_THE_MACHINE = {"name", "data", "workers", "kernel", "precision", "compile"}


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
        """Of its run folder. A slash, as in the path of --weights, is written "%2F"."""
        name = "-".join([*(f"{key}={value}" for key, value in self.settings), f"seed={self.seed}"])
        return name.replace("%", "%25").replace("/", "%2F")


@dataclass(frozen=True)
class StudyOptions:
    """What a study is asked for.

    Attributes:
        vary, seeds: see `parse_grid`.
        training: options of `train`, for all runs; None is as if it were not there.
        evaluation: of every run. No intervals are computed and no disturbances shown, whatever it says.
        score: each run is exported with it ("auto" chooses one for each) before it is evaluated; None exports nothing.
    """

    vary: Sequence[str]
    seeds: str
    training: Mapping[str, Any]
    evaluation: EvalOptions = field(default_factory=EvalOptions)
    score: str | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The options of training that are there."""
        return {key: value for key, value in self.training.items() if value is not None}

    @property
    def asked(self) -> dict[str, Any]:
        """What the records say of the evaluation and the score."""
        asked = {**asdict(self.evaluation), "ood_data": dict(self.evaluation.ood_data or {})}
        del asked["bootstrap"], asked["shift_images"]
        if asked["via_jpeg"] is None:  # as records of earlier releases
            del asked["via_jpeg"]
        return asked if self.score is None else {**asked, "score": self.score}


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
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in seeds.split(",")]
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UsageError(f"expected --seeds N,N,... with different whole numbers, got '{seeds}'")
    grid = list(itertools.product(*([(key, value) for value in values] for key, values in axes.items())))
    return [Cell(settings, number) for number in numbers for settings in grid]


def convert(key: str, text: str) -> Any:
    """The value of a training setting from text.

    Raises:
        UsageError: no such setting, or a value of the wrong type.
    """
    kinds = {name: kind for name, kind in {**setting_types(), "size": int}.items() if name not in _FIXED}
    if key not in kinds:
        raise UsageError(f"unknown setting '{key}' in --vary. Known: {', '.join(sorted(kinds))}")
    kind = kinds[key]
    if key == "epochs" and text == "auto":
        return AUTO_EPOCHS
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


def run_study(data: str, out: str, study: StudyOptions) -> bool:
    """The command `study`: train and evaluate what is not done yet, then write the table.

    Args:
        data: to train on.
        out: folder of the study; its runs lie in it.

    Returns:
        whether every run of the grid has its figures.

    Raises:
        UsageError: a wrong grid, data that cannot be opened, settings that work in no run, or a folder that holds a
            study of other settings.
        MissingExtraError: a package that is needed after training is not installed.
    """
    cells = plan_study(data, study)
    check_evaluation(data, study.evaluation, study.score)
    folder = make_directory(Path(out))
    record = {"data": data, "options": json.loads(json.dumps(study.given)), "evaluation": study.asked}
    _record_study(folder, record)
    rows: dict[Cell, dict[str, Any]] = {}
    errors: dict[Cell, Exception] = {}
    todo = cells
    for again in (False, True):  # what other processes are at is looked at once more when all else is done
        busy = []
        for cell in todo:
            waiting = ": waiting for the process that is at it" if again else ""
            tell(f"[{cells.index(cell) + 1} of {len(cells)}] {cell.name}{waiting}", err=True)
            try:
                with claim(folder / f".{cell.name}.lock", f"'{cell.name}' is being worked on", wait=again):
                    rows[cell] = _finished(cell, data, folder, study)
            except (MissingExtraError, OutputError):
                raise  # the next run would meet it too
            except (SsodEdgeError, MemoryError, torch.OutOfMemoryError) as error:
                if isinstance(error, BusyError) and not again:
                    tell("another process is at it: going on with the next", err=True)
                    busy.append(cell)
                    continue
                tell(f"failed: {error}", err=True)
                errors[cell] = error
            _write(folder, record, cells, rows, errors)
        todo = busy
    if not rows and all(isinstance(error, UsageError) for error in errors.values()):
        raise next(iter(errors.values()))
    tell((folder / TABLE).read_text(encoding="utf-8"))
    return not errors


def plan_study(data: str, study: StudyOptions) -> list[Cell]:
    """The runs of a study, before anything is written.

    Raises:
        UsageError: a wrong grid or data, or options with which no run of the grid can begin.
    """
    cells, given = parse_grid(study.vary, study.seeds), study.given
    if "seed" in given:
        raise UsageError("a study takes --seeds, not --seed")
    both = [key for key, _ in cells[0].settings if key in given and key not in ("recipe", "backbone")]
    if both:
        raise UsageError(f"{', '.join(both)} cannot be given both with --vary and as an option")
    open_dataset(data)
    errors = []
    for cell in cells:
        try:
            weights = run_config(data, _cell_options(cell, given)).weights_file
            if weights is not None and not Path(weights).is_file():
                raise UsageError(f"weights file '{weights}' does not exist")
        except (UsageError, ArtifactError) as error:  # of some runs alone, it is theirs
            errors.append(error)
    if len(errors) == len(cells):
        raise errors[0]
    return cells


def check_evaluation(data: str, asked: EvalOptions, score: str | None = None) -> None:
    """Find out before hours of training whether the evaluation can be made.

    Args:
        data: to train on.
        score: to export with, if any.

    Raises:
        UsageError: data that cannot be opened, other classes than the training data's, no such baseline or score.
        MissingExtraError: a package for the baselines or the export is not installed.
    """
    if score is not None:
        ExportOptions(score=score)
        check_engines(("onnxruntime",))
    classes = open_dataset(data).classes
    if asked.id_data is not None:
        check_classes(asked.id_data, open_dataset(asked.id_data).classes, classes)
    for unknown in (asked.ood_data or {}).values():
        open_dataset(unknown, labelled=False)
    if asked.baseline_names():
        load_library()
    if asked.fit_images is not None:
        check_fit_images(asked.fit_images, len(classes))


def _record_study(folder: Path, asked: dict[str, Any]) -> None:
    """Write down what is asked for before anything is trained with it, or compare it with what was written.

    Runs that were trained with other settings would stand in one table with these.
    """
    record = read_study(folder) if (folder / STUDY).exists() else {}
    changed = [key for key in ("data", "options") if record.get(key) != asked[key]]
    if record and changed and any(folder.glob("*/*.safetensors")):
        raise UsageError(
            f"'{folder}' holds a study with other {' and '.join(changed)}: {record.get(changed[0])}. "
            "Choose another folder with -o"
        )
    if changed:
        write_json(folder / STUDY, {**asked, "summary": [], "runs": [], "failed": []})


def read_study(folder: Path) -> dict[str, Any]:
    """The record of a study, with its `runs`: an object for each.

    Raises:
        ArtifactError: it is not there, or damaged.
    """
    try:
        record = read_json(folder / STUDY)
        from_json(tuple[dict[str, Any], ...], record.get("runs"), "runs")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{folder / STUDY}' is damaged ({error}); remove it to write it anew") from error
    return record


def _finished(cell: Cell, data: str, folder: Path, study: StudyOptions) -> dict[str, Any]:
    """The report of a cell's run, trained, exported and evaluated as far as it is not done yet."""
    score, loss = study.score, run_config(data, _cell_options(cell, study.given)).loss
    reads_row = score is not None and score != AUTO_SCORE and set(NEED_OOD_ROW) & set(score_parts(score))
    if reads_row and not loss.trains_row:
        raise UsageError(f"--score {score} needs the OOD row, and these settings do not train it")
    run = _trained(cell, data, folder, study.given)
    return _evaluated(run, study, _exported(run, score) if score is not None else None)


def _cell_options(cell: Cell, given: Mapping[str, Any]) -> dict[str, Any]:
    """What `start_run` takes for a cell."""
    options = {"recipe": "short", **given, "size": given.get("size"), "name": cell.name, "seed": cell.seed}
    return {**options, **{key: convert(key, value) for key, value in cell.settings}}


def _trained(cell: Cell, data: str, folder: Path, given: Mapping[str, Any]) -> Path:
    """The finished run of a cell: as it lies there, gone on with, or trained now."""
    run, options = folder / cell.name, _cell_options(cell, given)
    if not any((run / kept).exists() for kept in (BEST, LAST)):
        return start_run(data, folder, options)
    config = load_config(run)
    _check_same_settings(run, asdict(config), asdict(run_config(data, options)))
    if config.tune != "all":
        return run  # it leaves a checkpoint when it is finished, and no other
    meta = load_checkpoint(run / LAST)[1]
    finished = meta.get("finished", meta["progress"]["epoch"] >= config.epochs)  # not recorded by earlier releases
    return run if finished else resume_run(run)


def _check_same_settings(run: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UsageError if a run was not trained as its options mean now: a default has changed since."""
    found, wanted = ({**config, **config["loss"], "loss": None} for config in (found, wanted))
    changed = [key for key in wanted if key not in _OF_THE_MACHINE and found.get(key) != wanted[key]]
    if changed:
        raise UsageError(
            f"'{run}' was trained with other settings, perhaps by an earlier version: {changed[0]} was "
            f"{found.get(changed[0])} and is {wanted[changed[0]]} now. Choose another folder with -o, or name the "
            "setting as it was"
        )


def _exported(run: Path, score: str) -> Spec:
    """The export of a run's best weights with a score: as it lies there, or an fp32 ONNX export that is made now."""
    with suppress(ArtifactError):  # damaged, or of other weights
        found = Run.at(run).export
        if found is not None and _has_score(found.spec, score):
            return found.spec
    return export_run(run, precisions=("fp32",), engines=("onnxruntime",), score=score)


def _has_score(spec: Spec, score: str) -> bool:
    """Whether an export was made with this --score."""
    if score == AUTO_SCORE:
        return bool(spec.choice)
    return not spec.choice and set(score_parts(spec.score_name)) == set(score_parts(score))


def _evaluated(run: Path, study: StudyOptions, export: Spec | None) -> dict[str, Any]:
    """The report of `evaluate`, from the last time if it was asked the same of the same weights and the same score."""
    path = run / EVALUATION
    shipped = [export.score_name, export.detector.get("sha256")] if export is not None else None
    meta = load_checkpoint(run / BEST)[1]
    asked = study.asked
    named = [asked["id_data"] or meta["data"], *asked["ood_data"].values()]
    images = [open_dataset(data, labelled=False).fingerprint for data in named]
    record = {"asked": asked, "weights": meta["tensors_sha256"], "images": images, "shipped": shipped}
    with suppress(OSError, ValueError):  # none yet, or a damaged one: it is made again
        stored = read_json(path)
        report = from_json(dict[str, Any], stored.pop("report", None), "report")
        if stored == record:
            return report
    report, _ = evaluate(run, replace(study.evaluation, bootstrap=0, shift_images=0))
    del report["classification"]["mistakes"]  # single images are no part of a study, and there may be very many
    if export is not None:
        if report["default_score"] != export.score_name:
            raise ArtifactError(f"the score '{export.score_name}' of the export of '{run}' could not be evaluated")
        if report["mean"]:  # without OOD sets there is accuracy alone
            report["mean"]["shipped"] = report["mean"][export.score_name]
    write_json(path, {**record, "report": report})
    return report


def _write(
    folder: Path, study: dict[str, Any], cells: Sequence[Cell], found: Mapping[Cell, dict[str, Any]],
    errors: Mapping[Cell, Exception],
) -> None:  # fmt: skip
    """The record and the table of what there is so far, in the order of the grid, by this process and by others."""
    keys = {cell: {"settings": cell.label, "seed": cell.seed} for cell in cells}
    with exclusive(folder):
        found = {**_rows_of_others(folder, study, cells), **found}
        rows = [{**keys[c], **found[c]} for c in cells if c in found and c not in errors]
        failed = [{**keys[c], "error": str(errors[c]) or type(errors[c]).__name__} for c in cells if c in errors]
        summary = summarise(rows)
        write_json(folder / STUDY, {**study, "summary": summary, "runs": rows, "failed": failed})
        text = markdown(summary, failed, rows[0].get("equalised", "") if rows else "")
        write_atomic(folder / TABLE, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _rows_of_others(folder: Path, study: Mapping[str, Any], cells: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    """What the record has of runs that this process has not come to yet, if it is of the same study."""
    record = read_study(folder)
    if any(record.get(key) != value for key, value in study.items()):
        return {}
    rows = {(row.get("settings"), row.get("seed")): row for row in record["runs"]}
    return {cell: rows[cell.label, cell.seed] for cell in cells if (cell.label, cell.seed) in rows}
