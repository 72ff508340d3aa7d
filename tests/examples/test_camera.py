"""`examples/camera` on a recorded file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from places import ROOT
from videos import plain, write_video


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("camera_example", ROOT / "examples" / "camera" / "camera.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["camera.py", *map(str, arguments)])
    module.main()


def test_it_tells_where_the_answer_changes_and_keeps_what_is_unknown(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_video(tmp_path / "v.avi", plain(*["red"] * 50, *["grey"] * 75, *["blue"] * 75))
    run(export, video, "--keep", tmp_path / "kept", monkeypatch=monkeypatch)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    answers = [line[-1] for line in lines]
    assert answers[0] == "red" and answers[-1] == "blue" and "unknown" in answers
    assert len(answers) == len(set(answers)) == 3 and float(lines[0][0]) == 0
    assert list((tmp_path / "kept").glob("*.jpg")) or list((tmp_path / "kept").glob("*.png"))


def test_a_file_that_is_not_there_is_told(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match="nothing.mp4"):
        run(export, "nothing.mp4", monkeypatch=monkeypatch)
