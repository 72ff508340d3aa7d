"""A graph that takes the frame: from uint8 pixels of any size to classes, score and verdict, in any language.

Pillow's resize is two products with matrices that depend on the frame's size alone, with a rounding to whole levels
after each. Here they are made and multiplied in the graph, so that nothing about pixels is left to a client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from ssod_edge.config import Preprocess
from ssod_edge.data.pixels import SUPPORT
from ssod_edge.export.engines.artifact import OPSET

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

#: ONNX's numbers of element types.
FLOAT, UINT8, INT64 = 1, 2, 7
#: The input, and what the names of nodes and values that make pixels of it begin with.
FRAME = "frame"
OWN = "frame/"
#: What the fused graph takes, and what it gets here.
IMAGE = "image"
PIXELS = f"{OWN}{IMAGE}"

Channels = Literal["RGB", "BGR", "NV12"]


class _Nodes:
    """Nodes that are added one after the other; each call gives the name of what it computes."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, value: object, dtype: type = np.float32) -> str:
        from onnx import numpy_helper

        name = f"{OWN}constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def whole(self, value: object) -> str:
        """A constant of indices."""
        return self.constant(value, np.int64)

    def used(self) -> list[TensorProto]:
        """The constants that a node reads."""
        read = {name for node in self.nodes for name in node.input}
        return [value for value in self.constants if value.name in read]

    def __call__(self, op: str, *inputs: str | float, name: str | None = None, **attributes: object) -> str:
        from onnx import helper

        given = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        name = name or f"{OWN}{op}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, given, [name], name, **attributes))
        return name


def frame_graph(graph: ModelProto, settings: Preprocess, channels: Channels = "RGB") -> ModelProto:
    """The fused graph behind what turns a frame into its input.

    Args:
        graph: fused, with the input `image` uint8 [N, 3, S, S].
        settings: its preprocessing, all of which is in the result.
        channels: the order in which the frame has its colours; ONNX has no operation for NV12.

    Returns:
        a graph with the input `frame` uint8 [H, W, 3] of any size, and all others of `graph`; the outputs are those of
        one image, N = 1.
    """
    from onnx import compose, helper

    opset = next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))
    pixels = pixels_graph(settings, channels, opset)
    pixels.ir_version = graph.ir_version
    found = compose.merge_models(pixels, graph, io_map=[(PIXELS, IMAGE)])
    helper.set_model_props(found, {entry.key: entry.value for entry in graph.metadata_props})
    return found


def pixels_graph(settings: Preprocess, channels: Channels = "RGB", opset: int = OPSET) -> ModelProto:
    """From `frame` uint8 [H, W, 3] to `PIXELS` uint8 [1, 3, S, S], as `ssod_edge.data.pixels.preprocess` does it.

    Where a region of the frame counts (`roi`), a frame must hold it.
    """
    from onnx import helper

    add, size = _Nodes(), settings.input_size
    planes = add("Transpose", FRAME, perm=[2, 0, 1])
    if channels == "BGR":
        planes = add("Gather", planes, add.whole([2, 1, 0]), axis=0)
    if settings.roi is not None:
        x, y, width, height = settings.roi
        planes = add("Slice", planes, *map(add.whole, ([y, x], [y + height, x + width], [1, 2])))
    shape = add("Cast", add("Shape", planes), to=FLOAT)
    sides = [add("Gather", shape, add.whole(axis)) for axis in (1, 2)]
    rows, columns = (_Axis(add, settings, sides, axis) for axis in (0, 1))
    starts, ends = (add("Concat", *both, axis=0) for both in ((rows.first, columns.first), (rows.last, columns.last)))
    seen = add("Cast", add("Slice", planes, starts, ends, add.whole([1, 2])), to=FLOAT)
    wide = _levels(add, add("MatMul", seen, add("Transpose", columns.weights, perm=[1, 0])))
    small = _levels(add, add("MatMul", rows.weights, wide))
    if settings.fit == "pad":
        kept = [add("Unsqueeze", axis.kept, add.whole([at])) for axis, at in ((rows, 1), (columns, 0))]
        bars = add.constant(np.array([round(255 * value) for value in settings.mean]).reshape(3, 1, 1))
        small = add("Where", add("And", *kept), small, bars)
    add("Unsqueeze", add("Cast", small, to=UINT8), add.whole([0]), name=PIXELS)
    taken = helper.make_tensor_value_info(FRAME, UINT8, ["height", "width", 3])
    given = helper.make_tensor_value_info(PIXELS, UINT8, [1, 3, size, size])
    inner = helper.make_graph(add.nodes, FRAME, [taken], [given], add.used())
    return helper.make_model(inner, opset_imports=[helper.make_opsetid("", opset)])


class _Axis:
    """What Pillow's resize does along one axis of a picture: 0 is from top to bottom.

    Attributes: names of values in the graph.
        first, last: the pixels [1] that are looked at, the last one excluded.
        weights: float32 [S, last - first], coefficients of each pixel that comes out.
        kept: bool [S], which of these are of the picture and not of a bar.
    """

    def __init__(self, add: _Nodes, settings: Preprocess, sides: Sequence[str], axis: int) -> None:
        length, size = sides[axis], float(settings.input_size)
        place, inner = add.constant(np.arange(size)), add.constant(size)
        start, part = add.constant(0.0), length
        if settings.fit == "crop":
            part = add("Mul", add("Min", *sides), settings.crop_pct)
            start = add("Div", add("Sub", length, part), 2.0)
        elif settings.fit == "pad":
            inner = add("Max", add("Round", add("Div", add("Mul", length, size), add("Max", *sides))), 1.0)
            place = add("Sub", place, add("Floor", add("Div", add("Sub", size, inner), 2.0)))
        self.kept = add("And", add("GreaterOrEqual", place, 0.0), add("Less", place, inner))
        scale = add("Div", part, inner)
        stretch = add("Max", scale, 1.0)  # what is made larger is not blurred
        reach = add("Mul", stretch, SUPPORT[settings.interpolation])
        low = add("Max", add("Sub", add("Floor", add("Sub", start, reach)), 1.0), 0.0)
        high = add("Min", add("Add", add("Ceil", add("Add", add("Add", start, part), reach)), 1.0), length)
        self.first, self.last = (
            add("Unsqueeze", add("Cast", bound, to=INT64), add.whole([0])) for bound in (low, high)
        )
        centre = add("Add", start, add("Mul", add("Add", place, 0.5), scale))
        centre = add("Unsqueeze", centre, add.whole([1]))
        pixel = add("Range", low, high, 1.0)
        begin, end = (add("Floor", add("Add", add(op, centre, reach), 0.5)) for op in ("Sub", "Add"))
        seen = add("And", add("GreaterOrEqual", pixel, begin), add("Less", pixel, end))
        distance = add("Div", add("Sub", add("Add", pixel, 0.5), centre), stretch)
        shape = _filter(add, distance, settings.interpolation)
        values = add("Mul", shape, add("Cast", seen, to=FLOAT))
        total = add("ReduceSum", values, add.whole([1]), keepdims=1)
        total = add("Where", add("Equal", total, 0.0), 1.0, total)  # of bars
        self.weights = add("Div", values, total)


def _filter(add: _Nodes, distance: str, interpolation: str) -> str:
    """Keys' cubic with a = -0.5, or the triangle, of signed distances in pixels of the smaller picture."""
    x = add("Abs", distance)
    if interpolation == "bilinear":
        return add("Max", add("Sub", 1.0, x), 0.0)
    square = add("Mul", x, x)
    near = add("Add", add("Mul", add("Sub", add("Mul", x, 1.5), 2.5), square), 1.0)
    cubed = add("Mul", add("Sub", add("Mul", add("Sub", x, 5.0), x), -8.0), x)
    far = add("Mul", add("Sub", cubed, 4.0), -0.5)
    beyond = add("Where", add("Less", x, 2.0), far, 0.0)
    return add("Where", add("Less", x, 1.0), near, beyond)


def _levels(add: _Nodes, values: str) -> str:
    """Whole levels, as each of Pillow's two passes leaves them: halves go up."""
    return add("Clip", add("Floor", add("Add", values, 0.5)), 0.0, 255.0)
