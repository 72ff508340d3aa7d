"""What `eval` says of known images one by one: against the outputs, with p_known, and in the terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from ssod_edge.data.sources import open_dataset
from ssod_edge.detect.confidence import explain_p_known, p_known, verdict_inputs
from ssod_edge.detect.metrics import conformal_threshold
from ssod_edge.evaluation.known import judge_known, shipped_temperature
from ssod_edge.evaluation.known_report import MOST_CLASSES, MOST_MISTAKES, known_tables
from ssod_edge.training.outputs import Outputs

NAMES = ("[bold]cat[/bold]", "\u05d7\u05ea\u05d5\u05dc \u05d2\u05d3\u05d5\u05dc", "=cmd|' /C calc'!A0", 'say "dog"')


def drawn(n: int = 200, classes: int = 4) -> Outputs:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    logits = (3 * rng.normal(size=(n, classes))).astype(np.float32)
    logits[np.arange(n), labels] += 2
    return Outputs(logits, np.zeros(n, np.float32), labels, np.zeros((n, 2), np.float32))


class Names:
    """Stands for a source that has other images before these."""

    def source(self, index: int) -> str:
        return f"folder/{index}.jpg"


def judged(outputs: Outputs, names: tuple[str, ...] = NAMES, threshold: bool = True) -> dict[str, Any]:
    scores = np.random.default_rng(1).normal(size=len(outputs.labels)).astype(np.float32)
    fitted = conformal_threshold(np.random.default_rng(2).normal(size=100)) if threshold else None
    images: Any = Names(), 1000 + np.arange(len(scores))
    return judge_known(outputs, images, names, (2.0, "the export"), scores, fitted)


def shown(found: dict[str, Any], width: int = 100) -> str:
    report = {
        "classification": found,
        "default_score": "gen",
        "deployment": {"gen": {"threshold": {"target_tpr": 0.95}}},
    }
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        for part in known_tables(report):
            console.print(part, markup=False, soft_wrap=not isinstance(part, Table))
    return capture.get()


def test_each_mistake_has_its_image_score_p_known_and_verdict() -> None:
    outputs = drawn()
    found = judged(outputs)
    scores = np.random.default_rng(1).normal(size=200).astype(np.float32)
    threshold = conformal_threshold(np.random.default_rng(2).normal(size=100))
    assert len(found["mistakes"]) == int((~outputs.correct).sum()) > 20
    for row in found["mistakes"]:
        score = scores[row["index"]]
        assert row["image"] == f"folder/{1000 + row['index']}.jpg" and row["ood_score"] == score
        assert row["p_known"] == pytest.approx(float(p_known([score], verdict_inputs(threshold))[0]), abs=1e-6)
        assert row["known"] == (score <= threshold.value) == (row["p_known"] > 0.05)
    assert {row["known"] for row in found["mistakes"]} == {True, False}
    assert found["temperature"]["fitted_on"] == "the export"
    json.dumps(found, allow_nan=False)


def test_without_a_threshold_nothing_is_known_or_unknown() -> None:
    found = judged(drawn(), threshold=False)
    assert {(row["p_known"], row["known"]) for row in found["mistakes"]} == {(None, None)}
    assert "p known:" not in shown(found)


def test_names_are_shown_as_they_are() -> None:
    text = shown(judged(drawn()), width=160)
    assert all(name in text for name in NAMES)
    assert "balanced accuracy" in text and explain_p_known(0.95) in text and "up to 5 it is UNKNOWN" in text
    hostile = shown(judged(drawn(), ("a\x1b[31m", "b\nc", "d", "e")), width=160)
    assert "\x1b[31m" not in hostile and "a\\x1b[31m" in hostile and "b\\nc" in hostile


def test_the_matrix_has_the_counts_in_its_rows() -> None:
    found = judged(drawn(), ("w", "x", "y", "z"))
    lines = shown(found).splitlines()
    start = next(number for number, line in enumerate(lines) if "Confusion matrix" in line)
    rows = [line.split() for line in lines[start:] if line.split()[:1] in (["1"], ["2"], ["3"], ["4"])]
    rows = [row for row in rows if len(row) == 6]  # but the header
    assert [[int(cell.replace(".", "0")) for cell in row[2:]] for row in rows] == found["confusion"]


def test_long_lists_are_cut_and_say_so() -> None:
    names = tuple(f"class{number:02}" for number in range(30))
    found = judged(drawn(400, 30), names)
    text = shown(found)
    assert f"the worst {MOST_CLASSES} of 30" in text and "Confusion matrix" not in text
    assert f"({MOST_MISTAKES} of {len(found['mistakes'])})" in text
    worst = min(names, key=lambda name: found["by_class"][name]["f1"])
    table = text[text.index("Known classes") : text.index("classes: balanced")]
    assert worst in table and sum(name in table.replace("taken", "") for name in names) >= MOST_CLASSES


def test_a_perfect_model_has_no_mistakes_to_show() -> None:
    outputs = drawn()
    logits = np.eye(4, dtype=np.float32)[outputs.labels] * 9
    found = judged(replace(outputs, logits=logits))
    assert "Wrong answers" not in shown(found) and "taken:" not in shown(found)


def test_without_an_export_the_temperature_is_what_an_export_would_take() -> None:
    outputs = drawn(500)
    value, where = shipped_temperature(None, replace(outputs, logits=outputs.logits / 2))
    assert value == pytest.approx(0.5 * shipped_temperature(None, outputs)[0], rel=0.05)
    assert where == "images for thresholds" and shipped_temperature(None, None)[0] == 1


def test_a_picture_of_a_data_set_is_named_as_there(tmp_path: Path, small_run: Path) -> None:
    from ssod_edge.evaluation.evaluate import EvalOptions, evaluate

    data = small_run.parent / "data"
    report, found = evaluate(small_run, EvalOptions(str(data), {}, bootstrap=0, shift_images=0))
    rows, source = report["classification"]["mistakes"], open_dataset(str(data))
    assert rows and found.sets["id"][0].name == str(data)
    for row in rows:
        assert (data / row["image"]).is_file() and row["image"] == source.source(row["index"])
        assert Path(row["image"]).parts[0] == row["label"] != row["class_name"]
    assert report["classification"]["accuracy"] == pytest.approx(report["id_accuracy"])
