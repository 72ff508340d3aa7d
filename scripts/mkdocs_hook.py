"""What `make docs` adds to MkDocs: pages from beside docs/, Markdown as other tools read it, and a look at the result.

README.md is the home page without a copy of it. A link to a file that is no page becomes the file's path, and has to be
there. A page that loads anything from another host, and a link to a file that is not there, are warnings, which end a
strict build.
"""

from __future__ import annotations

import logging
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Files outside of docs/ that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
SOURCE = re.compile(r'(<img[^>]*\ssrc=")([^"]+)(")')
FENCE = re.compile(r"^( *)(```|~~~)")
#: Tags and attributes by which a page loads something. `a href` loads nothing.
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}

log = logging.getLogger("mkdocs.hooks.manual")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of `PAGES`."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The text of a page with its links as the site has them, and a blank line before each list."""
    place = page.file.src_uri
    beside = {page: source for source, page in PAGES.items()}.get(place, f"docs/{place}")
    return "".join(text if code else spaced(linked(text, beside, place)) for code, text in fenced(markdown))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """The page without what mkdocs-click writes for an option without a default."""
    return html.replace("<code>Sentinel.UNSET</code>", "")


def fenced(markdown: str) -> list[tuple[bool, str]]:
    """The text in parts, and of each whether it is a fenced block."""
    parts: list[tuple[bool, str]] = [(False, "")]
    closing = ""
    for line in markdown.splitlines(keepends=True):
        found = FENCE.match(line)
        if closing:
            parts[-1] = (True, parts[-1][1] + line)
            if line.strip() == closing:
                closing = ""
                parts.append((False, ""))
        elif found:
            closing = found[2]
            parts.append((True, line))
        else:
            parts[-1] = (False, parts[-1][1] + line)
    return parts


def linked(text: str, source: str, place: str) -> str:
    """Markdown with the links of a file of the repository as they are from its place in the site.

    Args:
        source: path of the file in the repository.
        place: of its page in docs/.
    """

    def link(found: re.Match[str]) -> str:
        image, words, target = found.groups()
        new = moved(target, source, place)
        if new is not None:
            return f"{image}[{words}]({new})"
        path = within(target, source)
        return f"`{path}`" if words.strip("`") == Path(path).name or "/" in words else f"{words} (`{path}`)"

    def picture(found: re.Match[str]) -> str:
        return f"{found[1]}{moved(found[2], source, place) or found[2]}{found[3]}"

    return SOURCE.sub(picture, LINK.sub(link, text))


def within(target: str, source: str) -> str:
    """The path in the repository that a link of a file leads to."""
    return os.path.normpath(os.path.join(os.path.dirname(source), target.partition("#")[0]))


def moved(target: str, source: str, place: str) -> str | None:
    """A link of a file as it is from its place in docs/; None where it leads to a file that is no page."""
    if re.match(r"[a-z]+:|#", target):
        return target
    path, _, anchor = target.partition("#")
    inside = within(path, source)
    page = PAGES.get(inside) or (inside.removeprefix("docs/") if inside.startswith("docs/") else None)
    if page is None:
        if not (ROOT / inside).exists():
            log.warning(f"{source} has a link to '{target}', which is not there")
        return None
    return os.path.relpath(page, os.path.dirname(place) or ".") + (f"#{anchor}" if anchor else "")


def spaced(text: str) -> str:
    """Markdown with a blank line before each list, which Python's Markdown needs and others do not."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        before = lines[-1] if lines else ""
        begins = re.match(r"([-*+]|1[.)]) ", line) and before.strip()
        if begins and not re.match(r"([-*+]|\d+[.)]) |\s", before):
            lines.append("\n")
        lines.append(line)
    return "".join(lines)


def on_post_build(config: Any) -> None:
    """Looks for what a page would load from another host."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        for found in Loaded(path.read_text(encoding="utf-8")).elsewhere:
            log.warning(f"{path.relative_to(config.site_dir)} loads {found}")


class Loaded(HTMLParser):
    """The addresses of other hosts that a page loads something from."""

    def __init__(self, html: str):
        super().__init__()
        self.elsewhere: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get(LOADS.get(tag, "")) or ""
        if re.match(r"(https?:)?//", address) and given.get("rel") not in ("canonical", "prev", "next"):
            self.elsewhere.append(address)
