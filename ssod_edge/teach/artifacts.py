"""The artifacts of a lesson: the parent's trunks in their precisions, each with the new end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ssod_edge.export.engines.artifact import make_artifact
from ssod_edge.export.onnx_file import save_onnx
from ssod_edge.export.release import Say
from ssod_edge.files import unicode_path
from ssod_edge.runtime.open import is_installed
from ssod_edge.spec import Artifact, Threshold, check_files
from ssod_edge.teach.fitted import Fitted
from ssod_edge.teach.grafted import grafted
from ssod_edge.teach.graph import End, with_end

if TYPE_CHECKING:
    from ssod_edge.teach.teach import Model

#: The precision whose artifacts are left out where they do not hold: fp32 and fp16 must.
QUANTISED = "int8"
#: Precisions of the ONNX graphs that get other rows. From the features on all of them are fp32.
PRECISIONS = ("fp32", "fp16", QUANTISED)
#: Engines whose artifacts are made here.
CPU_ENGINES = ("onnxruntime", "openvino")


def make_artifacts(
    folder: Path, model: Model, fitted: Fitted, classes: tuple[str, ...], threshold: Threshold, say: Say
) -> list[Artifact]:
    """The artifacts that the old export has and that can be made here, each with the threshold, into a folder."""
    import onnx

    spec = model.spec
    weight = np.concatenate([fitted.heads.weight, model.row[None, :-1]])
    end = End(weight, np.append(fitted.heads.bias, model.row[-1]), classes, fitted.state, fitted.temperature)
    made: dict[str, Artifact] = {}
    for precision in PRECISIONS:
        graph = model.graphs.get(precision)
        olds = [a for a in spec.artifacts if a.precision == precision and a.engine in CPU_ENGINES]
        if graph is None and precision != QUANTISED:
            continue
        path = folder / f"model-{precision}.onnx"
        if graph is not None:
            with unicode_path(check_files(model.export.folder, graph)) as name:
                parent = onnx.load(name)
            save_onnx(with_end(parent, model.rows, end), path)
        for old in olds:
            if not is_installed(old.engine):
                continue
            ir = None
            if (precision, old.engine) == (QUANTISED, "openvino"):
                trunk = check_files(model.export.folder, old)
                ir = grafted(trunk, model.rows, folder / "model-fp32.onnx", len(weight) + fitted.rows)
            new = make_artifact(old.engine, precision, path, folder, ("onnx",), ir=ir)
            build = {**(graph or old).build, **new.build}
            versions = {**(graph or old).versions, **new.versions}
            made[old.name] = replace(new, versions=versions, build=build, threshold=threshold)
    for old in spec.artifacts:
        if old.name not in made:
            say(f"left out: {old.name}, which teach does not make. Export the run with the new photos for it")
    return [made[old.name] for old in spec.artifacts if old.name in made]
