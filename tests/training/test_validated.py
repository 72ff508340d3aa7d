"""What a training says of its validation images, class by class, with a head by regression and with every weight."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pictures import write_folder
from safetensors.torch import save_file

from ssod_edge.cli import main
from ssod_edge.config import Preprocess
from ssod_edge.data.sources import open_dataset
from ssod_edge.detect.confidence import fit_temperature
from ssod_edge.training.model import build_model
from ssod_edge.training.outputs import collect
from ssod_edge.training.run import Run
from ssod_edge.training.validated import VALIDATION, write_validation

SIZE = 40
TUNE = {
    "head": ("--tune", "head"),
    "upper": ("--tune", "upper"),
    "all": ("--tune", "all", "--epochs", "2", "--batch-size", "8"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that are hard to tell, and weights."""
    place = tmp_path_factory.mktemp("place")
    write_folder(place / "data", per_class=120)
    torch.manual_seed(3)
    model = build_model("test_efficientnet", ("a", "b"), Preprocess(input_size=SIZE))
    save_file(model.backbone.state_dict(), place / "model.safetensors")
    return place


@pytest.mark.parametrize("tune", TUNE)
def test_a_run_ends_with_its_validation_images_class_by_class(place: Path, tune: str) -> None:
    arguments = ["train", str(place / "data"), "--backbone", "test_efficientnet", "--size", str(SIZE), "--workers", "0"]
    arguments += ["--weights", str(place / "model.safetensors"), "-o", str(place), "--name", tune, *TUNE[tune]]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    found = json.loads((place / tune / VALIDATION).read_text())
    run = Run.at(place / tune)
    source, splits = run.splits("")
    outputs = collect(run.model, source, splits.val)
    assert found["n"] == len(splits.val) and found["accuracy"] == pytest.approx(outputs.accuracy)
    assert found["accuracy"] == pytest.approx(run.meta["val_accuracy"])
    wrong = [source.source(index) for index in splits.val[~outputs.correct].tolist()]
    assert sorted(row["image"] for row in found["mistakes"]) == sorted(wrong)
    for words in ("classes: balanced accuracy", "confidence: calibration error (ECE)", str(place / tune / VALIDATION)):
        assert words in result.stderr
    calib = collect(run.model, source, splits.calib)
    if run.folds is None:
        assert found["temperature"]["value"] == pytest.approx(fit_temperature(calib.logits, calib.labels), rel=1e-2)
    else:
        everything = collect(run.model, source, run.folds.images)
        logits = run.folds.logits(everything.features)
        assert found["temperature"]["value"] == pytest.approx(fit_temperature(logits, everything.labels), rel=1e-2)


def test_names_are_written_as_they_are_and_said_without_harm(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_folder(tmp_path / "data", per_class=4)
    source = open_dataset(str(tmp_path / "data"))
    source.classes = ("=cmd|' /C calc'!A0", "<b>\u05d7\u05ea\u05d5\u05dc</b>", "red\x1b[31m")[: len(source.classes)]
    logits = np.zeros((len(source), len(source.classes)), np.float32)
    logits[:, 0] = 1
    empty = np.zeros((0, len(source.classes)), np.float32), np.zeros(0, np.int64)
    lines = write_validation(tmp_path, source, np.arange(len(source)), logits, empty)
    found = json.loads((tmp_path / VALIDATION).read_text())
    assert list(found["by_class"]) == list(source.classes) and found["temperature"]["value"] == 1
    assert "\x1b" not in "".join(lines) and "<b>\u05d7\u05ea\u05d5\u05dc</b> (0 of 100 images are found)" in lines[0]
