"""ONNX files of the fused form: opened, checked and written. Needs no torch, so that it also runs on a device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssod_edge.errors import VerificationError
from ssod_edge.files import write_bytes
from ssod_edge.runtime.engines.onnxruntime import new_session

if TYPE_CHECKING:
    import onnx

LINEAR_OPS = ("Gemm", "MatMul")


def save_onnx(graph: onnx.ModelProto, path: str | Path) -> Path:
    """Check a graph fully (types and shapes inferred) and write it atomically, weights inside.

    Raises:
        VerificationError: the ONNX checker refuses it.
        OutputError: it cannot be written.
    """
    import onnx

    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"the graph for '{path}' is not valid ONNX: {error}") from error
    return write_bytes(path, graph.SerializeToString(deterministic=True))


def close_inputs(graph: onnx.ModelProto, values: Mapping[str, NDArray[np.float32]]) -> None:
    """Give the verdict's inputs values that cannot be changed, in place: what is left to be given is the image.

    Args:
        values: see `ssod_edge.detect.confidence.verdict_inputs`.
    """
    from onnx import numpy_helper

    for constant in graph.graph.initializer:
        if constant.name in values:
            constant.CopyFrom(numpy_helper.from_array(values[constant.name], constant.name))
    constants = {constant.name for constant in graph.graph.initializer}
    left = [value for value in graph.graph.input if value.name not in constants]
    del graph.graph.input[:]
    graph.graph.input.extend(left)


def open_session(graph: onnx.ModelProto, optimise: bool = True) -> Any:
    """A graph in ONNX Runtime on the CPU, which says nothing but errors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return new_session(graph.SerializeToString(), options)


def check_fused(graph: onnx.ModelProto, rows: int) -> onnx.NodeProto:
    """The one linear layer that reads the features: it gives the classes, the ID logit and a detector's rows.

    Raises:
        VerificationError: there are more, or its rows are not `rows`.
    """
    producer = {output: node for node in graph.graph.node for output in node.output}
    linear = {name for name, node in producer.items() if node.op_type in LINEAR_OPS}
    found = _behind(producer, ["logits", "probs", "id_logit"], linear) & linear
    if len(found) != 1:
        raise VerificationError(f"the classes must come from exactly one Gemm, found {len(found)}")
    head = producer[next(iter(found))]
    features = head.input[0]
    # A norm reads the features too, and behind them a transformer has linear layers of its own.
    if others := _behind(producer, ["ood_score"], {*linear, features}) & linear - found - {features}:
        raise VerificationError(f"classes and score must come from exactly one Gemm, found {1 + len(others)}")
    twins = [name for name in linear if producer[name].input[0] == features]
    weights = {w.name: tuple(w.dims) for w in graph.graph.initializer}
    shape = weights.get(head.input[1], ())
    if len(twins) != 1 or rows not in shape:
        raise VerificationError(
            f"the final Gemm must be alone with {rows} rows, found {len(twins)} with weight {shape}"
        )
    return head


def _behind(producer: dict[str, onnx.NodeProto], names: list[str], ends: set[str]) -> set[str]:
    """These values and all that they are computed from, back to `ends` and not beyond."""
    pending, seen = list(names), set()
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending.extend(producer[name].input if name in producer and name not in ends else ())
    return seen
