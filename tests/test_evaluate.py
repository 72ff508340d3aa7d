"""`ssod-edge eval`: the report's keys, its figures, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from interrupt import interrupt_while_reading
from pictures import write_folder
from PIL import Image

from ssod_edge.checkpoint import load_model
from ssod_edge.cli import main
from ssod_edge.config import SCORES, LossConfig, Preprocess, TrainConfig
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.evaluate import collect, evaluate, parse_named_data, recorded_split
from ssod_edge.metrics import detection_metrics
from ssod_edge.sources import open_dataset
from ssod_edge.train import train

METRICS = {"auroc", "aupr_in", "aupr_out", "fpr_at_id_tpr95", "fpr_at_ood_tpr95", "ci", "tie_fraction", "n_id", "n_ood"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trained run, other images of its classes, and grey images it never saw."""
    place = tmp_path_factory.mktemp("place")
    write_folder(place / "data", per_class=16)
    write_folder(place / "test", per_class=5, size=56)
    (place / "grey").mkdir()
    for index in range(9):
        pixels = np.random.default_rng(index).integers(0, 255, (50, 70), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "grey" / f"{index}.png")
    config = TrainConfig(
        backbone="test_efficientnet", data=str(place / "data"), name="run", epochs=2, batch_size=8, lr=1e-2, workers=0,
        preprocess=Preprocess(input_size=40), loss=LossConfig(gamma=0.6),
    )  # fmt: skip
    train(config, place)
    return place


def test_the_report_has_every_score_on_every_set(place):
    report, raw = evaluate(
        place / "run", str(place / "test"), {"grey": str(place / "grey"), "more": str(place / "grey")}, bootstrap=20
    )
    assert report["n_id"] == 15 and 0 <= report["id_accuracy"] <= 1 and report["protocol"] == "native"
    assert [(row["ood"], row["score"]) for row in report["results"]] == [
        (o, s) for o in ("grey", "more") for s in SCORES
    ]
    for row in report["results"]:
        assert set(row) == METRICS | {"ood", "score", "protocol"} and row["n_id"] == 15 and row["n_ood"] == 9
        assert row["auroc"] == detection_metrics(raw["id"][row["score"]], raw[row["ood"]][row["score"]], 0)["auroc"]
        assert report["mean"][row["score"]]["auroc"] == pytest.approx(row["auroc"])
    json.dumps(report, allow_nan=False)


def test_collect_is_the_model_on_the_deployment_bytes_in_order(place):
    model, _ = load_model(place / "run")
    source = open_dataset(str(place / "test"))
    whole = collect(model, source, batch_size=4)
    part = collect(model, source, np.array([7, 2]), batch_size=4, workers=0)
    assert whole.labels.tolist() == source.labels.tolist() and whole.logits.dtype == np.float32
    np.testing.assert_allclose(part.logits, whole.logits[[7, 2]], rtol=1e-4, atol=1e-4)
    assert whole.accuracy == float((whole.logits.argmax(1) == source.labels).mean())
    assert not torch.is_grad_enabled() or whole.id_logit.shape == (15,)


def test_via_sends_every_image_through_that_size(place):
    native, _ = evaluate(place / "run", str(place / "test"), {"grey": str(place / "grey")}, bootstrap=0)
    through, raw = evaluate(place / "run", str(place / "test"), {"grey": str(place / "grey")}, via_size=8, bootstrap=0)
    assert through["protocol"] == through["results"][0]["protocol"] == "via8"
    assert through["results"][3]["auroc"] != native["results"][3]["auroc"] or raw["grey"]["energy"].std() > 0


def test_without_id_data_the_recorded_validation_split_is_used(place):
    report, _ = evaluate(place / "run", bootstrap=0)
    assert report["n_id"] == len(recorded_split(place / "run", "val")) and report["results"] == []
    assert "validation split" in report["id_data"]


def test_other_classes_missing_data_and_a_checkpoint_without_splits_are_refused(place, tmp_path):
    write_folder(tmp_path / "four", classes=4, per_class=2)
    with pytest.raises(UsageError, match="are not the model's"):
        evaluate(place / "run", str(tmp_path / "four"))
    with pytest.raises(UsageError, match="does not exist"):
        evaluate(place / "run", str(place / "test"), {"none": str(tmp_path / "none")})
    (tmp_path / "copy.safetensors").write_bytes((place / "run" / "best.safetensors").read_bytes())
    with pytest.raises(UsageError, match=r"no readable splits\.json"):
        evaluate(tmp_path / "copy.safetensors")
    with pytest.raises(ArtifactError, match="does not exist"):
        evaluate(tmp_path / "nothing")


@pytest.mark.parametrize("items", [("grey",), ("=x",), ("a=",), ("a=x", "a=y"), ("id=x",)])
def test_names_of_ood_sets_are_checked(items):
    with pytest.raises(UsageError, match="expected --ood NAME=DATA"):
        parse_named_data(items)
    assert parse_named_data(("a=x", "b=torch/y:z=1")) == {"a": "x", "b": "torch/y:z=1"}


def test_the_command_prints_a_table_and_writes_json_and_png(place):
    args = [
        "eval",
        str(place / "run"),
        "--id",
        str(place / "test"),
        "--ood",
        f"grey={place / 'grey'}",
        "--bootstrap",
        "5",
    ]
    result = CliRunner().invoke(main, args, catch_exceptions=False)
    assert result.exit_code == 0 and "ID accuracy" in result.output and "energy *" in result.output
    report = json.loads((place / "run" / "eval-native.json").read_text())
    assert report["results"][0]["ci"]["auroc"][0] <= report["results"][0]["auroc"]
    with Image.open(place / "run" / "eval-native.png") as png:
        assert png.width > 300 and len(png.convert("RGB").getcolors(1 << 24)) > 5
    missing = CliRunner().invoke(main, ["eval", str(place / "nothing")])
    assert missing.exit_code == 4 and "error: " in missing.stderr


def test_a_broken_ood_image_is_named(place, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.png").write_bytes(b"\x89PNG")
    result = CliRunner().invoke(main, ["eval", str(place / "run"), "--ood", f"bad={tmp_path / 'bad'}"])
    assert result.exit_code == 1 and "broken.png" in result.stderr and "Traceback" not in result.stderr


def test_an_interrupt_leaves_no_report(place, tmp_path):
    (tmp_path / "grey").mkdir()
    Image.new("L", (1500, 1500)).save(tmp_path / "grey" / "0.png")
    for index in range(1, 400):
        (tmp_path / "grey" / f"{index}.png").hardlink_to(tmp_path / "grey" / "0.png")
    report = tmp_path / "report.json"
    code, stderr = interrupt_while_reading(
        tmp_path / "grey", "eval", place / "run", "--ood", f"grey={tmp_path / 'grey'}", "--json", report
    )
    assert (code, stderr) == (130, "interrupted\n")
    assert not report.exists()
