"""`ssod-edge bench`: latency and accuracy of every artifact of an export, in one run."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssod_edge.bench.backends import Backends
from ssod_edge.bench.compare import compare
from ssod_edge.bench.environment import describe_environment
from ssod_edge.bench.images import choose_images
from ssod_edge.bench.interrupt import Interrupts
from ssod_edge.bench.measurement import BenchOptions, Measurement
from ssod_edge.bench.progress import Bar
from ssod_edge.bench.record import load_record
from ssod_edge.bench.report import markdown, print_comparison, print_record
from ssod_edge.errors import EXIT_MISSING, EXIT_OK, EXIT_SOME_FAILED, UsageError
from ssod_edge.files import check_output, temporary_folder, write_json
from ssod_edge.runtime.export import Export
from ssod_edge.terminal import Screen, tell

Report = Callable[[dict[str, Any]], None]


def bench(
    folder: str | Path, options: BenchOptions, console: Screen | None = None, unfinished: Report | None = None
) -> dict[str, Any]:
    """Measure an export.

    Args:
        folder: an export folder, or the run folder that holds it.
        options: see `BenchOptions`.
        console: where the progress bar goes; None shows none.
        unfinished: after a Ctrl-C, gets the record of what was measured until then, if there is anything.

    Returns:
        The record that `ssod_edge.bench.record` describes. A row that failed is in it, with the reason.

    Raises:
        UsageError, ArtifactError, MissingExtraError: the export or the data that were named cannot be opened.
    """
    export = Export.at(folder)
    environment = describe_environment(options.threads)
    with Interrupts() as interrupts, temporary_folder() as scratch:
        images = choose_images(export, options, options.quick)
        with Backends(export, Path(scratch), options.threads) as backends, Bar(console, interrupts.check) as bar:
            measurement = Measurement(export, options, backends, images, bar)
            try:
                measurement.run()
            except KeyboardInterrupt:
                if unfinished is not None and measurement.has_latency():
                    unfinished(measurement.record(environment, _command(folder, options)))
                raise
            return measurement.record(environment, _command(folder, options))


def exit_code(record: dict[str, Any]) -> int:
    """0; 1 if a row failed or an image could not be read; 3 if nothing could run for lack of packages."""
    statuses = {row["status"] for row in record["rows"]}
    sets = [entry for entry in (record["data"]["id"], *record["data"]["ood"].values()) if entry is not None]
    if "failed" in statuses or any(entry["unreadable"] for entry in sets):
        return EXIT_SOME_FAILED
    return EXIT_OK if "ok" in statuses else EXIT_MISSING


def _command(folder: str | Path, options: BenchOptions) -> str:
    """The command line that measures the same again."""
    words = ["ssod-edge", "bench", str(folder)]
    words += ["--quick"] if options.quick else []
    words += ["--id", options.id_data] if options.id_data is not None else []
    for name, data in (options.ood_data or {}).items():
        words += ["--ood", f"{name}={data}"]
    for name, value in (("batch", options.batch), ("threads", options.threads), ("via", options.via)):
        words += [f"--{name}", str(value)] if value is not None else []
    return shlex.join(words)


@dataclass(frozen=True)
class BenchOutput:
    """What becomes of a record. Attributes: the file to write, one to compare with, Markdown in place of a table."""

    json_file: str | None = None
    compare_file: str | None = None
    as_markdown: bool = False


def run_bench(
    folder: str | None, options: BenchOptions, output: BenchOutput, backbone: str | None = None, runs: str = "runs"
) -> int:
    """The command `bench`: measure, print, save, compare; returns its `exit_code`.

    Args:
        folder: an export folder, or the run folder that holds it; None: the newest export under `runs`, of this
            backbone if one is given.

    Raises:
        UsageError: both a folder and a backbone, no export to bench, or a record to compare with that is none.
        OutputError: the JSON file cannot be written; this is found out before anything is measured.
    """
    if folder is not None and backbone is not None:
        raise UsageError("give either DIR or --backbone, not both")
    old = None if output.compare_file is None else load_record(output.compare_file)
    if output.json_file is not None:
        check_output(output.json_file)
    errors = Screen(err=True)
    console = Screen(wide=132)

    def show(record: dict[str, Any]) -> None:
        if output.as_markdown:
            tell(markdown(record).rstrip())
        else:
            print_record(record, console)

    def show_unfinished(record: dict[str, Any]) -> None:
        errors.print("interrupted: columns that are missing were not measured, and no JSON is written", soft_wrap=True)
        show(record)

    record = bench(Export.newest(runs, backbone).folder if folder is None else folder, options, errors, show_unfinished)
    if output.json_file is not None:  # before anything is printed: what was measured is not lost by it
        write_json(output.json_file, record)
    show(record)
    if old is not None:
        print_comparison(compare(old, record), console)
    return exit_code(record)
