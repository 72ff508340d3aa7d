"""`model.teach` from Python: as the command, of images in memory too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lesson import CLASSES, snapshot, write_photos
from PIL import Image

import ssod_edge
from ssod_edge.errors import ImageError, UsageError, VerificationError
from ssod_edge.spec import load_spec

FREELY = {"alike": True, "max_drop": 20}


def arrays(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.png"))]


def test_paths_and_arrays_give_what_the_folder_gives(light: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "new", "f", 5, seed=2)
    paths, before, lines = sorted((photos / "f").iterdir()), snapshot(light), []
    with ssod_edge.open(light) as model:
        verdict = model.predict(paths[0])
        one = model.teach("f", [*map(str, paths[:2]), *paths[2:]], out=tmp_path / "one", say=lines.append, **FREELY)
        two = model.teach("f", arrays(photos), out=tmp_path / "two", **FREELY)
        three = model.teach({"f": photos / "f"}, out=tmp_path / "three", **FREELY)
        assert model.predict(paths[0]) == verdict and model.runner.spec.classes == CLASSES
    assert snapshot(light) == before
    assert one.folder == tmp_path / "one" and os.fspath(one) == str(one.folder) and one.unreadable == ()
    assert one.proof["new"]["f"]["photos"] == 5 and any("fitted and proved" in line for line in lines)
    assert one.spec == load_spec(one) and one.spec.source["taught"]["data"] == "images from Python"
    assert one.spec.reference_sha256 == two.spec.reference_sha256 == three.spec.reference_sha256
    with ssod_edge.open(one) as model:
        assert model.runner.spec.classes == (*CLASSES, "f")


def test_several_classes_in_place_and_one_that_goes(light: Path, tmp_path: Path) -> None:
    door = tmp_path / "door"
    shutil.copytree(light, door)
    photos = write_photos(tmp_path / "new", "fgb", 4, seed=2)
    with ssod_edge.open(door) as model:
        given = {name: arrays(photos / name) for name in "fgb"}
        done = model.teach(given, forget="a", **FREELY)
        assert model.predict(given["f"][0]).error is None
        assert done.folder == door and done.spec.classes == ("b", "c", "d", "e", "f", "g") and done.spec.version == 2
        assert done.spec.taught["photos"] == {"b": 4, "f": 4, "g": 4}
        again = model.teach({}, forget=["b", "c"], **FREELY)  # of what the folder holds now
    assert again.spec.version == 3 and again.spec.classes == ("d", "e", "f", "g")


def test_errors_are_those_of_the_command(light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = write_photos(tmp_path / "new", "f", 4, seed=2)
    wrong = np.zeros((8, 8, 3), np.float32)
    out = tmp_path / "out"
    with ssod_edge.open(light) as model:
        for given, message in (
            (("f", []), "no images of the class 'f' were given"),
            (({},), "there is nothing to teach"),
            (("f",), "give images of 'f'"),
            (({"f": arrays(photos)}, arrays(photos)), "class -> images, and nothing after it"),
            (("", arrays(photos)), "cannot be the name of a class: it is empty"),
            (("../f", arrays(photos)), "it could not be the name of a folder"),
            (("f\n", arrays(photos)), "control characters"),
            (("B", arrays(photos)), "is spelled like 'b'"),
            (("f", [wrong, wrong]), "has 0 photos that can be read .left out: 'image 1 of 2': .*float32"),
            (("f", arrays(photos)[:1]), "has 1 photo that can be read. It takes 2"),
            (("f", [*arrays(photos)[:1]] * 3), "has 1 photo that can be read. It takes 2"),
            (("f", [tmp_path / "nowhere.jpg"] * 3), "nowhere.jpg': No such file"),
        ):
            with pytest.raises(UsageError, match=message):
                model.teach(*given, out=out)
        with pytest.raises(TypeError):
            model.teach("f", arrays(photos), out=out, most=3)
        done = model.teach("f", [*arrays(photos), wrong, tmp_path / "nowhere.jpg"], out=out, **FREELY)
        assert len(done.unreadable) == 2 and done.proof["new"]["f"]["photos"] == 4
        monkeypatch.setattr("ssod_edge.teach.rows.TAKEN", (0.5,))
        monkeypatch.setattr("ssod_edge.teach.teach.SPENT", 50)
        with pytest.raises(VerificationError, match="nothing is released"):
            model.teach("f", arrays(photos), out=tmp_path / "costly", alike=True)
    assert not (tmp_path / "costly").exists()


def test_a_checkpoint_cannot_be_taught(exported: Path, tmp_path: Path) -> None:
    with ssod_edge.open(exported.parent, engine="eager") as model, pytest.raises(UsageError, match="export it"):
        model.teach("f", [tmp_path / "1.jpg"])


def test_it_needs_no_pytorch(light: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "new", "f", 3, seed=2)
    code = (
        "import sys, ssod_edge\nfrom pathlib import Path\n"
        f"with ssod_edge.open({str(light)!r}, engine='onnxruntime') as model:\n"
        f"    new = model.teach('f', Path({str(photos / 'f')!r}), {str(tmp_path / 't')!r}, alike=True, max_drop=20)\n"
        "print(new.spec.classes[-1], 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "f False\n", done.stderr


def test_an_image_error_names_the_image() -> None:
    from ssod_edge.teach.given import GivenImages

    with pytest.raises(ImageError, match="'image 2 of 2'"):
        GivenImages({"f": [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3))]}).picture(1)
