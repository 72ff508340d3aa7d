"""What the OOD loss costs in training: SSOD steps against plain cross-entropy steps, interleaved in one run.

python -m ssod_edge.bench.training --json bench/results/training-step.json
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
from ssod_edge.config import LossConfig, resolve_backbone
from ssod_edge.errors import SsodEdgeError
from ssod_edge.files import write_json
from ssod_edge.model import backbone_preprocess, build_model
from ssod_edge.ops import kernel_in_use
from ssod_edge.train import TrainStep


def compare(backbone: str, size: int, batch: int, classes: int, rounds: int, precision: str = "fp32") -> dict[str, Any]:
    """Time whole optimizer steps (forward, backward, AdamW) of one model, with and without the OOD loss.

    Each round times one step of each kind, in alternating order, after one untimed round.

    Returns:
        a row: medians in ms, the ratio of each round's pair as median and range, and what ran.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = tuple(str(i) for i in range(classes))
    model = build_model(backbone, names, backbone_preprocess(backbone, size)).to(
        device, memory_format=torch.channels_last
    )
    model.train()
    step = TrainStep(model, LossConfig(), precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    image = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    target = torch.randint(0, classes, (batch,), device=device)

    def timed(alpha: float) -> float:
        started = time.perf_counter()
        loss, _ = step(image, target, alpha)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        return (time.perf_counter() - started) * 1000

    plain, ssod = [], []
    for index in range(rounds + 1):
        first, second = (0.0, 1.0) if index % 2 else (1.0, 0.0)
        times = {first: timed(first), second: timed(second)}
        if index:
            plain.append(times[0.0])
            ssod.append(times[1.0])
    ratios = sorted(b / a for a, b in zip(plain, ssod, strict=True))
    return {
        "backbone": resolve_backbone(backbone),
        "input_size": size,
        "batch": batch,
        "classes": classes,
        "precision": precision,
        "device": str(device),
        "kernel": kernel_in_use(device),
        "rounds": rounds,
        "cross_entropy_ms": statistics.median(plain),
        "ssod_ms": statistics.median(ssod),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
    }


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
    command = " ".join(["python -m ssod_edge.bench.training", *sys.argv[1:]])
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
