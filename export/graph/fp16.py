"""fp16 as a conversion of the graph: the convolution trunk in half precision, both of its ends in fp32.

The image is normalised in fp32 and then cast; from the last global pooling on, everything is fp32 again: pooled
features, final Gemm, softmax and scores. So there are two casts, whatever the backbone. The converter that comes
with ONNX Runtime casts around every node that is kept in fp32 and rounds between them, which would put 16-bit
numbers between the Gemm and the softmax.

A value that real images drive beyond fp16's range would become infinite, and everything behind it NaN. So the fp32
graph is run on them first, and a layer that comes near the range stays in fp32, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ssod_edge.export.onnx_file import LINEAR_OPS, check_fused, open_session

#: Where the fp32 end of a graph begins; the norms where a class token is read and nothing is pooled.
POOLING_OPS = ("ReduceMean", "GlobalAveragePool", "ReduceMax", "GlobalMaxPool", "AveragePool")
NORM_OPS = ("LayerNormalization",)
LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)
#: From this magnitude on a layer stays in fp32: half of fp16's range, because the images that a device meets reach
#: further than the few hundred that are looked at here.
OVERFLOW_LIMIT = LARGEST / 2
BATCH = 8


@dataclass(frozen=True)
class HalfReport:
    """What happened to the weights that became fp16, and which layers could not.

    Attributes:
        weights: how many were converted.
        max_abs: the largest magnitude among them.
        clipped: finite ones beyond +-65504, set to that bound.
        flushed: those other than 0 that became 0 (below 3e-8).
        subnormal: those left with fewer than 11 significant bits (below 6.1e-5).
        max_abs_error: the largest |fp16 - fp32|.
        images: how many the ranges of the values were measured on; 0 if they were not.
        largest: the largest magnitude among the values that the fp16 part of an unchecked graph computes.
        overflowing: node -> the largest magnitude of what it computes, where that is beyond `OVERFLOW_LIMIT`. These
            nodes, and those that read their values, stay in fp32.
    """

    weights: int = 0
    max_abs: float = 0.0
    clipped: int = 0
    flushed: int = 0
    subnormal: int = 0
    max_abs_error: float = 0.0
    images: int = 0
    largest: float = 0.0
    overflowing: dict[str, float] = field(default_factory=dict)

    def including(self, before: NDArray[np.float32], after: NDArray[np.float16]) -> HalfReport:
        """The report with one more tensor in it."""
        if before.size == 0:
            return self
        small = np.abs(after) < SMALLEST_NORMAL
        error = np.abs(after.astype(np.float32) - before)
        return replace(
            self,
            weights=self.weights + before.size,
            max_abs=max(self.max_abs, float(np.abs(before).max())),
            clipped=self.clipped + int((np.abs(before) > LARGEST).sum()),
            flushed=self.flushed + int(((before != 0) & (after == 0)).sum()),
            subnormal=self.subnormal + int((small & (after != 0)).sum()),
            max_abs_error=max(self.max_abs_error, float(error.max())),
        )


def to_fp16(graph: ModelProto, rows: int, images: NDArray[np.uint8] | None = None) -> tuple[ModelProto, HalfReport]:
    """Convert a fused fp32 graph; the argument is left as it is.

    Args:
        graph: from `ssod_edge.export.graph.onnx.fused_graph`.
        rows: of its final Gemm.
        images: uint8 [n, 3, S, S] to look for overflow with; None looks for none.

    Returns:
        the fp16 graph, with the same inputs, outputs and metadata, and what was lost in the weights.

    Raises:
        VerificationError: the graph does not have the fused form.
    """
    half = deepcopy(graph)
    _fold_batch_norms(half)
    kept = kept_values(half, check_fused(half, rows))
    report = HalfReport()
    if images is not None:
        ranges = largest_magnitudes(half, sorted(_float_values(half) - kept), images)
        overflowing, spared = _overflow(half, ranges)
        report = HalfReport(images=len(images), largest=max(ranges.values(), default=0.0), overflowing=overflowing)
        kept |= spared
    report = _convert(half, kept, report)
    del half.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(half, strict_mode=True), report


def largest_magnitudes(graph: ModelProto, names: Sequence[str], images: NDArray[np.uint8]) -> dict[str, float]:
    """The largest |value| that images drive each of a graph's values to; infinite for NaN.

    The maxima are taken in the graph, by nodes added to a copy, so that no feature map leaves the engine.

    Args:
        graph: fp32, with the one input `image`.
        names: of fp32 values that nodes compute.
        images: uint8 [n, 3, S, S], n >= 1.
    """
    probed = deepcopy(graph)
    inner = probed.graph
    del inner.output[:]
    for index, name in enumerate(names):
        magnitude, peak = f"probe_magnitude_{index}", f"probe_peak_{index}"
        inner.node.append(helper.make_node("Abs", [name], [magnitude]))
        inner.node.append(helper.make_node("ReduceMax", [magnitude], [peak], keepdims=0))
        inner.output.append(helper.make_tensor_value_info(peak, TensorProto.FLOAT, []))
    session = open_session(probed)
    found = np.zeros(len(names), np.float32)
    for start in range(0, len(images) if names else 0, BATCH):
        peaks = np.stack(session.run(None, {"image": images[start : start + BATCH]}))
        found = np.maximum(found, np.where(np.isnan(peaks), np.inf, peaks))
    return dict(zip(names, found.tolist(), strict=True))


def _overflow(graph: ModelProto, ranges: dict[str, float]) -> tuple[dict[str, float], set[str]]:
    """The nodes that reach too far, by their largest output; and the values to keep in fp32 so that none of those ever
    becomes fp16: the outputs of these nodes, and what is computed from them at once.
    """
    beyond: dict[str, float] = {}
    large: set[str] = set()
    for node in graph.graph.node:
        magnitude = max((ranges.get(name, 0.0) for name in node.output), default=0.0)
        if magnitude > OVERFLOW_LIMIT:
            beyond[node.name or node.output[0]] = magnitude
            large.update(node.output)
    readers = (node for node in graph.graph.node if large.intersection(node.input))
    return beyond, large | {name for node in readers for name in node.output}


def kept_values(graph: ModelProto, head: NodeProto) -> set[str]:
    """What stays fp32: values before the first layers with weights, those from the last global pooling on, and those
    that are computed of weights alone, such as standardised ones: an engine does that once, when it loads the graph.
    """
    nodes = graph.graph.node
    constant = {tensor.name for tensor in graph.graph.initializer} | {""}
    for node in nodes:  # in topological order
        if node.input and constant.issuperset(node.input):
            constant.update(node.output)
    before = {value.name for value in graph.graph.input}
    for node in nodes:
        if before.intersection(node.input) and node.op_type not in (*LINEAR_OPS, "Conv", "Shape"):
            before.update(node.output)
    producer = {output: node for node in nodes for output in node.output}
    after = _last(POOLING_OPS, producer, head) or _last(NORM_OPS, producer, head) or set(head.output)
    for node in nodes:
        if after.intersection(node.input):
            after.update(node.output)
    computed = {name for node in nodes for name in node.output}
    return before | after | (constant & computed)


def _last(ops: Sequence[str], producer: dict[str, NodeProto], head: NodeProto) -> set[str]:
    """Outputs of the last nodes of some kinds before the head; none unless every way to the head has one."""
    found: set[str] = set()
    pending = [head.input[0]]
    while pending:
        node = producer.get(pending.pop())
        if node is None:
            return set()
        if node.op_type in ops:
            found.update(node.output)
        else:
            pending.extend(name for name in node.input if name in producer)
            if not any(name in producer for name in node.input):
                return set()
    return found


def _convert(graph: ModelProto, kept: set[str], report: HalfReport) -> HalfReport:
    """Halve the weights of the nodes that compute anything else, and cast what crosses the border."""
    inner = graph.graph
    floats = _float_values(graph)
    weights = {tensor.name: tensor for tensor in inner.initializer if tensor.data_type == TensorProto.FLOAT}
    half_weights: dict[str, TensorProto] = {}
    casts: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in inner.node:
        target = TensorProto.FLOAT if kept.intersection(node.output) else TensorProto.FLOAT16
        for index, name in enumerate(node.input):
            if node.op_type == "Resize" and index == 2:  # ONNX has its scales in fp32, whatever the type of the data
                continue
            if name in weights:
                if target == TensorProto.FLOAT16:
                    if name not in half_weights:
                        before = numpy_helper.to_array(weights[name])
                        after = np.clip(before, -LARGEST, LARGEST).astype(np.float16)
                        half_weights[name] = numpy_helper.from_array(after, f"{name}_fp16")
                        report = report.including(before, after)
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
    del inner.node[:], inner.initializer[:]
    inner.node.extend(nodes)
    inner.initializer.extend(tensors)
    return report


def _float_values(graph: ModelProto) -> set[str]:
    """Names of the fp32 values that nodes compute; shape inference names the weights too, which are none."""
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True).graph
    computed = {name for node in inferred.node for name in node.output}
    values = (*inferred.value_info, *inferred.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT} & computed


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
        if node.op_type != "BatchNormalization" or not arrays.keys() >= set(node.input[1:5]):
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
    del inner.node[:]
    inner.node.extend(nodes)
