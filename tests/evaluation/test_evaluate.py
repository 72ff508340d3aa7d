"""`ssod-edge eval`: the report's keys, its figures, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from interrupt import interrupt_while_reading
from pictures import write_folder
from PIL import Image

from ssod_edge.cli import main
from ssod_edge.config import SCORES, LossConfig, Preprocess, TrainConfig
from ssod_edge.data.pixels import preprocess
from ssod_edge.data.sources import open_dataset
from ssod_edge.detect.metrics import detection_metrics
from ssod_edge.errors import UsageError
from ssod_edge.evaluation.evaluate import EvalOptions, collect, evaluate, run_eval
from ssod_edge.evaluation.images import warn_of_used_images
from ssod_edge.evaluation.report import print_details
from ssod_edge.export.graph.build import export_run
from ssod_edge.runtime.open import open_runner
from ssod_edge.spec import DETECTOR_NAME, Spec
from ssod_edge.training.checkpoint import BEST, load_checkpoint, save_checkpoint
from ssod_edge.training.loop import train
from ssod_edge.training.run import Run

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


def test_the_report_has_every_score_on_every_set(place, capsys):
    report, found = evaluate(
        place / "run",
        EvalOptions(str(place / "test"), {"grey": str(place / "grey"), "more": str(place / "grey")}, bootstrap=20),
    )
    assert report["n_id"] == 15 and 0 <= report["id_accuracy"] <= 1 and report["protocol"] == "native"
    assert [(row["ood"], row["score"]) for row in report["results"]] == [
        (o, s) for o in ("grey", "more") for s in SCORES
    ]
    for row in report["results"]:
        assert set(row) == METRICS | {"ood", "score", "protocol"} and row["n_id"] == 15 and row["n_ood"] == 9
        known, unknown = (found.scores[name][row["score"]] for name in ("id", row["ood"]))
        assert row["auroc"] == detection_metrics(known, unknown, 0)["auroc"]
        assert report["mean"][row["score"]]["auroc"] == pytest.approx(row["auroc"])
    assert report["deployment"] is None and "baselines" not in report
    assert "the calibration split has 6 images, and a 95% threshold needs 19" in capsys.readouterr().err
    json.dumps(report, allow_nan=False)


def test_collect_is_the_model_on_the_deployment_bytes_in_order(place):
    model = Run.at(place / "run").model
    source = open_dataset(str(place / "test"))
    whole = collect(model, source, batch_size=4)
    part = collect(model, source, np.array([7, 2]), batch_size=4, workers=0)
    assert whole.labels.tolist() == source.labels.tolist() and whole.logits.dtype == np.float32
    np.testing.assert_allclose(part.logits, whole.logits[[7, 2]], rtol=1e-4, atol=1e-4)
    assert whole.accuracy == float((whole.logits.argmax(1) == source.labels).mean())
    assert not torch.is_grad_enabled() or whole.id_logit.shape == (15,)


def test_via_sends_every_image_through_that_size(place):
    native, _ = evaluate(place / "run", EvalOptions(str(place / "test"), {"grey": str(place / "grey")}, bootstrap=0))
    through, found = evaluate(
        place / "run", EvalOptions(str(place / "test"), {"grey": str(place / "grey")}, via_size=8, bootstrap=0)
    )
    assert through["protocol"] == through["results"][0]["protocol"] == "via8"
    assert "8 px (codecs may tell sets apart)" in through["equalised"] and "as they are" in native["equalised"]
    assert through["results"][3]["auroc"] != native["results"][3]["auroc"] or found.scores["grey"]["energy"].std() > 0


def test_via_equalises_the_codec_too_and_every_output_says_so(place):
    json_file = place / "via.json"
    arguments = ["eval", str(place / "run"), "--id", str(place / "test"), "--ood", f"grey={place / 'grey'}"]
    through = ["--via", "8,jpeg20", "--shift-images", "0", "--json", str(json_file)]
    shown = CliRunner().invoke(main, [*arguments, *through], catch_exceptions=False)
    report = json.loads(json_file.read_text())
    assert report["protocol"] == report["results"][0]["protocol"] == "via8-jpeg20"
    assert report["equalised"] in " ".join(shown.stdout.split()) and "one JPEG of quality 20" in report["equalised"]
    options = EvalOptions(str(place / "test"), {"grey": str(place / "grey")}, via_size=8, bootstrap=0, shift_images=0)
    sized, both = (evaluate(place / "run", replace(options, via_jpeg=jpeg))[1].scores for jpeg in (None, 20))
    for name in ("id", "grey"):  # known and unknown
        assert not np.allclose(sized[name]["energy"], both[name]["energy"], atol=1e-5)
    wrong = CliRunner().invoke(main, [*arguments, "--via", "8,jpeg"])
    assert wrong.exit_code == 2 and "such as 32 or 32,jpeg75" in wrong.stderr


def test_without_id_data_the_recorded_validation_split_is_used(place):
    report, _ = evaluate(place / "run", EvalOptions(bootstrap=0))
    splits = json.loads((place / "run" / "splits.json").read_text())
    assert report["n_id"] == len(splits["val"]) and report["results"] == [] and report["ood_row_trained"]
    assert "validation split" in report["id_data"]


@pytest.mark.slow
def test_the_score_of_the_runs_export_is_evaluated(small_run, tmp_path, capsys):
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    images = {"same": str(small_run.parent / "data")}
    before, _ = evaluate(run, EvalOptions(images["same"], images, bootstrap=0, shift_images=0))
    assert before["default_score"] == "energy" and set(before["mean"]) == set(SCORES)
    export_run(run, precisions=("fp32",), engines=("onnxruntime",), score="energy+rmd")
    report, found = evaluate(run, EvalOptions(images["same"], images, bootstrap=0, shift_images=12))
    assert report["default_score"] == "energy+rmd" and set(report["mean"]) == {*SCORES, "energy+rmd"}
    assert "energy+rmd" in report["deployment"]
    with open_runner(run / "export") as runner:
        pixels = preprocess(open_dataset(images["same"]).image(3), runner.spec.preprocess)
        score = runner.infer({"image": pixels[None]})["ood_score"][0]
    assert found.scores["same"]["energy+rmd"][3] == pytest.approx(score, rel=1e-3)
    print_details(report)
    printed = capsys.readouterr().out
    assert "shipped *" in printed and "* energy+rmd: the score that the run's export ships" in printed
    (run / "export" / DETECTOR_NAME).write_bytes(b"")
    damaged, _ = evaluate(run, EvalOptions(images["same"], images, bootstrap=0, shift_images=0))
    assert damaged["default_score"] == "energy" and "left out" in capsys.readouterr().err


@pytest.mark.parametrize(("outliers", "ships"), [(["zoom"], "auto"), ([], "gen+mahalanobispp")])
def test_before_an_export_a_report_says_what_an_export_would_take(
    place, tmp_path, monkeypatch, capsys, outliers, ships
):
    run = Path(shutil.copytree(place / "run", tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    config["loss"]["outliers"] = outliers
    (run / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("ssod_edge.detect.choice.LEAST_UNASKED", 1)
    report, _ = evaluate(run, EvalOptions(ood_data={"same": str(Path(config["data"]))}, bootstrap=0))
    assert (report["ships"], report["default_score"]) == (ships, "energy")
    print_details(report)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("`ssod-edge export` chooses one" in printed) == (ships == "auto")


def test_other_classes_missing_data_and_a_checkpoint_without_splits_are_refused(place, tmp_path):
    write_folder(tmp_path / "four", classes=4, per_class=2)
    with pytest.raises(UsageError, match="is none of the model's"):
        evaluate(place / "run", EvalOptions(str(tmp_path / "four")))
    with pytest.raises(UsageError, match="does not exist"):
        evaluate(place / "run", EvalOptions(str(place / "test"), {"none": str(tmp_path / "none")}))
    (tmp_path / "copy.safetensors").write_bytes((place / "run" / "best.safetensors").read_bytes())
    with pytest.raises(UsageError, match=r"no readable splits\.json"):
        evaluate(tmp_path / "copy.safetensors")
    with pytest.raises(UsageError, match="does not exist"):
        evaluate(tmp_path / "nothing")


def copy_run(place, target, **meta):
    shutil.copytree(place / "run", target)
    if meta:
        tensors, before = load_checkpoint(target / BEST)
        save_checkpoint(target / BEST, tensors, {**before, **meta})
    return target


def test_id_images_of_some_of_the_models_classes_are_matched_by_name(place, tmp_path, capsys):
    (tmp_path / "some.txt").write_text("class1\nclass2\n")
    (tmp_path / "other.txt").write_text("class0\n")
    _, whole = evaluate(place / "run", EvalOptions(str(place / "test"), bootstrap=0))
    report, part = evaluate(
        place / "run",
        EvalOptions(
            f"{place / 'test'}@{tmp_path / 'some.txt'}",
            {"other": f"{place / 'test'}@{tmp_path / 'other.txt'}"},
            bootstrap=0,
        ),
    )
    every, some = whole.scores, part.scores
    assert report["n_id"] == 10  # another number of images in a batch: their last digits differ on some processors
    np.testing.assert_allclose(some["id"]["energy"], every["id"]["energy"][5:], rtol=1e-5)
    assert part.outputs["id"].labels.tolist() == 5 * [1] + 5 * [2] and report["classes"] == [
        "class0",
        "class1",
        "class2",
    ]
    np.testing.assert_allclose(some["other"]["energy"], every["id"]["energy"][:5], rtol=1e-5)
    assert "holds images" not in capsys.readouterr().err


@pytest.mark.parametrize("val", [[0], [10**6], [-1], ["a"], 3, [[0, 1]]])
def test_splits_that_were_edited_are_refused(place, tmp_path, val):
    run = copy_run(place, tmp_path / "run")
    record = json.loads((run / "splits.json").read_text())
    (run / "splits.json").write_text(json.dumps({**record, "val": val}))
    with pytest.raises(UsageError, match=r"splits\.json.*--id"):
        evaluate(run)


def test_data_that_moved_are_named_as_the_path_of_that_time(place, tmp_path):
    with pytest.raises(UsageError, match="'photos' does not exist.*path that was recorded at training.*--id"):
        evaluate(copy_run(place, tmp_path / "run", data="photos"))
    with pytest.raises(UsageError, match="records no training data.*--id"):
        evaluate(copy_run(place, tmp_path / "foreign", data=None))


def test_ood_sets_that_are_in_distribution_get_a_warning(place, capsys):
    shutil.copytree(place / "data", place / "copy", dirs_exist_ok=True)
    ood = {"same": "copy", "part": "data/class1", "test": "test", "grey": "grey"}
    evaluate(
        place / "run",
        EvalOptions(str(place / "test"), {name: str(place / data) for name, data in ood.items()}, bootstrap=0),
    )
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: the OOD set")]
    assert [line.split("'")[1] for line in warned] == ["same", "part", "test"]


def test_id_images_that_are_not_new_get_a_warning(place, tmp_path, capsys):
    run = copy_run(place, tmp_path / "run")
    model, meta = (opened := Run.at(run)).model, opened.meta
    source, fingerprint = open_dataset(str(place / "test")), open_dataset(str(place / "test")).fingerprint[:12]
    spec = Spec(
        model.backbone_name, model.classes, model.preprocess, {"name": "rmd", "evidence": ""}, True, "",
        detector={"sha256": "", "data": f"'x', fingerprint {fingerprint}, half that fits the detector"},
        choice={"known": "'y', val split 0123456789ab"},
    )  # fmt: skip
    moved = Path(shutil.copytree(place / "data", tmp_path / "moved"))
    cases: list[tuple[str | None, Spec | None, str]] = [
        (None, None, ""),
        (None, spec, "note: 'rmd' was chosen by these validation images"),
        (str(place / "run" / ".." / "data"), None, "warning: the network was trained on"),
        (str(place / "test"), None, ""),
        (str(moved), None, "warning: the network was trained on"),
        (str(place / "data" / "train"), None, "warning: the network was trained on"),
        (str(place / "test"), spec, "warning: 'rmd' was fitted to or chosen by a part of"),
    ]
    for data, shipped, expected in cases:
        warn_of_used_images(open_dataset(data) if data == str(moved) else source, data, meta, shipped)
        assert capsys.readouterr().err.startswith(expected) if expected else not capsys.readouterr().err
    evaluate(run, EvalOptions(str(place / "data"), {"grey": str(place / "grey")}, bootstrap=0))
    assert "warning: the network was trained on" in capsys.readouterr().err


def test_an_ood_row_that_was_not_trained_is_named_beside_the_table(place, tmp_path):
    run = copy_run(place, tmp_path / "run")
    tensors, meta = load_checkpoint(run / BEST)
    tensors["model.ood.weight"].zero_()
    save_checkpoint(run / BEST, tensors, {key: value for key, value in meta.items() if key != "tensors_sha256"})
    arguments = ["eval", str(run), "--ood", f"grey={place / 'grey'}", "--bootstrap", "0", "--details"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "`ssod` is constant" in result.stdout and "was not trained" in result.stdout
    assert json.loads((run / "eval-native.json").read_text())["ood_row_trained"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["{run}", "--backbone", "resnet18"], 2, "give a run, or --backbone"),
        (["{run}", "--json", "same", "--png", "./same"], 2, "--json and --png name the same file"),
        (["{run}", "--json", "{run}/eval-native.png"], 2, "--json and --png name the same file"),
        (["{run}", "--json", "-"], 2, "not the name of an output file"),
        (["{run}", "--json", "{run}"], 2, "is a folder"),
        (["{run}", "--png", "{run}/config.json/x.png"], 1, "cannot create the folder"),
    ],
)
def test_wrong_options_are_found_before_an_image_is_read(place, monkeypatch, arguments, code, reason):
    monkeypatch.setattr("ssod_edge.evaluation.evaluate.evaluate", lambda *_, **__: pytest.fail("it evaluated"))
    result = CliRunner().invoke(main, ["eval", *(item.format(run=place / "run") for item in arguments)])
    assert result.exit_code == code and re.search(reason, result.stderr), result.stderr


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
    assert result.exit_code == 0 and "unknown: grey" in result.output and "There is no threshold" in result.output
    report = json.loads((place / "run" / "eval-native.json").read_text())
    assert report["results"][0]["ci"]["auroc"][0] <= report["results"][0]["auroc"]
    with Image.open(place / "run" / "eval-native.png") as png:
        assert png.width > 300 and len(png.convert("RGB").getcolors(1 << 24)) > 5
    missing = CliRunner().invoke(main, ["eval", str(place / "nothing")])
    assert missing.exit_code == 2 and "error: " in missing.stderr


def test_a_run_on_data_whose_name_begins_with_demo_is_not_the_demo(place, tmp_path, monkeypatch):
    shutil.copytree(place / "data", tmp_path / "demos")
    monkeypatch.chdir(tmp_path)
    report, _ = evaluate(copy_run(place, tmp_path / "run", data="demos"), EvalOptions(bootstrap=0))
    assert report["results"] == [] and report["ood_data"] == {}


def test_names_are_printed_as_they_are_and_the_report_is_there_before(place, tmp_path, monkeypatch, capsys):
    run = copy_run(place, tmp_path / "run[new]")
    options = EvalOptions(str(place / "test"), {"[/a]": str(place / "grey")}, bootstrap=0)
    run_eval(str(run), options, png_file=str(tmp_path / "eval.png"))
    out = capsys.readouterr().out
    assert out.startswith("run[new]  (") and "[/a]" in out

    def closed(report):
        assert json.loads((tmp_path / "report.json").read_text()) == report
        raise BrokenPipeError

    monkeypatch.setattr("ssod_edge.evaluation.evaluate.print_summary", closed)
    with pytest.raises(BrokenPipeError):
        run_eval(str(run), options, json_file=str(tmp_path / "report.json"), png_file=str(tmp_path / "eval.png"))


def test_a_broken_ood_image_is_named(place, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.png").write_bytes(b"\x89PNG")
    result = CliRunner().invoke(main, ["eval", str(place / "run"), "--ood", f"bad={tmp_path / 'bad'}"])
    assert result.exit_code == 1 and "broken.png" in result.stderr and "Traceback" not in result.stderr


def test_an_interrupt_leaves_no_report(place, tmp_path):
    (tmp_path / "grey").mkdir()
    Image.new("L", (1500, 1500)).save(tmp_path / "grey" / "0.png")
    for index in range(1, 4000):  # more than are read before a busy machine looks
        (tmp_path / "grey" / f"{index}.png").hardlink_to(tmp_path / "grey" / "0.png")
    report = tmp_path / "report.json"
    code, stderr = interrupt_while_reading(
        tmp_path / "grey", "eval", place / "run", "--ood", f"grey={tmp_path / 'grey'}", "--json", report
    )
    assert code == 130
    assert [line.partition(":")[0] for line in stderr.splitlines()] == ["no figures at a threshold", "interrupted"]
    assert not report.exists()
