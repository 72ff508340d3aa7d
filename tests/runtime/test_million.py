"""`predict` on .tar files, in buckets and into Parquet: images that are no files here, and tables that go on."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result
from colour import paint

from ssod_edge.cli import main
from ssod_edge.data.listing import Listing
from ssod_edge.data.stored import Shard
from ssod_edge.names import Names
from ssod_edge.parquet_table import WAITING
from ssod_edge.runtime.written import COLUMNS


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, ["predict", *map(str, arguments)], input=stdin, catch_exceptions=False)


def verdicts(done: Result) -> dict[str, dict[str, object]]:
    return {line["image"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """a/0.png, b/1.png ... six pictures of three colours."""
    for number in range(6):
        paint(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", ("red", "blue", "grey")[number % 3])
    return tmp_path / "photos"


def pack(path: Path, photos: Path, compression: str = "") -> Path:
    with tarfile.open(path, f"w:{compression}") as tar:  # type: ignore[call-overload]
        for name in sorted(photos.rglob("*.png")):
            tar.add(name, f"./{name.relative_to(photos)}")
    return path


@pytest.fixture
def bucket(photos: Path) -> Iterator[str]:
    """The same in a bucket of this process, with a .tar file, a hidden file and one that is no image."""
    system = fsspec.filesystem("memory")
    for path in photos.rglob("*.png"):
        system.pipe(f"/bucket/photos/{path.relative_to(photos)}", path.read_bytes())
    system.pipe("/bucket/photos/notes.txt", b"x")
    system.pipe("/bucket/photos/.hidden.png", b"x")
    pack(photos.parent / "shard.tar", photos)
    system.pipe("/bucket/shards/0.tar", (photos.parent / "shard.tar").read_bytes())
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize(("name", "compression"), [("s.tar", ""), ("s.tar.gz", "gz"), ("s.TGZ", "gz")])
def test_the_images_of_a_tar_file_get_the_verdicts_of_files(
    export: Path, photos: Path, tmp_path: Path, name: str, compression: str
) -> None:
    shard = pack(tmp_path / name, photos, compression)
    files, members = verdicts(run(export, photos, "--json")), verdicts(run(export, shard, "--json"))
    assert len(files) == 6 and list(members) == [f"{shard}/{key[len(str(photos)) + 1 :]}" for key in files]
    for one, other in zip(files.values(), members.values(), strict=True):
        assert {**one, "image": 0} == {**other, "image": 0}


def test_a_tar_file_of_jpeg_files_is_no_video(export: Path, tmp_path: Path) -> None:
    for number in range(4):
        paint(tmp_path / "photos" / f"{number}.jpg", "red")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "photos", "photos")
    assert [Path(name).name for name in verdicts(run(export, tmp_path / "s.tar", "--json"))] == [
        f"{number}.jpg" for number in range(4)
    ]


def test_files_and_tar_files_in_the_order_in_which_they_are_named(export: Path, photos: Path, tmp_path: Path) -> None:
    shard = pack(tmp_path / "s.tar", photos)
    done = run(export, "-", "--json", stdin=f"{photos}/a/0.png\n{shard}\n{photos}/b/1.png\n")
    assert done.exit_code == 0
    assert [Path(name).name for name in verdicts(done)] == ["0.png", *(f"{n}.png" for n in (0, 2, 4, 1, 3, 5)), "1.png"]


def damaged(data: bytes, how: str) -> bytes:
    if how == "cut":
        return data[: data.index(b"b/3.png") + 700]
    if how == "header":
        return data.replace(b"b/1.png", b"b\xff1.png", 1)
    return b"no archive"


@pytest.mark.parametrize(("how", "images"), [("cut", 4), ("header", 3), ("none", 0)])
def test_a_damaged_tar_file_costs_no_other_image(
    export: Path, photos: Path, tmp_path: Path, how: str, images: int
) -> None:
    good, bad = pack(tmp_path / "good.tar", photos), tmp_path / "bad.tar"
    bad.write_bytes(damaged(good.read_bytes(), how))
    done = run(export, bad, good, "--json")
    found = verdicts(done)
    assert done.exit_code == 1
    errors = {name: line["error"] for name, line in found.items() if line["error"] is not None}
    assert str(bad) in errors and "Copy or pack it again" in str(errors[str(bad)])
    assert len(found) - len(errors) >= 6 + min(images, 3)
    assert all(found[f"{good}/{name}"]["error"] is None for name in ("a/0.png", "b/5.png"))


def test_the_row_of_a_damaged_tar_file_is_written_once(export: Path, photos: Path, tmp_path: Path) -> None:
    bad, table = pack(tmp_path / "bad.tar", photos), tmp_path / "out.csv"
    bad.write_bytes(damaged(bad.read_bytes(), "cut"))
    run(export, bad, "--csv", table, "--resume")
    rows = table.read_text()
    assert rows.count("Copy or pack it again") == 1
    assert run(export, bad, "--csv", table, "--resume").exit_code == 0 and table.read_text() == rows


def test_a_tar_file_without_images_and_one_that_is_not_there(export: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    found = verdicts(run(export, tmp_path / "empty.tar", tmp_path / "none.tar", "--json"))
    assert "it holds no images" in str(found[str(tmp_path / "empty.tar")]["error"])
    assert "there is no such file" in str(found[str(tmp_path / "none.tar")]["error"])


def test_a_link_in_a_tar_file_is_told(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        link = tarfile.TarInfo("a/9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        tar.addfile(link)
        tar.add(photos / "a" / "0.png", "a/0.png")
    first, second = Shard(str(tmp_path / "s.tar")).wanted(lambda _: True)
    with pytest.raises(Exception, match="it is a link"):
        first.read()
    assert second.read() == (photos / "a" / "0.png").read_bytes()


def test_a_folder_of_tar_files_is_told_how(export: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    pack(tmp_path / "shards" / "0.tar", photos)
    done = run(export, tmp_path / "shards")
    assert done.exit_code == 2 and "shards/*.tar'" in done.stderr
    assert len(verdicts(run(export, tmp_path / "shards" / "*.tar", "--json"))) == 6


def test_a_bucket(export: Path, photos: Path, bucket: str) -> None:
    files = verdicts(run(export, photos, "--json"))
    for argument in (f"{bucket}/photos", f"{bucket}/photos/", f"{bucket}/photos/*/*.png", f"{bucket}/photos/**/*.png"):
        found = verdicts(run(export, argument, "--json"))
        assert [name.partition("/photos/")[2] for name in found] == [name[len(str(photos)) + 1 :] for name in files]
        for one, other in zip(files.values(), found.values(), strict=True):
            assert {**one, "image": 0} == {**other, "image": 0}
    shard = verdicts(run(export, f"{bucket}/shards/*.tar", "--json"))
    assert len(shard) == 6 and f"{bucket.replace('://', ':///')}/shards/0.tar/a/0.png" in shard
    listed = run(export, "-", "--json", stdin=f"{bucket}/photos/a/0.png\n{bucket}/photos/none.png\n")
    assert listed.exit_code == 1 and len(verdicts(listed)) == 2


@pytest.mark.parametrize(
    ("address", "code", "message"),
    [
        ("memory://bucket/nothing/*.png", 2, "no image matches"),
        ("memory://bucket/none/", 1, "there is no such file"),
        ("oss://bucket/photos/", 3, "ossfs"),  # whose package is not installed
    ],
)
def test_a_bucket_that_holds_nothing(export: Path, bucket: str, address: str, code: int, message: str) -> None:
    done = run(export, address, "--json")
    assert done.exit_code == code and message in done.output


def test_images_elsewhere_are_sorted_and_collected(export: Path, photos: Path, bucket: str, tmp_path: Path) -> None:
    shard = pack(tmp_path / "s.tar", photos)
    for place, source in (("tar", str(shard)), ("bucket", f"{bucket}/photos")):
        done = run(export, source, "--sort-into", tmp_path / place, "--collect", tmp_path / f"{place}-kept")
        assert done.exit_code == 0
        copies = sorted(path for path in (tmp_path / place).rglob("*.png"))
        originals = sorted(path.read_bytes() for path in photos.rglob("*.png"))
        assert sorted(path.read_bytes() for path in copies) == originals
        kept = [path.read_bytes() for path in (tmp_path / f"{place}-kept").rglob("*.png")]
        assert kept and set(kept) <= set(originals)


def test_parquet_has_what_json_says(export: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "bad.png").write_bytes(b"x")
    odd = photos / os.fsdecode(b"\xff=.png")
    paint(tmp_path / "x.png", "red").rename(odd)
    table = tmp_path / "out.parquet"
    done = run(export, photos, "--parquet", table, "--json")
    assert done.exit_code == 1
    rows = pyarrow.parquet.read_table(table).to_pylist()
    lines = list(map(json.loads, done.stdout.splitlines()))
    assert list(rows[0]) == list(COLUMNS) and len(rows) == 8
    for row, line in zip(rows, lines, strict=True):
        assert row | {"image": 0} == line | {"image": 0}
    assert not Path(f"{table}{WAITING}").exists()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_killed_run_over_a_tar_file_goes_on(export: Path, tmp_path: Path, kind: str) -> None:
    photos = tmp_path / "photos"
    for number in range(40):
        paint(photos / f"{number:02d}.png", ("red", "blue", "grey")[number % 3])
    shard, table = pack(tmp_path / "s.tar", photos), tmp_path / f"out.{kind}"
    growing = table if kind == "csv" else Path(f"{table}{WAITING}")
    command = [
        sys.executable,
        "-m",
        "ssod_edge",
        "predict",
        str(export),
        str(shard),
        f"--{kind}",
        str(table),
        "--resume",
    ]
    with subprocess.Popen([*command, "--batch", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as it:
        deadline = time.monotonic() + 60
        while (not growing.exists() or growing.read_bytes().count(b"\n") < 4) and time.monotonic() < deadline:
            time.sleep(0.001)
        it.kill()
    kept = growing.read_bytes().count(b"\n") - 1
    done = run(export, shard, f"--{kind}", table, "--resume")
    assert done.exit_code == 0 and f"resuming: {kept} images have a row" in done.stderr
    assert f"{40 - kept} images:" in done.stdout
    if kind == "parquet":
        rows = pyarrow.parquet.read_table(table).to_pylist()
        assert len(rows) == 40 == len({row["image"] for row in rows}) and not growing.exists()
        pack(tmp_path / "t.tar", photos)  # a finished file is gone on with, too
        run(export, shard, tmp_path / "t.tar", "--parquet", table, "--resume")
        assert pyarrow.parquet.read_table(table).to_pylist()[:40] == rows
        assert pyarrow.parquet.read_metadata(table).num_rows == 80


def test_rows_that_wait_are_written_once(export: Path, photos: Path, tmp_path: Path) -> None:
    """A kill between the file and the end of the rows that waited."""
    table = tmp_path / "out.parquet"
    waiting = Path(f"{table}{WAITING}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssod_edge.csv_table.GrowingTable.remove", lambda _: None)
        assert run(export, photos, "--parquet", table, "--resume").exit_code == 0
    assert waiting.exists() and pyarrow.parquet.read_metadata(table).num_rows == 6
    done = run(export, photos, "--parquet", table, "--resume")
    assert "resuming: 6 images" in done.stderr and pyarrow.parquet.read_metadata(table).num_rows == 6


def test_a_parquet_file_of_others_is_left_alone(export: Path, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "out.parquet"
    table.write_bytes(b"PAR1 no")
    done = run(export, photos, "--parquet", table, "--resume")
    assert done.exit_code == 2 and "cannot be read as Parquet" in done.stderr and table.read_bytes() == b"PAR1 no"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), table)
    done = run(export, photos, "--parquet", table, "--resume")
    assert done.exit_code == 2 and "no table with these columns" in done.stderr
    assert run(export, photos, "--parquet", table, "--csv", tmp_path / "x.csv").exit_code == 2


def test_what_is_left_of_a_listing_is_told_by_bytes(photos: Path, tmp_path: Path) -> None:
    one, two = pack(tmp_path / "1.tar", photos), pack(tmp_path / "2.tar", photos)
    listing = Listing([str(one), "x.png", str(two)], is_done=lambda name: name.endswith("a/0.png"))
    assert listing.left() is None
    images = iter(listing)
    for _ in range(6):
        next(images)  # five of the first file, and x.png
    assert listing.left() == 1 + 12 - 1
    assert len(list(images)) == 5 and listing.left() == 11 and listing.skipped == 2


def test_a_set_of_names() -> None:
    names = Names(f"photo-{number}.jpg" for number in range(1000))
    assert len(names) == 1000 and "photo-7.jpg" in names and "photo-1000.jpg" not in names
    assert "x" not in Names() and len(Names(["a", "a"])) == 1
    assert os.fsdecode(b"\xff") in Names([os.fsdecode(b"\xff")])
