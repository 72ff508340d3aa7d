"""An OpenVINO model whose trunk is quantised, with another end: int8 after a lesson, without the quantiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssod_edge.errors import VerificationError
from ssod_edge.files import unicode_path
from ssod_edge.optional import load
from ssod_edge.spec import VERDICT_INPUTS


def grafted(trunk: Path, rows: int, end: Path, new_rows: int) -> Any:
    """The trunk of one model and the end of another, from the features on, which stay in fp32 in every precision.

    Args:
        trunk: an IR (`model.xml`) whose final product has so many `rows`.
        end: a graph in fp32 of the same network, in ONNX, with `new_rows`.

    Returns:
        an `openvino.Model` with the outputs of `end`.

    Raises:
        VerificationError: one of them has another form than this release exports.
    """
    from ssod_edge.export.engines.openvino import open_inputs
    from ssod_edge.runtime.engines.openvino import read_ir

    openvino = load("openvino")
    old = read_ir(trunk)
    with unicode_path(end) as name:
        new = openvino.convert_model(name)
    open_inputs(new)
    features = _features(old, rows)
    for reader in list(_features(new, new_rows).get_target_inputs()):
        reader.replace_source_output(features)
    images = [p for p in old.get_parameters() if p.output(0).get_any_name() not in VERDICT_INPUTS]
    settings = [p for p in new.get_parameters() if p.output(0).get_any_name() in VERDICT_INPUTS]
    return openvino.Model(new.get_results(), [*images, *settings], old.get_friendly_name())


def _features(model: Any, rows: int) -> Any:
    """What the final product of a model reads."""
    found = [
        op
        for op in model.get_ordered_ops()
        if op.get_type_name() == "MatMul" and list(op.output(0).get_partial_shape())[-1] == rows
    ]
    if len(found) != 1:
        raise VerificationError("the OpenVINO model does not end in one product. Export the run again")
    return found[0].input_value(0)
