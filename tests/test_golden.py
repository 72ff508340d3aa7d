"""What release 0.1.0 wrote is read by this one, and means the same; so is what came with schema 4 of the spec."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from click.testing import CliRunner, Result
from places import GOLDEN

from ssod_edge.cli import main
from ssod_edge.config import LossConfig, Preprocess
from ssod_edge.detect.scores import ood_scores
from ssod_edge.detect.sums import ScoreSum, load_score
from ssod_edge.runtime.field.monitor import read_monitor
from ssod_edge.spec import load_spec
from ssod_edge.training.run import Run, load_config

RUN = Path("runs/old")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    for name in ("release-0.1.0", "schema-4"):
        with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    small.write_images(folder / "data", 420)
    return folder


@pytest.fixture(autouse=True)
def place(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(unpacked, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def predicted() -> list[dict[str, Any]]:
    """The recorded verdicts."""
    return [json.loads(line) for line in Path("predicted.jsonl").read_text().splitlines()]


def check_verdicts(folder: str, *options: str, engine: str = "onnxruntime", within: float = 1e-4) -> None:
    result = command("predict", folder, "data/a", "--json", *options)
    assert result.exit_code == 0, result.output
    found, expected = [json.loads(line) for line in result.stdout.splitlines()], predicted()
    assert len(found) == len(expected) == 60
    for one, other in zip(found, expected, strict=True):
        assert 0 < one.pop("p_known") <= 1  # of the quantiles that it wrote
        assert one.pop("image_warning") is None, "new since then"
        assert one.keys() == other.keys() and one["engine"] == engine
        for key in ("confidence", "ood_score", "threshold"):
            assert one.pop(key) == pytest.approx(other.pop(key), abs=within, rel=0 if key == "confidence" else 1e-5)
        assert {**one, "engine": None} == {**other, "engine": None}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_run_is_read() -> None:
    run = Run.at(RUN)
    config = load_config(run.folder)
    assert (config.backbone, config.epochs, config.seed) == ("test_efficientnet", 1, 3)
    assert config.preprocess == run.model.preprocess == Preprocess(input_size=32, version=1)
    assert config.loss == LossConfig(method="ce", outliers=("rotate", "zoom"), warmup_epochs=0.0)
    assert run.model.classes == small.CLASSES and run.meta["epoch"] == 1
    _, splits = run.splits("it cannot be had")
    assert [len(part) for part in (splits.train, splits.val, splits.calib)] == [294, 63, 63]
    assert run.export is not None and run.export.spec.score_name == "ssod+energy"


def test_the_run_is_finished_and_resuming_it_changes_nothing() -> None:
    before = contents(RUN)
    result = command("train", "--resume", str(RUN))
    assert result.exit_code == 0 and "is finished already (1 epochs)" in result.output
    assert contents(RUN) == before


def test_the_run_is_gone_on_with() -> None:
    settings = json.loads((RUN / "config.json").read_text())
    (RUN / "config.json").write_text(json.dumps({**settings, "epochs": 2}))
    assert command("train", "--resume", str(RUN)).exit_code == 0
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    later = {"started_from", "val_loss", "averaged"}
    assert [row["epoch"] for row in rows] == [1, 2] and rows[1].keys() == rows[0].keys() | later


@pytest.mark.parametrize("folder", ["runs/old", "runs/old/export"])
def test_the_export_gives_the_recorded_verdicts(folder: str) -> None:
    check_verdicts(folder)


def test_the_export_of_schema_4_gives_the_recorded_verdicts() -> None:
    """With a region, bars, a temperature, features, and a JPEG that is decoded at a quarter of its size."""
    spec = load_spec("new")
    assert (spec.preprocess.fit, spec.preprocess.roi, spec.preprocess.version) == ("pad", (4, 0, 56, 64), 2)
    assert spec.outputs[4:] == ("p_known", "known", "features_pooled") and spec.temperature != 1
    result = command("predict", "new", "photos", "data/a", "--json")
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    expected = [json.loads(line) for line in Path("predicted-4.jsonl").read_text().splitlines()]
    assert len(found) == len(expected) == 61
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and one["image"] == other["image"]
        for key in ("confidence", "ood_score", "threshold"):
            assert one[key] == pytest.approx(other[key], abs=1e-3)
        # Scores of the calibration images may lie to either side of the quantiles that they are.
        assert one["p_known"] == pytest.approx(other["p_known"], abs=0.02)
        assert [one[key] for key in ("class_name", "known")] == [other[key] for key in ("class_name", "known")]


def test_the_sum_that_the_export_ships_is_a_plain_one() -> None:
    """Its parts are no one-sided ones, and its detectors read all features."""
    score = load_score(RUN / "export" / "detector.npz")
    assert isinstance(score, ScoreSum) and score.name == "ssod+energy" and not score.centers
    logits, id_logit = np.array([[3, 1, 0], [9, 2, 1]], np.float32), np.array([-2, 5], np.float32)
    free = ood_scores(logits, id_logit)
    expected = score.scales["ssod"] * free["ssod"] + score.scales["energy"] * free["energy"]
    np.testing.assert_allclose(score.score(np.zeros((2, 1)), logits, id_logit), expected, rtol=1e-6)


@pytest.mark.parametrize("folder", ["runs/old", "runs/old/export"])
def test_the_eager_engine_opens_the_run_and_the_export(folder: str) -> None:
    check_verdicts(folder, "--engine", "eager", engine="eager", within=1e-3)


def test_the_monitor_file_is_read_and_gone_on_with() -> None:
    record = read_monitor("monitor.json")
    shown = command("monitor", "monitor.json")
    assert shown.exit_code == 0 and "onnx-fp32" in shown.output and str(record.images) in shown.output
    assert command("predict", "runs/old", "data/a", "--monitor", "monitor.json").exit_code == 0
    assert read_monitor("monitor.json").images == record.images + 60


def test_the_bundle_is_exported_from() -> None:
    result = command("export", "--from", "bundle.tar", "--target", "onnx", "-o", "device")
    assert result.exit_code == 0, result.output
    check_verdicts("device")
