"""What knowing "unknown" costs at batch 1: each artifact's graph over the plain classifier's, and the runner over it.

python -m ssod_edge.bench.tools.price EXPORT... --json bench/results/price.json

The plain classifier is the same graph with the classes' rows alone (`ssod_edge.bench.plain`). To know what a branch
costs too, take that of an export without one (`--plain`). Both are called in turns of some tens of milliseconds, with
nothing made, checked or copied around them. Each round gives one ratio; their median is told with its 95% interval. In
the same way the runner, which copies in and out and checks, is compared with the bare call of its own graph.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ssod_edge.bench.latency import alternate
from ssod_edge.bench.plain import ENGINES, PRECISIONS, Pair, export_plain
from ssod_edge.bench.tools.command import Tool, json_option, write_rows
from ssod_edge.bench.tools.overhead import bare_call
from ssod_edge.errors import UsageError
from ssod_edge.files import temporary_folder
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import open_runner
from ssod_edge.spec import Spec

#: Drawn with replacement for an interval.
RESAMPLES = 2000


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The median, and the bounds in which that of other rounds would lie in 95 of 100 cases (bootstrap)."""
    values = np.array(ratios)
    draws = np.median(np.random.default_rng(0).choice(values, (RESAMPLES, len(values))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return float(np.median(values)), low, high


def pairs_of(spec: Spec) -> list[Pair]:
    """Every artifact on an engine that has a plain classifier."""
    names = {artifact.name for artifact in spec.artifacts}
    pairs = [Pair(engine, precision) for precision in PRECISIONS for engine in ENGINES]
    return [pair for pair in pairs if pair.fused in names]


def price(export: Export, pair: Pair, seconds: float, rounds: int, plain_of: Export | None = None) -> dict[str, Any]:
    """Time an artifact and a plain classifier, its own or another export's, in turns; then its runner and bare call."""
    spec, artifact = export.spec, export.spec.artifact(pair.fused)
    size = spec.preprocess.input_size
    image = {"image": np.random.default_rng(0).integers(0, 256, (1, 3, size, size), np.uint8)}
    with (
        temporary_folder() as folder,
        open_runner(export.folder, artifact=pair.fused, allow_untrained=True) as runner,
    ):
        cut = export_plain(plain_of or export, pair, Path(folder))
        plain = bare_call(pair.engine, Path(folder) / cut.main_file, image)
        inputs = {**image, **runner.verdict_inputs()}
        fused = bare_call(pair.engine, export.folder / artifact.main_file, inputs)
        priced = _turns(fused, plain, seconds, rounds)
        run = _turns(lambda: runner.infer(image), fused, seconds, rounds)
    return {
        "backbone": spec.backbone,
        "input_size": size,
        "score": spec.score_name,
        "artifact": pair.fused,
        "precision": runner.precision,
        "price": priced,
        "runner": run,
    }


def _turns(first: Callable[[], object], second: Callable[[], object], seconds: float, rounds: int) -> dict[str, Any]:
    turns = [alternate(first, second, seconds) for _ in range(rounds)]
    ratios = [turn.ratio for turn in turns]
    middle, low, high = interval(ratios)
    milliseconds = [float(np.median([turn[which] for turn in turns])) for which in (0, 1)]
    return {"ratio": middle, "interval": [low, high], "ratios": ratios, "ms": milliseconds}


def _told(turns: dict[str, Any]) -> str:
    low, high = turns["interval"]
    return f"{turns['ratio']:.3f} ({low:.3f} to {high:.3f})"


@click.command(cls=Tool)
@click.argument("exports", nargs=-1, required=True)
@click.option("--seconds", default=0.5, show_default=True, help="Each round.")
@click.option("--rounds", default=21, show_default=True)
@click.option("--plain", metavar="EXPORT", help="Whose plain classifier to compare with. Default: each one's own.")
@json_option
def main(exports: tuple[str, ...], seconds: float, rounds: int, plain: str | None, json_file: Path | None) -> None:
    """Tell what the score and the verdict cost in each artifact of some exports."""
    if rounds < 1 or not 0 < seconds < float("inf"):
        raise UsageError(f"it takes at least one round and more than 0 seconds, got {rounds} and {seconds}")
    rows, plain_of = [], None if plain is None else Export.at(plain)
    for place in exports:
        export = Export.at(place)
        for pair in pairs_of(export.spec):
            row = price(export, pair, seconds, rounds, plain_of)
            rows.append(row)
            told = [f"{name} {_told(row[name])}" for name in ("price", "runner")]
            network = f"{row['backbone']} {row['input_size']} px {pair.fused}: {row['price']['ms'][1]:.2f} ms"
            click.echo(", ".join([network, *told]))
            write_rows(json_file, "price", rows, seconds=seconds, rounds=rounds)
    if not rows:
        raise UsageError("no export has an artifact of OpenVINO or ONNX Runtime")


if __name__ == "__main__":
    main()
