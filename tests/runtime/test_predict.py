"""Photos in, verdicts out: which images, which verdict, in which order, and what a bad one does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from colour import BIAS, COLOURS, WEIGHT, edit_graph, paint
from PIL import Image

import ssod_edge
from ssod_edge.cli import main
from ssod_edge.data.inputs import list_images
from ssod_edge.data.listing import Listing
from ssod_edge.errors import ImageError, UsageError
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import Predictor, available_cores

MakeExport = Callable[..., Path]
KEYS = [
    "image", "class_index", "class_name", "confidence", "ood_score",
    "threshold", "known", "p_known", "engine", "precision", "image_warning", "error",
]  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """red.png, sub/blue.jpg, sub/deep/grey.PNG, and files that are no images."""
    folder = tmp_path / "photos"
    paint(folder / "red.png", "red")
    paint(folder / "sub" / "blue.jpg", "blue")
    paint(folder / "sub" / "deep" / "grey.PNG", "grey")
    (folder / "notes.txt").write_text("no image")
    return folder


# Which images are meant


def names(paths: list[str], folder: Path) -> list[str]:
    return [str(Path(path).relative_to(folder)) for path in paths]


def test_a_folder_is_searched_in_order(photos: Path) -> None:
    assert names(list_images([str(photos)]), photos) == ["red.png", "sub/blue.jpg", "sub/deep/grey.PNG"]


def test_patterns(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(list_images([f"{photos}/*.png"]), photos) == ["red.png"]
    assert names(list_images([f"{photos}/**/*.jpg"]), photos) == ["sub/blue.jpg"]
    assert names(list_images([f"{photos}/s*"]), photos) == ["sub/blue.jpg", "sub/deep/grey.PNG"]
    assert sorted(names(list_images([f"{photos}/**"]), photos)) == [
        "notes.txt", "red.png", "sub/blue.jpg", "sub/deep/grey.PNG",
    ]  # fmt: skip
    monkeypatch.chdir(photos)
    assert list_images(["*.png", "red.png"]) == ["red.png", "red.png"]


def test_the_order_of_the_arguments_is_kept(photos: Path) -> None:
    wanted = [str(photos / "sub" / "blue.jpg"), str(photos / "red.png"), str(photos / "nowhere.png")]
    assert list_images(wanted) == wanted


def test_a_list_on_standard_input(photos: Path) -> None:
    lines = [f"{photos}/red.png\n", "\n", f"{photos}/sub\r\n", "a file [with] *.png\n"]
    assert list_images(["first.png", "-", "last.png"], lines) == [
        "first.png", f"{photos}/red.png", f"{photos}/sub/blue.jpg", f"{photos}/sub/deep/grey.PNG",
        "a file [with] *.png", "last.png",
    ]  # fmt: skip


def test_a_name_with_brackets_is_a_name_if_it_exists(tmp_path: Path) -> None:
    path = paint(tmp_path / "photo[1].png", "red")
    assert list_images([str(path)]) == [str(path)]


def test_pipes_are_passed_over_and_dead_links_reported(photos: Path) -> None:
    os.mkfifo(photos / "pipe.png")
    (photos / "lost.png").symlink_to(photos / "nowhere")
    assert names(list_images([str(photos)]), photos) == ["lost.png", "red.png", "sub/blue.jpg", "sub/deep/grey.PNG"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no images were given"),
        (["-"], "standard input names no images"),
        (["{}/empty"], "holds no images"),
        (["{}/empty*"], "no image matches"),
        (["{}/*.bmp"], "no image matches"),
    ],
)
def test_nothing_to_do_is_a_wrong_argument(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=message):
        list_images([argument.format(tmp_path) for argument in arguments], [])


def test_hidden_names_are_left_out_of_a_search_alone(photos: Path) -> None:
    hidden = [paint(photos / "._red.png", "red"), paint(photos / ".thumbnails" / "blue.png", "blue")]
    assert names(list_images([str(photos)]), photos) == ["red.png", "sub/blue.jpg", "sub/deep/grey.PNG"]
    assert list_images([str(path) for path in hidden]) == [str(path) for path in hidden]
    assert names(list_images([str(photos / ".thumbnails")]), photos) == [".thumbnails/blue.png"]


def test_an_argument_without_images_keeps_its_place_among_others(photos: Path) -> None:
    (photos / "empty").mkdir()
    red, empty, pattern = f"{photos}/red.png", f"{photos}/empty", f"{photos}/*.bmp"
    failed: dict[str, str] = {}
    assert list_images([empty, red, pattern, "-"], [f"{empty}\n"], failed) == [empty, red, pattern, empty]
    assert "holds no images" in failed.pop(empty) and "no image matches" in failed.pop(pattern) and not failed
    assert list_images([red, "-"], [], failed) == [red, "-"]
    assert "standard input names no images" in failed["-"]
    with pytest.raises(UsageError, match="no image matches"):
        list_images([pattern, empty], [], {})


# Verdicts


def test_the_same_verdict_from_path_image_array_and_bytes(export: Path, tmp_path: Path) -> None:
    path = paint(tmp_path / "red.png", "red")
    with ssod_edge.open(export) as model:
        verdicts = [
            model.predict(source)
            for source in (path, str(path), Image.open(path), np.asarray(Image.open(path)), path.read_bytes())
        ]
    assert [v.image for v in verdicts] == [str(path), str(path), "PIL image", "array", "bytes"]
    values = [{**v.to_dict(), "image": None} for v in verdicts]
    assert values == [values[0]] * 5
    assert (verdicts[0].class_index, verdicts[0].class_name, verdicts[0].known) == (0, "red", True)
    assert verdicts[0].threshold == -2.0


def test_known_and_unknown(export: Path) -> None:
    with ssod_edge.open(export, engine="onnxruntime") as model:
        for colour, pixel in COLOURS.items():
            verdict = model.predict(np.full((20, 20, 3), pixel, np.uint8))
            fused = (np.array(pixel) / 255) @ WEIGHT.T + BIAS
            energy = -np.logaddexp.reduce(fused[:3])
            assert verdict.ood_score == pytest.approx(energy, abs=1e-4)
            assert verdict.known is (colour != "grey")
            assert verdict.confidence == pytest.approx(np.exp(fused[:3] + energy).max(), abs=1e-4)
            assert (verdict.engine, verdict.precision, verdict.error) == ("onnxruntime", "fp32", None)


def test_the_threshold_itself_is_known(export: Path) -> None:
    image = np.full((20, 20, 3), COLOURS["red"], np.uint8)
    with ssod_edge.open(export) as model:
        model.threshold = model.predict(image).ood_score
        assert model.predict(image).known is True
        model.threshold = np.nextafter(model.threshold, -np.inf)
        assert model.predict(image).known is False


def test_a_bad_image_raises_in_python(export: Path, tmp_path: Path) -> None:
    with ssod_edge.open(export) as model:
        with pytest.raises(ImageError, match=r"nowhere\.png"):
            model.predict(tmp_path / "nowhere.png")
        with pytest.raises(ImageError, match="uint8"):
            model.predict(np.zeros((4, 4, 3)))


def test_close_and_errors_on_the_way(export: Path) -> None:
    model = ssod_edge.open(export)
    model.close()
    with pytest.raises(UsageError, match="closed"):
        model.predict(np.zeros((4, 4, 3), np.uint8))


def test_output_that_is_not_finite_is_no_verdict(export: Path, tmp_path: Path) -> None:
    edit_graph(export, "onnx-fp32", weight=np.full_like(WEIGHT, np.nan))
    path = paint(tmp_path / "red.png", "red")
    with Predictor(open_runner(export, artifact="onnx-fp32")) as model:
        with pytest.raises(ImageError, match="not finite"):
            model.predict(path)
        (verdict,) = model.predict_many([path])
    assert verdict.known is None and "not finite" in str(verdict.error)


# Many images


def colours_in_turn(folder: Path, n: int) -> list[Path]:
    order = ["red", "green", "blue"]
    return [paint(folder / f"{i:03}.png", order[i % 3], (30 + i % 7, 40)) for i in range(n)]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_order_and_verdicts_do_not_depend_on_batch_and_threads(
    export: Path, tmp_path: Path, batch: int, workers: int
) -> None:
    paths = colours_in_turn(tmp_path, 18)
    paths[5].write_bytes(b"broken")
    paths[12] = tmp_path / "gone.png"
    with ssod_edge.open(export) as model:
        verdicts = list(model.predict_many(paths, batch=batch, workers=workers))
        alone = [model.predict(path) for i, path in enumerate(paths) if i not in (5, 12)]
    assert [v.image for v in verdicts] == [str(path) for path in paths]
    assert [i for i, v in enumerate(verdicts) if v.error] == [5, 12]
    for i, verdict in enumerate(verdicts):
        if i in (5, 12):
            assert verdict.class_index is verdict.confidence is verdict.ood_score is verdict.known is None
        else:
            assert verdict.class_name == ("red", "green", "blue")[i % 3]
            assert verdict.ood_score == pytest.approx(alone.pop(0).ood_score, abs=1e-4)


def test_a_batch_of_bad_images_alone(export: Path, tmp_path: Path) -> None:
    with ssod_edge.open(export) as model:
        verdicts = list(model.predict_many([tmp_path / "a.png", tmp_path / "b.png"], batch=2))
    assert all("no such file" in str(verdict.error) for verdict in verdicts)


def test_what_is_no_image_is_named_by_its_type(export: Path) -> None:
    with ssod_edge.open(export) as model:
        verdicts = list(model.predict_many([5, None, bytearray(b"x")]))  # type: ignore[list-item]
    assert [verdict.image for verdict in verdicts] == ["int", "NoneType", "bytes"]
    assert "got NoneType" in str(verdicts[1].error)


def test_a_pipe_is_refused_instead_of_waited_for(export: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with ssod_edge.open(export) as model:
        (verdict,) = model.predict_many([tmp_path / "pipe.png"])
    assert "a pipe, not a file" in str(verdict.error)


def test_no_images_give_no_verdicts(export: Path) -> None:
    with ssod_edge.open(export) as model:
        assert list(model.predict_many([])) == []


@pytest.mark.parametrize("options", [{"batch": 0}, {"workers": 0}])
def test_wrong_options_are_refused_at_once(export: Path, options: dict) -> None:
    with ssod_edge.open(export) as model, pytest.raises(UsageError, match="at least 1"):
        model.predict_many([], **options)


@pytest.mark.parametrize("batch", [1, 4])
def test_images_are_drawn_only_a_little_ahead(export: Path, tmp_path: Path, batch: int) -> None:
    path = paint(tmp_path / "red.png", "red")
    drawn = 0

    def endless() -> Iterator[Path]:
        nonlocal drawn
        while True:
            drawn += 1
            yield path

    with ssod_edge.open(export) as model:
        verdicts = model.predict_many(endless(), batch=batch, workers=2)
        for done in range(1, 50):
            assert next(verdicts).class_name == "red"
            assert drawn <= done + 4 + 4 * batch
        verdicts.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_decoding_goes_on_while_the_engine_runs(export: Path, tmp_path: Path) -> None:
    """While the caller holds one verdict, the next images are decoded."""
    paths = colours_in_turn(tmp_path, 6)
    with ssod_edge.open(export) as model:
        verdicts = model.predict_many(paths, batch=1, workers=2)
        next(verdicts)
        time.sleep(0.5)
        for path in paths[1:4]:
            path.unlink()
        assert [v.error for v in verdicts] == [None] * 5


def test_cores_are_those_that_the_process_may_use() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


# The command


def run(*arguments: str | Path, stdin: str | bytes | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)], input=stdin)
    return result.exit_code, result.stdout, result.stderr


def test_json_lines(export: Path, photos: Path) -> None:
    code, out, err = run(export, photos, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "left out: 1 file that is no image (.txt)\n")
    assert [list(row) for row in rows] == [KEYS] * 3
    assert [(Path(row["image"]).name, row["class_name"], row["known"]) for row in rows] == [
        ("red.png", "red", True),
        ("blue.jpg", "blue", True),
        ("grey.PNG", "green", False),
    ]
    assert {(row["engine"], row["precision"], row["threshold"], row["error"]) for row in rows} == {
        ("openvino", "fp32", -2.0, None)
    }


def test_files_that_are_no_images_are_said_once(export: Path, photos: Path) -> None:
    (photos / "sub" / "raw.cr2").write_bytes(b"no image")
    note = "left out: 2 files that are no images (.cr2, .txt)\n"
    for images in ((photos,), (photos, photos), (f"{photos.parent}/phot*",)):
        done = CliRunner().invoke(main, ["predict", str(export), *map(str, images), "--json"])
        assert done.exit_code == 0 and done.stderr == note, images
    assert not CliRunner().invoke(main, ["predict", str(export), str(photos / "red.png"), "--json"]).stderr


def test_table(export: Path, photos: Path) -> None:
    code, out, _ = run(export, photos, "--engine", "onnxruntime", "--precision", "fp16")
    lines = out.splitlines()
    assert code == 0
    assert lines[1].split()[1:3] == ["KNOWN", "red"] and lines[3].split()[1:3] == ["UNKNOWN", "green"]
    assert lines[0].split()[-2:] == ["p", "known"] and "p known: of 100 new images of known classes" in lines[4]
    with ssod_edge.open(export, artifact="onnx-fp16") as model:
        found = [model.predict(path).p_known for path in list_images([str(photos)])]
    assert [line.split()[-1] for line in lines[1:4]] == [f"{p:.1%}" for p in found]
    # Arm processors with half precision compute in it.
    assert re.search("3 images: 2 known, 1 unknown, 0 failed; onnx-fp16 on onnxruntime in fp(16|32) on CPU", lines[5])


def test_one_bad_image_does_not_stop_the_others(export: Path, photos: Path) -> None:
    (photos / "bad.png").write_bytes((photos / "red.png").read_bytes()[:60])
    code, out, _ = run(export, photos, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [row["error"] is None for row in rows] == [False, True, True, True]
    assert "bad.png" in rows[0]["error"] and rows[0]["threshold"] == -2.0
    code, out, _ = run(export, photos)
    lines = [line.rstrip() for line in out.splitlines()]
    assert code == 1 and "1 failed" in out and "p known: " in out
    assert [line.split()[-1] for line in lines if line.startswith(f"{photos}/bad.png")] == ["ERROR"]
    (told,) = [line for line in lines if line.startswith("ERROR ")]
    assert told == f"ERROR {rows[0]['error']}"
    code, out, _ = run(export, photos / "bad.png")
    assert code == 1 and "p known: " not in out


@pytest.fixture
def damaged(photos: Path) -> Path:
    """A red JPEG that lost a part from its middle, and can still be decoded."""
    noise = np.random.default_rng(0).normal((200, 30, 30), 20, (120, 160, 3)).clip(0, 255)
    path = photos / "damaged.jpg"
    Image.fromarray(noise.astype(np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:3000] + content[3400:])
    return path


def test_a_damaged_picture_is_marked(export: Path, photos: Path, damaged: Path) -> None:
    pytest.importorskip("simplejpeg", reason="this machine has no wheel of it")
    code, out, _ = run(export, damaged, photos / "red.png", "--json")
    first, second = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and first["class_name"] == "red" and first["error"] is second["image_warning"] is None
    assert first["image_warning"].startswith("damaged image data (Corrupt JPEG data: ")
    _, out, _ = run(export, damaged)
    assert f"red ({first['image_warning']})" in out
    with ssod_edge.open(export) as predictor:
        assert predictor.predict(damaged).image_warning == first["image_warning"]


def test_strict_images_are_refused_like_any_that_cannot_be_read(export: Path, photos: Path, damaged: Path) -> None:
    pytest.importorskip("simplejpeg", reason="this machine has no wheel of it")
    code, out, _ = run(export, damaged, photos / "red.png", "--json", "--strict-images")
    first, second = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and second["error"] is None and first["class_name"] is first["image_warning"] is None
    assert first["error"].startswith(f"'{damaged}': damaged image data (Corrupt JPEG data: ")
    with open_runner(export) as runner, pytest.raises(ImageError, match="damaged image data"):
        Predictor(runner, strict_images=True).predict(damaged)


def test_an_argument_without_images_is_one_row(export: Path, photos: Path) -> None:
    (photos / "empty").mkdir()
    arguments = [photos / "empty", photos / "red.png", f"{photos}/*.bmp"]
    code, out, err = run(export, *arguments, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (1, "") and [row["image"] for row in rows] == [str(argument) for argument in arguments]
    assert "holds no images" in rows[0]["error"] and "no image matches" in rows[2]["error"]
    assert [row["known"] for row in rows] == [None, True, None] and rows[0]["threshold"] == -2.0
    code, _, err = run(export, photos / "empty", f"{photos}/*.bmp")
    assert code == 2 and "holds no images" in err


def test_control_characters_stay_in_their_row(export: Path, photos: Path) -> None:
    odd = paint(photos / "two\nlines\x1b[31m\u2028.png", "red")
    gone = photos / "gone\t.png"
    code, out, _ = run(export, odd, gone)
    assert code == 1 and len(out.splitlines()) == 6, "a heading, two rows, the error, what p known is, and the sum"
    assert r"two\nlines\x1b[31m\u2028.png" in out and r"gone\t.png': no such file" in out
    _, out, _ = run(export, odd, "--json")
    assert json.loads(out)["image"] == str(odd)


def shell(command: str, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A command line with redirections that only a shell can make; $0, $1, ... are the arguments."""
    return subprocess.run(
        ["sh", "-c", f'{sys.executable} -m ssod_edge {command}', *map(str, arguments)],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, **env},
    )  # fmt: skip


def test_streams_that_are_closed(export: Path, photos: Path) -> None:
    done = shell('predict "$0" "$1" --json <&-', export, photos / "red.png")
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["known"]
    done = shell('predict "$0" - <&-', export)
    assert (done.returncode, done.stderr) == (2, "error: '-' was given, and standard input is closed\n")
    done = shell('predict "$0" "$1" >&-', export, photos / "red.png")
    assert done.returncode == 1 and done.stderr.startswith("error: standard output is closed")
    done = shell('predict "$0" "$1" --json 2>&-', export, photos / "red.png")
    assert done.returncode == 0 and json.loads(done.stdout)["known"]


def test_a_terminal_without_the_letters_of_a_name(export: Path, photos: Path) -> None:
    done = shell('predict "$0" "$1"', export, paint(photos / "Grün.png", "green"), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and r"Gr\xfcn.png" in done.stdout and "1 known" in done.stdout


def test_a_list_through_a_pipe(export: Path, photos: Path) -> None:
    code, out, _ = run(export, "-", "--json", stdin=f"{photos}/sub/blue.jpg\n{photos}/red.png\n")
    assert code == 0
    assert [json.loads(line)["class_name"] for line in out.splitlines()] == ["blue", "red"]


def test_a_name_that_is_not_utf8(export: Path, photos: Path) -> None:
    odd = os.fsencode(photos) + b"/\xff[bold].png"
    os.rename(photos / "red.png", odd)  # a name in bytes, which Path does not take
    code, out, _ = run(export, "-", "--json", stdin=odd + b"\n")
    assert (code, json.loads(out)["image"]) == (0, os.fsdecode(odd))
    code, out, _ = run(export, "-", stdin=odd + b"\n")
    assert code == 0 and "\ufffd[bold].png" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{export}"], 2, "IMAGE"),
        (["{export}", "{photos}/*.bmp"], 2, "no image matches"),
        (["{export}/nowhere", "{photos}"], 2, "Give the folder of a run or an export"),
        (["{export}", "{photos}", "--artifact", "tensorrt"], 2, "it has"),
        (["{export}", "{photos}", "--device", "NPU"], 3, "NPU"),
        (["{export}", "{photos}", "--batch", "0"], 2, "batch"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(
    export: Path, photos: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run(*[argument.format(export=export, photos=photos) for argument in arguments])
    assert result[0] == code
    assert message in result[2] and "Traceback" not in result[2]


def test_untrained_weights(make_export: MakeExport, tmp_path: Path, photos: Path) -> None:
    folder = make_export(tmp_path / "untrained", trained=False)
    code, _, err = run(folder, photos)
    assert code == 2 and "untrained" in err
    code, out, err = run(folder, photos, "--allow-untrained", "--json")
    assert code == 0 and "mean nothing" in err
    assert [(row["known"], row["threshold"]) for row in map(json.loads, out.splitlines())] == [(None, None)] * 3
    code, out, _ = run(folder, photos, "--allow-untrained")
    assert code == 0 and "no threshold" in out


def test_an_interrupt_ends_it_at_once(export: Path, tmp_path: Path) -> None:
    paths = "\n".join([str(paint(tmp_path / "red.png", "red", (2000, 2000)))] * 20_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "ssod_edge", "predict", str(export), "-", "--json", "--threads", "1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(paths)
    process.stdin.close()
    process.stdout.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.stderr is not None and process.stderr.read() == "interrupted\n"
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - began < 10


def test_progress_is_shown_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssod_edge.runtime.report import _with_progress

    listing = Listing([f"{number}.png" for number in range(50)])
    assert list(_with_progress(range(50), listing)) == list(range(50))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(_with_progress(range(50), listing)) == list(range(50))
    assert capsys.readouterr().out == "", "standard output is for results"


def test_an_interrupt_still_prints_the_rows_that_are_done(export: Path, photos: Path) -> None:
    from ssod_edge.runtime.report import _print_table

    with ssod_edge.open(export) as model:

        def interrupted() -> Iterator[object]:
            yield model.predict(photos / "red.png")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            _print_table(interrupted(), Listing(["red.png", "blue.png"]), model.runner)
