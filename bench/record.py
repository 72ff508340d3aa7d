"""The JSON face of a bench. Its keys are stable; a file is whole or not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssod_edge.bench.compare import compare
from ssod_edge.bench.latency import Samples, summarise_stages
from ssod_edge.errors import UsageError
from ssod_edge.json_reader import from_json, read_json

SCHEMA_VERSION = 1

#: Keys of a record, in their order.
RECORD_KEYS = ("schema_version", "environment", "command", "method", "export", "data", "cost_of_unknown", "rows")

_Figures = dict[str, float | None]
#: Keys of a row, in their order, and what each holds. `repeats_ms` and `ood_sets` hold the evidence behind the columns
#: before them.
ROW_TYPES: dict[str, Any] = {
    "artifact": str,
    **dict.fromkeys(("sha256", "engine", "precision", "device"), str | None),
    "batch": int,
    "latency_ms": _Figures | None,
    "stages_ms": dict[str, _Figures] | None,
    **dict.fromkeys(("throughput_ips", "size_mb", "rss_mb"), float | None),
    **dict.fromkeys(("top1", "agreement", "auroc", "fpr_at_id_tpr95"), float | None),
    "decision_flips": int | None,
    "status": str,
    "error": str | None,
    "repeats_ms": dict[str, tuple[float, ...]] | None,
    "ood_sets": dict[str, Any] | None,
    "power": dict[str, Any] | None,
    **dict.fromkeys(("false_accept", "false_reject"), float | None),
    "deployment": dict[str, Any] | None,
}
ROW_KEYS = tuple(ROW_TYPES)
#: Keys that records of earlier releases lack.
LATER_KEYS = ("power", "false_accept", "false_reject", "deployment")


def latency_figures(repeats: Sequence[Samples], batch: int) -> dict[str, Any]:
    """The latency columns of a row, from its repeats (int64 [n, len(STAGES)] nanoseconds each).

    Returns:
        - latency_ms: end to end over all repeats together; see `latency.summarise`.
        - stages_ms: the same for each stage and "end_to_end".
        - throughput_ips: images per second of this single stream, end to end.
        - repeats_ms: p50 and p90 end to end, and p50 of compute, of each repeat: their spread is the noise.
    """
    stages = summarise_stages(np.concatenate(list(repeats)))
    each = [summarise_stages(samples) for samples in repeats]
    latency = stages["end_to_end"]
    return {
        "latency_ms": latency,
        "stages_ms": stages,
        "throughput_ips": round(1000 * batch / float(latency["mean"] or 1), 2),
        "repeats_ms": {
            "p50": [repeat["end_to_end"]["p50"] for repeat in each],
            "p90": [repeat["end_to_end"]["p90"] for repeat in each],
            "compute_p50": [repeat["compute"]["p50"] for repeat in each],
        },
    }


def load_record(path: str | Path) -> dict[str, Any]:
    """Read a record that `write_json` wrote.

    Raises:
        UsageError: missing, not JSON, not a bench record, or of a newer schema.
    """
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"'{path}' cannot be read as a bench record ({error}). Make one with: ssod-edge bench --json FILE"
        ) from error
    if not set(RECORD_KEYS) <= record.keys():
        raise UsageError(f"'{path}' is not a bench record. Make one with: ssod-edge bench --json FILE")
    if type(record["schema_version"]) is not int or record["schema_version"] > SCHEMA_VERSION:
        raise UsageError(
            f"'{path}' has schema version {record['schema_version']}; this release reads up to {SCHEMA_VERSION}. "
            "Install a newer one (docs/install.md)"
        )
    rows, needed = record["rows"], set(ROW_KEYS) - set(LATER_KEYS)
    if not isinstance(rows, list) or any(not isinstance(row, dict) or not needed <= row.keys() for row in rows):
        raise UsageError(f"'{path}' has rows that lack keys. Make it again with: ssod-edge bench --json FILE")
    record["rows"] = [{key: row.get(key) for key in (*ROW_KEYS, *row)} for row in rows]
    try:
        for key in ("environment", "method", "export", "data", "cost_of_unknown"):
            from_json(dict[str, Any], record[key], key)
        from_json(dict[str, Any], record["environment"].get("packages"), "environment.packages")
        for number, row in enumerate(record["rows"]):
            for key, kind in ROW_TYPES.items():
                from_json(kind, row[key], f"rows[{number}].{key}")
    except UsageError as error:
        raise UsageError(f"'{path}' is damaged ({error}). Make it again with: ssod-edge bench --json FILE") from error
    try:  # what nothing above has looked into
        compare(record, record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"'{path}' is damaged ({type(error).__name__}: {error}). Make it again with: ssod-edge bench --json FILE"
        ) from error
    return record
