"""The sampling step: the compiled kernel, plain PyTorch, torch.compile and the bare matrix product, in one run.

python -m ssod_edge.bench.tools.kernel --json bench/results/kernel.json
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from ssod_edge import ops
from ssod_edge.bench.latency import interleave
from ssod_edge.bench.memory import peak_rss
from ssod_edge.bench.tools.command import Tool, json_option, write_rows
from ssod_edge.errors import UsageError

#: Head -> (D, M, patches of an image at 224 px).
SHAPES = {
    "resnet50": (2048, 1000, 49),
    "mobilenetv3": (1280, 1000, 49),
    "regnet": (784, 1000, 49),
    "imagenet21k": (2048, 21_841, 49),
    "cifar": (512, 10, 16),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GAMMA = 0.95


def eager(z: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The step as PyTorch writes it: the product in the dtype of z, then softmax, gather and comparison in fp32.

    Args: z [P, D], weight [M+1, D] and bias [M+1] with the OOD row last, target [P].
    """
    out = F.linear(z, weight, bias).float()
    confidence = out[:, :-1].softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    label = torch.where(confidence >= GAMMA, 1, torch.where(confidence < 1 - GAMMA, 0, -1)).to(torch.int8)
    return confidence, label, out[:, -1]


def contestants(shape: str, images: int, dtype: str, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Name -> one step on the same inputs; "gemm" is the product alone, which gives neither label nor confidence."""
    d, m, per_image = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    kind = {"dtype": DTYPES[dtype], "device": device}
    z = torch.randn(images * per_image, d, generator=generator).to(**kind)
    weight = (4 / d**0.5 * torch.randn(m + 1, d, generator=generator)).to(**kind)
    bias = torch.randn(m + 1, generator=generator).to(**kind)
    target = torch.randint(0, m, (images,), generator=generator).to(device)
    target_of_patch = target.repeat_interleave(per_image)
    rows = z.view(images, per_image, d)
    separate = weight[:-1], bias[:-1], weight[-1], bias[-1]  # as the model holds them
    compiled = torch.compile(eager)
    steps: dict[str, Callable[[], Any]] = {
        "gemm": lambda: torch.mm(z, weight.T),
        "kernel": lambda: ops.sample_patches(rows, *separate, target, GAMMA),
        "eager": lambda: eager(z, weight, bias, target_of_patch),
        "torch.compile": lambda: compiled(z, weight, bias, target_of_patch),
    }
    if hasattr(F, "linear_cross_entropy"):
        steps["linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            z, separate[0], target_of_patch, linear_bias=separate[1], reduction="none"
        )
    if ops.kernel_in_use(device) != "compiled":
        del steps["kernel"]
    return steps


def measure(steps: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Time the steps by turns; each round's ratio is to the bare product of that round.

    Returns:
        a row for each: median and quartiles in ms, `ratio_to_gemm`, and `peak_bytes`, allocated beyond the inputs.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {}
    with torch.no_grad():
        for name, step in steps.items():
            step()  # compiles, and warms the caches
            peaks[name] = peak_bytes(step, device)
        for _, name in interleave(tuple(steps), rounds):
            times[name].append(timed(steps[name], device))
    rows = []
    for name, values in times.items():
        quartiles = statistics.quantiles(values, n=4) if rounds > 1 else values * 3
        ratios = [value / base for value, base in zip(values, times["gemm"], strict=True)]
        rows.append(
            {
                "step": name,
                "median_ms": statistics.median(values),
                "quartiles_ms": [quartiles[0], quartiles[2]],
                "ratio_to_gemm": statistics.median(ratios),
                "peak_bytes": peaks[name],
            }
        )
    return rows


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one step."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1000


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """What one step allocates at its peak; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return int(torch.cuda.max_memory_allocated() - before)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is given back, and has to be asked for again
        Path("/proc/self/clear_refs").write_text("5")  # the resident peak begins anew
    except (OSError, AttributeError):  # no such file, or another C library
        return None
    before = peak_rss()
    step()
    return peak_rss() - before


@click.command(cls=Tool)
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="Default: all of them.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), default=("fp32", "bf16"))
@click.option("--images", default=256, show_default=True, help="Images of a batch.")
@click.option("--rounds", default=30, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@json_option
def main(
    shapes: tuple[str, ...], dtypes: tuple[str, ...], images: int, rounds: int, device: str, json_file: Path | None
) -> None:
    """Time the sampling step against what else there is, and against the bare matrix product."""
    if images < 1 or rounds < 1:
        raise UsageError("--images and --rounds must be at least 1")
    rows = []
    where = torch.device(device)
    for shape in shapes or tuple(SHAPES):
        d, m, per_image = SHAPES[shape]
        for dtype in dtypes:
            for row in measure(contestants(shape, images, dtype, where), rounds, where):
                rows.append({"shape": shape, "P": images * per_image, "D": d, "M": m, "dtype": dtype, **row})
                show(rows[-1])
    write_rows(json_file, "kernel", rows, device=device, threads=torch.get_num_threads())


def show(row: dict[str, Any]) -> None:
    peak = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f} MB"
    click.echo(
        f"{row['shape']:12} {row['dtype']:5} {row['step']:21} {row['median_ms']:10.3f} ms  "
        f"{row['ratio_to_gemm']:5.2f} x gemm  {peak}"
    )


if __name__ == "__main__":
    main()
