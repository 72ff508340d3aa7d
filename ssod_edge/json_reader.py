"""The one reader of JSON files: strict, and by the annotations of dataclasses.

`msgspec` does not serve: it takes unknown keys of a dataclass, and a key that occurs twice, in silence.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ssod_edge.errors import UsageError

#: Of a document, in bytes. The longest that are written are the splits of millions of images.
MAX_BYTES = 64 << 20
#: Lists and objects in one another.
MAX_DEPTH = 64

#: Type -> what stands for it in JSON.
_NAMES = {
    str: "text",
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    tuple: "a list of the right length",
}


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that a JSON file holds, checked as `parse_json` does.

    Raises:
        OSError: the file cannot be read.
        UsageError: it holds something else; a ValueError, whose message names the place in it but not the file.
    """
    with open(path, "rb") as file:
        return parse_json(file.read(MAX_BYTES + 1))


def parse_json(text: str | bytes) -> dict[str, Any]:
    """The object that a JSON document holds. `from_json` gives its values their types.

    Raises:
        UsageError: no JSON in UTF-8, too long, nested too deep or no object; two equal keys in an object, a number
            that is not finite, or text that is not valid Unicode, wherever they stand.
    """
    if len(text) > MAX_BYTES:
        raise UsageError(f"it is longer than {MAX_BYTES >> 20} MB")
    try:
        document = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(document, object_pairs_hook=_object)
    except RecursionError:
        raise UsageError(f"it is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not isinstance(value, dict):
        raise UsageError("it must be an object, {...}")
    _check(value, "", 0)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise UsageError(f"the key {_shown(key)} occurs twice in an object")
        values[key] = value
    return values


def _check(value: Any, name: str, depth: int) -> None:
    """Refuse what JSON can say and no record can mean."""
    if isinstance(value, str):
        _check_text(value, name)
    elif isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:
        raise UsageError(f"{name} must be a finite number, got {_shown(value)}")
    elif isinstance(value, (dict, list)):
        if depth == MAX_DEPTH:
            raise UsageError(f"{name[:100]} is nested more than {MAX_DEPTH} deep")
        items: Iterable[tuple[str, Any]]
        if isinstance(value, dict):
            for key in value:
                _check_text(key, f"a key of {name or 'the document'}")
            items = ((f"{name}.{key}".lstrip("."), item) for key, item in value.items())
        else:
            items = ((f"{name}[{index}]", item) for index, item in enumerate(value))
        for inner, item in items:
            _check(item, inner, depth + 1)


def is_unicode(text: str) -> bool:
    """Whether it is text; a name with bytes that are not UTF-8 holds surrogates, which libraries in C++ crash at."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _check_text(text: str, name: str) -> None:
    if not is_unicode(text):
        raise UsageError(f"{name} must be text of valid Unicode, got {_shown(text)}")


def from_json(kind: Any, value: Any, name: str = "", defaults: bool = False) -> Any:
    """A value of a JSON document as what a dataclass's annotation says: all fields, each of its type.

    Args:
        kind: a dataclass, str, int, float, bool, a Literal, tuple[...], dict[str, ...], any of these or None, or Any.
        value: from what `parse_json` gave. A tuple stands for a list.
        name: of the value in the document, for the message.
        defaults: a field that has a default may be missing.

    Raises:
        UsageError: another type, an integer of more than 64 bits, a missing or unknown field, or one out of its range.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or (value is None and NoneType in arguments):
        return value
    if NoneType in arguments:
        return from_json(arguments[0], value, name, defaults)
    if is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        if isinstance(value, dict):
            return _from_object(kind, value, name, defaults)
    if origin is dict and isinstance(value, dict):
        return {key: from_json(arguments[1], item, f"{name}.{key}", defaults) for key, item in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(from_json(*pair, f"{name}[{index}]", defaults) for index, pair in pairs)
    if origin is Literal and value in arguments:
        return value
    if kind is float and (type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)):
        return float(value)
    if kind is not float and type(value) is kind and (kind is not int or -(2**63) <= value < 2**63):
        return value
    raise UsageError(f"{name or 'it'} must be {_expected(kind, value)}, got {_shown(value)}")


def _expected(kind: Any, value: Any) -> str:
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(f"'{choice}'" for choice in choices) if len(choices) < 3 else f"one of {', '.join(choices)}"
    if kind is type(value) is int:
        return "an integer of at most 64 bits"
    return _NAMES.get(get_origin(kind) or kind, "an object")


def _from_object(kind: Any, value: dict[str, Any], name: str, defaults: bool) -> Any:
    types = get_type_hints(kind)
    if hasattr(kind, "complete"):  # what an earlier release wrote, with the fields of this one
        value = kind.complete(value)
    optional = {f.name for f in fields(kind) if defaults and (f.default, f.default_factory) != (MISSING, MISSING)}
    if unknown := sorted(value.keys() - types.keys()):
        place = f" in {name}" if name else ""
        raise UsageError(
            f"unknown {kind.__name__} key: {', '.join(unknown)}{place}. Known keys: {', '.join(sorted(types))}"
        )
    if missing := [key for key in types if key not in value and key not in optional]:
        raise UsageError(f"{name or kind.__name__}: {', '.join(missing)} is missing")
    made = {key: from_json(types[key], item, f"{name}.{key}".lstrip("."), defaults) for key, item in value.items()}
    return kind(**made)


def _shown(value: Any) -> str:
    """A value for a message, cut short."""
    try:
        return json.dumps(value)[:100]
    except (TypeError, ValueError):  # not of a document, or an integer of thousands of digits
        return f"a value of type {type(value).__name__}"
