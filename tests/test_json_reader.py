"""JSON is read in one place, and what a record cannot mean is refused wherever it stands."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from ssod_edge import json_reader
from ssod_edge.errors import UsageError
from ssod_edge.json_reader import MAX_DEPTH, from_json, parse_json, read_json


@dataclass(frozen=True)
class Inner:
    size: int = 3
    kind: Literal["a", "b", "c"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    ratio: float | None
    pairs: tuple[tuple[int, float], ...]
    inner: Inner = Inner()
    free: dict[str, Any] = field(default_factory=dict)


WHOLE = {"name": "x", "ratio": 1, "pairs": [[1, 2]], "inner": {"size": 4, "kind": "b"}, "free": {"any": [None, {}]}}


def test_a_document_becomes_what_the_annotations_say():
    made = from_json(Outer, parse_json(json.dumps(WHOLE)))
    assert made == Outer("x", 1.0, ((1, 2.0),), Inner(4, "b"), {"any": [None, {}]})
    assert type(made.ratio) is float and from_json(Outer, WHOLE | {"ratio": None}).ratio is None


def test_what_has_a_default_may_be_missing_where_that_is_allowed():
    short = {"name": "x", "ratio": None, "pairs": (), "inner": {"kind": "c"}}
    assert from_json(Outer, short, defaults=True) == Outer("x", None, (), Inner(3, "c"))
    with pytest.raises(UsageError, match="Outer: free is missing"):
        from_json(Outer, short)
    with pytest.raises(UsageError, match="Outer: name is missing"):
        from_json(Outer, {key: short[key] for key in ("ratio", "pairs")}, defaults=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "name must be text, got 3"),
        ({"ratio": "1"}, 'ratio must be a finite number, got "1"'),
        ({"ratio": True}, "ratio must be a finite number, got true"),
        ({"pairs": [[1, 2], [1]]}, r"pairs\[1\] must be a list of the right length"),
        ({"pairs": [[1.0, 2]]}, r"pairs\[0\]\[0\] must be an integer, got 1.0"),
        ({"pairs": [[True, 2]]}, r"pairs\[0\]\[0\] must be an integer, got true"),
        ({"pairs": [[2**63, 2]]}, r"pairs\[0\]\[0\] must be an integer of at most 64 bits"),
        ({"inner": {"size": 1, "kind": "d"}}, 'inner.kind must be one of a, b, c, got "d"'),
        ({"inner": {"size": 1, "kind": []}}, r"inner.kind must be one of a, b, c, got \[\]"),
        ({"inner": {"size": 1}}, "inner: kind is missing"),
        ({"inner": {"size": 1, "kind": "a", "x": 1}}, "unknown Inner key: x in inner. Known keys: kind, size"),
        ({"inner": []}, "inner must be an object"),
        ({"free": []}, "free must be an object"),
        ({"more": 1}, "unknown Outer key: more"),
    ],
)
def test_another_type_is_refused_by_its_place(change, message):
    with pytest.raises(UsageError, match=message):
        from_json(Outer, WHOLE | change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "it must be an object"),
        (b"Infinity", "it must be an object"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        (b'{"a": {"b": [1, NaN]}}', r"a.b\[1\] must be a finite number, got NaN"),
        (b'{"a": -Infinity}', "a must be a finite number, got -Infinity"),
        (b'{"a": 1e999}', "a must be a finite number, got Infinity"),
        (b'{"a": 1' + b"0" * 400 + b"}", "a must be a finite number, got 1000"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "limit|finite"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', 'the key "b" occurs twice'),
        (b'{"a": ["\\ud800"]}', r'a\[0\] must be text of valid Unicode, got "\\ud800"'),
        (b'{"a": {"\\udfff": 1}}', "a key of a must be text of valid Unicode"),
        (b'{"\\udfff": 1}', "a key of the document must be"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "a.a.* is nested more than 64 deep"),
    ],
)
def test_what_no_record_means_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_json(text)


def test_nested_to_the_limit():
    text = '{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    assert json.dumps(parse_json(text), separators=(",", ":")) == text


def test_a_file_that_is_too_long_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_reader, "MAX_BYTES", 1 << 20)
    (tmp_path / "a.json").write_text(json.dumps({"a": " " * (1 << 20)}))
    with pytest.raises(UsageError, match="longer than 1 MB"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")


documents = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
)  # fmt: skip


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), documents))
def test_what_was_written_is_read(values):
    assert parse_json(json.dumps(values)) == values
    assert parse_json(json.dumps(values, ensure_ascii=False).encode()) == values


#: What is no record that was kept: the output of a child process, of a profiler, of a server, a value made JSON-like.
OTHER_JSON = {
    "ssod_edge/doctor.py",
    "ssod_edge/runtime/engines/onnxruntime.py",
    "ssod_edge/studies/study.py",
    "bench/memory.py",
    "bench/tools/serve_client.py",
}


def test_no_other_module_reads_json():
    found = set()
    for path in (path for folder in ("ssod_edge", "export", "bench") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load"):
                found.add(path.relative_to(ROOT).as_posix())
                if path.name == "study.py":
                    assert ast.unparse(node.args[0]).startswith("json.dumps(")
    assert found == OTHER_JSON | {"ssod_edge/json_reader.py"}
