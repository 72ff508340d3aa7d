"""A study: its grid, what it does again and what not, and the figures of its table."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
from click.testing import CliRunner
from locks import holding
from PIL import Image
from safetensors.torch import save_file
from small import write_images
from specs import edit_spec

from ssod_edge.cli import main
from ssod_edge.errors import TrainingError, UsageError, VerificationError
from ssod_edge.evaluation.evaluate import EvalOptions
from ssod_edge.spec import load_spec
from ssod_edge.studies.study import (
    EVALUATION,
    STUDY,
    TABLE,
    StudyOptions,
    _exported,
    parse_grid,
    plan_study,
)
from ssod_edge.studies.summary import markdown, summarise
from ssod_edge.training.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint

TINY = [
    "--backbone",
    "test_efficientnet",
    "--size",
    "40",
    "--epochs",
    "1",
    "--batch-size",
    "8",
    "--workers",
    "0",
    "--weights",
    "none",
]


def test_a_grid_has_every_setting_with_the_first_seed_first():
    cells = parse_grid(["gamma=0.9,0.95", "outliers=none,rotate+zoom"], "3,1")
    assert [cell.seed for cell in cells] == [3] * 4 + [1] * 4
    assert cells[1].label == "gamma=0.9 outliers=rotate+zoom"
    assert cells[1].name == "gamma=0.9-outliers=rotate+zoom-seed=3"
    assert [cell.label for cell in parse_grid([], "0")] == ["as given"]


@pytest.mark.parametrize(
    ("vary", "seeds", "message"),
    [
        (["gama=0.9"], "0", "unknown setting 'gama' in --vary. Known: .*gamma"),
        (["seed=1,2"], "0", "unknown setting 'seed'"),
        (["gamma=high"], "0", "--vary gamma: 'high' is no float"),
        (["epochs=1.5"], "0", "'1.5' is no int"),
        (["compile=maybe"], "0", "'maybe' is no bool"),
        (["gamma"], "0", "expected --vary SETTING=VALUE"),
        (["gamma=0.9,0.9"], "0", "expected --vary"),
        (["gamma=0.9", "gamma=0.8"], "0", "a setting of its own"),
        ([], "0,x", "expected --seeds"),
        ([], "1,1", "expected --seeds"),
        ([], "0, 0", "expected --seeds"),
        ([], "\u00b2", "expected --seeds"),
        ([], "0,", "expected --seeds"),
    ],
)
def test_a_grid_that_makes_no_sense_is_named(vary, seeds, message):
    with pytest.raises(UsageError, match=message):
        parse_grid(vary, seeds)


def test_the_folder_of_a_run_is_one_folder():
    one, other = parse_grid(["weights=/a/b.pth,/a%2Fb.pth"], "0")
    assert one.name == "weights=%2Fa%2Fb.pth-seed=0" != other.name and "/" not in other.name
    assert one.label == "weights=/a/b.pth"


def test_means_and_deviations_over_seeds():
    def row(settings, seed, accuracy, auroc, row_trained=False):
        figures = {"auroc": auroc, "fpr_at_id_tpr95": 1 - auroc}
        found = {"mean": {"msp": figures, "ssod": figures}, "ood_row_trained": row_trained}
        return {"settings": settings, "seed": seed, "id_accuracy": accuracy, **found}

    rows = [row("b", 0, 0.8, 0.7), row("a", 0, 0.5, 0.5, row_trained=True), row("b", 1, 0.9, 0.9)]
    first, second = summarise(rows)
    assert (first["settings"], first["seeds"]) == ("b", [0, 1])
    assert first["accuracy"] == {"mean": pytest.approx(0.85), "sd": pytest.approx(0.0707, abs=1e-4)}
    assert first["auroc"]["msp"]["mean"] == pytest.approx(0.8) and second["auroc"]["msp"]["sd"] is None
    table = markdown([first, second], [{"settings": "c", "seed": 2, "error": "nan"}])
    assert "| b | 2 | 85.0 ± 7.1 | 80.0 ± 14.1 (20.0) |  |" in table  # no `ssod` of a row that was not trained
    assert "| a | 1 | 50.0 | 50.0 (50.0) | 50.0 (50.0) |" in table
    assert "failed: c, seed 2: nan" in table
    assert "95% of ID accepted. Every image went through 32 px.\n" in markdown(
        [first], [], "every image went through 32 px"
    )


def test_what_is_recorded_of_an_evaluation_is_as_before_where_no_codec_is_equalised():
    asked = [StudyOptions([], "0", {}, EvalOptions(via_size=32, via_jpeg=jpeg)).asked for jpeg in (None, 75)]
    assert "via_jpeg" not in asked[0] and asked[1] == {**asked[0], "via_jpeg": 75}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "data"
    write_images(folder)
    return folder


def study(data, out, *more):
    options = ["--vary", "method=ce,ssod", "--ood", f"same={data}", *TINY]
    return CliRunner().invoke(main, ["study", str(data), "-o", str(out), *options, *more])


def test_a_study_trains_evaluates_and_does_nothing_twice(data, tmp_path, monkeypatch):
    out = tmp_path / "study"
    result = study(data, out, "--seeds", "0")
    assert result.exit_code == 0, result.output
    record = json.loads((out / STUDY).read_text())
    assert [row["settings"] for row in record["summary"]] == ["method=ce", "method=ssod"]
    assert (out / TABLE).read_text() in result.stdout
    of_classes = record["runs"][0]["classification"]
    assert of_classes["by_class"] and "mistakes" not in of_classes, "single images are no part of a study"
    config = json.loads((out / "method=ce-seed=0" / "config.json").read_text())
    assert (config["loss"]["method"], config["seed"], config["epochs"]) == ("ce", 0, 1)

    trained = []
    from ssod_edge.studies import study as module

    start = module.start_run
    monkeypatch.setattr(module, "start_run", lambda *args: trained.append(args) or start(*args))
    (out / "method=ce-seed=0" / EVALUATION).write_text(
        (out / "method=ce-seed=0" / EVALUATION).read_text().replace('"n_id"', '"kept": 1, "n_id"', 1)
    )
    again = study(data, out, "--seeds", "0,1")
    assert again.exit_code == 0 and len(trained) == 2, "only the second seed is trained"
    record = json.loads((out / STUDY).read_text())
    assert record["runs"][0]["kept"] == 1, "an evaluation is not done again"
    assert [row["seeds"] for row in record["summary"]] == [[0, 1], [0, 1]]
    other = study(data, out, "--seeds", "0", "--lr", "0.1")
    assert other.exit_code == 2 and "holds a study with other options" in other.stderr


def test_two_processes_share_a_grid(data, tmp_path, monkeypatch):
    from ssod_edge.studies import study as module

    order = []
    start = module.start_run
    monkeypatch.setattr(module, "start_run", lambda *args: order.append(args[2]["method"]) or start(*args))
    out = tmp_path / "study"
    out.mkdir()
    with holding(out / ".method=ce-seed=0.lock", until=out / "method=ssod-seed=0" / EVALUATION):
        result = study(data, out, "--seeds", "0")
    assert result.exit_code == 0, result.output
    assert order == ["ssod", "ce"] and "another process is at it: going on with the next" in result.stderr
    record = json.loads((out / STUDY).read_text())
    assert [row["settings"] for row in record["summary"]] == ["method=ce", "method=ssod"], "in the order of the grid"
    assert not list(out.glob(".*"))


def test_the_table_keeps_the_runs_that_a_process_has_not_come_to_yet(data, tmp_path, monkeypatch):
    out = tmp_path / "study"
    assert study(data, out, "--seeds", "0").exit_code == 0
    rows = json.loads((out / STUDY).read_text())["runs"]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ssod_edge.studies.study._evaluated", interrupt)
    (out / "method=ce-seed=0" / BEST).unlink()
    assert study(data, out, "--seeds", "0").exit_code == 130
    monkeypatch.undo()
    assert json.loads((out / STUDY).read_text())["runs"] == rows
    result = study(data, out, "--seeds", "0")  # the first run is broken now
    record = json.loads((out / STUDY).read_text())
    assert result.exit_code == 1 and record["runs"] == rows[1:] and len(record["failed"]) == 1
    other = CliRunner().invoke(
        main, ["study", str(data), "-o", str(out), "--vary", "method=ce,ssod", "--ood", f"else={data}", *TINY]
    )
    assert other.exit_code == 1 and json.loads((out / STUDY).read_text())["runs"][0]["results"][0]["ood"] == "else"


def test_a_run_that_fails_is_named_and_the_others_are_done(data, tmp_path, monkeypatch):
    from ssod_edge.studies import study as module

    start = module.start_run

    def fail_first(data, out, options):
        if options["method"] == "ce":
            raise TrainingError("the loss is nan")
        return start(data, out, options)

    monkeypatch.setattr(module, "start_run", fail_first)
    result = study(data, tmp_path / "study", "--seeds", "0")
    assert result.exit_code == 1 and "failed: method=ce, seed 0: the loss is nan" in result.stdout
    assert "| method=ssod | 1 |" in result.stdout


@pytest.mark.slow
def test_every_run_can_be_exported_and_its_score_evaluated(data, tmp_path, monkeypatch):
    out = tmp_path / "study"
    result = study(data, out, "--seeds", "0", "--score", "energy+knn", "--calib-fraction", "0.4")
    assert result.exit_code == 0, result.output
    record = json.loads((out / STUDY).read_text())
    for row in record["runs"]:
        assert row["mean"]["shipped"] == row["mean"]["energy+knn"] and row["default_score"] == "energy+knn"
    assert "shipped" in (out / TABLE).read_text().splitlines()[0]
    monkeypatch.setattr(
        "ssod_edge.studies.study.export_run", lambda *_, **__: pytest.fail("an export is not made again")
    )
    again = study(data, out, "--seeds", "0", "--score", "energy+knn", "--calib-fraction", "0.4")
    assert again.exit_code == 0 and json.loads((out / STUDY).read_text())["summary"] == record["summary"]


def test_a_study_of_heads_is_not_trained_twice(data, tmp_path, monkeypatch):
    """Such a run keeps no last checkpoint, which others are gone on with."""
    asked = ["study", str(data), "-o", str(tmp_path / "study"), "--vary", "head=stages,last", "--seeds", "0"]
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.safetensors")
    alike = ["--backbone", "test_efficientnet", "--size", "64", "--weights", str(tmp_path / "weights.safetensors")]
    asked += ["--tune", "head", "--ood", f"same={data}", "--workers", "0", *alike]
    first = CliRunner().invoke(main, asked)
    assert first.exit_code == 0, first.output
    monkeypatch.setattr("ssod_edge.studies.study.start_run", lambda *_: pytest.fail("a run is not trained again"))
    again = CliRunner().invoke(main, asked)
    assert again.exit_code == 0 and again.stdout == first.stdout
    other = CliRunner().invoke(main, [*asked, "--group", "x"])
    assert other.exit_code == 2 and "holds a study with other options" in other.stderr


def test_a_run_that_ended_by_itself_is_not_gone_on_with(data, tmp_path, monkeypatch):
    monkeypatch.setattr("ssod_edge.training.loop.auto_epochs", lambda steps: (30, 1))
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.safetensors")
    last = ("--seeds", "0", "--epochs", "auto", "--lr", "1e-9", "--weights", str(tmp_path / "weights.safetensors"))
    first = study(data, tmp_path / "study", *last)
    assert first.exit_code == 0, first.output
    checkpoint = load_checkpoint(tmp_path / "study" / "method=ce-seed=0" / LAST)[1]
    assert checkpoint["progress"]["epoch"] < 30, "nothing is learnt at such a rate"
    for begun in ("start_run", "resume_run"):
        monkeypatch.setattr(f"ssod_edge.studies.study.{begun}", lambda *_: pytest.fail("a run is not trained again"))
    again = study(data, tmp_path / "study", *last)
    assert again.exit_code == 0 and again.stdout == first.stdout


CALIBRATED = ("--calib-fraction", "0.5", "--seeds", "0")


@pytest.mark.slow
def test_an_export_that_is_lost_or_another_is_made_again(data, tmp_path, monkeypatch):
    out = tmp_path / "study"
    assert one_cell(data, out, *CALIBRATED, "--score", "msp").exit_code == 0
    run = out / "seed=0"
    (row,) = json.loads((out / STUDY).read_text())["runs"]
    assert row["default_score"] == "msp" and row["mean"]["shipped"] == row["mean"]["msp"] != row["mean"]["energy"]
    # An evaluation of another export's score is made again.
    edit_spec(run / "export", lambda values: values.update(choice={"known": "x"}))
    kept = json.loads((run / EVALUATION).read_text())
    (run / EVALUATION).write_text(json.dumps({**kept, "shipped": ["energy", None]}))
    assert one_cell(data, out, *CALIBRATED, "--score", "auto").exit_code == 0, "auto has chosen it before"
    assert json.loads((run / EVALUATION).read_text())["shipped"] == ["msp", None]

    monkeypatch.setattr("ssod_edge.studies.study.export_run", lambda *_, score, **__: f"{score} made again")
    assert load_spec(run / "export") == _exported(run, "auto")
    assert _exported(run, "msp") == "msp made again", "the one there was chosen by auto"
    edit_spec(run / "export", lambda values: values.update(choice={}))
    assert load_spec(run / "export") == _exported(run, "msp")
    assert [_exported(run, score) for score in ("auto", "energy")] == ["auto made again", "energy made again"]
    edit_spec(run / "export", lambda values: values.update(source={"checkpoint_sha256": "0" * 64}))
    assert _exported(run, "msp") == "msp made again"
    shutil.rmtree(run / "export")
    assert _exported(run, "msp") == "msp made again"


def test_a_shipped_score_that_was_not_evaluated_is_an_error(data, tmp_path, monkeypatch):
    exported = SimpleNamespace(score_name="msp", detector={}, choice={})
    monkeypatch.setattr("ssod_edge.studies.study.export_run", lambda *_, **__: exported)
    result = one_cell(data, tmp_path / "study", *CALIBRATED, "--score", "msp")
    assert result.exit_code == 1 and "the score 'msp' of the export of" in result.stderr
    assert "| as given" not in result.stdout and "failed: as given, seed 0: the score 'msp'" in result.stdout


def test_a_score_without_ood_images_leaves_accuracy(data, tmp_path, monkeypatch):
    exported = SimpleNamespace(score_name="energy", detector={}, choice={})
    monkeypatch.setattr("ssod_edge.studies.study.export_run", lambda *_, **__: exported)
    out = tmp_path / "study"
    result = CliRunner().invoke(main, ["study", str(data), "-o", str(out), *TINY, *CALIBRATED, "--score", "energy"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| settings | seeds | accuracy |\n")


def one_cell(data, out, *more):
    return CliRunner().invoke(main, ["study", str(data), "-o", str(out), "--ood", f"same={data}", *TINY, *more])


def test_settings_that_do_not_work_are_failures_of_their_runs(data, tmp_path):
    out = tmp_path / "study"
    grid = ("--vary", "group=.,.+", "--vary", "gamma=0.3,0.9", "--method", "ssod")
    more = (*grid, "--ood", f"x={data}", *TINY)
    result = CliRunner().invoke(main, ["study", str(data), "-o", str(out), "--seeds", "0", *more])
    assert result.exit_code == 1 and "| group=.+ gamma=0.9 | 1 |" in result.stdout, result.output
    failed = {row["settings"]: row["error"] for row in json.loads((out / STUDY).read_text())["failed"]}
    assert len(failed) == 3 and "has 1 group(s)" in failed["group=. gamma=0.9"]
    assert "gamma must satisfy" in failed["group=.+ gamma=0.3"]


def test_a_score_that_the_settings_do_not_train_costs_no_training(data, tmp_path, monkeypatch):
    def fail(data, out, options):
        raise TrainingError("the loss is nan")

    monkeypatch.setattr("ssod_edge.studies.study.start_run", fail)
    result = study(data, tmp_path / "study", "--seeds", "0", "--score", "energy+ssod")
    assert result.exit_code == 1 and "failed: method=ssod, seed 0: the loss is nan" in result.stdout
    assert "failed: method=ce, seed 0: --score energy+ssod needs the OOD row" in result.stdout


def test_an_export_that_fails_is_the_failure_of_its_run(data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise VerificationError("nothing is released")

    monkeypatch.setattr("ssod_edge.studies.study.export_run", fail)
    result = one_cell(data, tmp_path / "study", "--seeds", "0", "--score", "msp")
    assert result.exit_code == 1 and "failed: as given, seed 0: nothing is released" in result.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ood", "x=/nonexistent"], "'/nonexistent' does not exist"),
        (["--id", "/nonexistent"], "'/nonexistent' does not exist"),
        (["--id", "OTHER"], "is none of the model's"),
        (["--baselines", "Nobody"], "there is no baseline 'nobody'"),
        (["--fit-images", "20"], "name them with --baselines"),
        (["--baselines", "KNN", "--fit-images", "2"], "--fit-images 2 is fewer than one image for each of the 7"),
        (["--gamma", "0.3"], "gamma must satisfy"),
        (["--weights", "/nonexistent.pth"], "'/nonexistent.pth' does not exist"),
    ],
)
def test_what_cannot_work_is_found_before_training(data, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr("ssod_edge.studies.study.start_run", lambda *_: pytest.fail("nothing is trained"))
    for name in "az":
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "other" / name / "0.png")
    result = one_cell(
        data, tmp_path / "study", *(str(tmp_path / "other") if part == "OTHER" else part for part in more)
    )
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "study").exists()


def test_settings_that_train_in_no_run_end_the_study_with_a_usage_error(data, tmp_path):
    result = one_cell(data, tmp_path / "study", "--group", ".", "--seeds", "0")
    assert result.exit_code == 2 and "has 1 group(s)" in result.stderr
    assert one_cell(data, tmp_path / "study", "--seeds", "0").exit_code == 0, "nothing was trained with other options"


def test_an_interrupted_first_run_fixes_the_options(data, tmp_path, monkeypatch):
    out = tmp_path / "study"

    def interrupt(data, folder, options):
        (folder / options["name"]).mkdir()
        (folder / options["name"] / LAST).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("ssod_edge.studies.study.start_run", interrupt)
    assert study(data, out, "--lr", "0.5").exit_code == 130
    assert json.loads((out / STUDY).read_text())["options"]["lr"] == 0.5
    other = study(data, out, "--lr", "0.001")
    assert other.exit_code == 2 and "holds a study with other options" in other.stderr


@pytest.mark.parametrize("damaged", ["{", "[]", "[" * 100_000, '{"runs": [3]}', '{"runs": [], "data": NaN}'])
def test_a_damaged_record_is_named(data, tmp_path, damaged):
    (tmp_path / STUDY).write_text(damaged)
    result = study(data, tmp_path)
    assert result.exit_code == 4 and "is damaged" in result.stderr and "remove it" in result.stderr


def test_the_example_of_the_help_can_be_run(data):
    text = CliRunner().invoke(main, ["study", "--help"]).stdout.partition("Options:")[0]
    example = re.findall(r"--vary\s+(\S+=[^\s.]+)", text)
    cells = plan_study(str(data), StudyOptions(example, "0", {"backbone": "test_efficientnet", "size": 40}))
    assert len(example) == 2 and len(cells) == 4


def test_options_that_contradict_the_grid_are_refused(data, tmp_path):
    result = study(data, tmp_path / "study", "--method", "both")
    assert result.exit_code == 2 and "method cannot be given both" in result.stderr
    result = study(data, tmp_path / "study", "--seed", "1")
    assert result.exit_code == 2 and "--seeds, not --seed" in result.stderr
    result = study(data, tmp_path / "study", "--score", "energy+best")
    assert result.exit_code == 2 and "got 'best'" in result.stderr
    assert not (tmp_path / "study").exists()


def test_a_run_that_an_earlier_default_trained_is_not_mixed_with_new_ones(data, tmp_path):
    out = tmp_path / "study"
    assert one_cell(data, out, "--seeds", "0").exit_code == 0
    (run,) = (path.parent for path in out.glob("*/config.json"))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "workers": 9, "lr": config["lr"] / 2}))
    result = one_cell(data, out, "--seeds", "0")
    assert result.exit_code == 2 and "was trained with other settings" in result.output and "lr was" in result.output
    (run / "config.json").write_text(json.dumps({**config, "workers": 9}))
    assert one_cell(data, out, "--seeds", "0").exit_code == 0


@pytest.mark.slow
def test_an_evaluation_of_other_images_or_weights_is_made_again(data, tmp_path, monkeypatch):
    from ssod_edge.studies import study as module

    evaluated = []
    evaluate = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda *args, **kw: evaluated.append(args) or evaluate(*args, **kw))
    out, grey = tmp_path / "study", tmp_path / "grey"
    write_images(grey)
    options = ("--seeds", "0", "--ood", f"grey={grey}")
    assert one_cell(data, out, *options).exit_code == 0 and len(evaluated) == 1
    assert one_cell(data, out, *options).exit_code == 0 and len(evaluated) == 1
    next(grey.rglob("*.png")).unlink()
    assert one_cell(data, out, *options).exit_code == 0 and len(evaluated) == 2
    (best,) = out.glob(f"*/{BEST}")
    tensors, meta = load_checkpoint(best)
    name = next(name for name in tensors if name.endswith("bias"))
    own = ("schema_version", "tensors_sha256")
    changed = {**tensors, name: tensors[name] + 1}
    save_checkpoint(best, changed, {key: value for key, value in meta.items() if key not in own})
    assert one_cell(data, out, *options).exit_code == 0 and len(evaluated) == 3
    without_report = json.dumps(json.loads((best.parent / EVALUATION).read_text()) | {"report": None})
    for number, damaged in enumerate(("{", "[]", without_report), 4):
        (best.parent / EVALUATION).write_text(damaged)
        assert one_cell(data, out, *options).exit_code == 0 and len(evaluated) == number
