"""`ssod-edge eval --leave-out`: the table, its JSON, the stand-in of tuned features, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from pictures import write_folder
from safetensors.torch import save_file

from ssod_edge.cli import main
from ssod_edge.config import LossConfig, Preprocess, TrainConfig
from ssod_edge.errors import UsageError
from ssod_edge.evaluation.evaluate import EvalOptions, evaluate
from ssod_edge.evaluation.expect import TaughtImages, other_photos
from ssod_edge.training.loop import train
from ssod_edge.training.run import Run

CLASSES = ("class0", "class1", "class2", "class3")
STAND_IN = "are a stand-in: the features of this network have learnt every class"


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def head_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `--tune head` of four classes, with its export, and photos of other things beside it."""
    place = tmp_path_factory.mktemp("head")
    torch.manual_seed(3)
    save_file(timm.create_model("test_efficientnet").state_dict(), place / "model.safetensors")
    data = write_folder(place / "data", classes=4, per_class=30)
    write_folder(place / "other", per_class=3)
    backbone = ("--backbone", "test_efficientnet", "--size", 40, "--workers", 0)
    weights = ("--weights", place / "model.safetensors", "--tune", "head")
    done = command("train", data, *backbone, *weights, "-o", place / "runs", "--name", "run")
    assert done.exit_code == 0, done.output
    done = command("export", place / "runs" / "run", "--target", "onnx")
    assert done.exit_code == 0, done.output
    return place / "runs" / "run"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of three classes that was trained whole."""
    place = tmp_path_factory.mktemp("whole")
    config = TrainConfig(
        backbone="test_efficientnet", data=str(write_folder(place / "data", per_class=16)), name="run", epochs=1,
        batch_size=8, lr=1e-2, workers=0, preprocess=Preprocess(input_size=40), loss=LossConfig(gamma=0.6),
    )  # fmt: skip
    train(config, place)
    return place / "run"


def test_each_class_has_a_line_and_the_figures_are_the_exports(head_run: Path, tmp_path: Path) -> None:
    other, file = head_run.parent.parent / "other", tmp_path / "report.json"
    asked = ("--ood", f"other={other}", "--shift-images", 0, "--leave-out", "--json", file)
    done = command("eval", head_run, *asked)
    assert done.exit_code == 0, done.output
    report = json.loads(file.read_text())
    found, export = report["leave_out"], Run.at(head_run).export
    assert export is not None and found["score"] == export.spec.score_name == report["default_score"]
    assert {key: found[key] for key in ("new_class", "disturbed")} == export.spec.expected
    rows = found["new_class"]
    assert set(rows) == set(CLASSES) and not found["stand_in"] and STAND_IN not in done.output
    assert found["mean"]["auroc"] == pytest.approx(np.mean([row["auroc"] for row in rows.values()]))
    assert found["worst"]["auroc"] == min(row["auroc"] for row in rows.values())
    assert found["worst"]["accepted"] == max(row["accepted"] for row in rows.values())
    for name, row in rows.items():
        assert f"{100 * row['auroc']:.1f}" in done.output and row["taken_for"] != name
    shown = found["other_photos"]["other"]
    [row] = [r for r in report["results"] if r["score"] == found["score"]]
    assert (shown["auroc"], shown["images"]) == (row["auroc"], 9)
    assert shown["accepted"] == report["deployment"][found["score"]]["ood"]["other"]["false_accept"]
    assert "expect of photos such as 'other': AUROC" in done.output and "of 100 are accepted as known" in done.output


def test_a_score_that_is_not_yet_exported_says_nothing_of_other_photos(head_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(head_run, run, ignore=shutil.ignore_patterns("export"))
    done = command("eval", run, "--ood", f"o={head_run.parent.parent / 'other'}", "--shift-images", 0, "--leave-out")
    assert done.exit_code == 0, done.output
    assert "expect of other photos: of gen+mahalanobispp+residual once there is an export" in done.output
    assert "The score is energy as long as there is no export. `ssod-edge export` would ship gen+" in done.output


def test_figures_of_a_network_that_learnt_every_class_are_a_stand_in(whole_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = command("eval", whole_run, "--shift-images", 0, "--leave-out", "--json", file)
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())["leave_out"]
    assert found["stand_in"] and STAND_IN in done.output
    assert set(found["new_class"]) == {"class0", "class1", "class2"} and found["other_photos"] == {}
    assert found["images"] == len(Run.at(whole_run).splits("")[1].train)


def test_without_the_flag_no_class_is_left_out(whole_run: Path) -> None:
    report, _ = evaluate(whole_run, EvalOptions(bootstrap=0, shift_images=0))
    assert "leave_out" not in report


def test_many_training_images_are_drawn_from(whole_run: Path) -> None:
    run = Run.at(whole_run)
    images = TaughtImages.of(run, most=20).images
    assert len(images) == 20 and (np.diff(images) > 0).all() and np.isin(images, run.splits("")[1].train).all()


def test_it_needs_the_training_images_and_three_classes(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    shutil.copytree(whole_run, place / "run")
    run = Run.at(place / "run")
    run.meta["data"] = None  # as of published weights
    with pytest.raises(UsageError, match="records no training data.*train on your own photos, or leave --leave-out"):
        TaughtImages.of(run)
    run.meta["data"] = str(place / "nowhere")
    with pytest.raises(UsageError, match="nowhere.*leave --leave-out out"):
        TaughtImages.of(run)
    found = Run.at(whole_run)
    source, _ = found.splits("")
    monkeypatch.setattr(source, "labels", np.minimum(source.labels, 1))
    with pytest.raises(UsageError, match="needs three classes or more, because two must be left to tell apart, got 2"):
        TaughtImages.of(found)


def test_a_set_without_a_threshold_has_no_accepted_share() -> None:
    row = {"ood": "street", "score": "gen", "n_ood": 3, "auroc": 0.5}
    report = {"results": [row], "ood_data": {"street": "x"}, "deployment": None}
    assert other_photos("gen", report) == {"street": {"images": 3, "auroc": 0.5, "accepted": None}}
    assert other_photos("knn", report) is None
    assert other_photos("knn", {"results": [], "ood_data": {}, "deployment": None}) == {}
