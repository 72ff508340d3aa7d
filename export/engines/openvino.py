"""OpenVINO IR from the ONNX file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ssod_edge.errors import OutputError, UsageError, VerificationError
from ssod_edge.files import unicode_path
from ssod_edge.optional import load
from ssod_edge.spec import VERDICT_INPUTS


def save_ir(onnx_path: Path, folder: Path, model: Any = None) -> tuple[Path, Path]:
    """Convert an ONNX file; returns the paths of `model.xml` and `model.bin` in `folder`.

    The types of the graph are kept as they are: an fp16 graph gives an IR whose trunk is stored in fp16 and whose
    normalisation and head are fp32. OpenVINO's own compression would store the head in fp16 too.

    Args:
        model: an OpenVINO model that is written instead, as it is.

    Raises:
        MissingExtraError: openvino is not installed.
        VerificationError: OpenVINO cannot read the graph.
        OutputError: the IR cannot be written.
    """
    openvino = load("openvino", "making an OpenVINO IR")
    try:
        if model is None:
            with unicode_path(onnx_path) as name:
                model = openvino.convert_model(name)
    except UsageError:
        raise
    except Exception as error:  # OpenVINO raises RuntimeError and classes of its frontends
        raise VerificationError(f"OpenVINO {openvino.__version__} cannot read '{onnx_path.name}': {error}") from error
    open_inputs(model)
    path = folder / "model.xml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unicode_path(folder) as name:
            openvino.save_model(model, os.path.join(name, path.name), compress_to_fp16=False)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"cannot write '{path}': {error}. Free some space or choose another folder.") from error
    return path, path.with_suffix(".bin")


def open_inputs(model: Any) -> None:
    """Make inputs of the constants that stand for `VERDICT_INPUTS`, so that another threshold takes no other IR."""
    openvino = load("openvino", "making an OpenVINO IR")
    constants = {op.get_friendly_name(): op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"}
    for name in VERDICT_INPUTS:
        if name in constants:
            output = constants[name].output(0)
            parameter = openvino.opset13.parameter(output.get_shape(), output.get_element_type(), name=name)
            parameter.output(0).set_names({name})
            output.replace(parameter.output(0))
            model.add_parameters([parameter])
