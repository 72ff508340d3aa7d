"""README and the manual in docs/: short pages, links that lead somewhere, and no page that nothing leads to."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
#: The manual; docs/lab is the record of experiments, which may be as long as it needs to be.
MANUAL = sorted(DOCS.glob("*.md"))
OTHERS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("examples/**/*.md"))]
ALL = [*OTHERS, *MANUAL, *sorted((DOCS / "lab").glob("*.md"))]
MOST_WORDS = 900
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)", re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The text of `page` without its fenced and inline code."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`", text)


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of the headings of `page`, as GitHub makes them: the second of the same name gets -1."""
    found: list[str] = []
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6} (.*?) *$", text, flags=re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        found.append(anchor if anchor not in found else f"{anchor}-{found.count(anchor)}")
    return frozenset(found)


def links(page: Path) -> list[str]:
    """The links of `page` within the clone, pictures among them."""
    return [link for link in LINK.findall(prose(page)) if not re.match(r"[a-z]+:", link)]


def where(page: Path, link: str) -> Path:
    file = link.partition("#")[0]
    return (page.parent / file).resolve() if file else page


@pytest.mark.parametrize("page", [ROOT / "README.md", *MANUAL], ids=name_of)
def test_a_page_is_short(page: Path) -> None:
    words = len(page.read_text(encoding="utf-8").split())
    assert words < MOST_WORDS, f"{name_of(page)} has {words} words: split it, or move what is a record to docs/lab"


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for link in links(page):
        target, anchor = where(page, link), link.partition("#")[2]
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost, f"{name_of(page)} links to what is not there"


@pytest.mark.parametrize("page", [page for page in ALL if page.is_relative_to(DOCS)], ids=name_of)
def test_something_leads_to_a_page(page: Path) -> None:
    assert any(where(other, link) == page for other in ALL if other != page for link in links(other))


@pytest.mark.parametrize("page", [ROOT / "README.md", *MANUAL], ids=name_of)
def test_code_says_its_language(page: Path) -> None:
    """What a reader types is ```bash (run by a test) or ```console (needs a camera, a board, a GPU, root)."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r" *```(\w*)", line)
        if fence and not inside:
            assert fence[1], f"{name_of(page)}:{number}: a block of code without a language"
        inside ^= fence is not None
        assert inside or not re.match(r" {4,}(ssod-edge|pip|make) ", line), (
            f"{name_of(page)}:{number}: indented commands"
        )
    assert not inside


def test_the_method_names_functions_that_exist() -> None:
    """`NAME` in `FILE.py`, as the page of the equations has them: a function, a class, or an attribute of one."""
    text = " ".join((DOCS / "method.md").read_text(encoding="utf-8").split())
    places = re.findall(r"`([\w.]+)` in `([\w/]+\.py)`", text)
    assert len(places) >= 10
    for names, file in places:
        path = ROOT / file if file.startswith("export/") else ROOT / "ssod_edge" / file
        code = path.read_text(encoding="utf-8")
        for name in names.split("."):
            assert re.search(rf"(def|class) {name}\b|self\.{name} = ", code), f"{name} is not in {file}"


def test_pictures_are_shown() -> None:
    shown = {where(page, link) for page in ALL for link in links(page)}
    assert set((DOCS / "images").iterdir()) <= shown
