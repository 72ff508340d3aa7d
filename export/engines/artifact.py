"""From an ONNX graph to what an engine opens. Needs no torch, so that it also runs on a device."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ssod_edge import __version__
from ssod_edge.export.engines.openvino import save_ir
from ssod_edge.export.engines.tensorrt import PlanOptions, check_builder, save_plan
from ssod_edge.files import sha256_file
from ssod_edge.optional import require
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import ENGINES, PLAN_ENGINES, is_installed
from ssod_edge.spec import Artifact

PRECISIONS = ("fp32", "fp16", "int8")
#: What is made where none is named: int8 takes images, another package and minutes.
DEFAULT_PRECISIONS = ("fp32", "fp16")
CPU_TARGETS = ("onnxruntime", "openvino")
TARGETS = (*CPU_TARGETS, *PLAN_ENGINES)
#: Of every graph that is exported.
OPSET = 18


def check_engines(engines: Sequence[str]) -> None:
    """Find out before the work whether every engine's artifacts can be made here.

    Raises:
        MissingExtraError: an engine is not installed.
        EngineError: TensorRT is too old, or has no GPU to build for.
    """
    absent = [engine for engine in engines if not is_installed(engine)]
    require([ENGINES[engine] for engine in absent], f"exporting for {', '.join(absent)}")
    for engine in engines:
        if engine in PLAN_ENGINES:
            check_builder(engine)


def make_artifact(
    engine: str,
    precision: str,
    onnx_path: Path,
    folder: Path,
    made_with: Sequence[str] = (),
    ir: Any = None,
    plans: PlanOptions | None = None,
    earlier: Export | None = None,
) -> Artifact:
    """Make one engine's files from the graph at `onnx_path`; the artifact has neither threshold nor figures yet.

    Args:
        engine: of `TARGETS`.
        precision: of the graph, of `PRECISIONS`.
        onnx_path: `model-<precision>.onnx` in `folder`.
        folder: the export folder that is being made.
        made_with: packages beside the engine's whose versions are recorded.
        ir: an OpenVINO model that stands for what OpenVINO would read from `onnx_path`: the int8 one.
        plans: how plans are built, for TensorRT.
        earlier: a plan of the same graph, TensorRT, GPU and options is taken from it instead of being built again.

    Raises:
        MissingExtraError: the engine is not installed.
        EngineError: TensorRT cannot build here; see `ssod_edge.export.engines.tensorrt.save_plan`.
        VerificationError: it cannot read the graph.
        ArtifactError: the ONNX file that a plan is to be built from is damaged.
        OutputError: its files cannot be written.
    """
    name = f"{engine.removesuffix('runtime').replace('_', '-')}-{precision}"
    build: dict[str, Any] = {}
    versions = {"ssod-edge": __version__, **{package: version(package) for package in made_with}}
    if engine in PLAN_ENGINES:
        path, build = save_plan(engine, precision, onnx_path, folder / name, plans or PlanOptions(), earlier)
        paths: Sequence[Path] = [path]
    elif engine == "openvino":
        paths = save_ir(onnx_path, folder / name, ir)
    else:
        paths = [onnx_path]
    versions[engine] = build["version"] if build else version(engine)  # JetPack's TensorRT is no package of pip's
    return Artifact(
        name=name,
        engine=engine,
        precision=precision,
        files={path.relative_to(folder).as_posix(): sha256_file(path) for path in paths},
        opset=OPSET,
        versions=versions,
        build=build,
    )
