"""The end of the demo: what is met is not what is judged by, and a stand-in for a person names the groups."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT

from ssod_edge.data.demo import DemoSet


@pytest.fixture(scope="module")
def lesson() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_lesson", ROOT / "scripts" / "demo_lesson.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_eights_that_are_judged_by_are_of_another_handwriting(lesson):
    near = DemoSet("near")
    met = [near.drawing(place) for place in lesson.MET]
    split, places = lesson.JUDGED["eights"]
    judged = [DemoSet(split).drawing(place) for place in places]
    assert {drawing.what for drawing in met + judged} == {"digit-8"}
    assert len(judged) >= 80 and not {d.instance for d in met} & {d.instance for d in judged}
    split, places = lesson.JUDGED["digits 0 to 7"]
    assert split == "test" and not set(places) & set(lesson.MET_KNOWN) and len(DemoSet(split)) >= max(places)
    assert {DemoSet("near").drawing(place).what for place in lesson.JUDGED["nines"][1]} == {"digit-9"}


def test_the_groups_that_are_mostly_eights_become_one_and_the_others_wait(lesson, tmp_path, capsys):
    groups = {"group-01": "888", "group-02": "8818", "group-03": "11188", "singles": "87"}
    lines = []
    for group, digits in groups.items():
        (tmp_path / "groups" / group).mkdir(parents=True)
        for number, digit in enumerate(digits):
            name = f"{group}-{number}.png"
            (tmp_path / "groups" / group / name).write_bytes(b"")
            lines.append(json.dumps({"file": name, "source": f"field/near-{number:03}-digit-{digit}.png"}))
    (tmp_path / "collected.jsonl").write_text("\n".join(lines))
    lesson.look(tmp_path)
    found = {path.name: sorted(p.name for p in path.iterdir()) for path in (tmp_path / "groups").iterdir()}
    assert set(found) == {"8", "discard", "group-03", "singles"}
    assert len(found["8"]) == 6 and found["discard"] == ["group-02-2.png"]
    assert len(found["group-03"]) == 5 and len(found["singles"]) == 2
    assert "stands for a person" in capsys.readouterr().out


def test_a_desk_has_known_digits_that_nothing_is_judged_by(lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "AT_THE_DESK", range(16))
    (tmp_path / "classes" / "8").mkdir(parents=True)
    DemoSet("near").image(0).save(tmp_path / "classes" / "8" / "one.png")
    lesson.photos(Path(tmp_path / "photos"), tmp_path)
    found = {path.name: len(list(path.iterdir())) for path in (tmp_path / "photos").iterdir()}
    assert found == {**dict.fromkeys("01234567", 2), "8": 1}
