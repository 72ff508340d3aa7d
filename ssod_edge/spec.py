"""`ssod.json`: what an export folder holds, how it was made, and the evidence behind it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ssod_edge.config import Preprocess, has_state
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.external_data import external_files
from ssod_edge.files import real_path, sha256_file, write_json
from ssod_edge.json_reader import from_json, read_json

SCHEMA_VERSION = 4
SPEC_NAME = "ssod.json"
REFERENCE_NAME = "reference.npz"
DETECTOR_NAME = "detector.npz"
FEATURES_NAME = "features.npz"

#: What every graph gives, in its order.
LOGIT_OUTPUTS = ("logits", "probs", "id_logit", "ood_score")
#: What graphs of schema 4 give besides: the p-value of "known", and whether it is.
VERDICT_OUTPUTS = ("p_known", "known")
#: The inputs from which they are computed, see `ssod_edge.detect.confidence.verdict_inputs`.
VERDICT_INPUTS = ("threshold", "p_scores", "p_levels")
#: Of a taught export's `source`: hash of the run's checkpoint that its trunk still is, for `train --from`.
TRUNK_SHA256 = "trunk_checkpoint_sha256"
#: What can be asked for besides, by its output: the features that the last layer reads.
FEATURE_OUTPUTS = {"pooled": "features_pooled"}


@dataclass(frozen=True)
class Threshold:
    """`known = ood_score <= value`, and the in-distribution data behind the value.

    Attributes:
        value: on the artifact's own `ood_score`.
        target_tpr: share of in-distribution images that must stay known.
        n: images the quantile was taken from.
        data: which images (split name and hash, or the user's data set).
        fitted_tpr: share of those n images that are known at `value`.
        id_quantiles: of those n scores, ascending, at the ranks of `ssod_edge.detect.metrics.quantile_ranks`:
            what a monitor compares with. Empty in specs of earlier releases.
        id_highest: the largest of those n scores; None in specs of earlier releases.
    """

    value: float
    target_tpr: float
    n: int
    data: str
    fitted_tpr: float
    id_quantiles: tuple[float, ...] = ()
    id_highest: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.target_tpr < 1:
            raise UsageError(f"target_tpr must be in (0, 1), got {self.target_tpr}")
        if not 0 <= self.fitted_tpr <= 1:
            raise UsageError(f"fitted_tpr must be in [0, 1], got {self.fitted_tpr}")
        if self.n < 1:
            raise UsageError(f"n must be at least 1 image, got {self.n}")
        if len(self.id_quantiles) > self.n or list(self.id_quantiles) != sorted(self.id_quantiles):
            raise UsageError(f"id_quantiles must be at most n = {self.n} ascending scores")

    @staticmethod
    def complete(values: dict[str, Any]) -> dict[str, Any]:
        """The JSON of an earlier release with the fields that it did not have (`ssod_edge.json_reader`)."""
        return {"id_quantiles": [], "id_highest": None, **values}


@dataclass(frozen=True)
class Artifact:
    """One deployable file set.

    Attributes:
        name: e.g. "onnx-fp16" or "openvino-fp32".
        engine: "onnxruntime", "openvino", "tensorrt" or "tensorrt_rtx".
        precision: "fp32", "fp16" or "int8", as stored in the graph.
        files: path relative to the export folder -> SHA-256; the first one is what the engine opens.
        opset: of the ONNX graph it was made from.
        versions: package -> version it was built with.
        threshold: None for untrained weights, and until `calibrate` where it could not run when it was built.
        verification: figures of `ssod_edge.runtime.verify.Verification`; None until it ran.
        build: how it was made, where there is more to say: what an int8 graph was calibrated with and which layers
            stayed in floating point, the GPU and the shapes that a plan was built for.
    """

    name: str
    engine: str
    precision: str
    files: dict[str, str]
    opset: int
    versions: dict[str, str]
    threshold: Threshold | None = None
    verification: dict[str, Any] | None = None
    build: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.files:
            raise UsageError(f"artifact '{self.name}' lists no files")
        if self.opset < 0:
            raise UsageError(f"opset must be 0 or more, got {self.opset}")
        if not isinstance((self.verification or {}).get("failures", []), (list, tuple)):
            raise UsageError(f"the verification of artifact '{self.name}' must list its failures")

    @staticmethod
    def complete(values: dict[str, Any]) -> dict[str, Any]:
        """As `Threshold.complete`."""
        return {"build": {}, **values}

    @property
    def main_file(self) -> str:
        """Path, relative to the export folder, of the file the engine opens."""
        return next(iter(self.files))


@dataclass(frozen=True)
class Spec:
    """An export folder's contents.

    Attributes:
        score: {"name": see `ssod_edge.config.score_parts`, "evidence": why this one}.
        detector: where the score has a state (`ssod_edge.config.has_state`): {"sha256": of `DETECTOR_NAME`, "data",
            "images": what it was fitted on, "settings"}. Every artifact holds its state as well.
        choice: what `export --score auto` chose by; empty otherwise.
        outputs: what every graph gives; those of releases before schema 4 give `LOGIT_OUTPUTS` alone.
        temperature: T of `probs` = softmax(logits / T); no score knows it.
        expected: what to expect of classes that were not taught, and of another light or camera, where training left
            features alone (`ssod_edge.evaluation.left_out.expectation`); empty otherwise.
        features: where the export holds features to fit it again with, for `ssod-edge teach`: {"sha256": of
            `FEATURES_NAME`, "images", "held_out": how many}, and "tuned" ("branch", "upper", "all") where more than the
            last layer learnt; empty otherwise.
    """

    backbone: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    score: dict[str, str]
    trained: bool
    reference_sha256: str
    source: dict[str, Any] = field(default_factory=dict)
    artifacts: tuple[Artifact, ...] = ()
    detector: dict[str, Any] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = LOGIT_OUTPUTS
    temperature: float = 1.0
    expected: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise UsageError(f"classes must be at least 2 names, got {len(self.classes)}")
        try:
            stateful = has_state(str(self.score.get("name")))
        except UsageError as error:
            raise UsageError(f"score.name: {error}") from error
        if stateful != isinstance(self.detector.get("sha256"), str):
            raise UsageError(
                f"detector must have the sha256 of {DETECTOR_NAME} if, and only if, score.name has a state"
            )
        if self.outputs[:4] != LOGIT_OUTPUTS or len(set(self.outputs)) < len(self.outputs):
            raise UsageError(f"outputs must begin with {', '.join(LOGIT_OUTPUTS)}, each once")
        if not self.temperature > 0:
            raise UsageError(f"temperature must be above 0, got {self.temperature}")
        if len({artifact.name for artifact in self.artifacts}) < len(self.artifacts):
            raise UsageError("two artifacts have the same name")
        if self.features:
            from_json(str, self.features.get("sha256"), "features.sha256")
        _check_source(self.source)

    @staticmethod
    def complete(values: dict[str, Any]) -> dict[str, Any]:
        """As `Threshold.complete`."""
        return {"expected": {}, "features": {}, **values}

    @property
    def score_name(self) -> str:
        """One of `ssod_edge.config.SHIPPED_SCORES`, or a sum of some, joined by "+"."""
        return self.score["name"]

    @property
    def version(self) -> int:
        """1 as exported; a lesson makes the next one (`ssod-edge history`)."""
        return int(self.source.get("version", 1))

    @property
    def taught(self) -> dict[str, Any]:
        """The lesson that made this version (`ssod_edge.teach`); empty as exported."""
        return dict(self.source.get("taught", {}))

    @property
    def lineage(self) -> tuple[dict[str, Any], ...]:
        """The versions that this one comes from, the first one first: {"version", "sha256": of its spec,
        "reference_sha256", "taught"}. `calibrate` changes the first hash and not the second.
        """
        return tuple(self.source.get("lineage", ()))

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files that the spec accounts for, each once."""
        listed = (*self.shared_files, *(name for artifact in self.artifacts for name in artifact.files))
        return tuple(dict.fromkeys(listed))

    @property
    def shared_files(self) -> dict[str, str]:
        """The files that belong to no artifact -> SHA-256."""
        others = {DETECTOR_NAME: self.detector, FEATURES_NAME: self.features}
        return {REFERENCE_NAME: self.reference_sha256, **{name: of["sha256"] for name, of in others.items() if of}}

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
        named = {a.name: a for a in (*self.artifacts, artifact)}  # a name keeps its place
        return replace(self, artifacts=tuple(named.values()))


#: What is read of a lesson, and of a version in the record of a later one.
_LESSON = {"photos": dict[str, int], "new": tuple[str, ...], "forgotten": tuple[str, ...], "time": str | None}
_LESSON |= {"data": str | None, "proof": dict[str, Any]}
_VERSION = {"version": int, "sha256": str, "reference_sha256": str, "taught": dict[str, Any]}


def _check_source(source: dict[str, Any]) -> None:
    """Raises UsageError where what a lesson wrote is not what it writes."""
    if from_json(int, source.get("version", 1), "source.version") < 1:
        raise UsageError(f"source.version must be at least 1, got {source['version']}")
    lineage = from_json(tuple[dict[str, Any], ...], source.get("lineage", ()), "source.lineage")
    for number, entry in enumerate(lineage):
        _check_keys(_VERSION, entry, f"source.lineage[{number}]")
    taught = from_json(dict[str, Any], source.get("taught", {}), "source.taught")
    if taught and not lineage:
        raise UsageError("source.taught is a lesson, and source.lineage names no version that it was given to")
    for name, lesson in [("source.taught", taught), *(("source.lineage", entry["taught"]) for entry in lineage)]:
        if lesson:
            _check_keys(_LESSON, lesson, name)
            proof = {"accuracy": tuple[float, float], "new": dict[str, dict[str, float]]}
            _check_keys(proof, lesson["proof"], f"{name}.proof")
            for row in lesson["proof"]["new"].values():
                _check_keys({"recall": float}, row, f"{name}.proof.new")


def _check_keys(kinds: dict[str, Any], values: dict[str, Any], name: str) -> None:
    for key, kind in kinds.items():
        from_json(kind, values.get(key), f"{name}.{key}")


def save_spec(spec: Spec, folder: str | Path) -> Path:
    """Write `ssod.json` into an export folder, atomically."""
    return write_json(Path(folder) / SPEC_NAME, spec_values(spec))


def spec_values(spec: Spec) -> dict[str, Any]:
    """What `ssod.json` says, and a hash of it."""
    values = asdict(spec)
    return {**values, "sha256": spec_hash(values)}


def spec_hash(values: dict[str, Any]) -> str:
    """SHA-256 of what a spec says, however it is laid out: a flipped bit would move a threshold in silence."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_spec(folder: str | Path) -> Spec:
    """Read `ssod.json` of an export folder.

    Raises:
        UsageError: there is none, so that this is no export folder.
        ArtifactError: not JSON, of a newer schema, or with fields that are missing or wrong.
    """
    path = Path(folder) / SPEC_NAME
    try:
        values = read_json(path)
    except FileNotFoundError:
        if not Path(folder).exists():
            raise UsageError(f"'{folder}' does not exist. Give the folder of a run or an export: runs/NAME") from None
        if (Path(folder) / "best.safetensors").exists():
            command = f"ssod-edge export {shlex.quote(str(folder))}"
            raise UsageError(f"the run '{folder}' has no export yet. Make one with: {command}") from None
        raise UsageError(f"'{path}' does not exist. Give the folder of a run or an export: runs/NAME") from None
    except NotADirectoryError:
        raise UsageError(f"'{folder}' is not an export folder; give the folder that holds {SPEC_NAME}") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' cannot be read ({error}). Export the run again.") from error
    version = values.get("schema_version")
    if type(version) is not int or version < 1:
        raise ArtifactError(f"'{path}' is not an ssod-edge spec. Export the run again.")
    if version > SCHEMA_VERSION:
        raise ArtifactError(
            f"'{path}' has schema version {version}; this release reads up to {SCHEMA_VERSION}. "
            "Install a newer one (docs/install.md)"
        )
    if version >= 4 and values.pop("sha256", None) != spec_hash(values):
        raise ArtifactError(
            f"'{path}' was changed after it was written: its hash does not match. Copy the folder again, or export the "
            "run again. Of a whole export, ssod-edge calibrate sets another threshold."
        )
    if version < 3:  # every score was one of the logits
        values |= {"detector": {}, "choice": {}}
    if version < 4:
        values |= {"outputs": LOGIT_OUTPUTS, "temperature": 1.0, "schema_version": SCHEMA_VERSION}
    try:
        spec: Spec = from_json(Spec, values)
    except UsageError as error:
        raise ArtifactError(f"'{path}' is damaged ({error}). Export the run again.") from error
    return spec


def check_files(folder: str | Path, artifact: Artifact) -> Path:
    """Compare every file of an artifact with its SHA-256; returns the path the engine opens.

    A hash catches corruption and mix-ups, not an attacker who can edit `ssod.json` too.

    Raises:
        ArtifactError: a file is missing, outside the folder, or its bytes changed; or an ONNX file keeps weights in
            one that is, or that the artifact does not list.
    """
    folder = Path(folder)
    for name, expected in artifact.files.items():
        path = folder / name
        if "\0" in name or not real_path(path).is_relative_to(real_path(folder)):
            raise ArtifactError(f"artifact '{artifact.name}' names a file outside its folder: '{name}'")
        check_hash(path, expected)
        for other in external_files(path) if path.suffix == ".onnx" else ():
            if other.relative_to(real_path(folder)).as_posix() not in artifact.files:
                raise ArtifactError(
                    f"'{path}' keeps weights in '{other.name}', which {SPEC_NAME} has no hash of. Export the run again."
                )
    return folder / artifact.main_file


def check_hash(path: Path, expected: str) -> None:
    """Raises ArtifactError unless the file exists and has this SHA-256."""
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise ArtifactError(f"'{path}' is missing. Export the run again.")
    found = sha256_file(path)
    if found != expected:
        raise ArtifactError(
            f"'{path}' was changed or cut short: SHA-256 {found[:12]}... instead of {expected[:12]}... "
            "Copy the folder again, or export the run again."
        )
