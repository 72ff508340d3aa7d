"""The int8 artifacts of an export: quantised with real images, controlled on others, and described."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from ssod_edge.errors import UsageError, VerificationError, missing_extra
from ssod_edge.export.graph.onnx import MADE_WITH, make_from
from ssod_edge.export.graph.reference import SYNTHETIC_IMAGES, synthetic_images
from ssod_edge.export.graph.source import Source
from ssod_edge.export.int8.accuracy_control import AccuracyControl, check_count, draw_images, quantize_controlled
from ssod_edge.export.int8.quantize import OnnxQuantizer, OpenVinoQuantizer, Quantizer, infer_onnx, layer_names
from ssod_edge.export.release import Say
from ssod_edge.optional import is_there
from ssod_edge.spec import Artifact


def check_int8(source: Source) -> None:
    """Before any work: can this source be quantised here?

    Raises:
        MissingExtraError: NNCF is not installed.
        UsageError: trained weights without images, or with too few; how many can be read shows later.
    """
    if not is_there("nncf"):
        raise missing_extra("nncf", "exporting int8")
    if not source.trained:
        return
    parts = source.images.for_int8()
    if parts is None:
        raise UsageError("int8 is quantised with in-distribution images, and there are none. Name some: --calib DATA")
    check_count(sum(map(len, parts)), parts[0])


def int8_artifacts(
    source: Source,
    fp32: onnx.ModelProto,
    rows: int,
    engines: Sequence[str],
    max_drop: float,
    folder: Path,
    make: Callable[..., Artifact],
    say: Say,
) -> list[Artifact]:
    """Quantise and control: once for OpenVINO, and once for all engines that read ONNX.

    Args:
        source: what is exported.
        fp32, rows: its fused graph, and those of its final Gemm.
        engines: of `ssod_edge.export.engines.artifact.TARGETS`.
        max_drop: see `AccuracyControl`.
        folder, make: see `ssod_edge.export.graph.onnx.make_from`.
        say: gets a line for each step.

    Raises:
        UsageError: too few images.
        VerificationError: int8 costs more than `max_drop`.
    """
    make = partial(make, made_with=(*MADE_WITH, "nncf"))
    parts = source.images.for_int8()
    if not source.trained or parts is None:
        images = synthetic_images(SYNTHETIC_IMAGES, source.model.preprocess.input_size)
        data: dict[str, Any] = {"data": "seeded noise: untrained weights, for latency alone", "images": len(images)}
        control = None
    else:
        drawn = draw_images(parts, source.model, say)
        images = drawn.statistics
        data = {"data": drawn.ranges_of, "images": len(images), "copies": drawn.copies}
        copies = f", {drawn.copies} of them disturbed copies," if drawn.copies else ""
        say(
            f"quantising with {len(images)} images{copies} of {drawn.ranges_of}, checking on "
            f"{len(drawn.control)} of {drawn.control_of}"
        )
        control = AccuracyControl(drawn, infer_onnx(fp32), max_drop)
    artifacts = []
    if "openvino" in engines:
        ir, build = _quantize(OpenVinoQuantizer(fp32, rows, images), control, fp32, data, say)
        made = make("openvino", "int8", folder / "model-int8.onnx", folder, ir=ir)
        artifacts.append(replace(made, build={**made.build, **build}))
    others = [engine for engine in engines if engine != "openvino"]
    if others:
        graph, build = _quantize(OnnxQuantizer(fp32, rows, images), control, fp32, data, say)
        artifacts += make_from(graph, "int8", folder, others, make, build)
    return artifacts


def _quantize(
    quantizer: Quantizer, control: AccuracyControl | None, fp32: onnx.ModelProto, data: dict[str, Any], say: Say
) -> tuple[Any, dict[str, Any]]:
    """The int8 model, and the artifact's `build`."""
    excluded: tuple[str, ...] = ()
    evidence = None
    if control is None:
        model = quantizer.quantize()
    else:
        model, excluded, figures = quantize_controlled(quantizer, control, say)
        evidence = control.record(figures)
        say(f"int8 ({quantizer.preset}): {control.describe(figures)}")
    layers, names = quantizer.layers(model), layer_names(fp32)
    quantised = sum(layers.values())
    if not quantised:
        raise VerificationError(f"int8 ({quantizer.preset}): no layer of this network is quantised")
    named = f"; in floating point for accuracy: {', '.join(names[name] for name in excluded)}" if excluded else ""
    say(f"int8 ({quantizer.preset}): {quantised} of {len(layers)} layers are int8{named}")
    kept = [name for name, is_int8 in layers.items() if not is_int8]
    reasons = dict.fromkeys(quantizer.scope, "an fp32 end") | dict.fromkeys(excluded, "accuracy")
    build = {
        "calibration": data,
        "preset": quantizer.preset,
        "bias_correction": "full",
        "accuracy_control": evidence,
        "int8_layers": quantised,
        "float_layers": {names[name]: reasons.get(name, "the quantiser's choice") for name in (*excluded, *kept)},
    }
    return model, build
