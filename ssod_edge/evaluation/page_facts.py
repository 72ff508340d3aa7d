"""What a report says besides of its images: artifacts, what to expect, how the model was trained, drift."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from ssod_edge import __version__
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.evaluation.page_judged import Judged
from ssod_edge.json_reader import read_json
from ssod_edge.runtime.export import Export
from ssod_edge.spec import Artifact, Spec

#: Rows of a table: a name, and what is so.
Rows = list[tuple[str, str]]


def read_bench(path: str) -> dict[str, Any]:
    """A record of `ssod-edge bench --json`: `model`, a hash; `rows` by artifact; `environment`; `method`.

    Raises:
        UsageError: there is none.
        ArtifactError: it is damaged.
    """
    try:
        record = read_json(path)
        rows = {str(row["artifact"]): row for row in record["rows"]}
        found = {"model": record["export"]["model"], "rows": rows}
    except FileNotFoundError:
        raise UsageError(
            f"--bench '{path}' does not exist. Make it with: ssod-edge bench EXPORT --json {path}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"'{path}' is no record of ssod-edge bench ({error})") from error
    return {**found, "environment": record.get("environment", {}), "method": record.get("method", {})}


def check_bench(bench: Mapping[str, Any], judged: Judged) -> None:
    """Raises UsageError where a record is of another export."""
    if judged.spec is None or bench["model"] != judged.spec.reference_sha256:
        raise UsageError("the record of --bench is of another export. Run ssod-edge bench on this one")


def artifact_rows(judged: Judged, bench: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A row for each artifact of the export, and the bench's latency and accuracy where there is one."""
    if judged.spec is None:
        return []
    folder = Export.place(judged.place)
    rows = []
    for artifact in judged.spec.artifacts:
        size = sum((folder / name).stat().st_size for name in artifact.files if (folder / name).is_file())
        found = (bench or {"rows": {}})["rows"].get(artifact.name, {})
        rows.append({"name": artifact.name, "size": size or None, **_proof(artifact), **_measured(found)})
    return rows


def _proof(artifact: Artifact) -> dict[str, Any]:
    figures, threshold = artifact.verification or {}, artifact.threshold
    return {
        "threshold": None if threshold is None else threshold.value,
        "tpr": None if threshold is None else threshold.target_tpr,
        "images": None if threshold is None else threshold.n,
        "verified": figures.get("passed"),
        "proved_on": figures.get("n"),
        "flips": figures.get("decision_flips"),
        "agreement": figures.get("class_agreement"),
    }


def _measured(row: Mapping[str, Any]) -> dict[str, Any]:
    latency = row.get("latency_ms") or {}
    keys = {"device": "device", "top1": "top1", "false_reject": "false_reject", "false_accept": "false_accept"}
    return {"p50": latency.get("p50"), "p90": latency.get("p90"), **{key: row.get(name) for key, name in keys.items()}}


def expected(judged: Judged) -> dict[str, Any] | None:
    """What to expect of classes that were not taught, the hardest first, and of another light; None if unknown."""
    if judged.spec is None or not judged.spec.expected:
        return None
    found = judged.spec.expected
    new = sorted(found.get("new_class", {}).items(), key=lambda item: float(item[1]["auroc"]))
    return {
        "classes": [{"name": name, **row} for name, row in new],
        "disturbed": found.get("disturbed"),
    }


def check_monitor(found: Mapping[str, Any], judged: Judged) -> None:
    """Raises UsageError where the summary of a monitor file is of another model."""
    if (found["backbone"], found["score"]) != (judged.backbone, judged.score):
        raise UsageError(f"the file of --monitor is of another model ({found['backbone']}, score {found['score']})")


def model_card(judged: Judged) -> list[tuple[str, Rows]]:
    """How the model was made, as headed tables; what nobody has recorded is not there."""
    spec, run = judged.spec, judged.run
    source: dict[str, Any] = {} if spec is None else spec.source
    meta = source if run is None else {**source, **run.meta}
    config = _config(judged)
    data: Rows = [
        ("Training data", str(meta.get("data", ""))),
        ("its names and labels, SHA-256", str(meta.get("data_fingerprint", ""))),
        ("Validation data", str(meta.get("val_data") or "")),
        ("Split, SHA-256", str(meta.get("splits_hash", ""))),
        ("Images", _counts(judged)),
        ("Taught as unknown", str(meta.get("negatives") or "")),
        *((f"Judged here: {name}", f"{images.data}, {len(images.indices)} images") for name, images in _named(judged)),
    ]
    training: Rows = [
        ("Backbone", judged.backbone),
        ("Input", _input(judged)),
        ("Weights before training", str(config.get("weights", ""))),
        ("Tuned", str(meta.get("tuned") or config.get("tune") or "")),
        ("Epoch", str(meta.get("epoch", ""))),
        ("Seed", str(config.get("seed", ""))),
        ("Checkpoint, SHA-256", str(meta.get("checkpoint_sha256", "") if run is None else run.checkpoint_sha256)),
    ]
    made: Rows = [
        ("This report", f"ssod-edge {__version__}, Python {platform.python_version()}, {_now()}"),
        ("Judged by", judged.judge),
    ]
    tables = [("Data", data), ("Training", training), ("Rejection", _rejection(judged)), ("Versions", _versions(spec))]
    tables += [("This report", made), ("All settings of the training", _flat(config))]
    return [(name, kept) for name, rows in tables if (kept := [row for row in rows if row[1]])]


def _named(judged: Judged) -> list[tuple[str, Any]]:
    return [("known", judged.known), *judged.unknown.items()]


def _config(judged: Judged) -> dict[str, Any]:
    """The settings of the run; empty where they are gone."""
    if judged.run is None:
        return {}
    try:
        return read_json(judged.run.folder / "config.json")
    except (OSError, ValueError):
        return {}


def _counts(judged: Judged) -> str:
    if judged.run is None:
        return ""
    try:
        _, splits = judged.run.splits("")
    except UsageError:
        return ""
    parts = {"to train on": splits.train, "to validate on": splits.val, "for thresholds": splits.calib}
    folds = judged.run.folds
    if folds is not None:
        parts = {"to train on and, out of fold, for thresholds": folds.images, "to validate on": splits.val}
    return ", ".join(f"{len(part):,} {what}" for what, part in parts.items())


def _input(judged: Judged) -> str:
    settings = judged.preprocess
    region = f", region {','.join(map(str, settings.roi))}" if settings.roi else ""
    return f"{settings.input_size} px, {settings.fit}{region}, {settings.interpolation}"


def _rejection(judged: Judged) -> Rows:
    spec, threshold = judged.spec, judged.threshold
    rows: Rows = [("Score", judged.score)]
    if threshold is not None:
        of = f"{threshold.target_tpr:.4g} of known images, from {threshold.n} ({threshold.data})"
        rows.append(("Threshold", f"{threshold.value:.6g}, to keep {of}"))
    if spec is None:
        return rows
    rows += [("Why this score", spec.score.get("evidence", ""))]
    rows += [("Fitted on", f"{spec.detector['images']} images, {spec.detector['data']}")] if spec.detector else []
    rows += [("Temperature", f"{spec.temperature:.4g}")]
    return [*rows, ("Version", f"{spec.version}" if spec.taught else ""), *_flat(spec.detector.get("settings", {}))]


def _versions(spec: Spec | None) -> Rows:
    found: dict[str, str] = {}
    for artifact in spec.artifacts if spec else ():
        found |= artifact.versions
    return list(found.items())


def _flat(values: Mapping[str, Any], before: str = "") -> Rows:
    """Nested settings as rows."""
    rows: Rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{name}.")
        elif value is not None:
            rows.append((before + name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)))
    return rows


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
