"""Why an engine cannot read an artifact, in one line with the way out."""

from __future__ import annotations

import re
from pathlib import Path

from ssod_edge.errors import EngineError
from ssod_edge.spec import Artifact

#: Lines of OpenVINO's messages that say where in its source a check failed, and not what.
_WHERE = re.compile(r"(Exception from|Check '.*' failed at) \S+:\d+:?$")
#: The same at the beginning of ONNX Runtime's: a status, a source file, and the signature of a function.
_STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : (.* failed:)?(/\S+:\d+ .*?\) (?=[A-Z]))?")


def parse_version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "10.3.0.post1" -> (10, 3, 0), "2026.4.1-22124-f0" -> (2026, 4, 1)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def cannot_load(package: str, version: str, artifact: Artifact, path: Path, error: BaseException) -> EngineError:
    """The error to raise.

    Args:
        package: the engine's, as `artifact.versions` and pip call it.
        version: of it, here.
        error: what it raised.
    """
    begin = f"{package} {version.partition('-')[0]} cannot load '{path}': "
    made_by = artifact.versions.get(package, "").partition("-")[0]
    if parse_version(version) < parse_version(made_by):
        return EngineError(
            f"{begin}it was made by {package} {made_by}. Install that: pip install '{package}>={made_by}'. Or make it "
            "anew here: ssod-edge package RUN where it was exported, and ssod-edge export --from BUNDLE here"
        )
    return EngineError(f"{begin}{reason(error)}")


def failed_run(package: str, error: BaseException) -> EngineError:
    """The error to raise where an engine fails while it runs, which it does where memory is short."""
    said = reason(error)
    short = "out of memory: use a smaller batch, or free some. " if "alloc" in said else ""
    return EngineError(f"{package} failed while it ran: {short}{said}")


def reason(error: BaseException) -> str:
    """What an engine's error says, without the places in its source code; at most 300 characters of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not _WHERE.match(line)] or lines or [type(error).__name__]
    return _STATUS.sub("", " ".join(telling))[:300].rstrip(" .")
