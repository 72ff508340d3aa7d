"""Checkpoints survive what happens to files, and say so when they don't."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch

from ssod_edge.config import Preprocess
from ssod_edge.errors import ArtifactError, OutputError, UsageError
from ssod_edge.training.checkpoint import (
    BEST,
    load_checkpoint,
    load_optimizer,
    model_meta,
    model_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from ssod_edge.training.model import build_model
from ssod_edge.training.run import Run


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("test_efficientnet", ("a", "b", "c"), Preprocess(input_size=48))


@pytest.fixture
def path(model, tmp_path):
    save_checkpoint(tmp_path / BEST, model_tensors(model), {**model_meta(model), "epoch": 3})
    return tmp_path / BEST


def rewrite(path, change):
    """Write a checkpoint again with its metadata changed."""
    tensors, meta = load_checkpoint(path)
    from safetensors.torch import save_file

    change(meta)
    text = json.dumps(meta)
    save_file(tensors, path, metadata={"ssod_edge": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def test_no_flipped_bit_is_taken_for_what_was_written(path):
    """Classes and preprocessing stand in the metadata: one bit of them makes another model."""
    content = bytearray(path.read_bytes())
    tensors, meta = load_checkpoint(path)
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    places = [*rng.integers(0, header, 500), *rng.integers(header, len(content), 20)]
    for place in places:
        bit = 1 << int(rng.integers(0, 8))
        content[place] ^= bit
        path.write_bytes(content)
        content[place] ^= bit
        try:
            found, said = load_checkpoint(path)
        except ArtifactError:
            continue
        assert said == meta and found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_model_comes_back_whole(model, path):
    loaded, meta = (opened := Run.at(path)).model, opened.meta
    assert meta["epoch"] == 3 and loaded.classes == ("a", "b", "c") and loaded.preprocess == Preprocess(input_size=48)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(model.eval()(x)[0], loaded(x)[0])
    assert torch.equal(Run.at(path.parent).model(x)[1], loaded(x)[1])


def test_channels_last_tensors_are_stored(model, path):
    model.to(memory_format=torch.channels_last)
    save_checkpoint(path, model_tensors(model), model_meta(model))
    assert torch.equal(Run.at(path).model.backbone.conv_stem.weight, model.backbone.conv_stem.weight)


def test_the_optimizer_goes_on_where_it_was(model, path):
    def step(optimizer):
        optimizer.zero_grad()
        sum((p**2).sum() for p in model.parameters()).backward()
        optimizer.step()

    first = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(first)
    save_checkpoint(path, model_tensors(model) | optimizer_tensors(first), model_meta(model))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step(first)
    expected = model.backbone.conv_stem.weight.clone()
    model.load_state_dict(state)
    second = torch.optim.AdamW(model.parameters(), lr=1e-2)
    load_optimizer(second, load_checkpoint(path)[0])
    step(second)
    assert torch.equal(model.backbone.conv_stem.weight, expected)


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -5000])
def test_a_checkpoint_cut_short_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="damaged or cut short"):
        Run.at(path).model.eval()


def test_an_edited_checkpoint_is_refused(path):
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="hash does not match"):
        Run.at(path).model.eval()


def test_a_newer_schema_a_foreign_file_and_another_model_are_refused(path, tmp_path):
    original = path.read_bytes()
    rewrite(path, lambda meta: meta.update(schema_version=99))
    with pytest.raises(ArtifactError, match=r"schema version 99.*Install a newer one"):
        Run.at(path).model.eval()
    path.write_bytes(original)
    rewrite(path, lambda meta: meta.update(backbone="test_resnet"))
    with pytest.raises(ArtifactError, match="holds another model than test_resnet"):
        Run.at(path).model.eval()
    path.write_bytes(original)
    rewrite(path, lambda meta: meta["preprocess"].update(crop_pct=2.0))
    with pytest.raises(ArtifactError, match="does not describe a model"):
        Run.at(path).model.eval()
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError, match="not written by ssod-edge"):
        Run.at(tmp_path / "other.safetensors").model.eval()
    with pytest.raises(UsageError, match="does not exist"):
        Run.at(tmp_path / "none.safetensors").model.eval()
    with pytest.raises(UsageError, match=f"none/{BEST}' does not exist|none' does not exist"):
        Run.at(tmp_path / "none").model.eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.pop("schema_version"), "has no schema version"),
        (lambda meta: meta.update(schema_version="1"), "has no schema version"),
        (lambda meta: meta.update(schema_version=0), "has no schema version"),
        (lambda meta: meta.update(backbone=5), "backbone must be text, got 5"),
        (lambda meta: meta.pop("backbone"), "has no 'backbone'"),
        (lambda meta: meta.update(classes=3), "classes must be a list"),
        (lambda meta: meta.update(classes=["a", None, "c"]), r"classes\[1\] must be text"),
        (lambda meta: meta.update(preprocess=[]), "preprocess must be an object"),
        (lambda meta: meta["preprocess"].update(input_size="48"), "preprocess.input_size must be an integer"),
        (lambda meta: meta.update(val_accuracy=float("nan")), "val_accuracy must be a finite number, got NaN"),
        (lambda meta: meta.update(classes=["a", "\ud800", "c"]), r"classes\[1\] must be text of valid Unicode"),
    ],
)
def test_damaged_metadata_is_refused_with_the_name_of_the_file(path, change, message):
    rewrite(path, change)
    for source in (path, path.parent):
        with pytest.raises(ArtifactError, match=message) as caught:
            Run.at(source).model.eval()
        assert f"'{path}'" in str(caught.value)


@pytest.mark.parametrize("metadata", ["[]", "3", "null", '"text"', "[" * 100_000])
def test_metadata_that_is_no_object_is_refused(path, metadata):
    from safetensors.torch import save_file

    save_file(load_checkpoint(path)[0], path, metadata={"ssod_edge": metadata})
    with pytest.raises(ArtifactError, match=str(path)):
        load_checkpoint(path)


def test_metadata_that_a_caller_misses_names_the_file(path):
    meta = load_checkpoint(path)[1]
    assert meta.get("data") is None
    with pytest.raises(ArtifactError, match=f"'{path}' is damaged: its metadata has no 'data'"):
        meta["data"]


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(model, path):
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # a real write that really fails
        with pytest.raises(OutputError, match=f"cannot write '{path}'"):
            save_checkpoint(path, model_tensors(model), model_meta(model))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [BEST]


def test_a_folder_that_cannot_be_made_is_an_output_error(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot create the folder"):
        save_checkpoint(tmp_path / "file" / "run" / BEST, model_tensors(model), model_meta(model))


def test_find_run_takes_the_newest_of_a_backbone(model, tmp_path):
    for age, name, backbone in (
        (3, "old", "mobilenetv3_large_100"),
        (2, "new", "mobilenetv3_large_100"),
        (1, "other", "resnet18"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"backbone": backbone}))
        (tmp_path / name / BEST).write_bytes(b"")
        os.utime(tmp_path / name / BEST, (time.time() - 100 * age,) * 2)
    (tmp_path / "started").mkdir()  # no checkpoint yet
    for number, damaged in enumerate(("{", "[]", "Infinity", "[" * 100_000)):
        (tmp_path / f"damaged-{number}").mkdir()
        (tmp_path / f"damaged-{number}" / "config.json").write_text(damaged)
        (tmp_path / f"damaged-{number}" / BEST).write_bytes(b"")
    assert Run.newest(tmp_path).folder.name == "other"
    assert Run.newest(tmp_path, "mobilenetv3").folder.name == "new"
    with pytest.raises(UsageError, match="no run of 'regnet'"):
        Run.newest(tmp_path, "regnet")


def test_a_file_replaced_while_it_is_read_is_whole(tmp_path):
    """A reader beside a training run gets one checkpoint or the next, never parts of both."""
    path = tmp_path / "last.safetensors"
    versions = [tmp_path / "1", tmp_path / "2"]
    for epoch, version in enumerate(versions, 1):
        save_checkpoint(version, {"weight": torch.full((64, 64), float(epoch))}, {"epoch": epoch})
    shutil.copy(versions[0], path)
    stop = threading.Event()

    def replace_often():
        while not stop.is_set():
            for version in versions:
                os.link(version, tmp_path / "next")
                (tmp_path / "next").replace(path)

    writer = threading.Thread(target=replace_often)
    writer.start()
    try:
        for _ in range(1000):
            tensors, meta = load_checkpoint(path)
            assert (tensors["weight"] == meta["epoch"]).all()
    finally:
        stop.set()
        writer.join()
