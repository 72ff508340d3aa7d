"""What a user waits for before anything happens: whole commands, from the shell, warm.

python -m ssod_edge.bench.tools.startup EXPORT IMAGE --json bench/results/startup.json
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

from ssod_edge.bench.tools.command import Tool, json_option, write_rows
from ssod_edge.errors import UsageError


def seconds(arguments: tuple[str, ...], runs: int) -> list[float]:
    """Wall time of `ssod-edge ARGUMENTS`, `runs` times after one that is not counted.

    Raises:
        UsageError: the command fails; its message.
    """
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "ssod_edge", *arguments], capture_output=True, text=True)
        times.append(time.perf_counter() - started)
        if done.returncode != 0:
            raise UsageError(f"'ssod-edge {' '.join(arguments)}' ended with {done.returncode}: {done.stderr.strip()}")
    return times[1:]


@click.command(cls=Tool)
@click.argument("export")
@click.argument("image")
@click.option("--runs", default=11, show_default=True)
@json_option
def main(export: str, image: str, runs: int, json_file: Path | None) -> None:
    """Time `--help`, and `predict` on one image with each engine."""
    commands = [("--help",), *(("predict", export, image, "--engine", e) for e in ("openvino", "onnxruntime"))]
    rows = []
    for command in commands:
        times = seconds(command, runs)
        row = {"command": " ".join(command), "median_s": statistics.median(times), "max_s": max(times), "n": runs}
        rows.append(row)
        click.echo(f"{row['median_s']:.2f} s (at most {row['max_s']:.2f})  ssod-edge {row['command']}")
    write_rows(json_file, "startup", rows)


if __name__ == "__main__":
    main()
