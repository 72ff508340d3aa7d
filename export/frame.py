"""`export --frame`: graphs that take a camera's frame and give its verdict, each checked against its artifact.

What an artifact takes besides the image, its threshold and the table of p-values, is a constant in them: a client gives
a frame and reads the verdict, in any language that the engine has.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssod_edge.config import Preprocess
from ssod_edge.data.pixels import read_pixels
from ssod_edge.detect.confidence import verdict_inputs
from ssod_edge.errors import EngineError, MissingExtraError, UsageError, VerificationError
from ssod_edge.export.engines.openvino import save_ir
from ssod_edge.export.frame_golden import GOLDEN_FRAMES, write_golden_frames
from ssod_edge.export.frame_graph import FRAME, IMAGE, Channels, frame_graph, pixels_graph
from ssod_edge.export.frame_samples import colours_of, golden_frames, make_frames
from ssod_edge.export.onnx_file import close_inputs, save_onnx
from ssod_edge.files import make_directory, sha256_file, write_json
from ssod_edge.optional import load
from ssod_edge.runtime.engines.onnxruntime import new_session, session_options
from ssod_edge.runtime.engines.openvino import open_request, read_ir, request_config
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.golden import choose
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.runner import Array, Runner
from ssod_edge.runtime.verify import TOLERANCES
from ssod_edge.spec import SPEC_NAME, Artifact, Spec

if TYPE_CHECKING:
    from onnx import ModelProto

#: What tells a client about the graphs.
FRAME_JSON = "frame.json"
#: Pixels are rounded after each of two passes, by other arithmetic than Pillow's: a level is gained or lost at a half,
#: and beside a hard edge, such as print on paper, two of them meet. How far off a value may be, and what share of a
#: frame's values, or one of them, more than one level.
MOST_LEVELS, MOST_RARE = 2, 0.001

Infer = Callable[[Array], dict[str, Array]]
#: The files of a graph, the one to open first; the graph; and that of its pixels alone.
Made = tuple[Sequence[Path], Infer, Infer]


def write_frame_graphs(
    folder: str | Path, out: str | Path, channels: Channels = "RGB", say: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Write a graph for each artifact of ONNX Runtime and OpenVINO, `FRAME_JSON`, and `GOLDEN_FRAMES`.

    Args:
        folder: an export folder, or the run folder that holds it.
        out: a folder, which is made; of files of these names earlier ones are replaced.
        channels: the order of the frame's colours.
        say: gets a line for each artifact that is left out.

    Returns:
        the artifacts that have one.

    Raises:
        MissingExtraError: onnx is not installed.
        UsageError: no artifact can be made into one here.
        VerificationError: what a graph makes of a frame is not what the artifact makes of it.
        ArtifactError, OutputError: the export is damaged; the folder cannot be written.
    """
    load("onnx", "a graph that takes frames")
    export, place = Export.at(folder), make_directory(out)
    reference = export.reference()
    frames = make_frames(reference["image"], export.spec.preprocess, channels)
    golden = golden_frames(choose(reference, export.spec), export.spec.preprocess, channels)
    made, outputs = dict[str, Any](), dict[str, list[dict[str, Array]]]()
    for artifact in export.spec.artifacts:
        if artifact.engine not in ("onnxruntime", "openvino"):
            say(f"left out {artifact.name}: a plan of {artifact.engine} takes pixels of one size")
            continue
        if channels == "NV12" and artifact.engine != "openvino":
            say(f"left out {artifact.name}: only OpenVINO takes NV12")
            continue
        try:
            with open_runner(export.folder, artifact=artifact.name, allow_untrained=True) as runner:
                make = _onnx if artifact.engine == "onnxruntime" else _openvino
                files, graph, pixels = make(export, runner, place, channels)
                figures = check_frames(runner, graph, pixels, frames, channels)
                outputs[artifact.name] = [graph(frame) for frame in golden]
            sums = {path.relative_to(place).as_posix(): sha256_file(path) for path in files}
            made[artifact.name] = {"main_file": next(iter(sums)), "files": sums, **figures}
        except (EngineError, MissingExtraError) as error:
            say(f"left out {artifact.name}, which does not run here: {error}")
    if not made:
        engines = "OpenVINO, which takes NV12" if channels == "NV12" else "ONNX Runtime or OpenVINO, which take frames"
        raise UsageError(f"no artifact of '{export.folder}' runs here on {engines}")
    document = _document(export, channels, made)
    write_golden_frames(export, golden, document, outputs, place / GOLDEN_FRAMES)
    write_json(place / FRAME_JSON, document)
    return list(made)


def _onnx(export: Export, runner: Runner, place: Path, channels: Channels) -> Made:
    onnx = load("onnx", "a graph that takes frames")
    spec, artifact = export.spec, runner.artifact
    graph = onnx.load(export.folder / artifact.main_file)
    close_inputs(graph, verdict_inputs(artifact.threshold))
    found = frame_graph(graph, spec.preprocess, channels)
    path = save_onnx(found, place / f"{artifact.name}.onnx")

    return [path], infer_onnx(found), infer_onnx(pixels_graph(spec.preprocess, channels))


def infer_onnx(graph: ModelProto) -> Infer:
    """A graph with the input `frame`, open in ONNX Runtime."""
    session = new_session(graph.SerializeToString(), session_options())
    names = [output.name for output in session.get_outputs()]
    return lambda frame: dict(zip(names, session.run(names, {FRAME: frame}), strict=True))


def _openvino(export: Export, runner: Runner, place: Path, channels: Channels) -> Made:
    spec, artifact = export.spec, runner.artifact
    openvino = load("openvino")
    pixels = _openvino_pixels(spec.preprocess, channels)
    alone, model = pixels.clone(), read_ir(export.folder / artifact.main_file)
    settings = verdict_inputs(artifact.threshold)
    (result,) = pixels.get_results()
    for parameter in model.get_parameters():
        name = parameter.output(0).get_any_name()
        source = result.input_value(0) if name == IMAGE else openvino.opset13.constant(settings[name]).output(0)
        for reader in list(parameter.output(0).get_target_inputs()):
            reader.replace_source_output(source)
    found = openvino.Model(model.get_results(), pixels.get_parameters(), spec.backbone)
    found.validate_nodes_and_infer_types()
    files = save_ir(export.folder / artifact.main_file, place / artifact.name, found)

    def opened(model: Any) -> Infer:
        request = open_request(model, "CPU", request_config("CPU", artifact.precision))

        def infer(frame: Array) -> dict[str, Array]:
            values = request.infer({FRAME: frame})
            return {port.get_any_name(): np.array(values[port]) for port in request.model_outputs}

        return infer

    return files, opened(found), opened(alone)


def _openvino_pixels(settings: Preprocess, channels: Channels) -> Any:
    """`pixels_graph` for OpenVINO, which has an operation for NV12 as well."""
    openvino = load("openvino")
    given: Channels = "RGB" if channels == "NV12" else channels
    pixels = openvino.convert_model(io.BytesIO(pixels_graph(settings, given).SerializeToString()))
    if channels != "NV12":
        return pixels
    operations = openvino.opset13
    frame = operations.parameter([-1, -1], np.uint8, name=FRAME)
    frame.output(0).set_names({FRAME})
    batch = operations.unsqueeze(frame, operations.constant([0, 3]))
    colours = operations.squeeze(operations.nv12_to_rgb(batch), operations.constant([0]))
    (taken,) = pixels.get_parameters()
    for reader in list(taken.output(0).get_target_inputs()):
        reader.replace_source_output(colours.output(0))
    return openvino.Model(pixels.get_results(), [frame], FRAME)


def check_frames(
    runner: Runner, graph: Infer, pixels: Infer, frames: list[Array], channels: Channels
) -> dict[str, Any]:
    """Compare the pixels that an engine makes of frames with `read_pixels`, and the verdicts with the artifact's.

    Args:
        runner: the open artifact.
        graph: the graph that takes frames, on the same engine.
        pixels: that of `pixels_graph` alone.
        frames: uint8, see `colours_of`.
        channels: the order of their colours.

    Raises:
        VerificationError: more than `MOST_RARE` of the values of pixels are over one level off, one is over
            `MOST_LEVELS` off, or a graph gives other numbers than the artifact does of
            the very pixels that the engine makes.
    """
    settings, threshold = runner.spec.preprocess, verdict_inputs(runner.artifact.threshold)["threshold"][0]
    farthest, rare, difference, scale, flips = 0, 0, 0.0, 1.0, 0
    for frame in frames:
        own = read_pixels(colours_of(frame, channels), settings)
        (made,) = pixels(frame).values()
        off = np.abs(made[0].astype(int) - own)
        farthest, rare = max(farthest, int(off.max())), max(rare, int((off > 1).sum()))
        found, expected = graph(frame), runner.infer({IMAGE: made})
        difference = max(difference, float(np.abs(found["logits"] - expected["logits"]).max()))
        scale = max(scale, 1.0 + float(np.abs(expected["logits"]).max()))
        if "known" in found and bool(found["known"][0]) != bool(found["ood_score"][0] <= threshold):
            raise VerificationError(f"the graph of '{runner.artifact.name}' for frames decides against its threshold")
        flips += bool(found["ood_score"][0] <= threshold) != bool(expected["ood_score"][0] <= threshold)
    tolerance = TOLERANCES[runner.artifact.precision]
    rare_may = max(1, round(MOST_RARE * 3 * settings.input_size**2))
    limit, flips_may = tolerance.logit * scale, max(1, round(tolerance.flip_share * len(frames)))
    if farthest > MOST_LEVELS or rare > rare_may or not difference <= limit or flips > flips_may:
        raise VerificationError(
            f"the graph of '{runner.artifact.name}' for frames does not compute what its artifact does: pixels are up "
            f"to {farthest} levels off ({MOST_LEVELS} are allowed), {rare} of a frame more than "
            f"one ({rare_may} may be), logits {difference:.2g} ({limit:.2g} is allowed), and {flips} "
            f"of {len(frames)} verdicts are other ones ({flips_may} may be)"
        )
    found_out = {"frames": len(frames), "max_pixel_diff": farthest, "max_abs_logit_diff": difference}
    return {**found_out, "logit_limit": limit, "decision_flips": flips}


def _document(export: Export, channels: Channels, made: dict[str, Any]) -> dict[str, Any]:
    spec: Spec = export.spec
    shape = ["height * 3 / 2", "width"] if channels == "NV12" else ["height", "width", 3]
    return {
        "about": "Each graph takes one frame and gives one verdict: known is false for what the model was not taught.",
        "spec_sha256": sha256_file(export.folder / SPEC_NAME),
        "input": {"name": FRAME, "dtype": "uint8", "shape": shape, "channels": channels},
        "outputs": list(spec.outputs),
        "classes": list(spec.classes),
        "preprocess": asdict(spec.preprocess),
        "graphs": {name: {**facts, "threshold": _threshold_of(spec.artifact(name))} for name, facts in made.items()},
    }


def _threshold_of(artifact: Artifact) -> float | None:
    return None if artifact.threshold is None else artifact.threshold.value
