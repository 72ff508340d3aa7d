"""Verdicts over HTTP: what is asked, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from colour import COLOURS, paint
from served import Served, eventually, files_body, served

import ssod_edge
from ssod_edge.cli import main
from ssod_edge.runtime.field.monitor import read_monitor
from ssod_edge.serve.models import Keeping

MakeExport = Callable[..., Path]


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, bytes]:
    """File name -> bytes, one of each colour."""
    return {f"{name}.png": paint(tmp_path / "photos" / f"{name}.png", name).read_bytes() for name in COLOURS}


@pytest.fixture
def server(export: Path) -> Iterator[Served]:
    with served({"colours": export}) as running:
        yield running


def test_a_verdict_is_that_of_predict(server: Served, export: Path, photos: dict[str, bytes]) -> None:
    with ssod_edge.open(export) as model:
        for content in photos.values():
            for path in ("/v1/predict", "/v1/models/colours/predict"):
                answer = server.ask(path, content)
                assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
                assert answer.json["verdicts"] == [model.predict(content).to_dict()]
                assert (answer.json["model"], answer.json["version"]) == ("colours", 1)


def test_it_says_what_the_command_says(server: Served, export: Path, tmp_path: Path, photos: dict[str, bytes]) -> None:
    paths = [str(tmp_path / "photos" / name) for name in photos]
    printed = CliRunner().invoke(main, ["predict", str(export), *paths, "--json"]).output.splitlines()
    body, headers = files_body(photos)
    verdicts = server.ask(body=body, headers=headers).json["verdicts"]
    assert [{**json.loads(line), "image": Path(json.loads(line)["image"]).name} for line in printed] == verdicts


def test_files_of_one_request_are_answered_in_order(server: Served, photos: dict[str, bytes]) -> None:
    names = [*photos, *photos, "broken.png"]
    body, headers = files_body(photos)
    twice = files_body({f"2-{name}": content for name, content in photos.items()} | {"broken.png": b"\x89PNG no"})
    answers = server.ask(body=body, headers=headers), server.ask(body=twice[0], headers=twice[1])
    verdicts = [verdict for answer in answers for verdict in answer.json["verdicts"]]
    assert [answer.status for answer in answers] == [200, 200]
    assert [verdict["image"].removeprefix("2-") for verdict in verdicts] == names
    classes = [Path(name).stem for name in photos]
    assert [v["class_name"] for v in verdicts if v["known"]] == [c for c in classes * 2 if c != "grey"]
    assert verdicts[-1]["error"] and verdicts[-1]["class_name"] is None


def test_it_lives_and_is_ready(server: Served) -> None:
    assert server.ask("/healthz").json == {"status": "ok"}
    assert server.ask("/readyz").json == {"status": "ready"}


def test_models_are_listed(make_export: MakeExport, tmp_path: Path, photos: dict[str, bytes]) -> None:
    two = {"a": make_export(tmp_path / "a"), "b": make_export(tmp_path / "b", trained=True)}
    with served(two) as server:
        models = server.ask("/v1/models").json["models"]
        assert [(m["name"], m["version"], m["classes"], m["ready"], m["problem"]) for m in models] == [
            (name, 1, ["red", "green", "blue"], True, None) for name in two
        ]
        assert models[0]["threshold"] == -2.0 and models[0]["input_size"] == 16
        assert str(tmp_path) not in server.ask("/v1/models").body.decode()
        assert server.ask(body=photos["red.png"]).status == 404
        assert server.ask("/v1/models/b/predict", photos["red.png"]).json["model"] == "b"


def test_metrics(server: Served, photos: dict[str, bytes]) -> None:
    body, headers = files_body({**photos, "broken.png": b"no image"})
    assert server.ask(body=body, headers=headers).status == 200
    assert server.ask(body=b"").status == 400
    answer = server.ask("/metrics")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain")
    wanted = {
        'ssod_edge_verdicts_total{model="colours",verdict="known"} 3.0',
        'ssod_edge_verdicts_total{model="colours",verdict="unknown"} 1.0',
        'ssod_edge_verdicts_total{model="colours",verdict="error"} 1.0',
        'ssod_edge_unknown_share{model="colours"} 0.25',
        'ssod_edge_refused_requests_total{reason="empty"} 1.0',
        'ssod_edge_request_seconds_count{model="colours"} 1.0',
        'ssod_edge_queue_images{model="colours"} 0.0',
    }
    assert eventually(lambda: wanted <= set(server.ask("/metrics").body.decode().splitlines()))


def test_it_collects_and_monitors_as_predict_does(export: Path, tmp_path: Path, photos: dict[str, bytes]) -> None:
    served_with = Keeping({"m": str(tmp_path / "s")}, {"m": str(tmp_path / "s.json")})
    with served({"m": export}, keeping=served_with) as server:
        body, headers = files_body(photos)
        assert server.ask(body=body, headers=headers).status == 200
        page = server.ask("/metrics").body.decode()
        assert 'ssod_edge_drift{model="m"} 0.0' in page
    arguments = ["--collect", str(tmp_path / "p"), "--monitor", str(tmp_path / "p.json")]
    CliRunner().invoke(main, ["predict", str(export), str(tmp_path / "photos"), *arguments])
    records = [read_monitor(tmp_path / name) for name in ("s.json", "p.json")]
    counts = [(r.identity, r.images, r.unknown, r.failed, r.lowest, r.highest, r.histogram) for r in records]
    assert counts[0] == counts[1] and records[0].images == 4
    kept = [{path.read_bytes() for path in (tmp_path / place).glob("*.png")} for place in "sp"]
    assert kept[0] == kept[1] and photos["grey.png"] in kept[0]
    index = (tmp_path / "s" / "collected.jsonl").read_text()
    assert '"source": "grey.png"' in index
