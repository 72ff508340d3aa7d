"""Sorting what was collected: groups of what looks alike, folders as decisions, through kills, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from collected import picture
from PIL import Image

import ssod_edge
from ssod_edge import Collector
from ssod_edge.cli import main
from ssod_edge.data.layout import FolderReader, check_layout
from ssod_edge.runtime.field import review as module
from ssod_edge.runtime.field.shelf import Shelf

pytest.importorskip("sklearn", reason="needs the extra 'teach'")


@pytest.fixture(scope="module")
def template(export_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 pictures of one kind, 4 of another, and one that is like no other."""
    out = tmp_path_factory.mktemp("template") / "kept"
    with ssod_edge.open(export_template, engine="onnxruntime") as model, Collector(out, model) as collector:
        for kind, count in ((7, 6), (10, 4), (3, 1)):
            for number in range(count):
                model.predict(picture(kind, number))
        assert collector.kept == 11
    return out


@pytest.fixture
def collected(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "kept"))


def review(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["review", *map(str, arguments)])


def sort(folder: Path) -> Path:
    done = review(folder, "--folders")
    assert done.exit_code == 0, done.output
    return folder / "groups"


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix in (".png", ".jpg")} if folder.exists() else set()


def test_what_looks_alike_lies_together(collected: Path) -> None:
    before = names(collected)
    groups = sort(collected)
    sizes = {path.name: len(names(path)) for path in groups.iterdir() if path.is_dir()}
    assert sizes == {"group-01": 6, "group-02": 4, "singles": 1}
    assert names(collected) == before, "they are still collected"
    one = next(iter(names(groups / "group-01")))
    assert os.path.samefile(groups / "group-01" / one, collected / one), "and take no room twice"


def test_renamed_folders_become_classes(collected: Path) -> None:
    groups = sort(collected)
    mugs = names(groups / "group-01")
    (groups / "group-01").rename(groups / "mug")
    unwanted = names(groups / "group-02")
    (groups / "group-02").rename(groups / "discard")
    single = names(groups / "singles")
    done = review(collected, "--folders", "--done")
    assert done.exit_code == 0 and "mug: 6 images" in done.stdout and "4 discarded, 1 undecided" in done.stdout
    assert names(collected / "classes" / "mug") == mugs and names(collected) == single
    assert not groups.exists() and {line.file for line in Shelf(collected).lines} == single
    rows = {row["file"]: row for row in log(collected)}
    assert set(rows) == mugs | unwanted
    for name, row in rows.items():
        wanted = ("class", "mug", "group-01") if name in mugs else ("discarded", None, "group-02")
        assert (row["decision"], row["class_name"], row["group"]) == wanted
        assert row["collected"]["known"] is False and row["collected"]["file"] == name
    reader = FolderReader(str(collected / "classes"))
    check_layout("classes", reader)
    assert len(reader.names) == 6


def test_images_may_be_moved_deleted_and_added(collected: Path, tmp_path: Path) -> None:
    groups = sort(collected)
    first, second, third = sorted(names(groups / "group-01"))[:3]
    (groups / "shoe").mkdir()
    (groups / "group-01" / first).rename(groups / "shoe" / first)
    (groups / "group-01" / second).unlink()
    picture(8, 0).save(groups / "shoe" / "mine.png")
    done = review(collected, "--folders", "--done", "-o", tmp_path / "out")
    assert done.exit_code == 0 and names(tmp_path / "out" / "shoe") == {first, "mine.png"}
    assert third in names(collected) and not {first, second} & names(collected)
    assert {(row["file"], row["class_name"]) for row in log(collected)} == {
        (first, "shoe"), ("mine.png", "shoe"), (second, None),
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"shoe"}


def test_a_class_that_is_there_gets_more(collected: Path) -> None:
    """Under either spelling of its accent, and of two images with one name both stay."""
    folder = collected / "classes" / "cafe\u0301"
    folder.mkdir(parents=True)
    groups = sort(collected)
    name = sorted(names(groups / "group-01"))[0]
    Image.new("RGB", (9, 9)).save(folder / name)
    (groups / "group-01").rename(groups / "caf\u00e9")
    assert review(collected, "--folders", "--done").exit_code == 0
    assert [path.name for path in (collected / "classes").iterdir()] == ["cafe\u0301"] and len(names(folder)) == 7


def test_undecided_images_are_sorted_again(collected: Path) -> None:
    groups = sort(collected)
    done = review(collected, "--folders")
    assert done.exit_code == 2 and "is there already" in done.stderr
    shutil.rmtree(groups)
    assert review(collected, "--folders", "--done").exit_code == 2, "no groups, no decisions"
    assert len(names(collected)) == 11
    sort(collected)
    assert review(collected, "--folders", "--done").exit_code == 0
    assert len(names(collected)) == 11 and not (collected / "decisions.jsonl").exists()


def test_images_without_lines_are_sorted_by_their_pixels(collected: Path) -> None:
    (collected / "collected.jsonl").unlink()
    groups = sort(collected)
    assert len(names(groups / "group-01")) == 6
    (groups / "group-01").rename(groups / "mug")
    assert review(collected, "--folders", "--done").exit_code == 0
    assert [row["collected"] for row in log(collected)] == [None] * 6


def _nested(groups: Path) -> None:
    (groups / "group-01" / "mug").mkdir()


def _beside(groups: Path) -> None:
    picture(9, 0).save(groups / "mine.png")


def _twice(groups: Path) -> None:
    name = sorted(names(groups / "group-01"))[0]
    shutil.copy(groups / "group-01" / name, groups / "group-02" / name)


def _unnamed(groups: Path) -> None:
    picture(9, 0).save(groups / "group-01" / "mine.png")


def _note(groups: Path) -> None:
    (groups / "group-02" / "note.txt").write_text("mugs")


@pytest.mark.parametrize("spoil", [_nested, _beside, _twice, _unnamed, _note])
def test_what_is_not_clear_is_refused_before_anything_is_done(collected: Path, spoil: Callable[[Path], None]) -> None:
    groups = sort(collected)
    (groups / "singles").rename(groups / "mug")
    spoil(groups)
    before = sorted(collected.rglob("*"))
    done = review(collected, "--folders", "--done")
    assert done.exit_code == 2 and done.stderr.startswith("error: ")
    assert sorted(collected.rglob("*")) == before


def test_a_kill_between_any_two_steps_loses_nothing(collected: Path, tmp_path: Path) -> None:
    """Each step that changes the disk is the last one once; the next run ends the work."""

    class KilledError(BaseException):
        pass

    groups = sort(collected)
    (groups / "group-01").rename(groups / "mug")
    deleted = sorted(names(groups / "group-02"))[0]
    (groups / "group-02" / deleted).unlink()
    mugs, rest = names(groups / "mug"), names(collected)
    steps = [(os, "link"), (module, "append_lines"), (Path, "unlink"), (Path, "rename"), (shutil, "rmtree"),
             (module, "write_index")]  # fmt: skip
    for after in range(40):
        folder = tmp_path / f"kill-{after}"
        shutil.copytree(collected, folder)
        with pytest.MonkeyPatch.context() as patch:
            left = [after]
            for owner, name in steps:
                patch.setattr(owner, name, _until(left, getattr(owner, name), KilledError))
            try:
                module.decide(folder, folder / "classes")
                killed = False
            except KilledError:
                killed = True
        if killed:
            again = review(folder, "--folders", "--done")
            assert again.exit_code == 0 or "there are no groups" in again.stderr, again.output
        assert names(folder / "classes" / "mug") == mugs and names(folder) == rest - mugs - {deleted}
        decided = [(row["file"], row["class_name"]) for row in log(folder)]
        assert sorted(decided, key=str) == sorted([*((name, "mug") for name in mugs), (deleted, None)], key=str)
        shutil.rmtree(folder)
        if not killed:
            break
    assert not killed and after > 15


def _until(left: list[int], real: Callable[..., object], error: type[BaseException]) -> Callable[..., object]:
    def step(*arguments: object, **options: object) -> object:
        if left[0] == 0:
            raise error
        left[0] -= 1
        return real(*arguments, **options)

    return step


def test_a_kill_while_sorting_leaves_no_groups(collected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", killed)
    assert review(collected, "--folders").exit_code == 130
    monkeypatch.undo()
    assert not (collected / "groups").exists()
    sort(collected)
    assert not list(collected.glob(".groups.*"))


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collected: Path) -> None:
    assert review(tmp_path / "none", "--folders").exit_code == 2
    (tmp_path / "empty").mkdir()
    assert "holds no collected images" in review(tmp_path / "empty", "--folders").stderr
    assert "--done belongs to --folders" in review(collected, "--done").stderr
    assert "--port belongs to the page" in review(collected, "--folders", "--port", "8000").stderr
    assert review(collected, "--folders", "-o", tmp_path).exit_code == 2
    with monkeypatch.context() as patch:
        patch.setattr("ssod_edge.runtime.field.review.os.access", lambda path, mode: False)
        for arguments in (["--folders"], ["--no-browser"]):
            done = review(collected, *arguments)
            assert done.exit_code == 1 and "cannot write into" in done.stderr and not done.stdout
    groups = sort(collected)
    assert review(collected, "--folders", "--done").stdout.splitlines()[-1] == "0 discarded, 11 undecided"
    groups = sort(collected)
    (groups / "groups.json").write_text("{")
    assert review(collected, "--folders", "--done").exit_code == 4
    shutil.rmtree(groups)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    done = review(collected, "--folders")
    assert done.exit_code == 3 and "pip install 'ssod-edge[teach]'" in done.stderr
