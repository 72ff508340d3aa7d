"""Names whose bytes are not UTF-8, which Python writes as surrogates: they never reach a library in C++."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from colour import colour_images
from pictures import write_folder

from ssod_edge.cli import main
from ssod_edge.config import TrainConfig
from ssod_edge.data.sources import open_dataset
from ssod_edge.errors import UsageError
from ssod_edge.files import json_text, unicode_path, write_json
from ssod_edge.json_reader import is_unicode, read_json
from ssod_edge.runtime.engines import onnxruntime, openvino
from ssod_edge.runtime.field.frames import FrameReader
from ssod_edge.runtime.open import open_runner

ODD = os.fsdecode(b"v\xff")


@pytest.mark.parametrize(
    "name", ["a.avi", f"{ODD}.avi", f"{ODD}/a.avi", f"{ODD}/{ODD}.avi", f"a{ODD}.{ODD}", "\u00e9.avi"]
)
def test_a_library_gets_unicode(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(name, encoding="utf-8", errors="surrogateescape")
    with unicode_path(path) as given:
        assert is_unicode(given) and os.path.samefile(given, path)
        assert given.endswith(".avi") or not is_unicode(path.suffix)
        assert given == str(path) or not is_unicode(name)
    assert given == str(path) or not os.path.lexists(given)


def test_without_a_temporary_folder_the_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(UsageError, match="not UTF-8, and no link"), unicode_path(tmp_path / ODD):
        pass
    with unicode_path(tmp_path / "a"):
        pass


def test_a_video(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs the extra 'video'")
    writer = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 64))
    for grey in (0, 200):
        writer.write(np.full((64, 64, 3), grey, np.uint8))
    writer.release()
    (tmp_path / "a.avi").rename(tmp_path / f"{ODD}.avi")
    with FrameReader(str(tmp_path / f"{ODD}.avi")) as frames:
        assert [int(frame.pixels.mean()) > 100 for frame in frames] == [False, True] and frames.problem is None
    for source in ({"source": f"rtsp://host/{ODD}"}, {"camera": ODD}, {"camera": f"{ODD} ! appsink"}):
        with pytest.raises(UsageError, match="not UTF-8"):
            FrameReader(**source)


@pytest.mark.parametrize("engine", [onnxruntime.OnnxRunner.engine, openvino.OpenVinoRunner.engine])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_export_folder(make_export: Callable[..., Path], tmp_path: Path, engine: str, precision: str) -> None:
    images = {"image": colour_images(2)}
    with open_runner(make_export(tmp_path / "a"), engine=engine, precision=precision) as runner:
        expected = runner.infer(images)
    shutil.copytree(tmp_path / "a", tmp_path / ODD)
    with open_runner(tmp_path / ODD, engine=engine, precision=precision) as runner:
        assert np.array_equal(runner.infer(images)["logits"], expected["logits"])


def test_a_bundle(export: Path, tmp_path: Path) -> None:
    bundle, out = tmp_path / f"{ODD}.tar", tmp_path / f"{ODD}2"
    for arguments in (["package", export, "-o", bundle], ["export", "--from", bundle, "-o", out], ["history", out]):
        result = CliRunner().invoke(main, [*map(str, arguments)])
        assert result.exit_code == 0, result.output


def test_a_record_is_read_again(tmp_path: Path) -> None:
    record = {"data": f"/photos/{ODD}", ODD: ["\u00e9\U0001f600", 1.5], "plain": "\\ud800"}
    shown = {"data": "/photos/v\ufffd", "v\ufffd": ["\u00e9\U0001f600", 1.5], "plain": "\\ud800"}
    assert read_json(write_json(tmp_path / "a.json", record)) == shown
    assert "\\u00e9" in json_text({"a": "\u00e9"}), "the rest is written as ever"


@pytest.mark.parametrize("field", ["data", "val", "negatives", "group", "name", "weights"])
def test_a_run_that_could_not_be_read_again_does_not_begin(field: str) -> None:
    values = {"backbone": "resnet18", "data": "photos", field: ODD}
    with pytest.raises(UsageError, match=f"{field} must be text in UTF-8; rename the file or folder"):
        TrainConfig(**values)


def test_a_class_whose_name_is_not_utf8(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos")
    (tmp_path / "photos" / "class1").rename(tmp_path / "photos" / ODD)
    with pytest.raises(UsageError, match="has a name that is not UTF-8. Rename its folder"):
        open_dataset(str(tmp_path / "photos"))
