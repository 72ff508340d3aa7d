"""fp16 as a conversion of the graph: the convolution trunk in half precision, both of its ends in fp32.

The image is normalised in fp32 and then cast; from the last global pooling on, everything is fp32 again: pooled
features, final Gemm, softmax and scores. So there are two casts, whatever the backbone. The converter that comes
with ONNX Runtime casts around every node that is kept in fp32 and rounds between them, which would put 16-bit
numbers between the Gemm and the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ssod_edge.export.onnx import check_fused

POOLING_OPS = ("ReduceMean", "GlobalAveragePool", "ReduceMax", "GlobalMaxPool", "AveragePool")
LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)


@dataclass(frozen=True)
class HalfReport:
    """What happened to the weights that became fp16.

    Attributes:
        weights: how many were converted.
        max_abs: the largest magnitude among them.
        clipped: finite ones beyond +-65504, set to that bound.
        flushed: those other than 0 that became 0 (below 3e-8).
        subnormal: those left with fewer than 11 significant bits (below 6.1e-5).
        max_abs_error: the largest |fp16 - fp32|.
    """

    weights: int = 0
    max_abs: float = 0.0
    clipped: int = 0
    flushed: int = 0
    subnormal: int = 0
    max_abs_error: float = 0.0

    def including(self, before: NDArray[np.float32], after: NDArray[np.float16]) -> HalfReport:
        """The report with one more tensor in it."""
        if before.size == 0:
            return self
        small = np.abs(after) < SMALLEST_NORMAL
        error = np.abs(after.astype(np.float32) - before)
        return HalfReport(
            weights=self.weights + before.size,
            max_abs=max(self.max_abs, float(np.abs(before).max())),
            clipped=self.clipped + int((np.abs(before) > LARGEST).sum()),
            flushed=self.flushed + int(((before != 0) & (after == 0)).sum()),
            subnormal=self.subnormal + int((small & (after != 0)).sum()),
            max_abs_error=max(self.max_abs_error, float(error.max())),
        )


def to_fp16(graph: ModelProto, rows: int) -> tuple[ModelProto, HalfReport]:
    """Convert a fused fp32 graph; the argument is left as it is.

    Args:
        graph: from `ssod_edge.export.onnx.fused_graph`.
        rows: of its final Gemm, M+1.

    Returns:
        the fp16 graph, with the same inputs, outputs and metadata, and what was lost in the weights.

    Raises:
        VerificationError: the graph does not have the fused form.
    """
    half = ModelProto()
    half.CopyFrom(graph)
    _fold_batch_norms(half)
    kept = _kept_values(half, check_fused(half, rows))
    report = _convert(half, kept)
    del half.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(half, strict_mode=True), report


def _kept_values(graph: ModelProto, head: NodeProto) -> set[str]:
    """What stays fp32: values before the first convolutions, and from the last global pooling on."""
    nodes = graph.graph.node
    before = {value.name for value in graph.graph.input}
    for node in nodes:  # in topological order
        if before.intersection(node.input) and node.op_type != "Conv":
            before.update(node.output)
    after = _last_pooling({output: node for node in nodes for output in node.output}, head)
    for node in nodes:
        if after.intersection(node.input):
            after.update(node.output)
    return before | after


def _last_pooling(producer: dict[str, NodeProto], head: NodeProto) -> set[str]:
    """Outputs of the global pooling nodes that feed the head; the head's own output if none does."""
    found: set[str] = set()
    pending = [head.input[0]]
    while pending:
        node = producer.get(pending.pop())
        if node is None:
            return set(head.output)
        if node.op_type in POOLING_OPS:
            found.update(node.output)
        else:
            pending.extend(name for name in node.input if name in producer)
            if not any(name in producer for name in node.input):
                return set(head.output)
    return found


def _convert(graph: ModelProto, kept: set[str]) -> HalfReport:
    """Halve the weights of the nodes that compute anything else, and cast what crosses the border."""
    inner = graph.graph
    floats = _float_values(graph)
    weights = {tensor.name: tensor for tensor in inner.initializer if tensor.data_type == TensorProto.FLOAT}
    half_weights: dict[str, TensorProto] = {}
    casts: dict[str, str] = {}
    nodes: list[NodeProto] = []
    report = HalfReport()
    for node in inner.node:
        target = TensorProto.FLOAT if kept.intersection(node.output) else TensorProto.FLOAT16
        for index, name in enumerate(node.input):
            if _must_be_fp32(node, index):
                continue
            if name in weights:
                if target == TensorProto.FLOAT16:
                    if name not in half_weights:
                        half_weights[name], report = _halve(weights[name], report)
                    node.input[index] = half_weights[name].name
            elif name in floats and (name in kept) != (target == TensorProto.FLOAT):
                if name not in casts:
                    casts[name] = f"{name}_{'fp32' if target == TensorProto.FLOAT else 'fp16'}"
                    nodes.append(helper.make_node("Cast", [name], [casts[name]], name=f"cast_{name}", to=target))
                node.input[index] = casts[name]
        if target == TensorProto.FLOAT16:
            _halve_attributes(node)
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in (*inner.initializer, *half_weights.values()) if tensor.name in used]
    _replace(inner.node, nodes)
    _replace(inner.initializer, tensors)
    return report


def _must_be_fp32(node: NodeProto, index: int) -> bool:
    """Inputs that ONNX defines as fp32 whatever the type of the data: the scales of a Resize."""
    return node.op_type == "Resize" and index == 2


def _float_values(graph: ModelProto) -> set[str]:
    """Names of the fp32 values that nodes compute."""
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}


def _halve(tensor: TensorProto, report: HalfReport) -> tuple[TensorProto, HalfReport]:
    before = numpy_helper.to_array(tensor)
    after = np.clip(before, -LARGEST, LARGEST).astype(np.float16)
    return numpy_helper.from_array(after, f"{tensor.name}_fp16"), report.including(before, after)


def _halve_attributes(node: NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(attribute.t).astype(np.float16)
            attribute.t.CopyFrom(numpy_helper.from_array(value, attribute.t.name))


def _fold_batch_norms(graph: ModelProto) -> None:
    """Batch norms that no convolution could take in become one multiply and one add.

    A variance is no fp16 number: small ones vanish, and engines differ in the types they accept for it.
    """
    inner = graph.graph
    arrays = {tensor.name: tensor for tensor in inner.initializer}
    nodes: list[NodeProto] = []
    for node in inner.node:
        if node.op_type != "BatchNormalization":
            nodes.append(node)
            continue
        scale, bias, mean, variance = (numpy_helper.to_array(arrays[n]).astype(np.float64) for n in node.input[1:5])
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        name = node.output[0]
        for suffix, value in (("factor", factor), ("shift", bias - mean * factor)):
            array = value.astype(np.float32).reshape(-1, 1, 1)
            inner.initializer.append(numpy_helper.from_array(array, f"{name}_{suffix}"))
        nodes.append(helper.make_node("Mul", [node.input[0], f"{name}_factor"], [f"{name}_scaled"]))
        nodes.append(helper.make_node("Add", [f"{name}_scaled", f"{name}_shift"], [name]))
    _replace(inner.node, nodes)


def _replace(field, values) -> None:  # type: ignore[no-untyped-def]
    """Set a repeated protobuf field; the values may come from it."""
    copies = [type(value)() for value in values]
    for copy, value in zip(copies, values, strict=True):
        copy.CopyFrom(value)
    del field[:]
    field.extend(copies)
