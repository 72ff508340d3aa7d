"""Real plans of every backbone alias, built with TensorRT for RTX: does its parser take our graphs? Needs no GPU.

python -m ssod_edge.bench.tools.plans [BACKBONE...]

The weights are random: nothing is learned from the plans but that they are built, how fast, and how large they are.
int8 is quantised with seeded noise; without NNCF it is left out, which is said.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import click
from onnx import ModelProto

from ssod_edge.bench.tools.command import Tool
from ssod_edge.config import ALIASES
from ssod_edge.errors import EXIT_SOME_FAILED, SsodEdgeError, missing_extra
from ssod_edge.export.engines.artifact import make_artifact
from ssod_edge.export.engines.tensorrt import check_builder
from ssod_edge.export.graph.fp16 import to_fp16
from ssod_edge.export.graph.onnx import fused_graph
from ssod_edge.export.graph.reference import SYNTHETIC_IMAGES, synthetic_images
from ssod_edge.export.graph.source import untrained
from ssod_edge.export.int8.quantize import OnnxQuantizer
from ssod_edge.export.onnx_file import save_onnx
from ssod_edge.files import temporary_folder

ENGINE = "tensorrt_rtx"


def build_all(backbone: str, size: int, folder: Path) -> int:
    """Build the plans of one backbone and print a line for each; returns how many failed."""
    failed = 0
    for precision, graph in _graphs(backbone, size, folder):
        path = save_onnx(graph, folder / f"model-{precision}.onnx")
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


def _graphs(backbone: str, size: int, folder: Path) -> Iterator[tuple[str, ModelProto]]:
    """The graph in each precision that can be made here."""
    model = untrained(backbone, str(folder), size).model
    rows = len(model.classes) + 1
    graph = fused_graph(model, "energy", trained=False)
    yield "fp32", graph
    yield "fp16", to_fp16(graph, rows)[0]
    if find_spec("nncf") is not None:
        yield "int8", OnnxQuantizer(graph, rows, synthetic_images(SYNTHETIC_IMAGES, size)).quantize()


@click.command(cls=Tool)
@click.argument("backbones", metavar="[BACKBONE]...", nargs=-1)
@click.option("--size", default=224, show_default=True, help="Input size in pixels.")
def main(backbones: tuple[str, ...], size: int) -> None:
    """Build plans of the backbones; default: every alias."""
    failed = 0
    if find_spec("nncf") is None:
        click.echo(f"int8 is left out: {missing_extra('nncf', 'quantising')}", err=True)
    check_builder(ENGINE)
    for backbone in backbones or tuple(ALIASES):
        with temporary_folder() as folder:
            failed += build_all(backbone, size, Path(folder))
    if failed:
        sys.exit(EXIT_SOME_FAILED)


if __name__ == "__main__":
    main()
