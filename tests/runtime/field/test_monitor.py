"""The monitor: false alarms and delays as stated, a file that nothing corrupts, and the commands around it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from colour import colour_images, edit_spec
from PIL import Image
from specs import earlier_spec

import ssod_edge
from ssod_edge.cli import main
from ssod_edge.detect.metrics import conformal_threshold
from ssod_edge.errors import ArtifactError, OutputError, UsageError
from ssod_edge.runtime.calibrate import fit_threshold
from ssod_edge.runtime.field import monitor as monitor_module
from ssod_edge.runtime.field.drift import (
    CALM,
    FALSE_ALARM_RATE,
    DriftState,
    Reference,
    advance,
    coarse,
    fits,
    log_evidence,
    new_state,
    reference,
)
from ssod_edge.runtime.field.monitor import Monitor, read_monitor
from ssod_edge.runtime.field.summary import summary
from ssod_edge.runtime.predict import Predictor
from ssod_edge.spec import Threshold, load_spec

MakeExport = Callable[..., Path]
ID_SCORES = np.random.default_rng(99).normal(size=2000)


def follow(calibration: np.ndarray, stream: np.ndarray) -> DriftState:
    """The test after a stream, against these ID scores."""
    threshold = conformal_threshold(calibration)
    bins = reference(threshold)
    return advance(new_state(len(bins.gaps)), stream.tolist(), threshold.value, bins, 0)


def delay(calibration: np.ndarray, before: np.ndarray, after: np.ndarray) -> int:
    """Images after a change until the alarm."""
    threshold = conformal_threshold(calibration)
    bins = reference(threshold)
    state = advance(new_state(len(bins.gaps)), before.tolist(), threshold.value, bins, 0)
    assert state.alarms == 0
    for start in range(0, len(after), 5):
        state = advance(state, after[start : start + 5].tolist(), threshold.value, bins, len(before) + start)
        if state.alarm_at is not None:
            return state.alarm_at - len(before)
    raise AssertionError("no alarm")


# The test of the scores


@pytest.mark.parametrize("n", [19, 2500])
def test_false_alarms_over_whole_streams_are_as_rare_as_stated(n: int) -> None:
    """However few ID scores there are, and in whatever distribution: 60 streams of 2,000 images."""
    rng = np.random.default_rng(n)
    alarms = sum(follow(-rng.exponential(size=n), -rng.exponential(size=2000)).alarms > 0 for _ in range(60))
    assert alarms <= 4, "P(more than 4 of 60 | 1%) < 0.1%"


def test_the_evidence_is_a_martingale() -> None:
    """Its mean over the bins of the next image, by the urn, is what it was: the bets of every expert add up."""
    rng = np.random.default_rng(0)
    threshold = conformal_threshold(ID_SCORES)
    bins = reference(threshold)
    each = [*bins.cuts.tolist(), 9.0]  # a score in each bin
    for images in (0, 1, 40, 700):
        stream = rng.normal(0.1, size=images).tolist()
        state = advance(new_state(len(bins.gaps)), stream, threshold.value, bins, 0)
        assert state.alarms == 0
        chances = (bins.gaps + np.array(state.counts)) / (bins.gaps.sum() + images)
        after = [np.exp(log_evidence(advance(state, [score], threshold.value, bins, images))) for score in each]
        assert chances @ after == pytest.approx(np.exp(log_evidence(state)), rel=1e-9)
        assert max(after) > 1.05 * min(after)


@pytest.mark.parametrize(
    ("shift", "share", "limit"),
    [(1.0, 1.0, 120), (2.0, 1.0, 50), (2.0, 0.3, 350), (-1.0, 1.0, 150)],
)
@pytest.mark.parametrize("before", [0, 3000])
def test_a_shift_is_found_within_the_stated_images(before: int, shift: float, share: float, limit: int) -> None:
    """Shifts in units of the ID scores' standard deviation; a share of 0.3 is 30% of other images among ID ones."""
    rng = np.random.default_rng(7)
    for _ in range(3):
        shifted = rng.normal(size=2000) + shift * (rng.random(2000) < share)
        assert delay(rng.normal(size=1000), rng.normal(size=before), shifted) <= limit


def test_a_change_of_spread_alone_is_found() -> None:
    rng = np.random.default_rng(3)
    assert delay(rng.normal(size=1000), rng.normal(size=500), 2.5 * rng.normal(size=2000)) <= 200


def test_how_scores_are_divided_into_calls_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    stream = np.concatenate([rng.normal(size=700), rng.normal(1.5, size=300), rng.normal(size=1500)])
    threshold = conformal_threshold(ID_SCORES)
    bins = reference(threshold)
    whole, parts = follow(ID_SCORES, stream), new_state(len(bins.gaps))
    done = 0
    while done < len(stream):
        some = stream[done : done + int(rng.integers(1, 90))]
        parts = advance(parts, some.tolist(), threshold.value, bins, done)
        done += len(some)
    assert whole.alarms > 0
    exact = ("drifted", "alarms", "alarm_at", "images", "counts")
    assert [getattr(whole, name) for name in exact] == [getattr(parts, name) for name in exact]
    np.testing.assert_allclose(whole.log_stakes, parts.log_stakes, rtol=1e-6)
    np.testing.assert_allclose(whole.recent, parts.recent, rtol=1e-6)


def test_a_drift_that_ends_is_over_after_calm_images() -> None:
    rng = np.random.default_rng(6)
    shifted, back = rng.normal(2, size=100), rng.normal(size=CALM + 400)
    assert follow(ID_SCORES, shifted).drifted
    state = follow(ID_SCORES, np.concatenate([shifted, back]))
    assert not state.drifted and state.alarms > 0
    assert follow(ID_SCORES, np.concatenate([shifted, back[: CALM // 2]])).drifted


def test_bins_of_few_and_of_equal_scores() -> None:
    for scores in (np.arange(19.0), np.repeat([1.0, 2.0], 40), np.zeros(30), ID_SCORES):
        bins = reference(conformal_threshold(scores, 0.9))
        assert bins.gaps.sum() == len(scores) + 1 and (bins.gaps > 0).all() and (np.diff(bins.edges) > 0).all()
        assert bins.id_shares.sum() == pytest.approx(1) and len(bins.edges) + 1 == len(bins.id_shares)
        assert np.isin(bins.cuts, bins.edges).all()
        histogram = np.bincount(np.searchsorted(bins.edges, scores), minlength=len(bins.id_shares))
        direct = np.bincount(np.searchsorted(bins.cuts, scores), minlength=len(bins.gaps))
        assert coarse(histogram.tolist(), bins).tolist() == direct.tolist()
        assert np.abs(direct - bins.gaps).max() <= 1, "the ID scores themselves, but for one gap"


# What it compares with


def test_thresholds_carry_id_quantiles(export: Path) -> None:
    images = [pixels.transpose(1, 2, 0) for pixels in colour_images(250, 3)]
    with ssod_edge.open(export) as model:
        fitted = fit_threshold(model.runner, images)
    assert len(fitted.id_quantiles) == 99 and fitted.id_quantiles == tuple(sorted(fitted.id_quantiles))
    few = conformal_threshold(np.arange(20.0), 0.9)
    assert few.id_quantiles == tuple(np.arange(20.0))
    with pytest.raises(UsageError, match="id_quantiles must be"):
        replace(few, id_quantiles=(2.0, 1.0))


@pytest.fixture
def ready(export: Path) -> Path:
    """An export whose artifacts know the scores of 400 ID images."""
    images = [pixels.transpose(1, 2, 0) for pixels in colour_images(400, 3)]
    with ssod_edge.open(export, artifact="onnx-fp32") as model:
        threshold = fit_threshold(model.runner, images)
    edit_spec(
        export, lambda spec: replace(spec, artifacts=tuple(replace(a, threshold=threshold) for a in spec.artifacts))
    )
    return export


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_a_spec_of_an_earlier_release_is_read_and_told_how_to_go_on(export: Path, tmp_path: Path) -> None:
    earlier_spec(export, 2)
    assert load_spec(export).artifacts[0].threshold.id_quantiles == ()
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    result = command("predict", export, tmp_path / "a.png", "--monitor", tmp_path / "m.json")
    assert result.exit_code == 2 and "ssod-edge calibrate DIR --id DATA" in result.stderr
    assert not (tmp_path / "m.json").exists() and result.stdout == ""


# The file


def test_python_counts_verdicts_in_two_lines(ready: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    with ssod_edge.open(ready) as model, Monitor(file, model) as monitor:
        scores = [monitor.add(model.predict(p.transpose(1, 2, 0))).ood_score for p in colour_images(50, 8)]
        assert not monitor.drifted
    with ssod_edge.open(ready) as model, Monitor(file, model) as monitor:
        for _ in range(60):
            scores.append(monitor.add(model.predict(np.full((20, 20, 3), 60, np.uint8))).ood_score)
        monitor.add_score(None)
        monitor.flush()
        assert monitor.drifted
    record = read_monitor(file)
    assert (record.images, record.failed) == (110, 1) and sum(record.histogram) == 110
    assert (record.lowest, record.highest) == (min(scores), max(scores))
    assert record.unknown == sum(score > record.threshold.value for score in scores) >= 60
    figures = summary(record)
    assert figures["unknown_rate"] == record.unknown / 110 and figures["recent_stability_index"] > 0.25
    assert "png" not in file.read_text()


def test_quantiles_and_size_stay_true_over_many_scores(ready: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with ssod_edge.open(ready) as model:
        ends = reference(model.runner.artifact.threshold).cuts
        low, high = float(ends[0]), float(ends[-1])
        scores = rng.normal((low + high) / 2, high - low, 6_000)
        sizes = []
        with Monitor(tmp_path / "m.json", model) as monitor:
            for score in scores.tolist():
                monitor.add_score(score)
            monitor.flush()
            sizes.append((tmp_path / "m.json").stat().st_size)
    found = summary(read_monitor(tmp_path / "m.json"))["quantiles"]
    for at, value in found.items():
        assert value == pytest.approx(np.quantile(scores, float(at)), abs=0.06 * (high - low))
    assert sizes[0] < 10_000


@pytest.mark.parametrize("scores", [np.tile(ID_SCORES, 5) - 6, np.full(5_000, 9.0)], ids=["ID", "drifted"])
def test_an_image_costs_next_to_nothing(ready: Path, tmp_path: Path, scores: np.ndarray) -> None:
    with ssod_edge.open(ready) as model, Monitor(tmp_path / "m.json", model) as monitor:
        start = time.process_time()
        for score in scores.tolist():
            monitor.add_score(score)
        monitor.flush()
        each = (time.process_time() - start) / len(scores)
    assert each < 500e-6, f"{each * 1e6:.1f} us an image: on an idle core it is 6, and 60 while it drifts"


def _write(arguments: tuple[Path, Path, int]) -> None:
    folder, file, n = arguments
    with ssod_edge.open(folder, artifact="onnx-fp32") as model, Monitor(file, model) as monitor:
        for score in np.random.default_rng(n).normal(-5, 1, n).tolist():
            monitor.add_score(score)
            if monitor._scores and len(monitor._scores) >= 7:
                monitor.flush()


def test_two_processes_lose_nothing(ready: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_write, [(ready, tmp_path / "m.json", n) for n in (301, 402)], chunksize=1)
    record = read_monitor(tmp_path / "m.json")
    assert record.images == sum(record.histogram) == 703
    assert [path.name for path in tmp_path.glob("*m.json*")] == ["m.json"]


KILLED = """
import sys
import ssod_edge
from ssod_edge.runtime.field.monitor import Monitor
with ssod_edge.open(sys.argv[1], artifact="onnx-fp32") as model, Monitor(sys.argv[2], model) as monitor:
    print("open", flush=True)
    while True:
        monitor.add_score(-5.0)
        monitor.flush()
"""


def test_a_kill_leaves_the_file_whole(ready: Path, tmp_path: Path) -> None:
    file, images = tmp_path / "m.json", 0
    for pause in (0.05, 0.15):
        child = subprocess.Popen([sys.executable, "-c", KILLED, ready, file], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "open\n"
        time.sleep(pause)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert read_monitor(file).images >= images
        images = read_monitor(file).images
    assert images > 0


def test_a_file_of_another_artifact_or_calibration_is_refused(ready: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    with ssod_edge.open(ready, artifact="onnx-fp32") as model, Monitor(file, model):
        pass
    before = file.read_bytes()
    with ssod_edge.open(ready, artifact="onnx-fp16") as model, pytest.raises(UsageError, match="another artifact"):
        Monitor(file, model)

    def recalibrated(threshold: Threshold | None) -> Threshold:
        assert threshold is not None
        return replace(threshold, value=threshold.value + 1)

    edit_spec(
        ready,
        lambda s: replace(s, artifacts=tuple(replace(a, threshold=recalibrated(a.threshold)) for a in s.artifacts)),
    )
    with ssod_edge.open(ready, artifact="onnx-fp32") as model, pytest.raises(UsageError, match="delete it to start"):
        Monitor(file, model)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(schema_version=2), "newer release"),
        (lambda v: v.pop("histogram"), "histogram is missing"),
        (lambda v: v.update(images=5), "do not add up"),
        (lambda v: v["drift"].update(counts=[1, 2]), "bins are not"),
        (lambda v: v["drift"]["counts"].__setitem__(0, 3), "bins are not"),
        (lambda v: v["drift"].update(peak=1e300), "bins are not"),
        (lambda v: v["drift"].update(peak=800.0), "bins are not"),
        (lambda v: v["drift"].update(log_stakes=[800.0] * 6), "bins are not"),
        (lambda v: v["drift"].update(drifted=True), "bins are not"),
        (lambda v: v["drift"].update(alarms=1), "bins are not"),
        (lambda v: v.update(lowest=1.0), "lowest and highest"),
        (lambda v: v["drift"]["recent"][0].__setitem__(0, -1.0), "bins are not"),
        (lambda v: v["threshold"].update(id_quantiles=[]), "bins are not"),
        (lambda v: v.update(unknown="x"), "unknown must be an integer"),
    ],
)
def test_a_damaged_file_is_refused(ready: Path, tmp_path: Path, change: Callable[..., object], message: str) -> None:
    file = tmp_path / "m.json"
    with ssod_edge.open(ready) as model, Monitor(file, model):
        pass
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=message):
        read_monitor(file)
    assert command("monitor", file).exit_code == 4


def places_of_numbers(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where numbers stand in a document; of a long list the first and the last."""
    if isinstance(value, dict):
        return [place for key, item in value.items() for place in places_of_numbers(item, (*path, key))]
    if isinstance(value, list):
        return [
            place for index in {0, len(value) - 1} for place in places_of_numbers(value[index], (*path, index)) if value
        ]
    return [path] if type(value) in (int, float) else []


@pytest.mark.parametrize("huge", [10**400, 2**63, 2**62, -(2**62), 1.7e308, -1.7e308])
def test_a_huge_number_is_refused_or_does_no_harm(ready: Path, tmp_path: Path, huge: float) -> None:
    file = tmp_path / "m.json"
    save_photo = photos(tmp_path / "photos", 3, 3)
    assert command("predict", ready, save_photo, "--monitor", file).exit_code == 0
    whole = file.read_text()
    for *path, last in places_of_numbers(json.loads(whole)):
        values = inner = json.loads(whole)
        for key in path:
            inner = inner[key]
        inner[last] = huge
        file.write_text(json.dumps(values))
        for options in ((), ("--json",)):
            result = command("monitor", file, *options)
            assert result.exit_code in (0, 1, 4), (path, last, result.output)
            assert "should not happen" not in result.output, (path, last, result.output)


def test_what_is_no_file_or_no_score_is_refused(ready: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ssod_edge.open(ready) as model:
        for place in (tmp_path / "pipe", "/dev/null"):
            with pytest.raises(UsageError, match="no regular file"):
                Monitor(place, model)
        with Monitor(tmp_path / "m.json", model) as monitor, pytest.raises(UsageError, match="must be finite, got nan"):
            monitor.add_score(float("nan"))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no")
    (tmp_path / "list").write_text("[]")
    assert command("monitor", tmp_path / "text").exit_code == 4
    assert command("monitor", tmp_path / "list").exit_code == 4
    missing = command("monitor", tmp_path / "nothing")
    assert missing.exit_code == 2 and "--monitor FILE" in missing.stderr


def test_a_disk_that_fails_later_does_not_stop_the_verdicts(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with ssod_edge.open(ready) as model:
        monitor, loud = Monitor(tmp_path / "m.json", model, said.append), Monitor(tmp_path / "m.json", model)

        def full(*_: object) -> None:
            raise OutputError("no space.")

        monkeypatch.setattr(monitor_module, "write_json", full)
        for _ in range(3):
            monitor.add_score(-5.0)
            monitor.flush()
        loud.add_score(-5.0)
        with pytest.raises(OutputError):
            loud.flush()
    assert said == ["error: no space. The verdicts go on without the monitor."] and monitor.problem is not None


# The commands


def photos(folder: Path, n: int, grey: int) -> Path:
    folder.mkdir()
    for index, pixels in enumerate(colour_images(n, 8)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"a{index:03}.png")
    for index in range(grey):
        Image.new("RGB", (20, 20), (60, 60, 60 + index % 7)).save(folder / f"b{index:03}.png")
    return folder


def test_predict_says_once_that_the_input_drifted(ready: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "m.json", photos(tmp_path / "photos", 40, 60)
    (folder / "broken.png").write_bytes(b"\x89PNG")
    result = command("predict", ready, folder, "--monitor", file)
    assert result.exit_code == 1 and result.stderr.count("drift:") == 1
    assert "ssod-edge monitor" in result.stderr and "drift" not in result.stdout
    record = read_monitor(file)
    assert (record.images, record.failed) == (100, 1) and record.drift.drifted
    again = command("predict", ready, folder / "a000.png", "--monitor", file, "--json")
    assert again.exit_code == 0 and again.stderr == "" and read_monitor(file).images == 101
    shown = command("monitor", file)
    assert shown.exit_code == 0 and "DRIFTED" in shown.stdout and "images     101" in shown.stdout
    count = read_monitor(file).drift.images
    assert count < 101 and f"of the {count} images since it last reached its limit and began anew" in shown.stdout
    figures = json.loads(command("monitor", file, "--json").stdout)
    assert figures["drifted"] is True and figures["images"] == 101 and figures["evidence_limit"] == 1 / FALSE_ALARM_RATE
    assert figures["evidence_images"] == count


def test_an_empty_monitor_is_shown(ready: Path, tmp_path: Path) -> None:
    with ssod_edge.open(ready) as model, Monitor(tmp_path / "m.json", model):
        pass
    shown = command("monitor", tmp_path / "m.json")
    assert shown.exit_code == 0 and "images     0" in shown.stdout
    assert json.loads(command("monitor", tmp_path / "m.json", "--json").stdout)["unknown_rate"] is None


def test_of_a_video_one_frame_a_second_counts_by_its_own_score(ready: Path, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs the extra 'video'")
    video = tmp_path / "v.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"FFV1"), 10, (40, 30))
    for index in range(35):
        writer.write(np.full((30, 40, 3), (20, 20, 220) if index % 10 == 0 else (60, 60, 60), np.uint8))
    writer.release()
    result = command("predict", ready, video, "--smooth", "5", "--json", "--monitor", tmp_path / "m.json")
    record = read_monitor(tmp_path / "m.json")
    with Predictor(ssod_edge.open(ready).runner) as model:
        score = model.predict(np.full((30, 40, 3), (220, 20, 20), np.uint8)).ood_score
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 35
    assert record.images == 4 and record.lowest == record.highest == pytest.approx(score, abs=1e-4)


def test_an_unwritable_place_is_found_before_the_first_image(ready: Path, tmp_path: Path) -> None:
    result = command(
        "predict", ready, photos(tmp_path / "p", 1, 0), "--monitor", tmp_path / "p" / "a000.png" / "m.json"
    )
    assert result.exit_code == 1 and result.stdout == "" and "cannot create the folder" in result.stderr


def test_reference_is_what_the_spec_says() -> None:
    bins: Reference = reference(conformal_threshold(ID_SCORES))
    shares = (
        np.diff(np.concatenate([[0], np.searchsorted(np.sort(ID_SCORES), bins.edges, side="right"), [2000]])) / 2000
    )
    np.testing.assert_allclose(bins.id_shares[40:-40], shares[40:-40], atol=0.02)


def test_a_state_that_saw_one_thing_for_ever_still_fits() -> None:
    """Its fading counts approach the memory from below, and rounding takes them over it."""
    threshold = conformal_threshold(ID_SCORES)
    bins = reference(threshold)
    state, scores = new_state(len(bins.gaps)), np.linspace(1, 9, 5) + max(ID_SCORES.max(), threshold.value)
    for start in range(0, 20_000, 500):
        for offset in range(0, 500, 5):
            state = advance(state, scores.tolist(), threshold.value, bins, start + offset)
        assert fits(state, len(bins.gaps))
    assert state.recent_unknown == pytest.approx(500)
