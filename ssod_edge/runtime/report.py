"""The `predict` command: verdicts as a table, or as JSON lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ssod_edge.errors import EXIT_OK, EXIT_SOME_FAILED
from ssod_edge.runtime import open_runner
from ssod_edge.runtime.inputs import list_images
from ssod_edge.runtime.predict import Prediction, Predictor
from ssod_edge.runtime.runner import Runner


def run_predict(folder: str, images: Sequence[str], as_json: bool, batch: int, **options: Any) -> int:
    """Print the verdict on each image; returns the exit code.

    Args:
        folder: an export folder, or the run folder that holds it.
        images: see `ssod_edge.runtime.inputs.list_images`.
        as_json: one JSON object a line, as soon as it is known.
        batch: images per run of the engine.
        options: of `ssod_edge.runtime.open_runner`.
    """
    paths = list_images(images, (os.fsdecode(line) for line in sys.stdin.buffer))
    with Predictor(open_runner(folder, **options)) as predictor:
        if not predictor.runner.spec.trained:
            print("warning: untrained weights; these verdicts mean nothing", file=sys.stderr)
        verdicts = predictor.predict_many(paths, batch)
        failed = _print_json(verdicts) if as_json else _print_table(verdicts, len(paths), predictor.runner)
    return EXIT_SOME_FAILED if failed else EXIT_OK


def _print_json(verdicts: Iterable[Prediction]) -> int:
    """Returns how many images failed."""
    failed = 0
    for verdict in verdicts:
        failed += verdict.error is not None
        print(json.dumps(verdict.to_dict(), allow_nan=False), flush=True)
    return failed


def _print_table(verdicts: Iterable[Prediction], total: int, runner: Runner) -> int:
    """Returns how many images failed. An interrupt still prints the rows that are done."""
    done: list[Prediction] = []
    try:
        for verdict in _with_progress(verdicts, total):
            done.append(verdict)
    finally:
        if done:
            _print_rows(done, runner)
    return sum(verdict.error is not None for verdict in done)


def _with_progress(verdicts: Iterable[Prediction], total: int) -> Iterator[Prediction]:
    if total < 20 or not sys.stderr.isatty():
        yield from verdicts
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(verdicts, "images", total, console=Console(stderr=True), transient=True)


def _print_rows(verdicts: Sequence[Prediction], runner: Runner) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("image", "verdict", "class", box=None, pad_edge=False)
    for heading in ("confidence", "ood score"):
        table.add_column(heading, justify="right", no_wrap=True)
    for column in table.columns[:3]:
        column.overflow = "fold"
    for verdict in verdicts:
        name = Text(_printable(verdict.image))
        if verdict.error is not None:
            table.add_row(name, Text("ERROR", "red"), Text(_printable(verdict.error)), "", "")
            continue
        text, style = _WORDS[verdict.known]
        shown = (f"{verdict.confidence:.1%}", f"{verdict.ood_score:.3f}")
        table.add_row(name, Text(text, style), Text(str(verdict.class_name)), *shown)
    # Off a terminal a row is one line, however long its file name is.
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    console.print(table)
    console.print(Text(_summary(verdicts, runner)), highlight=False)


WIDE = 100_000
_WORDS = {True: ("KNOWN", "green"), False: ("UNKNOWN", "yellow"), None: ("no threshold", "dim")}


def _printable(text: str) -> str:
    """Bytes of a file name that are not UTF-8 as replacement characters."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _summary(verdicts: Sequence[Prediction], runner: Runner) -> str:
    known = sum(v.known is True for v in verdicts)
    unknown = sum(v.known is False for v in verdicts)
    failed = sum(v.error is not None for v in verdicts)
    counts = (
        f"{len(verdicts)} image{'s' if len(verdicts) > 1 else ''}: {known} known, {unknown} unknown, {failed} failed"
    )
    ran = f"{runner.artifact.name} on {runner.engine} in {runner.precision} on {runner.device}"
    threshold = runner.artifact.threshold
    if threshold is None:
        return f"{counts}; {ran}; no threshold"
    kept = f"{threshold.target_tpr:.0%} of in-distribution images"
    return f"{counts}; {ran}; known up to {threshold.value:.3f}, which keeps {kept}"
