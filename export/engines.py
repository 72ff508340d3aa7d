"""From an ONNX graph to what an engine opens. Needs no torch, so that it also runs on a device."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ssod_edge import __version__
from ssod_edge.export.openvino import save_ir, write_ir
from ssod_edge.files import sha256_file
from ssod_edge.spec import Artifact

PRECISIONS = ("fp32", "fp16", "int8")
#: What is made where none is named: int8 takes images, another package and minutes.
DEFAULT_PRECISIONS = ("fp32", "fp16")
TARGETS = ("onnxruntime", "openvino")
#: Of every graph that is exported.
OPSET = 18


def make_artifact(
    engine: str,
    precision: str,
    onnx_path: Path,
    folder: Path,
    made_with: Sequence[str] = (),
    ir: Any = None,
) -> Artifact:
    """Make one engine's files from the graph at `onnx_path`; the artifact has neither threshold nor figures yet.

    Args:
        engine: of `TARGETS`.
        precision: of the graph, of `PRECISIONS`.
        onnx_path: `model-<precision>.onnx` in `folder`.
        folder: the export folder that is being made.
        made_with: packages beside the engine's whose versions are recorded.
        ir: an OpenVINO model that stands for what OpenVINO would read from `onnx_path`: the int8 one.

    Raises:
        MissingExtraError: the engine is not installed.
        VerificationError: it cannot read the graph.
        OutputError: its files cannot be written.
    """
    if engine == "openvino":
        ir_folder = folder / f"openvino-{precision}"
        paths: Sequence[Path] = save_ir(onnx_path, ir_folder) if ir is None else write_ir(ir, ir_folder)
    else:
        paths = [onnx_path]
    return Artifact(
        name=f"{engine.removesuffix('runtime')}-{precision}",
        engine=engine,
        precision=precision,
        files={path.relative_to(folder).as_posix(): sha256_file(path) for path in paths},
        opset=OPSET,
        versions={"ssod-edge": __version__, **{package: version(package) for package in (*made_with, engine)}},
    )
