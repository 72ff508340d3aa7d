"""The load tool: a short run finds nothing wrong, and a wrong answer is found."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from click.testing import CliRunner
from colour import write_colours

import ssod_edge
from ssod_edge.bench.tools.serve import damage, main, read_images
from ssod_edge.bench.tools.serve_client import Known, Tally


def test_a_short_run(export: Path, tmp_path: Path) -> None:
    photos, record = write_colours(tmp_path / "photos", 20), tmp_path / "serve.json"
    options = ["--requests", "120", "--images", "40", "--connections", "4", "--rounds", "1", "--seconds", "0.5"]
    result = CliRunner().invoke(main, [str(export), str(photos), *options, "--threads", "1", "--json", str(record)])
    assert result.exit_code == 0, result.output
    rows = {row["what"]: row for row in json.loads(record.read_text())["rows"]}
    assert list(rows) == ["steady", "vanishing", "overload", "killed", "stopped"]
    assert rows["stopped"]["exit_code"] == 0
    for what in ("steady", "vanishing", "overload", "killed"):
        assert (rows[what]["wrong"], rows[what]["lost"]) == (0, 0) and rows[what]["statuses"]["422"]
    assert rows["steady"]["cpu_ratio"] > 0 and sum(rows["steady"]["statuses"].values()) == 120


def test_a_wrong_answer_is_found(export: Path, tmp_path: Path) -> None:
    photos = write_colours(tmp_path / "photos", 2)
    with ssod_edge.open(export) as model:
        verdicts = [model.predict(photos / name / "0.png") for name in ("red", "blue")]
    right, other = (json.dumps({"verdicts": [verdict.to_dict()]}).encode() for verdict in verdicts)
    known, unreadable = Known(b"", verdicts[0]), Known(b"", replace(verdicts[0], error="no image"))
    for one, status, body, wrong in (
        (known, 200, right, 0), (known, 200, other, 1), (known, 422, b"{}", 1), (known, 429, b"{}", 0),
        (unreadable, 422, b"{}", 0), (unreadable, 200, right, 1),
    ):  # fmt: skip
        tally = Tally()
        tally.add(one, status, body, 0.1)
        assert tally.wrong == wrong


def test_images_are_damaged_in_several_ways(tmp_path: Path) -> None:
    photos = write_colours(tmp_path / "photos", 20)
    whole = {path.read_bytes() for path in photos.rglob("*.png")}
    images = read_images(str(photos), 60)
    assert len(images) == 60 and 1 <= sum(image not in whole for image in images) <= 15
    assert images == read_images(str(photos), 60), "the same each time"
    rng = random.Random(0)
    assert len({len(damage(b"x" * 500, rng)) for _ in range(20)}) >= 3


def test_too_few_photos_are_told(export: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(export), str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "nowhere" in result.output
