"""`train --negatives`: the OOD row learns from them, a score is chosen by others, and `eval` judges by the rest."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.testing import assert_allclose
from PIL import Image
from safetensors.torch import save_file
from small import random_images

from ssod_edge.cli import main
from ssod_edge.config import LossConfig, Preprocess, TrainConfig
from ssod_edge.data.negatives import PARTS, Negatives
from ssod_edge.detect.regression import fit_head
from ssod_edge.errors import UsageError
from ssod_edge.evaluation.evaluate import EvalOptions, evaluate
from ssod_edge.export.graph.negatives import fit_default
from ssod_edge.export.graph.score import fit_data, ship_score, want_score
from ssod_edge.export.graph.source import Source, from_run
from ssod_edge.training.features import CACHE, features_of
from ssod_edge.training.loop import _Loop, train
from ssod_edge.training.model import build_model, normalise
from ssod_edge.training.objective import TrainStep, outlier_loss
from ssod_edge.training.outputs import collect
from ssod_edge.training.run import Run
from ssod_edge.training.session import Session

CLASSES = tuple("abcd")
SIZE = 64


def write_colours(folder: Path, names: tuple[str, ...], count: int, seed: int) -> Path:
    """Coloured noise, each name of a colour of its own, the same wherever it is written."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        colour = np.random.default_rng((7, *name.encode())).integers(0, 256, 3)
        for index, image in enumerate(random_images(count, seed=seed + number).numpy()):
            mixed = 0.4 * image.transpose(1, 2, 0) + 0.6 * colour
            Image.fromarray(mixed.astype(np.uint8)).save(folder / name / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of four classes, negatives of two other kinds, and weights to start from."""
    folder = tmp_path_factory.mktemp("place")
    write_colours(folder / "photos", CLASSES, 60, seed=1)
    write_colours(folder / "negatives", ("belt", "hand"), 60, seed=20)
    torch.manual_seed(3)
    model = build_model("test_efficientnet", CLASSES, Preprocess(input_size=SIZE)).backbone
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def run_train(place: Path, out: Path, *options: str) -> Result:
    fixed = ["--backbone", "test_efficientnet", "--size", str(SIZE), "--weights", str(place / "model.safetensors")]
    arguments = ["train", str(place / "photos"), *fixed, "--workers", "0", "-o", str(out), "--name", "run"]
    return CliRunner().invoke(main, [*arguments, *options], catch_exceptions=False)


@pytest.fixture(scope="module")
def taught(place: Path) -> Path:
    """A run whose head alone was tuned, with negatives."""
    done = run_train(place, place / "runs", "--tune", "head", "--negatives", str(place / "negatives"))
    assert done.exit_code == 0, done.output
    assert "120 negatives of" in done.output and "72 to learn from, 24 to choose a score by, 24 for" in done.output
    assert "OOD row: AUROC" in done.output and "and 24 negatives that it did not learn from" in done.output
    return place / "runs/run"


def negatives_of(run: Path) -> Negatives:
    found = Run.at(run).negatives("put them back")
    assert found is not None
    return found


def id_logits(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of validation images, and of the negatives that only an evaluation sees."""
    opened, negatives = Run.at(run), negatives_of(run)
    source, splits = opened.splits("")
    known = collect(opened.model, source, splits.val, workers=0)
    return known.id_logit, collect(opened.model, negatives.source, negatives.parts["test"], workers=0).id_logit


def test_a_run_records_its_negatives(place: Path, taught: Path) -> None:
    meta, negatives = Run.at(taught).meta, negatives_of(taught)
    assert json.loads((taught / "config.json").read_text())["negatives"] == str(place / "negatives")
    assert {key: meta[key] for key in negatives.record} == negatives.record
    assert meta["row"]["negatives"] == 72 and meta["row"]["auroc"] > 0.9
    parts = json.loads((taught / "splits.json").read_text())["negatives_parts"]
    assert sorted(index for part in PARTS for index in parts[part]) == list(range(120))


def test_the_row_is_a_regression_on_the_part_to_learn_from(place: Path, taught: Path) -> None:
    run, negatives = Run.at(taught), negatives_of(taught)
    source, splits = run.splits("")
    known, unknown = (features_of(run.model, images, place / "runs", 0) for images in (source, negatives.source))
    assert len(list((place / "runs" / CACHE).iterdir())) == 2  # both were kept
    learnt, images = negatives.parts["train"], np.setdiff1d(np.arange(len(source)), splits.val)
    labels = np.repeat([1, 0], [len(images), len(learnt)])
    weights = np.where(labels, 1 / len(images), 1 / len(learnt)) * len(labels) / 2
    plain, copies = (
        np.concatenate([getattr(known, kind)[images], getattr(unknown, kind)[learnt]])
        for kind in ("plain", "disturbed")
    )
    head = fit_head(plain, copies, labels, 2, weights.astype(np.float32))
    logits = head.logits(unknown.plain)
    found = run.model.head(torch.from_numpy(unknown.plain))[1].detach().numpy()
    assert_allclose(found, logits[:, 1] - logits[:, 0], rtol=1e-3, atol=1e-3)
    inside, outside = id_logits(taught)
    assert (inside > 0).mean() > 0.9 and (outside < 0).mean() > 0.9
    assert run.folds is not None and len(run.folds.row) == len(run.folds.weight)  # thresholds need one for each part


@pytest.mark.parametrize("better", [True, False])
def test_the_row_reads_the_features_that_the_network_ends_with(place, tmp_path, monkeypatch, better) -> None:
    monkeypatch.setattr("ssod_edge.training.transfer.LEAST_CALIB", 1)
    monkeypatch.setattr("ssod_edge.training.transfer.HeldOut.better_than", lambda self, other: better)
    done = run_train(place, tmp_path, "--negatives", str(place / "negatives"))
    assert done.exit_code == 0, done.output
    assert Run.at(tmp_path / "run").meta["tuned"] == ("branch" if better else "head")
    inside, outside = id_logits(tmp_path / "run")
    assert (inside > 0).mean() > 0.85 and (outside < 0).mean() > 0.85


def step_of(loss: LossConfig) -> tuple[TrainStep, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = build_model("test_convnext", ("a", "b", "c"), Preprocess(input_size=32))
    torch.nn.init.normal_(model.ood.weight)
    return TrainStep(model, loss), torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 3


def test_negatives_behind_a_batch_are_outliers_of_the_loss() -> None:
    step, image, target = step_of(LossConfig(method="ce"))
    loss, log = step(image, target, True)
    cold, _ = step(image, target, False)
    alone, _ = step(image[:8], target, True)
    assert torch.equal(cold, step(image[:8], target, False)[0]) and torch.equal(cold, alone)
    id_logit = step.model(normalise(image, step.model.preprocess))[1]
    torch.testing.assert_close(log["outlier"], outlier_loss(id_logit, 8).detach())
    torch.testing.assert_close(loss, cold + outlier_loss(id_logit, 8))


def test_where_images_are_made_too_they_are_half_as_many(monkeypatch) -> None:
    made = []
    monkeypatch.setattr(
        "ssod_edge.training.objective.make_for_training",
        lambda image, kinds, count: made.append((len(image), count)) or image[:count],
    )
    step, image, target = step_of(LossConfig(method="ce", outliers=("rotate",), outlier_share=0.5))
    step(image, target, True)
    step(image[:8], target, True)
    assert made == [(8, 2), (8, 4)]


def whole(place: Path, **loss: object) -> TrainConfig:
    return TrainConfig(
        "test_efficientnet", str(place / "photos"), negatives=str(place / "negatives"), name="run", epochs=3,
        batch_size=32, lr=5e-3, workers=0, preprocess=Preprocess(input_size=SIZE), class_weights="none",
        weights=str(place / "model.safetensors"),
        loss=LossConfig(**{"method": "ce", "warmup_epochs": 0.0, **loss}),  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_whole_network_is_trained_against_negatives(place: Path, tmp_path: Path) -> None:
    run = train(whole(place), tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["outlier_loss"] < rows[0]["outlier_loss"] < 1.4 and rows[-1]["accuracy"] <= 1
    inside, outside = id_logits(run)
    assert np.mean(inside[:, None] > outside) > 0.8
    assert train(whole(place), tmp_path, resume=True) == run  # finished
    with pytest.raises(UsageError, match=r"--negatives: .* does not exist.*The run was started with this path"):
        shutil.copytree(run, tmp_path / "moved" / "run")
        config = json.loads((run / "config.json").read_text()) | {"negatives": "nowhere", "epochs": 4}
        (tmp_path / "moved" / "run" / "config.json").write_text(json.dumps(config))
        train(whole(place), tmp_path / "moved", resume=True)


def test_weights_that_learnt_from_other_parts_are_refused(place: Path, tmp_path: Path, taught: Path) -> None:
    run = train(replace(whole(place), epochs=1), tmp_path / "one")
    again = replace(whole(place), weights=str(run / "best.safetensors"), epochs=1)
    other = replace(again, data=str(write_colours(tmp_path / "photos", CLASSES, 20, seed=90)), seed=1)
    weights = re.escape(again.weights)
    with pytest.raises(UsageError, match=f"'{weights}' learnt from another part of these negatives"):
        Session(other, tmp_path / "two", torch.device("cpu"))
    assert Session(replace(other, seed=0), tmp_path / "two", torch.device("cpu")).negatives is not None
    head = replace(other, weights=str(taught / "best.safetensors"), head="stages")
    assert Session(head, tmp_path / "two", torch.device("cpu")).negatives is not None  # the trunk never saw them


def test_batches_end_in_negatives_to_learn_from_in_an_order_that_resuming_repeats(place: Path, tmp_path: Path) -> None:
    def loop(config: TrainConfig, name: str) -> _Loop:
        return _Loop(config, tmp_path / name, False, torch.device("cpu"), 5.0)

    config = whole(place, warmup_epochs=1.0)
    one, again = loop(config, "one"), loop(config, "again")
    n = len(one.source)
    assert all(len(batch) == 32 and max(batch) < n for batch in one._batches(0))
    shown = [batch[32:] for batch in one._batches(1)]
    assert [len(batch) for batch in shown] == [16] * len(shown) and one._batches(1) == again._batches(1)
    assert one._batches(1) != one._batches(2)
    assert one.negatives is not None
    assert {index - n for batch in shown for index in batch} <= set(one.negatives.parts["train"].tolist())
    half = loop(replace(config, loss=replace(config.loss, outliers=("rotate",))), "half")
    assert {len(batch) for batch in half._batches(1)} == {32 + 8}


DEFAULT = "gen+mahalanobispp+residual"


def quiet(line: str) -> None:
    pass


def test_the_row_joins_the_default_where_it_finds_more_negatives(taught: Path, monkeypatch) -> None:
    # These negatives lie outside of what the known images span: the whole default finds them without the row.
    monkeypatch.setattr("ssod_edge.detect.choice.prior_score", lambda tuned: "gen+mahalanobispp")
    source, said = from_run(taught), list[str]()
    wanted = want_score(source, None, None, quiet)
    shipped = ship_score(source, wanted, said.append)
    record = shipped.record["negatives"]
    rejected = record["rejected"]
    assert set(rejected) == {"gen+mahalanobispp", "ssod+gen+mahalanobispp"} and record["images"] == 24
    assert record["data"] == negatives_of(taught).subset("choice").description
    assert shipped.name == "ssod+gen+mahalanobispp" and rejected[shipped.name] > rejected["gen+mahalanobispp"] + 0.2
    assert any("of 24 negatives to choose by, at 95% of known images" in line for line in said)


def outputs(n: int, seed: int, *, row: float, distance: float) -> tuple[np.ndarray, ...]:
    """Of a network with three classes: noise, with a mean of the ID logit, and one of how far the features lie."""
    rng = np.random.default_rng(seed)
    logits, z = rng.normal(0, 1, (n, 3)).astype(np.float32), rng.normal(0, 1, (n, 6)).astype(np.float32)
    z[:, 0] += 8
    z[:, 5] += distance
    return logits, (row + rng.normal(0, 1, n)).astype(np.float32), z


@pytest.mark.parametrize(
    ("row", "distance", "joins"),
    [(-6.0, 0.0, True), (4.0, 0.0, False), (4.0, 30.0, False)],  # found by the row; by nothing; by the distance alone
)
def test_what_the_row_does_not_find_leaves_the_default_as_it_is(taught, monkeypatch, row, distance, joins) -> None:
    from ssod_edge.detect.fit import FitData

    logits, id_logit, z = outputs(400, 0, row=4.0, distance=0)
    data = FitData(z, np.arange(400) % 3, logits, np.zeros((3, 6), np.float32), np.zeros(3, np.float32), id_logit)
    unknown = outputs(60, 2, row=row, distance=distance)
    monkeypatch.setattr("ssod_edge.export.graph.negatives.eager_outputs", lambda *_: unknown)
    said: list[str] = []
    score, record = fit_default(from_run(taught), DEFAULT, data, outputs(200, 1, row=4.0, distance=0), said.append)
    assert score.name == (f"ssod+{DEFAULT}" if joins else DEFAULT) and record["negatives"]["images"] == 60
    assert ("no more than chance gives" in said[0]) is not joins
    untaught = replace(from_run(taught), run=None)
    assert fit_default(untaught, DEFAULT, data, outputs(200, 1, row=4.0, distance=0), quiet)[1] == {}


@pytest.mark.slow
def test_negatives_are_a_kind_of_evidence_of_auto(taught: Path, monkeypatch) -> None:
    source = from_run(taught)
    wanted = want_score(source, "auto", None, quiet)
    source = replace(source, images=wanted.divide(source.images, True, quiet))
    candidates = ship_score(source, wanted, quiet).choice["candidates"]
    assert "negatives" in candidates["gen"]["figures"]
    assert candidates["ssod"]["figures"]["negatives"] > candidates["gen"]["figures"]["negatives"]
    monkeypatch.setattr("ssod_edge.export.graph.negatives.LEAST_MISTAKES", 25)
    said: list[str] = []
    figures = ship_score(source, wanted, said.append).choice["candidates"]["gen"]["figures"]
    assert "negatives" not in figures and any("not chosen by: 24 images of negatives" in line for line in said)


def test_from_photos_and_negatives_to_figures(place: Path, taught: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(taught), "--target", "onnx", "--fp32"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    export = Run.at(taught).export
    assert export is not None and export.spec.source["negatives"] == str(place / "negatives")
    assert export.spec.detector["negatives"]["images"] == 24
    report_file = taught / "figures.json"
    arguments = ["eval", str(taught / "export"), "--bootstrap", "0", "--shift-images", "0", "--json", str(report_file)]
    shown = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert f"negatives: 24 of '{place / 'negatives'}' that were held out; 72 others were learnt from" in shown.output
    report = json.loads(report_file.read_text())
    assert report["ood_data"] == {"negatives": f"{place / 'negatives'} (held-out negatives)"}
    assert report["negatives"] == {
        "data": str(place / "negatives"), "learnt_from": 72, "chosen_by": 24, "held_out": 24
    }  # fmt: skip
    rows = {row["score"]: row for row in report["results"]}
    assert rows["ssod"]["n_ood"] == 24 and rows["ssod"]["auroc"] > 0.9 and report["ood_row_trained"]
    source = from_run(taught)  # what an export beside that one would take
    kept = ship_score(source, want_score(source, None, export, quiet), quiet)
    record = {key: value for key, value in export.spec.detector.items() if key != "sha256"}
    assert (kept.name, kept.record) == (export.spec.score_name, record)


def test_an_evaluation_has_them_beside_named_sets_and_warns_of_those_that_were_learnt_from(place, taught, capsys):
    other = write_colours(place / "other", ("else",), 12, seed=60)
    options = EvalOptions(None, {"else": str(other)}, bootstrap=0, shift_images=0)
    assert set(evaluate(taught, options, workers=0)[0]["ood_data"]) == {"else", "negatives"}
    capsys.readouterr()
    same = EvalOptions(None, {"negatives": str(place / "negatives")}, bootstrap=0, shift_images=0)
    report, _ = evaluate(taught, same, workers=0)
    assert report["ood_data"] == {"negatives": str(place / "negatives")} and "negatives" not in report
    assert "holds negatives that the network learnt from" in capsys.readouterr().err


def test_negatives_that_moved_have_no_say_and_are_not_evaluated(place, taught, tmp_path, monkeypatch, capsys):
    for name in ("photos", "negatives"):
        shutil.copytree(place / name, tmp_path / name)
    shutil.copy(place / "model.safetensors", tmp_path)
    assert run_train(tmp_path, tmp_path, "--tune", "head", "--negatives", str(tmp_path / "negatives")).exit_code == 0
    (tmp_path / "negatives").rename(tmp_path / "elsewhere")
    source: Source = from_run(tmp_path / "run")
    held_out, said = outputs_of_validation(source), list[str]()
    score, record = fit_default(source, DEFAULT, fit_data(source, quiet), held_out, said.append)
    assert score.name == DEFAULT and not record
    assert said[0].startswith("negatives have no say in the score: data set") and said[0].endswith("or put them back")
    report, _ = evaluate(tmp_path / "run", EvalOptions(bootstrap=0, shift_images=0), workers=0)
    assert not report["ood_data"] and "no figures of the held-out negatives: data set" in capsys.readouterr().err


def outputs_of_validation(source: Source) -> tuple[np.ndarray, ...]:
    choices = source.images.choices
    assert choices is not None
    found = collect(source.model, choices.source, choices.indices, workers=0)
    return found.logits, found.id_logit, found.features
