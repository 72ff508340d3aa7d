"""How many photos a second actors of a local Ray cluster judge, compared to one process on the same cores, and what
that takes of the processor. On a machine that is not idle the second alone says something.

python -m ssod_edge.bench.tools.cluster EXPORT PHOTOS... --json bench/results/cluster.json
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

import ssod_edge.ray
from ssod_edge.bench.tools.command import Tool, json_option, write_rows
from ssod_edge.data.inputs import list_images
from ssod_edge.errors import UsageError
from ssod_edge.machine import available_cores
from ssod_edge.optional import load
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import Predictor


@dataclass(frozen=True)
class Rate:
    """How fast verdicts came: seconds to the first, and after it images a second and milliseconds of processor time an
    image, of this process and all that it started.
    """

    start_s: float
    ips: float
    cpu_ms: float


def rate(counts: Iterable[int]) -> Rate:
    """Of how many verdicts come at a time.

    Raises:
        UsageError: they came all at once.
    """
    started = first = last = time.perf_counter()
    spent, after = cpu_s(), -1
    for count in counts:
        last = time.perf_counter()
        if after < 0:
            first, spent, after = last, cpu_s(), 0
        else:
            after += count
    if after <= 0:
        raise UsageError("all verdicts came at once: give more photos, or a smaller --batch")
    return Rate(first - started, after / (last - first), 1e3 * (cpu_s() - spent) / after)


def cpu_s() -> float:
    """Seconds of processor time so far of this process and those below it that live; Ray's are below the driver."""
    parents: dict[int, int] = {}
    spent: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            parents[int(stat.parent.name)], spent[int(stat.parent.name)] = int(fields[1]), sum(map(int, fields[11:13]))

    def is_ours(process: int) -> bool:
        while process not in (0, os.getpid()):
            process = parents.get(process, 0)
        return process != 0

    return sum(ticks for process, ticks in spent.items() if is_ours(process)) / os.sysconf("SC_CLK_TCK")


def ways(export: str, paths: list[str], engine: str, batch: int, cores: int) -> dict[str, Callable[[], Iterable[int]]]:
    """One process, an actor with all cores, and as many actors of one core: how many verdicts come at a time."""

    def one_process() -> Iterable[int]:
        with Predictor(open_runner(export, engine=engine, threads=cores)) as model:
            for number, verdict in enumerate(model.predict_many(paths, workers=cores), 1):
                assert verdict.error is None, verdict.error
                if number % batch == 0:
                    yield batch

    def actors(count: int) -> Callable[[], Iterable[int]]:
        def run() -> Iterable[int]:
            options: dict[str, Any] = {
                "concurrency": count,
                "batch_size": batch,
                "num_cpus": cores // count,
                "engine": engine,
            }
            for rows in ssod_edge.ray.predict(paths, Path(export).resolve(), **options).iter_batches(
                batch_size=None, batch_format="pyarrow"
            ):
                assert rows.column("error").null_count == len(rows)
                yield len(rows)

        return run

    return {"predict_many": one_process, **{f"actors_{count}": actors(count) for count in sorted({1, cores})}}


@click.command(cls=Tool)
@click.argument("export")
@click.argument("images", nargs=-1, required=True)
@click.option("--engine", default="openvino", show_default=True)
@click.option("--repeat", default=1, show_default=True, help="How many times each photo is judged.")
@click.option("--batch", default=ssod_edge.ray.BATCH, show_default=True, help="Images that an actor has in hand.")
@click.option("--rounds", default=3, show_default=True)
@json_option
def main(
    export: str, images: tuple[str, ...], engine: str, repeat: int, batch: int, rounds: int, json_file: Path | None
) -> None:
    """Compare actors on a local Ray cluster with one process; each begins anew in each round."""
    paths, cores, ray = list_images(images) * repeat, available_cores(), load("ray", ssod_edge.ray.PURPOSE)
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    runs = ways(export, paths, engine, batch, cores)
    found: dict[str, list[Rate]] = {name: [] for name in runs}
    for index in range(rounds):
        for name in runs if index % 2 else reversed(runs):
            found[name].append(rate(runs[name]()))
    ray.shutdown()
    rows: list[dict[str, Any]] = []
    for name, measured in found.items():
        pairs = list(zip(measured, found["predict_many"], strict=True))
        row: dict[str, Any] = {"run": name}
        row |= {
            what: statistics.median(getattr(one, what) for one in measured) for what in ("start_s", "ips", "cpu_ms")
        }
        row["ips_ratio"] = statistics.median(one.ips / base.ips for one, base in pairs)
        row["cpu_ratio"] = statistics.median(one.cpu_ms / base.cpu_ms for one, base in pairs)
        rows.append({**row, "rounds": [asdict(one) for one in measured]})
        click.echo(
            f"{name}: {row['ips']:.0f} photos/s ({row['ips_ratio']:.2f} of one process), {row['cpu_ms']:.1f} ms of "
            f"processor time a photo ({row['cpu_ratio']:.2f}), after {row['start_s']:.1f} s"
        )
    settings = {"images": len(paths), "cores": cores, "engine": engine, "batch": batch, "rounds": rounds}
    write_rows(json_file, "cluster", rows, settings=settings)


if __name__ == "__main__":
    main()
