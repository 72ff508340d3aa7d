"""The files beside an ONNX file that hold its weights ("external data"), read by hand: a device has no onnx package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ssod_edge.errors import ArtifactError
from ssod_edge.files import real_path

#: Message of onnx.proto -> field number -> message in it. Only where tensors may stand.
_PARTS = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
#: Field numbers of a StringStringEntryProto.
_KEY, _VALUE = 1, 2
#: Wire type of protobuf -> bytes, where their number is fixed.
_FIXED = {1: 8, 5: 4}


def external_files(onnx_path: Path) -> tuple[Path, ...]:
    """The files, beside an ONNX file or below its folder, that it keeps weights in; usually none.

    Raises:
        ArtifactError: it cannot be read, is no ONNX file, or is cut short; or such a file is missing or outside its
            folder.
    """
    try:
        content = memoryview(onnx_path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"'{onnx_path}' cannot be read: {error.strerror}. Export the run again.") from error
    try:
        names = sorted(set(_locations(content)))
    except (IndexError, ValueError) as error:
        raise ArtifactError(f"'{onnx_path}' is no ONNX file, or was cut short. Export the run again.") from error
    folder = real_path(onnx_path.parent)
    found = []
    for name in names:
        path = real_path(folder / name) if "\0" not in name else folder
        if Path(name).is_absolute() or not path.is_relative_to(folder) or path == folder:
            raise ArtifactError(
                f"'{onnx_path.name}' keeps weights in '{name}', which is outside its folder, and is not opened. "
                "Export the model again with its weights inside, or in a file beside it."
            )
        if not path.is_file():
            raise ArtifactError(
                f"'{onnx_path.name}' keeps weights in '{name}', which is missing. Copy that file too, beside it."
            )
        found.append(path)
    return tuple(found)


def _locations(content: memoryview) -> Iterator[str]:
    """Every `location` of a tensor's external data."""
    pending = [("model", content)]
    while pending:
        kind, message = pending.pop()
        texts: dict[int, bytes] = {}
        for number, value in _fields(message):
            part = _PARTS[kind].get(number)
            if part is not None:
                pending.append((part, value))
            elif kind == "entry":
                texts[number] = bytes(value)
        if texts.get(_KEY) == b"location":
            yield texts.get(_VALUE, b"").decode("utf-8")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Field number and content of each field that has a length; the others are passed over.

    Raises:
        IndexError: the message ends in the middle of a field.
        ValueError: it is no protobuf message.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        length = _FIXED.get(wire, 0)
        if number == 0 or wire not in (0, 2, *_FIXED):
            raise ValueError(f"field number {number} of wire type {wire}")
        if wire in (0, 2):  # a number, and a length
            value, at = _varint(message, at)
            length = value if wire == 2 else 0
        if at + length > len(message):
            raise IndexError("the message ends inside a field")
        if wire == 2:
            yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
