"""Thresholds: fitted to the artifact's own scores, verified, written; or nothing changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from colour import BIAS, colour_images, edit_graph, edit_spec, write_colours
from interrupt import interrupt_while_reading
from PIL import Image

from ssod_edge.cli import main
from ssod_edge.errors import UsageError, VerificationError
from ssod_edge.runtime.calibrate import calibrate, fit_threshold
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import Predictor
from ssod_edge.spec import load_spec

MakeExport = Callable[..., Path]
ARTIFACTS = ("onnx-fp32", "onnx-fp16", "openvino-fp32", "openvino-fp16")


def save_photos(folder: Path, n: int) -> Path:
    """n images of strong colours, as CLASS/IMAGE.png."""
    for i, pixels in enumerate(colour_images(n, seed=5)):
        path = folder / f"class{i % 2}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    return folder


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["calibrate", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def pictures(n: int, seed: int = 1) -> list[np.ndarray]:
    """HWC images of the input's own size, so that their pixels are the graph's."""
    return [pixels.transpose(1, 2, 0) for pixels in colour_images(n, seed)]


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_the_quantile_of_the_artifacts_own_scores(export: Path, artifact: str) -> None:
    with open_runner(export, artifact=artifact) as runner:
        scores = np.sort(runner.infer({"image": colour_images(99, 1)})["ood_score"])
        threshold = fit_threshold(runner, pictures(99), 0.9, "test")
    assert threshold.value == pytest.approx(scores[89], abs=1e-5), "ceil(100 * 0.9) = the 90th"
    assert (threshold.n, threshold.target_tpr, threshold.data) == (99, 0.9, "test")
    assert threshold.fitted_tpr == pytest.approx(90 / 99)


@pytest.mark.parametrize(("n", "message"), [(0, "no images were given"), (18, "19")])
def test_too_few_images_are_refused(export: Path, n: int, message: str) -> None:
    with open_runner(export) as runner, pytest.raises(UsageError, match=message):
        fit_threshold(runner, pictures(n))


def test_unreadable_images_are_named(export: Path, tmp_path: Path) -> None:
    images = [*pictures(30), tmp_path / "gone.png"]
    named: list[str] = []
    with open_runner(export) as runner:
        assert fit_threshold(runner, images, unreadable=named.append).n == 30
        assert fit_threshold(runner, images).n == 30
    assert len(named) == 1 and "gone.png" in named[0]


def test_untrained_weights_have_no_threshold(make_export: MakeExport, tmp_path: Path) -> None:
    folder = make_export(tmp_path / "untrained", trained=False)
    with open_runner(folder, allow_untrained=True) as runner:
        for fit in (lambda: fit_threshold(runner, pictures(40)), lambda: calibrate(runner, folder, pictures(40))):
            with pytest.raises(UsageError, match="untrained"):
                fit()
    code, _, err = run(folder, "--id", tmp_path)
    assert code == 2 and "untrained" in err


def test_threshold_and_figures_are_written_together(export: Path) -> None:
    with open_runner(export, artifact="onnx-fp32") as runner:
        written = calibrate(runner, export, pictures(50), 0.95, "fifty")
        assert runner.artifact == written
    spec = load_spec(export)
    assert spec.artifact("onnx-fp32") == written
    assert written.threshold is not None and written.threshold.data == "fifty"
    assert written.verification is not None and written.verification["decision_flips"] <= 1
    assert spec.artifact("onnx-fp16").threshold.value == -2.0, "the others keep theirs"


def test_nothing_is_written_when_verification_fails(export: Path) -> None:
    edit_graph(export, "onnx-fp32", bias=BIAS + 1)
    before = (export / "ssod.json").read_bytes()
    with open_runner(export, artifact="onnx-fp32") as runner, pytest.raises(VerificationError):
        calibrate(runner, export, pictures(50))
    assert (export / "ssod.json").read_bytes() == before


def test_the_command_fits_every_artifact_to_a_folder(export: Path, tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos", 60)
    code, out, err = run(export, "--id", photos, "--tpr", "0.9")
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == [a.name for a in load_spec(export).artifacts]
    for artifact in load_spec(export).artifacts:
        threshold = artifact.threshold
        assert (threshold.n, threshold.target_tpr, threshold.data) == (60, 0.9, "folder 'photos', 60 images")
        with Predictor(open_runner(export, artifact=artifact.name)) as predictor:
            known = sum(v.known is True for v in predictor.predict_many(sorted(photos.rglob("*.png"))))
        assert known == 55, "ceil(61 * 0.9)"


@pytest.mark.parametrize("as_tar", [False, True])
def test_images_of_other_things_do_not_move_the_threshold(export: Path, tmp_path: Path, as_tar: bool) -> None:
    if as_tar:
        pytest.importorskip("timm", reason="a .tar file is opened by what training opens it with")
    data = write_colours(tmp_path / "photos", 12)
    run(export, "--id", data, "--tpr", "0.9", "--artifact", "onnx-fp32")
    alone = load_spec(export).artifact("onnx-fp32").threshold
    (data / "zebra").mkdir()
    for index in range(8):
        Image.new("RGB", (20, 24), (128, 128, 120 + index)).save(data / "zebra" / f"{index}.png")
    named: Path = data
    if as_tar:
        named = Path(shutil.make_archive(str(tmp_path / "packed"), "tar", data))
    code, _, err = run(export, "--id", named, "--tpr", "0.9", "--artifact", "onnx-fp32")
    mixed = load_spec(export).artifact("onnx-fp32").threshold
    assert code == 0 and "left out: 8 of 44 images" in err
    assert alone is not None and mixed is not None and (mixed.value, mixed.n) == (alone.value, 36)
    # Folders that name no class at all, such as those of days, are taken whole.
    for name in ("red", "green", "blue"):
        (data / name).rename(data / f"day-{name}")
    assert run(export, "--id", data, "--tpr", "0.9", "--artifact", "onnx-fp32")[2] == ""
    assert load_spec(export).artifact("onnx-fp32").threshold.n == 44  # type: ignore[union-attr]


def test_unlabelled_frames_of_a_shifted_camera_are_accepted_again(export: Path, tmp_path: Path) -> None:
    """The line says how many of them the former threshold kept."""
    frames = save_photos(tmp_path / "frames", 50)
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, path in enumerate(sorted(frames.rglob("*.png"))):
        path.rename(flat / f"{index}.png")
    with open_runner(export, artifact="onnx-fp32") as runner:
        scores = np.sort([v.ood_score for v in Predictor(runner).predict_many(sorted(flat.glob("*.png")))])
        assert runner.artifact.threshold is not None
        former = replace(runner.artifact.threshold, value=float(scores[29]))
    edit_spec(export, lambda spec: replace(spec, artifacts=tuple(replace(a, threshold=former) for a in spec.artifacts)))
    code, out, err = run(export, "--id", flat, "--artifact", "onnx-fp32")
    assert (code, err) == (0, "")
    assert "keeps 98.0% of 50 images known, before 60.0% (46.2-72.4) (target 95%)" in out


def test_a_read_only_export_is_found_before_the_work(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = save_photos(tmp_path / "photos", 60)
    monkeypatch.setattr("ssod_edge.files.os.access", lambda path, mode: False)
    monkeypatch.setattr("ssod_edge.runtime.calibrate.calibrate", lambda *_: pytest.fail("no image may be run"))
    code, out, err = run(export, "--id", photos)
    assert (code, out) == (1, "") and "its folder is read-only" in err


def test_one_artifact_and_a_run_folder(export: Path, tmp_path: Path) -> None:
    code, out, _ = run(export.parent, "--id", save_photos(tmp_path / "photos", 30), "--artifact", "onnx-fp16")
    assert code == 0 and out.startswith("onnx-fp16: threshold -2.0000 -> ")
    values = {a.name: a.threshold.value for a in load_spec(export).artifacts}
    assert values.pop("onnx-fp16") != -2.0 and set(values.values()) == {-2.0}


def test_unreadable_images_are_left_out_and_reported_once(export: Path, tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos", 30)
    (photos / "bad.png").write_bytes(b"")
    code, out, err = run(export, "--id", photos)
    assert code == 1 and len(out.splitlines()) == 4
    assert err.count("bad.png") == 1
    assert load_spec(export).artifacts[0].threshold.n == 30


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("{}/few", [], "19"),
        ("{}/empty", [], "holds no images"),
        ("{}/broken", [], "could be read"),
        ("{}/nowhere", [], "does not exist"),
        ("{}/few", ["--tpr", "1.5"], "target_tpr"),
        ("{}/few", ["--artifact", "x"], "it has"),
    ],
)
def test_wrong_arguments_change_nothing(
    export: Path, tmp_path: Path, data: str, options: list[str], message: str
) -> None:
    save_photos(tmp_path / "few", 10)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"broken")
    before = (export / "ssod.json").read_bytes()
    code, _, err = run(export, "--id", data.format(tmp_path), *options)
    assert code == 2 and message in err
    assert (export / "ssod.json").read_bytes() == before


def test_what_cannot_run_keeps_its_threshold_and_is_reported(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    edit_graph(export, "onnx-fp32", bias=BIAS + 1)
    code, out, err = run(export, "--id", save_photos(tmp_path / "photos", 30))
    assert code == 4 and out.startswith("onnx-fp16: ") and len(out.splitlines()) == 1
    assert err.count("not calibrated") == 3 and "pip install" in err and "max_abs_logit_diff" in err
    thresholds = {a.name: a.threshold.value for a in load_spec(export).artifacts}
    assert [name for name, value in thresholds.items() if value != -2.0] == ["onnx-fp16"]


@pytest.mark.parametrize("damaged", ["model-fp32.onnx", "openvino-fp16/model.bin"])
def test_a_damaged_artifact_does_not_stop_the_others(export: Path, tmp_path: Path, damaged: str) -> None:
    (export / damaged).write_bytes(b"damaged")
    code, out, err = run(export, "--id", save_photos(tmp_path / "photos", 30))
    assert code == 4 and len(out.splitlines()) == 3
    assert err.count("not calibrated") == 1 and "was changed or cut short" in err
    kept = [a.name for a in load_spec(export).artifacts if a.threshold.value == -2.0]
    assert kept == ["onnx-fp32" if damaged.endswith("onnx") else "openvino-fp16"]


def test_a_folder_needs_no_torch(export: Path, tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos", 30)
    code = (
        "import sys; sys.modules.update(torch=None, timm=None)\n"
        f"from ssod_edge.cli import main; main(['calibrate', {str(export)!r}, '--id', {str(photos)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_training_data_gives_its_calibration_split_alone(export: Path, tmp_path: Path) -> None:
    """Thresholds fitted to images that were trained on would be too tight."""
    pytest.importorskip("timm")
    from ssod_edge.data.sources import open_dataset
    from ssod_edge.data.splits import Splits

    photos = save_photos(tmp_path / "photos", 60)
    dataset = open_dataset(str(photos))
    calib = list(range(0, 60, 2))
    splits = Splits(np.arange(3, 60, 2), np.array([1]), np.array(calib))
    source = {"data": str(photos), "data_fingerprint": dataset.fingerprint, "splits_hash": splits.hash}
    edit_spec(export, lambda spec: replace(spec, source=source))
    code, _, err = run(export, "--id", photos)
    assert code == 2 and "the model was trained on" in err and "which of these images were held out" in err
    (export.parent / "splits.json").write_text(json.dumps({"val": [1], "calib": [*calib, 3]}))  # 3 was trained on
    code, _, err = run(export, "--id", photos)
    assert code == 2 and "was changed after training" in err
    (export.parent / "splits.json").write_text(json.dumps({"val": [1], "calib": calib}))
    code, _, err = run(export, "--id", photos, "--artifact", "onnx-fp32")
    assert (code, err) == (0, "")
    artifact = load_spec(export).artifact("onnx-fp32")
    assert artifact.threshold.n == 30 and f"calib split {splits.hash[:12]}" in artifact.threshold.data
    with Predictor(open_runner(export, artifact="onnx-fp32")) as predictor:
        verdicts = predictor.predict_many(dataset.image(i) for i in calib)
        assert max(v.ood_score for v in verdicts) >= artifact.threshold.value
    shutil.copytree(photos, tmp_path / "copy")
    code, _, err = run(export, "--id", tmp_path / "copy", "--artifact", "onnx-fp32")
    assert (code, err) == (0, "") and load_spec(export).artifact("onnx-fp32").threshold.n == 30
    (Path(dataset.source(0)) if Path(dataset.source(0)).is_absolute() else photos / dataset.source(0)).write_bytes(b"")
    code, _, err = run(export, "--id", photos, "--artifact", "onnx-fp32")
    assert code == 1 and "left out" in err


def test_the_calibration_split_may_be_of_validation_images_that_were_named(export: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from ssod_edge.data.sources import open_training_data
    from ssod_edge.data.splits import Splits

    photos, val = save_photos(tmp_path / "photos", 20), save_photos(tmp_path / "val", 60)
    dataset = open_training_data(str(photos), str(val))
    calib = list(range(20, 80, 2))
    splits = Splits(np.arange(20), np.arange(21, 80, 2), np.array(calib))
    record = {"data_fingerprint": dataset.fingerprint, "splits_hash": splits.hash, **dataset.val_record}
    edit_spec(export, lambda spec: replace(spec, source={"data": str(photos), **record}))
    (export.parent / "splits.json").write_text(json.dumps({"val": splits.val.tolist(), "calib": calib}))
    code, _, err = run(export, "--id", photos, "--artifact", "onnx-fp32")
    assert (code, err) == (0, "")
    assert load_spec(export).artifact("onnx-fp32").threshold.n == 30
    code, _, err = run(export, "--id", f"{photos}/train")
    assert code == 2 and "a threshold needs new ones" in err


def test_the_images_of_weights_trained_elsewhere_are_all_taken(export: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from ssod_edge.data.sources import open_dataset

    photos = save_photos(tmp_path / "photos", 30)
    source = {"data": str(photos), "data_fingerprint": open_dataset(str(photos)).fingerprint}
    edit_spec(export, lambda spec: replace(spec, source=source))
    assert run(export, "--id", photos, "--artifact", "onnx-fp32")[0] == 0
    assert load_spec(export).artifact("onnx-fp32").threshold.n == 30


def test_an_interrupt_changes_nothing(export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (1500, 1500), "red").save(folder / "0.png")
    for index in range(1, 4000):  # more than are read before a busy machine looks
        (folder / f"{index}.png").hardlink_to(folder / "0.png")
    before = (export / "ssod.json").read_bytes()
    assert interrupt_while_reading(folder, "calibrate", export, "--id", folder) == (
        130,
        "interrupted: the export is as it was\n",
    )
    assert (export / "ssod.json").read_bytes() == before


def test_where_no_image_can_be_read_the_first_reason_is_shown(export: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with open_runner(export) as runner, pytest.raises(UsageError, match=r"could be read: mine \(.*a.png': it is empty"):
        fit_threshold(runner, [tmp_path / "a.png"], data="mine")


def test_a_damaged_photo_sets_no_threshold(export: Path, tmp_path: Path) -> None:
    pytest.importorskip("simplejpeg")
    photos = []
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        photos.append(tmp_path / f"{number}.jpg")
        Image.fromarray(pixels).save(photos[-1], quality=95)
    content = bytearray(photos[0].read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    photos[0].write_bytes(content)
    failed: list[str] = []
    with open_runner(export) as runner:
        threshold = fit_threshold(runner, photos, unreadable=failed.append)
    assert threshold.n == 29 and len(failed) == 1 and "0.jpg" in failed[0] and "damaged" in failed[0]
