"""What the OOD loss costs in training: SSOD steps against plain cross-entropy steps, interleaved in one run.

python -m ssod_edge.bench.tools.training --json bench/results/training-step.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import click
import torch

from ssod_edge.bench.environment import describe_environment
from ssod_edge.bench.latency import interleave
from ssod_edge.config import LossConfig, resolve_backbone
from ssod_edge.errors import SsodEdgeError
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


@click.command()
@click.option(
    "--backbone", "backbones", multiple=True, default=("resnet18", "regnet", "mobilenetv3"), show_default=True
)
@click.option("--size", default=128, show_default=True, help="Input size in pixels.")
@click.option("--batch", default=32, show_default=True)
@click.option("--classes", default=10, show_default=True)
@click.option("--rounds", default=15, show_default=True, help="Pairs of steps that are timed.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--json", "json_file", type=click.Path(), help="Where the rows go.")
def main(backbones: tuple[str, ...], json_file: str | None, **options: Any) -> None:
    """Time SSOD training steps against plain cross-entropy steps."""
    rows = []
    command = " ".join(["python -m ssod_edge.bench.tools.training", *sys.argv[1:]])
    try:
        for backbone in backbones:
            rows.append(compare(backbone, **options))
            click.echo(json.dumps(rows[-1]))
        if json_file:
            write_json(
                json_file,
                {"environment": describe_environment(torch.get_num_threads()), "command": command, "rows": rows},
            )
    except SsodEdgeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
