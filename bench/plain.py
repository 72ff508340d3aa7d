"""The plain classifier: the same graph without the OOD row and the scores, to measure what "unknown" costs.

It is cut out of the artifact, so that trunk and weights are the same to the last bit, and needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.errors import ArtifactError
from ssod_edge.export.engines.openvino import save_ir
from ssod_edge.files import sha256_file, unicode_path
from ssod_edge.optional import load
from ssod_edge.runtime.engines.openvino import read_ir
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.runner import Runner
from ssod_edge.spec import LOGIT_OUTPUTS, Artifact, Spec, check_files, load_spec, save_spec

#: What is left of the fused graph's outputs.
PLAIN_OUTPUTS = LOGIT_OUTPUTS[:2]

PREFIX = "plain-"
ENGINES = {"onnxruntime": "onnx", "openvino": "openvino"}
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Pair:
    """A fused artifact, e.g. "openvino-fp32", and the plain classifier that it is measured against."""

    engine: str
    precision: str

    @property
    def fused(self) -> str:
        return f"{ENGINES[self.engine]}-{self.precision}"

    @property
    def plain(self) -> str:
        return f"{PREFIX}{self.fused}"

    @property
    def source(self) -> str:
        """The artifact that the plain classifier is cut out of."""
        return self.fused


def choose_pairs(spec: Spec) -> list[Pair]:
    """One pair for each engine that the export has artifacts for, in the first of PRECISIONS that there is."""
    names = {artifact.name for artifact in spec.artifacts}
    pairs = [[Pair(engine, precision) for precision in PRECISIONS] for engine in ENGINES]
    found = [[pair for pair in both if pair.fused in names] for both in pairs]
    return [both[0] for both in found if both]


def export_plain(export: Export, pair: Pair, folder: Path) -> Artifact:
    """Make the plain classifier for one engine in a folder of its own, with a spec that `open_plain` reads.

    Args:
        export: whose graph is cut.
        pair: which one to make.
        folder: exists; gets the model and `ssod.json`.

    Raises:
        MissingExtraError: onnx (or openvino, for its engine) is not installed.
        UsageError, ArtifactError: the export lacks the pair's source, its file was changed, or it is not a fused graph.
    """
    source, classes = export.spec.artifact(pair.source), len(export.spec.classes)
    path = check_files(export.folder, source)
    if pair.engine == "openvino":
        ir = read_ir(path)
        files = [path.name for path in save_ir(path, folder, cut_plain_ir(ir, classes))]
    else:
        onnx = load("onnx", "making the plain classifier")
        with unicode_path(path) as name:
            graph = onnx.load(name)
        cut_plain(graph, classes)
        onnx.save(graph, folder / "plain.onnx")
        files = ["plain.onnx"]
    artifact = replace(
        source,
        name=pair.plain,
        engine=pair.engine,
        files={name: sha256_file(folder / name) for name in files},
        threshold=None,
        verification=None,
    )
    save_spec(replace(export.spec, artifacts=(artifact,)), folder)
    return artifact


def open_plain(folder: Path, threads: int | None = None) -> Runner:
    """Open what `export_plain` wrote, on the runner that fused artifacts use; `infer` returns PLAIN_OUTPUTS alone."""
    spec = load_spec(folder)
    (artifact,) = spec.artifacts
    path = check_files(folder, artifact)
    if artifact.engine == "openvino":
        from ssod_edge.runtime.engines.openvino import OpenVinoRunner

        return OpenVinoRunner(spec, artifact, path, threads=threads, outputs=PLAIN_OUTPUTS)
    from ssod_edge.runtime.engines.onnxruntime import OnnxRunner

    return OnnxRunner(spec, artifact, path, threads=threads, outputs=PLAIN_OUTPUTS)


def cut_plain(model: Any, classes: int) -> None:
    """Turn a fused `onnx.ModelProto` into the plain classifier, in place.

    The rows of the final Gemm behind the classes go, its output becomes `logits`, and so goes everything that only the
    other outputs need.

    Raises:
        ArtifactError: the graph does not end in one Gemm of more rows than classes.
    """
    import onnx

    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    # From `logits` back to the Gemm lie only nodes that drop the other rows; their outputs all become its own.
    dropped, name = [], "logits"
    while name in producers and producers[name].op_type != "Gemm":
        dropped.append(producers[name])
        name = dropped[-1].input[0]
    if name not in producers:
        raise ArtifactError("the ONNX graph does not end in a Gemm. Export the run again.")
    gemm = producers[name]
    declared = [output.type.tensor_type.shape.dim for output in graph.output if output.name == "logits"]
    if any(len(axes) > 1 and axes[1].HasField("dim_value") and axes[1].dim_value != classes for axes in declared):
        raise ArtifactError(
            f"the ONNX graph has {declared[0][1].dim_value} classes, not {classes}. Export the run again."
        )
    _keep_classes(graph, gemm, classes)
    aliases = {node.output[0] for node in dropped} | {name}
    for node in dropped:
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = ["logits" if i in aliases else i for i in node.input]
    gemm.output[0] = "logits"
    keep = [output for output in graph.output if output.name in PLAIN_OUTPUTS]
    del graph.output[:]
    graph.output.extend(keep)
    del graph.value_info[:]
    _prune(graph)
    onnx.checker.check_model(model, full_check=True)


def cut_plain_ir(model: Any, classes: int) -> Any:
    """The plain classifier of an `openvino.Model`, as `cut_plain` makes it of an ONNX graph; the model is used up.

    Raises:
        ArtifactError: as there.
    """
    openvino = load("openvino")
    operations = openvino.opset13
    results = {result.input_value(0).get_any_name(): result for result in model.get_results()}
    source = results["logits"].input_value(0)
    bias, readers = None, source.get_target_inputs()
    while (node := source.get_node()).get_type_name() != "MatMul":
        if node.get_type_name() == "Add":
            bias = _constant(node.input_value(1).get_node())
        if not node.get_input_size():
            raise ArtifactError("the OpenVINO graph does not end in one matrix product. Export the run again.")
        source = node.input_value(0)
    transposed = bool(node.get_attributes()["transpose_b"])
    weight, axis = _constant(node.input_value(1).get_node()), 0 if transposed else 1
    if weight.shape[axis] <= classes:
        raise ArtifactError(
            f"the OpenVINO graph's last product does not have {classes} + 1 rows. Export the run again."
        )
    rows = operations.constant(np.ascontiguousarray(weight.take(range(classes), axis=axis)))
    logits = operations.matmul(node.input_value(0), rows, False, transposed)
    if bias is not None:
        logits = operations.add(logits, operations.constant(bias.reshape(1, -1)[:, :classes]))
    for reader in list(readers):
        reader.replace_source_output(logits.output(0))
    logits.output(0).set_names({"logits"})
    taken = [parameter for parameter in model.get_parameters() if parameter.output(0).get_any_name() == "image"]
    return openvino.Model([results[name] for name in PLAIN_OUTPUTS], taken, "plain")


def _constant(node: Any) -> Any:
    """The values of a constant, or of one that is converted: fp16 weights are stored so."""
    if node.get_type_name() == "Convert":
        return _constant(node.input_value(0).get_node()).astype(np.float32)
    if node.get_type_name() != "Constant":
        raise ArtifactError("the OpenVINO graph's last product has no constant weights. Export the run again.")
    return np.array(node.data)


def _keep_classes(graph: Any, gemm: Any, classes: int) -> None:
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    transposed = any(a.name == "transB" and a.i for a in gemm.attribute)
    for which, axis in ((1, 0 if transposed else 1), (2, 0)):
        if which == len(gemm.input):
            continue  # a bias of zeros is left out by the exporter
        tensor = tensors.get(gemm.input[which])
        if tensor is None or len(tensor.dims) <= axis or tensor.dims[axis] <= classes:
            raise ArtifactError(f"the ONNX graph's Gemm does not have {classes} + 1 rows. Export the run again.")
        rows = numpy_helper.to_array(tensor).take(range(classes), axis=axis)
        tensor.CopyFrom(numpy_helper.from_array(rows, tensor.name))


def _prune(graph: Any) -> None:
    """Remove the nodes and constants that no output needs. A graph's nodes stand in the order they run."""
    needed = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):
        if needed.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            needed.update(node.input)
    for values in (graph.initializer, graph.input):
        for value in [value for value in values if value.name not in needed]:
            values.remove(value)
