"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.errors import EngineError, UsageError
from ssod_edge.files import temporary_folder, unicode_path
from ssod_edge.machine import engine_threads
from ssod_edge.optional import load
from ssod_edge.runtime.engines.loading import cannot_load, failed_run
from ssod_edge.runtime.forks import keep_in_children
from ssod_edge.runtime.runner import Array, Runner, check_graph, check_images, check_process, closed_error
from ssod_edge.spec import Artifact, Spec

#: Operators that do nearly all of the arithmetic: what they compute in is the precision that ran.
#: The engine's fused forms of them carry the name inside theirs (FusedConv, NhwcFusedConv, FusedGemm).
HEAVY_OPS = ("Conv", "Gemm", "MatMul")


class OnnxRunner(Runner):
    """`ssod_edge.runtime.Runner` on ONNX Runtime's CPU provider, which is asked for by name.

    A graph with fewer `outputs` than the fused one's is for measuring only.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: onnxruntime cannot be loaded, another device than the CPU, or the graph cannot be loaded.
        ArtifactError: the graph is not the one that the spec describes.
    """

    engine = "onnxruntime"
    device = "CPU"

    def __init__(
        self,
        spec: Spec,
        artifact: Artifact,
        path: Path,
        device: str = "auto",
        threads: int | None = None,
        outputs: tuple[str, ...] | None = None,
    ) -> None:
        if device not in ("auto", "CPU"):
            raise EngineError(f"onnxruntime runs on 'CPU' here, got device '{device}'")
        self.spec, self._opened_in = spec, os.getpid()
        self.artifact = artifact
        self._outputs = outputs = outputs or spec.outputs
        self._session: Any
        if artifact.precision == "fp32":
            self._session, self.precision = _open_session(path, threads, spec, artifact, outputs), "fp32"
        else:
            self._session, self.precision = _open_reduced(path, threads, spec, artifact, outputs)
        self.details = {
            "provider": ", ".join(self._session.get_providers()),
            "threads": str(engine_threads(threads) or "auto"),
        }

    def __exit__(self, *_: object) -> None:
        self._session = None

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a batch; see `ssod_edge.runtime.Runner.infer`."""
        check_process(self._opened_in)
        session = self._session  # another thread may close it meanwhile
        if session is None:
            raise closed_error()
        images = check_images(inputs, self.spec.preprocess.input_size)
        beside = self.verdict_inputs() if "known" in self._outputs else {}
        try:
            values = session.run(self._outputs, {"image": images, **beside})
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise failed_run("onnxruntime", error) from error
        return dict(zip(self._outputs, map(np.asarray, values), strict=True))


def session_options(threads: int | None = None) -> Any:
    """Those of a session for single requests; of None threads, see `ssod_edge.machine.engine_threads`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    # Threads that spin between the layers of a run are faster than those that sleep; between two runs they
    # would take the core that decodes the next image.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if (limit := engine_threads(threads)) is not None:
        options.intra_op_num_threads = limit
    return options


def new_session(model: str | bytes, options: Any, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Any:
    """A session with these providers or none: otherwise ONNX Runtime tries others, and prints so on standard output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, options, providers=list(providers), enable_fallback=0)
    return keep_in_children(session)


def _open_session(
    path: Path,
    threads: int | None,
    spec: Spec,
    artifact: Artifact,
    outputs: tuple[str, ...],
    profile: str | None = None,
) -> Any:
    onnxruntime = load("onnxruntime")
    options = session_options(threads)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    try:
        with unicode_path(path) as name:
            session = new_session(name, options)
    except UsageError:
        raise
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise cannot_load("onnxruntime", onnxruntime.__version__, artifact, path, error) from error
    shapes = {value.name: value.shape for value in session.get_inputs() + session.get_outputs()}
    check_graph(path, spec, outputs, shapes)
    return session


def _open_reduced(
    path: Path, threads: int | None, spec: Spec, artifact: Artifact, outputs: tuple[str, ...]
) -> tuple[Any, str]:
    """A session of an fp16 or int8 graph, and the precision its heavy operators ran in.

    Where the CPU provider has no fp16 kernel it inserts casts and computes in fp32; where it has no int8 kernel it
    dequantises first. No property says so: the profile of one run does.
    """
    with temporary_folder() as folder:
        size = spec.preprocess.input_size
        session = _open_session(path, threads, spec, artifact, outputs, profile=str(Path(folder) / "run"))
        session.run(None, {"image": np.zeros((1, 3, size, size), np.uint8)})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    types = {
        kind
        for event in events
        if any(name in event.get("args", {}).get("op_name", "") for name in HEAVY_OPS)
        for tensor in event["args"].get("input_type_shape", [])
        for kind in tensor
    }
    if types & {"int8", "uint8"}:
        return session, "int8"
    return session, "fp16" if "float16" in types else "fp32"
