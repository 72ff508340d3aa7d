"""Which files are images, in which order, and of which class: the same for a folder, a .tar file and every command."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import write_folder

from ssod_edge.data.inputs import list_images
from ssod_edge.data.layout import left_out, sort_key
from ssod_edge.data.sources import model_labels, open_dataset
from ssod_edge.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures", classes=2, per_class=10)


def pack(folder: Path, top: str = "") -> Path:
    """All of a folder as a .tar file, links as links, below a folder `top`."""
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*")):
            tar.add(file, Path(top) / file.relative_to(folder), recursive=False)
    return path


def test_the_order_is_the_same_in_every_process(folder: Path) -> None:
    for index, name in enumerate(("a", "B", "b", "1", "01", "A")):
        (folder / name).mkdir()
        (folder / name / "x.png").write_bytes((folder / "class0" / f"0{index}.png").read_bytes())
    code = (
        f"from ssod_edge.data.sources import open_dataset as o; d = o({str(folder)!r}); print(d.classes, d.fingerprint)"
    )
    shown = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in range(4)
    }  # fmt: skip
    assert len(shown) == 1
    assert open_dataset(str(folder)).classes == ("01", "1", "A", "a", "B", "b", "class0", "class1")


def test_numbers_count_by_their_value_and_superscripts_are_letters() -> None:
    assert sorted(["a10", "a9", "\u00b2", "2", "A9"], key=sort_key) == ["2", "A9", "a9", "a10", "\u00b2"]


@pytest.mark.parametrize("as_tar", [False, True])
def test_a_folder_below_a_class_is_no_class(folder: Path, as_tar: bool) -> None:
    for label in ("class0", "class1"):
        (folder / label / "indoor").mkdir()
        (folder / label / "00.png").rename(folder / label / "indoor" / "00.png")
    with pytest.raises(UsageError, match="'class0/indoor/00.png' of .* is in a folder below its class folder"):
        open_dataset(str(pack(folder) if as_tar else folder))


def test_a_tar_may_have_one_folder_around_all_of_it(folder: Path) -> None:
    plain = open_dataset(str(folder))
    inside = open_dataset(str(pack(folder, "download/pictures")))
    assert inside.classes == plain.classes and inside.labels.tolist() == plain.labels.tolist()
    (folder / "class1").rename(folder.parent / "away")
    assert open_dataset(str(pack(folder, "download"))).classes == ("class0",)


def test_links_stand_for_what_they_lead_to(folder: Path) -> None:
    before = open_dataset(str(folder))
    (folder / "class1" / "00.png").rename(folder / "class1" / "real.png")
    (folder / "class1" / "00.png").symlink_to("real.png")
    os.link(folder / "class0" / "01.png", folder / "class0" / "hard.png")
    (folder / "class2").symlink_to("class0")
    plain, tar = open_dataset(str(folder)), open_dataset(str(pack(folder)))
    assert tar.classes == plain.classes == ("class0", "class1", "class2")
    assert np.bincount(tar.labels).tolist() == np.bincount(plain.labels).tolist() == [11, 11, 11]
    for index in range(33):
        assert np.array_equal(np.asarray(tar.image(index)), np.asarray(plain.image(index)))
    assert len(before) == 20
    # predict and calibrate see the same images of a folder as train.
    assert len(list_images([str(folder)])) == 33


def test_a_link_that_leads_up_is_not_followed_for_ever(folder: Path) -> None:
    (folder / "class0" / "up").symlink_to("..")
    assert len(list_images([str(folder)])) == 20 and len(open_dataset(str(folder))) == 20


@pytest.mark.parametrize(("target", "reason"), [("../../elsewhere.png", "does not hold"), ("a.png", "back to itself")])
def test_a_link_in_a_tar_that_leads_nowhere_is_named(folder: Path, target: str, reason: str) -> None:
    (folder / "class0" / "a.png").symlink_to(target)
    with pytest.raises(UsageError, match=f"'class0/a.png' in .* is a link .*{reason}"):
        open_dataset(str(pack(folder)))


def test_a_member_that_was_packed_twice_counts_once(folder: Path) -> None:
    path = pack(folder)
    other = (folder / "class1" / "05.png").read_bytes()
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("class0/00.png")
        info.size = len(other)
        tar.addfile(info, io.BytesIO(other))
    source = open_dataset(str(path))
    assert len(source) == 20
    assert np.array_equal(np.asarray(source.image(0)), np.asarray(open_dataset(str(folder)).image(15)))


@pytest.mark.parametrize("as_tar", [False, True])
def test_what_systems_leave_is_no_class_and_no_image(folder: Path, as_tar: bool) -> None:
    plain = open_dataset(str(folder))
    for name in ("@eaDir", "__MACOSX/class0", "class1/@eaDir", "$RECYCLE.BIN"):
        (folder / name).mkdir(parents=True)
        (folder / name / "00.png").write_bytes(b"a thumbnail")
    for name in (".DS_Store", "class0/._00.txt", "class1/Thumbs.db", "class0/desktop.ini"):
        (folder / name).write_bytes(b"notes")
    (folder / "lost+found").mkdir()
    source = open_dataset(str(pack(folder) if as_tar else folder))
    assert (source.classes, source.fingerprint, source.left_out) == (plain.classes, plain.fingerprint, "")
    assert len(list_images([str(folder)])) == 20


@pytest.mark.parametrize("as_tar", [False, True])
def test_files_that_are_no_images_are_counted_by_their_suffixes(folder: Path, tmp_path: Path, as_tar: bool) -> None:
    for name in ("notes.txt", "class0/a.TXT", "class1/b.svg", "class1/c"):
        (folder / name).write_bytes(b"no image")
    os.mkfifo(folder / "pipe.txt")
    source = open_dataset(str(pack(folder) if as_tar else folder))
    assert source.left_out == "left out: 4 files that are no images (.svg, .txt, no suffix)"
    (tmp_path / "list.txt").write_text("class1\n")
    assert open_dataset(f"{source.name}@{tmp_path / 'list.txt'}").left_out == source.left_out


def test_of_many_suffixes_five_are_named() -> None:
    assert left_out([]) == ""
    assert left_out(["a/b.raw"]) == "left out: 1 file that is no image (.raw)"
    assert left_out([f"x.{letter}" for letter in "fedcba"]) == (
        "left out: 6 files that are no images (.a, .b, .c, .d, .e, ...)"
    )
    assert "\n" not in left_out(["a.b\nc"])


def test_a_byte_order_mark_is_no_part_of_a_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("class1\n", encoding="utf-8-sig")
    assert open_dataset(f"{folder}@{tmp_path / 'some.txt'}").classes == ("class1",)
    assert list_images(["-"], ["\ufeffa.png\n", "b.png\n"]) == ["a.png", "b.png"]


def test_names_that_look_alike_are_one_name(folder: Path, tmp_path: Path) -> None:
    one, other = "caf\u00e9", "cafe\u0301"
    (folder / "class0").rename(folder / one)
    (tmp_path / "some.txt").write_text(f"{other}\n", encoding="utf-8")
    assert open_dataset(f"{folder}@{tmp_path / 'some.txt'}").classes == (one,)
    assert model_labels(np.array([0]), (other,), ("class1", one)).tolist() == [1]
    (folder / other).mkdir()
    (folder / other / "x.png").write_bytes((folder / one / "00.png").read_bytes())
    with pytest.raises(UsageError, match="two classes whose names look alike"):
        open_dataset(str(folder))
