"""Videos and live streams: the image's own verdict on every frame, what is dropped and what is not, how they end."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from colour import WEIGHT, edit_graph
from PIL import Image
from servers import serving
from videos import RATE, cv2, jpeg, pictures, plain, write_video

import ssod_edge
from ssod_edge.cli import main
from ssod_edge.errors import ImageError, MissingExtraError, UsageError
from ssod_edge.runtime.field import retries
from ssod_edge.runtime.field.capture import is_stream
from ssod_edge.runtime.field.frames import FrameReader
from ssod_edge.runtime.field.stream import Smoother, predict_frames
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import Predictor

KEYS = [
    "image", "class_index", "class_name", "confidence", "ood_score", "threshold", "known", "p_known", "engine",
    "precision", "image_warning", "error", "frame", "time_s", "fps",
]  # fmt: skip


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "video.avi", pictures(12))


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def rows(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


# What a stream is


@pytest.mark.parametrize("name", ["a.mp4", "dir/B.AVI", "rtsp://host/x", "HTTP://host:1/live", "udp://239.0.0.1:5000"])
def test_streams_are_told_by_their_names(name: str) -> None:
    assert is_stream(name)


@pytest.mark.parametrize("name", ["a.jpg", "a.gif", "mp4", "-", "photos/*.png", "ftp://host/a.jpg", "rtsp"])
def test_images_are_no_streams(name: str) -> None:
    assert not is_stream(name)


# Frames of a file


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "FFV1"), ("a.mkv", "FFV1"), ("a.mov", "png ")])
def test_a_lossless_frame_has_the_verdict_of_the_same_image(
    export: Path, tmp_path: Path, name: str, codec: str
) -> None:
    """Pixel for pixel, in the order of the colours too: the image goes through Pillow, the video through OpenCV."""
    frames = pictures(6)
    video = write_video(tmp_path / name, frames, codec)
    with ssod_edge.open(export) as model, FrameReader(str(video)) as reader:
        verdicts = list(predict_frames(model, reader))
        for index, pixels in enumerate(frames):
            Image.fromarray(pixels).save(tmp_path / "frame.png")
            image = model.predict(tmp_path / "frame.png").to_dict()
            assert verdicts[index].prediction.to_dict() == {**image, "image": str(video)}
            assert image["class_name"] == ("red", "green", "blue")[index % 3]
    assert [verdict.frame for verdict in verdicts] == list(range(6))


def test_a_lossy_video_gives_the_same_classes(export: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", plain("red", "green", "blue"), "mp4v")
    with ssod_edge.open(export) as model, FrameReader(str(video)) as reader:
        assert [v.prediction.class_name for v in predict_frames(model, reader)] == ["red", "green", "blue"]


def test_a_slow_verdict_loses_no_frame_of_a_file(tmp_path: Path) -> None:
    frames = pictures(10)
    with FrameReader(str(write_video(tmp_path / "a.avi", frames, rate=500))) as reader:
        found = []
        for frame in reader:
            time.sleep(0.02)
            found.append(frame)
    assert [frame.index for frame in found] == list(range(10)) and reader.dropped == 0
    assert all(np.array_equal(frame.pixels, pixels) for frame, pixels in zip(found, frames, strict=True))
    assert reader.problem is None and not reader.live


def test_frames_are_read_only_a_little_ahead(tmp_path: Path) -> None:
    with FrameReader(str(write_video(tmp_path / "a.avi", pictures(30)))) as reader:
        next(iter(reader))
        time.sleep(0.3)
        assert len(reader._waiting) == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "frames"]


def test_time_is_that_of_the_video(tmp_path: Path) -> None:
    for name, rate, precision in (("a.avi", 10, 1e-6), ("a.mkv", 30, 1e-3)):
        with FrameReader(str(write_video(tmp_path / name, pictures(5), rate=rate))) as reader:
            assert [frame.time_s for frame in reader] == pytest.approx([i / rate for i in range(5)], abs=precision)


def test_a_video_can_be_played_in_real_time(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.avi", pictures(20), rate=20)
    began, seen = time.monotonic(), []
    with FrameReader(str(video), realtime=True) as reader:
        for frame in reader:
            late = time.monotonic() - began - frame.time_s
            seen.append(frame.index)
            time.sleep(0.16)  # three frames and a bit
            assert late < 1.5, "it lags: without dropping, the last one would be 2.2 s late"
    assert time.monotonic() - began > 0.9
    assert reader.dropped > 5 and reader.dropped + len(seen) == 20
    assert seen == sorted(set(seen)) and seen[-1] == 19, "the newest one is kept"
    assert reader.problem is None


# A live source


class LiveCamera(BaseHTTPRequestHandler):
    """Motion JPEG, as network cameras serve it: `frames` pictures, `rate` a second, then the connection ends."""

    frames, rate = 40, 40.0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        try:
            for pixels in pictures(self.frames):
                picture = jpeg(pixels)
                self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture))
                self.wfile.write(picture + b"\r\n")
                time.sleep(1 / self.rate)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the reader has gone

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a camera that is opened anew once, and no more."""
    monkeypatch.setattr(retries, "PAUSES_S", (0.1,))
    with serving(LiveCamera) as server:
        yield f"{server}/live.mjpg"


def test_of_a_live_source_the_newest_frame_counts(address: str) -> None:
    seen = []
    with FrameReader(address) as reader:
        assert reader.live
        for frame in reader:
            seen.append(frame.index)
            time.sleep(0.15)
    assert reader.dropped > 10 and seen == sorted(set(seen))
    assert reader.dropped + len(seen) == seen[-1] + 1 > 30
    assert "stopped after" in str(reader.problem)


def test_a_live_source_that_stops_ends_with_1(export: Path, address: str) -> None:
    code, out, err = run(export, address, "--json")
    found = rows(out)
    assert code == 1 and f"error: {address} stopped after" in err
    assert all(list(row) == KEYS for row in found) and len(found) > 1
    assert [row["time_s"] for row in found] == sorted(row["time_s"] for row in found)
    assert {row["image"] for row in found} == {address}


def test_closing_does_not_wait_for_the_source(address: str) -> None:
    with FrameReader(address) as reader:
        next(iter(reader))
        began = time.monotonic()
    assert time.monotonic() - began < 2.5 and reader.problem is None


def test_a_frame_that_cannot_be_turned_into_colours_is_named(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a camera that is set to deliver its raw bytes: OpenCV's own error becomes one of ours."""
    to_rgb, raw = cv2.cvtColor, np.zeros((30, 40, 2), np.uint8)
    turned: list[None] = []

    def convert(pixels: np.ndarray, code: int) -> np.ndarray:
        turned.append(None)
        return to_rgb(pixels if len(turned) < 3 else raw, code)

    monkeypatch.setattr(cv2, "cvtColor", convert)
    with FrameReader(str(video)) as reader, pytest.raises(ImageError, match="frame 2 of .*video.avi cannot be read"):
        for _ in reader:
            pass


@pytest.mark.parametrize("error", [RuntimeError("the driver is gone"), MemoryError()], ids=["driver", "memory"])
def test_whatever_ends_the_reading_ends_the_command_with_1(
    export: Path, video: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It is raised on the reader's thread, where nobody would hear of it."""
    capture, reads = cv2.VideoCapture, 0

    class Capture:
        def __init__(self, *arguments: object) -> None:
            self._real = capture(*arguments)

        def __getattr__(self, name: str) -> object:
            return getattr(self._real, name)

        def read(self) -> tuple[bool, np.ndarray]:
            nonlocal reads
            reads += 1
            if reads > 2:
                raise error
            return self._real.read()

    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    code, out, err = run(export, str(video), "--json")
    assert code == 1 and len(rows(out)) == 2
    assert ("error: out of memory" if isinstance(error, MemoryError) else "error: RuntimeError: the driver") in err


# Smoothing


def test_the_mean_is_the_one_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0.01, 0.5, 20))
    values, probs = rng.normal(size=20), rng.dirichlet(np.ones(3), 20)
    smoother, mean, mean_probs = Smoother(0.7), values[0], probs[0]
    for k in range(20):
        found = smoother.update(times[k], {"probs": probs[k : k + 1], "ood_score": values[k : k + 1], "logits": None})
        if k:
            share = 1 - math.exp(-(times[k] - times[k - 1]) / 0.7)
            mean, mean_probs = mean + share * (values[k] - mean), mean_probs + share * (probs[k] - mean_probs)
        assert found["ood_score"] == pytest.approx([mean], abs=1e-12)
        np.testing.assert_allclose(found["probs"], [mean_probs], atol=1e-12)
        assert found["probs"].sum() == pytest.approx(1) and found["logits"].argmax() == mean_probs.argmax()


def test_the_mean_does_not_depend_on_the_frame_rate() -> None:
    """A step of the score is followed in the same time, with all frames or with every fifth of them."""
    ends = []
    for step in (1, 5):
        smoother = Smoother(0.5)
        for k in range(0, 51, step):
            out = smoother.update(k * 0.02, {"probs": np.full((1, 2), 0.5), "ood_score": np.array([float(k > 0)])})
        ends.append(out["ood_score"][0])
    assert ends == pytest.approx([1 - math.exp(-2)] * 2)


def test_one_odd_frame_turns_the_verdict_only_without_smoothing(export: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.avi", plain(*["red"] * 10, "grey", *["red"] * 5, *["grey"] * 60))
    known = {}
    for smooth in (None, 1.0):
        with ssod_edge.open(export) as model, FrameReader(str(video)) as reader:
            verdicts = [v.prediction for v in predict_frames(model, reader, smooth and Smoother(smooth))]
        known[smooth] = [verdict.known for verdict in verdicts]
        assert all(verdict.known is (verdict.ood_score <= verdict.threshold) for verdict in verdicts)
        assert all(0 < verdict.confidence <= 1 for verdict in verdicts)
    assert known[None] == [True] * 10 + [False] + [True] * 5 + [False] * 60
    turn = known[1.0].index(False)
    assert 16 < turn < 60 and not any(known[1.0][turn:]), "it turns once, and late"


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_smoothing_over_no_time_is_refused(export: Path, video: Path, seconds: float) -> None:
    with pytest.raises(UsageError, match="above 0"):
        Smoother(seconds)
    code, out, err = run(export, video, "--smooth", seconds)
    assert (code, out) == (2, "") and "above 0" in err


def test_an_output_that_is_not_finite_is_a_failed_frame(export: Path, video: Path) -> None:
    edit_graph(export, "onnx-fp32", weight=np.full_like(WEIGHT, np.nan))
    with Predictor(open_runner(export, artifact="onnx-fp32", verify=False)) as model, FrameReader(str(video)) as reader:
        verdicts = [v.prediction for v in predict_frames(model, reader, Smoother(1))]
    assert len(verdicts) == 12 and all("not finite" in str(v.error) for v in verdicts)


# The command


def test_json_lines(export: Path, video: Path) -> None:
    code, out, err = run(export, video, "--json")
    found = rows(out)
    assert code == 0 and [list(row) for row in found] == [KEYS] * 12
    assert [row["frame"] for row in found] == list(range(12))
    assert [row["time_s"] for row in found] == pytest.approx([i / RATE for i in range(12)])
    assert found[0]["fps"] is None and all(row["fps"] > 0 for row in found[1:])
    assert [row["class_name"] for row in found] == ["red", "green", "blue"] * 4
    assert "12 frames in" in err and "12 known, 0 unknown, 0 failed, 0 dropped; openvino-fp32" in err


def test_table(export: Path, tmp_path: Path) -> None:
    code, out, err = run(export, write_video(tmp_path / "a.avi", plain("red", "grey")), "--engine", "onnxruntime")
    head, first, second, note, summary = out.splitlines()
    assert note.startswith("p known: of 100 new images of known classes")
    assert (code, err) == (0, "")
    assert head.split() == ["frame", "time", "verdict", "class", "confidence", "ood", "score", "p", "known", "fps"]
    assert first.split()[:4] == ["0", "0.00s", "KNOWN", "red"] and second.split()[:3] == ["1", "0.04s", "UNKNOWN"]
    assert "2 frames in" in summary and "1 known, 1 unknown, 0 failed, 0 dropped; onnx-fp32 on onnxruntime" in summary


def test_a_video_that_is_cut_short_ends_with_1(export: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.avi", pictures(40), "MJPG")
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    code, out, err = run(export, video, "--json")
    assert code == 1 and 5 < len(out.splitlines()) < 36
    assert "of 40 frames: it is cut short or damaged" in err


def test_what_is_no_video_is_refused(export: Path, tmp_path: Path) -> None:
    for content in (b"", b"no video\n" * 100):
        (tmp_path / "a.mp4").write_bytes(content)
        code, out, err = run(export, tmp_path / "a.mp4")
        assert (code, out) == (1, "") and "cannot be read as a video" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{}/nowhere.mp4"], 2, "does not exist"),
        (["{}/folder.mp4"], 2, "is not a file"),
        (["--camera", "97"], 2, "camera '97' cannot be opened"),
        (["--camera", "/dev/null"], 2, "'/dev/null' is in use, is no camera"),
        (["--camera", "nvarguscamerasrc ! appsink"], 2, "GStreamer"),
        (["{}/video.avi", "{}/video.avi"], 2, "taken alone"),
        (["{}/video.avi", "{}/red.png"], 2, "taken alone"),
        (["{}/video.avi", "--camera", "0"], 2, "taken alone"),
        (["--camera", "rtsp://user:secret@127.0.0.1:1/x"], 2, "'rtsp://127.0.0.1:1/x' is an address and no camera"),
        (["--camera", "rtspsrc location=rtsp://user:secret@cam/x ! appsink"], 2, "location=rtsp://cam/x ! appsink'"),
        (["rtsp://user:secret@127.0.0.1:1/x", "--camera", "0"], 2, "'rtsp://127.0.0.1:1/x', --camera 0"),
        (["{}/red.png", "--smooth", "1"], 2, "--smooth and --realtime belong to a video"),
        (["{}/red.png", "--realtime"], 2, "--smooth and --realtime belong to a video"),
        (["{}/video.avi", "--batch", "4"], 2, "--batch belongs to images"),
        ([], 2, "IMAGE, or --camera"),
        (["rtsp://user:a@secret@127.0.0.1:1/x"], 1, "no video came from 'rtsp://127.0.0.1:1/x'"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(
    export: Path, video: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "red.png")
    result = run(export, *(argument.format(tmp_path) for argument in arguments))
    assert (result[0], message in result[2]) == (code, True), result
    assert "secret" not in result[2] and "Traceback" not in result[2]


def test_neither_or_both_sources(video: Path) -> None:
    for arguments in ({}, {"source": str(video), "camera": "0"}):
        with pytest.raises(UsageError, match="either"):
            FrameReader(**arguments)
    with pytest.raises(ImageError, match="cannot be read as a video"):
        FrameReader(__file__)


def test_without_opencv_the_extra_is_named(export: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ssod-edge\[video\]'"):
        FrameReader(str(video))
    code, out, err = run(export, video)
    assert (code, out) == (3, "") and "pip install 'ssod-edge[video]'" in err


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_interrupt_ends_it_with_a_summary(export: Path, tmp_path: Path, options: list[str]) -> None:
    video = write_video(tmp_path / "long.avi", plain("red", "green") * 300, rate=10)
    command = [sys.executable, "-m", "ssod_edge", "predict", str(export), str(video), "--realtime", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 10
    assert err.endswith("interrupted\n") and "Traceback" not in err
    assert " known, 0 unknown, 0 failed, " in (err if options else out.splitlines()[-1])


def test_a_reader_of_the_verdicts_that_goes_away_ends_it(export: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "long.avi", plain("red") * 300, rate=100)
    command = f"'{sys.executable}' -m ssod_edge predict '{export}' '{video}' --json --realtime | head -n 2"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert len(done.stdout.splitlines()) == 2 and "Traceback" not in done.stderr and "should not" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["srt://127.0.0.1:1?passphrase=SECRET"], ["rtmps://u:SECRET@127.0.0.1:1/a"], ["rtsp://u:SEC/RET@127.0.0.1:1/a"],
        ["http://127.0.0.1:1/a?token=SECRET"], ["rtsp://u:SECRET@h/a", "a.png"],
        ["--camera", "rtspsrc location=rtsp://h user-pw=SECRET ! appsink"],
        ["--camera", "rtspsrc user-pw=SECRET ! appsink", "a.mp4"], ["--camera", "rtspsrc user-pw=SECRET"],
        ["--camera", "tcpclientsrc psk='SEC RET' ! appsink"], ["--camera", "ftp://u:SECRET@h/a"],
        ["ftp://u:SECRET@127.0.0.1:1/a.jpg"], ["ftp://u:SEC'RET@h/a", "a.png"], ["file://u:SECRET@/a.png"],
        ["rtspsrc location=rtsp://u:SECRET@h ! x"], ["rtsp://u:SEC'R ET@127.0.0.1:1/a"],
        ["a.png", "--monitor", "ftp://u:SECRET@h/a"], ["a.png", "--collect", "ftp://u:SECRET@h/a"],
        ["a.png", "--csv", "s3://u:SECRET@h/a"], ["a.png", "--sort-into", "s3://u:SECRET@h/a"],
        ["a.png", "--artifact", "http://u:SECRET@h/a"], ["a.png", "--engine", "http://u:SECRET@h/a"],
    ],
)  # fmt: skip
def test_no_error_prints_a_secret(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Image.new("RGB", (20, 20)).save("a.png")
    result = CliRunner().invoke(main, ["predict", str(export), *arguments])
    assert result.exit_code != 0 and "SEC" not in result.output and "RET" not in result.output, result.output
    assert os.listdir() == ["a.png"], "nothing is made in a folder that is called as a scheme is"


@pytest.mark.parametrize("options", [["--json"], [], ["--csv", "verdicts.csv"], ["--monitor", "drift.json"]])
def test_an_address_in_a_list_is_a_failed_image_without_its_secret(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Image.new("RGB", (20, 20)).save("a.png")
    names = "a.png\nftp://u:SECRET@h/a.jpg\nhttp://h/a.jpg?token=SECRET\nrtsp://u:SECRET@h/a\n"
    result = CliRunner().invoke(main, ["predict", str(export), "-", *options], input=names)
    assert result.exit_code == 1 and "ftp://h/a.jpg" in result.output and "download it first" in result.output
    if "--json" in options:
        shown = [json.loads(line)["image"] for line in result.stdout.splitlines()]
        assert shown == ["a.png", "ftp://h/a.jpg", "http://h/a.jpg?...", "rtsp://h/a"]
    written = "".join(path.read_text() for path in Path().iterdir() if path.suffix != ".png")
    assert "SECRET" not in result.output + written


def test_an_address_is_no_image_from_python_either(export: Path) -> None:
    with ssod_edge.open(export) as model:
        with pytest.raises(ImageError) as error:
            model.predict("ftp://u:SECRET@h/a.jpg")
        (verdict,) = model.predict_many(["ftp://u:SECRET@h/a.jpg"])
    assert "SECRET" not in f"{error.value}{verdict}" and verdict.image == "ftp://h/a.jpg"


def test_other_commands_print_no_secret_either(export: Path) -> None:
    for command in (["monitor"], ["calibrate", str(export), "--id"], ["history"], ["review"], ["train"], ["bench"]):
        result = CliRunner().invoke(main, [*command, "ftp://u:SECRET@h/a"])
        assert result.exit_code != 0 and "SECRET" not in result.output and "h/a" in result.output, result.output
