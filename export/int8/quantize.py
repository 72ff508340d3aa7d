"""int8 by NNCF: an OpenVINO model, and a symmetric ONNX graph of quantise and dequantise pairs.

Both come from the fp32 graph and real images, with full bias correction: without it MobileNetV3's depthwise layers lose
most of their accuracy. As in fp16, both ends stay fp32: the image is normalised in fp32, and from the last global
pooling on there are the pooled features, the final Gemm, the softmax and the scores.

OpenVINO takes asymmetric activations, which spend all 256 steps on what a hard-swish puts out. TensorRT takes none but
symmetric ones, and int8 alone, so the other graph is made for it and for whatever else reads ONNX.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from ssod_edge.errors import VerificationError, missing_extra
from ssod_edge.export.graph.fp16 import kept_values
from ssod_edge.export.int8.bias_correction import correct_biases
from ssod_edge.export.onnx_file import check_fused, open_session
from ssod_edge.optional import is_there, load

#: Operators with weights: what is meant by a layer.
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: The same, by OpenVINO's names.
OPENVINO_LAYERS = (
    "Convolution",
    "GroupConvolution",
    "ConvolutionBackpropData",
    "GroupConvolutionBackpropData",
    "MatMul",
)
OUTPUTS = ("logits", "ood_score")

Images = NDArray[np.uint8]
#: uint8 [n, 3, S, S] -> {"logits": fp32 [n, M], "ood_score": fp32 [n]}.
Infer = Callable[[Images], dict[str, NDArray[np.float32]]]


class Quantizer(ABC):
    """One way from the fp32 graph to int8. Nodes go by their names in the fp32 graph, whatever the engine calls them.

    Attributes:
        preset: NNCF's name for how activations are quantised.
        scope: nodes that are never quantised, see `float_scope`.
        images: uint8 [n, 3, S, S], which the ranges of the activations come from.
    """

    preset: str

    def __init__(self, graph: ModelProto, rows: int, images: Images):
        self.images = images
        self.scope = float_scope(graph, rows)
        self._graph = graph

    @abstractmethod
    def quantize(self, excluded: Sequence[str] = ()) -> Any:
        """The int8 model; the nodes named in `excluded` stay in floating point."""

    @abstractmethod
    def infer(self, model: Any) -> Infer:
        """Load a model into the engine it is for."""

    @abstractmethod
    def quantized_nodes(self, model: Any) -> list[str]:
        """Nodes that read a quantised activation, in the order they run."""

    @abstractmethod
    def bypassed(self, model: Any, node: str) -> Any:
        """A copy in which this node reads its activations unquantised."""

    @abstractmethod
    def layers(self, model: Any) -> dict[str, bool]:
        """Every layer, in the order they run, and whether its weights are int8."""


def layer_names(graph: ModelProto) -> dict[str, str]:
    """Node -> what to call it in a report: a layer by its weight ("backbone.conv_stem"), any other node by its name."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    names = {}
    for node in graph.graph.node:
        weight = node.input[1] if node.op_type in LAYERS and len(node.input) > 1 else ""
        known = weight in weights and weight.endswith(".weight")
        names[node.name] = weight.removesuffix(".weight").removeprefix("trunk.model.") if known else node.name
    return names


def float_scope(graph: ModelProto, rows: int) -> list[str]:
    """Nodes of a fused graph that are never quantised: those of its two fp32 ends.

    Args:
        graph: from `ssod_edge.export.graph.onnx.fused_graph`; every node has a name.
        rows: of its final Gemm.

    Raises:
        VerificationError: the graph does not have the fused form.
    """
    kept = kept_values(graph, check_fused(graph, rows))
    return [node.name for node in graph.graph.node if kept.intersection(node.output)]


class OnnxQuantizer(Quantizer):
    """`Quantizer` to a symmetric QDQ graph: int8 activations and per-channel int8 weights, every zero-point 0.

    Biases stay fp32: TensorRT refuses those that are int32 behind a DequantizeLinear.
    """

    preset = "performance"

    def quantize(self, excluded: Sequence[str] = ()) -> ModelProto:
        """Raises VerificationError if the graph is not symmetric int8 throughout."""
        items = [{"image": image[None]} for image in self.images]
        source = deepcopy(self._graph)  # NNCF writes into what it is given
        # NNCF's own full bias correction cannot cut graphs in which a shortcut has a convolution.
        parameters = _import_nncf().AdvancedQuantizationParameters(disable_bias_correction=True)
        model = _nncf_quantize(source, items, self.preset, [*self.scope, *excluded], advanced_parameters=parameters)
        _make_signed(model)
        correct_biases(model, self._graph, self.images)
        del model.graph.value_info[:]
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        check_symmetric(model)
        return model

    def infer(self, model: ModelProto) -> Infer:
        return infer_onnx(model)

    def quantized_nodes(self, model: ModelProto) -> list[str]:
        pairs = _activation_pairs(model)
        return [node.name for node in model.graph.node if node.op_type not in QDQ and pairs.keys() & set(node.input)]

    def bypassed(self, model: ModelProto, node: str) -> ModelProto:
        copy = deepcopy(model)
        pairs = _activation_pairs(copy)
        (found,) = (other for other in copy.graph.node if other.name == node)
        found.input[:] = [pairs.get(name, name) for name in found.input]
        return copy

    def layers(self, model: ModelProto) -> dict[str, bool]:
        dequantised = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        return {node.name: node.input[1] in dequantised for node in model.graph.node if node.op_type in LAYERS}


class OpenVinoQuantizer(Quantizer):
    """`Quantizer` to an OpenVINO model: asymmetric activations, symmetric per-channel weights."""

    preset = "mixed"

    def __init__(self, graph: ModelProto, rows: int, images: Images):
        super().__init__(graph, rows, images)
        # OpenVINO calls an operation that computes an output of the model by that output's name.
        self._nodes = {output: node.name for node in graph.graph.node for output in node.output}

    def quantize(self, excluded: Sequence[str] = ()) -> Any:
        source = load("openvino").convert_model(io.BytesIO(self._graph.SerializeToString()))
        left = {*self.scope, *excluded}
        ops = [op for op in source.get_ordered_ops() if op.get_type_name() not in ("Constant", "Parameter", "Result")]
        names = [op.get_friendly_name() for op in ops if self._node(op) in left]
        return _nncf_quantize(source, list(self.images[:, None]), self.preset, names)

    def infer(self, model: Any) -> Infer:
        from ssod_edge.runtime.engines.openvino import open_request

        request = open_request(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def infer(images: Images) -> dict[str, NDArray[np.float32]]:
            values = request.infer({"image": images})
            return {name: np.array(values[name]) for name in OUTPUTS}

        return infer

    def quantized_nodes(self, model: Any) -> list[str]:
        inputs = ((op, value.get_node()) for op in model.get_ordered_ops() for value in op.input_values())
        return list(dict.fromkeys(self._node(op) for op, source in inputs if _is_activation_quantizer(source)))

    def bypassed(self, model: Any, node: str) -> Any:
        copy = model.clone()
        for op in copy.get_ordered_ops():
            for port in op.inputs() if self._node(op) == node else ():
                source = port.get_source_output().get_node()
                if _is_activation_quantizer(source):
                    port.replace_source_output(source.input_value(0))
        return copy

    def layers(self, model: Any) -> dict[str, bool]:
        ops = [op for op in model.get_ordered_ops() if op.get_type_name() in OPENVINO_LAYERS]
        return {self._node(op): _constant_type(op.input_value(1).get_node()) in ("i8", "u8") for op in ops}

    def _node(self, op: Any) -> str:
        """The ONNX node that an operation was made for: "conv/WithoutBiases" is the convolution of "conv"."""
        name = str(op.get_friendly_name()).partition("/")[0]
        return self._nodes.get(name, name)


QDQ = ("QuantizeLinear", "DequantizeLinear")


def infer_onnx(model: ModelProto) -> Infer:
    """A graph on ONNX Runtime's CPU provider."""
    session = open_session(model)
    return lambda images: dict(zip(OUTPUTS, session.run(OUTPUTS, {"image": images}), strict=True))


def check_symmetric(model: ModelProto) -> None:
    """What TensorRT asks of an int8 graph, whatever made it.

    Raises:
        VerificationError: a scale or zero-point that is no constant, a zero-point that is not int8 0, or a bias that is
            quantised; the message names the node.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in (node for node in model.graph.node if node.op_type in QDQ):
        where = f"node '{node.name or node.output[0]}' ({node.op_type}) of the int8 graph"
        values = [tensors[name] for name in node.input[1:3] if name in tensors]
        if len(values) < 2:
            raise VerificationError(f"{where} has no constant scale and zero-point")
        scale, zero_point = values
        kind = TensorProto.DataType.Name(zero_point.data_type).lower()
        if kind != "int8":
            what = "a bias, which has to stay fp32" if kind == "int32" else "expected int8"
            raise VerificationError(f"{where} has a zero-point of type {kind}: {what}")
        if numpy_helper.to_array(zero_point).any():
            raise VerificationError(f"{where} has a zero-point other than 0: TensorRT takes symmetric ranges alone")
        if not (numpy_helper.to_array(scale) > 0).all():
            raise VerificationError(f"{where} has a scale that is not positive")


def _make_signed(model: ModelProto) -> None:
    """Turn uint8 pairs with zero-point 0 into int8 ones of the same range; they stand where no value is negative."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    signed: set[str] = set()
    for node in (node for node in model.graph.node if node.op_type in QDQ):
        scale, zero_point = (tensors[name] for name in node.input[1:3])
        if zero_point.data_type == TensorProto.UINT8 and not numpy_helper.to_array(zero_point).any():
            signed |= {scale.name, zero_point.name}
    for name in signed:
        value = numpy_helper.to_array(tensors[name])
        wider = value.astype(np.int8) if value.dtype == np.uint8 else (value * (255 / 127)).astype(np.float32)
        tensors[name].CopyFrom(numpy_helper.from_array(wider, name))


def _activation_pairs(model: ModelProto) -> dict[str, str]:
    """What each DequantizeLinear behind a QuantizeLinear gives -> the value that went into the pair."""
    producer: dict[str, NodeProto] = {output: node for node in model.graph.node for output in node.output}
    return {
        node.output[0]: producer[node.input[0]].input[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in producer
    }


def _is_activation_quantizer(op: Any) -> bool:
    return op.get_type_name() == "FakeQuantize" and op.input_value(0).get_node().get_type_name() != "Constant"


def _constant_type(op: Any) -> str | None:
    """The element type of the constant at the top of a chain of operations; None if there is none."""
    while op.get_type_name() != "Constant":
        if not op.input_values():
            return None
        op = op.input_value(0).get_node()
    return str(op.get_element_type().get_type_name())


def _nncf_quantize(model: Any, items: list[Any], preset: str, ignored: Sequence[str], **options: Any) -> Any:
    nncf = _import_nncf()
    with _silent(), _quiet_sessions():
        return nncf.quantize(
            model,
            nncf.Dataset(items),
            preset=nncf.QuantizationPreset(preset),
            subset_size=len(items),
            fast_bias_correction=False,
            ignored_scope=nncf.IgnoredScope(names=list(ignored)),
            **options,
        )


def _import_nncf() -> Any:
    """NNCF, which would otherwise change logging for everybody."""
    if not is_there("nncf"):
        raise missing_extra("nncf", "int8")
    logger_class = logging.getLoggerClass()
    try:
        with _silent():
            nncf = load("nncf", "int8")
    finally:
        logging.setLoggerClass(logger_class)
    # Its own function for this also sets the level of handlers that others have hung on its logger.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf


@contextlib.contextmanager
def _quiet_sessions() -> Iterator[None]:
    """NNCF opens sessions of its own, which would warn of every input that has a default."""
    onnxruntime = load("onnxruntime", "int8")
    onnxruntime.set_default_logger_severity(3)  # errors only
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # its default; it tells nobody what was set


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """NNCF draws its progress bars on standard output, which belongs to the command's result.

    And it loads torch's tools for C++, on import or later, which miss a GPU aloud.
    """
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(logging.NOTSET)
