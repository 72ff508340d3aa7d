"""How well `predict` overlaps reading images and running the engine: each stage alone, and both, in one run.

python -m ssod_edge.bench.tools.folder EXPORT IMAGES... --json bench/results/predict-folder.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

from ssod_edge.bench.tools.command import Tool, json_option, write_rows
from ssod_edge.data.inputs import list_images
from ssod_edge.data.pixels import read_pixels
from ssod_edge.errors import UsageError
from ssod_edge.machine import available_cores
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import BATCH, Predictor


def compare(predictor: Predictor, paths: list[str], rounds: int) -> dict[str, Any]:
    """Images a second of reading alone (as many threads as `predict` takes), of the engine alone, and of both.

    Each round times all three, after one untimed round. Every image has to be readable.

    Returns:
        medians in images/s; `ratio` of both to the slower stage alone; and `ratio_to_shared_cores`, to
        1 / (1 / read + 1 / run), which is all there is where either stage alone keeps every core busy.

    Raises:
        ImageError: an image cannot be read.
    """
    runner = predictor.runner
    settings = runner.spec.preprocess
    pixels = np.stack([read_pixels(path, settings) for path in paths[:BATCH]])
    workers = min(8, available_cores())

    def read() -> None:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(lambda path: read_pixels(path, settings), paths):
                pass

    def run() -> None:
        for _ in range(0, len(paths), BATCH):
            runner.infer({"image": pixels})

    def both() -> None:
        for verdict in predictor.predict_many(paths):
            assert verdict.error is None, verdict.error

    stages: dict[str, Callable[[], None]] = {"read": read, "run": run, "both": both}
    rates: dict[str, list[float]] = {name: [] for name in stages}
    for index in range(rounds + 1):
        for name in stages if index % 2 else reversed(stages):
            started = time.perf_counter()
            stages[name]()
            if index:
                rates[name].append(len(paths) / (time.perf_counter() - started))
    triples = list(zip(rates["read"], rates["run"], rates["both"], strict=True))
    return {
        "images": len(paths),
        "rounds": rounds,
        "threads_reading": workers,
        **{f"{name}_ips": statistics.median(values) for name, values in rates.items()},
        "ratio": statistics.median(b / min(r, e) for r, e, b in triples),
        "ratio_to_shared_cores": statistics.median(b * (1 / r + 1 / e) for r, e, b in triples),
    }


@click.command(cls=Tool)
@click.argument("export")
@click.argument("images", nargs=-1, required=True)
@click.option("--engine", "engines", multiple=True, default=("openvino", "onnxruntime"), show_default=True)
@click.option("--rounds", default=7, show_default=True)
@json_option
def main(export: str, images: tuple[str, ...], engines: tuple[str, ...], rounds: int, json_file: Path | None) -> None:
    """Compare `predict` on a folder with its two stages alone."""
    paths = list_images(images)
    if rounds < 1 or len(paths) < BATCH:
        raise UsageError(f"it takes at least one round and {BATCH} images, got {rounds} and {len(paths)}")
    paths = paths[: len(paths) // BATCH * BATCH]  # whole batches, so that both stages do the same work
    rows = []
    for engine in engines:
        with Predictor(open_runner(export, engine=engine)) as predictor:
            ran = {"artifact": predictor.runner.artifact.name, "engine": engine}
            rows.append({**ran, **compare(predictor, paths, rounds)})
        row = rows[-1]
        click.echo(
            f"{row['artifact']}: read {row['read_ips']:.0f}, run {row['run_ips']:.0f}, both {row['both_ips']:.0f} "
            f"images/s; {row['ratio']:.2f} of the slower stage, {row['ratio_to_shared_cores']:.2f} of what the "
            "cores can do"
        )
    write_rows(json_file, "folder", rows)


if __name__ == "__main__":
    main()
