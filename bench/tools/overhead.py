"""What `predict`'s inference stage costs beyond the engine itself: the runner against the engine's own benchmark.

python -m ssod_edge.bench.tools.overhead EXPORT --json bench/results/overhead.json

OpenVINO's own is `benchmark_app`, which its package brings; ONNX Runtime's is its session in a bare loop. Their turns
last seconds, in which a shared machine drifts by more than the runner costs; so the runner is also timed in turns of
some milliseconds with the engine's bare call, in one process and on memory that is already in place.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from ssod_edge.bench.latency import alternate, interleave
from ssod_edge.bench.tools.command import Tool, json_option, write_rows
from ssod_edge.errors import EngineError, UsageError
from ssod_edge.optional import load
from ssod_edge.runtime.engines.onnxruntime import new_session, session_options
from ssod_edge.runtime.engines.openvino import open_request, read_ir, request_config
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.runner import Runner

#: (median, minimum) in ms. Other work on the machine moves the first, and the second says what is not its doing.
Times = tuple[float, float]


def time_calls(call: Callable[[], object], seconds: float) -> Times:
    """Times of calls one after another for this long, after a tenth of it untimed."""
    end = time.perf_counter() + seconds / 10
    while time.perf_counter() < end:
        call()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000, min(times) * 1000


def benchmark_app(path: Path, size: int, seconds: float) -> Times:
    """The latency that OpenVINO's own tool measures: one synchronous request, one stream, fp32.

    Raises:
        EngineError: it fails, or does not print it.
    """
    tool = "from openvino.tools.benchmark.main import main; main()"
    command = [sys.executable, "-c", tool, "-m", str(path), "-d", "CPU", "-api", "sync"]
    command += ["-hint", "none", "-nstreams", "1", "-infer_precision", "f32", "-data_shape", f"[1,3,{size},{size}]"]
    done = subprocess.run(
        [*command, "-inference_only", "true", "-t", str(round(seconds))], capture_output=True, text=True, check=False
    )
    found = [re.search(rf"{name}:\s+([\d.]+) (ms|us)", done.stdout) for name in ("Median", "Min")]
    if done.returncode or None in found:
        raise EngineError(f"benchmark_app failed ({done.returncode}): {(done.stderr or done.stdout)[-500:]}")
    median, least = (float(m[1]) / (1000 if m[2] == "us" else 1) for m in found if m)
    return median, least


def bare_session(path: Path, inputs: dict[str, Any], seconds: float) -> Times:
    """ONNX Runtime's session alone. It goes at the end: its idle threads spin for a while."""
    session = new_session(str(path), None)
    return time_calls(lambda: session.run(None, inputs), seconds)


def bare_call(engine: str, path: Path, inputs: dict[str, Any]) -> Callable[[], object]:
    """One run of the engine, with nothing made, checked or copied around it."""
    if engine == "onnxruntime":
        session = new_session(str(path), session_options())
        return lambda: session.run(None, inputs)
    openvino = load("openvino")
    model = read_ir(path)
    model.reshape({"image": list(inputs["image"].shape)})
    request = open_request(model, "CPU", request_config("CPU", "fp32"))
    for name, value in inputs.items():
        request.set_tensor(name, openvino.Tensor(value))

    def run() -> None:
        request.start_async()
        request.wait()

    return run


def compare(folder: Path, runner: Runner, seconds: float, rounds: int) -> dict[str, Any]:
    """Time both by turns, each for `seconds`, in each round.

    Returns:
        medians over the rounds in ms: `own_ms` of the engine's benchmark and `runner_ms`, both medians of their turn,
        the `ratio` of each round's, and `ratio_of_minima`, of the fastest calls of all rounds. `bare_ratio` is that of
        the runner to `bare_call`, of as many repeats, `bare_ratios`.
    """
    artifact, size = runner.artifact, runner.spec.preprocess.input_size
    path = folder / artifact.main_file
    image = {"image": np.random.default_rng(0).integers(0, 256, (1, 3, size, size), np.uint8)}
    inputs = {**image, **(runner.verdict_inputs() if "known" in runner.spec.outputs else {})}
    if artifact.engine == "openvino":
        own: Callable[[], Times] = lambda: benchmark_app(path, size, max(1.0, seconds))  # noqa: E731
    elif artifact.engine == "onnxruntime":
        own = lambda: bare_session(path, inputs, seconds)  # noqa: E731
    else:
        raise UsageError(f"engine must be openvino or onnxruntime, got '{artifact.engine}'")
    turns = {"own": own, "runner": lambda: time_calls(lambda: runner.infer(image), seconds)}
    times: dict[str, list[Times]] = {name: [] for name in turns}
    for _, name in interleave(tuple(turns), rounds):
        times[name].append(turns[name]())
    (own_medians, own_minima), (medians, minima) = (tuple(zip(*times[name], strict=True)) for name in turns)
    ratios = [ours / theirs for theirs, ours in zip(own_medians, medians, strict=True)]
    bare = bare_call(artifact.engine, path, inputs)
    bare_ratios = [alternate(lambda: runner.infer(image), bare, seconds).ratio for _ in range(rounds)]
    return {
        "artifact": artifact.name,
        "engine": artifact.engine,
        "rounds": rounds,
        "seconds": seconds,
        "own_ms": statistics.median(own_medians),
        "runner_ms": statistics.median(medians),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "bare_ratio": statistics.median(bare_ratios),
        "bare_ratios": bare_ratios,
        "ratio_of_minima": min(minima) / min(own_minima),
    }


@click.command(cls=Tool)
@click.argument("export")
@click.option("--artifact", "artifacts", multiple=True, help="Default: every artifact of OpenVINO and ONNX Runtime.")
@click.option("--seconds", default=5.0, show_default=True, help="Each turn.")
@click.option("--rounds", default=5, show_default=True)
@json_option
def main(export: str, artifacts: tuple[str, ...], seconds: float, rounds: int, json_file: Path | None) -> None:
    """Compare the runners of an export with their engines' own benchmarks, at batch 1."""
    if rounds < 1 or not 0 < seconds < float("inf"):
        raise UsageError(f"it takes at least one round and more than 0 seconds, got {rounds} and {seconds}")
    opened = Export.at(export)
    names = artifacts or [a.name for a in opened.spec.artifacts if a.engine in ("openvino", "onnxruntime")]
    if not names:
        raise UsageError(f"'{opened.folder}' holds no artifact of OpenVINO or ONNX Runtime, whose benchmarks these are")
    rows = []
    for name in names:
        with open_runner(opened.folder, artifact=name, allow_untrained=True) as runner:
            row = compare(opened.folder, runner, seconds, rounds)
        rows.append(row)
        click.echo(
            f"{name}: runner {row['runner_ms']:.3f} ms, own {row['own_ms']:.3f} ms, ratio {row['ratio']:.3f}, "
            f"of the fastest calls {row['ratio_of_minima']:.3f}, to the bare call {row['bare_ratio']:.3f}"
        )
    write_rows(json_file, "overhead", rows)


if __name__ == "__main__":
    main()
