"""Verdicts over HTTP: what is asked, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from colour import COLOURS, paint
from served import Served, files_body, served

import ssod_edge


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
