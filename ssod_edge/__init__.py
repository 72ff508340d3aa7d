"""Image classifiers that know when to say "unknown", from training to the edge device.

From Python: `train`, `evaluate` and `export` a model (extra `train`); on the device `open` it and ask for a `Verdict`,
let a `Monitor` watch these, and a `Collector` keep what it did not know. Importing the package loads nothing: each name
loads what it needs when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

    from ssod_edge.errors import (
        ArtifactError,
        BusyError,
        EngineError,
        ImageError,
        MissingExtraError,
        OutputError,
        ServerError,
        SsodEdgeError,
        TrainingError,
        UsageError,
        VerificationError,
    )
    from ssod_edge.export.graph.build import export_run as export
    from ssod_edge.runtime.field.collect import Collector
    from ssod_edge.runtime.field.monitor import Monitor
    from ssod_edge.runtime.predict import Predictor, Verdict

__version__ = "0.2.0"
__all__ = ["Collector", "Monitor", "Verdict", "__version__", "evaluate", "export", "open", "train"]
__all__ += ["ArtifactError", "BusyError", "EngineError", "ImageError", "MissingExtraError", "OutputError"]
__all__ += ["ServerError", "SsodEdgeError", "TrainingError", "UsageError", "VerificationError"]

#: `export` is the subpackage, which may be called.
_HOMES = {
    "Verdict": "runtime.predict",
    "Monitor": "runtime.field.monitor",
    "Collector": "runtime.field.collect",
    "export": "export",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ssod_edge' has no attribute '{name}'")
    home = importlib.import_module(f"ssod_edge.{_HOMES.get(name, 'errors')}")
    return home if name == "export" else getattr(home, name)


def open(folder: str | os.PathLike[str], engine: str = "auto", **options: Any) -> Predictor:
    """Open an export folder for prediction.

    Use it as a context manager, or call `.close()`::

        with ssod_edge.open("runs/demo/export") as model:
            verdict = model.predict("photo.jpg")      # or a PIL image, or an HWC uint8 array
            print(verdict.class_name, verdict.confidence, verdict.known)

    Args:
        folder: an export folder, or the run folder that holds it.
        engine: "auto", "tensorrt", "tensorrt_rtx", "openvino", "onnxruntime" or "eager".
        options: `precision`, `artifact`, `device`, `threads`, `allow_untrained` of
            `ssod_edge.runtime.open.open_runner`.

    Raises:
        UsageError, ArtifactError, MissingExtraError, EngineError, VerificationError: see `open_runner`.
    """
    from ssod_edge.runtime.open import open_runner
    from ssod_edge.runtime.predict import Predictor

    return Predictor(open_runner(folder, engine=engine, **options))


def train(data: str, backbone: str = "mobilenetv3", out: str | os.PathLike[str] = "runs", **settings: Any) -> Path:
    """Train a classifier that knows when to say "unknown"; returns its run folder. Needs the extra `train`.

    Args:
        data: a folder of CLASS/IMAGE files, or another data set that `ssod-edge train` takes.
        backbone: an alias of the paper's Table 6, or a model of timm with one linear classifier.
        out: folder of runs.
        settings: `size` (pixels), `fit`, `roi` (x, y, width, height), `recipe`, and the fields of
            `ssod_edge.config.TrainConfig` and `LossConfig`: the options of `ssod-edge train` under the same names.

    Raises:
        UsageError, BusyError, TrainingError, OutputError: see `ssod_edge.training.loop.train`.
    """
    from ssod_edge.training.loop import start_run

    return start_run(data, str(out), {"recipe": "short", "size": None, **settings, "backbone": backbone})


def evaluate(
    run: str | os.PathLike[str],
    id_data: str | None = None,
    ood_data: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """ID accuracy, and every score against every OOD set, as `eval --json` writes it. Needs the extra `train`.

    Args:
        run: a run folder or a checkpoint.
        id_data: images of known classes; None: the run's validation split.
        ood_data: name -> images of other things.
        options: the other fields of `ssod_edge.evaluation.evaluate.EvalOptions`.

    Raises:
        UsageError, ArtifactError, MissingExtraError: see `ssod_edge.evaluation.evaluate.evaluate`.
    """
    from ssod_edge.evaluation.evaluate import EvalOptions
    from ssod_edge.evaluation.evaluate import evaluate as judge

    return judge(str(run), EvalOptions(id_data=id_data, ood_data=ood_data, **options))[0]
