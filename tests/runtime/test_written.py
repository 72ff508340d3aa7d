"""`predict --csv` and `--sort-into`: the same verdicts as a table, and copies that never overwrite anything."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from colour import COLOURS, edit_spec, paint

import ssod_edge
from ssod_edge.cli import main
from ssod_edge.csv_table import GrowingTable
from ssod_edge.files import copy_into
from ssod_edge.runtime.written import COLUMNS, file_part, folder_names

HEBREW = "\u05d0\u05d3\u05d5\u05dd"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """red/1.png, blue/1.png, grey/1.png: one name, three images."""
    for colour in ("red", "blue", "grey"):
        paint(tmp_path / "photos" / colour / "1.png", colour)
    return tmp_path / "photos"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["predict", *map(str, arguments)], catch_exceptions=False)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def rename(export: Path, *classes: str) -> None:
    edit_spec(export, lambda spec: replace(spec, classes=classes))


def test_the_table_has_what_python_gives(export: Path, photos: Path, tmp_path: Path) -> None:
    bad = photos / "bad.png"
    bad.write_bytes(b"\x89PNG")
    done = run(export, photos, "--csv", tmp_path / "out.csv")
    assert done.exit_code == 1 and "KNOWN" in done.stdout, "the usual output is there too"
    rows = read(tmp_path / "out.csv")
    assert list(rows[0]) == list(COLUMNS) and len(rows) == 4
    with ssod_edge.open(export) as model:
        found = list(model.predict_many([row["image"] for row in rows]))
    for row, verdict in zip(rows, found, strict=True):
        assert row == {key: "" if value is None else str(value) for key, value in verdict.to_dict().items()}
    assert rows[0]["error"].startswith(f"'{bad}'") and rows[1]["p_known"]


def test_the_table_goes_beside_json_lines_too(export: Path, photos: Path, tmp_path: Path) -> None:
    done = run(export, photos, "--json", "--csv", tmp_path / "out.csv")
    assert done.exit_code == 0 and done.stdout.count("\n") == 3 == len(read(tmp_path / "out.csv"))


def test_names_are_shown_as_they_are_and_are_no_formulas(
    export: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "=cmd|' /C calc'!A0"
    rename(export, hostile, f"[b]{HEBREW}[/b]", '<i>"blue",</i>')
    monkeypatch.chdir(photos)
    for name, colour in (("=1+1.png", "red"), ("-2.png", "green"), ("@.png", "blue")):
        paint(Path(name), colour)
    done = run(export, "=1+1.png", "--csv", "out.csv", "./-2.png", "@.png", "--json")
    assert done.exit_code == 0
    rows = read(Path("out.csv"))
    assert [row["class_name"] for row in rows] == [f"'{hostile}", f"[b]{HEBREW}[/b]", '<i>"blue",</i>']
    assert [row["image"] for row in rows] == ["./=1+1.png", "./-2.png", "./@.png"]
    assert all(Path(row["image"]).is_file() for row in rows)
    shown = run(export, "=1+1.png", "./-2.png", "@.png").stdout
    assert hostile in shown and f"[b]{HEBREW}[/b]" in shown and '<i>"blue",</i>' in shown


def test_copies_lie_by_verdict_and_names_that_clash_are_kept_apart(export: Path, photos: Path, tmp_path: Path) -> None:
    other = paint(photos / "more" / "1.png", "red", (41, 31))
    done = run(export, photos, "--sort-into", tmp_path / "out")
    assert done.exit_code == 0 and f"sorted into '{tmp_path / 'out'}': 1 blue, 2 red, 1 unknown" in done.stderr
    found = tree(tmp_path / "out")
    assert len(found) == 4 and {"blue/1.png", "red/1.png", "unknown/1.png"} < set(found)
    contents = {(tmp_path / "out" / name).read_bytes() for name in found if name.startswith("red/")}
    assert contents == {(photos / "red" / "1.png").read_bytes(), other.read_bytes()}
    assert tree(photos) == ["blue/1.png", "grey/1.png", "more/1.png", "red/1.png"], "these are copies"
    again = run(export, photos, "--sort-into", tmp_path / "out")
    assert again.exit_code == 0 and tree(tmp_path / "out") == found, "the same images are there already"


def test_nothing_is_overwritten(export: Path, photos: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "red" / "1.png"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert run(export, photos / "red", "--sort-into", tmp_path / "out").exit_code == 0
    assert mine.read_text() == "mine" and len(tree(tmp_path / "out")) == 2


def test_a_copy_is_of_its_own(export: Path, photos: Path, tmp_path: Path) -> None:
    run(export, photos / "red", "--sort-into", tmp_path / "out")
    copy = tmp_path / "out" / "red" / "1.png"
    assert copy.stat().st_ino != (photos / "red" / "1.png").stat().st_ino and copy.stat().st_nlink == 1


def test_a_class_that_is_called_unknown_has_a_folder_of_its_own(export: Path, photos: Path, tmp_path: Path) -> None:
    rename(export, "Unknown", "unknown", "../up")
    assert run(export, photos, "--sort-into", tmp_path / "out").exit_code == 0
    names = folder_names(("Unknown", "unknown", "../up"), ("unknown",))
    assert len({*names.values(), "unknown"}) == 4 and "/" not in "".join(names.values())
    assert tree(tmp_path / "out") == sorted(f"{n}/1.png" for n in ("unknown", names["Unknown"], names["../up"]))


@pytest.mark.parametrize(
    ("name", "part"),
    [("a/b", "a_b"), ("..", "_."), (".hidden", "_hidden"), ("", "_"), ("x\x00\n", "x__"), (HEBREW, HEBREW)],
)
def test_a_name_becomes_a_part_of_a_file_name(name: str, part: str) -> None:
    assert file_part(name) == part


def test_a_part_of_a_file_name_has_an_end() -> None:
    assert len(file_part("\u05d0" * 300).encode()) == 100


def test_what_cannot_be_copied_is_said_and_stops_nothing(
    export: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "blue").mkdir(parents=True)
    (tmp_path / "out" / "blue" / "1.png").symlink_to("nowhere")
    done = run(export, photos, "--sort-into", tmp_path / "out", "--json")
    assert done.exit_code == 1 and done.stdout.count("\n") == 3
    assert f"error: '{photos}/blue/1.png' is not copied to '{tmp_path}/out/blue'" in done.stderr
    assert "1 red, 1 unknown" in done.stderr


def test_a_copy_appears_whole_also_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    source = tmp_path / "a.bin"
    source.write_bytes(os.urandom(1000))
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("ssod_edge.files.os.link", refuse)
    assert copy_into(source, tmp_path / "out").read_bytes() == source.read_bytes()
    monkeypatch.setattr("ssod_edge.files.shutil.copy2", refuse)
    source.write_bytes(b"other")
    with pytest.raises(OSError, match="not permitted"):
        copy_into(source, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["a.bin"]


def test_without_a_threshold_an_image_goes_to_its_class(
    make_export: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    model = make_export(tmp_path / "export", trained=False)
    assert run(model, photos, "--allow-untrained", "--sort-into", tmp_path / "out").exit_code == 0
    assert "unknown" not in os.listdir(tmp_path / "out") and len(tree(tmp_path / "out")) == 3


def test_a_place_that_cannot_be_written_is_found_first(export: Path, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for option in ("--sort-into", "--csv"):
        done = run(export, photos, option, file / "below")
        assert done.exit_code != 0 and not done.stdout and "file" in done.stderr


def test_frames_are_not_sorted(export: Path, tmp_path: Path) -> None:
    done = run(export, "video.mp4", "--sort-into", tmp_path / "out")
    assert done.exit_code == 2 and "--sort-into belongs to images" in done.stderr and not (tmp_path / "out").exists()


def test_a_video_has_a_table_too(export: Path, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs the extra 'video'")
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 25, (40, 30))
    for colour in ("red", "grey"):
        writer.write(np.full((30, 40, 3), COLOURS[colour][::-1], np.uint8))
    writer.release()
    done = run(export, tmp_path / "v.avi", "--csv", tmp_path / "out.csv")
    assert done.exit_code == 0 and "p known" in done.stdout
    rows = read(tmp_path / "out.csv")
    assert [(row["class_name"], row["known"], row["frame"]) for row in rows] == [
        ("red", "True", "0"),
        ("green", "False", "1"),
    ]
    assert "p known: of 100 new images" in done.stdout and all(row["p_known"] for row in rows)


# Going on with a table


def save(folder: Path, count: int) -> Path:
    """So many pictures."""
    for number in range(count):
        paint(folder / f"{number:03d}.png", ("red", "blue", "grey")[number % 3])
    return folder


def test_rows_that_are_done_are_not_done_again(export: Path, tmp_path: Path) -> None:
    photos, table = save(tmp_path / "photos", 5), tmp_path / "out.csv"
    first = run(export, photos / "000.png", photos / "003.png", "--csv", table, "--resume")
    assert first.exit_code == 0 and "000.png" not in first.stdout and "2 images: 2 known" in first.stdout
    before = table.read_bytes()
    done = run(export, photos, "--csv", table, "--resume", "--json")
    assert "resuming: 2 images have a row already" in done.stderr
    assert [json.loads(line)["image"][-7:] for line in done.stdout.splitlines()] == ["001.png", "002.png", "004.png"]
    assert table.read_bytes().startswith(before)
    assert sorted(row["image"][-7:] for row in read(table)) == [f"00{number}.png" for number in range(5)]
    again = run(export, photos, "--csv", table, "--resume")
    assert again.exit_code == 0 and "5 images" in again.stderr and again.stdout == ""
    whole = tmp_path / "whole.csv"
    run(export, photos, "--csv", whole)
    assert sorted(map(str, read(whole))) == sorted(map(str, read(table)))
    assert "5 images" in run(export, photos, "--csv", whole, "--resume").stderr, (
        "a table of an earlier run is gone on with"
    )


def test_a_kill_loses_no_row_and_half_a_row_is_made_anew(export: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b'a\n"b",\xff.png')  # quotes, a comma, a line break, no UTF-8
    photos, table = save(tmp_path / "photos", 40), tmp_path / "out.csv"
    paint(photos / "x.png", "red").rename(photos / odd)
    command = [sys.executable, "-m", "ssod_edge", "predict", str(export), str(photos), "--csv", str(table), "--resume"]
    slow = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    with subprocess.Popen(
        [*command, "--batch", "1"], env=slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as it:
        deadline = time.monotonic() + 60
        while (not table.exists() or table.read_bytes().count(b"\n") < 4) and time.monotonic() < deadline:
            time.sleep(0.001)
        it.kill()
    kept = read(table)
    assert len(kept) >= 3
    with open(table, "ab") as file:
        file.write(f'"{photos}/half'.encode())  # what a full disk leaves of a row, in quotes
    done = run(export, photos, "--csv", table, "--resume")
    assert done.exit_code == 0 and f"resuming: {len(kept)} images" in done.stderr
    rows = read(table)
    assert rows[: len(kept)] == kept and len(rows) == 41 == len({row["image"] for row in rows})
    assert str(photos / odd) in {row["image"] for row in rows}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no table with these columns"),
        ('image\n"x"y\n', "no table with these columns"),
        ("{}", "no table with these columns"),
    ],
)
def test_another_file_is_left_alone(export: Path, photos: Path, tmp_path: Path, text: str, message: str) -> None:
    table = tmp_path / "out.csv"
    table.write_text(text)
    done = run(export, photos, "--csv", table, "--resume")
    assert done.exit_code == 2 and message in done.stderr and table.read_text() == text


def test_verdicts_of_another_model_are_not_mixed(export: Path, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "out.csv"
    assert run(export, photos / "red", "--csv", table, "--resume", "--artifact", "onnx-fp32").exit_code == 0
    done = run(export, photos, "--csv", table, "--resume", "--artifact", "openvino-fp32")
    assert done.exit_code == 2 and "verdicts of another model: engine onnxruntime, not openvino" in done.stderr
    assert len(read(table)) == 1


def test_two_processes_do_not_write_to_one_table(export: Path, photos: Path, tmp_path: Path) -> None:
    with GrowingTable(tmp_path / "out.csv", COLUMNS):
        done = run(export, photos, "--csv", tmp_path / "out.csv", "--resume")
    assert done.exit_code == 2 and "another process is writing" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "belongs to --csv FILE or --parquet FILE"),
        (["--resume", "--csv", "x.csv", "--camera", "0"], "--resume belongs to images"),
    ],
)
def test_where_resume_makes_no_sense(
    export: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(export, *([photos] if "--camera" not in options else []), *options)
    assert done.exit_code == 2 and message in done.stderr and not Path("x.csv").exists()
