"""`train --tune branch`: a small branch on the maps of a backbone that stays as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.testing import assert_allclose
from PIL import Image
from safetensors.torch import save_file
from small import random_images, run_onnx

from ssod_edge.cli import main
from ssod_edge.config import Preprocess
from ssod_edge.data.sources import open_dataset
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.evaluation.expect import TaughtImages
from ssod_edge.export.graph.fp16 import to_fp16
from ssod_edge.export.graph.onnx import fused_graph, head_rows
from ssod_edge.training.begun import Begun
from ssod_edge.training.branch import WIDTH, SmallBranch
from ssod_edge.training.checkpoint import load_checkpoint, save_checkpoint, trunk_hash
from ssod_edge.training.features import compute_features, distance_features, features_of
from ssod_edge.training.folding import folded
from ssod_edge.training.lesson import DISTURBED, MIRRORED, PLAIN, Lesson
from ssod_edge.training.model import SSODClassifier, build_model, normalise
from ssod_edge.training.run import Run
from ssod_edge.training.stages import Branch, BranchShape

CLASSES, SIZE = ("a", "b", "c"), 64
#: Features of a branch on test_efficientnet, which has three stages to read.
WIDE = 2 * 3 * WIDTH


def plain_model(backbone: str = "test_efficientnet", size: int = SIZE, head: str = "blocks") -> SSODClassifier:
    torch.manual_seed(3)
    return build_model(backbone, CLASSES, Preprocess(input_size=size), head=head).eval()  # type: ignore[arg-type]


def ignored(*_: object) -> None:
    """Of progress."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos of three classes, in "photos", and seeded weights. Nobody changes it."""
    root = tmp_path_factory.mktemp("branch")
    for index, image in enumerate(random_images(72, seed=1).numpy()):
        label = index % len(CLASSES)
        colour = np.random.default_rng((5, label)).integers(0, 256, 3)
        path = root / "photos" / CLASSES[label] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        mixed = 0.6 * image.transpose(1, 2, 0) + 0.4 * colour
        Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)).save(path)
    save_file(plain_model().backbone.state_dict(), root / "w.safetensors")
    return root


def train(place: Path, out: Path, *options: object) -> Result:
    backbone = ["--backbone", "test_efficientnet", "--size", SIZE, "--weights", place / "w.safetensors"]
    arguments = ["train", place / "photos", *backbone, "--workers", 0, "-o", out, "--name", "run", *options]
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """A run of `train --tune branch`. Nobody changes it."""
    done = train(place, place / "runs", "--tune", "branch")
    assert done.exit_code == 0, done.output
    return place / "runs/run"


@pytest.mark.parametrize(
    ("grids", "expected"),
    [([8, 4], 4), ([13, 7], 7), ([7, 7], 7), ([10, 5, 5], 5), ([9, 4], 4), ([5, 1], 1), ([14, 6], 6)],
)
def test_maps_of_any_grid_come_onto_the_last_one(grids: list[int], expected: int) -> None:
    branch = Branch(BranchShape(tuple(range(len(grids))), 6), [3] * len(grids)).eval()
    seen: list[torch.Tensor] = []
    branch.blocks.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    maps = [torch.full((2, 3, side, side), float(place)) for place, side in enumerate(grids)]
    found = branch(maps)
    assert found.shape == (2, 12 * len(grids)) and seen[0].shape[2:] == (expected, expected)
    for place, conv in enumerate(branch.inner):  # a constant stays one, at the edges too
        value = conv(torch.full((1, 3, 1, 1), float(place)))[0, :, 0, 0]
        part = seen[0][0, 6 * place : 6 * place + 6]
        assert_allclose(part.detach(), value.detach()[:, None, None].expand_as(part), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        *(("test_efficientnet", 64), ("test_resnet", 72), ("test_convnext", 96), ("test_vit", 160)),
        pytest.param("densenet121", 100, marks=pytest.mark.slow),
    ],
)
def test_a_new_branch_changes_nothing_that_the_model_says(backbone: str, size: int) -> None:
    model, x = plain_model(backbone, size), torch.randn(2, 3, size, size)
    with torch.inference_mode():
        before, z = model(x), model.features(x)
        model.add_branch(SmallBranch(model, 2).shape)
        after, wide = model.eval()(x), model.features(x)
    for old, new in zip(before, after, strict=True):
        assert_allclose(new, old, rtol=1e-5, atol=1e-5)
    assert model.branch_width == wide.shape[1] - z.shape[1] == model.classifier.in_features - z.shape[1] > 0
    assert_allclose(wide[:, model.branch_width :], z, rtol=1e-5, atol=1e-6)
    assert wide[:, : model.branch_width].std() > 0
    with torch.inference_mode():
        if backbone == "test_efficientnet":  # the grid of its last map is that of the branch
            pooled, patches = model.forward_train(x)
            half = model.branch_width // 2
            assert patches is not None and patches.shape[3] == wide.shape[1]
            assert_allclose(patches[..., :half].mean(dim=(1, 2)), pooled[:, :half], rtol=1e-4, atol=1e-5)
            assert_allclose(patches[..., half : 2 * half].amax(dim=(1, 2)), pooled[:, half : 2 * half], atol=1e-5)
        assert_allclose(folded(model).features(x), wide, rtol=1e-3, atol=1e-3)


def test_the_branch_learns_and_the_backbone_stays(place: Path) -> None:
    source, model = open_dataset(str(place / "photos")), plain_model()
    branch = SmallBranch(model, len(source))
    features = branch.read(source, 0, ignored)
    pixels = torch.from_numpy(np.stack([np.asarray(source.image(i)).transpose(2, 0, 1) for i in range(4)]))
    with torch.inference_mode():
        assert_allclose(features.plain[:4], model.features(normalise(pixels, model.preprocess)), rtol=1e-3, atol=1e-4)
    backbone = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    for one in (*branch.maps, branch.untouched):
        one[:, MIRRORED] = torch.nan  # not read, where a mirrored image is not of its class
    losses: list[float] = []
    lesson = Lesson(np.asarray(source.labels), np.arange(0, 72, 2), versions=(PLAIN, DISTURBED))
    branch.learn(features, lesson, lambda epoch, loss: losses.append(loss), ignored)
    assert len(losses) == branch.pace.epochs and losses[-1] < 0.5 * losses[0]
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, backbone[name]), name
    assert float(model.classifier.weight[:, :WIDE].detach().abs().min(dim=1).values.max()) > 0
    assert model.branch is not None and not model.branch.training
    found = branch.features()
    with torch.inference_mode():
        exact = model.features(normalise(pixels, model.preprocess)).numpy()
    assert_allclose(found.plain[:4], exact, rtol=0.02, atol=0.02 * np.abs(exact).max())  # maps are kept in fp16
    assert np.array_equal(found.disturbed[:, WIDE:], features.disturbed)


def test_a_run_with_a_branch_is_written_and_read(place: Path, trained: Path) -> None:
    run = Run.at(trained)
    assert run.meta["tuned"] == "branch" and run.folds is None and set(run.meta["tried"]) == {"head", "branch"}
    assert run.meta["branch"] == {"stages": list(run.model.branch.shape.stages), "width": WIDTH}  # type: ignore[union-attr]
    bare = plain_model()
    assert run.meta["started_from"]["sha256"] == trunk_hash(bare) != trunk_hash(run.model)
    source, splits = run.splits("")
    kept = features_of(run.model, source, trained.parent)
    logits = run.model.head(torch.from_numpy(kept.plain[splits.val]))[0]
    assert float((logits.argmax(1).numpy() == source.labels[splits.val]).mean()) == run.meta["val_accuracy"]
    anew = compute_features(run.model, source, np.arange(4), workers=0)
    assert_allclose(kept.plain[:4], anew.plain, rtol=0.01, atol=0.01)
    assert_allclose(kept.disturbed[:4], anew.disturbed, rtol=0.01, atol=0.01)


def test_distances_read_the_last_features_and_never_the_branch() -> None:
    model = plain_model()
    width, backbone = model.last_width, model.classifier.in_features
    assert distance_features(model, "upper") == 0
    model.add_branch(SmallBranch(model, 1).shape)
    assert distance_features(model, "branch") == distance_features(model, "head") == width
    assert distance_features(model, "upper") == backbone


@pytest.mark.parametrize(
    "shape", [{"stages": [99], "width": 8}, {"stages": [], "width": 8}, {"stages": [4], "width": 0}]
)
def test_a_checkpoint_with_a_damaged_branch_is_refused(trained: Path, tmp_path: Path, shape: dict[str, object]) -> None:
    tensors, meta = load_checkpoint(trained / "best.safetensors")
    save_checkpoint(tmp_path / "best.safetensors", tensors, {**meta, "branch": shape})
    with pytest.raises(ArtifactError, match="does not describe a model"):
        _ = Run.at(tmp_path / "best.safetensors").model


def test_the_graph_has_one_final_layer_and_half_precision_ends_before_the_pooling(trained: Path) -> None:
    model = Run.at(trained).model
    graph = fused_graph(model, "energy", trained=True)
    images = random_images(3)
    with torch.inference_mode():
        logits = model(normalise(images, model.preprocess))[0].numpy()
    assert_allclose(run_onnx(graph, images)["logits"], logits, rtol=1e-3, atol=1e-3)
    half, report = to_fp16(graph, head_rows(model, None), images.numpy())
    branch = sum(p.numel() for p in model.branch.parameters() if p.dim() > 1)  # type: ignore[union-attr]
    assert report.weights > branch + sum(p.numel() for p in model.backbone.parameters() if p.dim() > 1)
    assert_allclose(run_onnx(half, images)["logits"], logits, rtol=0.05, atol=0.05)


def test_what_no_branch_can_read_is_refused_before_any_other_work(place: Path, tmp_path: Path, monkeypatch) -> None:
    done = train(place, tmp_path, "--tune", "branch", "--head", "last")
    assert done.exit_code == 2 and "--head last reads none" in done.output and not any(tmp_path.iterdir())
    monkeypatch.setattr("ssod_edge.training.lesson.MOST_BYTES", 1000)
    done = train(place, tmp_path, "--tune", "branch")
    assert done.exit_code == 2 and "the maps of 72 images take more" in done.output and not any(tmp_path.iterdir())
    model = plain_model(head="last")
    with pytest.raises(UsageError, match="that --head last leaves out"):
        model.add_branch(BranchShape((4,), 8))


def test_another_run_begins_with_its_classes_and_without_its_branch(trained: Path) -> None:
    run = Run.at(trained)
    next_model = plain_model()
    said = Begun.at(str(trained)).give_rows(next_model)
    assert "3 of its 3 classes" in said
    assert torch.equal(next_model.classifier.weight, run.model.classifier.weight[:, WIDE:])


def test_classes_are_left_out_of_the_backbone_s_features(trained: Path) -> None:
    run = Run.at(trained)
    taught = TaughtImages.of(run)
    data, folds = taught.fitted_on()
    width = run.model.classifier.in_features - WIDE
    assert not taught.stand_in and data.features.shape[1] == data.weight.shape[1] == width
    assert folds.weight.shape[1:] == (3, width) and data.last == run.model.last_width
    assert_allclose(data.logits, data.features @ data.weight.T + data.bias, rtol=1e-4, atol=1e-3)
    assert replace(data, last=0).start == 0 and folds.strength == run.meta["strength"]
