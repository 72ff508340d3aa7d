"""What every engine's runner has in common: its face, and the check of what goes in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ssod_edge.detect.confidence import verdict_inputs
from ssod_edge.errors import ArtifactError, EngineError, UsageError
from ssod_edge.spec import SPEC_NAME, Artifact, Spec, Threshold

Array = npt.NDArray[Any]


class Runner(Protocol):
    """An artifact, open on an engine. A context manager; any threads may call `infer`, and on OpenVINO take turns.

    Attributes:
        spec: the export it belongs to.
        artifact: the artifact that was opened.
        engine: "tensorrt", "tensorrt_rtx", "onnxruntime", "openvino" or "eager".
        precision: "fp32", "fp16", "bf16" or "int8": what the engine really computes in, read back from it.
        device: what it really runs on, e.g. "CPU".
        details: what else the engine says about itself, for reports.
        folder: of the export, where `open_runner` opened it from one.
    """

    spec: Spec
    artifact: Artifact
    engine: str
    precision: str
    device: str
    details: dict[str, str]
    folder: Path | None = None
    _fed: tuple[Threshold | None, dict[str, Array]] | None = None

    def verdict_inputs(self) -> dict[str, Array]:
        """What the graph takes beside the image: the same object until the artifact gets another threshold."""
        threshold = self.artifact.threshold
        if self._fed is None or self._fed[0] is not threshold:
            self._fed = threshold, verdict_inputs(threshold)
        return self._fed[1]

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None: ...

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a batch.

        Args:
            inputs: {"image": uint8 [N, 3, S, S]}, N >= 1. An array that is not C-contiguous is copied.

        Returns:
            the `Spec.outputs`, arrays that belong to the caller: "logits" [N, M], "probs" [N, M], "id_logit" [N],
            "ood_score" [N] (larger = more likely out of distribution), "p_known" [N], all float32; "known" [N], bool,
            False without a threshold; "features_pooled" float32 [N, D] where it was asked for.

        Raises:
            UsageError: wrong name, dtype or shape, or the runner is closed.
        """
        ...


def check_images(inputs: Mapping[str, Array], size: int) -> Array:
    """The batch in `inputs`, C-contiguous uint8 [N, 3, size, size].

    Raises:
        UsageError: another name, dtype or shape, or no image at all.
    """
    if set(inputs) != {"image"}:
        raise UsageError(f"inputs must have the one key 'image', got: {', '.join(map(str, inputs)) or 'none'}")
    images = inputs["image"]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        got = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise UsageError(
            f"image must be a numpy array of uint8, got {got}. Make it with ssod_edge.data.pixels.preprocess"
        )
    if images.ndim != 4 or images.shape[1:] != (3, size, size) or images.shape[0] < 1:
        raise UsageError(f"image must have shape [N, 3, {size}, {size}] with N >= 1, got {list(images.shape)}")
    return np.ascontiguousarray(images)


def check_graph(path: Path, spec: Spec, outputs: Sequence[str], shapes: Mapping[str, Sequence[object]]) -> None:
    """Compare an opened graph with `ssod.json`, before an engine fails on what does not fit.

    Args:
        path: the graph's file, for the message.
        outputs: those that will be asked for.
        shapes: of its inputs and outputs, by name; an axis that is no int is dynamic, and an empty shape unknown.

    Raises:
        ArtifactError: another input size or number of classes, or an input or output is missing.
    """
    size = spec.preprocess.input_size
    expected: dict[str, list[int]] = {"image": [3, size, size], "logits": [len(spec.classes)]}
    for name in ("image", *outputs):
        found, axes = list(shapes.get(name, [])[1:]), expected.get(name, [])
        if name not in shapes or any(isinstance(a, int) and a != b for a, b in zip(found, axes, strict=False)):
            what = f"{name} has shape {['N', *found]}" if name in shapes else f"it has no '{name}'"
            raise ArtifactError(
                f"'{path}' is not the graph that {SPEC_NAME} describes, with input_size {size} and "
                f"{len(spec.classes)} classes: {what}. Copy the folder again, or export the run again."
            )


def check_process(opened_in: int, what: str = "this runner") -> None:
    """Raises EngineError in a process that was forked from the one in which an engine was opened.

    The engine's threads are not there, and it would wait for them for ever.

    Args:
        opened_in: the process's id at that time.
        what: was opened.
    """
    if opened_in != os.getpid():
        raise EngineError(
            f"{what} was opened in process {opened_in}, and this one ({os.getpid()}) was forked from it, without the "
            "engine's threads. Open the model after the fork only, or start processes with the method 'spawn'"
        )


def closed_error() -> UsageError:
    """The error of `infer` on a runner whose `with` block has ended."""
    return UsageError("this runner is closed. Open it again with open_runner")
