"""The plain classifier: the same graph without the OOD row and the scores, to measure what "unknown" costs.

It is cut out of the fp32 ONNX artifact, so that trunk and weights are the same to the last bit, and needs no torch.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssod_edge.errors import ArtifactError, missing_extra
from ssod_edge.files import sha256_file
from ssod_edge.runtime import Runner
from ssod_edge.runtime.runner import OUTPUTS
from ssod_edge.spec import Artifact, Spec, check_files, load_spec, save_spec

#: What is left of the fused graph's outputs.
PLAIN_OUTPUTS = OUTPUTS[:2]

#: Engine -> (name of the plain artifact, name of the fused one it stands beside).
PAIRS = {
    "onnxruntime": ("plain-onnx-fp32", "onnx-fp32"),
    "openvino": ("plain-openvino-fp32", "openvino-fp32"),
}
SOURCE = "onnx-fp32"


def export_plain(export: Path, spec: Spec, engine: str, folder: Path) -> Artifact:
    """Make the plain classifier for one engine in a folder of its own, with a spec that `open_plain` reads.

    Args:
        export: the export folder, which has the artifact SOURCE.
        spec: its spec.
        engine: a key of PAIRS.
        folder: exists; gets the model and `ssod.json`.

    Raises:
        MissingExtraError: onnx (or openvino, for its engine) is not installed.
        UsageError, ArtifactError: there is no SOURCE, its file was changed, or it is not a fused graph.
    """
    if importlib.util.find_spec("onnx") is None:
        raise missing_extra("onnx", "making the plain classifier")
    if engine == "openvino" and importlib.util.find_spec("openvino") is None:
        raise missing_extra("openvino", "the openvino engine")
    import onnx

    source = spec.artifact(SOURCE)
    graph = onnx.load(check_files(export, source))
    cut_plain(graph, len(spec.classes))
    onnx.save(graph, folder / "plain.onnx")
    files = ["plain.onnx"]
    if engine == "openvino":
        import openvino

        openvino.save_model(openvino.convert_model(folder / "plain.onnx"), folder / "plain.xml", compress_to_fp16=False)
        (folder / "plain.onnx").unlink()
        files = ["plain.xml", "plain.bin"]
    artifact = replace(
        source,
        name=PAIRS[engine][0],
        engine=engine,
        files={name: sha256_file(folder / name) for name in files},
        threshold=None,
        verification=None,
    )
    save_spec(replace(spec, artifacts=(artifact,)), folder)
    return artifact


def open_plain(folder: Path, threads: int | None = None) -> Runner:
    """Open what `export_plain` wrote, on the runner that fused artifacts use; `infer` returns PLAIN_OUTPUTS alone."""
    spec = load_spec(folder)
    (artifact,) = spec.artifacts
    path = check_files(folder, artifact)
    if artifact.engine == "openvino":
        from ssod_edge.runtime.openvino import OpenVinoRunner

        return OpenVinoRunner(spec, artifact, path, threads=threads, outputs=PLAIN_OUTPUTS)
    from ssod_edge.runtime.onnxruntime import OnnxRunner

    return OnnxRunner(spec, artifact, path, threads=threads, outputs=PLAIN_OUTPUTS)


def cut_plain(model: Any, classes: int) -> None:
    """Turn a fused `onnx.ModelProto` into the plain classifier, in place.

    The last row of the final Gemm goes, its output becomes `logits`, and so does everything that only the other
    outputs need.

    Raises:
        ArtifactError: the graph does not end in one Gemm of classes + 1 rows.
    """
    import onnx

    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    # From `logits` back to the Gemm lie only nodes that drop the OOD row; their outputs all become its own.
    dropped, name = [], "logits"
    while name in producers and producers[name].op_type != "Gemm":
        dropped.append(producers[name])
        name = dropped[-1].input[0]
    if name not in producers:
        raise ArtifactError("the onnx-fp32 graph does not end in a Gemm. Export the run again.")
    gemm = producers[name]
    _drop_last_row(graph, gemm, classes)
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


def _drop_last_row(graph: Any, gemm: Any, classes: int) -> None:
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    transposed = any(a.name == "transB" and a.i for a in gemm.attribute)
    for which, axis in ((1, 0 if transposed else 1), (2, 0)):
        tensor = tensors.get(gemm.input[which]) if which < len(gemm.input) else None
        if tensor is None or len(tensor.dims) <= axis or tensor.dims[axis] != classes + 1:
            raise ArtifactError(f"the onnx-fp32 graph's Gemm does not have {classes} + 1 rows. Export the run again.")
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
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in needed]:
        graph.initializer.remove(tensor)


def engines_with_pairs(spec: Spec) -> list[str]:
    """Engines that a plain classifier can be measured on: those whose fused fp32 artifact there is."""
    names = {artifact.name for artifact in spec.artifacts}
    return [engine for engine, (_, fused) in PAIRS.items() if fused in names]
