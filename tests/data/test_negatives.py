"""Images of what must be unknown: what is left out of them, how they are split, and how they are found again."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import write_folder
from PIL import Image

from ssod_edge.config import Preprocess
from ssod_edge.data.negatives import PARTS, Negatives, WithNegatives, open_negatives, read_negatives
from ssod_edge.data.sources import ImageSource, open_dataset
from ssod_edge.errors import UsageError
from ssod_edge.files import write_json

SETTINGS = Preprocess(input_size=16)


@pytest.fixture
def known(tmp_path: Path) -> ImageSource:
    return open_dataset(str(write_folder(tmp_path / "known", per_class=8, size=16)))


def write_negatives(folder: Path, belt: int = 40, hand: int = 10) -> Path:
    for name, count in (("belt", belt), ("hand", hand)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng((count, index)).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"video{index // 3}_{index:02}.png")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 images of one kind and 10 of another."""
    return write_negatives(tmp_path / "negatives")


def opened(
    folder: Path | str, known: ImageSource, say: Callable[[str], None] = lambda line: None, **more: object
) -> Negatives:
    given: dict[str, object] = {"group": None, "seed": 0} | more
    return open_negatives(str(folder), known, SETTINGS, say=say, **given)  # type: ignore[arg-type]


def names(negatives: Negatives, part: str) -> list[str]:
    return [negatives.source.source(int(index)) for index in negatives.parts[part]]


def as_form(folder: Path, form: str) -> str:
    files = sorted(folder.rglob("*.png"))
    if form == "tar":
        with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
            for file in files:
                tar.add(file, file.relative_to(folder))
        return str(folder.with_suffix(".tar"))
    if form == "csv":
        folder.with_suffix(".csv").write_text("path\n" + "".join(f"{file}\n" for file in files))
        return str(folder.with_suffix(".csv"))
    if form == "flat":
        flat = folder.with_name("flat")
        flat.mkdir()
        for index, file in enumerate(files):
            shutil.copy(file, flat / f"{index:02}.png")
        return str(flat)
    if form == "list":
        folder.with_suffix(".txt").write_text("belt\n")
        return f"{folder}@{folder.with_suffix('.txt')}"
    return str(folder)


@pytest.mark.parametrize("form", ["folder", "flat", "tar", "csv", "list"])
def test_every_form_of_data_is_split_in_three(folder: Path, known: ImageSource, form: str) -> None:
    n = 40 if form == "list" else 50
    negatives = opened(as_form(folder, form), known)
    sizes = [len(negatives.parts[part]) for part in PARTS]
    assert sizes == [3 * n // 5, n // 5, n // 5] and f"{n} negatives of" in str(negatives)
    assert sorted(np.concatenate([*negatives.parts.values()])) == list(range(n)) == list(range(len(negatives.source)))
    images, _ = negatives.subset("choice").read(SETTINGS, negatives.parts["choice"])
    assert len(images) == n // 5


def test_parts_are_seeded_and_have_as_much_of_every_class(folder: Path, known: ImageSource) -> None:
    one, same, other = (opened(folder, known, seed=seed) for seed in (0, 0, 1))
    assert one.record == same.record and one.hash != other.hash
    for part, share in zip(PARTS, (6, 2, 2), strict=True):
        assert sum("hand" in name for name in names(one, part)) == share


def test_images_of_a_group_come_into_one_part(folder: Path, known: ImageSource) -> None:
    negatives = opened(folder, known, group=r"\w+/video\d+")
    sides = [{name.split("_")[0] for name in names(negatives, part)} for part in PARTS]
    assert all(sides) and not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    single = opened(folder, known, group=r"lorry")
    assert single.record == opened(folder, known).record
    with pytest.raises(UsageError, match="too few groups to be divided in three"):
        opened(folder, known, group=r"video")


def test_known_images_copies_and_what_cannot_be_read_are_left_out(folder: Path, known: ImageSource) -> None:
    shutil.copy(Path(known.name) / "class0" / "00.png", folder / "belt" / "known.png")
    shutil.copy(folder / "belt" / "video0_00.png", folder / "hand" / "copy.png")
    for index in range(2):
        (folder / "hand" / f"broken{index}.png").write_bytes(b"no image")
    (folder / "hand" / "notes.txt").write_text("no image")
    said: list[str] = []
    negatives = opened(folder, known, said.append)
    assert len(negatives.source) == 50 and said[0] == "negatives: left out: 1 file that is no image (.txt)"
    assert "left out: 1 known, 1 duplicate, 2 unreadable ('hand/broken0.png' of" in said[1]
    found = {name for part in PARTS for name in names(negatives, part)}
    assert len(found) == 50 and not [name for name in found if "known" in name or "broken" in name or "copy" in name]


def test_what_cannot_be_used_is_refused_with_the_way_out(tmp_path: Path, known: ImageSource) -> None:
    with pytest.raises(UsageError, match=r"--negatives: data set '.*/none' does not exist"):
        opened(tmp_path / "none", known)
    with pytest.raises(UsageError, match=r"24 of the 24 images of --negatives .* are known. Name images of other"):
        opened(known.name, known)
    few = write_negatives(tmp_path / "few", belt=8, hand=1)
    (few / "hand" / "broken.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"at least 10 negatives, .* has 9, without 1 unreadable .* Add some"):
        opened(few, known)
    for file in few.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"has 0, without 10 unreadable"):
        opened(few, known)


def test_a_class_that_is_known_too_is_said(folder: Path, known: ImageSource) -> None:
    (folder / "hand").rename(folder / "class1")
    said: list[str] = []
    opened(folder, known, said.append)
    assert len(said) == 1 and "bear the name of a known class ('class1')" in said[0]


def test_they_are_found_again_as_they_were_split(folder: Path, known: ImageSource, tmp_path: Path) -> None:
    shutil.copy(Path(known.name) / "class0" / "00.png", folder / "belt" / "known.png")
    negatives = opened(folder, known)
    parts = {part: found.tolist() for part, found in negatives.listed.items()}
    write_json(tmp_path / "splits.json", {"negatives_parts": parts})
    shutil.rmtree(known.name)  # nothing of it is read again
    again = read_negatives(tmp_path, negatives.record, "fix it")
    assert again is not None and again.record == negatives.record
    assert all(names(again, part) == names(negatives, part) for part in PARTS)
    assert read_negatives(tmp_path, {"data": "photos"}, "fix it") is None


def test_what_moved_or_changed_is_said(folder: Path, known: ImageSource, tmp_path: Path) -> None:
    meta = opened(folder, known).record
    parts = {part: found.tolist() for part, found in opened(folder, known).listed.items()}
    with pytest.raises(UsageError, match=r"has no readable splits.json .*; fix it"):
        read_negatives(tmp_path, meta, "fix it")
    write_json(tmp_path / "splits.json", {"negatives_parts": {**parts, "train": parts["train"][1:]}})
    with pytest.raises(UsageError, match="was changed after training"):
        read_negatives(tmp_path, meta, "fix it")
    write_json(tmp_path / "splits.json", {"negatives_parts": {**parts, "train": [*parts["train"], 99]}})
    with pytest.raises(UsageError, match="was changed after training"):
        read_negatives(tmp_path, meta, "fix it")
    (folder / "belt" / "video0_00.png").rename(folder / "belt" / "other.png")
    with pytest.raises(UsageError, match="the negatives '.*' changed since training; fix it"):
        read_negatives(tmp_path, meta, "fix it")
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match=r"does not exist.* path of the negatives .* go there, or fix it"):
        read_negatives(tmp_path, meta, "fix it")


def test_behind_the_known_images_come_negatives_without_a_label(folder: Path, known: ImageSource) -> None:
    negatives = opened(folder, known)
    both = WithNegatives(known, negatives)
    assert len(both) == 24 + 50 and (both.labels[24:] == -1).all() and (both.labels[:24] == known.labels).all()
    assert both.picture(23).sha256 == known.picture(23).sha256 and both.source(23) == known.source(23)
    assert both.picture(24).sha256 == negatives.source.picture(0).sha256
    assert both.source(73) == negatives.source.source(49) and both.classes == known.classes
