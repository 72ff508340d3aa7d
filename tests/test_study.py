"""A study: its grid, what it does again and what not, and the figures of its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from small import write_images

from ssod_edge.cli import main
from ssod_edge.errors import TrainingError, UsageError
from ssod_edge.study import EVALUATION, STUDY, TABLE, markdown, parse_grid, summarise

TINY = ["--backbone", "test_efficientnet", "--size", "40", "--epochs", "1", "--batch-size", "8", "--workers", "0"]


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
    ],
)
def test_a_grid_that_makes_no_sense_is_named(vary, seeds, message):
    with pytest.raises(UsageError, match=message):
        parse_grid(vary, seeds)


def test_means_and_deviations_over_seeds():
    def row(settings, seed, accuracy, auroc):
        figures = {"auroc": auroc, "fpr_at_id_tpr95": 1 - auroc}
        return {"settings": settings, "seed": seed, "id_accuracy": accuracy, "mean": {"msp": figures}}

    rows = [row("b", 0, 0.8, 0.7), row("a", 0, 0.5, 0.5), row("b", 1, 0.9, 0.9)]
    first, second = summarise(rows)
    assert (first["settings"], first["seeds"]) == ("b", [0, 1])
    assert first["accuracy"] == {"mean": pytest.approx(0.85), "sd": pytest.approx(0.0707, abs=1e-4)}
    assert first["auroc"]["msp"]["mean"] == pytest.approx(0.8) and second["auroc"]["msp"]["sd"] is None
    table = markdown([first, second], [{"settings": "c", "seed": 2, "error": "nan"}])
    assert "| b | 2 | 85.0 ± 7.1 | 80.0 ± 14.1 |" in table and "| a | 1 | 50.0 | 50.0 |" in table
    assert "failed: c, seed 2: nan" in table


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
    config = json.loads((out / "method=ce-seed=0" / "config.json").read_text())
    assert (config["loss"]["method"], config["seed"], config["epochs"]) == ("ce", 0, 1)

    trained = []
    from ssod_edge import study as module

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


def test_a_run_that_fails_is_named_and_the_others_are_done(data, tmp_path, monkeypatch):
    from ssod_edge import study as module

    start = module.start_run

    def fail_first(data, out, options):
        if options["method"] == "ce":
            raise TrainingError("the loss is nan")
        return start(data, out, options)

    monkeypatch.setattr(module, "start_run", fail_first)
    result = study(data, tmp_path / "study", "--seeds", "0")
    assert result.exit_code == 1 and "failed: method=ce, seed 0: the loss is nan" in result.stdout
    assert "| method=ssod | 1 |" in result.stdout


def test_every_run_can_be_exported_and_its_score_evaluated(data, tmp_path, monkeypatch):
    out = tmp_path / "study"
    result = study(data, out, "--seeds", "0", "--score", "energy+knn", "--calib-fraction", "0.5")
    assert result.exit_code == 0, result.output
    record = json.loads((out / STUDY).read_text())
    for row in record["runs"]:
        assert row["mean"]["shipped"] == row["mean"]["energy+knn"] and row["default_score"] == "energy+knn"
    assert "shipped" in (out / TABLE).read_text().splitlines()[0]
    monkeypatch.setattr("ssod_edge.study.export_run", lambda *_, **__: pytest.fail("an export is not made again"))
    again = study(data, out, "--seeds", "0", "--score", "energy+knn", "--calib-fraction", "0.5")
    assert again.exit_code == 0 and json.loads((out / STUDY).read_text())["summary"] == record["summary"]


def test_options_that_contradict_the_grid_are_refused(data, tmp_path):
    result = study(data, tmp_path / "study", "--method", "both")
    assert result.exit_code == 2 and "method cannot be given both" in result.stderr
    result = study(data, tmp_path / "study", "--seed", "1")
    assert result.exit_code == 2 and "--seeds, not --seed" in result.stderr
    result = study(data, tmp_path / "study", "--score", "energy+best")
    assert result.exit_code == 2 and "got 'best'" in result.stderr
    assert not (tmp_path / "study").exists()
