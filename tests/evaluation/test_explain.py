"""`ssod-edge explain`: the patches' labels are the training's, and a PNG for each image that can be read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from small import CLASSES, SIZE, make_model, random_images

from ssod_edge.cli import main
from ssod_edge.config import Preprocess
from ssod_edge.data.pixels import load_image, preprocess
from ssod_edge.detect.fit import FitData
from ssod_edge.detect.sums import fit_score, save_score
from ssod_edge.errors import ImageError, UsageError
from ssod_edge.evaluation import pictures
from ssod_edge.evaluation.explain import ShippedThreshold, explain, shipped_threshold
from ssod_edge.export.graph.reference import run_eager
from ssod_edge.files import sha256_file
from ssod_edge.ops import patch_sample
from ssod_edge.spec import DETECTOR_NAME, Artifact, Spec, Threshold, save_spec
from ssod_edge.training.checkpoint import BEST
from ssod_edge.training.model import normalise
from ssod_edge.training.run import Run

matplotlib = pytest.importorskip("matplotlib", reason="needs the extra 'report'")


def array(index=0):
    return random_images(3, seed=4)[index].numpy().transpose(1, 2, 0)


def command(*arguments):
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


@pytest.fixture
def run(small_run, tmp_path):
    return shutil.copytree(small_run, tmp_path / "small", ignore=shutil.ignore_patterns("export"))


@pytest.fixture
def image(tmp_path):
    Image.fromarray(array()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "test_resnet"])
def test_patches_are_those_of_training(backbone):
    model = make_model(backbone)
    found = explain(model, array(), gamma=0.6)
    x = normalise(torch.from_numpy(array().transpose(2, 0, 1).copy())[None], model.preprocess)
    with torch.no_grad():
        pooled, z = model.forward_train(x)
        logits = model.classifier(pooled)
        expected = patch_sample(z, model.classifier.weight, model.classifier.bias, logits.argmax(1), 0.6)
        mean_s = model.ood(z).mean()
    for mine, theirs in zip((found.patches.confidence, found.patches.label), expected, strict=True):
        np.testing.assert_allclose(mine.ravel(), theirs.numpy(), rtol=1e-4, atol=1e-6)
    assert found.patches.label.shape == z.shape[1:3] and found.patches.id_logit.mean() == pytest.approx(mean_s.item())
    assert found.class_name == CLASSES[logits.argmax()] and found.patches.class_name == found.class_name
    assert found.confidence == pytest.approx(logits.softmax(1).max().item(), rel=1e-4)
    assert found.patches.image.shape == (3, SIZE, SIZE) and found.patches.image.dtype == np.uint8


def test_another_class_and_gamma(small_model):
    found = explain(small_model, array())
    other = CLASSES[(CLASSES.index(found.class_name) + 1) % len(CLASSES)]
    shown = explain(small_model, array(), 0.51, other)
    assert shown.patches.class_name == other and shown.class_name == found.class_name
    assert (shown.patches.confidence + found.patches.confidence <= 1.0001).all()
    assert ((shown.patches.confidence >= 0.51) == (shown.patches.label == 1)).all()
    assert shown.scores == found.scores
    with pytest.raises(UsageError, match="no class 'zebra'"):
        explain(small_model, array(), class_name="zebra")
    with pytest.raises(UsageError, match="gamma"):
        explain(small_model, array(), gamma=0.4)
    with pytest.raises(ImageError, match="nowhere"):
        explain(small_model, "nowhere.png")


def test_the_command_writes_a_picture_and_goes_on_after_bad_images(run, image, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    same = tmp_path / "sub" / "photo.png"
    same.parent.mkdir()
    shutil.copy(image, same)
    result = command(run, tmp_path / "broken.png", image, same, tmp_path / "gone.jpg", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "broken.png" in result.stderr and "gone.jpg" in result.stderr
    assert "Traceback" not in result.stderr
    written = [str(tmp_path / "out" / name) for name in ("photo.png", "photo-2.png")]
    assert result.stdout.split() == written and sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "photo-2.png",
        "photo.png",
    ]
    with Image.open(written[0]) as png:
        assert png.width > 800 and len(png.convert("RGB").getcolors(1 << 24)) > 100


def test_where_a_picture_goes(run, image, tmp_path):
    assert command(run, image).exit_code == 0 and (run / "explain" / "photo.png").is_file()
    assert command(run / BEST, image, "-o", tmp_path / "one.png", "--class", "b").exit_code == 0
    assert (tmp_path / "one.png").is_file()
    assert command("--backbone", "test_efficientnet", "--runs", tmp_path, image).exit_code == 0
    two = command(run, image, image, "-o", tmp_path / "two.png")
    assert two.exit_code == 2 and "give a folder" in two.stderr and not (tmp_path / "two.png").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--class", "zebra"], "no class 'zebra'; give one of its 7: a, b"),
        (["--gamma", "1.5"], "gamma must satisfy"),
        (["-o", "-"], "'-' is not the name"),
    ],
)
def test_wrong_options_write_nothing(run, image, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    result = command(run, image, *arguments)
    assert result.exit_code == 2 and reason in result.stderr and not (run / "explain").exists()
    assert not (tmp_path / "-").exists()


def test_no_images_and_no_run(run, tmp_path):
    assert command(run).exit_code == 2
    assert command(tmp_path / "nothing", "x.png").exit_code == 2
    assert command().exit_code == 2


def test_gamma_is_the_runs(run, image, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "ssod_edge.evaluation.explain.save_patches", lambda patches, title, path: seen.append(patches.gamma)
    )
    (run / "config.json").write_text(json.dumps({"loss": {"gamma": 0.7}}))
    command(run, image)
    others = ("{}", "[]", "[" * 100_000, '{"loss": []}', '{"loss": {"gamma": NaN}}', '{"loss": {"gamma": 7}}')
    for other in others:
        (run / "config.json").write_text(other)
        command(run, image)
    command(run, image, "--gamma", "0.8")
    assert seen == [0.7, *[0.95] * len(others), 0.8]


def save_export(run, digest, score="msp", detector=None):
    threshold = Threshold(-1.5, 0.95, 100, "calib", 0.95)
    files = {"model.onnx": "0"}
    artifacts = tuple(
        Artifact(f"onnx-{p}", "onnxruntime", p, files, 18, {}, t) for p, t in (("int8", None), ("fp32", threshold))
    )
    (run / "export").mkdir(exist_ok=True)
    save_spec(
        Spec(
            "x",
            CLASSES,
            Preprocess(SIZE),
            {"name": score},
            True,
            "",
            {"checkpoint_sha256": digest},
            artifacts,
            detector or {},
        ),
        run / "export",
    )


def test_the_verdict_is_that_of_the_export_of_this_checkpoint(run, image, monkeypatch, capsys):
    assert shipped_threshold(Run.at(run)) is None
    save_export(run, sha256_file(run / BEST))
    assert shipped_threshold(Run.at(run)) == shipped_threshold(Run.at(run / BEST)) == ShippedThreshold("msp", -1.5)
    titles = []
    monkeypatch.setattr("ssod_edge.evaluation.explain.save_patches", lambda patches, title, path: titles.append(title))
    command(run, image)
    word = "UNKNOWN" if float(titles[0].split("msp ")[1].split()[0]) > -1.5 else "KNOWN"
    assert titles[0].splitlines()[2].startswith(f"{word}: msp ") and "threshold -1.500" in titles[0]
    save_export(run, "0")
    assert shipped_threshold(Run.at(run)) is None and "of another checkpoint" in capsys.readouterr().err
    (run / "export" / "ssod.json").write_text("{")
    assert shipped_threshold(Run.at(run)) is None


def test_the_verdict_of_a_fitted_score(run, image, monkeypatch):
    model, rng = Run.at(run).model, np.random.default_rng(0)
    weight, bias = (part[: len(CLASSES)].detach().numpy() for part in model.head_weight())
    features = rng.normal(size=(40, weight.shape[1])).astype(np.float32)
    labels, logits = rng.integers(0, len(CLASSES), 40), features @ weight.T + bias
    data = FitData(features, labels, logits, weight, bias, np.zeros(40, np.float32))
    (run / "export").mkdir(exist_ok=True)
    fitted = fit_score("energy+knn", data)
    state = save_score(fitted, run / "export" / DETECTOR_NAME)
    save_export(run, sha256_file(run / BEST), "energy+knn", {"sha256": sha256_file(state)})
    titles = []
    monkeypatch.setattr("ssod_edge.evaluation.explain.save_patches", lambda patches, title, path: titles.append(title))
    assert command(run, image).exit_code == 0
    logits, id_logit, pooled = run_eager(model, preprocess(load_image(image), model.preprocess)[None])
    expected = fitted.score(pooled, logits, id_logit)[0]
    assert f"energy+knn {expected:.3f} " in titles[0].splitlines()[2]
    state.write_bytes(b"")
    assert command(run, image).exit_code == 0 and len(titles[1].splitlines()) == 2


def test_names_are_no_formulas_and_large_maps_have_no_figures(tmp_path):
    rng = np.random.default_rng(0)
    shape = (14, 14)
    patches = pictures.PatchMap(
        rng.integers(0, 255, (3, 56, 56), dtype=np.uint8),
        rng.random(shape),
        rng.integers(-1, 2, shape).astype(np.int8),
        np.zeros(shape),
        0.95,
        "a$b$c_d" * 20,
    )
    pictures.save_patches(patches, r"$\alpha$ $x^{", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_a_backbone_without_patches_has_none_to_explain():
    with pytest.raises(UsageError, match="'test_vit' has no patches to explain: its features have shape"):
        explain(make_model("test_vit"), array(), gamma=0.6)
