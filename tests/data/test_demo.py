"""The embedded data set: who owns what, that nothing is shared, and that an index is the same image for ever."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the demo data set needs scikit-learn (extra 'train')")

from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from ssod_edge.data.demo import (
    CLASSES,
    ID_SPLITS,
    IMAGE_SIZE,
    OOD_SPLITS,
    SHAPES,
    SPLIT_SIZES,
    DemoSet,
    digit_instances,
    photo_tiles,
    write_demo_images,
)
from ssod_edge.errors import OutputError, UsageError


def pixels(split: str, index: int) -> np.ndarray:
    return np.asarray(DemoSet(split).image(index))


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_sizes_labels_and_sources(split: str) -> None:
    demo = DemoSet(split)
    assert len(demo) == SPLIT_SIZES[split] == len(demo.labels)
    assert demo.labels.dtype == np.int64
    assert demo.classes == CLASSES
    assert not demo.hflip_ok
    for index in (0, 1, 37, len(demo) - 1):
        image = demo.image(index)
        assert (image.mode, image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))
        assert demo.source(index).startswith(f"demo:{split}/{index:05d}-")
    if split in ID_SPLITS:
        assert np.bincount(demo.labels).tolist() == [len(demo) // 8] * 8
    else:
        assert (demo.labels == -1).all()


def test_the_label_is_the_digit_in_the_image() -> None:
    targets = load_digits().target
    for split in ID_SPLITS:
        demo = DemoSet(split)
        for index in range(0, len(demo), 13):
            drawing = demo.drawing(index)
            assert targets[drawing.instance] == demo.labels[index]
            assert demo.classes[demo.labels[index]] == drawing.what.removeprefix("digit-")
    near = DemoSet("near")
    assert {int(targets[near.drawing(index).instance]) for index in range(len(near))} == {8, 9}


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_an_index_is_the_same_image_in_any_order(split: str) -> None:
    first, second = DemoSet(split), DemoSet(split)
    order = [5, 0, 17, 5, 499, 1]
    forward = {index: first.image(index).tobytes() for index in order}
    for index in reversed(order):
        assert second.image(index).tobytes() == forward[index]
    assert len(set(forward.values())) == len(forward)


def test_another_process_draws_the_same_pixels() -> None:
    code = (
        "import hashlib; from ssod_edge.data.demo import DemoSet, SPLIT_SIZES\n"
        "data = b''.join(DemoSet(s).image(i).tobytes() for s in SPLIT_SIZES for i in (9, 2))\n"
        "print(hashlib.sha256(data).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1


def test_a_split_has_a_fingerprint_of_its_own_and_shows_every_digit_that_it_owns() -> None:
    demo = DemoSet("test")
    assert demo.fingerprint == DemoSet("test").fingerprint
    assert len({DemoSet(split).fingerprint for split in SPLIT_SIZES}) == len(SPLIT_SIZES)
    used = {demo.drawing(index).instance for index in range(len(demo))}
    assert used == {row for digit in range(8) for row in digit_instances("test", digit)}


def test_no_digit_instance_is_in_two_splits() -> None:
    rows = load_digits()
    owned = {split: {row for digit in range(10) for row in digit_instances(split, digit)} for split in SPLIT_SIZES}
    for first, second in combinations(owned, 2):
        assert not owned[first] & owned[second], (first, second)
    assert set().union(*owned.values()) == set(range(len(rows.target)))
    # Two rows that hold the same pixels would be one instance in two places.
    digests = {split: {rows.images[row].tobytes() for row in owned[split]} for split in SPLIT_SIZES}
    for first, second in combinations(digests, 2):
        assert not digests[first] & digests[second], (first, second)


def test_what_is_drawn_comes_from_what_the_split_owns() -> None:
    for split in ("train", "val", "calib", "test", "near", "photos"):
        demo = DemoSet(split)
        tiles = {(tile.photo, tile.box) for tile in photo_tiles(split if split in ID_SPLITS else "test")}
        for index in range(0, len(demo), 7):
            drawing = demo.drawing(index)
            assert drawing.tile is not None
            assert (drawing.tile.photo, drawing.tile.box) in tiles
            if split != "photos":
                assert drawing.instance in digit_instances(split, int(drawing.what[-1]))


def test_no_pixel_of_the_photographs_is_in_two_splits() -> None:
    for photo in ("china.jpg", "flower.jpg"):
        source = load_sample_image(photo)
        owners = np.zeros(source.shape[:2], int)
        for split in ID_SPLITS:
            for tile in photo_tiles(split):
                if tile.photo == photo:
                    left, top, right, bottom = tile.box
                    owners[top:bottom, left:right] += 1
                    assert np.array_equal(np.asarray(tile.image), source[top:bottom, left:right])
        assert (owners == 1).all()


def test_a_background_reads_nothing_outside_its_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank every tile of the other splits: the images stay as they were."""
    import ssod_edge.data.demo as module

    before = {split: [DemoSet(split).image(index).tobytes() for index in range(40)] for split in ID_SPLITS}
    for split in ID_SPLITS:
        blanked = {photo: np.zeros_like(load_sample_image(photo)) for photo in ("china.jpg", "flower.jpg")}
        for tile in photo_tiles(split):
            left, top, right, bottom = tile.box
            blanked[tile.photo][top:bottom, left:right] = np.asarray(tile.image)
        own = {photo: Image.fromarray(array) for photo, array in blanked.items()}
        with monkeypatch.context() as patch:
            patch.setattr(module, "_photo", own.__getitem__)
            module.photo_tiles.cache_clear()
            assert [DemoSet(split).image(index).tobytes() for index in range(40)] == before[split]
        module.photo_tiles.cache_clear()


def test_far_sets_show_no_digit() -> None:
    """No instance is drawn, and a photo's pixels are those of its tile: removing the ink changes nothing."""
    import ssod_edge.data.demo as module

    for split in ("photos", "shapes"):
        demo = DemoSet(split)
        assert all(demo.drawing(index).instance is None for index in range(len(demo)))
        before = [demo.image(index).tobytes() for index in range(64)]
        ink, _ = module._digits()
        saved = ink.copy()
        try:
            ink[:] = 255
            assert [demo.image(index).tobytes() for index in range(64)] == before
        finally:
            ink[:] = saved
    kinds = [DemoSet("shapes").drawing(index).what for index in range(16)]
    assert kinds == list(SHAPES) * 2


def test_a_digit_can_be_seen_and_is_whole() -> None:
    """Drawn twice, with and without ink: the difference is large, and lies inside the image."""
    import ssod_edge.data.demo as module

    ink, _ = module._digits()
    saved = ink.copy()
    demo = DemoSet("test")
    drawn = np.stack([np.asarray(demo.image(index), int) for index in range(200)])
    try:
        ink[:] = 0
        plain = np.stack([np.asarray(demo.image(index), int) for index in range(200)])
    finally:
        ink[:] = saved
    changed = np.abs(drawn - plain).max(axis=3) > 20
    rows, columns = changed.any(axis=2).sum(axis=1), changed.any(axis=1).sum(axis=1)
    assert rows.min() >= 16
    assert rows.max() <= 60
    assert columns.min() >= 4
    assert changed.mean(axis=(1, 2)).min() > 0.01
    # Places vary: the centre of the ink wanders over more than a third of the image.
    centres = [np.argwhere(mask).mean(axis=0) for mask in changed]
    assert (np.ptp(centres, axis=0) > IMAGE_SIZE / 3).all()


def test_drawing_is_fast_enough_to_be_done_every_epoch() -> None:
    for split in SPLIT_SIZES:
        demo = DemoSet(split)
        demo.image(0)
        times = []
        for first in range(0, 200, 50):
            start = time.process_time()
            for index in range(first, first + 50):
                demo.image(index)
            times.append((time.process_time() - start) / 50)
        assert min(times) < 3e-3, (split, times)  # about 0.3 ms; the rest is for slow machines


@pytest.mark.parametrize("index", [-1, 500, 10_000])
def test_an_index_outside_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=r"0 \.\. 499"):
        DemoSet("near").image(index)


@pytest.mark.parametrize("split", ["", "training", "digits", "shapes "])
def test_an_unknown_split_is_refused_with_the_known_ones(split: str) -> None:
    with pytest.raises(UsageError, match="train, val, calib, test, near, photos, shapes"):
        DemoSet(split)


def test_without_scikit_learn_the_message_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'ssod-edge\[train\]'"):
        DemoSet("train")


def test_torch_is_not_imported() -> None:
    code = "import sys, ssod_edge.data.demo as d; d.DemoSet('near').image(0); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_written_images_are_the_sets_own(tmp_path: Path) -> None:
    paths = write_demo_images(tmp_path / "new" / "folder")
    assert len(paths) == len({path.name for path in paths}) == 2 * (1 + len(OOD_SPLITS))
    assert sum(path.name.startswith("known-digit-") for path in paths) == 2
    assert sorted(paths) == sorted((tmp_path / "new" / "folder").iterdir())
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (IMAGE_SIZE, IMAGE_SIZE))
    with Image.open(paths[0]) as image:
        assert np.array_equal(np.asarray(image), pixels("test", 0))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        write_demo_images(tmp_path / "file")


def test_splits_look_alike() -> None:
    """A threshold set on "calib" must be worth something on "test": brightness and detail have to be close."""
    brightness, detail = {}, {}
    for split in ID_SPLITS:
        images = np.stack([pixels(split, index) for index in range(300)]).astype(float).mean(axis=3)
        brightness[split] = images.mean()
        detail[split] = np.abs(np.diff(images, axis=2)).mean()
    for values, spread in ((brightness, 0.25), (detail, 0.4)):
        ordered = sorted(values.values())
        assert ordered[-1] / ordered[0] < 1 + spread, values
