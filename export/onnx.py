"""The fused graph as one ONNX file: opset 18, dynamic batch, metadata inside."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import onnx
import torch
from torch import nn

from ssod_edge.config import ScoreName
from ssod_edge.errors import UsageError, VerificationError, missing_extra
from ssod_edge.export.engines import OPSET
from ssod_edge.export.graph import FusedClassifier
from ssod_edge.files import write_atomic
from ssod_edge.model import SSODClassifier
from ssod_edge.runtime.runner import OUTPUTS
from ssod_edge.spec import SCHEMA_VERSION

INPUT = "image"
LINEAR_OPS = ("Gemm", "MatMul")


def fused_graph(model: SSODClassifier, score: ScoreName, trained: bool) -> onnx.ModelProto:
    """The fused fp32 graph, checked to end in exactly one Gemm of M+1 rows.

    Inputs: `image` uint8 [N, 3, S, S]. Outputs: `logits` [N, M], `probs` [N, M], `id_logit` [N], `ood_score` [N].

    Args:
        model: in evaluation mode.
        score: the OOD score to compute.
        trained: recorded in the metadata.

    Raises:
        MissingExtraError: onnxscript is not installed.
        UsageError: the exporter cannot handle this backbone, or the graph is over 2 GB.
        VerificationError: the exported graph does not have the fused form.
    """
    graph = _export(FusedClassifier(model, score), OUTPUTS, model.preprocess.input_size)
    check_fused(graph, rows=len(model.classes) + 1)
    onnx.helper.set_model_props(
        graph,
        {
            "ssod.schema_version": str(SCHEMA_VERSION),
            "ssod.backbone": model.backbone_name,
            "ssod.classes": json.dumps(model.classes),
            "ssod.score": score,
            "ssod.preprocess": json.dumps(asdict(model.preprocess)),
            "ssod.trained": json.dumps(trained),
        },
    )
    return graph


def save_onnx(graph: onnx.ModelProto, path: str | Path) -> Path:
    """Check a graph fully (types and shapes inferred) and write it atomically, weights inside.

    Raises:
        VerificationError: the ONNX checker refuses it.
        OutputError: it cannot be written.
    """
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"the graph for '{path}' is not valid ONNX: {error}") from error
    return write_atomic(path, lambda temporary: temporary.write_bytes(graph.SerializeToString(deterministic=True)))


def check_fused(graph: onnx.ModelProto, rows: int) -> onnx.NodeProto:
    """The one linear layer behind all outputs.

    Raises:
        VerificationError: there are several, another one reads the same features, or its rows are not `rows`.
    """
    producer = {output: node for node in graph.graph.node for output in node.output}
    found: dict[str, onnx.NodeProto] = {}
    pending, seen = [output.name for output in graph.graph.output], set()
    while pending:
        name = pending.pop()
        if name in seen or name not in producer:
            continue
        seen.add(name)
        node = producer[name]
        if node.op_type in LINEAR_OPS:
            found[node.output[0]] = node
        else:
            pending.extend(node.input)
    if len(found) != 1:
        raise VerificationError(f"the graph must end in exactly one Gemm, found {len(found)}")
    (head,) = found.values()
    twins = [n for n in graph.graph.node if n.op_type in LINEAR_OPS and n.input[0] == head.input[0]]
    weights = {w.name: tuple(w.dims) for w in graph.graph.initializer}
    shape = weights.get(head.input[1], ())
    if len(twins) != 1 or rows not in shape:
        raise VerificationError(
            f"the final Gemm must be alone with {rows} rows, found {len(twins)} with weight {shape}"
        )
    return head


def _export(module: nn.Module, outputs: tuple[str, ...], size: int) -> onnx.ModelProto:
    if importlib.util.find_spec("onnxscript") is None:
        raise missing_extra("onnxscript", "exporting to ONNX")
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                input_names=[INPUT],
                output_names=list(outputs),
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UsageError(f"this backbone cannot be exported: {str(error).splitlines()[0]}") from error
    if program is None:
        raise UsageError("this backbone cannot be exported: the exporter gave no graph")
    try:
        graph = program.model_proto
    except ValueError as error:
        raise UsageError(f"the graph is over 2 GB, more than one ONNX file can hold: {error}") from error
    _strip(graph)
    return graph


def _strip(graph: onnx.ModelProto) -> None:
    """Leave out what the exporter notes about the source code: file paths and stack traces."""
    inner = graph.graph
    for part in (graph, inner, *inner.node, *inner.value_info, *inner.input, *inner.output, *inner.initializer):
        part.ClearField("doc_string")
        del part.metadata_props[:]
