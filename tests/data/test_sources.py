"""Sources and data: every layout, the splits, and images that cannot be read."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import write_folder
from PIL import Image

import ssod_edge.data.sources
from ssod_edge.config import Preprocess
from ssod_edge.data.named import Via
from ssod_edge.data.pixels import equalise, load_image, preprocess
from ssod_edge.data.sources import model_labels, open_dataset, read_class_list
from ssod_edge.data.splits import split_dataset
from ssod_edge.errors import ImageError, UsageError
from ssod_edge.training.batches import EvalImages, TrainImages, augment, load_batches

SETTINGS = Preprocess(input_size=24)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


def as_tar(folder: Path) -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            tar.add(file, file.relative_to(folder))
    return path


def test_a_folder_and_its_tar_hold_the_same_images(folder):
    plain, tar = open_dataset(str(folder)), open_dataset(str(as_tar(folder)))
    assert plain.classes == tar.classes == ("class0", "class1", "class2")
    assert len(plain) == len(tar) == 36 and plain.labels.dtype == np.int64
    for index in (0, 17, 35):
        assert plain.labels[index] == tar.labels[index]
        assert Path(plain.source(index)).name == Path(tar.source(index)).name
        assert np.array_equal(np.asarray(plain.image(index)), np.asarray(tar.image(index)))


def test_workers_that_share_a_tar_file_read_the_right_bytes(folder):
    source = open_dataset(str(as_tar(folder)))
    source.image(0)  # opens the file in this process, before the workers are forked
    dataset = EvalImages(source, None, SETTINGS)
    alone = [dataset[i] for i in range(len(dataset))]
    seen = 0
    for images, labels, indices in load_batches(dataset, 2, batch_size=5):
        for image, label, index in zip(images, labels, indices, strict=True):
            assert np.array_equal(image.numpy(), alone[int(index)][0].numpy()) and int(label) == alone[int(index)][1]
            seen += 1
    assert seen == len(source)


def test_torchvision_data_sets(folder):
    source = open_dataset(f"torch/image_folder:{folder}")
    assert source.classes == ("class0", "class1", "class2") and len(source) == 36
    assert np.array_equal(np.asarray(source.image(3)), np.asarray(open_dataset(str(folder)).image(3)))
    with pytest.raises(UsageError, match="cannot be opened"):
        open_dataset(f"torch/cifar10:{folder}")


def test_hugging_face_data_sets(folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="needs the package 'datasets'")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    source = open_dataset(f"hfds/{folder}:train")
    assert source.classes == ("class0", "class1", "class2") and len(source) == 36
    assert source.image(0).mode == "RGB" and source.image(0).size == (40, 40)


def hub_set(path, rows, **columns):
    """A data set of the Hugging Face kind, its images embedded, as one file of rows."""
    datasets = pytest.importorskip("datasets", reason="needs the package 'datasets'")

    def png(image):
        if image is None:
            return None
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    name, *_ = [key for key in rows if key in ("image", "picture")] or [None]
    if name:
        rows = {**rows, name: [png(image) for image in rows[name]]}
        columns[name] = datasets.Image()
    path.mkdir()
    features = datasets.Features({key: columns.get(key, datasets.Value("string")) for key in rows})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path / "train-00000.parquet"))
    return f"hfds/{path}"


@pytest.fixture
def squares(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return [Image.new("RGB", (8, 8), (40 * index, 0, 0)) for index in range(6)]


def test_embedded_images_without_names_are_told_apart(squares, tmp_path):
    labels = ["b", "a", "b", "a", "b", "a"]
    one = open_dataset(hub_set(tmp_path / "one", {"image": squares, "label": labels}))
    other = open_dataset(hub_set(tmp_path / "other", {"image": squares[::-1], "label": labels}))
    assert one.classes == other.classes == ("a", "b") and one.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert one.fingerprint != other.fingerprint
    assert one.source(2).startswith("row 2, SHA-256 ") and np.asarray(one.image(2))[0, 0].tolist() == [80, 0, 0]


def test_other_columns_than_image_and_label(squares, tmp_path):
    picture = open_dataset(hub_set(tmp_path / "picture", {"picture": squares, "label": ["x", "y"] * 3}))
    assert len(picture) == 6 and picture.classes == ("x", "y")
    bare = hub_set(tmp_path / "bare", {"image": squares})
    assert len(open_dataset(bare, labelled=False)) == 6
    with pytest.raises(UsageError, match="has no column of labels"):
        open_dataset(bare)
    with pytest.raises(UsageError, match="must have one column of images .* it has: text"):
        open_dataset(hub_set(tmp_path / "none", {"text": ["a", "b"]}))


def test_rows_without_a_label_or_an_image_are_named(squares, tmp_path):
    unlabelled = hub_set(tmp_path / "some", {"image": squares, "label": ["a", None, "b", "a", "b", "a"]})
    with pytest.raises(UsageError, match="1 images of .* have no label, 'row 1, SHA-256"):
        open_dataset(unlabelled)
    assert open_dataset(unlabelled, labelled=False).labels.tolist() == [0, -1, 1, 0, 1, 0]
    holes = open_dataset(hub_set(tmp_path / "holes", {"image": [*squares[:5], None], "label": ["a", "b"] * 3}))
    with pytest.raises(ImageError, match="'row 5' of .*the row has no image"):
        holes.image(5)


def test_the_demo_has_its_own_splits():
    source = open_dataset("demo")
    splits = split_dataset(source, 0.05, 0.05, seed=0)
    assert sum(map(len, (splits.train, splits.val, splits.calib))) == len(source) and not source.hflip_ok
    val = open_dataset("demo:val")
    assert np.array_equal(np.asarray(source.image(int(splits.val[3]))), np.asarray(val.image(3)))
    assert source.labels[splits.val[3]] == val.labels[3] and source.classes == val.classes
    with pytest.raises(UsageError):
        open_dataset("demo:nothing")


def test_splits_are_disjoint_by_class_and_seeded(folder):
    source = open_dataset(str(folder))
    splits = split_dataset(source, 0.2, 0.2, seed=1)
    parts = (splits.train, splits.val, splits.calib)
    assert sorted(np.concatenate(parts).tolist()) == list(range(36))
    assert all(
        np.bincount(source.labels[part], minlength=3).tolist() == [n] * 3
        for part, n in zip(parts, (8, 2, 2), strict=True)
    )
    assert split_dataset(source, 0.2, 0.2, seed=1).hash == splits.hash
    assert split_dataset(source, 0.2, 0.2, seed=2).hash != splits.hash


def test_small_fractions_still_leave_one_image_of_each_class(folder):
    splits = split_dataset(open_dataset(str(folder)), 0.001, 0.001, seed=0)
    assert (len(splits.train), len(splits.val), len(splits.calib)) == (30, 3, 3)


def test_the_fingerprint_follows_names_and_labels(folder):
    before = open_dataset(str(folder)).fingerprint
    assert open_dataset(str(folder)).fingerprint == before
    shutil.move(folder / "class0" / "00.png", folder / "class1" / "zz.png")
    assert open_dataset(str(folder)).fingerprint != before


def test_the_fingerprint_of_an_ordinary_folder_never_changes(folder):
    assert open_dataset(str(folder)).fingerprint == "c1406f6e8a5c849fe952e6db81d41cba864a17fa9b4c9c82e61b6ba231812828"
    splits = split_dataset(open_dataset(str(folder)), 0.05, 0.05, 0)
    assert splits.hash == "d92f9dc2bfbaf1427f16caa5c1064514b31c0eea605a406053f45c653688993b"


def test_a_file_name_that_is_not_utf8_is_no_obstacle(folder):
    os.rename(folder / "class0" / "00.png", os.fsencode(folder / "class0") + b"/caf\xe9.png")
    for source in (open_dataset(str(folder)), open_dataset(str(as_tar(folder)))):
        assert len(source) == 36 and len(source.fingerprint) == 64
        assert source.image(next(i for i in range(36) if "caf" in source.source(i))).mode == "RGB"


def test_every_suffix_that_predict_takes_is_an_image_of_a_data_set(folder):
    picture = Image.open(folder / "class1" / "00.png")
    for suffix in (".webp", ".bmp", ".tif", ".TIFF", ".gif", ".ppm"):
        picture.save(folder / "class1" / f"other{suffix}")
    (folder / "class1" / "notes.txt").write_text("no image")
    for path in (folder, as_tar(folder)):
        source = open_dataset(str(path))
        assert np.bincount(source.labels).tolist() == [12, 18, 12]
        assert all(source.image(index).size == (40, 40) for index in range(12, 30))


def test_hidden_files_and_folders_are_no_images(folder):
    plain = open_dataset(str(folder))
    (folder / "class1" / "._00.png").write_bytes(b"AppleDouble")
    for hidden in (".thumbs", "class2/.thumbs", ".trash/class0"):
        (folder / hidden).mkdir(parents=True)
        (folder / hidden / "00.png").write_bytes(b"thumbnail")
    for path in (folder, as_tar(folder)):
        source = open_dataset(str(path))
        assert (source.classes, source.labels.tolist()) == (plain.classes, plain.labels.tolist())
        assert source.fingerprint == plain.fingerprint
        assert np.array_equal(np.asarray(source.image(35)), np.asarray(plain.image(35)))
    for label in range(3):
        shutil.rmtree(folder / f"class{label}")
    with pytest.raises(UsageError, match="holds no images"):
        open_dataset(str(folder), labelled=False)


def test_a_class_list_leaves_a_data_set_of_those_classes(folder, tmp_path):
    names = tmp_path / "some.txt"
    names.write_text("# two of them\n2\nclass0  # by name\n\n")
    source, chosen = open_dataset(str(folder)), open_dataset(f"{folder}@{names}")
    assert chosen.classes == ("class0", "class2") and chosen.labels.tolist() == 12 * [0] + 12 * [1]
    assert np.array_equal(np.asarray(chosen.image(12)), np.asarray(source.image(24)))
    assert chosen.source(12) == source.source(24) and chosen.fingerprint != source.fingerprint
    names.write_text("7\n")
    with pytest.raises(UsageError, match="names '7'"):
        open_dataset(f"{folder}@{names}")
    for missing in ("nothing", ""):
        with pytest.raises(UsageError, match="one of: imagenet-objects, imagenet-without-clothes, "):
            open_dataset(f"{folder}@{missing}")


def test_labels_are_numbered_as_the_model_does_by_class_name():
    labels = np.array([0, 1, 2, 0, -1])
    assert model_labels(labels, ("blue", "cat", "red"), ("red", "blue")).tolist() == [1, -1, 0, 1, -1]


def test_a_class_name_wins_over_an_index(tmp_path):
    (tmp_path / "list.txt").write_text("2\n1\n")
    assert read_class_list(str(tmp_path / "list.txt"), ("2", "10", "abc")) == [0, 1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"# nothing yet\n\n", "names no class"), (b"caf\xe9\n", "is not UTF-8 text"), ("²\n".encode(), "names '²'")],
)
def test_a_class_list_that_names_nothing_is_refused(tmp_path, content, reason):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        read_class_list(str(tmp_path / "list.txt"), ("a", "b"))


def test_the_shipped_list_leaves_out_animals_and_vehicles():
    chosen = read_class_list("imagenet-objects", tuple(str(i) for i in range(1000)))
    assert min(chosen) == 398 and len(set(chosen)) == len(chosen) == 518
    for index in (404, 436, 472, 603, 627, 717, 780, 864, 895):  # airliner ... warplane
        assert index not in chosen


@pytest.mark.parametrize(
    ("name", "count", "out", "kept"),
    [
        ("imagenet-without-waste", 936, (440, 478, 692, 728, 737, 898, 907, 999), (1, 414, 608, 834, 963)),
        ("imagenet-without-clothes", 928, (399, 474, 608, 610, 697, 806, 834, 841, 869), (1, 414, 440, 907, 963)),
    ],
)
def test_the_lists_of_the_photo_sets_leave_out_what_those_show(name, count, out, kept):
    chosen = read_class_list(name, tuple(str(i) for i in range(1000)))
    assert len(set(chosen)) == len(chosen) == count
    assert not set(out) & set(chosen) and set(kept) <= set(chosen)
    lines = (Path(ssod_edge.data.sources.__file__).parent / "lists" / f"{name}.txt").read_text().splitlines()
    assert any("pretrained on ImageNet have seen" in line for line in lines if line.startswith("#"))


def test_data_that_cannot_be_trained_on_is_refused_with_the_fix(tmp_path, folder):
    with pytest.raises(UsageError, match="does not exist"):
        open_dataset(str(tmp_path / "nowhere"))
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        open_dataset(str(tmp_path / "hollow"))
    (tmp_path / "text.tar").write_text("not a tar")
    with pytest.raises(UsageError, match=r"is no \.tar file"):
        open_dataset(str(tmp_path / "text.tar"))
    (folder / "class9").mkdir()
    with pytest.raises(UsageError, match=r"class folder 'class9' .* holds no images"):
        open_dataset(str(folder))
    assert len(open_dataset(str(folder), labelled=False)) == 36
    (folder / "class9").rmdir()
    for index in range(2, 12):
        (folder / "class1" / f"{index:02}.png").unlink()
    with pytest.raises(UsageError, match=r"class 'class1' .* has 2 image"):
        split_dataset(open_dataset(str(folder)), 0.1, 0.1, 0)


def test_a_wrong_layout_is_refused_with_the_reason(folder):
    def refused(reason, path=folder):
        with pytest.raises(UsageError, match=reason):
            open_dataset(str(path))

    refused("'class0/00.png' .* in no class folder|holds images, but no class folders", folder / "class0")
    shutil.copy(folder / "class0" / "00.png", folder / "stray.png")
    refused("'stray.png' of .* is in no class folder")
    refused("'stray.png' of .* is in no class folder", as_tar(folder))
    (folder / "stray.png").unlink()
    (folder / "class0" / "more").mkdir()
    shutil.copy(folder / "class0" / "00.png", folder / "class0" / "more" / "x.png")
    refused("'class0/more/x.png' of .* is in a folder below its class folder")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_tar_file_whose_headers_raise_anything_is_damaged(tmp_path, kind, compressed):
    """Thousands that each belong to the next one, a RecursionError; bits that no decompressor knows."""
    with tarfile.open(tmp_path / "x.tar", "w:xz" if compressed else "w") as tar:
        for _ in range(3000):
            header = tarfile.TarInfo("header")
            header.type, header.size = kind, 11
            tar.addfile(header, io.BytesIO(b"11 path=ab\n"))
        tar.addfile(tarfile.TarInfo("a/1.png"))
    if compressed:
        content = (tmp_path / "x.tar").read_bytes()
        (tmp_path / "x.tar").write_bytes(content[:60] + b"\xff" * 20 + content[80:])
    with pytest.raises(UsageError, match=r"x\.tar' is no \.tar file, or is cut short \(.+\)\. Copy"):
        open_dataset(str(tmp_path / "x.tar"))


def test_a_name_that_is_no_data_set_is_refused_with_the_reason(folder, tmp_path):
    for name, reason in (
        ("", "name of the data set is empty"),
        ("@imagenet-objects", "name of the data set is empty"),
        (str(folder / "class0" / "00.png"), r"is a file, but not a \.tar, \.csv, \.parquet file"),
    ):
        with pytest.raises(UsageError, match=reason):
            open_dataset(name)
    tar = as_tar(folder)
    (tmp_path / "cut.tar").write_bytes(tar.read_bytes()[: tar.stat().st_size // 2 + 100])
    with pytest.raises(UsageError, match=r"is no \.tar file, or is cut short \(.*\)\. Copy"):
        open_dataset(str(tmp_path / "cut.tar"))
    with tarfile.open(tmp_path / "empty.tar", "w") as empty:
        empty.addfile(tarfile.TarInfo("readme.txt"), io.BytesIO())
    with pytest.raises(UsageError, match=r"holds no images \(\.avif"):
        open_dataset(str(tmp_path / "empty.tar"))


def test_a_label_outside_the_classes_is_refused(folder, monkeypatch):
    import ssod_edge.data.readers

    real = ssod_edge.data.readers._open_reader
    for wrong in (-1, 3):

        def broken(name, wrong=wrong):
            reader, labels, classes = real(name)
            labels[5] = wrong
            return reader, labels, classes

        monkeypatch.setattr(ssod_edge.data.readers, "_open_reader", broken)
        with pytest.raises(UsageError, match=f"label {wrong}, outside its 3 classes"):
            open_dataset(str(folder))


def test_a_flat_folder_is_an_ood_set(folder):
    flat = open_dataset(str(folder / "class1"), labelled=False)
    assert len(flat) == 12


def test_evaluation_images_are_the_runtimes_bytes(folder):
    source = open_dataset(str(folder))
    image, label, index = EvalImages(source, np.array([20, 3]), SETTINGS)[1]
    expected = load_image(source.source(3) if Path(source.source(3)).exists() else folder / source.source(3))
    assert np.array_equal(image.numpy(), preprocess(expected, SETTINGS)) and (label, index) == (0, 3)
    through = EvalImages(source, None, SETTINGS, via=Via(8))[3][0]
    assert np.array_equal(through.numpy(), preprocess(equalise(expected, Via(8)), SETTINGS))


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder):
    source = open_dataset(str(folder))

    def batch(seed=0, epoch=0, workers=0, order=(4, 5, 6)):
        dataset = TrainImages(source, SETTINGS, seed, 0.5, 0.5)
        dataset.start_epoch(epoch, 24)
        found = {}
        for images, _, indices in load_batches(dataset, workers, batch_sampler=[[i] for i in order]):
            found[int(indices[0])] = images[0].numpy()
        return np.stack([found[i] for i in (4, 5, 6)])

    reference = batch()
    assert np.array_equal(reference, batch(workers=2, order=(6, 4, 5)))
    for other in (batch(seed=1), batch(epoch=1)):
        assert not np.array_equal(reference, other)


def test_augmentation_mirrors_only_where_a_mirrored_image_keeps_its_label():
    image = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (32, 1, 3)))

    def rising(hflip):
        rng = np.random.default_rng(0)
        return [
            float(np.diff(augment(image, SETTINGS, rng, 0.9, hflip)[0].astype(float)).mean()) > 0 for _ in range(20)
        ]

    assert all(rising(0.0)) and not any(rising(1.0)) and 0 < sum(rising(0.5)) < 20
    assert TrainImages(open_dataset("demo:val"), SETTINGS, 0, 0.5, 0.5).hflip == 0


@pytest.mark.parametrize("size", [1, 2])
def test_a_mirrored_image_of_one_pixel_is_a_tensor(folder, size):
    dataset = TrainImages(open_dataset(str(folder)), Preprocess(input_size=size), 0, 0.5, hflip=1.0)
    assert dataset[0][0].shape == (3, size, size)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_without_a_traceback(folder, workers):
    path = folder / "class1" / "05.png"
    path.write_bytes(path.read_bytes()[:60])
    dataset = EvalImages(open_dataset(str(folder)), None, SETTINGS)
    with pytest.raises(ImageError) as caught:
        list(load_batches(dataset, workers, batch_size=4))
    message = str(caught.value)
    assert message.startswith(f"'class1/05.png' of '{folder}': ") and message.endswith(". Remove or replace it")
    assert "Traceback" not in message and "\n" not in message and "bytes'" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_named_together(folder, workers):
    broken = [f"class{label}/{index:02}.png" for label in (0, 2) for index in range(6)]
    for file in broken:
        (folder / file).write_bytes(b"")
    source = open_dataset(str(folder))
    training = TrainImages(source, SETTINGS, 0, 0.5, 0.5)
    with pytest.raises(ImageError) as caught:
        list(load_batches(training, workers, batch_sampler=[[3, 20]]))
    first, *lines = str(caught.value).splitlines()
    assert first == f"12 of 36 images of '{folder}' cannot be read. Remove or replace them:"
    assert len(lines) == 11 and lines[10] == "  and 2 more"
    for line, file in zip(lines, broken[:10], strict=False):
        assert line.startswith(f"  '{file}' of '{folder}': ") and line.endswith("is empty")
    with pytest.raises(ImageError, match="2 of 3 images"):  # of the images that were asked for
        list(load_batches(EvalImages(source, np.array([0, 1, 20]), SETTINGS), workers, batch_size=2))


def test_a_file_that_is_gone_is_named(folder):
    source, tar = open_dataset(str(folder)), open_dataset(str(as_tar(folder)))
    (folder / "class0" / "00.png").unlink()
    folder.with_suffix(".tar").write_bytes(b"")
    for images, name in ((source, folder), (tar, folder.with_suffix(".tar"))):
        with pytest.raises(ImageError, match=f"^'class0/00.png' of '{name}': "):
            images.image(0)
