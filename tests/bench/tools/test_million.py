"""The tool that judges very many images, kills it and goes on."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from colour import paint

from ssod_edge.bench.tools.million import main


def test_each_image_has_one_row(export: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("red", "blue", "grey")):
        paint(tmp_path / "photos" / f"{number}.png", name)
    record = tmp_path / "record.json"
    words = [str(export), str(tmp_path / "photos"), "--images", "400", "--batch", "1", "--json", str(record)]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(record.read_text())
    assert (found["missing"], found["twice"]) == (0, 0)
    assert [row["what"] for row in found["rows"]] == ["killed", "gone on", "again"]
    assert sum(row["images"] for row in found["rows"]) == 400
