"""Damage of files, from a seed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator
#: What a length or a count is set to.
ABSURD = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
#: What a value of JSON becomes.
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1 << 31, 1 << 63, 10**400, 1e308, 1e-320, -0.0, "", " ", "a" * 3000, "../x", "/etc/passwd", "\0",
    "\ud800", "\u202e", "nan", [], {}, [[]], {"": 0}, ["a", 1], float("nan"), float("inf"),
)  # fmt: skip


def any_of(rng: Rng, options: Any) -> Any:
    """One of a sequence; `Generator.choice` would make an array of it."""
    return options[int(rng.integers(len(options)))]


def cut(rng: Rng, data: bytes) -> bytes:
    return data[: int(rng.integers(len(data) or 1))]


def flip(rng: Rng, data: bytes) -> bytes:
    out = bytearray(data)
    # half of them where a header is
    most = len(out) if rng.random() < 0.5 else min(len(out), 128)
    for _ in range(int(rng.integers(1, 6)) if out else 0):
        out[int(rng.integers(most))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def zero(rng: Rng, data: bytes) -> bytes:
    start, length = _block(rng, data)
    return data[:start] + bytes(length) + data[start + length :]


def drop(rng: Rng, data: bytes) -> bytes:
    start, length = _block(rng, data)
    return data[:start] + data[start + length :]


def repeat(rng: Rng, data: bytes) -> bytes:
    start, length = _block(rng, data)
    return data[: start + length] + data[start:]


def noise(rng: Rng, data: bytes) -> bytes:
    start, length = _block(rng, data)
    return data[:start] + rng.bytes(length) + data[start + length :]


def absurd(rng: Rng, data: bytes) -> bytes:
    """Two or four bytes become a number that a length should not be."""
    if len(data) < 8:
        return data
    width = int(any_of(rng, (2, 4)))
    start = int(rng.integers(min(len(data), 512 if rng.random() < 0.7 else len(data)) - width))
    number = (any_of(rng, ABSURD) & (256**width - 1)).to_bytes(width, any_of(rng, ("little", "big")))
    return data[:start] + number + data[start + width :]


def grow(rng: Rng, data: bytes) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 2000)))


def empty(rng: Rng, data: bytes) -> bytes:
    return b""


#: Those that leave something of the file.
BYTES: tuple[Callable[[Rng, bytes], bytes], ...] = (cut, flip, zero, drop, repeat, noise, absurd, grow, empty)


def _block(rng: Rng, data: bytes) -> tuple[int, int]:
    """(start, length) of a part of it."""
    length = min(int(any_of(rng, (1, 4, 64, 512, 4096))), len(data) // 2)
    return int(rng.integers(max(1, len(data) - length))), length


def edit_json(rng: Rng, value: Any) -> Any:
    """A document with one value replaced, one key dropped, renamed or added, somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = any_of(rng, list(value))
        if rng.random() < 0.7:
            return {**value, key: edit_json(rng, value[key])}
        rest = {name: item for name, item in value.items() if name != key}
        return any_of(rng, (rest, {**rest, "extra": value[key]}, {**value, "": value[key]}))
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = int(rng.integers(len(value)))
        item = edit_json(rng, value[place])
        return any_of(rng, ([*value[:place], item, *value[place + 1 :]], value[:place], [*value, item], value * 2))
    if isinstance(value, (int, float)) and rng.random() < 0.3:
        return any_of(rng, (-value, value + 1, value * 1e30, str(value), float(value), [value]))
    return any_of(rng, VALUES)


def edit_line(rng: Rng, data: bytes) -> bytes:
    """JSON, or one line of JSON lines, with a value that is not what it was."""
    lines = data.splitlines(keepends=True)
    whole = data.lstrip()[:1] == b"{" and (len(lines) == 1 or lines[0].strip() == b"{")
    if whole:
        return json.dumps(edit_json(rng, json.loads(data))).encode()
    place = int(rng.integers(len(lines)))
    lines[place] = json.dumps(edit_json(rng, json.loads(lines[place]))).encode() + b"\n"
    return b"".join(lines)


def write_over(path: Path, content: bytes) -> None:
    """Give a file other content, under another inode: the templates share theirs."""
    path.unlink()
    path.write_bytes(content)


def damage_file(rng: Rng, path: Path, others: list[Path]) -> str:
    """Damage a file, which may be a link to a template's; returns how."""
    kind = any_of(rng, ("bytes", "bytes", "bytes", "json", "gone", "folder", "loop", "other"))
    data = path.read_bytes()
    if kind == "json" and path.suffix not in (".json", ".jsonl"):
        kind = "bytes"
    if kind == "bytes":
        change = any_of(rng, BYTES)
        write_over(path, change(rng, data))
        return f"{path.name}: {change.__name__}"
    if kind == "json":
        write_over(path, edit_line(rng, data))
        return f"{path.name}: a value"
    other = any_of(rng, others).read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "other":
        path.write_bytes(other)
    return f"{path.name}: {kind}"


def link_tree(source: Path, target: Path) -> Path:
    """A copy of a folder whose files are further names of the template's: write into none of them in place."""
    shutil.copytree(source, target, copy_function=os.link, symlinks=True)
    return target
