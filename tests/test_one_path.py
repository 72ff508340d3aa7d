"""Every command sees a picture through the one path: the model's fit, its region, and its reduced decoding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from colour import SIZE, edit_spec
from PIL import Image

import ssod_edge
from ssod_edge.cli import main
from ssod_edge.config import Preprocess
from ssod_edge.data.named import Via
from ssod_edge.data.pixels import read_pixels
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import Predictor
from ssod_edge.spec import load_spec

WAYS = {
    "crop": {},
    "squash": {"fit": "squash"},
    "pad": {"fit": "pad"},
    "region": {"roi": (40, 30, 300, 70)},
    "region, padded": {"roi": (40, 30, 300, 70), "fit": "pad"},
    "version 1": {"version": 1},
}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def settings(request: pytest.FixtureRequest) -> Preprocess:
    return Preprocess(input_size=SIZE, **request.param)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A JPEG of 480 x 120, which comes reduced: from red at the left over green to blue, with detail."""
    x, rng = np.mgrid[:120, :480][1] / 480, np.random.default_rng(0)
    ramps = np.stack([1 - 2 * x, 1 - np.abs(2 * x - 1), 2 * x - 1], 2).clip(0) * 200
    (tmp_path / "photos" / "red").mkdir(parents=True)
    path = tmp_path / "photos" / "red" / "0.jpg"
    Image.fromarray(np.uint8((ramps + rng.normal(20, 25, ramps.shape)).clip(0, 255))).save(path, quality=95)
    return path


@pytest.fixture
def model(make_export: Callable[..., Path], settings: Preprocess, tmp_path: Path) -> Path:
    folder = make_export(tmp_path / "export")
    edit_spec(folder, lambda spec: replace(spec, preprocess=settings))
    return folder


def score(model: Path, pixels: np.ndarray) -> float:
    with open_runner(model, engine="onnxruntime") as runner:
        return float(runner.infer({"image": pixels[None]})["ood_score"][0])


def test_the_ways_differ(photo: Path) -> None:
    found = [read_pixels(photo, Preprocess(input_size=SIZE, **way)).tobytes() for way in WAYS.values()]
    assert len(set(found)) == len(WAYS)


def test_predict(model: Path, photo: Path, settings: Preprocess) -> None:
    expected = score(model, read_pixels(photo, settings))
    done = CliRunner().invoke(main, ["predict", str(model), str(photo), "--json", "--engine", "onnxruntime"])
    assert json.loads(done.stdout)["ood_score"] == expected
    with ssod_edge.open(model, engine="onnxruntime") as predictor:
        assert predictor.predict(photo).ood_score == predictor.predict(photo.read_bytes()).ood_score == expected


def test_a_frame_of_a_video(model: Path, photo: Path, settings: Preprocess, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs the extra 'video'")
    writer = cv2.VideoWriter(str(tmp_path / "one.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 25, (480, 120))
    writer.write(cv2.imread(str(photo)))
    writer.release()
    arguments = ["predict", str(model), str(tmp_path / "one.avi"), "--json", "--engine", "onnxruntime"]
    (line,) = CliRunner().invoke(main, arguments).stdout.splitlines()
    with Image.open(photo) as frame:  # decoded in full: a frame comes as it is
        assert json.loads(line)["ood_score"] == pytest.approx(score(model, read_pixels(frame, settings)), abs=0.05)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_calibrate(model: Path, photo: Path, settings: Preprocess, kind: str) -> None:
    for number in range(1, 20):
        shutil.copy(photo, photo.with_name(f"{number}.jpg"))
    photo.with_suffix(".svg").write_text("<svg/>")
    data = str(photo.parent.parent)
    if kind == "tar":
        pytest.importorskip("timm", reason="needs the extra train")
        data = shutil.make_archive(data, "tar", data)
    done = CliRunner().invoke(main, ["calibrate", str(model), "--id", data, "--artifact", "onnx-fp32"])
    assert done.exit_code == 0, done.output
    assert done.stderr.count("left out: 1 file that is no image (.svg)") == 1
    threshold = load_spec(model).artifact("onnx-fp32").threshold
    assert threshold is not None and threshold.value == score(model, read_pixels(photo, settings))


def test_bench(model: Path, photo: Path, settings: Preprocess) -> None:
    pytest.importorskip("timm", reason="needs the extra train")
    from ssod_edge.bench.images import choose_images, query_images
    from ssod_edge.bench.query import ImageQuery, encode
    from ssod_edge.data.named import NamedData
    from ssod_edge.runtime.export import Export

    export = Export.at(model)
    for via_size in (None, 12):
        images = choose_images(export, NamedData(id_data=str(photo.parent.parent), via_size=via_size))
        assert images.known is not None
        found = images.known.read(0, settings)
        np.testing.assert_array_equal(found, read_pixels(photo, settings, via=via_size and Via(via_size)))
        with open_runner(model) as runner:
            query = ImageQuery(runner, encode(query_images(images, export, 1)[0]), batch=1)
            query()
        if via_size is None:
            assert np.abs(query.pixels[0].astype(int) - found).mean() < 1, "it was a JPEG once more"


def test_bench_without_data_takes_the_reference(model: Path, settings: Preprocess) -> None:
    from ssod_edge.bench.images import BenchImages, query_images
    from ssod_edge.bench.query import ImageQuery, encode
    from ssod_edge.runtime.export import Export

    with open_runner(model) as runner:
        query = ImageQuery(runner, encode(query_images(BenchImages(None), Export.at(model), 4)[0]), batch=1)
        query()
    reference = Export.at(model).reference()["image"][0]
    if settings.fit != "pad" or settings.roi is None:
        assert np.abs(query.pixels[0].mean((1, 2)) - reference.mean((1, 2))).max() < 4


@pytest.mark.parametrize("via_size", [None, 12])
def test_eval_and_export(photo: Path, settings: Preprocess, via_size: int | None) -> None:
    pytest.importorskip("timm", reason="needs the extra train")
    from ssod_edge.data.images import whole_dataset
    from ssod_edge.training.batches import EvalImages

    images = whole_dataset(str(photo.parent.parent))
    expected = read_pixels(photo, settings, via=via_size and Via(via_size))
    np.testing.assert_array_equal(
        EvalImages(images.source, None, settings, via_size and Via(via_size))[0][0].numpy(), expected
    )
    if via_size is None:
        np.testing.assert_array_equal(images.read(settings, images.indices)[0][0], expected)


def test_explain(photo: Path, settings: Preprocess) -> None:
    pytest.importorskip("timm", reason="needs the extra train")
    from ssod_edge.evaluation.explain import explain
    from ssod_edge.training.model import build_model

    whole = replace(settings, input_size=32)
    found = explain(build_model("test_resnet", ("a", "b"), whole).eval(), photo)
    np.testing.assert_array_equal(found.patches.image, read_pixels(photo, whole))


def test_a_picture_that_the_region_is_not_in_is_one_that_cannot_be_read(export: Path, photo: Path) -> None:
    edit_spec(export, lambda spec: replace(spec, preprocess=Preprocess(input_size=SIZE, roi=(40, 30, 441, 70))))
    done = CliRunner().invoke(main, ["predict", str(export), str(photo), "--json"])
    assert done.exit_code == 1
    assert "the region 40,30,441,70 does not lie within its 480 x 120 pixels" in json.loads(done.stdout)["error"]
    with open_runner(export) as runner:
        assert [verdict.error is None for verdict in Predictor(runner).predict_many([photo, photo])] == [False] * 2
