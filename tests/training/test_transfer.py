"""`train --tune`: the last layer by regression on features computed once, and the upper blocks tuned gently."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.testing import assert_allclose
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from small import random_images
from timm.layers import Conv2dSame

import ssod_edge.training.features
from ssod_edge.cli import main
from ssod_edge.config import ALIASES, Preprocess
from ssod_edge.data.sources import open_dataset
from ssod_edge.detect.regression import STRENGTHS, fit_head
from ssod_edge.errors import TrainingError, UsageError
from ssod_edge.export.graph.score import fit_data
from ssod_edge.export.graph.source import from_run
from ssod_edge.recipes import train_config
from ssod_edge.training.checkpoint import trunk_hash
from ssod_edge.training.features import CACHE, features_of
from ssod_edge.training.folding import folded
from ssod_edge.training.lesson import DISTURBED, MIRRORED, PLAIN, Lesson
from ssod_edge.training.model import build_model, normalise
from ssod_edge.training.run import Run
from ssod_edge.training.stages import find_stages, pooled, stage_maps
from ssod_edge.training.transfer import HeldOut
from ssod_edge.training.upper import BorderMaps, UpperBlocks, cut

CLASSES = tuple("abcdefg")
SIZE = 64


def staged(backbone="test_efficientnet", size=SIZE, classes=CLASSES, head="blocks"):
    torch.manual_seed(3)
    return build_model(backbone, classes, Preprocess(input_size=size), head=head).eval()


def ignored(n):
    """Of progress."""


def upper_blocks(model, source):
    """The blocks that `--tune upper` teaches, and the features of a model as it is."""
    blocks = UpperBlocks(model, len(source))
    return blocks, blocks.read(source, 0, ignored)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded random weights, as a file to start from."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(build_model_plain().state_dict(), path)
    return path


def build_model_plain():
    torch.manual_seed(3)
    return build_model("test_efficientnet", CLASSES, Preprocess(input_size=SIZE)).backbone


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """168 images of seven classes, each of a colour."""
    rng = np.random.default_rng(0)
    for index, image in enumerate(random_images(168, seed=1).numpy()):
        label = index % len(CLASSES)
        colour = np.random.default_rng((5, label)).integers(0, 256, 3)
        mixed = 0.4 * image.transpose(1, 2, 0) + 0.6 * colour + rng.normal(0, 3, (SIZE, SIZE, 3))
        path = tmp_path / "photos" / CLASSES[label] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)).save(path)
    return tmp_path / "photos"


def run_train(tmp_path: Path, photos: Path, weights: Path, *options: str) -> Result:
    arguments = ["--backbone", "test_efficientnet", "--size", str(SIZE), "--weights", str(weights), "--workers", "0"]
    out = ["-o", str(tmp_path / "runs"), "--name", "run"]
    return CliRunner().invoke(main, ["train", str(photos), *arguments, *out, *options], catch_exceptions=False)


@pytest.mark.parametrize("alias", [*ALIASES, "efficientnet_lite0"])
def test_a_head_on_every_block_reads_their_means_and_the_network_can_be_cut(alias):
    model = staged(alias, 96)
    x = torch.randn(2, 3, 96, 96)
    parts = cut(model)
    with torch.no_grad():
        z, patches = model.forward_train(x)
        last, maps = stage_maps(model.backbone, x, model.stages)
        own = model.backbone.forward_head(last, pre_logits=True)
        assert torch.equal(model.backbone.forward_features(x), last)
    assert len(model.stages) >= 2 and all(m.shape[-1] <= 12 for m in maps)
    torch.testing.assert_close(z, torch.cat([*(m.mean((2, 3)) for m in maps), own], dim=1))
    assert z.shape[1] == model.classifier.in_features == model.ood.in_features and own.shape[1] == model.last_width
    assert patches is not None and patches.shape[3] == z.shape[1]
    n = len(parts.below)
    assert n and (*parts.below, *parts.above) == model.stages
    with torch.no_grad():
        found = parts.features(maps[n - 1], torch.cat([pooled(m) for m in maps[:n]], dim=1))
    torch.testing.assert_close(found, z, rtol=1e-3, atol=1e-4)
    for place, m in zip(model.stages, maps, strict=True):  # nothing is read twice; new ResNets' last blocks do nothing
        assert isinstance(place, str) or m.shape[1] != own.shape[1] or not torch.allclose(own, pooled(m))


@pytest.mark.parametrize(
    ("backbone", "named"),
    [
        ("resnet18", {"layer2.0": 2, "layer3.0": 3, "layer4.0": None}),  # the mean of layer4.1 is the last feature
        ("mobilenetv3", {"blocks.2.1": 3, "blocks.3.2": 4, "blocks.4.0": 5, "blocks.5.1": 6}),
        ("regnety_004", {"s2.b2": 2, "s3.b5": 3}),
        ("convnext_atto", {"stages.1.blocks.0": 1, "stages.2.blocks.4": 2}),
        ("resnet50", {"layer3.2": 3, "layer3.4": 3}),
    ],
)
def test_blocks_within_a_stage_are_found_by_how_they_follow_each_other(backbone, named):
    every, stages = staged(backbone, 96), staged(backbone, 96, head="stages")
    assert tuple(place for place in every.stages if isinstance(place, int)) == stages.stages
    for block, stage in named.items():
        assert block in every.stages
        assert stage is None or every.stages.index(block) < every.stages.index(stage)
    given = {}
    for block in named:
        every.backbone.get_submodule(block).register_forward_hook(
            lambda m, _, out, block=block: given.update({block: out})
        )
    with torch.no_grad():
        _, maps = stage_maps(every.backbone, torch.randn(1, 3, 96, 96), every.stages)
    for block in named:
        assert torch.equal(maps[every.stages.index(block)], given[block])
    within = [place for place in every.stages if isinstance(place, str)]
    assert not any("conv" in place for place in within)
    assert not [place for place in within if place in ("layer3.0", "layer3.1") and backbone == "resnet50"]  # six blocks


def test_patches_of_every_stage_have_the_pooled_means_where_grids_divide():
    model = staged("resnet18", 128)
    with torch.no_grad():
        z, patches = model.forward_train(torch.randn(2, 3, 128, 128))
    assert patches is not None and patches.shape[1:3] == (4, 4)
    torch.testing.assert_close(patches.mean((1, 2)), z, rtol=1e-4, atol=1e-4)


def test_a_vision_transformer_has_stages_too():
    assert staged("test_vit", 160).features(torch.randn(1, 3, 160, 160)).shape[1] > staged("test_vit", 160).last_width


def test_a_backbone_without_maps_is_refused_with_the_way_out():
    backbone = build_model_plain()
    backbone.forward_intermediates = lambda *_, **__: (torch.zeros(1, 3), [torch.zeros(1, 3)])
    with pytest.raises(UsageError, match="'some' are no feature maps .*--head last"):
        find_stages(backbone, "some", SIZE)


def gaussians(classes: int, n: int = 60, d: int = 12, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = rng.normal(0, 2, (classes, d))
    plain, copies = (5 + 3 * (centres[labels] + rng.normal(0, 1, (n, d))).astype(np.float32) for _ in range(2))
    return plain, copies, labels


@pytest.mark.parametrize("classes", [2, 4])
def test_the_last_layer_is_the_regression_on_standardised_features(classes):
    plain, copies, labels = gaussians(classes)
    head = fit_head(plain, copies, labels, classes)
    z = np.concatenate([plain, copies])
    mean, deviation = z.mean(0), z.std(0)
    known = LogisticRegression(C=head.strength, max_iter=300, tol=1e-3).fit((z - mean) / deviation, np.tile(labels, 2))
    probs = torch.from_numpy(head.logits(plain)).softmax(1).numpy()
    assert_allclose(probs, known.predict_proba((plain - mean) / deviation), atol=2e-3)
    assert head.weight.shape == (classes, 12) and head.strength in STRENGTHS
    assert head.losses[head.strength] == min(head.losses.values()) and head.accuracy > 0.9


def test_an_image_and_its_copy_are_left_out_together():
    rng = np.random.default_rng(0)
    plain, labels = rng.normal(0, 1, (40, 200)).astype(np.float32), np.arange(40) % 2
    assert fit_head(plain, plain, labels, 2).accuracy < 0.8  # noise: a copy in the fit would give every label away


def test_images_of_one_group_are_left_out_together():
    rng = np.random.default_rng(0)
    scenes = rng.normal(0, 1, (12, 200)).astype(np.float32)
    groups = np.arange(48) % 12
    plain = scenes[groups] + rng.normal(0, 0.01, (48, 200)).astype(np.float32)
    labels = (groups % 2).astype(np.int64)
    assert fit_head(plain, plain, labels, 2).accuracy == 1.0  # every scene is known
    assert fit_head(plain, plain, labels, 2, groups=groups).accuracy < 0.8
    assert not fit_head(plain, plain, labels, 2, groups=labels).losses  # one group a class: none can be left out


def test_weights_and_single_images_are_taken():
    plain, copies, labels = gaussians(2)
    labels = (np.arange(60) >= 55).astype(np.int64)
    weights = np.where(labels, 11.0, 1.0).astype(np.float32)
    plain_head, weighted = (fit_head(plain, copies, labels, 2, w) for w in (None, weights))
    shares = [(head.logits(plain).argmax(1) == 1).mean() for head in (plain_head, weighted)]
    assert shares[1] > shares[0]
    assert np.isnan(fit_head(plain[:2], copies[:2], np.array([0, 1]), 2).accuracy)


def test_features_are_computed_once_for_each_trunk_and_way_of_reading(tmp_path, photos, monkeypatch):
    source, model = open_dataset(str(photos)), staged()
    found = features_of(model, source, tmp_path, workers=0)
    pixels = torch.from_numpy(np.stack([np.asarray(source.image(i)).transpose(2, 0, 1) for i in range(5)]))
    with torch.no_grad():
        assert_allclose(found.plain[:5], model.features(normalise(pixels, model.preprocess)).numpy(), atol=1e-4)
    assert np.abs(found.disturbed - found.plain).mean() > 1e-3
    calls = []
    read = ssod_edge.training.features.load_batches
    monkeypatch.setattr("ssod_edge.training.features.load_batches", lambda *a, **k: calls.append(1) or read(*a, **k))
    with torch.no_grad():
        model.classifier.weight.add_(1)
    again = features_of(model, source, tmp_path, workers=0)
    assert not calls and np.array_equal(again.plain, found.plain) and np.array_equal(again.disturbed, found.disturbed)
    with torch.no_grad():
        next(model.backbone.parameters()).add_(0.1)
    features_of(model, source, tmp_path, workers=0)
    assert len(calls) == 1 and len(list((tmp_path / CACHE).iterdir())) == 2


def test_features_are_found_and_made_where_nothing_may_be_written(tmp_path, photos, monkeypatch):
    source, model = open_dataset(str(photos)), staged()
    found = features_of(model, source, tmp_path, workers=0)

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr("ssod_edge.training.features.load_batches", None)
    assert np.array_equal(features_of(model, source, tmp_path).plain, found.plain)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "glob", refuse)  # another process is deleting
    assert np.array_equal(features_of(model, source, tmp_path / "other", workers=0).plain, found.plain)
    assert not (tmp_path / "other").exists()
    monkeypatch.undo()
    kept = next((tmp_path / CACHE).iterdir())
    kept.unlink()
    kept.mkdir()  # in the place of the file
    assert np.array_equal(features_of(model, source, tmp_path, workers=0).plain, found.plain)


def test_folded_norms_change_nothing_but_the_time():
    for backbone in ("test_efficientnet", "resnet18", "test_vit"):  # a norm with its activation, without, and none
        model = staged(backbone, 160)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for part in model.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 2)
        x = torch.randn(2, 3, 160, 160)
        quick = folded(model)
        with torch.no_grad():
            torch.testing.assert_close(quick.features(x), model.features(x), rtol=1e-3, atol=1e-4)
        left = [part for part in quick.modules() if isinstance(part, torch.nn.BatchNorm2d)]
        assert not left and model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("size, left", [(64, 0), (100, 3)])  # maps of 25, 13 and 7 do not halve
def test_borders_wider_at_one_side_are_taken_without_a_padded_copy(size, left):
    model = staged("tf_efficientnet_lite0", size)
    quick, x = folded(model), torch.randn(2, 3, size, size)
    assert sum(isinstance(part, Conv2dSame) for part in quick.modules()) == left
    assert sum(isinstance(part, Conv2dSame) for part in model.modules()) == 5
    with torch.no_grad():
        torch.testing.assert_close(quick.features(x), model.features(x), rtol=1e-3, atol=1e-4)


def test_other_photos_of_the_same_names_have_other_features(tmp_path, photos):
    model = staged()
    found = features_of(model, open_dataset(str(photos)), tmp_path, workers=0)
    Image.new("RGB", (SIZE, SIZE), (9, 200, 30)).save(photos / "a" / "000.png")
    again = features_of(model, open_dataset(str(photos)), tmp_path, workers=0)
    assert not np.allclose(again.plain[0], found.plain[0]) and np.allclose(again.plain[1:], found.plain[1:], atol=1e-5)


def test_what_is_not_to_be_mirrored_is_not(photos):
    source, model = open_dataset(str(photos)), staged()
    blocks, features = upper_blocks(model, source)
    spoiled = blocks.maps.maps.clone()
    spoiled[:, MIRRORED] = torch.nan
    blocks.maps = BorderMaps(spoiled, blocks.maps.below.clone())
    lesson = Lesson(np.asarray(source.labels), np.arange(0, 168, 2), versions=(PLAIN, DISTURBED))
    losses = []
    blocks.learn(features, lesson, lambda epoch, loss: losses.append(loss), ignored)
    assert np.isfinite(losses).all()


def test_a_damaged_store_is_made_anew_and_an_old_one_makes_room(tmp_path, photos, monkeypatch):
    source, model = open_dataset(str(photos)), staged()
    found = features_of(model, source, tmp_path, workers=0)
    (path,) = (tmp_path / CACHE).iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert np.array_equal(features_of(model, source, tmp_path, workers=0).plain, found.plain)
    monkeypatch.setattr("ssod_edge.training.features.MOST_BYTES", 3 * found.plain.nbytes)
    with torch.no_grad():
        next(model.backbone.parameters()).add_(0.1)
    features_of(model, source, tmp_path, workers=0)
    (left,) = (tmp_path / CACHE).iterdir()
    assert left != path


def test_tuning_the_head_leaves_the_network_and_writes_a_run(tmp_path, photos, weights):
    done = run_train(tmp_path, photos, weights, "--tune", "head")
    assert done.exit_code == 0, done.output
    run = Run.at(tmp_path / "runs/run")
    assert run.meta["tuned"] == "head" and run.meta["head"] == "blocks" and run.model.head_kind == "blocks"
    assert run.meta["started_from"]["sha256"] == trunk_hash(run.model) == trunk_hash(staged())
    row = json.loads((run.folder / "metrics.jsonl").read_text())
    assert row["val_accuracy"] == run.meta["val_accuracy"] == row["tried"]["head"]["accuracy"] > 0.5
    source, splits = run.splits("")
    kept = features_of(run.model, source, tmp_path / "runs")
    logits = run.model.head(torch.from_numpy(kept.plain[splits.val]))[0]
    assert float((logits.argmax(1).numpy() == source.labels[splits.val]).mean()) == row["val_accuracy"]
    assert "finished already" in run_train_again(tmp_path).output
    second = run_train(tmp_path, photos, weights, "--tune", "head")
    assert second.exit_code == 2 and "exists already" in second.output


def run_train_again(tmp_path: Path) -> Result:
    return CliRunner().invoke(main, ["train", "--resume", str(tmp_path / "runs/run")], catch_exceptions=False)


def test_settings_that_only_the_whole_network_reads_decide_what_is_trained():
    given = {"backbone": "resnet18", "data": "photos"}
    assert train_config("short", given).tune == "auto" and train_config("short", given).head == "blocks"
    assert train_config("short", {**given, "tune": "upper"}).loss.is_plain
    for whole in ({"epochs": 3}, {"method": "ssod"}, {"outliers": ("rotate",)}, {"weights": "none"}):
        config = train_config("short", {**given, **whole})
        assert (config.tune, config.head) == ("all", "last")
    with pytest.raises(UsageError, match="epochs: only training of the whole network .* --tune all"):
        train_config("short", {**given, "epochs": 3, "tune": "head"})
    with pytest.raises(UsageError, match="random weights have none"):
        train_config("short", {**given, "weights": "none", "tune": "head"})
    assert train_config("scratch", given).tune == train_config("paper", given).tune == "all"


def test_several_processes_are_refused(tmp_path, photos, weights, monkeypatch):
    monkeypatch.setattr("ssod_edge.training.transfer.world_size", lambda: 2)
    done = run_train(tmp_path, photos, weights, "--tune", "head")
    assert done.exit_code == 2 and "Leave torchrun out" in done.output and not (tmp_path / "runs/run").exists()


def test_a_network_that_cannot_be_cut_is_named():
    with pytest.raises(UsageError, match="'test_vit' cannot be cut .*--tune head or all"):
        cut(staged("test_vit", 160))


def test_tuning_changes_the_weights_above_the_border_and_nothing_else(photos):
    source, model = open_dataset(str(photos)), staged()
    blocks, features = upper_blocks(model, source)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels = torch.from_numpy(np.stack([np.asarray(source.image(i)).transpose(2, 0, 1) for i in range(4)]))
    with torch.no_grad():
        untouched = model.features(normalise(pixels, model.preprocess)).numpy()
    assert_allclose(features.plain[:4], untouched, rtol=1e-3, atol=1e-4)
    losses = []
    labels, train = np.asarray(source.labels), np.arange(0, 168, 2)
    blocks.learn(features, Lesson(labels, train), lambda epoch, loss: losses.append(loss), ignored)
    assert len(losses) == blocks.pace.epochs and losses[-1] < losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    above = {name for name, part in blocks.parts.view.named_parameters() if part.dim() > 1}
    assert {"linear.weight", "linear.bias"} <= changed
    assert {f"backbone.{name}" for name in above} <= changed
    assert not [name for name in changed if "bn" in name or "running" in name or "conv_stem" in name]
    tuned = blocks.features()
    with torch.no_grad():
        exact = model.features(normalise(pixels, model.preprocess)).numpy()
    assert_allclose(tuned.plain[:4], exact, rtol=0.02, atol=0.02 * np.abs(exact).max())  # maps are kept in fp16
    assert blocks.maps.maps.dtype == torch.float16 and (PLAIN, DISTURBED) == (0, 2)


@pytest.mark.parametrize(
    ("module", "tune", "message"),
    [
        ("lesson", "upper", "maps of 168 images take more .*smaller --size"),
        ("features", "auto", "features of 168 images take .*--tune all"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_other_work(
    tmp_path, photos, weights, monkeypatch, module, tune, message
):
    monkeypatch.setattr(f"ssod_edge.training.{module}.MOST_BYTES", 1000)
    monkeypatch.setattr("ssod_edge.training.features.load_batches", None)
    done = run_train(tmp_path, photos, weights, "--tune", tune)
    assert done.exit_code == 2 and re.search(message, done.output) and not (tmp_path / "runs").exists()


def test_numbers_that_are_not_finite_end_the_tuning(photos):
    source, model = open_dataset(str(photos)), staged()
    with torch.no_grad():
        for part in model.backbone.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.weight.mul_(30)
    with pytest.raises(UsageError, match="half precision"):
        upper_blocks(model, source)


def test_a_loss_that_is_not_finite_ends_the_tuning(photos):
    source, model = open_dataset(str(photos)), staged()
    blocks, features = upper_blocks(model, source)
    blocks.maps = BorderMaps(torch.full(blocks.maps.maps.shape, torch.nan), blocks.maps.below.clone())
    with pytest.raises(TrainingError, match="the loss is nan in epoch 1"):
        blocks.learn(features, Lesson(np.asarray(source.labels), np.arange(168)), lambda *_: None, ignored)


@pytest.fixture
def tries(monkeypatch):
    """As with photos enough: `auto` tries a branch."""
    monkeypatch.setattr("ssod_edge.training.transfer.LEAST_CALIB", 1)


def test_auto_does_without_a_branch_where_too_few_photos_would_set_the_threshold(tmp_path, photos, weights):
    done = run_train(tmp_path, photos, weights)
    assert done.exit_code == 0, done.output
    assert re.search(
        "the last layer alone learns: a branch would leave [0-9]+ of 168 photos for thresholds", done.output
    )
    run = Run.at(tmp_path / "runs/run")
    assert set(run.meta["tried"]) == {"head"} and run.folds is not None


def test_auto_does_without_a_branch_where_there_is_no_room(tmp_path, photos, weights, tries, monkeypatch):
    monkeypatch.setattr("ssod_edge.training.lesson.MOST_BYTES", 1000)
    done = run_train(tmp_path, photos, weights)
    assert done.exit_code == 0 and "the last layer alone learns: the maps of 168 images" in done.output
    assert Run.at(tmp_path / "runs/run").meta["tuned"] == "head"


@pytest.mark.parametrize("better", [True, False])
def test_auto_keeps_what_held_out_photos_ask_for(tmp_path, photos, weights, tries, monkeypatch, better):
    monkeypatch.setattr("ssod_edge.training.transfer.HeldOut.better_than", lambda self, other: better)
    done = run_train(tmp_path, photos, weights)
    assert done.exit_code == 0, done.output
    run = Run.at(tmp_path / "runs/run")
    assert run.meta["tuned"] == ("branch" if better else "head") and set(run.meta["tried"]) == {"head", "branch"}
    told, tried = run.meta["disturbed"], run.meta["tried"][run.meta["tuned"]]
    assert (
        told["score"] == "gen+mahalanobispp+residual"
        and 0 <= told["accepted"] <= 1
        and told["images"] == tried["images"]
    )
    words = f"{told['accuracy']:.1%} are right, and {told['accepted']:.1%} still accepted as known"
    assert words in done.output
    source, splits = run.splits("")
    kept = features_of(run.model, source, tmp_path / "runs")  # of the network as it is now
    right = run.model.head(torch.from_numpy(kept.disturbed[splits.val]))[0].argmax(1).numpy()
    assert told["accuracy"] == (right == source.labels[splits.val]).mean()
    assert (trunk_hash(run.model) == trunk_hash(staged())) is not better
    assert ("with the branch: more held-out photos" in done.output) is better
    n = len(splits.train) + len(splits.calib)
    assert (f"The {n} photos for training and for thresholds have taught" in done.output) is not better
    asked = run_train(tmp_path / "asked", photos, weights, "--tune", "branch")
    assert ("Without it: --tune head" in asked.output) is not better
    logits = run.model(normalise(random_images(4), run.model.preprocess))[0]
    assert logits.shape == (4, 7) and bool(logits.isfinite().all())


def test_features_that_were_tuned_are_no_published_ones(tmp_path, photos, weights):
    assert run_train(tmp_path / "one", photos, weights, "--tune", "upper").exit_code == 0
    tuned = tmp_path / "one/runs/run/best.safetensors"
    assert run_train(tmp_path / "two", photos, tuned, "--tune", "head").exit_code == 0
    assert Run.at(tmp_path / "two/runs/run").meta["tuned"] == "upper"


def test_what_gets_more_images_and_copies_right_is_better():
    before = np.zeros((2, 100), bool)
    before[:, :90] = True
    after = before.copy()
    assert not HeldOut(after, 0.1).better_than(HeldOut(before, 0.2))  # a smaller loss alone is no gain
    after[1, 90:92], after[0, 0] = True, False
    assert HeldOut(after, 0.1).better_than(HeldOut(before, 0.1))
    assert not HeldOut(before, 0.1).better_than(HeldOut(after, 0.1))


def test_auto_weighs_a_branch_against_the_head_that_would_ship(tmp_path, photos, weights, tries, monkeypatch):
    """It is fitted on the images for thresholds too, which the branch must not see."""
    seen = []
    monkeypatch.setattr(
        "ssod_edge.training.transfer.HeldOut.better_than", lambda self, other: bool(seen.append((self, other)))
    )
    assert run_train(tmp_path, photos, weights).exit_code == 0
    run, ((tuned, head),) = Run.at(tmp_path / "runs/run"), seen
    assert run.meta["tried"] == {"head": head.record, "branch": tuned.record}
    assert run.folds is not None and run.meta["val_accuracy"] == head.accuracy


def test_an_export_fits_its_distance_on_kept_features_and_is_verified(tmp_path, photos, weights, monkeypatch):
    assert run_train(tmp_path, photos, weights, "--tune", "head").exit_code == 0
    monkeypatch.setattr("ssod_edge.training.features.load_batches", None)
    arguments = ["export", str(tmp_path / "runs/run"), "--target", "onnx"]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    export = Run.at(tmp_path / "runs/run").export
    assert export is not None and export.spec.score_name == "gen+mahalanobispp+residual"
    assert "and a disturbed copy of each" in done.output
    splits = Run.at(tmp_path / "runs/run").splits("")[1]
    trained = len(splits.train) + len(splits.calib)
    assert export.spec.detector["images"] == export.spec.detector["disturbed_copies"] == trained


def test_features_that_are_not_kept_are_made_again_for_the_same_images_and_copies(tmp_path, photos, weights):
    assert run_train(tmp_path, photos, weights, "--tune", "head").exit_code == 0
    source = from_run(tmp_path / "runs/run")
    kept = fit_data(source, lambda line: None)
    shutil.rmtree(tmp_path / "runs" / CACHE)
    made = fit_data(source, lambda line: None)
    assert not (tmp_path / "runs" / CACHE).exists()
    assert_allclose(made.features, kept.features, atol=1e-3)  # the images, then a copy of each
    assert np.array_equal(made.labels, kept.labels)
