"""The way of an image: what happens at each station when something is wrong there."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from colour import edit_spec, paint
from PIL import Image
from served import Served, eventually, files_body, say_slowly, served

import ssod_edge
from ssod_edge.data.jpeg import tells_damage
from ssod_edge.serve.lane import Opened, in_public


@pytest.fixture
def red(tmp_path: Path) -> bytes:
    return paint(tmp_path / "red.png", "red").read_bytes()


@pytest.fixture
def server(export: Path) -> Iterator[Served]:
    with served({"m": export}) as running:
        yield running


def test_what_waits_for_the_old_export_is_answered_by_it(
    server: Served, make_export: Callable[..., Path], tmp_path: Path, red: bytes
) -> None:
    """Also where images of both wait in one queue: no run of the engine holds both."""
    lane, before = server.service.models["m"].lane, server.service.models["m"].lane.opened
    other = make_export(tmp_path / "other")
    edit_spec(other, lambda spec: replace(spec, source={"version": 7}))
    model = ssod_edge.open(other)
    slow = say_slowly(before.predictor.runner, 0.5)
    versions: list[int] = []

    def ask() -> None:
        versions.append(server.ask(body=red).json["version"])

    with ThreadPoolExecutor(5) as clients:
        clients.submit(ask)
        assert eventually(lambda: len(slow.runs) == 1)
        for _ in range(2):
            clients.submit(ask)
        assert eventually(lambda: lane.inside == 3)
        swapped = threading.Event()
        assert lane._loop is not None
        lane._loop.call_soon_threadsafe(lambda: (lane.swap(Opened(model, model.close)), swapped.set()))
        assert swapped.wait(5)
        for _ in range(2):
            clients.submit(ask)
    assert sorted(versions) == [1, 1, 1, 7, 7] and sum(slow.runs) == 3
    assert eventually(lambda: before.pending == 0 and before.retired)


def test_a_fault_while_decoding_is_told_without_its_words(
    server: Served, red: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("secret")

    monkeypatch.setattr("ssod_edge.serve.lane.read_pixels", fails)
    answer = server.ask(body=red)
    assert (answer.status, answer.json) == (422, {"error": "it cannot be read"})
    assert capfd.readouterr().err == "error: an image could not be decoded: ValueError: secret\n"


def test_who_watches_and_fails_costs_no_verdict(server: Served, red: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    def fails(_seen: object) -> None:
        raise ValueError("full disk")

    server.service.models["m"].lane.opened.predictor.watchers.append(fails)
    assert server.ask(body=red).status == 200 == server.ask(body=red).status
    lines: list[str] = []
    assert eventually(lambda: len(lines.extend(capfd.readouterr().err.splitlines()) or lines) == 2)
    assert lines[0] == "error: 'm': ValueError: full disk"


@pytest.mark.skipif(not tells_damage(), reason="simplejpeg is not here")
def test_a_damaged_picture_has_a_warning(server: Served) -> None:
    file = io.BytesIO()
    Image.effect_noise((200, 200), 80).convert("RGB").save(file, "JPEG")
    cut = file.getvalue()[:-2000]
    body, headers = files_body({"cut.jpg": cut})
    (verdict,) = server.ask(body=body, headers=headers).json["verdicts"]
    with ssod_edge.open(server.service.models["m"]._folder) as model:
        (wanted,) = model.predict_many([cut])
    assert (verdict["image_warning"], verdict["error"] is None) == (wanted.image_warning, wanted.error is None)
    assert verdict["image_warning"] or verdict["error"]


def test_an_answer_that_is_not_finite_is_an_error(server: Served, red: bytes) -> None:
    runner = server.service.models["m"].lane.opened.predictor.runner
    infer = runner.infer
    runner.infer = lambda inputs: {name: values * float("nan") for name, values in infer(inputs).items()}
    answer = server.ask(body=red)
    assert (answer.status, answer.json) == (422, {"error": "the model has no finite answer for it"})


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("image bytes: it is empty", "it is empty"),
        ("image bytes: damaged or unsupported image data (<_io.BytesIO at 0x7f>)", "damaged or unsupported image data"),
        ("image bytes: damaged image data (Premature end of JPEG file)", "damaged image data"),
        (
            "image bytes: a HEIC picture needs the package 'pillow_heif', which is not installed. Install it with: pip "
            "install 'ssod-edge[heic]'",
            "a kind of picture that this server does not read; send JPEG or PNG",
        ),
    ],
)
def test_what_libraries_say_stays_inside(error: str, told: str) -> None:
    assert in_public(error) == told
