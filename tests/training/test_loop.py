"""Training: it learns, it resumes to the same weights after a kill, and it stops where it must."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from click.testing import CliRunner
from locks import holding
from pictures import write_folder

import ssod_edge.training.loop
import ssod_edge.training.session
from ssod_edge import terminal
from ssod_edge.cli import main
from ssod_edge.config import AUTO_EPOCHS, LossConfig, Preprocess, TrainConfig
from ssod_edge.data.sources import open_dataset
from ssod_edge.errors import EXIT_INTERRUPTED, ArtifactError, BusyError, ImageError, TrainingError, UsageError
from ssod_edge.evaluation.evaluate import EvalOptions, evaluate
from ssod_edge.ops import kernel_in_use
from ssod_edge.recipes import train_config
from ssod_edge.terminal import TrainingBar
from ssod_edge.training.checkpoint import AVERAGE, BEST, LAST, load_checkpoint, save_checkpoint
from ssod_edge.training.distributed import check_same_images, check_same_start, from_main
from ssod_edge.training.loop import _Loop, resume_run, train
from ssod_edge.training.meters import Meters, epoch_figures
from ssod_edge.training.model import build_model
from ssod_edge.training.objective import TrainStep
from ssod_edge.training.run import Run, load_config
from ssod_edge.training.schedule import auto_epochs, learning_rate
from ssod_edge.training.settings import default_name


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "pictures", per_class=16)


@pytest.fixture
def config(pictures):
    return TrainConfig(
        backbone="test_efficientnet", data=str(pictures), name="run", epochs=3, batch_size=8, lr=1e-2, workers=0,
        preprocess=Preprocess(input_size=40), loss=LossConfig(gamma=0.6, warmup_epochs=1.0), half_size_epochs=1,
    )  # fmt: skip


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_records_what_it_did(config, tmp_path):
    run = train(config, tmp_path)
    model, meta = (opened := Run.at(run)).model, opened.meta
    history = rows(run)
    assert run == tmp_path / "run" and not model.training
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert history[-1]["ce"] < history[0]["ce"] and history[-1]["val_accuracy"] == 1.0
    assert history[0]["id_patches"] == 0 and history[-1]["id_patches"] > 0  # the first epoch warms up
    assert sum(history[-1][kind] for kind in ("id_patches", "ood_patches", "ignored_patches")) == pytest.approx(1)
    assert {row["kernel"] for row in history} == {kernel_in_use("cpu")}
    assert (model.ood.weight != 0).any(), "the OOD row was not trained"
    splits = json.loads((run / "splits.json").read_text())
    assert meta["splits_hash"] == splits["splits_hash"] and not set(splits["val"]) & set(splits["calib"])
    assert load_config(run) == config


def test_a_class_list_trains_on_those_classes_alone(config, tmp_path):
    (tmp_path / "known.txt").write_text("class0\nclass2\n")
    data = f"{config.data}@{tmp_path / 'known.txt'}"
    run = train(replace(config, data=data, loss=LossConfig(method="ce")), tmp_path)
    assert Run.at(run).model.classes == ("class0", "class2") and rows(run)[-1]["val_accuracy"] == 1.0


def test_a_transformer_trains_with_made_images_at_its_one_size(config, tmp_path):
    loss = LossConfig(method="ce", outliers=("rotate", "blend"), warmup_epochs=0)
    vit = replace(config, backbone="test_vit", epochs=1, half_size_epochs=0, loss=loss, preprocess=Preprocess(48))
    model = Run.at(train(vit, tmp_path)).model
    assert model.no_patches and (model.ood.weight != 0).any()
    with pytest.raises(UsageError, match=r"does not run at 24 px \(.*\). Train without it: --half-size-epochs 0"):
        train(replace(vit, epochs=2, half_size_epochs=1), tmp_path / "other")
    with pytest.raises(UsageError, match="--method ssod labels the patches"):
        train(replace(vit, loss=LossConfig()), tmp_path / "other")
    assert not (tmp_path / "other" / "run").exists()


def test_a_run_is_trained_by_one_process(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with holding(run / ".lock"):
        with pytest.raises(BusyError, match=f"the run '{run}' is being trained by another process"):
            train(config, tmp_path)
        assert [path.name for path in run.iterdir()] == [".lock"], "what the other made is left alone"
    train(replace(config, epochs=1, half_size_epochs=0), tmp_path)
    assert not (run / ".lock").exists()
    with holding(run / ".lock"), pytest.raises(BusyError):
        resume_run(run)
    assert (run / "last.safetensors").exists()


def test_a_start_that_fails_leaves_the_run_of_another_alone(config, tmp_path, monkeypatch):
    """The other process began, and finished, while this one was on its way to the lock."""
    run, claim = tmp_path / "run", ssod_edge.training.loop.claim

    def late(*args):
        monkeypatch.setattr(ssod_edge.training.loop, "claim", claim)
        train(replace(config, epochs=1, half_size_epochs=0), tmp_path)
        return claim(*args)

    monkeypatch.setattr(ssod_edge.training.loop, "claim", late)
    with pytest.raises(UsageError, match="exists already"):
        train(replace(config, seed=7), tmp_path)
    assert load_config(run).seed == 0 and (run / LAST).exists() and (run / "splits.json").exists()


def test_a_model_from_before_the_ood_loss_is_never_the_best_one(config, tmp_path, monkeypatch):
    accuracies = iter([0.9, 0.5, 0.4])  # the warm-up epoch has the highest
    monkeypatch.setattr(
        "ssod_edge.training.loop.collect", lambda *_, **__: SimpleNamespace(accuracy=next(accuracies), loss=1.0)
    )
    assert Run.at(train(config, tmp_path)).meta["epoch"] == 2


@pytest.fixture
def auto(config, tmp_path):
    """--epochs auto, from weights of its own; five steps an epoch are at most 40 of them."""
    model = build_model("test_efficientnet", ("a", "b"), config.preprocess)
    torch.save(model.backbone.state_dict(), tmp_path / "w.pth")
    loss = LossConfig(method="ce", warmup_epochs=0.0)
    return replace(config, epochs=AUTO_EPOCHS, weights=str(tmp_path / "w.pth"), half_size_epochs=0, loss=loss)


def validate_as(monkeypatch, *figures):
    """Epochs whose validation gives these accuracies and losses, for the average of the weights and for them."""
    found = iter([SimpleNamespace(accuracy=accuracy, loss=loss) for accuracy, loss in figures for _ in range(2)])
    monkeypatch.setattr("ssod_edge.training.loop.collect", lambda *_, **__: next(found))


FIGURES = [(0.5, 1.0), (0.6, 1.0), (0.6, 0.9), *[(0.6, 0.9)] * 10]  # the last gain is the third epoch's


def test_epochs_auto_end_where_the_validation_images_gain_nothing(auto, tmp_path, monkeypatch, capsys):
    validate_as(monkeypatch, *FIGURES)
    run = train(auto, tmp_path)
    said = capsys.readouterr().err
    assert "at most 40 epochs; 10 without a gain on the validation images end them before" in said
    assert "epoch 13/40" in said and len(rows(run)) == 13 and load_config(run) == auto
    assert Run.at(run).meta["epoch"] == 13 and load_checkpoint(run / LAST)[1]["finished"]
    assert [row["val_loss"] for row in rows(run)[:3]] == [1.0, 1.0, 0.9]
    resume_run(run)
    assert "is finished already (13 epochs)" in capsys.readouterr().err


def test_epochs_auto_that_were_interrupted_go_on_to_the_same_weights_and_end(auto, tmp_path, monkeypatch):
    validate_as(monkeypatch, *FIGURES)
    whole = train(auto, tmp_path / "whole")
    validate_as(monkeypatch, *FIGURES)
    step = _Loop._train_batch

    def stop(self, *given):
        if (self.progress.epoch, self.progress.step) == (6, 2):
            raise KeyboardInterrupt
        return step(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Loop, "_train_batch", stop)
        train(auto, tmp_path, save_minutes=0)
    broken = tmp_path / "run"
    stopped = load_checkpoint(broken / LAST)[1]
    assert not stopped["finished"] and stopped["progress"]["step"] == 2
    assert len(rows(resume_run(broken))) == 13
    for name in (BEST, LAST):
        expected, found = load_checkpoint(whole / name)[0], load_checkpoint(broken / name)[0]
        assert expected.keys() == found.keys() and any(key.startswith(AVERAGE) for key in found) == (name == LAST)
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


@pytest.mark.parametrize("average_wins", [True, False])
def test_the_better_one_of_the_weights_and_their_average_is_kept(auto, tmp_path, monkeypatch, average_wins):
    figures = [SimpleNamespace(accuracy=accuracy, loss=1.0) for accuracy in (0.7, 0.7 if average_wins else 0.8)]
    found = iter(figures)
    monkeypatch.setattr("ssod_edge.training.loop.collect", lambda *_, **__: next(found))
    monkeypatch.setattr("ssod_edge.training.loop.auto_epochs", lambda steps: (1, 1))
    run = train(auto, tmp_path)
    best, last = load_checkpoint(run / BEST)[0], load_checkpoint(run / LAST)[0]
    prefix = AVERAGE if average_wins else "model."
    assert all(torch.equal(value, last[prefix + key.removeprefix("model.")]) for key, value in best.items())
    name = "backbone.classifier.weight"
    assert not torch.equal(last[f"model.{name}"], last[AVERAGE + name])
    assert rows(run)[0]["averaged"] == average_wins and rows(run)[0]["val_accuracy"] == (0.7 if average_wins else 0.8)


def test_a_warm_up_is_no_measure_of_a_gain(auto, tmp_path, monkeypatch):
    validate_as(monkeypatch, (0.9, 0.1), (0.5, 1.0), *[(0.5, 1.0)] * 10)
    run = train(replace(auto, loss=LossConfig(gamma=0.6, warmup_epochs=1.0)), tmp_path)
    assert len(rows(run)) == 12 and Run.at(run).meta["epoch"] == 12


def test_a_run_of_an_earlier_release_goes_on(config, tmp_path):
    run = train(replace(config, epochs=1, half_size_epochs=0), tmp_path)
    tensors, meta = load_checkpoint(run / LAST)
    progress = {key: meta["progress"][key] for key in ("epoch", "step", "best_accuracy", "seconds", "meters")}
    kept = {key: meta[key] for key in meta if key not in ("schema_version", "tensors_sha256", "finished")}
    save_checkpoint(run / LAST, tensors, {**kept, "progress": progress})
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"epochs": 2}))
    assert len(rows(resume_run(run))) == 2


def test_alpha_zero_is_plain_cross_entropy(config, tmp_path):
    run = train(replace(config, epochs=2, loss=LossConfig(alpha=0.0)), tmp_path)
    assert not Run.at(run).model.ood.weight.any() and rows(run)[-1]["ood_loss"] == 0


@pytest.mark.parametrize(
    ("loss", "fix"),
    [
        (LossConfig(warmup_epochs=1.0), "Use more --epochs or fewer --warmup-epochs"),
        (LossConfig(warmup_epochs=0.0, gamma=1 - 1e-9), "Use more --epochs, or a --gamma nearer to 0.5"),
        (LossConfig(alpha=0.0), ""),
        (LossConfig(method="lbf", warmup_epochs=0.0, gamma=0.6), ""),
        (LossConfig(method="ce", outliers=("zoom",), warmup_epochs=1.0), "Use more --epochs or fewer --warmup-epochs"),
    ],
)
def test_an_ood_row_that_never_learned_is_said_at_the_end(config, tmp_path, capsys, loss, fix):
    train(replace(config, epochs=1, half_size_epochs=0, loss=loss), tmp_path)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("warning: the OOD row was not trained") == bool(fix) and last.endswith(fix)


def test_too_few_calibration_images_are_said_before_the_first_epoch(config, tmp_path, capsys):
    train(replace(config, epochs=1, half_size_epochs=0, val_fraction=0.05, calib_fraction=0.05), tmp_path)
    images, opening, first = capsys.readouterr().err.splitlines()[:3]
    assert re.fullmatch(
        r"3 classes, 16 images of each; test_efficientnet at 40 px from random weights, on cpu with \d+ threads?; "
        r"about \d+ s, by its first images",
        opening,
    )
    assert images == "42 images to train on, 3 to validate on, 3 for thresholds"
    assert "calibration split has 3 images" in first and "needs 19" in first
    assert "--calib-fraction" in first and "export --id" in first


def test_a_batch_is_never_larger_than_what_there_is(config, tmp_path, capsys):
    run = train(replace(config, epochs=1, half_size_epochs=0, batch_size=64), tmp_path)
    splits = json.loads((run / "splits.json").read_text())
    assert f"note: a batch is {splits['train']} images, all that there are (--batch-size 64)" in capsys.readouterr().err
    assert len(rows(run)) == 1 and load_config(run).batch_size == 64


def test_a_run_keeps_to_the_parts_of_its_data(config, tmp_path, capsys):
    for name, count in (("train", 12), ("val", 4), ("test", 2)):
        write_folder(tmp_path / "photos" / name, per_class=count)
    data = tmp_path / "photos"
    run = train(replace(config, data=str(data), epochs=1, half_size_epochs=0), tmp_path)
    said = capsys.readouterr().err
    assert f"not used: 6 images of 'test' (ssod-edge eval RUN --id {data}/test)" in said
    assert "30 images to train on, 12 to validate on, 6 for thresholds" in said
    source, splits = Run.at(run).splits("none")
    assert {source.source(int(index)).split("/")[0] for index in splits.val} == {"val"}
    assert {source.source(int(index)).split("/")[0] for index in (*splits.train, *splits.calib)} == {"train"}
    shutil.rmtree(data / "test")
    assert Run.at(run).splits("none")[1].hash == splits.hash
    (data / "val" / "class0" / "00.png").unlink()
    with pytest.raises(UsageError, match="changed since training"):
        Run.at(run).splits("none")


def test_a_run_reads_back_the_validation_images_that_were_named(config, tmp_path):
    val = write_folder(tmp_path / "val", per_class=4)
    run = train(replace(config, val=str(val), epochs=1, half_size_epochs=0), tmp_path)
    _, splits = Run.at(run).splits("none")
    assert splits.val.tolist() == list(range(48, 60)) and splits.calib.max() < 48
    record = json.loads((run / "splits.json").read_text())
    assert record["val_data"] == str(val) and record["val_fingerprint"] == Run.at(run).meta["val_fingerprint"]
    assert record["data_fingerprint"] == open_dataset(config.data).fingerprint
    assert train(replace(config, epochs=1, half_size_epochs=0), tmp_path, resume=True) == run
    (val / "class0" / "00.png").unlink()
    with pytest.raises(UsageError, match=f"the validation data set '{val}' changed since training"):
        Run.at(run).splits("none")


def test_groups_are_counted_at_the_start_and_kept_together(config, tmp_path, capsys):
    grouped = replace(config, group=r"(class\d/\d)", epochs=1, half_size_epochs=0)  # 00 to 09, and 10 to 15
    with pytest.raises(UsageError, match="class 'class0' of .* has 2 group"):
        train(grouped, tmp_path)
    run = train(replace(grouped, group=r"(class\d/\d)[0-4]"), tmp_path)  # 05 to 09 and 15 stand alone
    assert "groups: 6 of up to 5 images, and 18 images on their own" in capsys.readouterr().err
    source, splits = Run.at(run).splits("none")
    sides = [
        {source.source(int(i))[:8] for i in part if source.source(int(i))[8] < "5"} for part in vars(splits).values()
    ]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


def test_files_that_are_no_images_are_said_once(config, pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data" / "class0" / "notes.txt").write_text("no image")
    run = train(replace(config, data=str(tmp_path / "data"), epochs=1, half_size_epochs=0), tmp_path)
    note = "left out: 1 file that is no image (.txt)"
    assert capsys.readouterr().err.count(note) == 1
    evaluate(run, EvalOptions(bootstrap=0))
    assert capsys.readouterr().err.count(f"'{tmp_path / 'data'}': {note}") == 1


def test_a_run_that_is_finished_says_so(config, tmp_path, capsys):
    run = train(replace(config, epochs=1, half_size_epochs=0), tmp_path)
    before = (run / LAST).read_bytes()
    resume_run(run)
    assert "is finished already (1 epochs)" in capsys.readouterr().err and (run / LAST).read_bytes() == before
    with pytest.raises(UsageError, match=rf"--resume takes the folder of a run, .* Give '{run}'"):
        resume_run(run / LAST)


def test_resume_takes_no_other_options(tmp_path):
    arguments = ["train", "--resume", str(tmp_path), "--epochs", "3", "--lr", "0.1", "--recipe", "short", "-o", "x"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "--out, --recipe, --epochs, --lr cannot be given with --resume" in result.stderr


@pytest.mark.parametrize("name", ["../escaped", "..", ".", "a/b", "a\0b"])
def test_a_runs_name_is_one_folder(config, tmp_path, name):
    with pytest.raises(UsageError, match="name must be the name of one folder"):
        train(replace(config, name=name), tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


def test_training_starts_from_a_checkpoint_and_its_preprocessing(config, pictures, tmp_path):
    first = train(replace(config, epochs=1, half_size_epochs=0, loss=LossConfig(warmup_epochs=0.0)), tmp_path)
    donor = Run.at(first).model
    arguments = ["train", str(pictures), "--backbone", "test_efficientnet", "--weights", str(first / LAST)]
    options = ["--epochs", "1", "--batch-size", "8", "--lr", "1e-9", "-o", str(tmp_path), "--name", "second"]
    assert CliRunner().invoke(main, [*arguments, *options]).exit_code == 0
    model = Run.at(tmp_path / "second").model
    torch.testing.assert_close(model.classifier.weight, donor.classifier.weight, rtol=0, atol=1e-6)
    assert model.preprocess == donor.preprocess == Preprocess(input_size=40)
    assert donor.ood.weight.any() and not model.ood.weight.abs().max() > 1e-6  # the OOD row begins anew
    assert CliRunner().invoke(main, [*arguments, *options[:-1], "third", "--size", "32"]).exit_code == 0
    assert Run.at(tmp_path / "third").model.preprocess == Preprocess(input_size=32)
    leak = CliRunner().invoke(main, [*arguments, *options[:-1], "fourth", "--seed", "1"])
    assert leak.exit_code == 2 and "another split of these images" in leak.stderr
    assert not (tmp_path / "fourth").exists()


def test_a_resumed_run_needs_no_starting_weights(config, tmp_path):
    torch.save(
        build_model("test_efficientnet", ("a", "b"), config.preprocess).backbone.state_dict(), tmp_path / "w.pth"
    )
    run = train(replace(config, epochs=1, half_size_epochs=0, weights=str(tmp_path / "w.pth")), tmp_path)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"epochs": 2}))
    (tmp_path / "w.pth").unlink()
    resume_run(run)
    assert len(rows(run)) == 2


def test_the_default_name_is_that_of_the_data(config, tmp_path, monkeypatch):
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "photos")
    names = {".": "photos", "..": tmp_path.name, "sub/": "sub", "x.tar": "x", "demo:val": "demo-val", "/": "data"}
    (tmp_path / "photos" / "train").mkdir()
    names |= {"train": "photos-train", "../photos/train/": "photos-train", "clothes.tar/train": "clothes-train"}
    for data, expected in names.items():
        assert default_name(replace(config, data=data)) == f"test_efficientnet-{expected}"


@pytest.mark.parametrize(("option", "value"), [("--size", "0"), ("--seed", "-1"), ("--batch-size", "1")])
def test_wrong_values_are_wrong_usage(pictures, tmp_path, option, value):
    arguments = ["train", str(pictures), "--backbone", "test_efficientnet", "-o", str(tmp_path), option, value]
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_a_start_that_fails_leaves_no_folder(config, tmp_path):
    folder = write_folder(tmp_path / "data")
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ImageError, match="36 of 36 images"):
        train(replace(config, data=str(folder)), tmp_path / "runs")
    with pytest.raises(UsageError, match="does not exist"):
        train(replace(config, data="nowhere"), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()
    with pytest.raises(UsageError, match="does not exist"):
        train(replace(config, data="nowhere"), tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "runs" / "run").mkdir()
    (tmp_path / "runs" / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="does not exist"):
        train(replace(config, data="nowhere"), tmp_path / "runs")
    assert (tmp_path / "runs" / "run" / "notes.txt").exists()


@pytest.mark.parametrize(("kill", "recipe"), [(signal.SIGKILL, "short"), (signal.SIGINT, "scratch")])
def test_a_killed_run_goes_on_to_the_same_weights(config, tmp_path, kill, recipe):
    """The kill falls inside an epoch; mini-batches, augmentation, schedule and optimizer go on as if it had not."""
    whole = train(replace(config, recipe=recipe, loss=replace(config.loss, patch_balance="dr")), tmp_path / "whole")
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    code = (
        "import json, sys, torch\n"
        # The sums of a convolution depend on how many threads share them.
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from ssod_edge.config import TrainConfig, from_dict\n"
        "import ssod_edge.training.loop, time\n"
        "step = ssod_edge.training.loop._Loop._train_batch\n"
        "def wait(loop, *args):\n"
        "    at, end = (loop.progress.epoch, loop.progress.step), time.monotonic() + 200\n"
        "    while at == (1, 2) and not loop.interrupted and time.monotonic() < end:\n"
        "        time.sleep(0.05)\n"
        "    return step(loop, *args)\n"
        "ssod_edge.training.loop._Loop._train_batch = wait\n"
        "config = from_dict(TrainConfig, json.load(open(sys.argv[1] + '/config.json')))\n"
        "ssod_edge.training.loop.train(config, sys.argv[1] + '/broken', save_minutes=0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE)
    last = tmp_path / "broken" / "run" / LAST
    wait_until(lambda: last.exists() and progress(last)["epoch"] == 1 and progress(last)["step"] >= 1, process)
    process.send_signal(kill)
    process.communicate()
    assert process.returncode == -kill or kill == signal.SIGINT
    stopped = progress(last)
    assert stopped["epoch"] == 1 and stopped["step"] >= 1
    broken = train(load_config(last.parent), tmp_path / "broken", resume=True)
    for name in (BEST, LAST):
        expected, found = load_checkpoint(whole / name)[0], load_checkpoint(broken / name)[0]
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
    assert [row["epoch"] for row in rows(broken)] == [1, 2, 3]
    for ours, theirs in zip(rows(broken), rows(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"]) and ours["val_accuracy"] == theirs["val_accuracy"]


def progress(checkpoint):
    return load_checkpoint(checkpoint)[1]["progress"]


def wait_until(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def test_ctrl_c_on_the_command_line_ends_with_130_and_keeps_a_checkpoint(pictures, tmp_path):
    command = [sys.executable, "-m", "ssod_edge", "train", str(pictures), "--backbone", "test_efficientnet",
               "--weights", "none", "--size", "40", "--epochs", "500", "--batch-size", "8", "-o", str(tmp_path),
               "--name", "run"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_until(lambda: (tmp_path / "run" / LAST).exists(), process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED
    assert stderr.endswith(b"\ninterrupted\n") and b"Traceback" not in stderr
    run = tmp_path / "run"
    assert f"'{run / LAST}' holds the run so far. Go on with: ssod-edge train --resume {run}\n" in stderr.decode()
    assert progress(tmp_path / "run" / LAST)["epoch"] >= 1


def test_a_loss_that_is_not_finite_stops_with_the_images_and_keeps_the_checkpoint(config, tmp_path, monkeypatch):
    first = train(replace(config, epochs=1, half_size_epochs=0), tmp_path)
    before = (first / LAST).read_bytes()
    stored = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps({**stored, "epochs": 2}))
    forward = TrainStep.forward

    def explode(self, image, target, warm):
        loss, log = forward(self, image, target, warm)
        return loss * torch.nan, log

    monkeypatch.setattr(TrainStep, "forward", explode)
    with pytest.raises(TrainingError, match=r"loss is nan at epoch 2, step 1, on the images \[\d+, .*last good"):
        train(load_config(first), tmp_path, resume=True)
    assert (first / LAST).read_bytes() == before


def test_data_that_moved_are_explained_to_who_resumes(config, tmp_path):
    run = train(replace(config, epochs=1, half_size_epochs=0), tmp_path)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"data": "photos"}))
    with pytest.raises(UsageError, match=r"'photos' does not exist.*started with this path: go to the folder"):
        resume_run(run)


def test_a_checkpoint_with_a_malformed_state_is_damaged(config, tmp_path):
    run = train(replace(config, epochs=1, half_size_epochs=0), tmp_path)
    tensors, meta = load_checkpoint(run / LAST)
    for broken in ({**meta["progress"], "epoch": "one"}, {}, 3):
        save_checkpoint(run / LAST, tensors, {**meta, "progress": broken})
        with pytest.raises(ArtifactError, match="does not hold a run to go on with .*progress"):
            resume_run(run)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(config, tmp_path, monkeypatch):
    forward = TrainStep.forward

    def explode(self, image, target, warm):
        loss, log = forward(self, image, target, warm)
        return loss + 0 * self.model.ood.bias.sum().sqrt(), log  # finite, with an infinite gradient at 0

    monkeypatch.setattr(TrainStep, "forward", explode)
    with pytest.raises(TrainingError, match="gradient's norm is nan"):
        train(config, tmp_path)
    assert not (tmp_path / "run" / BEST).exists()


def test_runs_are_not_overwritten(config, tmp_path, pictures):
    run = train(replace(config, epochs=1, half_size_epochs=0), tmp_path)
    with pytest.raises(UsageError, match="exists already. Go on with --resume"):
        train(config, tmp_path)
    with pytest.raises(UsageError, match="no run .* to resume"):
        train(replace(config, name="none"), tmp_path, resume=True)
    for damaged in ("{", "[]", "Infinity", "[" * 100_000, '{"seed": NaN}', '{"seed": 1, "seed": 2}'):
        (run / "config.json").write_text(damaged)
        with pytest.raises(ArtifactError, match="config.json' is damaged .*Restore it, or start a new run"):
            train(config, tmp_path, resume=True)
        result = CliRunner().invoke(main, ["train", "--resume", str(run)])
        assert result.exit_code == 4 and "should not happen" not in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": "3"}, 'epochs must be an integer, got "3"'),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"loss": []}, "loss must be an object"),
        ({"loss": {"outliers": ["spin"]}}, r"loss.outliers\[0\] must be one of rotate"),
        ({"epochs": 0}, "config.json': epochs must be at least 1"),
    ],
)
def test_settings_of_another_type_are_refused_by_name(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({"backbone": "resnet18", "data": "photos", **change}))
    with pytest.raises(UsageError, match=message):
        load_config(tmp_path)


def test_a_damaged_line_of_the_metrics_costs_no_epoch(config, tmp_path, capsys):
    config = replace(config, half_size_epochs=0)
    run = train(replace(config, epochs=1), tmp_path)
    first = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(first[:20] + b"\n" + first + b'[]\n{"epoch": "1"}\n{"epoch": NaN}\n\xff\n')
    stored = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**stored, "epochs": 2}))
    train(config, tmp_path, resume=True)
    assert [row["epoch"] for row in rows(run)] == [1, 2] and (run / "metrics.jsonl").read_bytes().startswith(first)
    table = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [float(row["val_loss"]) for row in table] == [row["val_loss"] for row in rows(run)]
    assert [row["epoch"] for row in table] == ["1", "2"] and "started_from" not in table[0]
    said = capsys.readouterr().err
    for number in (1, 3, 4, 5, 6):
        assert f"left out line {number} of '{run / 'metrics.jsonl'}', which is damaged" in said
    assert load_checkpoint(run / LAST)[1]["progress"]["epoch"] == 2


@pytest.mark.parametrize("name", ["metrics.csv", "metrics.jsonl"])
def test_figures_that_cannot_be_kept_cost_no_epoch(config, tmp_path, capsys, name):
    config = replace(config, half_size_epochs=0)
    run = train(replace(config, epochs=1), tmp_path)
    (run / name).unlink()
    (run / name).mkdir()
    stored = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**stored, "epochs": 2}))
    train(config, tmp_path, resume=True)
    assert "the figures of epoch 2 are not kept (" in (said := capsys.readouterr().err) and name in said
    assert load_checkpoint(run / LAST)[1]["progress"]["epoch"] == 2 and (run / name).is_dir()


def test_resuming_on_other_data_is_refused(config, tmp_path):
    folder = write_folder(tmp_path / "data", per_class=8)
    run = train(replace(config, data=str(folder), epochs=1, half_size_epochs=0), tmp_path)
    (folder / "class0" / "00.png").unlink()
    with pytest.raises(UsageError, match="changed since the run"):
        train(load_config(run), tmp_path, resume=True)


def test_one_class_is_refused(config, tmp_path):
    folder = write_folder(tmp_path / "data", classes=1)
    with pytest.raises(UsageError, match="at least 2 classes"):
        train(replace(config, data=str(folder)), tmp_path)


def test_schedules():
    short = TrainConfig(backbone="b", data="d", epochs=10, lr=1.0)
    rates = [learning_rate(short, step, 10) for step in range(100)]
    assert (
        rates[0] == 0.1
        and max(rates) == rates[9] == 1.0
        and rates[-1] < 0.02
        and rates == rates[:10] + sorted(rates[10:])[::-1]
    )
    assert [auto_epochs(steps) for steps in (1, 25, 37, 50, 400)] == [(40, 10), (40, 10), (28, 7), (20, 5), (10, 3)]
    paper = train_config("paper", {"backbone": "b", "data": "d", "epochs": 70})
    assert (paper.lr, paper.batch_size, paper.loss.warmup_epochs) == (1e-4, 256, 0.0)
    assert [learning_rate(paper, epoch * 7, 7) for epoch in (0, 29, 30, 60)] == [1e-4, 1e-4, 5e-5, 2.5e-5]


def test_options_win_over_the_recipe_and_unknown_ones_are_refused():
    config = train_config("paper", {"backbone": "b", "data": "d", "lr": 3e-4, "gamma": 0.9, "epochs": None})
    assert (config.lr, config.loss.gamma, config.loss.warmup_epochs, config.epochs) == (3e-4, 0.9, 0.0, 60)
    auto = {"backbone": "b", "data": "d", "epochs": AUTO_EPOCHS}
    found = [train_config("short", auto | more) for more in ({}, {"lr": 1e-3, "batch_size": 64}, {"epochs": 10})]
    assert [(c.batch_size, c.lr, c.tune) for c in found] == [(32, 5e-4, "all"), (64, 1e-3, "all"), (128, 2e-3, "all")]
    with pytest.raises(UsageError, match="unknown TrainConfig key: learning"):
        train_config("short", {"backbone": "b", "data": "d", "learning": 1})
    with pytest.raises(UsageError, match=r"0\.5 < gamma < 1"):
        train_config("short", {"backbone": "b", "data": "d", "gamma": 0.5})


def test_made_outliers_teach_the_row_and_a_resumed_run_makes_the_same(config, tmp_path, monkeypatch):
    loss = LossConfig(method="ce", outliers=("rotate", "shuffle"), warmup_epochs=0.0)
    config = replace(config, epochs=2, half_size_epochs=0, loss=loss)
    whole = train(config, tmp_path / "whole")
    assert Run.at(whole).model.ood.weight.any()
    last = rows(whole)[-1]
    assert last["outlier_loss"] > 0 == last["ood_loss"] and last["id_patches"] == 0
    finish = _Loop._finish_epoch

    def stop(self, bar):
        finish(self, bar)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Loop, "_finish_epoch", stop)
        train(config, tmp_path / "resumed")
    resumed = tmp_path / "resumed" / whole.name
    assert len(rows(resumed)) == 1
    assert resume_run(resumed) == resumed
    assert rows(resumed)[-1]["outlier_loss"] == last["outlier_loss"]


def test_a_step_waits_for_the_device_at_most_once(config, tmp_path, monkeypatch):
    """Reading a number waits for a GPU. The optimizer's own reads are of steps that lie on the CPU."""
    reads, steps, counting = [], [], [False]
    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        original = getattr(torch.Tensor, name)

        def read(self, *given, original=original, name=name):
            if counting[0]:
                reads.append(name)
            return original(self, *given)

        monkeypatch.setattr(torch.Tensor, name, read)
    batch, add, step = _Loop._train_batch, Meters.add, torch.optim.AdamW.step

    def counted(function, value):
        def run(*given, **named):
            before, counting[0] = counting[0], value
            try:
                return function(*given, **named)
            finally:
                counting[0] = before

        return run

    monkeypatch.setattr(_Loop, "_train_batch", counted(lambda *given: (steps.append(1), batch(*given))[1], True))
    monkeypatch.setattr(Meters, "add", counted(add, True))
    monkeypatch.setattr(torch.optim.AdamW, "step", counted(step, False))
    loss = LossConfig(method="ce", outliers=("zoom",), warmup_epochs=0.0)
    train(replace(config, epochs=1, half_size_epochs=0, loss=loss), tmp_path)
    assert reads == ["tolist"] * len(steps) and steps


def test_meters_are_sums_in_double_precision():
    torch.manual_seed(0)
    meters, expected = Meters(torch.device("cpu"), {"loss": 1.5, "images": 2.0}), 1.5
    for n in (3, 5, 7):
        loss = torch.randn(())
        meters.add({"loss": loss, "correct": torch.tensor(n - 1), "unknown": loss}, n)
        expected += float(loss) * n
    found = meters.read()
    assert (found["loss"], found["correct"], found["images"], found["n_id"]) == (expected, 12.0, 17.0, 0.0)
    assert "unknown" not in found


def test_an_epoch_without_patches_has_no_shares():
    assert epoch_figures({"images": 4.0, "loss": 8.0})["loss"] == 2.0
    assert epoch_figures({"images": 4.0})["id_patches"] == 0.0


def test_what_torchrun_starts_again_goes_on_with_its_run(config, tmp_path, monkeypatch, capsys):
    once = replace(config, epochs=1, half_size_epochs=0)
    run = train(once, tmp_path)
    for restarts, asked in (("0", once), ("3", replace(once, seed=1))):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        with pytest.raises(UsageError, match="exists already"):
            train(asked, tmp_path)
    assert train(once, tmp_path) == run and "is finished already (1 epochs)" in capsys.readouterr().err


def test_an_epoch_that_several_processes_shared_is_not_gone_on_with_by_fewer(config, tmp_path, capsys):
    run = train(replace(config, epochs=1, half_size_epochs=0), tmp_path)
    for epochs, step, shared in ((0, 2, True), (1, 0, False)):
        tensors, meta = load_checkpoint(run / LAST)
        progress = {**meta["progress"], "epoch": epochs, "step": step}
        kept = {key: value for key, value in meta.items() if key not in ("schema_version", "tensors_sha256")}
        save_checkpoint(run / LAST, tensors, {**kept, "progress": progress, "processes": 2})
        if shared:
            with pytest.raises(UsageError, match="an epoch that 2 .* --nproc-per-node 2"):
                resume_run(run)
        else:
            assert resume_run(run) == run and "a step was 16 images with 2" in capsys.readouterr().err


def two_processes(rank, folder, same):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        assert from_main(rank + 0.5) == 0.5
        for check in (check_same_images, check_same_start):
            try:
                check("one" if same else "one" * rank)
            except UsageError as error:
                (folder / f"{rank}-{check.__name__}.txt").write_text(str(error))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("same", [pytest.param(True, marks=pytest.mark.slow), False])
def test_processes_compare_what_they_train_on_and_what_they_go_on_from(tmp_path, same):
    mp.spawn(two_processes, (tmp_path, same), nprocs=2)
    for check, what in ((check_same_images, "images or labels"), (check_same_start, "checkpoints of the run")):
        found = [path.read_text() for path in tmp_path.glob(f"*-{check.__name__}.txt")]
        assert len(found) == (0 if same else 2)
        said = f"process 1 of 2 sees other {what} than process 0 (fingerprints one and none)"
        assert all(said in text for text in found)


@pytest.mark.parametrize(
    ("meters", "shown"),
    [
        ({}, "val 50.0%  no OOD loss  9 images/s"),
        ({"outlier": 0.5}, "val 50.0%  outliers 0.250  9 images/s"),
        ({"outlier": 0.5, "n_id": 1.0, "n_ood": 3.0}, "outliers 0.250  patches ID 25% OOD 75% ignored 0%  9 images/s"),
    ],
)
def test_an_epochs_line_says_what_taught_the_ood_row(meters, shown, config, capsys):
    with TrainingBar(config, steps=1) as bar:
        bar.epoch_done(
            epoch_figures({"images": 2.0, **meters}) | {"epoch": 1, "val_accuracy": 0.5, "images_per_second": 9}
        )
    assert shown in capsys.readouterr().err


def test_off_a_terminal_a_run_says_where_it_stands_and_what_is_left_of_it(config, tmp_path, capsys, monkeypatch):
    """Of all epochs, not of the one that runs; on a terminal a bar does."""
    monkeypatch.setattr(terminal, "EVERY_S", 0.0)
    train(replace(config, epochs=2, half_size_epochs=0), tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch 2/2: ")]
    assert re.search(r"^epoch 2/2: 5 of 8  loss \d\.\d+  acc .* about \d+ s left$", lines[0]), lines
    assert lines[-1].startswith("epoch 2/2: 8 of 8")


def test_the_opening_line_tells_the_smallest_class_and_the_largest(config, tmp_path, capsys):
    data = tmp_path / "uneven"
    shutil.copytree(config.data, data)
    first, *_ = sorted(folder for folder in data.iterdir() if folder.is_dir())
    for photo in sorted(first.iterdir())[9:]:
        photo.unlink()
    train(replace(config, data=str(data), epochs=1, half_size_epochs=0), tmp_path / "runs")
    assert re.search(rf"3 classes, 9 images of '{first.name}' to 16 of '\w+'; ", capsys.readouterr().err)
