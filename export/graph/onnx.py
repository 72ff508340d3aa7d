"""The fused graph as one ONNX file: opset 18, dynamic batch, metadata inside."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from ssod_edge.detect.confidence import verdict_inputs
from ssod_edge.detect.sums import FittedScore
from ssod_edge.errors import UsageError, missing_extra
from ssod_edge.export.engines.artifact import OPSET
from ssod_edge.export.graph.fused import FusedClassifier
from ssod_edge.export.onnx_file import check_fused, save_onnx
from ssod_edge.optional import is_there
from ssod_edge.spec import FEATURE_OUTPUTS, LOGIT_OUTPUTS, SCHEMA_VERSION, VERDICT_OUTPUTS, Artifact
from ssod_edge.training.model import SSODClassifier

#: Packages whose versions say how a graph came about.
MADE_WITH = ("torch", "timm", "onnx", "onnxscript")
INPUT = "image"


def head_rows(model: SSODClassifier, detector: FittedScore | None) -> int:
    """Rows of the fused graph's Gemm: classes, ID logit, and those of the detector."""
    return len(model.classes) + 1 + (0 if detector is None else detector.rows)


def fused_graph(
    model: SSODClassifier,
    score: str,
    trained: bool,
    detector: FittedScore | None = None,
    temperature: float = 1.0,
    features: Sequence[str] = (),
) -> onnx.ModelProto:
    """The fused fp32 graph, whose features are read by exactly one Gemm of `head_rows` rows; see `check_fused`.

    Inputs: `image` uint8 [N, 3, S, S], and those of `ssod_edge.detect.confidence.verdict_inputs`, which have defaults
    with which nothing is known. Outputs: `logits` [N, M], `probs` [N, M], `id_logit` [N], `ood_score` [N], `p_known`
    [N], `known` bool [N], and the features that were asked for.

    Args:
        model, score, detector, temperature, features: see `FusedClassifier`.
        trained: recorded in the metadata.

    Raises:
        MissingExtraError: onnxscript is not installed.
        UsageError: the exporter cannot handle this backbone, or the graph is over 2 GB.
        VerificationError: the exported graph does not have the fused form.
    """
    outputs = (*LOGIT_OUTPUTS, *VERDICT_OUTPUTS, *(FEATURE_OUTPUTS[name] for name in features))
    module = FusedClassifier(model, score, detector, temperature, features)
    graph = _export(module, model.preprocess.input_size, outputs)
    check_fused(graph, head_rows(model, detector))
    onnx.helper.set_model_props(
        graph,
        {
            "ssod.schema_version": str(SCHEMA_VERSION),
            "ssod.backbone": model.backbone_name,
            "ssod.classes": json.dumps(model.classes),
            "ssod.score": score,
            "ssod.temperature": json.dumps(temperature),
            "ssod.preprocess": json.dumps(asdict(model.preprocess)),
            "ssod.trained": json.dumps(trained),
        },
    )
    return graph


def make_from(
    graph: onnx.ModelProto,
    precision: str,
    folder: Path,
    engines: Sequence[str],
    make: Callable[..., Artifact],
    build: dict[str, Any],
) -> list[Artifact]:
    """Save a graph, and make every engine's artifact from it; the file stays if an engine runs it as it is.

    Args:
        graph: of this precision.
        precision: of `ssod_edge.export.engines.artifact.PRECISIONS`.
        folder: the export folder that is being made.
        engines: that read ONNX.
        make: `ssod_edge.export.engines.artifact.make_artifact`, with what is the same for all.
        build: how the graph came about, for `Artifact.build`.
    """
    path = save_onnx(graph, folder / f"model-{precision}.onnx")
    made = [make(engine, precision, path, folder) for engine in engines]
    if "onnxruntime" not in engines:
        path.unlink()
    return [replace(artifact, build={**artifact.build, **build}) for artifact in made]


def _export(module: nn.Module, size: int, outputs: Sequence[str]) -> onnx.ModelProto:
    if not is_there("onnxscript"):
        raise missing_extra("onnxscript", "exporting to ONNX")
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    defaults = verdict_inputs(None)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example, *map(torch.from_numpy, defaults.values())),
                input_names=[INPUT, *defaults],
                output_names=list(outputs),
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}, **dict.fromkeys(defaults)},
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UsageError(f"this backbone cannot be exported: {str(error).splitlines()[0]}") from error
    assert program is not None  # of a failure it raises
    try:
        graph = program.model_proto
    except ValueError as error:
        raise UsageError(f"the graph is over 2 GB, more than one ONNX file can hold: {error}") from error
    _strip(graph)
    graph.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in defaults.items())
    return graph


def _strip(graph: onnx.ModelProto) -> None:
    """Leave out what the exporter notes about the source code: file paths and stack traces."""
    inner = graph.graph
    for part in (graph, inner, *inner.node, *inner.value_info, *inner.input, *inner.output, *inner.initializer):
        part.ClearField("doc_string")
        del part.metadata_props[:]
