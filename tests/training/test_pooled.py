"""A head that is fitted on the images for thresholds too: they come from out-of-fold scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from numpy.testing import assert_allclose
from PIL import Image
from safetensors.torch import save_file

from ssod_edge.cli import main
from ssod_edge.export.graph.score import fit_data, ship_score, want_score
from ssod_edge.export.graph.source import from_run
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.verify import verify_runner
from ssod_edge.training.run import Run

CLASSES, SIZE = ("red", "green", "blue", "grey"), 64
COLOURS = ((200, 60, 60), (60, 180, 60), (60, 60, 200), (120, 120, 120))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), path)
    return path


def write_photos(folder: Path, each: int, seed: int = 0) -> Path:
    """Noise of a colour, `each` images of each of four."""
    rng = np.random.default_rng(seed)
    for name, colour in zip(CLASSES, COLOURS, strict=True):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            pixels = np.array(colour) + rng.normal(0, 30, 3) + rng.normal(0, 40, (SIZE, SIZE, 3))
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(folder / name / f"{seed}-{index:03}.png")
    return folder


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)


def train(out: Path, photos: Path, weights: Path, *options: str) -> Run:
    backbone = ("--backbone", "test_efficientnet", "--size", SIZE, "--weights", weights, "--workers", 0)
    done = command("train", photos, *backbone, "-o", out, "--name", "run", "--tune", "head", *options)
    assert done.exit_code == 0, done.output
    return Run.at(out / "run")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> tuple[Run, str]:
    place = tmp_path_factory.mktemp("pooled")
    run = train(place / "runs", write_photos(place / "photos", 40), weights)
    done = command("export", run.folder, "--target", "onnx")
    assert done.exit_code == 0, done.output
    return run, done.output


def test_all_but_the_validation_images_train_and_give_thresholds(exported):
    run, output = exported
    source, splits = run.splits("")
    pooled = np.setdiff1d(np.arange(len(source)), splits.val)
    assert len(splits.calib) and run.folds is not None and np.array_equal(run.folds.images, pooled)
    spec = run.export.spec
    assert spec.score_name == "gen+mahalanobispp+residual" and spec.source["pooled"] == len(pooled)
    threshold = spec.artifact("onnx-fp32").threshold
    assert threshold.n == len(pooled) and "out-of-fold split" in threshold.data
    assert set(spec.expected["new_class"]) == set(CLASSES) and "expect of a class that was not taught" in output


def test_the_threshold_is_that_of_images_that_were_left_out(exported):
    run, _ = exported
    source = from_run(run.folder)
    shipped = ship_score(source, want_score(source, None, None, lambda line: None), lambda line: None)
    data, n = fit_data(source, lambda line: None), len(run.folds.images)
    fitted = shipped.detector.score(data.features[:n], data.logits[:n], data.id_logit[:n])
    new = np.sort(fitted + shipped.out_of_fold.change)
    rank = int(np.ceil((n + 1) * 0.95))
    assert run.export.spec.artifact("onnx-fp32").threshold.value == pytest.approx(new[rank - 1], abs=1e-3)
    # The scores of images that a model was fitted on would set it lower.
    assert np.sort(fitted)[rank - 1] < new[rank - 1] and shipped.out_of_fold.change.mean() > 0
    assert_allclose(shipped.out_of_fold.logits, run.folds.logits(data.features[:n]), rtol=1e-4, atol=1e-5)


def test_new_images_are_accepted_about_as_often_as_asked_for(exported, tmp_path):
    run, _ = exported
    new = write_photos(tmp_path / "new", 60, seed=9)
    unknown = tmp_path / "unknown" / "stripes"
    unknown.mkdir(parents=True)
    for index in range(20):
        stripes = np.zeros((SIZE, SIZE, 3), np.uint8)
        stripes[:, index % 4 :: 4] = (250, 250, 0)
        Image.fromarray(stripes).save(unknown / f"{index}.png")
    report = tmp_path / "report.json"
    asked = ("--id", new, "--ood", f"stripes={unknown.parent}", "--json", report, "--shift-images", 0)
    done = command("eval", run.folder, *asked)
    assert done.exit_code == 0, done.output
    row = json.loads(report.read_text())["deployment"]["gen+mahalanobispp+residual"]
    assert 0.88 < row["id_tpr"] <= 1.0
    with open_runner(run.folder, engine="eager") as eager:
        assert eager.artifact.threshold.value == run.export.spec.artifact("onnx-fp32").threshold.value
        assert verify_runner(eager, run.folder / "export").passed


def test_a_threshold_is_not_fitted_to_images_that_were_trained_on(exported):
    run, _ = exported
    done = command("calibrate", run.folder, "--id", run.meta["data"])
    assert done.exit_code == 2 and "Export the run again for these, or name new images" in done.output


def test_training_on_from_such_a_run_forgets_its_last_layer(exported, tmp_path):
    """It has learnt the images that the new run's threshold comes from."""
    run, _ = exported
    said = "the last layer begins anew: that of the run has learnt the images for thresholds too"
    for tune, anew in ((("--tune", "all", "--epochs", "1", "--batch-size", "8"), True), (("--tune", "head"), False)):
        backbone = ("--backbone", "test_efficientnet", "--size", SIZE, "--workers", 0, "--head", "blocks")
        arguments = ("--weights", run.checkpoint, "-o", tmp_path, "--name", tune[1], *tune)
        done = command("train", run.meta["data"], *backbone, *arguments)
        assert done.exit_code == 0, done.output
        assert (said in done.output) is anew
        assert (Run.at(tmp_path / tune[1]).folds is None) is anew


@pytest.mark.parametrize("options", [("--calib-fraction", "0.3"), ("--tune", "upper")])
def test_a_split_that_is_asked_for_or_needed_is_kept(options, tmp_path, weights):
    run = train(tmp_path / "runs", write_photos(tmp_path / "photos", 16), weights, *options)
    assert run.folds is None
    images = run.images()
    assert np.intersect1d(images.training.indices, images.thresholds.indices).size == 0


@pytest.mark.slow
def test_ten_images_a_class_are_enough(tmp_path, weights):
    run = train(tmp_path / "runs", write_photos(tmp_path / "photos", 10), weights)
    done = command("export", run.folder, "--target", "onnx", "--score", "auto", "--fp32")
    assert done.exit_code == 0, done.output
    spec = run.export.spec
    assert spec.choice["known"].endswith("out of fold") and spec.choice["images"] == len(run.folds.images)
    assert "left out" in spec.choice["candidates"]["energy"]["figures"]
    again = command("export", run.folder, "--target", "openvino", "--fp32")
    assert again.exit_code == 0 and "made anew" not in again.output, again.output
    assert {a.name for a in run.export.spec.artifacts} == {"onnx-fp32"}  # what was read at first
    assert {a.name for a in Run.at(run.folder).export.spec.artifacts} == {"onnx-fp32", "openvino-fp32"}


def test_too_few_for_a_distance_is_said(tmp_path, weights):
    run = train(tmp_path / "runs", write_photos(tmp_path / "photos", 7), weights)
    done = command("export", run.folder, "--target", "onnx", "--fp32")
    assert done.exit_code == 0, done.output
    assert run.export.spec.score_name == "energy" and run.export.spec.artifact("onnx-fp32").threshold.n == 24
    assert (
        "the score is energy: gen+mahalanobispp+residual is fitted on 32 training images or more, and there are 24"
        in done.output
    )
