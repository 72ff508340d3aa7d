"""`ssod-edge report`: what goes into the page, and what is refused. What it shows is in `test_page_browser.py`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from colour import edit_spec, write_colours
from judged import HOSTILE, made
from PIL import Image
from specs import FIRST, LESSON

from ssod_edge.cli import main
from ssod_edge.data.named import NamedData
from ssod_edge.detect.classes import calibration
from ssod_edge.detect.metrics import conformal_threshold, deployment_metrics
from ssod_edge.errors import UsageError
from ssod_edge.evaluation.page import PageOptions, build, render
from ssod_edge.evaluation.page_data import stops
from ssod_edge.evaluation.page_judged import KNOWN, judge
from ssod_edge.evaluation.page_photos import MOST, nearest, places
from ssod_edge.evaluation.page_words import CLOSE, OPEN, first_screen
from ssod_edge.files import write_json
from ssod_edge.spec import load_spec


def data_of(page: bytes, part: str = "data") -> Any:
    found = re.search(rf'<script type="application/json" id="{part}">(.*?)</script>', page.decode(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize("n", [19, 20, 57, 100, 300, 1000, 4321])
@pytest.mark.parametrize("tpr", [0.95, 0.9, 0.973])
def test_calibrate_sets_each_stop_of_the_slider(n: int, tpr: float) -> None:
    scores = np.random.default_rng(n).normal(size=n).astype(np.float32)
    if n < 37 and tpr > 0.95:
        pytest.skip("too few images for this threshold")
    model = replace(made(50), threshold=conformal_threshold(scores, tpr))
    found = stops(model)
    assert [one["value"] for one in found] == sorted({one["value"] for one in found})
    assert f"{tpr}" in [one["tpr"] for one in found]
    for one in found:
        assert conformal_threshold(scores, float(one["tpr"])).value == one["value"], one
        assert len(one["tpr"]) <= 7, "short enough for a command"


def test_without_a_threshold_the_stops_are_of_the_known_images() -> None:
    model = replace(made(50), threshold=None)
    page = data_of(build(model, PageOptions(images=False)))
    assert page["threshold"] is None and page["stops"] and "p" not in page["sets"][0]
    assert {one["value"] for one in page["stops"]} <= set(model.known.scores.astype(float).tolist())
    assert any("no threshold yet" in line for line in page["words"])


def test_the_page_has_what_was_judged() -> None:
    model = made()
    page = data_of(build(model, PageOptions()))
    assert page["classes"] == list(HOSTILE) and [one["name"] for one in page["sets"]] == list(model.sets)
    for one, images in zip(page["sets"], model.sets.values(), strict=True):
        assert one["score"] == images.scores.astype(float).tolist() and one["guess"] == images.guesses.tolist()
        assert len(one["file"]) == len(one["p"]) == len(images.indices)
    figures = deployment_metrics(
        model.known.scores, {name: one.scores for name, one in model.unknown.items()}, model.threshold, model.correct,
        model.known.labels, HOSTILE,
    )  # fmt: skip
    words = " ".join(page["words"])
    assert f"calls {100 * figures['id_tpr']:.1f}% of them known" in words
    assert f"of these {100 * figures['selective_accuracy']:.1f}% get" in words
    for name, one in figures["ood"].items():
        assert f"{100 * one['false_accept']:.1f}% of {OPEN}{name}{CLOSE}" in words
    assert page["command"]["start"] == "ssod-edge calibrate 'runs/demo model' --id PHOTOS --tpr"


def test_nothing_of_the_data_ends_its_element_and_the_policy_allows_nothing_else() -> None:
    page = build(made(), PageOptions()).decode()
    assert page.count("</script>") == 3 and "<img" not in page.partition("<script")[0]
    assert "\u2028" not in page and "<u>" not in page and "&lt;u&gt;model" in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy[1].split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:" and "connect-src" not in rules and "unsafe" not in policy[1]
    for kind in ("style", "script"):
        (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    script = page.rpartition("<script>")[2]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|https?://(?!www\.w3)", script
    )


def test_a_name_that_looks_like_a_place_of_the_template_stays() -> None:
    page = data_of(render({"title": "@@photos@@", "x": "@@data@@"}, []))
    assert page == {"title": "@@photos@@", "x": "@@data@@"}


def test_photos_fit_into_the_megabytes() -> None:
    model = made(600)
    whole, small = build(model, PageOptions()), build(model, PageOptions(most_mb=0.4))
    assert len(small) <= 400_000 < len(whole)
    assert 0 < len(data_of(small, "photos")) < len(data_of(whole, "photos"))
    none = build(model, PageOptions(images=False))
    assert data_of(none, "photos") == [] and b"data:image/jpeg;base64,/9j" not in none
    assert not data_of(none)["images"] and all(one["shown"] == [] for one in data_of(none)["sets"])
    with pytest.raises(UsageError, match=r"take .* MB: give more with --most-mb"):
        build(model, PageOptions(most_mb=0.05))
    with pytest.raises(UsageError, match="most_mb must be above 0"):
        PageOptions(most_mb=0)


def test_the_most_telling_photos_come_first_and_each_once() -> None:
    model = made(3000)
    found = places(model)
    assert len(found) == len(set(found)) <= MOST
    sure = np.where(model.correct, -1, model.known.confidence)
    assert found[0] == (KNOWN, int(sure.argmax())) and (KNOWN, int(model.known.scores.argmax())) in found[:5]
    cells = {(int(model.known.labels[row]), int(model.known.guesses[row])) for name, row in found if name == KNOWN}
    assert len(cells) == len(set(zip(model.known.labels.tolist(), model.known.guesses.tolist(), strict=True)))


def test_an_image_that_is_gone_costs_its_small_copy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(40)
    source = model.known.source
    whole = source.picture

    def picture(index: int) -> Any:
        if index == 3:
            return replace(whole(index), content=b"no picture")
        return whole(index)

    monkeypatch.setattr(source, "picture", picture)
    (known, *_) = data_of(build(model, PageOptions()))["sets"]
    lost = [row for row, photo in zip(known["shown"], known["photo"], strict=True) if photo < 0]
    assert lost == [3]


def test_the_nearest_is_by_direction_whatever_the_scale_of_a_feature() -> None:
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(500, 20)) * np.logspace(-2, 2, 20)).astype(np.float32)
    asked = features[[5, 77, 432]] * np.float32(1.01)
    assert nearest(asked, features).tolist() == [5, 77, 432]


def test_words_of_a_model_without_unknown_images() -> None:
    model = made(60, others={})
    words = first_screen(model, (4.25, "onnx-fp32, a CPU"), None)
    assert any("no unknown images were given" in line for line in words)
    assert words[-1] == "From image to verdict it takes 4.2 ms (onnx-fp32, a CPU)."
    page = data_of(build(replace(model, classes=tuple(map(str, range(5)))), PageOptions(images=False)))
    assert page["told_apart"] == [] and page["expected"] is None and page["artifacts"] == []


@pytest.mark.slow
def test_ten_thousand_images_make_a_page_within_half_a_minute() -> None:
    classes = tuple(f"class {number}" for number in range(20))
    model = made(6000, classes, {"near": 2000, "far": 2000}, side=1600)
    start = time.perf_counter()
    page = build(model, PageOptions())
    taken = time.perf_counter() - start
    print(f"{taken:.1f} s, {len(page) / 1e6:.1f} MB, {len(data_of(page, 'photos'))} photos")
    assert taken < 30 and len(page) < 15e6


# ---- an export, without PyTorch


@pytest.fixture
def colours(export: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """An export, known images and grey ones, of which one is no picture."""
    grey = tmp_path / "grey"
    grey.mkdir()
    for level in range(6):
        Image.new("RGB", (20, 20), (40 * level,) * 3).save(grey / f"{level}.png")
    (grey / "9.png").write_bytes(b"no picture")
    return export, write_colours(tmp_path / "known", 6), grey


def report(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_an_export_is_judged_by_its_artifact(colours: tuple[Path, Path, Path], tmp_path: Path) -> None:
    export, known, grey = colours
    done = report(export, "--id", known, "--ood", f"grey={grey}", "-o", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert "left out:" in done.stderr and "9.png" in done.stderr and done.stdout.startswith("written: ")
    page = data_of((tmp_path / "page.html").read_bytes())
    assert [len(one["score"]) for one in page["sets"]] == [18, 6] and page["classification"]["accuracy"] == 1
    assert page["threshold"]["value"] == -2 and len(page["left_out"]) == 1
    assert "artifact" in page["judge"] and "training photos" in page["why_no_near"]
    assert [row["name"] for row in page["artifacts"]] == [one.name for one in load_spec(export).artifacts]
    with_model = subprocess.run(
        [sys.executable, "-m", "ssod_edge", "predict", str(export), str(known / "red" / "0.png"), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    verdict = json.loads(with_model.stdout)
    row = page["sets"][0]["file"].index("red/0.png")
    assert page["sets"][0]["score"][row] == verdict["ood_score"]
    assert page["sets"][0]["p"][row] == round(verdict["p_known"], 4)


def test_an_export_needs_no_pytorch(colours: tuple[Path, Path, Path], tmp_path: Path) -> None:
    export, known, grey = colours
    arguments = ["report", str(export), "--id", str(known), "--ood", f"grey={grey}", "-o", str(tmp_path / "page.html")]
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision', 'timm', 'onnx', 'sklearn', 'matplotlib'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        f"from ssod_edge.cli import main\nmain({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").stat().st_size > 20_000


def test_what_an_export_cannot_know_is_asked_for(colours: tuple[Path, Path, Path], tmp_path: Path) -> None:
    export, known, _ = colours
    shutil.copytree(known / "red", tmp_path / "other" / "mauve")
    for arguments, message in (
        ([], "name known ones with --id DATA"),
        (["--id", known, "--via", "32"], "--via belongs to a run"),
        (["--id", tmp_path / "other"], "Give images of known classes"),
        (["--id", known, "--bench", tmp_path / "none.json"], "does not exist. Make it with: ssod-edge bench"),
    ):
        done = report(export, *arguments, "-o", tmp_path / "page.html")
        assert done.exit_code == 2 and message in done.stderr, (arguments, done.stderr)
    assert not (tmp_path / "page.html").exists()


def test_bench_and_monitor_files_are_of_this_model(
    colours: tuple[Path, Path, Path], make_export: Callable[..., Path], tmp_path: Path
) -> None:
    export, known, grey = colours
    monitor, bench = tmp_path / "monitor.json", tmp_path / "bench.json"
    predicted = CliRunner().invoke(main, ["predict", str(export), str(known), "--monitor", str(monitor)])
    assert predicted.exit_code == 0, predicted.output
    row = {"artifact": "onnx-fp32", "latency_ms": {"p50": 1.25, "p90": 2.5}, "top1": 1.0, "false_reject": 0.1}
    record = {
        "export": {"model": load_spec(export).reference_sha256}, "environment": {"cpu": {"model": "a CPU"}},
        "rows": [{**row, "device": "CPU"}], "method": {"images": "some"},
    }  # fmt: skip
    write_json(bench, record)
    arguments = [export, "--id", known, "--ood", f"grey={grey}", "-o", tmp_path / "page.html", "--no-images"]
    done = report(*arguments, "--bench", bench, "--monitor", monitor)
    assert done.exit_code == 0, done.output
    page = data_of((tmp_path / "page.html").read_bytes())
    assert page["latency"] == {"ms": 1.25, "by": "onnx-fp32, a CPU"} and page["drift"]["images"] == 18
    assert [one["p90"] for one in page["artifacts"]] == [2.5, None, None, None]

    write_json(bench, {**record, "export": {"model": "another"}})
    assert "is of another export" in report(*arguments, "--bench", bench).stderr
    write_json(bench, {"rows": []})
    assert report(*arguments, "--bench", bench).exit_code == 4
    edit_spec(export, lambda spec: replace(spec, backbone="another"))
    assert "is of another model (colour" in report(*arguments, "--monitor", monitor).stderr


def test_a_run_whose_export_was_taught_is_judged_by_that(colours: tuple[Path, Path, Path], tmp_path: Path) -> None:
    export, known, _ = colours
    run = tmp_path / "lesson"
    shutil.copytree(export, run / "export")
    (run / "best.safetensors").write_bytes(b"the checkpoint has not learnt that")
    edit_spec(run / "export", lambda spec: replace(spec, source={"taught": LESSON, "version": 2, "lineage": [FIRST]}))
    for place in (run, run / "export"):
        done = report(place, "--id", known, "-o", tmp_path / "page.html", "--no-images")
        assert done.exit_code == 0, done.output
        page = data_of((tmp_path / "page.html").read_bytes())
        assert page["title"] == "lesson" and "its artifact" in page["judge"]
        assert ["Version", "2"] in dict(page["card"])["Rejection"]
    assert "does not exist. Give a run folder" in report(tmp_path / "nothing").stderr


# ---- a run, in PyTorch


@pytest.mark.slow
def test_a_run_is_judged_as_eval_does(small_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from ssod_edge.evaluation.evaluate import EvalOptions, evaluate

    data = str(small_run.parent / "data")
    named = NamedData(data, {"again": data})
    evaluated, _ = evaluate(small_run, EvalOptions(data, {"again": data}, bootstrap=0, shift_images=0))
    model = judge(str(small_run), named)
    page = data_of(build(model, PageOptions()))
    assert page["classification"]["accuracy"] == evaluated["id_accuracy"]
    deployed = evaluated["deployment"][evaluated["default_score"]]
    known = page["sets"][0]
    accepted = np.array(known["score"]) <= page["threshold"]["value"]
    assert accepted.mean() == deployed["id_tpr"] and page["threshold"]["value"] == deployed["threshold"]["value"]
    assert [one["auroc"] for one in page["told_apart"]] == [0.5]
    assert page["why_no_near"] == "" and min(known["near"]) >= 0
    trained = set(model.run.splits("")[1].train.tolist())
    source = model.run.splits("")[0]
    names = {source.source(index): index for index in trained}
    assert set(page["near"]["file"]) <= set(names), "a training image, and no other"
    for row, near in zip(known["shown"], known["near"], strict=True):
        if known["file"][row] in names:
            assert page["near"]["file"][near] == known["file"][row], "nothing is nearer than the image itself"
    settings = dict(dict(page["card"])["All settings of the training"])
    assert settings["backbone"] == "test_efficientnet"


def test_what_the_temperature_changes_is_said() -> None:
    model = made(300)
    assert "temperature" not in data_of(build(model, PageOptions(images=False)))["classification"]
    tempered = replace(model, temperature=2.0)
    page = data_of(build(tempered, PageOptions(images=False)))["classification"]
    assert page["temperature"]["value"] == 2 and page["temperature"]["classes_changed"] == 0
    known = model.known
    assert page["calibration"]["ece"] == pytest.approx(calibration(known.labels, known.probs)["ece"], abs=1e-6)
    sharper = known.probs.astype(float) ** 2
    before = calibration(known.labels, sharper / sharper.sum(axis=1, keepdims=True))
    assert page["temperature"]["before"]["ece"] == pytest.approx(before["ece"], abs=1e-6)
