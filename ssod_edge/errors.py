"""Errors that a user can act on. Each one carries the exit code the command line ends with."""

from __future__ import annotations

EXIT_OK = 0
EXIT_SOME_FAILED = 1
EXIT_USAGE = 2
EXIT_MISSING = 3
EXIT_VERIFICATION = 4
EXIT_INTERRUPTED = 130

#: Optional modules and the extra of this package that installs them.
EXTRAS = {
    "torch": "train",
    "torchvision": "train",
    "timm": "train",
    "safetensors": "train",
    "sklearn": "train",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "pycuda": "jetson",  # the extra that brings it alone, so that no wheel hides JetPack's own TensorRT
    "nncf": "int8",
    "matplotlib": "report",
    "cv2": "video",
    "pillow_heif": "heic",
    "pytorch_ood": "baselines",
    "starlette": "serve",
    "uvicorn": "serve",
    "httptools": "serve",
    "python_multipart": "serve",
    "prometheus_client": "serve",
    "fsspec": "buckets",
    "pyarrow": "parquet",
    "ray": "ray",
}


class SsodEdgeError(Exception):
    """Base class: a message that names the problem and the fix, and an exit code."""

    exit_code = EXIT_SOME_FAILED


class ImageError(SsodEdgeError):
    """An image could not be read. One bad image never stops the others."""


class OutputError(SsodEdgeError):
    """A result could not be written (read-only folder, full disk). Nothing half-written is left."""


class ServerError(SsodEdgeError):
    """A server does not answer, or with something else than was asked for. Others are asked nevertheless."""


class TrainingError(SsodEdgeError):
    """Training cannot go on (a loss that is not finite); the last good checkpoint is kept."""


class UsageError(SsodEdgeError, ValueError):
    """An argument, option, data set or configuration value is wrong, or names something that is not there."""

    exit_code = EXIT_USAGE


class BusyError(UsageError):
    """Another process is at work on the same thing."""


class MissingExtraError(SsodEdgeError, ImportError):
    """An optional package is needed; the message names the command that installs it."""

    exit_code = EXIT_MISSING


class EngineError(SsodEdgeError):
    """The engine that was asked for is not available, or cannot run this artifact here."""

    exit_code = EXIT_MISSING


class ArtifactError(SsodEdgeError):
    """A checkpoint or artifact is cut short, edited, incomplete, of a newer schema or of another model."""

    exit_code = EXIT_VERIFICATION


class VerificationError(SsodEdgeError):
    """An artifact's numbers drifted from the reference beyond its precision's tolerance."""

    exit_code = EXIT_VERIFICATION


#: What is to be said beside the pip command.
NOTES = {
    "tensorrt": ". On a Jetson not so: there JetPack 6.1 or newer brings it, and an environment sees it if it was made "
    "with: python3 -m venv --system-site-packages",
}


def missing_extra(module: str, purpose: str, extra: str | None = None) -> MissingExtraError:
    """The error for an optional module that is not installed.

    Args:
        module: top-level module name, a key of `EXTRAS`.
        purpose: what needs it, e.g. "training".
        extra: that installs it for this purpose; None is the one in `EXTRAS`.
    """
    return MissingExtraError(
        f"{purpose} needs the package '{module}', which is not installed. "
        f"Install it with: pip install 'ssod-edge[{extra or EXTRAS[module]}]'{NOTES.get(module, '')}"
    )
