"""What `make docs` makes of Markdown, and what it looks for in the pages."""

from __future__ import annotations

import importlib.util
import logging
from types import ModuleType

import pytest
from places import ROOT


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mkdocs_hook", ROOT / "scripts" / "mkdocs_hook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "source", "place", "expected"),
    [
        ("[a](docs/install.md#arm)", "README.md", "index.md", "[a](install.md#arm)"),
        ("![a\nb](docs/images/x.webp)", "README.md", "index.md", "![a\nb](images/x.webp)"),
        ('<img src="docs/images/x.webp" width="9">', "README.md", "index.md", '<img src="images/x.webp" width="9">'),
        ("[a](../README.md)", "docs/serve.md", "serve.md", "[a](index.md)"),
        ("[a](../../CHANGELOG.md#x)", "docs/lab/results.md", "lab/results.md", "[a](../changelog.md#x)"),
        ("[a](serve.md)", "docs/cpp.md", "cpp.md", "[a](serve.md)"),
        ("[a](#here) [b](https://example.org/x)", "docs/cpp.md", "cpp.md", "[a](#here) [b](https://example.org/x)"),
        ("[the client](../examples/cpp)", "docs/cpp.md", "cpp.md", "the client (`examples/cpp`)"),
        ("[main.cpp](../examples/cpp/main.cpp)", "docs/cpp.md", "cpp.md", "`examples/cpp/main.cpp`"),
        ("[a](main.cpp)", "examples/README.md", "examples.md", "a (`examples/main.cpp`)"),
    ],
)
def test_links_lead_to_pages_or_become_paths(
    hook: ModuleType, text: str, source: str, place: str, expected: str
) -> None:
    assert hook.linked(text, source, place) == expected


def test_a_link_to_a_file_that_is_not_there_is_a_warning(hook: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        hook.linked("[a](../examples/cpp)", "docs/cpp.md", "cpp.md")
        assert not caplog.records
        hook.linked("[a](../examples/nothing)", "docs/cpp.md", "cpp.md")
    assert [record.message for record in caplog.records] == [
        "docs/cpp.md has a link to '../examples/nothing', which is not there"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:\n- b\n- c\n", "a:\n\n- b\n- c\n"),
        ("a:\n\n- b\n  c\n- d\n", "a:\n\n- b\n  c\n- d\n"),
        ("a\n1. b\n2. c\n", "a\n\n1. b\n2. c\n"),
        ("in\n12. of it\n", "in\n12. of it\n"),
    ],
)
def test_a_list_gets_a_blank_line_before_it(hook: ModuleType, text: str, expected: str) -> None:
    assert hook.spaced(text) == expected


def test_blocks_of_code_stay_as_they_are(hook: ModuleType) -> None:
    text = "a\n```bash\n# x\n- [b](c)\n```\nd\n"
    assert hook.fenced(text) == [(False, "a\n"), (True, "```bash\n# x\n- [b](c)\n```\n"), (False, "d\n")]


def test_what_a_page_loads_from_elsewhere_is_found(hook: ModuleType) -> None:
    own = '<script src="a.js"></script><link rel="canonical" href="https://a"><a href="https://b">b</a>'
    assert hook.Loaded(own).elsewhere == []
    other = '<script src="https://c/x.js"></script><link rel="stylesheet" href="//d/y.css"><img src="http://e/z.png">'
    assert hook.Loaded(other).elsewhere == ["https://c/x.js", "//d/y.css", "http://e/z.png"]
