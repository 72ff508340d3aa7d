"""`export --triton`: a model repository for NVIDIA Triton Inference Server, whose models give the verdict.

What Triton runs is ONNX Runtime on the CPU, in which the artifacts were verified. Its OpenVINO backend has no setting
for the precision that is computed in, which processors with AMX set to bf16, and wants each request as large as the
largest; TensorRT's plans take the threshold as an input, which a repository cannot give.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ssod_edge.detect.confidence import verdict_inputs
from ssod_edge.errors import EngineError, MissingExtraError, UsageError, VerificationError
from ssod_edge.export.frame import check_frames, infer_onnx
from ssod_edge.export.frame_graph import IMAGE, Channels, frame_graph, pixels_graph
from ssod_edge.export.frame_samples import make_frames
from ssod_edge.export.onnx_file import close_inputs, open_session, save_onnx
from ssod_edge.files import make_directory, write_bytes
from ssod_edge.optional import load
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.runner import Array, Runner
from ssod_edge.spec import Spec

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

#: The one version that each model has.
VERSION = "1"
LABELS = "labels.txt"
#: Images of different requests that Triton may put into one batch, and how long the first of them waits for others.
MAX_BATCH = 8
MAX_DELAY_US = 1000
#: Reference images whose outputs are compared.
CHECKED = 32
#: What the models for frames are called besides.
FRAMES = "-frame"

#: ONNX's numbers of element types -> Triton's names.
TYPES = {1: "TYPE_FP32", 9: "TYPE_BOOL"}


def write_triton(
    folder: str | Path, out: str | Path, channels: Channels = "RGB", say: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Write two models for each ONNX artifact: one of batches of the network's pixels, and one of frames of any size.

    Args:
        folder: an export folder, or the run folder that holds it.
        out: the model repository, which is made; models of these names are replaced, others stay.
        channels: the order of a frame's colours.
        say: gets a line for each artifact that is left out.

    Returns:
        the models' names.

    Raises:
        MissingExtraError: onnx is not installed.
        UsageError: the export has no ONNX artifact that runs here.
        VerificationError: a model gives other outputs than its artifact.
        ArtifactError, OutputError: the export is damaged; the folder cannot be written.
    """
    onnx = load("onnx", "a model repository for Triton")
    export, place, made = Export.at(folder), make_directory(out), list[str]()
    images = export.reference()["image"]
    for artifact in export.spec.artifacts:
        if artifact.engine != "onnxruntime":
            continue
        try:
            with open_runner(export.folder, artifact=artifact.name, allow_untrained=True) as runner:
                graph = onnx.load(export.folder / artifact.main_file)
                close_inputs(graph, verdict_inputs(artifact.threshold))
                _check(runner, graph, images[:CHECKED])
                framed = frame_graph(graph, export.spec.preprocess, channels)
                pixels = pixels_graph(export.spec.preprocess, channels)
                frames = make_frames(images, export.spec.preprocess, channels)
                check_frames(runner, infer_onnx(framed), infer_onnx(pixels), frames, channels)
        except (EngineError, MissingExtraError) as error:
            say(f"left out {artifact.name}, which does not run here: {error}")
            continue
        _save(place / artifact.name, graph, export.spec)
        _save(place / f"{artifact.name}{FRAMES}", framed, export.spec)
        made += [artifact.name, f"{artifact.name}{FRAMES}"]
    if not made:
        raise UsageError(
            f"'{export.folder}' has no ONNX artifact that runs here, which is what Triton would run: export it with "
            "--target onnx"
        )
    return made


def _check(runner: Runner, graph: ModelProto, images: Array) -> None:
    session = open_session(graph)
    names = [output.name for output in session.get_outputs()]
    for batch in (images[:1], images):
        expected = runner.infer({IMAGE: batch})
        for name, value in zip(names, session.run(names, {IMAGE: batch}), strict=True):
            if not np.allclose(value, expected[name], rtol=1e-5, atol=1e-6):
                raise VerificationError(f"the model of '{runner.artifact.name}' for Triton gives another {name}")


def _save(folder: Path, graph: ModelProto, spec: Spec) -> None:
    make_directory(folder / VERSION)
    save_onnx(graph, folder / VERSION / "model.onnx")
    labels = "".join(f"{name}\n" for name in spec.classes)
    for name, text in (("config.pbtxt", config(folder.name, graph)), (LABELS, labels)):
        write_bytes(folder / name, text.encode())


def config(name: str, graph: ModelProto) -> str:
    """The text of `config.pbtxt`.

    Args:
        name: the model's, which is that of its folder.
        graph: with one input: pixels `image` [N, 3, S, S], of as many images as there are, or a frame [H, W, 3].
    """
    (taken,) = graph.graph.input
    batched = taken.name == IMAGE
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {MAX_BATCH if batched else 0}",
        "input [",
        f'  {{ name: "{taken.name}" data_type: TYPE_UINT8 dims: {_dims(taken)[1 if batched else 0 :]} }}',
        "]",
        "output [",
        ",\n".join(f"  {{ {_output(value, batched)} }}" for value in graph.graph.output),
        "]",
        "instance_group [ { kind: KIND_CPU count: 1 } ]",
    ]
    if batched:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {MAX_DELAY_US} }}")
    return "\n".join(lines) + "\n"


def _dims(value: ValueInfoProto) -> list[int]:
    """The axes of an input or output, -1 where they are known when it runs."""
    return [axis.dim_value if axis.HasField("dim_value") else -1 for axis in value.type.tensor_type.shape.dim]


def _output(value: ValueInfoProto, batched: bool) -> str:
    axes = _dims(value)[1:]  # of one image
    kind = TYPES[value.type.tensor_type.elem_type]
    # Triton has no outputs without axes; one is added to a number for each image.
    shape = f"dims: {axes or [1]}{'' if axes else ' reshape { shape: [ ] }'}" if batched else f"dims: {[1, *axes]}"
    labels = f' label_filename: "{LABELS}"' if value.name in ("logits", "probs") else ""
    return f'name: "{value.name}" data_type: {kind} {shape}{labels}'
