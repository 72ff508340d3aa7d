"""Tables of paths and labels as data sets."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import write_folder

from ssod_edge.data.sources import open_dataset
from ssod_edge.errors import MissingExtraError, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures", classes=2, per_class=3, size=8)


ROWS = "".join(f"pictures/class{c}/0{i}.png,{'cat' if c else 'dog'}\n" for c in range(2) for i in range(3))


def write(folder: Path, text: str, encoding: str = "utf-8") -> str:
    path = folder.parent / "photos.csv"
    path.write_text(text, encoding=encoding, newline="")
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "path,label\n" + ROWS,
        "\ufeffPath , LABEL\r\n" + ROWS.replace("\n", "\r\n"),
        "image;class\n" + ROWS.replace(",", ";"),
        "filename\tlabel\n" + ROWS.replace(",", "\t") + "\n\n",
        'file,class\n"' + ROWS.replace(",", '","').replace("\n", '"\n"').removesuffix('"'),
        "id,label,path\n" + "".join(f"7,{label},{path}\n" for path, label in (r.split(",") for r in ROWS.split())),
    ],
)
def test_forms_of_a_table(folder: Path, text: str) -> None:
    source = open_dataset(write(folder, text))
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert source.source(4) == "pictures/class1/01.png" and source.left_out == ""
    plain = open_dataset(str(folder))
    assert np.array_equal(np.asarray(source.image(4)), np.asarray(plain.image(4)))


def test_a_path_with_a_comma_stands_in_quotes(folder: Path) -> None:
    (folder / "class0" / "00.png").rename(folder / "class0" / 'a, "b".png')
    rows = ROWS.replace("pictures/class0/00.png", '"pictures/class0/a, ""b"".png"')
    assert open_dataset(write(folder, "path,label\n" + rows)).source(0) == 'pictures/class0/a, "b".png'
    with pytest.raises(
        UsageError, match=r"line 2 of .* has 3 fields, and the header 2. Put a text with a comma in quot"
    ):
        open_dataset(write(folder, "path,label\na, b.png,cat\n"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty. Expected a header"),
        ("path,label\n", "names no images. Expected a header"),
        (ROWS, "no column of paths; its first line is: pictures/class0/00.png, dog. Expected a header"),
        ("path\n" + ROWS.replace(",dog", "").replace(",cat", ""), "has no column of labels"),
        ("path,label\n" + ROWS.replace(",cat", ","), "3 images of .* have no label, 'pictures/class1/00.png' first"),
        ("path,label\n" + ROWS + ",cat\n", "line 8 of .* has no path"),
        ("path,label\n" + ROWS + "pictures/class0/01.png\n", "line 8 of .* has 1 fields"),
        ("path,label\n" + ROWS + "./pictures/class0/01.png,cat\n", r"line 8 .* again, after line 3"),
        ("path,label\n" + ROWS + "x.png,cat\ny.png,cat\n", "2 of 8 files .* do not exist, 'x.png' first .line 8"),
        ("path,label,path\n", "two columns 'path'"),
        ("path,label\n" + ROWS + '"pictures/x.png,cat\n', "line 8: unexpected end of data"),
        (
            "path,label,split\n" + ROWS.replace("\n", ",train\n") + "x.png,cat,later\n",
            "line 8 .*split must be .* 'later'",
        ),
        ("path,label,split\n" + ROWS.replace("\n", ",\n"), "line 2 .*split must be train, val or test, got ''"),
        ("path,label,split\n" + ROWS.replace("\n", ",val\n"), "has no images of 'train'; it has those of: val"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_the_line(folder: Path, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        open_dataset(write(folder, text))


def test_a_table_in_another_encoding_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="is not UTF-8 text .*Save it as CSV in UTF-8"):
        open_dataset(write(folder, "path,label\nä.png,cat\n", "latin-1"))


def test_labels_may_be_left_out_of_an_ood_set(folder: Path) -> None:
    data = write(folder, "path\n" + ROWS.replace(",dog", "").replace(",cat", ""))
    assert open_dataset(data, labelled=False).labels.tolist() == [-1] * 6


def test_parquet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs the package 'pyarrow'")
    import pyarrow.parquet as pq

    path = folder.parent / "photos.parquet"
    paths = [f"pictures/class{c}/0{i}.png" for c in range(2) for i in range(3)]
    pq.write_table(pa.table({"path": paths, "label": [10, 10, 10, 9, 9, 9], "group": ["a", None] * 3}), path)
    source = open_dataset(str(path))
    assert source.classes == ("9", "10") and source.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert source.group_names == ("a", "") * 3
    pq.write_table(pa.table({"image": [{"bytes": b"x"}], "label": ["a"]}), path)
    with pytest.raises(UsageError, match="holds no paths. Images in the table itself: hfds/"):
        open_dataset(str(path))
    path.write_bytes(b"no parquet")
    with pytest.raises(UsageError, match="cannot be read as parquet"):
        open_dataset(str(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match="needs the package 'pyarrow'.*pip install pyarrow"):
        open_dataset(str(path))
