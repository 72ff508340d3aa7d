"""`examples/cpp`, built by CMake and run: the verdicts of `predict`, the golden frames, and a line for what is bad."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from colour import edit_spec, paint
from PIL import Image
from places import ROOT

import ssod_edge
from ssod_edge.export.frame import write_frame_graphs
from ssod_edge.spec import load_spec

onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

#: Where `.ci/run` has ONNX Runtime's headers put, and where a distribution has them.
HEADERS = (ROOT / "build/onnxruntime-headers", Path("/usr/include/onnxruntime"))
PROGRAMS = {"ssod-openvino": "openvino-fp32", "ssod-onnxruntime": "onnx-fp32"}


class Done(NamedTuple):
    code: int
    rows: list[list[str]]
    error: str


Run = Callable[..., Done]


def headers_are_here(*names: str) -> bool:
    words = [word for name in names for word in ("-include", name)]
    command = [os.environ.get("CXX", "c++"), "-fsyntax-only", "-x", "c++", *words, os.devnull]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both programs."""
    for tool in ("cmake", "make", os.environ.get("CXX", "c++")):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not here")
    if not headers_are_here("turbojpeg.h", "png.h", "nlohmann/json.hpp"):
        pytest.skip("not all of libturbojpeg0-dev, libpng-dev and nlohmann-json3-dev are here")
    folder = tmp_path_factory.mktemp("cpp")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    headers = next((place for place in HEADERS if (place / "onnxruntime_cxx_api.h").is_file()), HEADERS[0])
    options = {
        "OpenVINO_DIR": Path(openvino.__file__).parent / "cmake",
        "ONNXRUNTIME_LIBRARY": library,
        "ONNXRUNTIME_INCLUDE_DIR": headers if headers.is_dir() else "",
    }
    words = [f"-D{name}={value}" for name, value in options.items()]
    for command in (["-S", str(ROOT / "examples/cpp"), "-B", str(folder), *words], ["--build", str(folder)]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "warning:" not in done.stderr, done.stdout + done.stderr
    assert (folder / "ssod-openvino").is_file()
    return folder


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request: pytest.FixtureRequest, built: Path) -> Path:
    path: Path = built / request.param
    if not path.is_file():
        pytest.skip("ONNX Runtime's headers are not here: scripts/onnxruntime_headers.sh build/onnxruntime-headers")
    return path


@pytest.fixture(scope="module")
def frames(export_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs of the colour classifier; nobody changes them."""
    folder = tmp_path_factory.mktemp("frames")
    write_frame_graphs(export_template, folder)
    return folder


@pytest.fixture
def run(program: Path, frames: Path, tmp_path: Path) -> Run:
    """The program on the graph of its engine; its home folder stays empty."""

    def run(*words: str | Path, folder: Path = frames, graph: str = PROGRAMS[program.name]) -> Done:
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        command = [str(word) for word in (program, folder, graph, *words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**clean(), "HOME": str(home)})
        assert not list(home.iterdir()), "the engine's reports of its use are off"
        return Done(done.returncode, [line.split("\t") for line in done.stdout.splitlines()], done.stderr)

    return run


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}


@pytest.fixture
def copied(frames: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(frames, tmp_path / "copied"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def write_pictures(folder: Path) -> list[Path]:
    """Files of each kind and form: sides of other colours, so that what is cut off or turned around shows."""
    folder.mkdir()
    rng, paths = np.random.default_rng(0), []
    for number, (height, width) in enumerate(((33, 21), (40, 90), (9, 7), (64, 48), (300, 420))):
        picture = rng.integers(0, 60, (height, width, 3), np.uint8)
        picture[: height // 2, :, number % 3] += 150
        picture[:, : width // 3, (number + 1) % 3] += 90
        image = Image.fromarray(picture)
        for ending, options in (("png", {}), ("jpg", {"quality": 90})):
            paths.append(folder / f"{number}.{ending}")
            image.save(paths[-1], **options)
    for colour in ("red", "green", "blue", "grey"):
        paths.append(paint(folder / f"{colour}.jpg", colour, (70, 50)))
    for mode in ("L", "RGBA", "P", "LA"):
        paths.append(folder / f"{mode}.png")
        image.convert(mode).save(paths[-1])
    image.convert("L").save(folder / "L.jpg")
    image.save(folder / "progressive.jpg", progressive=True)
    return [*paths, folder / "L.jpg", folder / "progressive.jpg"]


@pytest.mark.parametrize("channels", ["RGB", pytest.param("BGR", marks=pytest.mark.slow)])
def test_verdicts_of_predict(
    export: Path, run: Run, program: Path, tmp_path: Path, channels: Any, frames: Path
) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    if channels == "BGR":
        write_frame_graphs(export, tmp_path / "frames", channels)
    done = run(*pictures, folder=frames if channels == "RGB" else tmp_path / "frames")
    assert done.code == 0 and done.error == "" and len(done.rows) == len(pictures)
    with ssod_edge.open(export, artifact=PROGRAMS[program.name]) as model:
        verdicts = list(model.predict_many(pictures))
    for picture, row, verdict in zip(pictures, done.rows, verdicts, strict=True):
        name, label, probability, score, known = row
        assert (name, label, known) == (str(picture), verdict.class_name, "known" if verdict.known else "unknown")
        assert float(probability) == pytest.approx(verdict.confidence, abs=0.005)
        assert float(score) == pytest.approx(verdict.ood_score, abs=0.02)
    assert {verdict.known for verdict in verdicts} == {True, False}


def test_a_large_jpeg_is_decoded_as_predict_does(
    export: Path, run: Run, program: Path, tmp_path: Path, copied: Path
) -> None:
    """In full where the settings say so, and reduced by default."""
    picture = tmp_path / "large.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (160, 200, 3), np.uint8)
    Image.fromarray(noise).resize((800, 640), Image.Resampling.NEAREST).save(picture, quality=95)
    scores = {}
    for version in (1, 2):
        edit(copied / "frame.json", lambda document, version=version: document["preprocess"].update(version=version))
        preprocess = load_spec(export).preprocess.changed(version=version)
        edit_spec(export, lambda spec, preprocess=preprocess: replace(spec, preprocess=preprocess))
        with ssod_edge.open(export, artifact=PROGRAMS[program.name]) as model:
            expected = model.predict(picture).ood_score
        ((_, _, _, score, _),) = run(picture, folder=copied).rows
        assert float(score) == pytest.approx(expected, abs=2e-3)
        scores[version] = expected
    assert scores[1] != scores[2]


def test_golden_frames(run: Run, frames: Path) -> None:
    done = run("--golden", frames / "golden")
    assert done.code == 0 and done.error == ""
    ((told,),) = done.rows
    assert told.startswith("10 of 10 golden frames are right; logits are up to")


def test_what_differs_from_golden_is_told(run: Run, copied: Path, program: Path) -> None:
    place = copied / "golden"

    def spoil(document: dict[str, Any]) -> None:
        outputs = document["graphs"][PROGRAMS[program.name]]["outputs"]
        outputs[2]["logits"][1] += 0.5
        outputs[4]["ood_score"] += 0.5
        outputs[5]["known"] = not outputs[5]["known"]

    edit(place / "golden.json", spoil)
    picture = np.asarray(Image.open(place / "07.png")).copy()
    picture[3, 5, 1] ^= 1
    Image.fromarray(picture).save(place / "07.png")
    done = run("--golden", place)
    lines = [line for (line,) in done.rows]
    assert done.code == 1 and [line[:6] for line in lines] == ["02.bin", "04.bin", "05.bin", "07.png", "6 of 1"]
    assert "logits are 0.5 off" in lines[0] and "the score 0.5" in lines[1] and "pixels are not those" in lines[3]


def test_raw_frames(run: Run, frames: Path) -> None:
    golden = json.loads((frames / "golden/golden.json").read_text())
    for told in golden["frames"][:4]:
        shown = run(frames / "golden" / told["picture"]).rows
        raw = run("--raw", told["height"], told["width"], frames / "golden" / told["file"])
        assert raw.code == 0 and [row[1:] for row in raw.rows] == [row[1:] for row in shown]


def cut(path: Path, like: Path) -> Path:
    path.write_bytes(like.read_bytes()[: like.stat().st_size // 2])
    return path


def test_bad_input_is_one_line(run: Run, frames: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    png, jpeg = (next(path for path in pictures if path.name == name) for name in ("4.png", "4.jpg"))
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(deep)
    raw = frames / "golden/00.bin"
    (tmp_path / "empty.jpg").touch()
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((tmp_path / "nowhere.jpg",), "nowhere.jpg': No such file"),
        ((tmp_path,), "Is a directory"),
        ((tmp_path / "empty.jpg",), "neither a JPEG nor a PNG"),
        ((raw,), "neither a JPEG nor a PNG"),
        ((cut(tmp_path / "cut.jpg", jpeg),), "cut.jpg': Premature end of JPEG file"),
        ((cut(tmp_path / "cut.png", png),), "cut.png': "),
        ((deep,), "16 bits a colour"),
        (("--raw", "16", "17", raw), "it has 768 bytes; 16 rows of 17 pixels have 816"),
        (("--raw", "0", "16", raw), "1 to 65535 rows and columns"),
        (("--raw", "4294967296", "4294967296", raw), "1 to 65535 rows and columns"),
        (("--raw", "16x", "16", raw), "'16x' is not a number of pixels"),
        (("--golden", tmp_path), "golden.json': No such file"),
    ]
    for words, message in cases:
        done = run(*words)
        assert (done.code, done.rows) == (1, []), words
        assert message in done.error and done.error.startswith("error: ") and done.error.count("\n") == 1, done.error


def test_usage(run: Run, program: Path) -> None:
    for words in ((), ("--raw", "16", "16"), ("--golden",), ("--golden", "a", "b")):
        done = run(*words)
        assert done.code == 2 and done.error.startswith("usage: FOLDER GRAPH PICTURE") and done.error.count("\n") == 1
    assert subprocess.run([program], capture_output=True, check=False).returncode == 2


def test_a_graph_that_is_no_frame_graph(run: Run, copied: Path, export: Path, program: Path) -> None:
    graph = PROGRAMS[program.name]
    document = json.loads((copied / "frame.json").read_text())
    main = copied / document["graphs"][graph]["main_file"]
    for file in load_spec(export).artifact(graph).files:
        shutil.copy(export / file, main.parent / (main.name if Path(file).suffix == main.suffix else Path(file).name))
    done = run("a.jpg", folder=copied)
    assert done.code == 1 and "is not of `ssod-edge export --frame`: it takes no frame" in done.error
    main.unlink()
    for folder, name, message in (
        (copied, graph, str(main)),
        (copied, "nope", "frame.json': it names no graph 'nope'"),
        (export, graph, "frame.json': No such file"),
    ):
        done = run("a.jpg", folder=folder, graph=name)
        assert done.code == 1 and message in done.error and done.error.count("\n") == 1, done.error
    document = json.loads((copied / "frame.json").read_text())
    (copied / "frame.json").write_text(json.dumps({**document, "input": {**document["input"], "channels": "NV12"}}))
    done = run("a.jpg", folder=copied)
    assert done.code == 1 and "its graphs take NV12, and this reads RGB and BGR alone" in done.error
    for text in ("", "{", "[]", "{}"):
        (copied / "frame.json").write_text(text)
        done = run("a.jpg", folder=copied)
        assert done.code == 1 and "frame.json': " in done.error and done.error.count("\n") == 1, done.error


def test_a_frame_that_does_not_hold_the_region(run: Run, copied: Path, tmp_path: Path) -> None:
    edit(copied / "frame.json", lambda document: document["preprocess"].update(roi=[10, 5, 30, 20]))
    assert run(paint(tmp_path / "fits.png", "red", (40, 25)), folder=copied).code == 0
    for size in ((39, 25), (40, 24)):
        done = run(paint(tmp_path / "small.png", "red", size), folder=copied)
        assert done.code == 1 and "the frame is smaller than the region [10,5,30,20]" in done.error
