"""Real plans of every backbone alias, built with TensorRT for RTX: does its parser take our graphs? Needs no GPU.

python -m ssod_edge.export.plans [BACKBONE...]

The weights are random: nothing is learned from the plans but that they are built, how fast, and how large they are.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click

from ssod_edge.config import ALIASES
from ssod_edge.errors import EXIT_SOME_FAILED, SsodEdgeError
from ssod_edge.export.engines import make_artifact
from ssod_edge.export.fp16 import to_fp16
from ssod_edge.export.onnx import fused_graph, save_onnx
from ssod_edge.export.source import untrained
from ssod_edge.export.tensorrt import check_builder

ENGINE = "tensorrt_rtx"


def build_all(backbone: str, size: int, folder: Path) -> int:
    """Build the plans of one backbone and print a line for each; returns how many failed."""
    model = untrained(backbone, str(folder), size).model
    graph = fused_graph(model, "energy", trained=False)
    halved = to_fp16(graph, len(model.classes) + 1)[0]
    failed = 0
    for precision, made in (("fp32", graph), ("fp16", halved)):
        path = save_onnx(made, folder / f"model-{precision}.onnx")
        started = time.monotonic()
        try:
            artifact = make_artifact(ENGINE, precision, path, folder)
        except SsodEdgeError as error:
            failed += 1
            click.echo(f"{backbone:12} {precision}  FAILED: {error}")
            continue
        megabytes = (folder / artifact.main_file).stat().st_size / 1e6
        seconds = time.monotonic() - started
        click.echo(
            f"{backbone:12} {precision}  {megabytes:6.1f} MB in {seconds:5.1f} s  key {artifact.build['key'][:12]}"
        )
    return failed


@click.command()
@click.argument("backbones", metavar="[BACKBONE]...", nargs=-1)
@click.option("--size", default=224, show_default=True, help="Input size in pixels.")
def main(backbones: tuple[str, ...], size: int) -> None:
    """Build plans of the backbones; default: every alias."""
    failed = 0
    try:
        check_builder(ENGINE)
        for backbone in backbones or tuple(ALIASES):
            with tempfile.TemporaryDirectory(prefix="ssod-edge-") as folder:
                failed += build_all(backbone, size, Path(folder))
    except SsodEdgeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    if failed:
        sys.exit(EXIT_SOME_FAILED)


if __name__ == "__main__":
    main()
