"""What the OOD loss costs in training: SSOD steps against plain cross-entropy steps, interleaved in one run.

python -m ssod_edge.bench.tools.training --json bench/results/training-step.json
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch

from ssod_edge.bench.environment import describe_environment
from ssod_edge.bench.latency import interleave
from ssod_edge.bench.tools.command import Tool, called, json_option
from ssod_edge.config import LossConfig, resolve_backbone
from ssod_edge.files import write_json
from ssod_edge.ops import kernel_in_use
from ssod_edge.training.model import backbone_preprocess, build_model
from ssod_edge.training.objective import TrainStep


def compare(backbone: str, size: int, batch: int, classes: int, rounds: int, precision: str = "fp32") -> dict[str, Any]:
    """Time whole optimizer steps (forward, backward, AdamW) of one model: plain cross-entropy, and SSOD.

    Each round times one step of each kind, after one untimed step of each. SSOD is timed with plain
    PyTorch's sampling ("reference") and, where it was built, with the compiled kernel's ("compiled").

    Returns:
        a row: medians in ms, the ratio to cross-entropy of each round as median and range, and what ran.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = tuple(str(i) for i in range(classes))
    model = build_model(backbone, names, backbone_preprocess(backbone, size)).to(
        device, memory_format=torch.channels_last
    )
    model.train()
    kernels = {"reference": "reference"}
    if kernel_in_use(device) == "compiled":
        kernels["compiled"] = "auto"
    steps = {name: TrainStep(model, LossConfig(), precision, kernel) for name, kernel in kernels.items()}
    steps["cross_entropy"] = steps["reference"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    image = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    target = torch.randint(0, classes, (batch,), device=device)

    def timed(name: str) -> float:
        started = time.perf_counter()
        loss, _ = steps[name](image, target, name != "cross_entropy")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        return (time.perf_counter() - started) * 1000

    for name in steps:
        timed(name)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _, name in interleave(tuple(steps), rounds):
        times[name].append(timed(name))
    row: dict[str, Any] = {
        "backbone": resolve_backbone(backbone),
        "input_size": size,
        "batch": batch,
        "classes": classes,
        "precision": precision,
        "device": str(device),
        "rounds": rounds,
        "cross_entropy_ms": statistics.median(times["cross_entropy"]),
    }
    for name in kernels:
        ratios = sorted(b / a for a, b in zip(times["cross_entropy"], times[name], strict=True))
        row[name] = {
            "ms": statistics.median(times[name]),
            "ratio": statistics.median(ratios),
            "ratio_range": [ratios[0], ratios[-1]],
        }
    return row


@click.command(cls=Tool)
@click.option(
    "--backbone", "backbones", multiple=True, default=("resnet18", "regnet", "mobilenetv3"), show_default=True
)
@click.option("--size", default=128, show_default=True, help="Input size in pixels.")
@click.option("--batch", default=32, show_default=True)
@click.option("--classes", default=10, show_default=True)
@click.option("--rounds", default=15, show_default=True, help="Pairs of steps that are timed.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@json_option
def main(backbones: tuple[str, ...], json_file: Path | None, **options: Any) -> None:
    """Time SSOD training steps against plain cross-entropy steps."""
    rows = []
    for backbone in backbones:
        rows.append(compare(backbone, **options))
        click.echo(json.dumps(rows[-1]))
    if json_file is not None:
        environment = describe_environment(torch.get_num_threads())
        write_json(json_file, {"environment": environment, "command": " ".join(called("training")), "rows": rows})


if __name__ == "__main__":
    main()
