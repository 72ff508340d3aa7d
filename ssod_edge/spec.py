"""`ssod.json`: what an export folder holds, how it was made, and the evidence behind it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ssod_edge.config import Preprocess, ScoreName, from_dict
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.files import sha256_file, write_json

SCHEMA_VERSION = 1
SPEC_NAME = "ssod.json"
REFERENCE_NAME = "reference.npz"


@dataclass(frozen=True)
class Threshold:
    """`known = ood_score <= value`, and the in-distribution data behind the value.

    Attributes:
        value: on the artifact's own `ood_score`.
        target_tpr: share of in-distribution images that must stay known.
        n: images the quantile was taken from.
        data: which images (split name and hash, or the user's data set).
        fitted_tpr: share of those n images that are known at `value`.
    """

    value: float
    target_tpr: float
    n: int
    data: str
    fitted_tpr: float


@dataclass(frozen=True)
class Artifact:
    """One deployable file set.

    Attributes:
        name: e.g. "onnx-fp16" or "openvino-fp32".
        engine: "onnxruntime" or "openvino".
        precision: "fp32" or "fp16", as stored in the graph.
        files: path relative to the export folder -> SHA-256; the first one is what the engine opens.
        opset: of the ONNX graph it was made from.
        versions: package -> version it was built with.
        threshold: None for untrained weights.
        verification: figures of `ssod_edge.runtime.verify.Verification`; None until it ran.
    """

    name: str
    engine: str
    precision: str
    files: dict[str, str]
    opset: int
    versions: dict[str, str]
    threshold: Threshold | None = None
    verification: dict[str, Any] | None = None

    @property
    def main_file(self) -> str:
        """Path, relative to the export folder, of the file the engine opens."""
        return next(iter(self.files))


@dataclass(frozen=True)
class Spec:
    """An export folder's contents. `score` holds {"name": ScoreName, "evidence": str}."""

    backbone: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    score: dict[str, str]
    trained: bool
    reference_sha256: str
    source: dict[str, Any] = field(default_factory=dict)
    artifacts: tuple[Artifact, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def score_name(self) -> ScoreName:
        return self.score["name"]  # type: ignore[return-value]

    def artifact(self, name: str) -> Artifact:
        """The artifact called `name`.

        Raises:
            UsageError: there is none; the message lists those there are.
        """
        for artifact in self.artifacts:
            if artifact.name == name:
                return artifact
        known = ", ".join(a.name for a in self.artifacts) or "none"
        raise UsageError(f"this export has no artifact '{name}'; it has: {known}")

    def with_artifact(self, artifact: Artifact) -> Spec:
        """A copy in which `artifact` is added, or replaces the one of the same name."""
        names = [a.name for a in self.artifacts]
        if artifact.name in names:
            kept = tuple(artifact if a.name == artifact.name else a for a in self.artifacts)
        else:
            kept = (*self.artifacts, artifact)
        return replace(self, artifacts=kept)


def save_spec(spec: Spec, folder: str | Path) -> Path:
    """Write `ssod.json` into an export folder, atomically."""
    return write_json(Path(folder) / SPEC_NAME, asdict(spec))


def load_spec(folder: str | Path) -> Spec:
    """Read `ssod.json` of an export folder.

    Raises:
        ArtifactError: missing, not JSON, of a newer schema, or with fields that are missing or wrong.
    """
    path = Path(folder) / SPEC_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"'{path}' does not exist. Make an export with: ssod-edge export") from None
    except NotADirectoryError:
        raise ArtifactError(f"'{folder}' is not an export folder; give the folder that holds {SPEC_NAME}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"'{path}' cannot be read ({error}). Export the run again.") from error
    if not isinstance(values, dict) or not isinstance(values.get("schema_version"), int):
        raise ArtifactError(f"'{path}' is not an ssod-edge spec. Export the run again.")
    if values["schema_version"] > SCHEMA_VERSION:
        raise ArtifactError(
            f"'{path}' has schema version {values['schema_version']}; this release reads up to {SCHEMA_VERSION}. "
            "Update with: pip install -U ssod-edge"
        )
    try:
        values["preprocess"] = from_dict(Preprocess, values["preprocess"])
        values["classes"] = tuple(values["classes"])
        values["artifacts"] = tuple(_artifact(a) for a in values["artifacts"])
        return from_dict(Spec, values)
    except (KeyError, TypeError, AttributeError, UsageError) as error:
        raise ArtifactError(f"'{path}' is damaged ({error}). Export the run again.") from error


def _artifact(values: dict[str, Any]) -> Artifact:
    values = dict(values)
    if values.get("threshold") is not None:
        values["threshold"] = from_dict(Threshold, values["threshold"])
    artifact = from_dict(Artifact, values)
    if not artifact.files:
        raise UsageError(f"artifact '{artifact.name}' lists no files")
    return artifact


def check_files(folder: str | Path, artifact: Artifact) -> Path:
    """Compare every file of an artifact with its SHA-256; returns the path the engine opens.

    A hash catches corruption and mix-ups, not an attacker who can edit `ssod.json` too.

    Raises:
        ArtifactError: a file is missing, outside the folder, or its bytes changed.
    """
    folder = Path(folder)
    for name, expected in artifact.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(f"artifact '{artifact.name}' names a file outside its folder: '{name}'")
        check_hash(path, expected)
    return folder / artifact.main_file


def check_hash(path: Path, expected: str) -> None:
    """Raises ArtifactError unless the file exists and has this SHA-256."""
    if not path.is_file():
        raise ArtifactError(f"'{path}' is missing. Export the run again.")
    found = sha256_file(path)
    if found != expected:
        raise ArtifactError(
            f"'{path}' was changed or cut short: SHA-256 {found[:12]}... instead of {expected[:12]}... "
            "Copy the folder again, or export the run again."
        )
