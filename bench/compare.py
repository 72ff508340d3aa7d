"""What moved between two benches, beyond the noise of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ssod_edge.bench.backends import EAGER

#: Smallest relative change of a latency that counts: what a restart of the process alone can do.
LATENCY_FLOOR = 0.02
#: The same for memory, which is read once.
RSS_FLOOR = 0.05
#: Accuracy on the same images is exact but for the rounding of decimals in a file.
EXACT = 1e-9

Row = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One figure that moved. `noise` is the difference that would have been ignored, in the figure's unit."""

    artifact: str
    figure: str
    old: float
    new: float
    noise: float


@dataclass(frozen=True)
class Comparison:
    """Attributes: `notes`, sentences on what differs around the figures; `changes`, the figures that moved."""

    notes: tuple[str, ...]
    changes: tuple[Change, ...]


def noise_of(old: Sequence[float], new: Sequence[float], level: float) -> float:
    """How far a latency may move by itself: the larger spread (max - min) of the figure in the repeats of either bench.

    It is at least LATENCY_FLOOR of the old figure, which is `level`.
    """
    spreads = [max(values) - min(values) for values in (old, new) if values]
    return max([*spreads, LATENCY_FLOOR * abs(level)])


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Compare two records of `ssod_edge.bench.record`.

    Latencies move beyond the noise of `noise_of`; memory beyond RSS_FLOOR; accuracy, which is exact, is compared
    only where both ran on the same images, and agreement and flips where they are against the same backend.
    """
    notes = _surroundings(old, new)
    same_images = _same_images(old["data"], new["data"])
    lesson = _lesson(old["export"], new["export"])
    notes += lesson
    if not same_images:
        more = ": name images of classes that both know with --id" if lesson else ""
        notes.append(f"the images differ, so accuracy is not compared{more}")
    # Records of earlier releases name no reference: it was always the eager model.
    references = {record["data"].get("reference", EAGER) for record in (old, new)}
    same_reference = len(references) == 1
    if same_images and not same_reference:
        notes.append("agreement and flips are against different backends, so they are not compared")
    changes: list[Change] = []
    before, after = _rows(old), _rows(new)
    notes += [f"{name} batch {batch} is no longer there" for name, batch in before.keys() - after.keys()]
    notes += [f"{name} batch {batch} is new" for name, batch in after.keys() - before.keys()]
    for key in [key for key in after if key in before]:
        one, other = before[key], after[key]
        if one["status"] != other["status"]:
            notes.append(f"{key[0]} was {one['status']} and is {other['status']}")
        changes += _row_changes(one, other, same_images, same_reference)
    return Comparison(tuple(notes), (*changes, *_cost_changes(old, new)))


def _same_images(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether both ran on the same ones: of one data set, a model with other classes takes other images."""
    sets = [entry for data in (old, new) for entry in (data["id"], *data["ood"].values()) if entry is not None]
    recorded = all("chosen" in entry for entry in sets)  # not in records of earlier releases

    def images(data: dict[str, Any]) -> dict[str, Any]:
        kept = {name: {**entry, "chosen": recorded and entry["chosen"]} for name, entry in data["ood"].items()}
        known = data["id"] and {**data["id"], "chosen": recorded and data["id"]["chosen"]}
        return {**data, "reference": None, "id": known, "ood": kept}

    return images(old) == images(new)


def _rows(record: dict[str, Any]) -> dict[tuple[str, int], Row]:
    return {(row["artifact"], row["batch"]): row for row in record["rows"]}


def _row_changes(old: Row, new: Row, same_images: bool, same_reference: bool) -> list[Change]:
    name, found = new["artifact"], []
    latencies: list[tuple[str, str, Callable[[Row], float]]] = [
        ("p50 ms", "p50", lambda row: row["latency_ms"]["p50"]),
        ("p90 ms", "p90", lambda row: row["latency_ms"]["p90"]),
        ("compute p50 ms", "compute_p50", lambda row: row["stages_ms"]["compute"]["p50"]),
    ]
    if old["latency_ms"] and new["latency_ms"]:
        for figure, key, value in latencies:
            noise = noise_of(old["repeats_ms"][key], new["repeats_ms"][key], value(old))
            found.append(Change(name, figure, value(old), value(new), noise))
    plain = [("size_mb", EXACT), ("rss_mb", RSS_FLOOR * abs(old["rss_mb"] or 0))]
    if same_images:
        plain += [(key, EXACT) for key in ("top1", "auroc", "fpr_at_id_tpr95", "false_accept", "false_reject")]
        plain += [(key, EXACT) for key in ("agreement", "decision_flips") if same_reference]
    for key, noise in plain:
        if old[key] is not None and new[key] is not None:
            found.append(Change(name, key, old[key], new[key], noise))
    if same_images and old["deployment"] and new["deployment"]:
        for key in ("selective_accuracy", "aurc"):
            before, after = old["deployment"][key], new["deployment"][key]
            if before is not None and after is not None:
                found.append(Change(name, key, before, after, EXACT))
    return [change for change in found if abs(change.new - change.old) > change.noise]


def _cost_changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    found = []
    for engine, cost in new["cost_of_unknown"].items():
        before = old["cost_of_unknown"].get(engine)
        if cost is None or before is None:
            continue
        noise = max(max(c["repeats"]) - min(c["repeats"]) for c in (before, cost))
        if abs(cost["ratio"] - before["ratio"]) > noise:
            found.append(Change(f"{engine}: fused / plain", "ratio", before["ratio"], cost["ratio"], noise))
    return found


def _surroundings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences that would explain a change."""
    notes = []
    one, other = old["environment"], new["environment"]
    pairs = [
        ("processor", one["cpu"]["model"], other["cpu"]["model"]),
        ("usable cores", one["cpu"]["usable_cores"], other["cpu"]["usable_cores"]),
        ("quota of processor time", one["cpu"].get("quota"), other["cpu"].get("quota")),
        ("threads", one["threads"], other["threads"]),
        ("governor", one["state"]["governor"], other["state"]["governor"]),
        ("system", one["system"], other["system"]),
        ("Python", one["python"], other["python"]),
        ("quick", old["method"]["quick"], new["method"]["quick"]),
        ("query images", old["method"]["images"], new["method"]["images"]),
    ]
    names = sorted({*one["packages"], *other["packages"]})
    pairs += [(name, one["packages"].get(name), other["packages"].get(name)) for name in names]
    notes += [f"{name}: {before} -> {after}" for name, before, after in pairs if before != after]
    # Records of earlier releases lack some.
    both = old["export"].keys() & new["export"].keys() - {"version", "model", "taught_from", "classes", "class_names"}
    if any(old["export"][key] != new["export"][key] for key in both):
        notes.append(f"another export: {_export(old)} -> {_export(new)}")
    return notes


def _lesson(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Whether one of two exports was taught from the other, and which classes one of them alone has."""
    if old.get("class_names") is None or new.get("class_names") is None:
        counts = old.get("classes"), new.get("classes")
        return [] if counts[0] == counts[1] else ["classes: {} -> {}".format(*counts)]
    notes = []
    if old["model"] in new["taught_from"]:
        notes.append(
            f"the new export (version {new['version']}) was taught from the old one (version {old['version']})"
        )
    elif new["model"] in old["taught_from"]:
        notes.append(
            f"the old export (version {old['version']}) was taught from the new one (version {new['version']})"
        )
    elif set(new["taught_from"]) & set(old["taught_from"]):
        notes.append(f"both exports were taught from one (versions {old['version']} and {new['version']})")
    for what, one, other in (("new", new, old), ("no longer there", old, new)):
        if names := [name for name in one["class_names"] if name not in other["class_names"]]:
            notes.append(f"classes that are {what}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
    return notes


def _export(record: dict[str, Any]) -> str:
    export = record["export"]
    return f"{export['backbone']} at {export['input_size']} px" + (f" ({export['run']})" if export["run"] else "")
