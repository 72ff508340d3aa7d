"""Optional packages: whether they are there, and the one way to import them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ssod_edge.errors import EXTRAS, EngineError, MissingExtraError, SsodEdgeError, missing_extra

#: Module -> its name on the package index, where the two differ.
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "PIL": "Pillow",
    "tensorrt_rtx": "tensorrt-rtx",
    "cv2": "opencv-python-headless",
    "pytorch_ood": "pytorch-ood",
    "pillow_heif": "pillow-heif",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}

#: Packages that report their use to their maker over the network, and write an id into the user's home folder for it;
#: each goes without where the module that does so cannot be imported.
REPORTING = ("openvino", "nncf")
REPORTER = "openvino_telemetry"
#: ONNX Runtime has its own, which begins when it is imported, whoever imports it, and writes an id and a data base.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def is_there(module: str) -> bool:
    """Whether a top-level module is installed, which is not imported; empty folders of a removed package are none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and (spec.origin is not None or spec.submodule_search_locations is None)


def require(modules: Sequence[str], purpose: str) -> None:
    """Find out before the work what is missing of several optional modules.

    Raises:
        MissingExtraError: with all that are missing, and the one command that installs them.
    """
    missing = [module for module in dict.fromkeys(modules) if not is_there(module)]
    if len(missing) == 1:
        raise missing_extra(missing[0], purpose)
    if missing:
        names, extras = ", ".join(f"'{name}'" for name in missing), ",".join(sorted({EXTRAS[name] for name in missing}))
        raise MissingExtraError(
            f"{purpose} needs the packages {names}, which are not installed. Install them with: "
            f"pip install 'ssod-edge[{extras}]'"
        )


def load(module: str, purpose: str = "", extra: str | None = None) -> Any:
    """Import an optional module.

    Args:
        module: maybe one within a package, such as "pycuda.driver".
        purpose: what needs it, for the message; "" is its engine.
        extra: of this package that installs it for this purpose; None is the one in `EXTRAS`.

    Raises:
        MissingExtraError: it is not installed, or nothing but empty folders is left of it.
        EngineError: it is there, and fails to load, in whatever way: a system library lacks, there is no home folder.
    """
    top = module.partition(".")[0]
    if top != module:
        load(top, purpose, extra)
    try:
        with _unreported(top):
            found = importlib.import_module(module)
    except Exception as error:
        raise _failed(top, error, purpose, extra) from error
    folders = list(getattr(found, "__path__", []))
    if folders and getattr(found, "__file__", None) is None:
        places = ", ".join(f"'{folder}'" for folder in folders)
        missing = missing_extra(top, _purpose(top, purpose), extra)
        raise MissingExtraError(f"{missing}. Empty folders of it are in {places}")
    return found


@contextmanager
def _unreported(top: str) -> Iterator[None]:
    """Import a package of `REPORTING` as if `REPORTER` were not installed, unless the program has imported that."""
    if top not in REPORTING or REPORTER in sys.modules:
        yield
        return
    sys.modules[REPORTER] = None  # type: ignore[assignment]  # the import system's own sign for "not there"
    try:
        yield
    finally:
        del sys.modules[REPORTER]


def _failed(top: str, error: Exception, purpose: str, extra: str | None) -> MissingExtraError | EngineError:
    if isinstance(error, ModuleNotFoundError) and error.name == top:
        return missing_extra(top, _purpose(top, purpose), extra)
    lines = str(error).strip().splitlines()
    reason = lines[0][:300].rstrip(".") if lines else "no message"
    if not isinstance(error, ImportError):
        reason = f"{type(error).__name__}: {reason}"
    fix = f"pip install --force-reinstall --no-deps {DISTRIBUTIONS.get(top, top)}"
    return EngineError(f"'{top}' is installed and cannot be loaded: {reason}. Install it again: {fix}")


def failed_import(error: BaseException) -> SsodEdgeError | None:
    """What an error is that came from the import of a package of others, by whatever module; None: it did not.

    It is the innermost module body under way that is neither ours nor Python's.
    """
    if isinstance(error, SsodEdgeError | KeyboardInterrupt | MemoryError):
        return None
    if isinstance(error, ModuleNotFoundError):
        top = (error.name or "").partition(".")[0]
        return missing_extra(top, "this command") if top in EXTRAS else None
    tops = [
        str(frame.f_globals.get("__name__")).partition(".")[0]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    ours = {"ssod_edge", "__main__", *sys.stdlib_module_names}
    found = next((top for top in reversed(tops) if top not in ours), None)
    if found is None and isinstance(error, ImportError):
        found = next((top for top in [(error.name or "").partition(".")[0]] if top in EXTRAS), None)
    return _failed(found, error, "", None) if found is not None and isinstance(error, Exception) else None


def _purpose(top: str, purpose: str) -> str:
    return purpose or f"the {top} engine"
