"""`eval --mistakes`: the misread images, by name; whole or not at all, and never over anything."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ssod_edge.cli import main
from ssod_edge.data.pixels import Picture
from ssod_edge.data.sources import open_dataset
from ssod_edge.errors import ImageError, UsageError
from ssod_edge.evaluation.mistakes import TABLE, save_mistakes


def mistake(index: int = 0, **more: Any) -> dict[str, Any]:
    usual = {
        "index": index, "image": f"cat/{index}.jpg", "label": "cat", "class_name": "dog", "confidence": 0.974,
        "label_confidence": 0.02, "ood_score": -1.5, "p_known": 0.3, "known": True,
    }  # fmt: skip
    return usual | more


class Stored:
    """Stands for a source: files, and an image that is none."""

    def __init__(self, *contents: tuple[str, bytes | Image.Image]) -> None:
        self.contents = contents

    def picture(self, index: int) -> Picture:
        name, content = self.contents[index]
        if content == b"":
            raise ImageError(f"'{name}': no such file")
        return Picture(content, name)

    def source(self, index: int) -> str:
        return self.contents[index][0]


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def test_the_command_copies_what_was_misread(small_run: Path, tmp_path: Path) -> None:
    data = small_run.parent / "data"
    arguments = ["eval", str(small_run), "--id", str(data), "--shift-images", "0", "--bootstrap", "0"]
    arguments += ["--json", str(tmp_path / "e.json"), "--png", str(tmp_path / "e.png")]
    done = CliRunner().invoke(main, [*arguments, "--mistakes", str(tmp_path / "wrong")], catch_exceptions=False)
    assert done.exit_code == 0 and str(tmp_path / "wrong") in done.stderr
    rows = read(tmp_path / "wrong" / TABLE)
    assert sorted([TABLE, *(row["file"] for row in rows)]) == sorted(os.listdir(tmp_path / "wrong"))
    assert len(rows) > 10 and [row["file"] for row in rows] == sorted(row["file"] for row in rows)
    confidences = [float(row["confidence"]) for row in rows]
    assert confidences == sorted(confidences, reverse=True)
    for row in rows:
        assert (tmp_path / "wrong" / row["file"]).read_bytes() == (data / row["image"]).read_bytes()
        assert f"_{row['label']}_as_{row['class_name']}_{100 * float(row['confidence']):.0f}_" in row["file"]
        assert row["image"].startswith(f"{row['label']}/") and row["label"] != row["class_name"]
    before = sorted(os.listdir(tmp_path / "wrong"))
    again = CliRunner().invoke(main, [*arguments, "--mistakes", str(tmp_path / "wrong")])
    assert again.exit_code == 2 and "is not empty" in again.stderr and "Known classes" not in again.stdout
    assert sorted(os.listdir(tmp_path / "wrong")) == before


def test_names_make_no_paths_and_no_formulas(tmp_path: Path) -> None:
    names = ("../../=x.png", "\u05d7\u05ea\u05d5\u05dc/1.JPG", "data[3]")
    source: Any = Stored((names[0], b"one"), (names[1], b"two"), (names[2], Image.new("RGB", (4, 4), "red")))
    rows = [
        mistake(0, image=names[0], label="../up", class_name="=cmd|' /C calc'!A0"),
        mistake(1, image=names[1], label="\u05d7\u05ea\u05d5\u05dc", class_name="<b>"),
        mistake(2, image=names[2], label="x" * 300),
    ]
    folder = save_mistakes(tmp_path / "a" / "wrong", rows, (source, np.arange(3)))
    files = sorted(os.listdir(folder))
    assert files[:2] == [
        "0001__._up_as_=cmd|' _C calc'!A0_97_=x.png",
        "0002_\u05d7\u05ea\u05d5\u05dc_as_<b>_97_1.jpg",
    ]
    assert (folder / files[0]).read_bytes() == b"one" and os.listdir(tmp_path) == ["a"]
    with Image.open(folder / files[2]) as image:
        assert image.size == (4, 4) and files[2].endswith("_as_dog_97_data[3].png")
    found = read(folder / TABLE)
    assert [row["class_name"] for row in found] == ["'=cmd|' /C calc'!A0", "<b>", "dog"]
    assert found[1]["label"] == "\u05d7\u05ea\u05d5\u05dc" and found[1]["p_known"] == "0.3"


def test_an_image_that_is_gone_leaves_nothing(tmp_path: Path) -> None:
    source: Any = Stored(("a.png", b"one"), ("b.png", b""))
    with pytest.raises(ImageError, match=r"'b\.png'"):
        save_mistakes(tmp_path / "wrong", [mistake(0), mistake(1)], (source, np.arange(2)))
    assert not os.listdir(tmp_path)


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "wrong").mkdir()
    source: Any = Stored()
    assert os.listdir(save_mistakes(tmp_path / "wrong", [], (source, np.arange(0)))) == [TABLE]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        save_mistakes(tmp_path / "file", [], (source, np.arange(0)))
    assert (tmp_path / "file").read_text() == "mine"


def test_pictures_of_the_demo_come_as_png(tmp_path: Path) -> None:
    source = open_dataset("demo:near")
    folder = save_mistakes(tmp_path / "wrong", [mistake(5)], (source, np.arange(10)))
    (name,) = [name for name in os.listdir(folder) if name != TABLE]
    with Image.open(folder / name) as image:
        assert image.format == "PNG"
