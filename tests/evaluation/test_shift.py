"""Known images under disturbances: what is accepted, and how accurate it is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from pictures import write_folder
from PIL import Image
from small import CLASSES, make_model

from ssod_edge.cli import main
from ssod_edge.data.disturbances import SHIFTS, STRENGTHS, shift
from ssod_edge.data.pixels import read_pixels
from ssod_edge.data.sources import open_dataset
from ssod_edge.detect.classes import tempered_classification
from ssod_edge.errors import UsageError
from ssod_edge.evaluation.evaluate import EvalOptions
from ssod_edge.evaluation.report import print_details
from ssod_edge.evaluation.shift import CASES, SEED, ShiftedImages, judge_shifted, sample, shift_rows
from ssod_edge.training.outputs import collect


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_dataset(str(write_folder(tmp_path_factory.mktemp("shift") / "data", per_class=2)))


def test_each_image_is_shown_under_each_shift_whatever_the_sample(source):
    model = make_model("test_efficientnet", 32, CLASSES)
    whole = ShiftedImages(source, None, model.preprocess)
    part = ShiftedImages(source, np.array([4, 1]), model.preprocess)
    shown, label, index = part[0]
    assert shown.shape == (len(CASES), 3, 32, 32) and (label, index) == (source.labels[4], 4)
    assert np.array_equal(shown, whole[4][0])
    pixels = read_pixels(source.picture(4), model.preprocess)
    assert np.array_equal(shown[CASES.index(("noise", "strong"))], shift(pixels, "noise", "strong", (SEED, 4)))


class OneShift:
    """A source as it looks under one shift, to a model that takes its images as they are."""

    def __init__(self, source, settings, case):
        self.source, self.settings, self.case = source, settings, case
        self.labels, self.name = source.labels, source.name

    def picture(self, index):
        pixels = shift(read_pixels(self.source.picture(index), self.settings), *self.case, (SEED, index))
        return Image.fromarray(pixels.transpose(1, 2, 0))


def test_the_figures_are_the_models_on_the_shifted_pixels(source):
    model, chosen, seen = make_model("test_efficientnet", 32, CLASSES), np.array([4, 0, 2, 3, 1]), []
    model.preprocess = replace(model.preprocess, crop_pct=1.0)
    images, labels = ShiftedImages(source, chosen, model.preprocess), source.labels[chosen]
    scores, correct = judge_shifted(
        model, images, labels, lambda outputs: outputs.logits.max(1), workers=0, advance=seen.append
    )
    assert scores.shape == correct.shape == (5, len(CASES)) and sum(seen) == 5
    for case in (("darker", "mild"), ("rotation", "strong")):
        outputs = collect(model, OneShift(source, model.preprocess, case), chosen, workers=0)
        np.testing.assert_allclose(scores[:, CASES.index(case)], outputs.logits.max(1), rtol=1e-3, atol=1e-3)
        assert np.array_equal(correct[:, CASES.index(case)], outputs.correct)


def test_rows_count_what_is_accepted_and_right():
    scores, correct = np.zeros((4, len(CASES))), np.ones((4, len(CASES)), bool)
    scores[:3, 1], correct[0, 1] = 2.0, False
    rows = shift_rows((scores, correct), (np.array([0, 0, 0, 2.0]), np.array([True, True, True, False])), 1.0)
    assert [(row["kind"], row["strength"]) for row in rows] == [("none", "none"), *CASES]
    assert rows[0]["accepted"] == rows[0]["accuracy"] == 0.75 and rows[0]["accuracy_drop"] == 0
    assert (rows[1]["accepted"], rows[1]["accuracy"], rows[1]["accuracy_drop"]) == (1, 1, -0.25)
    assert (rows[2]["accepted"], rows[2]["accuracy"], rows[2]["accuracy_drop"], rows[2]["n"]) == (0.25, 0.75, 0, 4)
    assert rows[2]["accepted_ci"][0] < 0.25 < rows[2]["accepted_ci"][1]
    without = shift_rows((scores, correct), (scores[:, 0], correct[:, 0]), None)
    assert without[2]["accepted"] is without[2]["accepted_ci"] is None and without[2]["accuracy"] == 0.75


def test_a_sample_is_seeded_and_no_larger_than_what_there_is():
    assert np.array_equal(sample(5, 200), np.arange(5))
    chosen = sample(1000, 30)
    assert len(set(chosen.tolist())) == 30 and np.array_equal(chosen, sample(1000, 30)) and (np.diff(chosen) > 0).all()
    with pytest.raises(UsageError, match="shift_images must be 0 or more, got -1"):
        EvalOptions(shift_images=-1)


def test_eval_reports_the_shifts_of_what_ships_at_the_same_threshold(small_run, tmp_path):
    json_file, data = tmp_path / "report.json", small_run.parent / "data"
    arguments = ["eval", str(small_run), "--id", str(data), "--ood", f"other={data}", "--bootstrap", "0", "--details"]
    arguments += ["--json", str(json_file), "--png", str(tmp_path / "x.png"), "--shift-images"]
    shown = CliRunner().invoke(main, [*arguments, "6"], catch_exceptions=False)
    report = json.loads(json_file.read_text())
    assert len(report["shift"]) == 1 + len(SHIFTS) * len(STRENGTHS) and {row["n"] for row in report["shift"]} == {6}
    assert all(0 <= row["accepted"] <= 1 for row in report["shift"])
    assert "6 known images, disturbed" in shown.stdout and "Worst: energy accepts" in shown.stdout
    assert "% of other" in shown.stdout.partition("Worst:")[2]
    shown = CliRunner().invoke(main, [*arguments, "0"], catch_exceptions=False)
    assert json.loads(json_file.read_text())["shift"] == [] and "Worst:" not in shown.stdout


def test_without_a_threshold_the_report_has_accuracy_alone(capsys):
    row = {"n": 3, "accepted": None, "accepted_ci": None, "accuracy": 0.5, "accuracy_ci": [0, 1], "accuracy_drop": 0.25}
    rows = [{"kind": kind, "strength": strength, **row} for kind, strength in (("none", "none"), *CASES)]
    known = tempered_classification([0, 1], np.eye(2), ("a", "b"), 1.0) | {"mistakes": []}
    print_details(
        {"classification": known,
         "run": "r", "backbone": "b", "input_size": 8, "protocol": "native", "equalised": "", "id_accuracy": 0.5,
         "n_id": 3, "id_data": "d", "mean": {}, "deployment": None, "shift": rows, "default_score": "energy",
         "ships": "energy", "ood_row_trained": True}
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "Worst: accuracy falls by 25.0 points under mild lighter and 25.0 points under strong lighter" in printed
