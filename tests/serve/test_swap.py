"""Another export takes the place of one that answers: nothing is lost, nothing is mixed up."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from colour import edit_spec, paint, write_colours
from served import Served, eventually, served

import ssod_edge
from ssod_edge.cli import main
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.files import write_atomic
from ssod_edge.runtime.field.monitor import read_monitor
from ssod_edge.serve.counted import Counted
from ssod_edge.serve.models import Keeping
from ssod_edge.spec import SPEC_NAME, Spec, Threshold, load_spec


def with_threshold(value: float, version: int) -> Callable[[Spec], Spec]:
    """What `calibrate` and `teach` change of a spec."""

    def edit(spec: Spec) -> Spec:
        def moved(threshold: Threshold | None) -> Threshold | None:
            return None if threshold is None else replace(threshold, value=value)

        artifacts = tuple(replace(a, threshold=moved(a.threshold)) for a in spec.artifacts)
        return replace(spec, artifacts=artifacts, source={**spec.source, "version": version})

    return edit


def put_in_place(export: Path, value: float, version: int, tmp_path: Path) -> None:
    """A whole other export takes the folder's place, as `teach` lets it."""
    new = tmp_path / f"new-{version}"
    shutil.copytree(export, new)
    edit_spec(new, with_threshold(value, version))
    old = tmp_path / f"old-{version}"
    export.rename(old)
    new.rename(export)
    shutil.rmtree(old)


def facts(server: Served) -> dict:
    return server.ask("/v1/models").json["models"][0]


def test_a_swap_under_load_loses_and_mixes_nothing(export: Path, tmp_path: Path) -> None:
    image = paint(tmp_path / "red.png", "red").read_bytes()
    answers: list[tuple[int, int, float]] = []
    stop = threading.Event()

    def ask(server: Served) -> None:
        while not stop.is_set():
            answer = server.ask(body=image)
            verdict = answer.json["verdicts"][0] if answer.status == 200 else {"threshold": 0}
            answers.append((answer.status, answer.json.get("version", 0), verdict["threshold"]))

    with served({"m": export}) as server:
        before = server.service.models["m"].lane.opened
        clients = [threading.Thread(target=ask, args=(server,)) for _ in range(4)]
        for client in clients:
            client.start()
        for version in (2, 3):
            put_in_place(export, -2.0 + version / 10, version, tmp_path)
            assert eventually(lambda version=version: answers and answers[-1][1] == version)
        stop.set()
        for client in clients:
            client.join()
        assert eventually(lambda: before.retired and not before.pending)
        with pytest.raises(Exception, match="closed"):
            before.predictor.predict(image)
        assert facts(server)["version"] == 3 and facts(server)["problem"] is None
    assert {status for status, _, _ in answers} == {200}
    assert {(version, round(threshold, 6)) for _, version, threshold in answers} == {(1, -2.0), (2, -1.8), (3, -1.7)}


def test_a_threshold_of_calibrate_is_swapped_in(export: Path, tmp_path: Path) -> None:
    with served({"m": export}) as server:
        before = facts(server)["threshold"]
        data = write_colours(tmp_path / "photos", 12)
        result = CliRunner().invoke(main, ["calibrate", str(export), "--id", str(data)])
        assert result.exit_code == 0, result.output
        now = load_spec(export).artifact("openvino-fp32").threshold
        assert now is not None and now.value != before
        assert eventually(lambda: facts(server)["threshold"] == now.value)


def test_what_cannot_be_opened_leaves_the_old_one(
    export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image = paint(tmp_path / "red.png", "red").read_bytes()
    spec = (export / SPEC_NAME).read_bytes()
    with served({"m": export}) as server:
        write_atomic(export / SPEC_NAME, lambda path: path.write_text("{}"))
        assert eventually(lambda: facts(server)["problem"] is not None)
        assert facts(server)["problem"] == "the export in its place cannot be opened; the one before answers"
        assert server.ask(body=image).json["verdicts"][0]["class_name"] == "red"
        assert server.ask("/readyz").status == 200 and b'ssod_edge_stale{model="m"} 1.0' in server.ask("/metrics").body
        write_atomic(export / SPEC_NAME, lambda path: path.write_bytes(spec))
        assert eventually(lambda: facts(server)["problem"] is None)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "cannot be opened" in lines[0] and "answers from now on" in lines[1]


def test_a_monitor_is_begun_anew_and_the_old_one_kept(export: Path, tmp_path: Path) -> None:
    image = paint(tmp_path / "red.png", "red").read_bytes()
    keeping = Keeping(monitor={"m": str(tmp_path / "field" / "drift.json")})
    with served({"m": export}, keeping=keeping) as server:
        assert server.ask(body=image).status == 200
        edit_spec(export, with_threshold(-1.5, 1))
        assert eventually(lambda: facts(server)["threshold"] == -1.5)
        assert server.ask(body=image).status == 200 == server.ask(body=image).status
    found = sorted((tmp_path / "field").iterdir())
    assert [(path.name[:6], read_monitor(path).images) for path in found] == [("drift-", 1), ("drift.", 2)]


def test_an_export_without_a_threshold_is_not_monitored(
    export: Path, make_export: Callable[..., Path], tmp_path: Path
) -> None:
    lines: list[str] = []
    path = tmp_path / "drift.json"
    with (
        ssod_edge.open(export) as model,
        ssod_edge.open(make_export(tmp_path / "raw", trained=False), allow_untrained=True) as raw,
    ):
        counted = Counted(str(path), model, lines.append)
        verdict = model.predict(paint(tmp_path / "red.png", "red"))
        counted.add(model, [verdict])
        counted.swap(raw)
        counted.add(model, [verdict])  # an image that was on its way
        counted.add(raw, [verdict])
        counted.flush()
        assert counted.drifted is None and read_monitor(path).images == 1
    assert len(lines) == 1 and "has no threshold" in lines[0] and lines[0].endswith("without the monitor.")


def test_what_is_no_monitor_is_not_moved(export: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with ssod_edge.open(export) as model, pytest.raises(ArtifactError):
        Counted(str(path), model, print)
    with ssod_edge.open(export) as model, pytest.raises(UsageError):
        Counted(str(tmp_path), model, print)
    assert path.read_text() == "{}"
