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

from ssod_edge.detect.sums import FittedScore
from ssod_edge.errors import UsageError, VerificationError, missing_extra
from ssod_edge.export.engines.artifact import OPSET
from ssod_edge.export.graph.fused import FusedClassifier
from ssod_edge.files import write_atomic
from ssod_edge.runtime.runner import OUTPUTS
from ssod_edge.spec import SCHEMA_VERSION
from ssod_edge.training.model import SSODClassifier

INPUT = "image"
LINEAR_OPS = ("Gemm", "MatMul")


def head_rows(model: SSODClassifier, detector: FittedScore | None) -> int:
    """Rows of the fused graph's Gemm: classes, ID logit, and those of the detector."""
    return len(model.classes) + 1 + (0 if detector is None else detector.rows)


def fused_graph(
    model: SSODClassifier, score: str, trained: bool, detector: FittedScore | None = None
) -> onnx.ModelProto:
    """The fused fp32 graph, whose features are read by exactly one Gemm of `head_rows` rows; see `check_fused`.

    Inputs: `image` uint8 [N, 3, S, S]. Outputs: `logits` [N, M], `probs` [N, M], `id_logit` [N], `ood_score` [N].

    Args:
        model: in evaluation mode.
        score: the OOD score to compute.
        trained: recorded in the metadata.
        detector: the state of the score, if it has one.

    Raises:
        MissingExtraError: onnxscript is not installed.
        UsageError: the exporter cannot handle this backbone, or the graph is over 2 GB.
        VerificationError: the exported graph does not have the fused form.
    """
    graph = _export(FusedClassifier(model, score, detector), OUTPUTS, model.preprocess.input_size)
    check_fused(graph, head_rows(model, detector))
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
    """The one linear layer that reads the features: it gives the classes, the ID logit and a detector's rows.

    `ood_score` may need a second one, whose input is made from the same features without any layer between (ReAct
    clips them, ASH prunes them); the classes may not.

    Raises:
        VerificationError: there are more, another one reads the same features, or its rows are not `rows`.
    """
    producer = {output: node for node in graph.graph.node for output in node.output}
    outputs = [output.name for output in graph.graph.output]
    found = _linear_behind(producer, [name for name in outputs if name != "ood_score"])
    if len(found) != 1:
        raise VerificationError(f"the classes must come from exactly one Gemm, found {len(found)}")
    (head,) = found.values()
    twins = [n for n in graph.graph.node if n.op_type in LINEAR_OPS and n.input[0] == head.input[0]]
    weights = {w.name: tuple(w.dims) for w in graph.graph.initializer}
    shape = weights.get(head.input[1], ())
    if len(twins) != 1 or rows not in shape:
        raise VerificationError(
            f"the final Gemm must be alone with {rows} rows, found {len(twins)} with weight {shape}"
        )
    behind_score = _linear_behind(producer, outputs, features=head.input[0])  # KNN's norm reads these by itself
    own = [node for name, node in behind_score.items() if name not in found]
    if len(own) > 1 or any(not _made_of(producer, node.input[0], head.input[0]) for node in own):
        raise VerificationError(
            f"the score may have one Gemm of its own, on the features that the classes are read from, found {len(own)}"
        )
    return head


def _linear_behind(
    producer: dict[str, onnx.NodeProto], names: list[str], features: str = ""
) -> dict[str, onnx.NodeProto]:
    """The last linear layers on the way to these values, but none behind the features, by the name of their output."""
    found: dict[str, onnx.NodeProto] = {}
    pending, seen = list(names), {features}
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
    return found


def _made_of(producer: dict[str, onnx.NodeProto], name: str, features: str) -> bool:
    """Whether a value is computed from the features, without a layer between, and from nothing before them."""
    pending, seen, reached = [name], set(), False
    while pending:
        name = pending.pop()
        reached |= name == features
        if name == features or name in seen:
            continue
        seen.add(name)
        if name == INPUT or (name in producer and producer[name].op_type in (*LINEAR_OPS, "Conv")):
            return False
        pending.extend(producer[name].input if name in producer else ())
    return reached


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
