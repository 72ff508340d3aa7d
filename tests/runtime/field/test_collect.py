"""Collecting: what is kept and what is not, within a budget, through kills, other processes and a full disk."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from colour import SIZE, edit_spec
from full import full_disk
from PIL import Image

import ssod_edge
from ssod_edge import Collector
from ssod_edge.cli import main
from ssod_edge.config import Preprocess
from ssod_edge.data.pixels import read_pixels
from ssod_edge.errors import OutputError, UsageError
from ssod_edge.files import append_lines, sha256_file
from ssod_edge.runtime.field import collect as module
from ssod_edge.runtime.field.collect import weigh
from ssod_edge.runtime.field.descriptors import WIDTH, from_base64, of_pixels, to_base64, unit
from ssod_edge.runtime.field.review import carry_out, run_review
from ssod_edge.runtime.field.shelf import INDEX, Collected, Shelf
from ssod_edge.runtime.predict import Predictor, Seen, Verdict
from ssod_edge.spec import Spec, Threshold

#: The colour classifier's threshold is -2: grey is unknown to it, a strong colour known.
THRESHOLD = Threshold(0.0, 0.95, 100, "calib", 0.95)


def picture(seed: int, colour: tuple[int, int, int] = (90, 90, 90), size: int = 48) -> Image.Image:
    """Of this mean colour, with a coarse pattern of its own."""
    pattern = np.random.default_rng(seed).integers(-60, 61, (4, 4, 1)).repeat(3, axis=2)
    pattern = pattern - pattern.mean(dtype=int)
    pixels = np.clip(np.array(colour) + pattern, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels.repeat(size // 4, 0).repeat(size // 4, 1))


def grey(folder: Path, n: int, start: int = 0) -> list[Path]:
    """n unknown pictures, no two alike."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:03}.png" for number in range(start, start + n)]
    for number, path in enumerate(paths, start):
        picture(number).save(path)
    return paths


def predict(export: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["predict", str(export), *map(str, arguments), "--engine", "onnxruntime", "--json"])


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / INDEX).read_text().splitlines()]


def images(folder: Path) -> set[str]:
    """What a kill leaves of a file that was being written is hidden."""
    return {path.name for path in folder.iterdir() if path.suffix in (".png", ".jpg") and path.name[0] != "."}


def open_model(export: Path) -> Predictor:
    return ssod_edge.open(export, engine="onnxruntime")


# What is kept


def test_unknown_images_are_kept_with_their_verdict_and_known_ones_are_not(export: Path, tmp_path: Path) -> None:
    grey(tmp_path / "photos", 3)
    picture(50, (230, 20, 20)).save(tmp_path / "photos" / "red.png")
    out = tmp_path / "kept"
    done = predict(export, tmp_path / "photos", "--collect", out)
    assert done.exit_code == 0 and "collected: 3 of 3 images" in done.stderr
    verdicts = {row["image"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert {row["source"] for row in lines(out)} == {name for name, row in verdicts.items() if not row["known"]}
    for row in lines(out):
        assert (out / row["file"]).read_bytes() == Path(row["source"]).read_bytes()
        same = ("class_name", "confidence", "ood_score", "threshold", "known", "p_known", "engine", "precision")
        assert {key: row[key] for key in same} == {key: verdicts[row["source"]][key] for key in same}
        assert len(row["artifact_sha256"]) == 64 and row["time"].endswith("+00:00") and row["frame"] is None
        assert row["artifact"] == "onnx-fp32" and row["score"] == "energy" and row["described_by"] == "pixels"
    assert images(out) == {row["file"] for row in lines(out)} and len(images(out)) == 3


def test_nothing_is_kept_unless_asked(export: Path, tmp_path: Path) -> None:
    grey(tmp_path / "photos", 2)
    before = sorted(tmp_path.rglob("*"))
    assert predict(export, tmp_path / "photos").exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before
    done = predict(export, tmp_path / "photos", "--collect-most", "5")
    assert done.exit_code == 2 and "--collect-most belongs to --collect DIR" in done.stderr


def test_the_weight_falls_from_the_threshold_on() -> None:
    verdict = Verdict("a", 0, "red", 0.9, -1.0, 0.0, True, 0.05, "onnxruntime", "fp32")
    assert weigh(replace(verdict, known=False), THRESHOLD) == 1
    assert weigh(verdict, THRESHOLD) == 1 and weigh(replace(verdict, p_known=0.10), THRESHOLD) == pytest.approx(0.5)
    for p in (0.16, 0.9, None):
        assert weigh(replace(verdict, p_known=p), THRESHOLD) == 0
    assert weigh(replace(verdict, known=None), THRESHOLD) == 0


def test_uncertain_known_images_are_kept(export: Path, tmp_path: Path) -> None:
    with open_model(export) as model, Collector(tmp_path / "kept", model) as collector:
        red = next(n for n in range(90, 250) if 0.05 < (model.predict(picture(1, (n, 60, 60))).p_known or 0) < 0.13)
        assert collector.kept and not any(row["known"] and row["weight"] <= 0 for row in lines(tmp_path / "kept"))
        model.predict(picture(77, (red, 60, 60)))
    known = [row for row in lines(tmp_path / "kept") if row["known"]]
    assert known and all(0 < row["weight"] <= 1 and row["p_known"] < 0.15 for row in known)


def test_near_duplicates_are_left_out(export: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one = picture(1)
    noisy = Image.fromarray(np.clip(np.array(one) + rng.normal(0, 3, (48, 48, 3)), 0, 255).astype(np.uint8))
    darker = Image.fromarray((np.array(one) * 0.9).astype(np.uint8))
    with open_model(export) as model, Collector(tmp_path / "kept", model) as collector:
        list(model.predict_many([one, noisy, darker, picture(2), one]))
        assert (collector.looked_at, collector.kept, collector.near_duplicates) == (5, 2, 3)
    with open_model(export) as model, Collector(tmp_path / "kept", model) as collector:  # by what lies there too
        model.predict(noisy)
        assert collector.kept == 0 and collector.near_duplicates == 1
    assert len(images(tmp_path / "kept")) == 2


def test_dark_frames_are_all_alike() -> None:
    rng = np.random.default_rng(0)
    dark = [unit(of_pixels(rng.integers(0, 12, (3, 64, 64)).astype(np.uint8))) for _ in range(5)]
    assert min(one @ other for one in dark for other in dark) > 0.97


def give_features(export: Path) -> None:
    """The colour classifier with its features as an output."""
    path = export / "model-fp32.onnx"
    graph = onnx.load(path)
    graph.graph.node.append(onnx.helper.make_node("Identity", ["z"], ["features_pooled"]))
    graph.graph.output.append(onnx.helper.make_tensor_value_info("features_pooled", onnx.TensorProto.FLOAT, ["N", 3]))
    onnx.save(graph, path)
    edit_spec(export, lambda spec: replace(spec, outputs=(*spec.outputs, "features_pooled")), rehash=True)


def with_another(export: Path) -> str:
    """Put an image that was taught into the reference; returns its hash."""
    path = export / "reference.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{name: np.concatenate([values[:-1], values[:1]]) for name, values in arrays.items()})
    return sha256_file(path)


def entry(spec: Spec) -> dict[str, Any]:
    """A version in the lineage of a later one."""
    return {"version": 1, "sha256": "0" * 64, "reference_sha256": spec.reference_sha256, "taught": {}}


def test_features_of_the_graph_say_what_is_alike_where_it_has_them(export: Path, tmp_path: Path) -> None:
    """The features are the mean colours: a pattern of another kind is the same to them."""
    give_features(export)
    with open_model(export) as model, Collector(tmp_path / "kept", model) as collector:
        for one in (picture(1, (90, 90, 90)), picture(2, (90, 90, 90)), picture(3, (20, 90, 90))):
            model.predict(one)
        assert collector.near_duplicates == 1
        kind = f"features:{model.runner.spec.reference_sha256[:12]}"
    assert {row["described_by"] for row in lines(tmp_path / "kept")} == {kind}


def test_descriptors_outlive_a_lesson(export: Path, tmp_path: Path) -> None:
    """A lesson changes the reference and not the features: what was collected before it is not collected again."""
    give_features(export)
    with open_model(export) as model, Collector(tmp_path / "kept", model) as collector:
        model.predict(picture(1))
        first = model.runner.spec.reference_sha256
    edit_spec(
        export,
        lambda spec: replace(
            spec, source={**spec.source, "version": 2, "lineage": [entry(spec)]}, reference_sha256=with_another(export)
        ),
        rehash=True,
    )
    with open_model(export) as model, Collector(tmp_path / "kept", model) as collector:
        assert model.runner.spec.reference_sha256 != first
        model.predict(picture(1))
        assert (collector.kept, collector.near_duplicates) == (0, 1)


def test_what_a_review_decided_on_does_not_come_back(export: Path, tmp_path: Path) -> None:
    out, photos = tmp_path / "kept", grey(tmp_path / "photos", 4)
    predict(export, *photos[:3], "--collect", out)
    of = {row["source"]: row["file"] for row in lines(out)}
    run_review(str(out), done=False, out=None)
    for photo, name in zip(photos[:2], ("discard", "cup"), strict=True):
        (out / "groups" / name).mkdir()
        (found,) = (out / "groups").rglob(of[str(photo)])
        found.rename(out / "groups" / name / found.name)
    run_review(str(out), done=True, out=None)
    assert images(out) == {of[str(photos[2])]}
    noisy = np.clip(np.array(Image.open(photos[0])) + np.random.default_rng(0).normal(0, 3, (48, 48, 3)), 0, 255)
    Image.fromarray(noisy.astype(np.uint8)).save(tmp_path / "photos" / "noisy.png")
    done = predict(export, tmp_path / "photos", "--collect", out)
    assert "collected: 1 of 5 images" in done.stderr and "1 near-duplicates left out, and 3 like those" in done.stderr
    assert images(out) == {row["file"] for row in lines(out) if row["source"] in map(str, photos[2:])}
    (out / "decisions.jsonl").unlink()
    assert "collected: 2 of 5 images" in predict(export, tmp_path / "photos", "--collect", out).stderr


def test_the_file_of_a_decision_is_known_to_every_model(export: Path, tmp_path: Path) -> None:
    """Also where the descriptors of the two models must not be compared."""
    out, (photo,) = tmp_path / "kept", grey(tmp_path / "photos", 1)
    predict(export, photo, "--collect", out)
    (line,) = lines(out)
    (out / line["file"]).unlink()
    decision = {"file": line["file"], "decision": "discarded", "collected": {**line, "described_by": "features:0"}}
    append_lines(out / "decisions.jsonl", [json.dumps(decision), "{cut short"])
    assert "0 near-duplicates left out, and 1 like those" in predict(export, photo, "--collect", out).stderr
    assert images(out) == set()


def test_a_review_that_ends_meanwhile_is_heard(export: Path, tmp_path: Path) -> None:
    out, photos = tmp_path / "kept", grey(tmp_path / "photos", 2)
    with open_model(export) as model, Collector(out, model) as collector:
        model.predict(photos[0])
        carry_out(out, out / "classes", {}, [out / lines(out)[0]["file"]], {})
        list(model.predict_many([photos[1], photos[0]]))
        assert (collector.kept, collector.decided, collector.near_duplicates) == (2, 1, 0)


def test_arrays_bytes_and_pictures_are_kept_as_files(export: Path, tmp_path: Path) -> None:
    content = grey(tmp_path / "photos", 1)[0].read_bytes()
    (tmp_path / "photo").write_bytes(grey(tmp_path / "photos", 1, 9)[0].read_bytes())
    with open_model(export) as model, Collector(tmp_path / "kept", model):
        for source in (content, np.array(picture(5)), picture(6), tmp_path / "photo"):
            model.predict(source)
    found = {row["source"]: row["file"] for row in lines(tmp_path / "kept")}
    assert (tmp_path / "kept" / found["bytes"]).read_bytes() == content
    assert {Path(found[name]).suffix for name in ("array", "PIL image")} == {".jpg"}
    assert Path(found[str(tmp_path / "photo")]).suffix == ".png"


def test_a_file_that_has_changed_since_its_verdict_is_not_kept(export: Path, tmp_path: Path) -> None:
    (path,) = grey(tmp_path / "photos", 1)
    with open_model(export) as model, Collector(tmp_path / "kept", model) as collector:
        model.watchers.insert(0, lambda seen: picture(7).save(path))
        model.predict(path)
        assert collector.looked_at == 1 and collector.kept == 0


def test_frames_of_a_video_are_kept_one_a_second(export: Path, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs the extra 'video'")
    writer = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 10, (48, 48))
    for number in range(25):
        writer.write(np.array(picture(number)))
    writer.release()
    done = predict(export, tmp_path / "a.avi", "--collect", tmp_path / "kept", "--smooth", "5")
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 25
    rows = lines(tmp_path / "kept")
    assert [row["frame"] for row in rows] == [0, 10, 20] and len(images(tmp_path / "kept")) == 3
    assert {row["source"] for row in rows} == {str(tmp_path / "a.avi")}


# Secrets


def test_sources_are_written_without_secrets(export: Path, tmp_path: Path) -> None:
    """Of an address it is what `ssod_edge.sources` makes of it; bytes of a path that are no UTF-8 are replaced."""
    path = tmp_path / "\udce4.png"
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(path)
    with open_model(export) as model, Collector(tmp_path / "kept", model) as collector:
        model.predict(path)
        (verdict,) = model.verdicts(["x"], model.runner.infer({"image": np.zeros((1, 3, SIZE, SIZE), np.uint8)}))
        odd = replace(verdict, image="rtsp://a:geheim@cam/live?b=geheim", known=False)
        collector.see(Seen(np.array(picture(2)), odd, np.full((3, SIZE, SIZE), 90, np.uint8), {}))
    assert [row["source"] for row in lines(tmp_path / "kept")] == [f"{tmp_path}/\ufffd.png", "rtsp://cam/live?..."]


# The budget


def test_the_number_of_images_is_held_and_variety_stays(export: Path, tmp_path: Path) -> None:
    """Of blends of two pictures and of others that are like none, the blends go first."""
    one, two = np.array(picture(1), float), np.array(picture(2), float)
    mixed = [Image.fromarray((a * one + (1 - a) * two).astype(np.uint8)) for a in (1, 0.75, 0.5, 0.25, 0)]
    lonely = [picture(number) for number in range(10, 14)]
    with open_model(export) as model, Collector(tmp_path / "kept", model, most=6) as collector:
        for source in (*mixed, *lonely):
            model.predict(source)
            assert len(images(tmp_path / "kept")) <= 6
        assert collector.looked_at == 9
    shelf = Shelf(tmp_path / "kept")
    described = [unit(of_pixels(read_pixels(one, Preprocess(input_size=SIZE)))) for one in lonely]
    assert all((shelf.vectors @ vector).max() > 0.95 for vector in described), "what is like no other stays"


def test_the_megabytes_are_held(export: Path, tmp_path: Path) -> None:
    paths = grey(tmp_path / "photos", 12)
    room = sum(path.stat().st_size for path in paths[:4]) + 1
    done = predict(export, tmp_path / "photos", "--collect", tmp_path / "kept", "--collect-mb", str(room / 1e6))
    assert done.exit_code == 0
    size = sum((tmp_path / "kept" / name).stat().st_size for name in images(tmp_path / "kept"))
    assert room / 2 < size <= room
    with open_model(export) as model, Collector(tmp_path / "tiny", model, megabytes=1e-6):
        model.predict(paths[0])
    assert images(tmp_path / "tiny") == set()


def a_line(file: str, descriptor: np.ndarray, weight: float = 1.0, kind: str = "pixels") -> Collected:
    return Collected(
        file=file, time="", source="", frame=None, class_name="red", confidence=0.5, ood_score=0.0, threshold=0.0,
        known=False, p_known=None, engine="", precision="", artifact="", artifact_sha256="", score="energy",
        weight=weight, described_by=kind, descriptor=to_base64(descriptor.astype(np.int8)),
    )  # fmt: skip


def test_the_less_certain_of_two_that_are_alike_stays(tmp_path: Path) -> None:
    one = np.random.default_rng(0).normal(0, 40, WIDTH)
    other = np.concatenate([-one[:30], one[30:]])
    shelf = Shelf(tmp_path)
    assert shelf.place(a_line("sure.png", one, 0.5), 1, 1, 100) == []
    assert shelf.place(a_line("surer.png", other, 0.4), 1, 1, 100) is None
    assert [line.file for line in shelf.lines] == ["sure.png"] and len(shelf.near) == 1
    assert shelf.place(a_line("unknown.png", other), 1, 1, 100) == ["sure.png"]


def test_the_least_informative_goes_as_defined(tmp_path: Path) -> None:
    """Against worth that is computed anew after each removal; of two kinds, which are not compared."""
    rng, shelf = np.random.default_rng(1), Shelf(tmp_path)
    centres, held = rng.normal(0, 30, (4, WIDTH)), []
    for number in range(60):
        vector = centres[rng.integers(4)] + rng.normal(0, 25, WIDTH)
        line = a_line(f"{number}.png", vector.clip(-127, 127), rng.uniform(0.2, 1), rng.choice(["a", "b"]))
        size = int(rng.integers(1, 9))
        expected = [*held, (line, size)]
        while len(expected) > 12 or sum(size for _, size in expected) > 50:
            vectors = np.stack([unit(from_base64(one.descriptor)) for one, _ in expected])
            kinds = np.array([one.described_by for one, _ in expected])
            cosines = (vectors @ vectors.T) * (kinds[:, None] == kinds)
            np.fill_diagonal(cosines, 0)
            worth = [one.weight for one, _ in expected] * (1 - cosines.max(axis=1))
            if (least := int(worth.argmin())) == len(expected) - 1:
                expected = held
                break
            del expected[least]
        shelf.place(line, size, 12, 50)
        held = expected
        assert [one.file for one in shelf.lines] == [one.file for one, _ in held]
        assert shelf.sizes.tolist() == [size for _, size in held]


def test_lines_without_images_do_not_pile_up(export: Path, tmp_path: Path) -> None:
    with open_model(export) as model, Collector(tmp_path / "kept", model, most=2):
        for number in range(120):
            model.predict(picture(number))
    assert len(images(tmp_path / "kept")) == 2 and len(lines(tmp_path / "kept")) <= 2 * 2 + 65


def test_images_without_a_line_stay_and_count(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    predict(export, *grey(tmp_path / "photos", 3), "--collect", out)
    before = images(out)
    (out / INDEX).unlink()
    done = predict(export, *grey(tmp_path / "photos", 4, 10), "--collect", out, "--collect-most", "5")
    assert done.exit_code == 0 and before < images(out) and len(images(out)) == 5


# Kills, other processes, a full disk

_COLLECT = """
import sys, numpy as np, ssod_edge
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_collect import picture
start = int(sys.argv[3])
with ssod_edge.open(sys.argv[1], engine="onnxruntime") as model, ssod_edge.Collector(sys.argv[2], model, most=30):
    print("ready", flush=True)
    for number in range(start, start + int(sys.argv[5])):
        model.predict(picture(number))
"""


def start(export: Path, out: Path, first: int, count: int = 10**6) -> subprocess.Popen[str]:
    arguments = [str(export), str(out), str(first), str(Path(__file__).parent), str(count)]
    command = [sys.executable, "-c", _COLLECT, *arguments]
    support = str(Path(__file__).parents[2] / "support")
    environment = {**os.environ, "PYTHONPATH": support, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def assert_whole(out: Path) -> None:
    """Every image is whole and has a line, and nothing else is there once it was opened again."""
    shelf = Shelf(out)
    assert not shelf.loose and {line.file for line in shelf.lines} == images(out)
    for name in images(out):
        with Image.open(out / name) as image:
            image.load()


def test_a_kill_at_any_instant_leaves_whole_images_with_lines(export: Path, tmp_path: Path) -> None:
    out, rng = tmp_path / "kept", random.Random(0)
    for turn in range(5):
        with start(export, out, 1000 * turn) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        assert_whole(out)
        assert len(images(out)) <= 31, "one more than the budget, for an instant"
    with open_model(export) as model, Collector(out, model, most=30) as collector:
        model.predict(picture(99_999))
        assert collector.problem is None
    assert {path.name for path in out.iterdir()} == {INDEX, *images(out)}, "what the kills left is gone"
    assert len(images(out)) <= 30 and images(out)


@pytest.mark.parametrize("at", ["line", "image", "eviction"])
def test_a_kill_between_two_steps(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    class KilledError(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise KilledError

    out = tmp_path / "kept"
    with open_model(export) as model, Collector(out, model, most=2):
        model.predict(picture(1))
        model.predict(picture(2))
        before = images(out)
        owner, name = {
            "line": (module, "append_lines"), "image": (module, "write_atomic"), "eviction": (Path, "unlink"),
        }[at]  # fmt: skip
        monkeypatch.setattr(owner, name, killed)
        if at == "eviction":  # the temporary file's is gone before
            monkeypatch.setattr(module, "write_atomic", lambda path, write: write(path))
        number = 3
        with pytest.raises(KilledError):
            while True:
                model.predict(picture(number := number + 1))
        monkeypatch.undo()
    assert before <= images(out)
    assert_whole(out)
    with open_model(export) as model, Collector(out, model, most=2):
        for number in range(20, 30):
            model.predict(picture(number))
    assert_whole(out)
    assert len(images(out)) <= 2


def test_two_processes_in_one_folder(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    with start(export, out, 0, 45) as one, start(export, out, 20, 45) as other:
        assert one.wait(120) == 0 and other.wait(120) == 0
    assert_whole(out)
    assert 20 <= len(images(out)) <= 30
    vectors = Shelf(out).vectors
    cosines = vectors @ vectors.T - 2 * np.eye(len(vectors))
    assert cosines.max() < module.ALIKE, "each knows what the other has kept"


def test_a_full_disk_is_told_once_and_loses_nothing(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "kept"
    predict(export, *grey(tmp_path / "photos", 2), "--collect", out, "--collect-most", "2")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != INDEX}

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    done = predict(export, *grey(tmp_path / "photos", 6, 10), "--collect", out, "--collect-most", "2")
    assert done.exit_code == 1 and len(done.stdout.splitlines()) == 6
    assert done.stderr.count("No space left on device. Free some space") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != INDEX} == before
    assert_whole(out)
    with open_model(export) as model, Collector(out, model), pytest.raises(OutputError, match="No space left"):
        model.predict(picture(40))


def test_a_line_that_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines"
    append_lines(path, ["one"])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device. Free some space"):
        append_lines(path, ["two"])
    assert path.read_text() == "one\n"


@pytest.mark.parametrize(("most", "words"), [(4, 100), (5, 100), (1000, 100), (2000, 100), (1000, 9000)])
def test_lines_that_no_longer_fit_leave_nothing_of_themselves(tmp_path: Path, most: int, words: int) -> None:
    """What is left in a buffer must not be written when the file is closed."""
    path = tmp_path / "lines"
    append_lines(path, ["one"])
    with full_disk(most), pytest.raises(OutputError, match="File too large"):
        append_lines(path, ["two" * words] * 10)
    assert path.read_text() == "one\n"


def test_a_line_that_was_cut_short_costs_that_line_alone(export: Path, tmp_path: Path) -> None:
    append_lines(tmp_path / "lines", ["one"])
    with open(tmp_path / "lines", "a") as file:
        file.write('{"fi')
    append_lines(tmp_path / "lines", ["two"])
    assert (tmp_path / "lines").read_text().splitlines() == ["one", '{"fi', "two"]


# Errors


def test_what_cannot_collect_says_why(make_export: Callable[..., Path], export: Path, tmp_path: Path) -> None:
    untrained = make_export(tmp_path / "untrained", trained=False)
    path = grey(tmp_path / "photos", 1)[0]
    done = predict(untrained, path, "--allow-untrained", "--collect", tmp_path / "kept")
    assert done.exit_code == 2 and "has no threshold" in done.stderr
    (tmp_path / "file").write_text("")
    assert predict(export, path, "--collect", tmp_path / "file").exit_code == 2
    with open_model(export) as model:
        for budget in ({"most": 0}, {"megabytes": 0}):
            with pytest.raises(UsageError, match="a budget is at least 1 image"):
                Collector(tmp_path / "kept", model, **budget)
