"""The `predict` command: verdicts as a table, or as JSON lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from ssod_edge.data.inputs import list_images
from ssod_edge.data.layout import left_out
from ssod_edge.data.listing import Listing
from ssod_edge.detect.confidence import explain_p_known
from ssod_edge.errors import EXIT_OK, EXIT_SOME_FAILED
from ssod_edge.runtime.field.collect import MEGABYTES, MOST, Collector
from ssod_edge.runtime.field.monitor import Monitor
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import Predictor, Verdict
from ssod_edge.runtime.runner import Runner
from ssod_edge.runtime.written import Sorter, VerdictTable
from ssod_edge.terminal import WIDE, Bars, Screen, printable, standard_input, tell


@dataclass(frozen=True)
class PredictOptions:
    """How verdicts are given.

    Attributes:
        as_json: one JSON object a line, as soon as it is known.
        csv, parquet: a file of `ssod_edge.runtime.written.VerdictTable`; one of them at most.
        resume: rows that are in it are not made again.
        sort_into: a folder of `ssod_edge.runtime.written.Sorter`, which gets copies of the images.
        monitor: a file of `ssod_edge.runtime.field.monitor.Monitor`, which takes the verdicts.
        collect: a folder of `ssod_edge.runtime.field.collect.Collector`, which keeps what is unknown or nearly so.
        collect_most, collect_mb: its budget.
        batch: images per run of the engine.
        strict_images: a damaged picture counts as one that cannot be read.
        camera, smooth, realtime: of frames instead of images; see `ssod_edge.runtime.field.stream`.
    """

    as_json: bool = False
    csv: str | None = None
    parquet: str | None = None
    resume: bool = False
    sort_into: str | None = None
    monitor: str | None = None
    collect: str | None = None
    collect_most: int = MOST
    collect_mb: float = MEGABYTES
    batch: int = 8
    strict_images: bool = False
    camera: str | None = None
    smooth: float | None = None
    realtime: bool = False


def run_predict(folder: str, images: Sequence[str], options: PredictOptions, **opening: Any) -> int:
    """Print the verdict on each image; returns the exit code.

    Args:
        folder: an export folder, or the run folder that holds it.
        images: see `ssod_edge.data.inputs.list_images`.
        opening: options of `ssod_edge.runtime.open.open_runner`.
    """
    no_images: dict[str, str] = {}
    others: set[str] = set()
    names = list_images(images, standard_input(), no_images, others, stored=True)
    if note := left_out(others):
        tell(note, err=True)
    with (
        Predictor(open_runner(folder, **opening), options.strict_images) as predictor,
        open_monitor(options.monitor, predictor) as watch,
        open_collector(options, predictor) as collector,
        open_table(options) as table,
        open_sorter(options.sort_into, predictor) as sorter,
    ):
        listing = _listing(names, table if options.resume else None, predictor)
        if not predictor.runner.spec.trained:
            tell("warning: untrained weights; these verdicts mean nothing", err=True)
        elif predictor.threshold is None:
            fix = "Fit one with: ssod-edge calibrate DIR --id DATA"
            tell(
                f"note: {predictor.runner.artifact.name} has no threshold, so nothing is told unknown. {fix}", err=True
            )
        verdicts = _in_place(predictor, predictor.predict_many(listing, options.batch), no_images)
        if watch is not None:
            verdicts = map(watch.add, verdicts)
        verdicts = _written(verdicts, table)
        if options.as_json:
            failed = _print_json(verdicts)
        else:
            failed = _print_table(verdicts, listing, predictor.runner, rows=not options.resume)
    problems = any(one is not None and one.problem for one in (watch, collector))
    problems = problems or (sorter is not None and sorter.failed > 0)
    return EXIT_SOME_FAILED if failed or problems else EXIT_OK


def open_table(options: PredictOptions, more: Sequence[str] = ()) -> AbstractContextManager[VerdictTable | None]:
    """The table of verdicts that is asked for, with more columns; none without a file."""
    path = options.csv or options.parquet
    if path is None:
        return nullcontext()
    return VerdictTable(path, more, options.resume, parquet=options.parquet is not None)


def _listing(names: list[str], table: VerdictTable | None, predictor: Predictor) -> Listing:
    """The images, but for those that a table has rows of; says how many it has."""
    if table is None:
        return Listing(names)
    runner = predictor.runner
    model = {"engine": runner.engine, "precision": runner.precision, "threshold": predictor.threshold}
    if rows := table.resume(model):
        tell(f"resuming: {rows:,} image{'s have' if rows > 1 else ' has'} a row already", err=True)
    return Listing(names, table.is_done)


@contextmanager
def open_sorter(folder: str | None, predictor: Predictor) -> Iterator[Sorter | None]:
    """A sorter that speaks on standard error, and says at the end what lies where; none without a folder."""
    if folder is None:
        yield None
        return
    sorter = Sorter(folder, predictor.runner.spec.classes, lambda line: tell(line, err=True))
    predictor.watchers.append(sorter.add)
    try:
        yield sorter
    finally:  # after Ctrl-C too
        tell(sorter.summary(), err=True)


def _written(verdicts: Iterable[Verdict], table: VerdictTable | None) -> Iterator[Verdict]:
    for verdict in verdicts:
        if table is not None:
            table.add(verdict.to_dict())
        yield verdict


def open_monitor(path: str | None, predictor: Predictor) -> AbstractContextManager[Monitor | None]:
    """A monitor that speaks on standard error; none without a path."""
    if path is None:
        return nullcontext()
    return Monitor(path, predictor, say=lambda line: tell(line, err=True))


@contextmanager
def open_collector(options: PredictOptions, predictor: Predictor) -> Iterator[Collector | None]:
    """A collector that speaks on standard error, and says at the end what it kept; none without a folder."""
    if options.collect is None:
        yield None
        return

    def say(line: str) -> None:
        tell(line, err=True)

    with Collector(options.collect, predictor, options.collect_most, options.collect_mb, say) as collector:
        try:
            yield collector
        finally:  # after Ctrl-C too
            say(collector.summary())


def _in_place(predictor: Predictor, verdicts: Iterable[Verdict], no_images: Mapping[str, str]) -> Iterator[Verdict]:
    """The verdicts, where an argument that stands for no image says why."""
    for verdict in verdicts:
        reason = no_images.get(verdict.image)
        yield verdict if reason is None else predictor.verdicts([verdict.image], {}, [(reason, None)])[0]


def _print_json(verdicts: Iterable[Verdict]) -> int:
    """Returns how many images failed."""
    failed = 0
    for verdict in verdicts:
        failed += verdict.error is not None
        tell(json.dumps(verdict.to_dict(), allow_nan=False))
    return failed


def _print_table(verdicts: Iterable[Verdict], listing: Listing, runner: Runner, rows: bool = True) -> int:
    """Returns how many images failed. An interrupt still prints the rows that are done.

    Args:
        rows: else only what they come to, in a fixed memory: `--resume` is for images without number.
    """
    done: list[Verdict] = []
    counts: Counter[str] = Counter()
    try:
        for verdict in _with_progress(verdicts, listing):
            counts["failed" if verdict.error is not None else f"known {verdict.known}"] += 1
            if rows:
                done.append(verdict)
    finally:
        if counts:
            _print_rows(done, counts, runner)
    return counts["failed"]


def _with_progress(verdicts: Iterable[Verdict], listing: Listing) -> Iterator[Verdict]:
    total = listing.left()
    with Bars(shown=total is None or total >= 20) as progress:
        task = progress.add_task("images", total=total)
        for verdict in verdicts:
            yield verdict
            progress.update(task, advance=1, total=listing.left())


def _print_rows(verdicts: Sequence[Verdict], counts: Counter[str], runner: Runner) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("image", "verdict", "class", box=None, pad_edge=False)
    for heading in ("confidence", "ood score", "p known"):
        table.add_column(heading, justify="right", no_wrap=True)
    for column in table.columns[:3]:
        column.overflow = "fold"
    for verdict in verdicts:
        name = Text(printable(verdict.image))
        if verdict.error is not None:
            table.add_row(name, Text("ERROR", "red"))
            continue
        text, style = WORDS[verdict.known]
        p = "" if verdict.p_known is None else f"{verdict.p_known:.1%}"
        shown = (f"{verdict.confidence:.1%}", f"{verdict.ood_score:.3f}", p)
        note = f" ({verdict.image_warning})" if verdict.image_warning else ""
        table.add_row(name, Text(text, style), Text(printable(str(verdict.class_name) + note)), *shown)
    # Off a terminal a row is one line, however long its file name is.
    console = Screen(wide=WIDE)
    if verdicts:
        console.print(table)
        for verdict in verdicts:
            if verdict.error is not None:
                console.print(Text(f"ERROR {printable(verdict.error)}", "red"), soft_wrap=True)
        if counts["failed"] < counts.total() and (note := p_known_note(runner)):
            console.print(note)
    console.print(_summary(counts, runner))


WORDS = {True: ("KNOWN", "green"), False: ("UNKNOWN", "yellow"), None: ("no threshold", "dim")}


def _summary(counts: Counter[str], runner: Runner) -> str:
    total = counts.total()
    told = f"{counts['known True']} known, {counts['known False']} unknown, {counts['failed']} failed"
    return f"{total} image{'s' if total > 1 else ''}: {told}; {describe_run(runner)}"


def p_known_note(runner: Runner) -> str:
    """What `p known` in a table is; empty where the artifact gives none."""
    threshold = runner.artifact.threshold
    return "" if threshold is None or not threshold.id_quantiles else explain_p_known(threshold.target_tpr)


def describe_run(runner: Runner) -> str:
    """What ran, and up to which score an image was known: the end of a summary."""
    ran = f"{runner.artifact.name} on {runner.engine} in {runner.precision} on {runner.device}"
    threshold = runner.artifact.threshold
    if threshold is None:
        return f"{ran}; no threshold"
    kept = f"{threshold.target_tpr:.0%} of in-distribution images"
    return f"{ran}; known up to {threshold.value:.3f}, which keeps {kept}"
