"""Data sets that come in parts: train/, val/ and test/ folders, and validation images from elsewhere."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import write_folder

from ssod_edge.data.sources import ImageSource, open_dataset, open_training_data
from ssod_edge.data.splits import split_dataset
from ssod_edge.errors import UsageError


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """train/ with 12 images of each of three classes, Valid/ with 4, test/ with 2."""
    for name, count in (("train", 12), ("Valid", 4), ("test", 2)):
        write_folder(tmp_path / "photos" / name, per_class=count, size=12)
    return tmp_path / "photos"


def packed(folder: Path, top: str = "") -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            tar.add(file, Path(top) / file.relative_to(folder))
    return path


def as_table(folder: Path) -> Path:
    path = folder.with_suffix(".csv")
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.png"))
    rows = [f"{folder.name}/{file},{file.parts[1]},{file.parts[0]}\n" for file in files]
    path.write_text("path,label,split\n" + "".join(rows))
    return path


def form(folder: Path, kind: str) -> str:
    return str(
        {"folder": Path, "tar": packed, "wrapped": lambda f: packed(f, "download/it"), "csv": as_table}[kind](folder)
    )


def of_part(source: ImageSource, indices: np.ndarray) -> set[str]:
    return {name for name in ("train", "Valid", "test") for i in indices if f"{name}/class" in source.source(int(i))}


@pytest.mark.parametrize("kind", ["folder", "tar", "wrapped", "csv"])
def test_train_and_val_are_kept_apart_and_test_is_left_alone(parts: Path, kind: str) -> None:
    data = form(parts, kind)
    source = open_dataset(data)
    assert source.classes == ("class0", "class1", "class2") and len(source) == 3 * 16
    assert source.left_out == f"not used: 6 images of 'test' (ssod-edge eval RUN --id {data}/test)"
    splits = split_dataset(source, None, None, 0)
    assert [len(part) for part in (splits.train, splits.val, splits.calib)] == [30, 12, 6]
    assert of_part(source, splits.val) == {"Valid"}
    assert of_part(source, splits.train) == of_part(source, splits.calib) == {"train"}
    for part in (splits.train, splits.val, splits.calib):
        assert len(set(np.bincount(source.labels[part]).tolist())) == 1
    assert source.image(int(splits.val[0])).size == (12, 12)
    test = open_dataset(f"{data}/test")
    assert len(test) == 6 and test.classes == source.classes and test.left_out == ""
    assert of_part(test, np.arange(6)) <= {"test"} and test.given_val is None
    assert np.array_equal(np.asarray(test.image(5)), np.asarray(open_dataset(str(parts / "test")).image(5)))


@pytest.mark.parametrize("kind", ["folder", "tar", "csv"])
def test_the_fingerprint_covers_train_and_val_but_not_test(parts: Path, kind: str) -> None:
    before = open_dataset(form(parts, kind)).fingerprint
    (parts / "test" / "class0" / "00.png").unlink()
    assert open_dataset(form(parts, kind)).fingerprint == before
    (parts / "Valid" / "class0" / "00.png").unlink()
    assert open_dataset(form(parts, kind)).fingerprint != before


@pytest.mark.parametrize("kind", ["folder", "tar", "csv"])
def test_a_class_that_is_only_validated_is_refused(parts: Path, kind: str) -> None:
    (parts / "Valid" / "class1").rename(parts / "Valid" / "other")
    with pytest.raises(UsageError, match="class 'other' for validation and none to train on"):
        open_dataset(form(parts, kind))


def test_train_beside_test_alone_is_split_as_a_plain_folder_is(parts: Path) -> None:
    shutil.rmtree(parts / "Valid")
    source = open_dataset(str(parts))
    assert source.given_val is None and len(source) == 36
    assert len(split_dataset(source, 0.2, 0.2, 0).val) == 6


def test_a_layout_that_is_not_quite_one_of_parts_is_refused_with_the_fix(parts: Path) -> None:
    shutil.copytree(parts / "test", parts / "extra")
    with pytest.raises(UsageError, match="'extra' of .* lies beside the parts of a data set .*Valid, test, train"):
        open_dataset(str(parts))
    shutil.rmtree(parts / "extra")
    (parts / "train" / "class9").mkdir()
    with pytest.raises(UsageError, match="class folder 'train/class9' of .* holds no images"):
        open_dataset(str(parts))
    shutil.rmtree(parts / "train")
    with pytest.raises(UsageError, match="holds parts of a data set, but no 'train'. Name one: .*/photos/test"):
        open_dataset(str(parts))
    for kind in (packed, as_table):
        with pytest.raises(UsageError, match="has no images of 'train'; it has those of: Valid, test"):
            open_dataset(f"{kind(parts)}/train")
    plain = packed(write_folder(parts / "plain", per_class=2, size=8))
    with pytest.raises(UsageError, match="holds no folders train/, val/ and test/"):
        open_dataset(f"{plain}/test")


def test_classes_may_be_called_like_parts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "vehicles", classes=2, per_class=3, size=8)
    (folder / "class0").rename(folder / "train")
    assert open_dataset(str(folder)).classes == ("class1", "train")


def test_a_list_of_classes_keeps_the_validation_images(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("class0\nclass2\n")
    source = open_dataset(f"{parts}@{tmp_path / 'some.txt'}")
    splits = split_dataset(source, None, None, 0)
    assert of_part(source, splits.val) == {"Valid"} and len(splits.val) == 8
    assert len(open_dataset(f"{packed(parts)}/test@{tmp_path / 'some.txt'}")) == 4


def test_of_many_validation_images_half_set_thresholds(tmp_path: Path) -> None:
    for name, count in (("train", 10), ("val", 200)):
        write_folder(tmp_path / "photos" / name, classes=2, per_class=count, size=2)
    source = open_dataset(str(tmp_path / "photos"))
    splits = split_dataset(source, None, None, 0)
    assert [len(part) for part in (splits.train, splits.val, splits.calib)] == [20, 200, 200]
    assert np.bincount(source.labels[splits.calib]).tolist() == [100, 100]
    asked = split_dataset(source, None, 0.2, 0)
    assert [len(part) for part in (asked.train, asked.val, asked.calib)] == [16, 400, 4]


def test_validation_images_of_another_data_set(parts: Path) -> None:
    source = open_training_data(str(parts / "train"), str(packed(parts / "Valid")))
    splits = split_dataset(source, None, None, 0)
    assert [len(part) for part in (splits.train, splits.val, splits.calib)] == [30, 12, 6]
    train = open_dataset(str(parts / "train"))
    assert source.fingerprint == train.fingerprint and source.val_record["val_data"] == str(parts / "Valid.tar")
    shown, val = np.asarray(source.image(int(splits.val[7]))), open_dataset(str(parts / "Valid"))
    assert np.array_equal(shown, np.asarray(val.image(7))) and source.labels[splits.val[7]] == val.labels[7]
    (parts / "Valid" / "class0").rename(parts / "Valid" / "Class9")
    with pytest.raises(UsageError, match="has the class 'Class9', which .*train' has no images of"):
        open_training_data(str(parts / "train"), str(parts / "Valid"))
    with pytest.raises(UsageError, match="changed since training"):
        open_training_data(str(parts / "train"), str(parts / "Valid"), source.val_record["val_fingerprint"])


def test_validation_images_are_numbered_by_the_names_of_the_training_classes(parts: Path) -> None:
    shutil.rmtree(parts / "Valid" / "class0")
    source = open_training_data(str(parts / "train"), str(parts / "Valid"))
    assert set(source.labels[36:].tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("data", "val", "reason"),
    [
        ("", "test", "has validation images of its own"),
        ("train", "", "has parts of its own. Name one"),
        ("train", "train", "has the images of"),
        ("train", "nowhere", "does not exist"),
    ],
)
def test_a_validation_set_that_cannot_be_one_is_refused(parts: Path, data: str, val: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        open_training_data(str(parts / data), str(parts / val))
    with pytest.raises(UsageError, match="validation images of its own"):
        open_training_data("demo", str(parts / "Valid"))
