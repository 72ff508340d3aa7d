"""Image classifiers that know when to say "unknown", from training to the edge device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from ssod_edge.runtime.predict import Predictor

__version__ = "0.1.0"
__all__ = ["__version__", "open"]


def open(folder: str | os.PathLike[str], engine: str = "auto", **options: Any) -> Predictor:
    """Open an export folder for prediction.

    Use it as a context manager, or call `.close()`::

        with ssod_edge.open("runs/demo/export") as model:
            verdict = model.predict("photo.jpg")      # or a PIL image, or an HWC uint8 array
            print(verdict.class_name, verdict.confidence, verdict.known)

    Args:
        folder: an export folder, or the run folder that holds it.
        engine: "auto", "onnxruntime", "openvino" or "eager".
        options: `precision`, `artifact`, `device`, `threads`, `allow_untrained` of `ssod_edge.runtime.open_runner`.

    Raises:
        UsageError, ArtifactError, MissingExtraError, EngineError, VerificationError: see `open_runner`.
    """
    from ssod_edge.runtime.open import open_runner
    from ssod_edge.runtime.predict import Predictor

    return Predictor(open_runner(folder, engine=engine, **options))
