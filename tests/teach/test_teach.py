"""`ssod-edge teach`: new classes in an export, from a few photos, without PyTorch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from collected import write_collected
from lesson import CLASSES, SIZE, run, snapshot, write_photos
from PIL import Image

import ssod_edge
from ssod_edge.data.pixels import read_pixels
from ssod_edge.detect.stored import load_features
from ssod_edge.detect.sums import ScoreSum, load_score
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import open_runner
from ssod_edge.spec import load_spec, save_spec
from ssod_edge.training.model import normalise
from ssod_edge.training.run import Run


def weight_of_residual(export: Path) -> float:
    score = load_score(export / "detector.npz")
    assert isinstance(score, ScoreSum)
    return score.scales["residual"]


def test_a_new_class_is_known_afterwards_on_every_engine(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("ssod_edge.teach.teach.REFERENCE_IMAGES", 50)
    before = snapshot(exported)
    photos = write_photos(tmp_path / "new", "fg", 20, seed=2)
    done = run("teach", exported, photos, "-o", tmp_path / "taught", "--alike", "--max-drop", 5)
    assert done.exit_code == 0, done.output
    assert snapshot(exported) == before
    spec, old = load_spec(tmp_path / "taught"), load_spec(exported)
    assert spec.classes == (*CLASSES, "f", "g")
    # Twenty photos do not widen what all images span: what lies outside has no say as long as they are so few.
    assert weight_of_residual(exported) > 0 == weight_of_residual(tmp_path / "taught")
    assert [a.name for a in spec.artifacts] == [a.name for a in old.artifacts]
    assert all(a.verification["passed"] and a.threshold is not None for a in spec.artifacts)
    assert spec.source["taught"]["photos"] == {"f": 20, "g": 20}
    assert "checkpoint_sha256" not in spec.source and len(spec.source["parent_sha256"]) == 64
    labels = np.load(tmp_path / "taught" / "reference.npz")["label"]
    assert set(np.unique(labels)) == set(range(len(spec.classes)))  # the photos took room from every class
    fresh = write_photos(tmp_path / "fresh", "abcdefg", 10, seed=3)
    for artifact in spec.artifacts:
        with ssod_edge.open(tmp_path / "taught", artifact=artifact.name) as model:
            right = {
                name: np.mean([model.predict(path).class_name == name for path in (fresh / name).iterdir()])
                for name in "abcdefg"
            }
        assert min(right["f"], right["g"]) >= 0.5 and np.mean(list(right.values())) >= 0.85, right


def test_the_photos_of_a_known_class_that_are_taught_change_its_rows_and_no_name(light, tmp_path):
    photos = write_photos(tmp_path / "more", "b", 6, seed=4)
    (photos / "b" / "broken.png").write_bytes(b"no picture")
    done = run("teach", light, photos, "-o", tmp_path / "taught", "--max-drop", 10)
    assert done.exit_code == 1, done.output  # one photo was left out
    assert "left out: " in done.output and "broken.png" in done.output
    spec = load_spec(tmp_path / "taught")
    assert spec.classes == CLASSES and spec.source["taught"]["photos"] == {"b": 6}
    assert weight_of_residual(tmp_path / "taught") > 0
    assert spec.features["images"] == load_spec(light).features["images"] + 6


def test_a_taught_export_is_taught_again_and_forgets(light, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    photos = write_photos(tmp_path / "new", "f", 5, seed=5)
    assert run("teach", light, photos, "-o", first, "--alike", "--max-drop", 10).exit_code == 0
    assert load_spec(first).features["taught"] == {"f": 5}
    again = write_photos(tmp_path / "again", "g", 5, seed=6)
    done = run("teach", first, again, "-o", second, "--forget", "a", "--alike", "--max-drop", 10)
    assert done.exit_code == 0, done.output
    spec = load_spec(second)
    assert spec.classes == ("b", "c", "d", "e", "f", "g")
    assert spec.features["taught"] == {"f": 5, "g": 5} and spec.source["taught"]["forgotten"] == ["a"]
    assert spec.source["parent_sha256"] != load_spec(first).source["parent_sha256"]
    with open_runner(second) as runner:  # verified against NumPy's reference
        assert runner.artifact.verification is not None and runner.artifact.verification["passed"]


def test_what_would_cost_too_much_is_not_released(light, tmp_path, monkeypatch):
    monkeypatch.setattr("ssod_edge.teach.rows.TAKEN", (0.5,))
    monkeypatch.setattr("ssod_edge.teach.teach.SPENT", 50)
    before = snapshot(light)
    photos = write_photos(tmp_path / "new", "f", 5, seed=5)
    done = run("teach", light, photos, "-o", tmp_path / "taught", "--alike")
    assert done.exit_code == 4
    assert "nothing is released: the accuracy of the other classes falls by" in done.output
    assert "who pays: " in done.output
    assert not (tmp_path / "taught").exists() and snapshot(light) == before
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("photos", "options", "message"),
    [
        ({"new": ("a", 10)}, (), r"of 10 photos of 'new' look like 'a': the model knows them as that"),
        ({"new": ("f", 1)}, (), "the class 'new' of '.*' has 1 photo that can be read. It takes 2"),
        ({"new": ("f", 5), "empty": ("f", 0)}, (), "class folder 'empty' of '.*' holds no images"),
        ({"new": ("f", 5)}, ("--forget", "x"), "--forget 'x': the model has no such class"),
        (
            {},
            ("--forget", "a", "--forget", "b", "--forget", "c", "--forget", "d"),
            "1 of 5 classes would be left",
        ),
        ({}, (), "there is nothing to teach"),
    ],
)
def test_what_cannot_be_taught_is_refused_with_the_reason(light, tmp_path, photos, options, message):
    for name, (like, count) in photos.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for path in write_photos(tmp_path / name, like, count, seed=7).glob("*/*"):
            path.rename(tmp_path / "photos" / name / path.name)
    data = [tmp_path / "photos"] if photos else []
    done = run("teach", light, *data, "-o", tmp_path / "taught", *options)
    assert done.exit_code == 2 and re.search(message, done.output), done.output
    assert not (tmp_path / "taught").exists()


def test_one_photo_in_two_classes_is_refused(light, tmp_path):
    photos = write_photos(tmp_path / "new", "fg", 3, seed=8)
    shutil.copy(photos / "f" / "000.png", photos / "g" / "copy.png")
    done = run("teach", light, photos, "-o", tmp_path / "taught")
    assert done.exit_code == 2 and "are the same photo. Remove one" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("known", "given"),
    [("Caf\u00e9", "Cafe\u0301"), ("a", "A"), ("a", "\uff41"), ("Cafe\u0301", "CAF\u00c9"), ("strasse", "STRASSE")],
)
def test_a_class_that_exists_under_another_spelling(light, tmp_path, known, given):
    """In another Unicode form it is the same class; in another case, or another width, somebody has to say."""
    model = tmp_path / "model"
    shutil.copytree(light, model)
    save_spec(replace(load_spec(model), classes=(known, *CLASSES[1:])), model)
    photos = write_photos(tmp_path / "new", "f", 4, seed=8)
    (photos / "f").rename(photos / given)
    done = run("teach", model, photos, "-o", tmp_path / "taught", "--max-drop", 50)
    if given == "Cafe\u0301":
        assert done.exit_code == 0, done.output
        assert load_spec(tmp_path / "taught").classes == (known, *CLASSES[1:])
        return
    text = " ".join(done.output.split())
    assert done.exit_code == 2 and f"the class '{given}'" in text and f"is spelled like '{known}'" in text
    done = run("teach", model, photos, "-o", tmp_path / "taught", "--max-drop", 50, "--alike")
    assert done.exit_code == 0 and load_spec(tmp_path / "taught").classes[-1] == given, done.output


def test_two_new_classes_of_one_spelling_are_refused(light, tmp_path):
    photos = write_photos(tmp_path / "new", "fg", 3, seed=8)
    (photos / "f").rename(photos / "Mug")
    (photos / "g").rename(photos / "mug")
    done = run("teach", light, photos, "-o", tmp_path / "taught")
    assert done.exit_code == 2 and re.search("'(Mug|mug)' of .* is spelled like '(Mug|mug)'", done.output)


@pytest.mark.parametrize("name", ["a\tb", "a\x1b[31m", "\udcff", " "])
def test_a_name_that_no_class_may_have(light, tmp_path, name):
    photos = write_photos(tmp_path / "new", "f", 3, seed=8)
    (photos / "f").rename(photos / name)
    done = run("teach", light, photos, "-o", tmp_path / "taught", "--alike")
    assert done.exit_code == 2 and re.search("cannot be the name of a class: it |that is not UTF-8", done.output)
    assert "\x1b" not in done.output


def test_copies_of_a_photo_count_once(light, tmp_path):
    photos = write_photos(tmp_path / "new", "f", 3, seed=8)
    for number in range(4):
        shutil.copy(photos / "f" / "000.png", photos / "f" / f"copy{number}.png")
    done = run("teach", light, photos, "-o", tmp_path / "taught", "--alike", "--max-drop", 20)
    assert done.exit_code == 0 and "left out: 4 of 7 photos, which are copies of others" in done.output
    assert load_spec(tmp_path / "taught").taught["photos"] == {"f": 3}


def test_photos_that_were_taught_before_are_not_taught_again(light, tmp_path):
    """`review` adds to the folder that was taught: what is new there is learnt, and the rest is not counted twice."""
    model, photos = tmp_path / "model", write_photos(tmp_path / "new", "f", 6, seed=5)
    assert run("teach", light, photos, "-o", model, "--alike", "--max-drop", 10).exit_code == 0
    done = run("teach", model, photos, "--max-drop", 10)
    assert done.exit_code == 2 and "the model has learnt all photos of" in done.output, done.output
    for path in write_photos(tmp_path / "more", "f", 3, seed=6).glob("*/*"):
        path.rename(photos / "f" / f"more-{path.name}")
    done = run("teach", model, photos, "--max-drop", 10)
    assert done.exit_code == 0, done.output
    assert "left out: 6 of 9 photos, which the model has learnt already" in done.output
    spec = load_spec(model)
    assert spec.taught["photos"] == {"f": 3} and spec.features["taught"] == {"f": 9}
    assert spec.features["images"] == load_spec(light).features["images"] + 9


def test_a_photo_that_the_model_has_learnt_as_another_class_is_refused(light, trained, tmp_path):
    """Given as a new class or as another known one, until that class is forgotten or somebody says that it is right."""
    learnt = trained.parent.parent / "photos" / "a" / "003.png"
    for name in ("f", "b"):
        photos = write_photos(tmp_path / name, name, 5, seed=5)
        shutil.copy(learnt, photos / name / "odd.png")
        done = run("teach", light, photos, "-o", tmp_path / "taught", "--max-drop", 20)
        text = " ".join(done.output.split())
        assert done.exit_code == 2 and f"'{name}/odd.png' of class '{name}' is a photo that the model has" in text, text
        assert "learnt as 'a'. Remove it" in text
    for number, option in enumerate((("--alike",), ("--forget", "a"))):
        out = tmp_path / f"taught{number}"
        assert run("teach", light, tmp_path / "f", "-o", out, "--max-drop", 20, *option).exit_code == 0
        assert load_spec(out).taught["photos"] == {"f": 6}


def test_a_photo_that_was_saved_again_counts_once_and_contradicts(light, tmp_path):
    photos = write_photos(tmp_path / "new", "fg", 3, seed=8)
    Image.open(photos / "f" / "001.png").save(photos / "f" / "again.jpg", quality=98, subsampling=0)
    done = run("teach", light, photos, "-o", tmp_path / "taught", "--alike", "--max-drop", 50)
    assert done.exit_code == 0 and "left out: 1 of 7 photos, which are copies of others" in done.output, done.output
    assert load_spec(tmp_path / "taught").taught["photos"] == {"f": 3, "g": 3}
    (photos / "f" / "again.jpg").rename(photos / "g" / "again.jpg")
    done = run("teach", light, photos, "-o", tmp_path / "other", "--max-drop", 50)
    text = " ".join(done.output.split())
    assert done.exit_code == 2 and "are the same photo, saved again. Remove one" in text, text
    assert "'f/001.png' of class 'f' and 'g/again.jpg' of class 'g'" in text


def test_a_new_class_of_one_photo_and_its_copy_is_one_photo(light, tmp_path):
    photos = write_photos(tmp_path / "new", "f", 1, seed=8)
    Image.open(photos / "f" / "000.png").save(photos / "f" / "again.jpg", quality=98, subsampling=0)
    done = run("teach", light, photos, "-o", tmp_path / "taught", "--alike")
    assert done.exit_code == 2, done.output
    assert "has 1 photo that can be read (left out: 1 copies). It takes 2" in done.output


def test_what_cannot_be_read_among_good_photos_is_named(light, tmp_path):
    photos = write_photos(tmp_path / "new", "f", 4, seed=8)
    (photos / "f" / "empty.jpg").touch()
    (photos / "f" / "link.jpg").symlink_to("nowhere.jpg")
    whole = (photos / "f" / "000.png").read_bytes()
    (photos / "f" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "f" / "notes.txt").write_text("no picture")
    done = run("teach", light, photos, "-o", tmp_path / "taught", "--alike", "--max-drop", 20)
    assert done.exit_code == 1, done.output
    assert all(f"{name}'" in done.output for name in ("empty.jpg", "link.jpg", "cut.png"))
    assert "left out: 1 file that is no image (.txt)" in done.output
    assert load_spec(tmp_path / "taught").taught["photos"] == {"f": 4}


@pytest.mark.parametrize("inner", ["", "export"])
def test_the_model_is_no_photos(exported, tmp_path, inner):
    done = run("teach", exported.parent, exported.parent / inner, "-o", tmp_path / "taught")
    assert done.exit_code == 2 and "is the model itself, not photos. Give DATA" in done.output


def test_what_nobody_has_reviewed_is_no_lesson(light, tmp_path):
    write_collected(tmp_path / "kept", {3: 2})
    done = run("teach", light, tmp_path / "kept", "-o", tmp_path / "taught")
    text = " ".join(done.output.split())
    assert done.exit_code == 2 and f"ssod-edge review {tmp_path / 'kept'}; and teach" in text, text
    assert run("review", tmp_path / "kept", "--folders").exit_code == 0
    done = run("teach", light, tmp_path / "kept" / "groups", "-o", tmp_path / "taught")
    text = " ".join(done.output.split())
    assert done.exit_code == 2 and "--folders --done; and teach" in text and "kept/classes" in text, text


@pytest.mark.parametrize("forget", [(), ("--forget", "e"), ("--forget", "a")])
def test_photos_that_are_nearly_all_of_a_known_class(light, tmp_path, forget):
    photos = write_photos(tmp_path / "like", "a", 17, seed=7)
    write_photos(tmp_path / "other", "f", 3, seed=7)
    (photos / "a").rename(photos / "tee")
    for path in (tmp_path / "other" / "f").iterdir():
        path.rename(photos / "tee" / f"other-{path.name}")
    done = run("teach", light, photos, "-o", tmp_path / "taught", "--max-drop", 50, *forget)
    if "a" in forget:  # then it is what that class is called now
        assert done.exit_code == 0, done.output
    else:
        assert done.exit_code == 2 and re.search(r"1\d of 20 photos of 'tee' look like 'a'", done.output), done.output


def test_the_export_itself_is_never_overwritten(light, tmp_path):
    photos = write_photos(tmp_path / "new", "f", 3, seed=8)
    done = run("teach", light, photos, "-o", light)
    assert done.exit_code == 2 and "leave out -o to teach in place" in done.output


def test_an_export_without_features_says_what_it_cannot_do(light, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(light, bare)
    (bare / "features.npz").unlink()
    save_spec(replace(load_spec(bare), features={}), bare)
    photos = write_photos(tmp_path / "new", "f", 3, seed=8)
    done = run("teach", bare, photos, "-o", tmp_path / "taught")
    assert done.exit_code == 2 and "holds no features of the images that it was fitted on" in done.output


def test_features_that_were_changed_are_refused(light, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(light, damaged)
    content = bytearray((damaged / "features.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "features.npz").write_bytes(bytes(content))
    photos = write_photos(tmp_path / "new", "f", 3, seed=8)
    done = run("teach", damaged, photos, "-o", tmp_path / "taught")
    assert done.exit_code == 4 and "features.npz' was changed or cut short" in done.output


@pytest.fixture(scope="module", params=["all", "branch", pytest.param("upper", marks=pytest.mark.slow)])
def tuned(request: pytest.FixtureRequest, trained: Path) -> Path:
    """An export of a run that changed its features. Nobody changes it."""
    root, name = trained.parent.parent, request.param
    backbone = ["--backbone", "test_efficientnet", "--size", SIZE, "--weights", root / "w.safetensors"]
    more = ["--epochs", 4, "--batch-size", 16] if name == "all" else []
    out = ["-o", root / "runs", "--name", name]
    done = run("train", root / "photos", *backbone, "--workers", 0, "--tune", name, "--val-fraction", 0.1, *more, *out)
    assert done.exit_code == 0, done.output
    done = run("export", root / "runs" / name, "--score", "gen+mahalanobispp", "--target", "onnx", "--fp32")
    assert done.exit_code == 0 and "features.npz: " in done.output, done.output
    return root / "runs" / name / "export"


def test_features_of_a_network_that_was_trained_are_those_of_images_it_has_not_seen(tuned, exported):
    spec, stored = load_spec(tuned), load_features(tuned, load_spec(tuned))
    assert spec.features["tuned"] == tuned.parent.name and "tuned" not in load_spec(exported).features
    assert spec.expected.get("without_branch", False) is (tuned.parent.name == "branch")
    source, splits = Run.at(tuned.parent).splits("")
    rows = np.sort(np.concatenate([splits.calib, splits.val]))
    assert spec.features["images"] == len(rows) and spec.features["held_out"] == len(splits.val)
    assert np.array_equal(rows[stored.folds.images], splits.calib) and np.array_equal(rows[stored.held_out], splits.val)
    assert np.array_equal(stored.labels, source.labels[rows])
    model = Run.at(tuned.parent).model
    weight, bias = (part[:5].detach().numpy() for part in model.head_weight())
    assert all(np.array_equal(layer, weight) for layer in stored.folds.weight) and len(stored.folds.weight) > 1
    assert all(np.array_equal(layer, bias) for layer in stored.folds.bias)
    images = np.stack([read_pixels(source.picture(index), model.preprocess) for index in rows[:4].tolist()])
    with torch.inference_mode():
        features = model.features(normalise(torch.from_numpy(images), model.preprocess)).numpy()
    np.testing.assert_allclose(stored.plain[:4].astype(np.float32), features, rtol=2e-3, atol=2e-3)
    assert stored.last == (0 if spec.features["tuned"] == "upper" else model.last_width)


def test_an_export_of_a_network_that_was_trained_is_taught_and_says_what_that_means(tuned, tmp_path):
    photos = write_photos(tmp_path / "new", "i", 12, seed=2)
    done = run("teach", tuned, photos, "-o", tmp_path / "taught", "--alike", "--max-drop", 10)
    assert done.exit_code == 0, done.output
    spec = load_spec(tmp_path / "taught")
    what = "taught a branch" if spec.features["tuned"] == "branch" else "tuned the features to"
    assert f"note: training {what} the classes that it had" in done.output
    assert spec.classes == (*CLASSES, "i") and spec.features["tuned"] == load_spec(tuned).features["tuned"]
    assert all(artifact.verification["passed"] for artifact in spec.artifacts)
    fresh = write_photos(tmp_path / "fresh", "abcdei", 10, seed=3)
    with ssod_edge.open(tmp_path / "taught") as model:
        right = {
            name: np.mean([model.predict(path).class_name == name for path in (fresh / name).iterdir()])
            for name in "abcdei"
        }
    assert right.pop("i") >= 0.3 and np.mean(list(right.values())) >= 0.8, right


def test_images_for_thresholds_that_are_too_few_or_of_another_set_are_no_features(tuned, tmp_path):
    photos = write_photos(tmp_path / "other", "abcde", 10, seed=12)
    done = run("export", tuned.parent, "-o", tmp_path / "other-id", "--id", photos, "--target", "onnx", "--fp32")
    assert done.exit_code == 0 and Export.at(tmp_path / "other-id").spec.features == {}, done.output
    done = run("teach", tmp_path / "other-id", photos, "-o", tmp_path / "taught")
    assert done.exit_code == 2 and "with --id" in done.output


def test_no_features_leaves_them_out(trained, tmp_path):
    done = run("export", trained, "-o", tmp_path / "bare", "--no-features", "--target", "onnx", "--fp32")
    assert done.exit_code == 0 and "features.npz" not in done.output
    assert not (tmp_path / "bare" / "features.npz").exists() and Export.at(tmp_path / "bare").spec.features == {}


def test_teaching_loads_no_pytorch(light, tmp_path):
    photos = write_photos(tmp_path / "new", "f", 3, seed=8)
    code = (
        "import sys\nfrom ssod_edge.cli import main\n"
        f"try: main(['teach', {str(light)!r}, {str(photos)!r}, '-o', {str(tmp_path / 't')!r}, '--forget', 'zz'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "2 False\n", done.stderr
