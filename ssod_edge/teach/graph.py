"""The ONNX graph of an export, cut where its features are, and with other rows at its end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ssod_edge.config import score_parts
from ssod_edge.detect.detectors import UNIT_LENGTH, Array, Detector
from ssod_edge.detect.rows import residual_factors, sum_numbers, unit_rows
from ssod_edge.detect.scores import GEN_CLASSES
from ssod_edge.detect.sums import FittedScore, ScoreSum
from ssod_edge.errors import UsageError, VerificationError
from ssod_edge.export.onnx_file import check_fused, open_session

if TYPE_CHECKING:
    import onnx

#: Scores of which another number of classes changes numbers of the graph and none of its operations.
TEACHABLE = ("ssod", "maxlogit", "energy", "gen", "posterior", "residual", *UNIT_LENGTH)
BATCH = 8


@dataclass(frozen=True)
class End:
    """What follows the features in a graph.

    Attributes:
        weight, bias: float32 [M + 1, D] and [M + 1], the classes' rows and the OOD row's.
        classes: M names.
        score: the shipped score's state, if it has one.
        temperature: of `probs`.
    """

    weight: Array
    bias: Array
    classes: tuple[str, ...]
    score: FittedScore | None
    temperature: float


def check_teachable(score: str, before: int, after: int) -> None:
    """Raises UsageError unless a graph of `before` classes can be given `after`."""
    if others := [part for part in score_parts(score) if part not in TEACHABLE]:
        raise UsageError(
            f"the graph of the score '{score}' cannot be taught: {', '.join(others)} needs other operations for "
            "another number of classes. Export the run with --score gen+mahalanobispp+residual"
        )
    if "gen" in score_parts(score) and (before > GEN_CLASSES) != (after > GEN_CLASSES):
        raise UsageError(f"a graph of {before} classes cannot be taught to have {after}: gen reads {GEN_CLASSES}")


class Trunk:
    """Images to features, by the fp32 graph of an export.

    Args:
        model: the graph.
        rows: of its final Gemm.

    Attributes:
        weight, bias: float32 [rows, D] and [rows], of that Gemm.
    """

    def __init__(self, model: onnx.ModelProto, rows: int):
        import onnx

        head = check_fused(model, rows)
        arrays = {tensor.name: tensor for tensor in model.graph.initializer}
        transposed = any(attribute.name == "transB" and attribute.i for attribute in head.attribute)
        if head.op_type != "Gemm" or not transposed or len(head.input) != 3 or head.input[2] not in arrays:
            raise VerificationError("the final Gemm of the graph is not of the form that this release exports")
        self.weight, self.bias = (onnx.numpy_helper.to_array(arrays[name]) for name in head.input[1:])
        cut = onnx.ModelProto()
        cut.CopyFrom(model)
        del cut.graph.output[:]
        shape = ["batch", self.weight.shape[1]]
        cut.graph.output.append(onnx.helper.make_tensor_value_info(head.input[0], onnx.TensorProto.FLOAT, shape))
        self._session = open_session(cut)

    def features(self, images: NDArray[np.uint8]) -> Array:
        """uint8 [n, 3, S, S] -> float32 [n, D]."""
        starts = range(0, len(images), BATCH)
        return np.concatenate([self._session.run(None, {"image": images[i : i + BATCH]})[0] for i in starts])


def with_end(model: onnx.ModelProto, rows: int, end: End) -> onnx.ModelProto:
    """A copy of a graph with another end; its trunk stays as it is, in whatever precision.

    Args:
        model: a fused graph, fp32 or fp16.
        rows: of its final Gemm.
        end: of the same score; `check_teachable` passes.

    Raises:
        VerificationError: the graph has another form than this release exports.
    """
    import onnx

    found = onnx.ModelProto()
    found.CopyFrom(model)
    edit = _Edit(found)
    head = check_fused(found, rows)
    blocks, numbers = _tail(end.score)
    weight = np.concatenate([end.weight, *(block.weight for block in blocks)])
    bias = np.concatenate([end.bias, *(block.bias for block in blocks)])
    edit.replace(head.input[1], weight)
    edit.replace(head.input[2], bias)
    for name, value in numbers.items():
        edit.replace(name, value)
    split = edit.reader(head.output[0], "Split")
    edit.feed(split, 1, "taught.sizes", np.array([len(end.classes), 1, *(len(b.weight) for b in blocks)], np.int64))
    for number, (block, output) in enumerate(zip(blocks, split.output[2:], strict=True)):
        if block.quadratic:
            inner = edit.reader(edit.reader(output, "Div").output[0], "Split")
            sizes = np.array([block.quadratic, block.linear], np.int64)
            edit.feed(inner, 1, f"taught.sizes.{number}", sizes)
    edit.temper(end.temperature)
    for output in found.graph.output:
        if output.name in ("logits", "probs"):
            output.type.tensor_type.shape.dim[1].dim_value = len(end.classes)
    for entry in found.metadata_props:
        entry.value = {
            "ssod.classes": json.dumps(end.classes),
            "ssod.temperature": json.dumps(end.temperature),
        }.get(entry.key, entry.value)
    del found.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(found, strict_mode=True)


@dataclass(frozen=True)
class _Block:
    """Rows of the Gemm that belong to a part of the score, and their biases there.

    Attributes:
        quadratic, linear: of features at length 1, how many are squared, and the others after them; else both 0.
    """

    weight: Array
    bias: Array
    quadratic: int = 0
    linear: int = 0


def _tail(score: FittedScore | None) -> tuple[list[_Block], dict[str, Array]]:
    """The blocks of rows after the OOD row, and the numbers of the graph by the names that export gave them."""
    if score is None:
        return [], {}
    numbers: dict[str, Array] = {}
    if isinstance(score, ScoreSum):
        if not score.centers:
            raise UsageError("the plain sum of an earlier release cannot be taught. Export the run again")
        numbers["fitted.factors"], numbers["fitted.offsets"] = sum_numbers(score)
        parts: list[tuple[int, Detector]] = [
            (place, score.detectors[name]) for place, name in enumerate(score.scales) if name in score.detectors
        ]
    else:
        parts = [(0, score)]
    blocks = []
    for place, detector in parts:
        name = f"fitted.parts.{place}.terms.0"
        if detector.name == "residual":
            if detector.center.size:  # else its squares are added up as they are
                numbers[f"{name}.factors"] = residual_factors(detector, 1.0)
                numbers[f"{name}.center"] = detector.center
            blocks.append(_Block(detector.weight, detector.bias))
            continue
        rows = unit_rows(detector, 1.0)
        numbers[f"{name}.constant"] = rows.constant
        no_bias = np.zeros(len(rows.weight), np.float32)
        blocks.append(_Block(rows.weight, no_bias, rows.quadratic, len(rows.constant)))
    return blocks, numbers


class _Edit:
    """Changes to a graph, in place."""

    def __init__(self, model: onnx.ModelProto):
        self._graph = model.graph

    def replace(self, name: str, value: NDArray[np.generic]) -> None:
        """Another value for a constant of the graph."""
        from onnx import numpy_helper

        for tensor in self._graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))
                return
        raise VerificationError(f"the graph has no '{name}', as this release's have. Export the run again")

    def feed(self, node: onnx.NodeProto, place: int, name: str, value: NDArray[np.generic]) -> None:
        """A constant of its own for one input of a node: others may read what it had."""
        from onnx import numpy_helper

        node.input[place] = name
        for tensor in self._graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(value, name))
                return
        self._graph.initializer.append(numpy_helper.from_array(value, name))

    def reader(self, value: str, kind: str) -> onnx.NodeProto:
        """The one node of a kind that reads a value."""
        found = [node for node in self._graph.node if value in node.input and node.op_type == kind]
        if len(found) != 1:
            raise VerificationError(f"the graph has {len(found)} {kind} that read '{value}'. Export the run again")
        return found[0]

    def temper(self, temperature: float) -> None:
        """`probs` = softmax(logits / temperature)."""
        from onnx import helper

        nodes = self._graph.node
        softmax = next(node for node in nodes if "probs" in node.output)
        factor = np.array(1 / temperature, np.float32)
        if softmax.input[0] != "logits":
            scaled = next(node for node in nodes if softmax.input[0] in node.output)
            if scaled.op_type != "Mul" or "logits" not in scaled.input:
                raise VerificationError("the graph's temperature is not where this release puts it")
            self.feed(scaled, 1 - list(scaled.input).index("logits"), "taught.temperature", factor)
            return
        if temperature == 1:
            return
        # What reads the plain probabilities goes on reading them.
        for node in nodes:
            for place, name in enumerate(node.input):
                if name == "probs":
                    node.input[place] = "plain_probs"
        softmax.output[0] = "plain_probs"
        scaled = helper.make_node("Mul", ["logits", "taught.temperature"], ["tempered"], name="taught_mul")
        self.feed(scaled, 1, "taught.temperature", factor)
        nodes.append(scaled)
        nodes.append(helper.make_node("Softmax", ["tempered"], ["probs"], name="taught_softmax", axis=1))
