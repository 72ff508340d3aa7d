"""Which files are videos, and which of them are whole: told by what they hold, not by their names and counts."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from videos import cut, fast_start, pictures, plain, write_matroska, write_video

from ssod_edge.cli import main
from ssod_edge.errors import ImageError
from ssod_edge.runtime.field.capture import holds_video
from ssod_edge.runtime.field.container import is_cut
from ssod_edge.runtime.field.frames import FrameReader

PAUSES = [0, 0.04, 0.08, 5, 5.04, 5.08, 20, 20.04]
#: Three plain frames, which no encoder of OpenCV's wheel makes.
H264 = base64.b64decode(
    "AAAAAWdCwAraJaEAAAMAAQAAAwAyjxImoAAAAAFozgRyAAAAAWWIhDoRigACCDHAAEAGOAAIIUnXXgAAAAFBmiAio3FAALRwABBTjgACDnifP5/A"
    "AAAAAUGaQCKjcUAARC44AAhHRwADeJ8/n8A="
)


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def read(path: Path) -> tuple[int, str | None]:
    """How many frames come, and what is wrong then."""
    with FrameReader(str(path)) as reader:
        return len(list(reader)), reader.problem


# Whole or cut short


@pytest.mark.parametrize(
    ("times", "length"),
    [(PAUSES, 20.08), ([0, 1, 2], 30), ([0, 0.04, 0.08], None), ([i / 25 for i in range(30)], 9.0), ([0.0], 0.04)],
    ids=["pauses", "the last slide stays", "live recording", "sound outlasts it", "one frame"],
)
def test_a_whole_matroska_file_is_whole(tmp_path: Path, times: list[float], length: float | None) -> None:
    """Its frames are not counted, and what OpenCV announces is the length times a nominal rate."""
    path = write_matroska(tmp_path / "a.mkv", times, length)
    assert read(path) == (len(times), None)
    assert is_cut(str(path)) is (None if length is None else False)


@pytest.mark.parametrize("suffix", [".ts", ".flv", ".wmv"])
def test_of_other_formats_the_last_frame_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """What OpenCV announces of them is a length too, and no count."""
    codec = {".ts": "MPG2", ".flv": "FLV1", ".wmv": "WMV2"}[suffix]
    path = write_video(tmp_path / f"a{suffix}", pictures(40), codec)
    for share, whole in ((1.0, True), (0.95, True), (0.4, False)):
        with FrameReader(str(path)) as reader:
            reader._announced = round(40 / share)
            assert len(list(reader)) == 40
        assert (reader.problem is None) is whole


@pytest.mark.parametrize(("times", "whole"), [([0, 10, 20], True), ([0, 1, 2, 3], False), (PAUSES, True)])
def test_the_last_frame_may_stay_as_long_as_another(tmp_path: Path, times: list[float], whole: bool) -> None:
    """Where nothing but the time of the last frame tells: the parts of this recording were left open."""
    path = write_matroska(tmp_path / "a.mkv", times, 30 if whole and times[-1] == 20 else 21)
    content = path.read_bytes()
    size = content.index(bytes.fromhex("18538067")) + 4
    path.write_bytes(content[:size] + b"\x01" + b"\xff" * 7 + content[size + 8 :])
    assert is_cut(str(path)) is None and (read(path)[1] is None) is whole


def test_frames_of_a_video_with_pauses_have_their_times(tmp_path: Path) -> None:
    with FrameReader(str(write_matroska(tmp_path / "a.mkv", PAUSES, 20.08))) as reader:
        assert [frame.time_s for frame in reader] == pytest.approx(PAUSES, abs=1e-3)


@pytest.mark.parametrize("share", [0.97, 0.6, 0.3])
@pytest.mark.parametrize("kind", ["pauses.mkv", "slides.mkv", "a.mkv", "a.webm", "a.avi", "fast.mp4", "fast.mov"])
def test_a_video_that_is_cut_short_is_found_out(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / kind
    if kind == "pauses.mkv":
        write_matroska(path, PAUSES, 20.08)
    elif kind == "slides.mkv":
        write_matroska(path, [0, 10, 20, 30], 40)
    else:
        codec = {".mkv": "FFV1", ".webm": "VP80", ".avi": "MJPG", ".mp4": "mp4v", ".mov": "mp4v"}[path.suffix]
        write_video(path, pictures(60), codec)
        if kind.startswith("fast"):
            fast_start(path)
    whole, problem = read(path)
    assert problem is None and not is_cut(str(path))
    found, problem = read(cut(path, share))
    assert 0 < found < whole and "it is cut short or damaged" in str(problem), problem


def test_a_video_without_its_index_is_no_video(tmp_path: Path) -> None:
    path = cut(write_video(tmp_path / "a.mp4", pictures(20), "mp4v"), 0.8)
    with pytest.raises(ImageError, match="cut short"):
        read(path)


def test_a_whole_file_whose_frames_are_damaged_is_found_out(tmp_path: Path) -> None:
    """Nothing lacks at its end; the second half was written over."""
    path = write_video(tmp_path / "a.mkv", pictures(40))
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(len(content) - half))
    found, problem = read(path)
    assert 5 < found < 36 and "at 0." in str(problem) and "of 1.6 s" in str(problem)


def test_what_lacks_only_the_index_at_its_end_is_whole(tmp_path: Path) -> None:
    """All frames that it announces are there."""
    path = write_video(tmp_path / "a.avi", pictures(20), "MJPG")
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"idx1")])
    assert is_cut(str(path)) and read(path) == (20, None)


@pytest.mark.parametrize("tail", [b"SEFH" * 40, bytes(300), b"\xff" * 20])
def test_what_a_camera_adds_after_the_last_box_is_not_read_as_one(tmp_path: Path, tail: bytes) -> None:
    path = write_video(tmp_path / "a.mp4", pictures(10), "mp4v")
    path.write_bytes(path.read_bytes() + tail)
    assert read(path) == (10, None)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"\x1aE\xdf\xa3", b"\x1aE\xdf\xa3\xff", b"\0\0\0\1mdat", bytes(64)])
def test_what_announces_nothing_is_not_cut(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert not is_cut(str(tmp_path / "a"))


# Which files are videos

CODECS = {
    ".wmv": "WMV2", ".asf": "WMV2", ".flv": "FLV1", ".3gp": "mp4v", ".mts": "MPG2", ".m2ts": "MPG2", ".m2v": "MPG2",
    ".vob": "MPG2", ".mxf": "MPG2", ".mjpeg": "MJPG", ".nut": "FFV1",
}  # fmt: skip


@pytest.mark.parametrize("name", [None, "a.dat", "clip", ".hidden"])
@pytest.mark.parametrize("suffix", CODECS)
def test_a_file_that_opencv_decodes_is_a_video(export: Path, tmp_path: Path, suffix: str, name: str | None) -> None:
    if suffix == ".mjpeg" and name is not None:
        pytest.skip("a JPEG after the other, which begins as one picture does")
    frames = [frame.repeat(4, 0).repeat(4, 1)[:96, :128] for frame in plain("red", "green", "blue", "red", "green")]
    path = write_video(tmp_path / f"a{suffix}", frames, CODECS[suffix])
    if name is not None:
        path = path.rename(tmp_path / name)
    code, out, err = run(export, path, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0, err
    assert [row["class_name"] for row in rows] == ["red", "green", "blue", "red", "green"]
    assert [row["frame"] for row in rows] == list(range(5)) and {row["image"] for row in rows} == {str(path)}


@pytest.mark.parametrize("name", ["a.h264", "a.264", "a"])
def test_a_bare_stream_is_a_video(export: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(H264)
    code, out, err = run(export, tmp_path / name, "--json")
    assert code == 0, err
    assert [json.loads(line)["class_name"] for line in out.splitlines()] == ["red", "green", "blue"]
    assert [json.loads(line)["time_s"] for line in out.splitlines()] == [0, 0.04, 0.08]


@pytest.mark.parametrize("name", ["a.m3u8", "list"])
def test_a_playlist_is_a_video(export: Path, tmp_path: Path, name: str) -> None:
    for part in ("0.ts", "1.ts"):
        write_video(tmp_path / part, pictures(10), "MPG2")
    parts = "#EXTINF:0.4,\n0.ts\n#EXT-X-DISCONTINUITY\n#EXTINF:0.4,\n1.ts\n"
    (tmp_path / name).write_text(f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n{parts}#EXT-X-ENDLIST\n")
    if name == "list":
        assert not holds_video(str(tmp_path / name)), "FFmpeg wants the suffix of a playlist"
        return
    code, out, err = run(export, tmp_path / name, "--json")
    assert (code, len(out.splitlines())) == (0, 20), err


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


NO_VIDEOS = {
    "notes.txt": b"hello, this is a text\n" * 200, "art.ans": b"\x1b[31mhello\r\n" * 100, "dump.art": bytes(60_000),
    "notes": b"no video\n" * 100, "table.csv": b"path,label\na.jpg,b\n" * 50,
    "latin": "Stra\xdfe\n".encode("latin-1") * 99,
    "utf16": "a text\n".encode("utf-16") * 99, "empty": b"", "zeros": bytes(5000), "a.pdf": b"%PDF-1.4\n" + bytes(2000),
    "random.bin": np.random.default_rng(1).bytes(50_000), "list.ffconcat": b"ffconcat version 1.0\nfile a.mkv\n",
    "cut.jpg": saved("JPEG")[:90], "damaged": b"\xff\xd8\xff\xe0" + bytes(range(256)) * 20, "cut": saved("PNG")[:40],
    "damaged.dat": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20, "a.pcx": saved("PCX"), "a.tga": saved("TGA"),
    "a.sgi": saved("SGI"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_VIDEOS)
def test_what_is_no_video_is_an_image_that_cannot_be_read(export: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(NO_VIDEOS[name])
    write_video(tmp_path / "a.mkv", pictures(5))  # which the list names
    assert not holds_video(str(tmp_path / name))
    code, out, _ = run(export, tmp_path / name, "--json")
    (row,) = map(json.loads, out.splitlines())
    assert code == 1 and row["error"].startswith(f"'{tmp_path / name}': ") and "frame" not in row


def test_trying_says_nothing_on_the_terminal(export: Path, tmp_path: Path) -> None:
    """FFmpeg writes past Python, so this takes a process of its own."""
    for name in ("damaged.dat", "damaged", "random.bin"):
        (tmp_path / name).write_bytes(NO_VIDEOS[name])
        command = [sys.executable, "-m", "ssod_edge", "predict", str(export), str(tmp_path / name), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (1, "", 1)


def test_a_picture_without_suffix_is_an_image(export: Path, tmp_path: Path) -> None:
    first, second = (Image.fromarray(pixels) for pixels in pictures(2))
    first.save(tmp_path / "moves.gif", save_all=True, append_images=[second])
    (tmp_path / "moves.gif").rename(tmp_path / "moves")
    for kind in ("PNG", "GIF", "BMP", "WEBP", "TIFF", "JPEG", "moves"):
        if kind != "moves":
            (tmp_path / kind).write_bytes(saved(kind))
        assert run(export, tmp_path / kind, "--json")[0] == 0
        assert "frame" not in json.loads(run(export, tmp_path / kind, "--json")[1])


def test_of_a_folder_the_images_are_taken_and_no_videos(export: Path, tmp_path: Path) -> None:
    """Whatever they are called; of several arguments too nothing is tried as a video."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.new("RGB", (40, 30), (220, 20, 20)).save(folder / "red.png")
    write_video(folder / "a.wmv", pictures(5), "WMV2")
    clip = write_video(folder / "b.avi", pictures(5)).rename(folder / "clip")
    code, out, err = run(export, folder, "--json")
    assert (code, len(out.splitlines())) == (0, 1)
    assert "left out: 2 files that are no images (.wmv, no suffix)" in err
    code, out, err = run(export, clip, folder / "red.png", "--json")
    assert code == 1 and [json.loads(line)["class_name"] for line in out.splitlines()] == [None, "red"]


def test_without_opencv_an_odd_file_is_an_image(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(H264)
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert not holds_video(str(tmp_path / "a"))
    code, _, err = run(export, tmp_path / "a.wmv")
    assert code == 3 and "ssod-edge[video]" in err
