"""The data of a report, as one JSON object: arrays where there is a value an image, objects where there are few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssod_edge.detect.classes import classification, tempered_classification
from ssod_edge.detect.confidence import p_known, verdict_inputs
from ssod_edge.detect.metrics import detection_metrics, quantile_ranks, risk_coverage, threshold_rank, tpr_interval
from ssod_edge.evaluation.page_facts import artifact_rows, expected, model_card
from ssod_edge.evaluation.page_judged import KNOWN, Judged, JudgedSet, names_of
from ssod_edge.evaluation.page_photos import Photos
from ssod_edge.evaluation.page_words import first_screen
from ssod_edge.spec import Threshold

#: The lowest share of known images that the slider goes to.
LEAST_TPR = 0.5
#: Pairs of classes that are listed.
MOST_PAIRS = 8


def page_data(judged: Judged, photos: Photos, bench: Mapping[str, Any] | None, drift: dict[str, Any] | None) -> dict:
    """All that the page shows but the photos themselves, which are `Photos.content`.

    Args:
        judged: the images.
        photos: small copies; an empty one leaves them out.
        bench, drift: of `ssod_edge.evaluation.page_facts`; None leaves them out.
    """
    rows, expect = artifact_rows(judged, bench), expected(judged)
    timed = [row for row in rows if row["p50"] is not None]
    fastest = min(timed, key=lambda row: float(row["p50"]), default=None)
    latency = None if fastest is None else (fastest["p50"], _where(fastest, bench))
    figures = _classification(judged)
    figures["mistakes"] = [row["index"] for row in figures["mistakes"]]
    figures["confused"] = figures["confused"][:MOST_PAIRS]
    curve = risk_coverage(judged.known.scores, judged.correct)
    return {
        "title": judged.name,
        "backbone": judged.backbone,
        "input_size": judged.preprocess.input_size,
        "judge": judged.judge,
        "classes": list(judged.classes),
        "score": judged.score,
        "words": first_screen(judged, latency, expect),
        "latency": None if latency is None else {"ms": latency[0], "by": latency[1]},
        "accuracy_ci": list(tpr_interval(int(judged.correct.sum()), len(judged.correct))),
        "threshold": _threshold(judged.threshold),
        "stops": stops(judged),
        "own": own_stop(judged),
        "command": command(judged),
        "sets": [_set(judged, name, images, photos) for name, images in judged.sets.items()],
        "told_apart": [_told_apart(judged.known, name, images) for name, images in judged.unknown.items()],
        "classification": figures,
        "risk": {"aurc": curve.aurc, "augrc": curve.augrc},
        "near": {key: list(column) for key, column in zip(("file", "label", "photo"), _columns(photos), strict=True)},
        "why_no_near": photos.why_no_near,
        "left_out": list(judged.left_out),
        "expected": expect,
        "artifacts": rows,
        "bench": None if bench is None else {key: bench[key] for key in ("environment", "method")},
        "drift": drift,
        "card": model_card(judged),
    }


def _classification(judged: Judged) -> dict[str, Any]:
    """What is measured of the classes, and what a temperature changes (`temperature`)."""
    known = judged.known
    if judged.temperature == 1:
        return classification(known.labels, known.probs, judged.classes)
    logits = judged.temperature * np.log(np.maximum(known.probs.astype(np.float64), 1e-38))  # but for a constant a row
    return tempered_classification(known.labels, logits, judged.classes, judged.temperature)


def stops(judged: Judged) -> list[dict[str, Any]]:
    """Thresholds that the slider stops at, ascending: `tpr`, as `calibrate --tpr` takes it, and the `value` that it has
    by the images behind the model's threshold; without one, by the known images here.
    """
    threshold = judged.threshold
    if threshold is None or not threshold.id_quantiles:
        scores = np.sort(np.asarray(judged.known.scores, np.float64))
        n = len(scores)
        table = {int(rank): float(scores[rank - 1]) for rank in quantile_ranks(n, min(100, n + 1))}
        if threshold is not None:
            return [{"tpr": repr(threshold.target_tpr), "value": threshold.value}]
    else:
        n = threshold.n
        ranks = quantile_ranks(n, len(threshold.id_quantiles) + 1).tolist()
        table = dict(zip(ranks, threshold.id_quantiles, strict=True))
        if threshold.id_highest is not None:
            table[n] = threshold.id_highest
        table[threshold_rank(n, threshold.target_tpr)] = threshold.value
    own = None if threshold is None else threshold_rank(n, threshold.target_tpr)
    return [
        {"tpr": _tpr(rank, n) if rank != own or threshold is None else repr(threshold.target_tpr), "value": value}
        for rank, value in sorted(table.items())
        if rank / (n + 1) >= LEAST_TPR or rank == own
    ]


def own_stop(judged: Judged) -> int:
    """Which of the stops is the model's own threshold; -1 without one."""
    if judged.threshold is None:
        return -1
    return [one["tpr"] for one in stops(judged)].index(repr(judged.threshold.target_tpr))


def _tpr(rank: int, n: int) -> str:
    """The shortest share whose threshold is the score of this rank of n."""
    for digits in range(2, 9):
        text = f"{rank / (n + 1) - 0.5 / (n + 1):.{digits}f}"
        for near in (text, f"{rank / (n + 1):.{digits}f}"):
            if 0 < float(near) < 1 and threshold_rank(n, float(near)) == rank:
                return near.rstrip("0")
    return f"{rank / (n + 1)}"


def command(judged: Judged) -> dict[str, str]:
    """The command that sets a threshold, its value apart, and what is to be said of it."""
    recorded = {} if judged.spec is None else judged.spec.source
    note = "Name images of known things that were not trained on; the threshold is then taken from their scores."
    data = "PHOTOS"
    if judged.run is not None and not recorded.get("pooled") and judged.threshold is not None and judged.spec:
        data = str(recorded.get("data") or data)
        note = "Of the training data its calibration images are taken."
    if judged.spec is None:
        note = "Export the run first: ssod-edge export. " + note
    return {"start": f"ssod-edge calibrate {_word(judged.place)} --id {_word(data)} --tpr", "note": note}


def _word(text: str) -> str:
    """A word of a command line."""
    import shlex

    return text if text == "PHOTOS" else shlex.quote(text)


def _threshold(threshold: Threshold | None) -> dict[str, Any] | None:
    if threshold is None:
        return None
    return {"value": threshold.value, "tpr": threshold.target_tpr, "n": threshold.n, "data": threshold.data}


def _set(judged: Judged, name: str, images: JudgedSet, photos: Photos) -> dict[str, Any]:
    """One set; `shown`, `photo` and `near` are of the images that have a small copy: row, photo, training photo."""
    shown, near = photos.shown.get(name, {}), photos.near.get(name, {})
    found: dict[str, Any] = {
        "name": name,
        "data": images.data,
        "score": np.asarray(images.scores, np.float64).tolist(),
        "guess": images.guesses.tolist(),
        "sure": _rounded(images.confidence),
        "file": names_of(images),
        "shown": list(shown),
        "photo": list(shown.values()),
        "near": [near.get(row, -1) for row in shown],
    }
    if name == KNOWN:
        found["label"] = images.labels.tolist()
    if judged.threshold is not None and judged.threshold.id_quantiles:
        found["p"] = _rounded(p_known(images.scores, verdict_inputs(judged.threshold)))
    return found


def _rounded(values: NDArray[np.floating[Any]]) -> list[float]:
    return [round(value, 4) for value in np.asarray(values, np.float64).tolist()]


def _told_apart(known: JudgedSet, name: str, images: JudgedSet) -> dict[str, Any]:
    figures = detection_metrics(known.scores, images.scores, bootstrap=0)
    keys = ("auroc", "fpr_at_id_tpr95", "n_ood")
    return {"name": name, **{key: figures[key] for key in keys}}


def _columns(photos: Photos) -> list[tuple[Any, ...]]:
    return list(zip(*photos.training, strict=True)) if photos.training else [(), (), ()]


def _where(row: Mapping[str, Any], bench: Mapping[str, Any] | None) -> str:
    cpu = ((bench or {}).get("environment", {}).get("cpu") or {}).get("model")
    place = cpu if cpu and row.get("device") == "CPU" else row.get("device")
    return ", ".join(filter(None, (row["name"], str(place or ""))))
