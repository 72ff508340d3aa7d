"""Bias correction of a quantised ONNX graph: every convolution's output gets back the mean it has in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ssod_edge.export.onnx_file import open_session

#: Images whose means are compared. The difference of two graphs on the same images is far steadier than either.
CORRECTION_IMAGES = 64
BATCH = 32

Array = NDArray[np.float32]


def correct_biases(model: ModelProto, reference: ModelProto, images: NDArray[np.uint8]) -> None:
    """Shift the biases of a graph's quantised convolutions, in place.

    Rounding shifts the mean of each channel, and the shifts add up from layer to layer. One convolution after the other
    is measured behind those that are corrected already (Nagel et al., Data-Free Quantization, 2019, section 4.2, with
    real images instead of the batch norms' statistics).

    Args:
        model: with quantise and dequantise pairs; its convolutions have the names that they have in `reference`.
        reference: the fp32 graph.
        images: uint8 [n, 3, S, S]; the first `CORRECTION_IMAGES` are used.
    """
    images = images[:CORRECTION_IMAGES]
    dequantised = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose") and n.input[1] in dequantised]
    names = [node.name for node in layers]
    wanted = _Means(reference, names).of(names, images)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    biases = {
        node.name: numpy_helper.to_array(tensors[node.input[2]]).copy()
        if len(node.input) > 2
        else np.zeros_like(wanted[node.name])
        for node in layers
    }
    found = _Means(model, names, biases)
    for node in layers:
        biases[node.name] += wanted[node.name] - found.of([node.name], images)[node.name]
        name = f"{node.name}_corrected_bias"
        if name not in tensors:
            tensors[name] = model.graph.initializer.add()
        tensors[name].CopyFrom(numpy_helper.from_array(biases[node.name], name))
        node.input[:] = [*node.input[:2], name]
    used = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)


class _Means:
    """Mean of each channel of some layers' outputs; `biases` stand in for the layers' own, as they are at each run."""

    def __init__(self, graph: ModelProto, layers: list[str], biases: Mapping[str, Array] | None = None):
        probed = deepcopy(graph)
        inner = probed.graph
        inner.initializer.append(numpy_helper.from_array(np.array([0, 2, 3]), "probe_axes"))
        del inner.output[:]
        self._biases = biases or {}
        by_name: Mapping[str, NodeProto] = {node.name: node for node in inner.node}
        for name in layers:
            node = by_name[name]
            inner.node.append(helper.make_node("ReduceMean", [node.output[0], "probe_axes"], [_mean(name)], keepdims=0))
            inner.output.append(helper.make_tensor_value_info(_mean(name), TensorProto.FLOAT, None))
            if name in self._biases:
                node.input[:] = [*node.input[:2], _bias(name)]
                shape = self._biases[name].shape
                inner.input.append(helper.make_tensor_value_info(_bias(name), TensorProto.FLOAT, shape))
        # As the graph says, in fp32 between the pairs: fused kernels want a bias that is a constant.
        self._session = open_session(probed, optimise=False)

    def of(self, layers: list[str], images: NDArray[np.uint8]) -> dict[str, Array]:
        """Layer -> float32 [channels]; what comes behind them in the graph does not run."""
        biases = {_bias(name): value for name, value in self._biases.items()}
        totals = [np.zeros(1, np.float64)] * len(layers)
        for batch in np.array_split(images, range(BATCH, len(images), BATCH)):
            means = self._session.run([_mean(name) for name in layers], {"image": batch, **biases})
            totals = [total + mean * (len(batch) / len(images)) for total, mean in zip(totals, means, strict=True)]
        return {name: total.astype(np.float32) for name, total in zip(layers, totals, strict=True)}


def _mean(layer: str) -> str:
    return f"{layer}_probe_mean"


def _bias(layer: str) -> str:
    return f"{layer}_probe_bias"
