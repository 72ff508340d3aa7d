"""`train --from`: a run that begins with the trunk, the class rows and settings of another, or of an export."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from lesson import SIZE, run, write_class
from safetensors.torch import save_file

from ssod_edge.config import Preprocess
from ssod_edge.errors import MissingExtraError, UsageError
from ssod_edge.files import sha256_file
from ssod_edge.json_reader import read_json
from ssod_edge.spec import load_spec, save_spec
from ssod_edge.training.begun import Begun
from ssod_edge.training.checkpoint import model_meta, model_tensors, save_checkpoint, trunk_hash
from ssod_edge.training.features import CACHE
from ssod_edge.training.model import build_model
from ssod_edge.training.run import Run, load_config

#: "e" with an accent as one character, and as a letter and a mark.
ONE, TWO = "\u00e9", "e\u0301"
#: Almost no step at all: the weights stay what training began with.
STILL = ("--tune", "all", "--epochs", "1", "--batch-size", "16", "--lr", "1e-9")


def write_photos(folder: Path, classes: tuple[str, ...], each: int, seed: int) -> Path:
    """Those of a class are the same whichever others there are."""
    for name in classes:
        write_class(folder / name, each, np.random.default_rng((seed, *map(ord, name))))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `train --tune head` on four classes. Nobody changes it."""
    root = tmp_path_factory.mktemp("begun")
    torch.manual_seed(3)
    model = build_model("test_efficientnet", ("a", "b"), Preprocess(input_size=SIZE))
    save_file(model.backbone.state_dict(), root / "w.safetensors")
    photos = write_photos(root / "photos", ("a", "b", "c", TWO), 16, seed=1)
    backbone = ("--backbone", "test_efficientnet", "--size", SIZE, "--weights", root / "w.safetensors")
    done = run("train", photos, *backbone, "--workers", 0, "--tune", "head", "-o", root / "runs", "--name", "run")
    assert done.exit_code == 0, done.output
    return root / "runs" / "run"


@pytest.fixture(scope="module")
def taught(trained: Path) -> Path:
    """An export of it that learnt "f" and lost "a", in the folder of runs. Nobody changes it."""
    root = trained.parent.parent
    assert run("export", trained, "--fp32", "--target", "onnx").exit_code == 0
    photos = write_photos(root / "new", ("f",), 10, seed=2)
    done = run("teach", trained, photos, "-o", root / "runs" / "taught", "--alike", "--max-drop", 20, "--forget", "a")
    assert done.exit_code == 0, done.output
    return root / "runs" / "taught"


@pytest.fixture(scope="module")
def grown(trained: Path) -> Path:
    """Photos of more classes and without one; the accented name is spelt in the other way. Nobody changes them."""
    return write_photos(trained.parent.parent / "grown", ("b", "c", "f", "mug", ONE), 12, seed=3)


def begin(source: object, data: Path, out: Path, *options: object) -> Result:
    return run("train", data, "--from", source, "-o", out, "--name", "next", "--workers", 0, *options)


def test_a_run_of_the_same_images_takes_over_settings_and_trunk_and_computes_nothing(trained, monkeypatch):
    data, out = trained.parent.parent / "photos", trained.parent
    kept = {path.name: path.stat().st_size for path in (out / CACHE).iterdir()}
    monkeypatch.setattr("ssod_edge.training.features.compute_features", None)
    done = begin(trained, data, out, "--tune", "head")
    assert done.exit_code == 0, done.output
    assert "4 of its 4 classes; none is new" in done.output and "note:" not in done.output
    source, found = Run.at(trained), Run.at(out / "next")
    assert found.meta["tuned"] == "head" and found.folds is not None
    shutil.rmtree(out / "next")
    assert {path.name: path.stat().st_size for path in (out / CACHE).iterdir()} == kept
    assert found.model.preprocess == source.model.preprocess and found.model.head_kind == "blocks"
    assert trunk_hash(found.model) == trunk_hash(source.model)
    assert torch.equal(found.model.classifier.weight, source.model.classifier.weight)


def test_where_it_began_is_on_record_in_the_run_and_the_spec(trained, grown, tmp_path):
    done = begin(trained, grown, tmp_path, "--tune", "head")
    assert done.exit_code == 0, done.output
    digest = sha256_file(trained / "best.safetensors")
    config = load_config(tmp_path / "next")
    assert (config.begun_from, config.begun_sha256) == (str(trained), digest)
    assert (config.backbone, config.preprocess.input_size, config.head) == ("test_efficientnet", SIZE, "blocks")
    meta = Run.at(tmp_path / "next").meta
    assert meta["started_from"]["from_sha256"] == digest
    assert run("export", tmp_path / "next", "--fp32", "--target", "onnx", "--score", "energy").exit_code == 0
    assert load_spec(tmp_path / "next" / "export").source["started_from"] == meta["started_from"]


@pytest.mark.parametrize("tune", [("--tune", "upper"), STILL])
def test_classes_that_are_new_or_gone_are_said(tune, trained, grown, tmp_path):
    done = begin(trained, grown, tmp_path, *tune)
    assert done.exit_code == 0, done.output
    assert f"from '{trained}': 3 of its 4 classes; new: f, mug; gone: a" in done.output
    model = Run.at(tmp_path / "next").model
    assert set(model.classes) == {"b", "c", "f", "mug", ONE}
    assert ("held-out images that" in done.output) is (tune is STILL)


def rows_by_name(classes: tuple[str, ...], weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name.replace(TWO, ONE): row for name, row in zip(classes, weight.detach(), strict=True)}


def test_rows_are_taken_over_by_name_and_new_ones_are_new(trained, grown, tmp_path):
    assert begin(trained, grown, tmp_path, *STILL).exit_code == 0
    source, model = Run.at(trained).model, Run.at(tmp_path / "next").model
    before = rows_by_name(source.classes, source.classifier.weight)
    after = rows_by_name(model.classes, model.classifier.weight)
    for name in ("b", "c", ONE):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    for name in ("f", "mug"):
        assert 0.005 < float(after[name].std()) < 0.02
        assert all(float((after[name] - row).abs().max()) > 0.01 for row in before.values())


def test_rows_of_a_network_whose_head_reads_its_last_features_are_matched_by_name_too(tmp_path):
    torch.manual_seed(1)
    donor = build_model("test_efficientnet", ("a", "b", "c"), Preprocess(input_size=SIZE))
    meta = {**model_meta(donor), "trained": True, "data": None, "data_fingerprint": None, "splits_hash": None}
    save_checkpoint(tmp_path / "donor" / "best.safetensors", model_tensors(donor), meta)
    data = write_photos(tmp_path / "photos", ("b", "c", "d"), 12, seed=1)
    done = begin(tmp_path / "donor", data, tmp_path, *STILL)
    assert done.exit_code == 0, done.output
    model = Run.at(tmp_path / "next").model
    assert model.head_kind == "last" and model.linear is None
    found, given = (m.classifier.weight.detach() for m in (model, donor))
    torch.testing.assert_close(found[:2], given[1:], rtol=0, atol=1e-6)  # as many rows, of other classes
    assert float((found[2] - given[0]).abs().max()) > 0.01


def test_a_taught_export_brings_the_rows_it_was_taught_and_the_trunk_of_its_run(taught, trained, grown, tmp_path):
    begun = Begun.at(str(taught))
    weight, bias = begun.rows()
    assert begun.run.checkpoint.samefile(trained / "best.safetensors") and len(weight) == len(bias) == 4
    assert begun.classes == ("b", "c", TWO, "f")
    of_run, of_export = Run.at(trained).model, rows_by_name(begun.classes, weight)
    before = rows_by_name(of_run.classes, of_run.classifier.weight)
    for name in ("b", "c", ONE):  # teaching a new class leaves the known rows alone
        assert torch.equal(of_export[name], before[name])
    done = begin(taught, grown, tmp_path, *STILL)
    assert done.exit_code == 0, done.output
    assert f"from '{taught}': 4 of its 4 classes; new: mug" in done.output and "gone" not in done.output
    model = Run.at(tmp_path / "next").model
    after = rows_by_name(model.classes, model.classifier.weight)
    for name in ("b", "c", ONE, "f"):
        torch.testing.assert_close(after[name], of_export[name], rtol=0, atol=1e-6)
    digest = read_json(taught / "ssod.json")["sha256"]
    assert load_config(tmp_path / "next").begun_sha256 == digest
    assert Run.at(tmp_path / "next").meta["started_from"]["from_sha256"] == digest


def test_the_run_of_an_export_is_found_by_its_hash_or_named_in_the_error(taught, trained, grown, tmp_path):
    alone = shutil.copytree(taught, tmp_path / "elsewhere" / "deep" / "taught")
    done = begin(alone, grown, tmp_path / "runs", "--tune", "head")
    assert done.exit_code == 2 and "the run 'run' that it came from lies neither" in done.stderr
    assert not (tmp_path / "runs").exists()
    shutil.copytree(trained, tmp_path / "runs" / "renamed", ignore=shutil.ignore_patterns("export"))
    assert Begun.at(str(alone), tmp_path / "runs").run.folder == tmp_path / "runs" / "renamed"
    with (tmp_path / "runs" / "renamed" / "best.safetensors").open("ab") as file:
        file.write(b"another")
    with pytest.raises(UsageError, match="the run 'run' that it came from"):
        Begun.at(str(alone), tmp_path / "runs")
    assert Begun.at(str(trained / "export")).run.checkpoint.samefile(trained / "best.safetensors")


def test_an_export_that_was_taught_twice_still_knows_its_run(taught, trained, tmp_path):
    photos = write_photos(tmp_path / "new", ("g",), 6, seed=4)
    again = trained.parent / "twice"
    assert run("teach", taught, photos, "-o", again, "--alike", "--max-drop", 30).exit_code == 0
    try:
        begun = Begun.at(str(again))
        assert begun.classes == ("b", "c", TWO, "f", "g") and begun.run.checkpoint.samefile(
            trained / "best.safetensors"
        )
    finally:
        shutil.rmtree(again)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--backbone", "test_resnet"), "--backbone test_resnet contradicts '.*', which has test_efficientnet"),
        (("--size", "96"), "--size 96 contradicts '.*', which has 64: leave --size out"),
        (("--fit", "pad"), "--fit pad contradicts '.*', which has crop"),
        (("--roi", "0,0,9,9"), "--roi 0,0,9,9 contradicts '.*', which has None"),
        (("--head", "last"), "--head last contradicts '.*', which has blocks"),
        (("--weights", "published"), "--from and --weights both say what training starts from"),
        (("--weights", "none"), "--from and --weights both say what training starts from"),
    ],
)
def test_what_contradicts_the_source_is_refused(options, said, trained, grown, tmp_path):
    done = begin(trained, grown, tmp_path / "runs", *options)
    assert done.exit_code == 2 and re.search(said, done.stderr), done.stderr
    assert not (tmp_path / "runs").exists()


def test_what_agrees_with_the_source_may_be_given(trained, grown, tmp_path):
    same = ("--backbone", "test_efficientnet", "--size", SIZE, "--fit", "crop", "--head", "blocks", "--tune", "head")
    done = begin(trained, grown, tmp_path, *same)
    assert done.exit_code == 0, done.output


def test_what_is_no_run_and_no_export_is_refused(trained, grown, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.tar").write_bytes(b"no checkpoint")
    assert "none' does not exist" in begin(tmp_path / "none", grown, tmp_path / "runs").stderr
    for place in ("empty", "file.tar"):
        done = begin(tmp_path / place, grown, tmp_path / "runs")
        assert done.exit_code == 2 and "takes the folder of a run or of an export" in done.stderr
    model = build_model("test_efficientnet", ("a", "b"), Preprocess(input_size=SIZE))
    save_checkpoint(tmp_path / "random" / "best.safetensors", model_tensors(model), model_meta(model))
    done = begin(tmp_path / "random", grown, tmp_path / "runs")
    assert done.exit_code == 2 and "are random: there is nothing to begin from" in done.stderr
    done = run("train", "--resume", trained, "--from", trained)
    assert done.exit_code == 2 and "--from cannot be given with --resume" in done.stderr


def test_a_taught_export_without_a_graph_or_onnx_says_so(taught, trained, tmp_path, monkeypatch):
    from ssod_edge.errors import ArtifactError

    bare = shutil.copytree(taught, trained.parent / "bare")
    try:
        spec = load_spec(bare)
        fp16 = replace(spec.artifacts[0], name="onnx-fp16", precision="fp16")
        save_spec(replace(spec, artifacts=(fp16,)), bare)
        with pytest.raises(ArtifactError, match="holds no ONNX graph in fp32"):
            Begun.at(str(bare)).rows()
    finally:
        shutil.rmtree(bare)
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingExtraError, match="reading a taught export"):
        Begun.at(str(taught)).rows()
