"""What was decided on the page: piles, undo, names, and a draft that any kill leaves whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from collected import picture, write_collected

from ssod_edge.cli import main
from ssod_edge.errors import OutputError, UsageError
from ssod_edge.runtime.field import review as review_module
from ssod_edge.runtime.field import review_draft as module
from ssod_edge.runtime.field.review_draft import Draft, Step, class_name
from ssod_edge.runtime.field.shelf import Shelf

pytest.importorskip("sklearn", reason="needs the extra 'teach'")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "kept"
    write_collected(folder, {7: 6, 10: 4, 3: 1})
    return folder


@pytest.fixture
def collected(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "kept"))


def opened(folder: Path) -> Draft:
    return Draft(folder, folder / "classes")


def shown(draft: Draft) -> dict[str, list[str]]:
    return {name or kind: sorted(files) for (kind, name), files in draft.piles().items()}


def images(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.jpg")}


SEVEN = [f"07-{n:03}.jpg" for n in range(6)]
TEN = [f"10-{n:03}.jpg" for n in range(4)]
START = {"group-01": SEVEN, "group-02": TEN, "singles": ["03-000.jpg"]}


def test_the_groups_are_those_of_folders(collected: Path, tmp_path: Path) -> None:
    assert shown(opened(collected)) == START
    other = Path(shutil.copytree(collected, tmp_path / "other"))
    assert CliRunner().invoke(main, ["review", str(other), "--folders"]).exit_code == 0
    groups = {path.name: sorted(images(path)) for path in (other / "groups").iterdir() if path.is_dir()}
    assert groups == START


def test_steps_and_undo(collected: Path) -> None:
    draft = opened(collected)
    draft.step(Step("class", " mug ", tuple(SEVEN)))
    assert shown(draft) == {"group-02": TEN, "singles": ["03-000.jpg"], "mug": SEVEN}
    draft.step(Step("discard", None, tuple(TEN[:1])))
    draft.step(Step("group", None, tuple(TEN[1:3])))
    draft.step(Step("group", "group-03", (TEN[3], "03-000.jpg")))
    assert shown(draft) == {"group-03": ["03-000.jpg", *TEN[1:]], "mug": SEVEN, "discard": TEN[:1]}
    draft.step(Step("class", "cup", (SEVEN[0],)))
    assert shown(draft)["mug"] == SEVEN[1:]
    for _ in range(5):
        draft.step(Step("undo"))
    assert shown(draft) == START and draft.touched == tuple(SEVEN)
    with pytest.raises(UsageError, match="nothing to undo"):
        draft.step(Step("undo"))


@pytest.mark.parametrize(
    "step",
    [
        Step("class", "mug", ("../../etc/passwd",)),
        Step("class", "mug", ("collected.jsonl",)),
        Step("class", "mug", ()),
        Step("class", None, (SEVEN[0],)),
        Step("group", "group-09", (SEVEN[0],)),
        Step("group", "../x", (SEVEN[0],)),
    ],
)
def test_a_step_that_cannot_be_taken_changes_nothing(collected: Path, step: Step) -> None:
    draft = opened(collected)
    with pytest.raises(UsageError):
        draft.step(step)
    assert shown(draft) == START and not (collected / "draft.jsonl").exists() and draft.changes == 0


@pytest.mark.parametrize(
    "name",
    ["", "  ", "a/b", "/", "..", ".", ".hidden", "__MACOSX", "lost+found", "discard", "singles", "group-07", "a\nb",
     "nul\0", "\u2028", "x" * 256, "\u00e9" * 128],
)  # fmt: skip
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        class_name(name)


def test_names_are_those_of_folders() -> None:
    assert class_name(" cafe\u0301 ") == "caf\u00e9" and class_name("t-shirt, red") == "t-shirt, red"
    assert class_name("\u676f\u5b50") == "\u676f\u5b50" and class_name("group-x") == "group-x"


def test_an_accent_in_another_form_is_the_same_class(collected: Path) -> None:
    (collected / "classes" / "cafe\u0301").mkdir(parents=True)
    draft = opened(collected)
    assert draft.names() == (["caf\u00e9"], ["cup", "fork", "plate"])
    draft.step(Step("class", "cafe\u0301", tuple(SEVEN)))
    draft.step(Step("class", "caf\u00e9", tuple(TEN)))
    assert shown(draft)["caf\u00e9"] == SEVEN + TEN
    draft.finish()
    assert [path.name for path in (collected / "classes").iterdir()] == ["cafe\u0301"]


def test_finish_writes_what_folders_would(collected: Path) -> None:
    draft = opened(collected)
    draft.step(Step("class", "mug", tuple(SEVEN)))
    draft.step(Step("class", "Cup", ("03-000.jpg",)))
    draft.step(Step("discard", None, tuple(TEN[:3])))
    assert draft.finish() == [
        "Cup: 1 image", "note: 'Cup' is a new class beside 'cup', which the model knows", "mug: 6 images",
        f"3 discarded, 1 undecided; log in '{collected / 'decisions.jsonl'}'",
        f"Classes are in '{collected / 'classes'}'",
    ]  # fmt: skip
    assert images(collected / "classes" / "mug") == set(SEVEN) and images(collected) == {TEN[3]}
    assert [line.file for line in Shelf(collected).lines] == [TEN[3]] and not (collected / "draft.jsonl").exists()
    rows = [json.loads(line) for line in (collected / "decisions.jsonl").read_text().splitlines()]
    found = {row["file"]: (row["decision"], row["class_name"], row["group"]) for row in rows}
    assert found[SEVEN[0]] == ("class", "mug", "group-01") and found[TEN[0]] == ("discarded", None, "group-02")
    assert len(rows) == 10 and rows[0]["collected"]["source"].startswith("belt/")


def test_a_draft_is_read_again_and_new_images_are_added(collected: Path) -> None:
    draft = opened(collected)
    draft.step(Step("class", "mug", tuple(SEVEN[:4])))
    draft.step(Step("group", None, tuple(SEVEN[4:])))
    draft.step(Step("discard", None, ("03-000.jpg",)))
    draft.step(Step("undo"))
    before = shown(draft)
    assert shown(opened(collected)) == before
    for number in range(3):
        picture(21, number).save(collected / f"new-{number}.png")
    (collected / SEVEN[0]).unlink()  # as collecting does, to stay in its budget
    before["mug"].remove(SEVEN[0])
    again = opened(collected)
    assert shown(again) == {**before, "group-04": [f"new-{number}.png" for number in range(3)]}
    again.step(Step("class", "mug", (*SEVEN[4:], "new-0.png")))
    (collected / SEVEN[1]).unlink()
    assert again.finish()[0] == "mug: 5 images"
    assert images(collected / "classes" / "mug") == set(SEVEN[2:])


def test_a_page_on_which_nothing_was_decided_leaves_nothing(collected: Path) -> None:
    assert not opened(collected).decided and not (collected / "draft.jsonl").exists()


def test_a_line_that_is_cut_short_counts_for_nothing(collected: Path) -> None:
    draft = opened(collected)
    draft.step(Step("class", "mug", tuple(SEVEN)))
    draft.step(Step("discard", None, tuple(TEN)))
    whole = (collected / "draft.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    first, second = len(lines[0]), len(lines[0]) + len(lines[1])
    for length in range(0, len(whole) + 1, 7):
        (collected / "draft.jsonl").write_bytes(whole[:length])
        draft = opened(collected)
        taken = (length >= second - 1) + (length >= len(whole) - 1)
        assert ("mug" in shown(draft), "discard" in shown(draft)) == (taken > 0, taken > 1)
        draft.step(Step("class", "fork", ("03-000.jpg",)))
        assert shown(opened(collected)) == shown(draft)
    assert 0 < first < second < len(whole)


def test_a_full_disk_leaves_the_last_step_out(collected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = opened(collected)

    def full(*_: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(module, "append_lines", full)
    with pytest.raises(OutputError):
        draft.step(Step("class", "mug", tuple(SEVEN)))
    assert shown(draft) == START
    monkeypatch.undo()
    draft.step(Step("class", "mug", tuple(SEVEN)))
    assert shown(opened(collected)) == shown(draft)


@pytest.mark.parametrize("after", range(0, 40, 3))
def test_a_kill_while_finishing_loses_nothing(collected: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    draft = opened(collected)
    draft.step(Step("class", "mug", tuple(SEVEN)))
    draft.step(Step("discard", None, tuple(TEN)))
    left = [after]
    for owner, name in [(review_module.os, "link"), (review_module, "append_lines"), (Path, "unlink"),
                        (review_module, "write_index")]:  # fmt: skip
        real = getattr(owner, name)

        def counted(*arguments: object, real: object = real, **options: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
            return real(*arguments, **options)  # type: ignore[operator]

        monkeypatch.setattr(owner, name, counted)
    try:
        draft.finish()
    except KilledError:
        monkeypatch.undo()
        again = opened(collected)
        again.finish()
    monkeypatch.undo()
    assert images(collected / "classes" / "mug") == set(SEVEN) and images(collected) == {"03-000.jpg"}
    rows = [json.loads(line) for line in (collected / "decisions.jsonl").read_text().splitlines()]
    assert sorted(row["file"] for row in rows) == SEVEN + TEN


def test_folders_and_page_keep_out_of_each_others_way(collected: Path) -> None:
    opened(collected).step(Step("class", "mug", tuple(SEVEN)))
    done = CliRunner().invoke(main, ["review", str(collected), "--folders"])
    assert done.exit_code == 2 and "holds decisions of the page" in done.stderr
    (collected / "draft.jsonl").unlink()
    assert CliRunner().invoke(main, ["review", str(collected), "--folders"]).exit_code == 0
    done = CliRunner().invoke(main, ["review", str(collected), "--no-browser"])
    assert done.exit_code == 2 and "groups' is there. End that with" in done.stderr


def test_an_image_whose_name_is_no_unicode_stays_where_it_is(collected: Path) -> None:
    odd = collected / "odd\udcff.png"
    picture(7, 50).save(odd)
    assert shown(opened(collected)) == START
    assert CliRunner().invoke(main, ["review", str(collected), "--folders"]).exit_code == 0
    assert CliRunner().invoke(main, ["review", str(collected), "--folders", "--done"]).exit_code == 0
    assert odd.exists()
