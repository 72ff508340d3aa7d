"""The page of `review` in a real browser, by real keys, with 500 images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import ActionChains, Keys, browser
from collected import write_collected

pytest.importorskip("sklearn", reason="needs the extra 'teach'")
#: Kind -> how many: nine groups, and three that are like no other.
KINDS = {2: 90, 3: 80, 4: 70, 5: 60, 6: 50, 7: 50, 8: 40, 9: 30, 10: 27, 11: 1, 12: 1, 13: 1}
KNOWN = ["cup", "fork", "plate"]


def of(kind: int) -> list[str]:
    return [f"{kind:02}-{number:03}.jpg" for number in range(KINDS[kind])]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "kept"
    assert len(write_collected(folder, KINDS, scale=8)) == 500
    (folder / "02-003.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser(1280, 800, "browser") as found:
        yield found


class Page:
    """The command at work, and the browser that shows its page."""

    def __init__(self, driver: Any, folder: Path):
        self.driver, self.folder = driver, folder
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "ssod_edge", "review", str(self.folder), "--no-browser"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        self.driver.get(next(line for line in lines if "http://" in line).split()[-1])
        self.until(lambda: self.ask("return state !== null"))

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def until(self, true: Callable[[], Any], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, (
                self.ask("return document.body.innerText.slice(0, 2000)"),
                self.piles(),
            )
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Press keys one after another, and wait for the answer to each."""
        for key in keys:
            ActionChains(self.driver, duration=0).send_keys(key).perform()
            self.until(lambda: not self.ask("return busy"))

    def piles(self) -> dict[str, list[str]]:
        found = self.ask("return state.piles.map(pile => [pile.name ?? pile.kind, pile.files])")
        return {name: sorted(files) for name, files in found}

    @property
    def here(self) -> str:
        """The image that has the keyboard."""
        return str(self.ask("return document.activeElement.dataset.file"))

    @property
    def marked(self) -> list[str]:
        script = "return [...document.querySelectorAll('figure[aria-selected=true]')].map(one => one.dataset.file)"
        return sorted(self.ask(script))

    def text(self, place: str) -> str:
        return str(self.ask(f"return document.querySelector('{place}').textContent"))


@pytest.fixture
def page(template: Path, tmp_path: Path, driver: Any) -> Iterator[Page]:
    made = Page(driver, Path(shutil.copytree(template, tmp_path / "kept")))
    yield made
    made.process.kill()
    made.process.communicate(timeout=60)
    errors = [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"]
    # It says so where the command was killed, or a name was refused.
    assert not [line for line in errors if "02-003.jpg" not in line and "Failed to load resource" not in line]


LOADED = "return [...document.images].filter(one => one.complete && one.naturalWidth > 0).length"


@pytest.mark.slow
def test_thumbnails_are_loaded_when_they_come_into_view(page: Page) -> None:
    assert page.ask("return document.querySelectorAll('figure').length") == 500
    page.until(lambda: page.ask(LOADED) > 12)
    before, now = -1, page.ask(LOADED)
    while now > before:  # until no more come
        time.sleep(2)
        before, now = now, page.ask(LOADED)
    assert now < 200, "of 500; a screen shows 18"
    box = page.ask("return figures.get(here).getBoundingClientRect().width")
    assert box > 150
    for _ in range(500 // 6):
        page.press(Keys.ARROW_DOWN)
    page.press(Keys.END)
    page.until(lambda: page.ask(LOADED) == 499)
    assert page.ask("return [...document.querySelectorAll('figure.lost')].map(one => one.dataset.file)") == [
        "02-003.jpg"
    ]


def test_keys_lead_to_folders(page: Page) -> None:
    assert page.here == of(2)[0] and "unknown cup 40%" in page.text("figcaption")
    page.press(Keys.ENTER, *"mug", Keys.ENTER)  # a new class
    assert page.piles()["mug"] == of(2) and page.here == of(3)[0]
    assert page.text("#done") == "90 of 500 decided"
    page.press("d")
    assert page.piles()["discard"] == of(3) and page.here == of(4)[0]
    page.press("u", "u")
    assert "mug" not in page.piles() and page.here == of(2)[0]
    page.press(Keys.ENTER, *"mug", Keys.ENTER, "d")
    page.press(Keys.ENTER, "f", "o", Keys.ARROW_DOWN, Keys.ENTER)  # a known one, of those that are suggested
    assert page.piles()["fork"] == of(4) and page.here == of(5)[0]

    page.press(" ", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, " ")  # two images of the group, and a part of it
    assert page.marked == [of(5)[0], of(5)[2]]
    page.press("s")
    assert page.piles()["group-10"] == [of(5)[0], of(5)[2]] and page.here == of(5)[0]
    page.press(Keys.ENTER, *"spoon", Keys.ENTER)
    page.press(Keys.PAGE_UP, Keys.HOME)
    assert page.here == of(5)[1]
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ARROW_RIGHT * 3).key_up(Keys.SHIFT).perform()
    assert page.marked == [of(5)[1], *of(5)[3:6]]
    page.press("m", *"05", Keys.ENTER)  # into another group
    assert page.piles()["group-05"] == sorted([*of(6), of(5)[1], *of(5)[3:6]])
    page.press("x", Keys.ESCAPE, Keys.HOME, "a", "a")
    assert page.marked == []

    page.press(Keys.END)  # the last image of what is decided
    assert page.here == of(3)[-1]
    page.press(" ", "m", *"08", Keys.ENTER)
    assert of(3)[-1] in page.piles()["group-08"]
    page.ask("go(state.piles.find(pile => pile.name === 'singles').files[0])")
    page.press("d")  # of singles one alone
    assert len(page.piles()["singles"]) == 2
    before = page.piles()
    assert not (page.folder / "classes").exists()

    page.press("f")
    assert "undecided" in page.text("#sum") and page.piles() == before
    page.press(Keys.ENTER)
    page.until(lambda: page.ask("return over"))
    report = page.text("#report")
    stdout, _ = page.process.communicate(timeout=60)
    assert page.process.returncode == 0 and stdout == f"{report}\n"
    assert report.startswith("fork: 70 images\nmug: 90 images\nspoon: 2 images\n80 discarded, 258 undecided")
    made = {path.name: sorted(one.name for one in path.iterdir()) for path in (page.folder / "classes").iterdir()}
    assert made == {"fork": of(4), "mug": of(2), "spoon": [of(5)[0], of(5)[2]]}
    rows = [json.loads(line) for line in (page.folder / "decisions.jsonl").read_text().splitlines()]
    assert sum(row["decision"] == "discarded" for row in rows) == 80 and len(rows) == 242
    assert len(list(page.folder.glob("*.jpg"))) == 258


def test_names_that_cannot_be_are_told_and_help_is_there(page: Page) -> None:
    page.press(Keys.ENTER)
    assert page.ask("return [...document.querySelectorAll('#options li')].length") == len(KNOWN)
    page.press(*"a/b", Keys.ENTER)
    assert "cannot be the name of a folder" in page.text("#hint") and page.ask("return $('ask').open")
    page.press(*([Keys.BACKSPACE] * 3), *"Fork")
    assert page.text("#hint") == "Enter: 'Fork' is a new class beside 'fork'."
    page.press(Keys.ESCAPE)
    assert not page.ask("return $('ask').open") and page.here == of(2)[0]
    page.press("?")
    assert page.ask("return $('keys').open")
    page.press("d")
    assert "discard" not in page.piles(), "a key for the page does nothing while a window is open"
    page.press(Keys.ESCAPE, "v", Keys.ARROW_RIGHT)
    page.until(lambda: page.ask("return document.querySelector('#look img').naturalWidth") == 384)
    page.press("v")
    assert page.here == of(2)[1] and not page.ask("return $('look').open")
    page.press(Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.PAGE_DOWN, Keys.ARROW_LEFT)
    assert page.here == of(2)[-1]


def test_buttons_do_what_keys_do(page: Page) -> None:
    def click(name: str) -> None:
        page.driver.find_element("id", name).click()
        page.until(lambda: not page.ask("return busy"))

    click("discard")
    assert page.piles()["discard"] == of(2)
    click("undo")
    page.driver.find_element("css selector", f"figure[data-file='{of(2)[1]}']").click()
    click("mark")
    assert page.marked == [of(2)[1]]
    click("name")
    page.driver.find_element("css selector", "#options li").click()
    page.until(lambda: not page.ask("return busy"))
    assert page.piles()["plate"] == [of(2)[1]], "the first that is suggested is what the model said"


def test_a_server_that_was_killed_is_told_and_nothing_is_lost(page: Page) -> None:
    page.press(Keys.ENTER, *"mug", Keys.ENTER)
    page.process.kill()
    page.process.communicate(timeout=60)
    page.press("d")
    page.until(lambda: "has the command ended" in page.text("#message"))
    assert "discard" not in page.piles()
    page.start()
    assert page.piles()["mug"] == of(2)
    page.press("u")
    assert "mug" not in page.piles()


def test_two_pages_of_one_review(page: Page) -> None:
    page.ask("window.mine = state.changes")
    script = (
        "fetch('step', {method: 'POST', body: JSON.stringify({changes: 0, step: {do: 'discard', name: null, "
        f"files: ['{of(2)[0]}']}}}})}}).then(reply => {{ window.other = reply.status; }})"
    )
    page.ask(script)
    page.until(lambda: page.ask("return window.other") == 200)
    page.press("d")
    page.until(lambda: "another page of this review" in page.text("#message"))
    assert page.piles()["discard"] == [of(2)[0]], "it shows what is so, and did nothing"
