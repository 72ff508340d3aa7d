"""Whether a video file is shorter than it says of itself, as after a broken copy or a power cut: AVI, Matroska, MP4."""

from __future__ import annotations

import os
from typing import BinaryIO

_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"
#: The parts that an MP4 or MOV file may hold side by side; what follows the last of them is a camera's own.
_BOXES = frozenset(
    (b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"free", b"skip", b"wide", b"uuid", b"styp", b"sidx", b"pnot")
)
#: Of Matroska's parts the short names: a checksum and an empty place. All others begin with a byte from 10 to 1F.
_SHORT_NAMES = b"\xbf\xec"
#: Bytes that may lack: some programs count a header twice.
_SLACK = 64


def is_cut(path: str) -> bool | None:
    """Whether a file ends before the last part that it announces, or parts of it are none.

    Returns:
        False where it does not and its parts are in order; None where that cannot be told, as of other formats, or says
        nothing of its frames.

    Raises:
        OSError: it cannot be read.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
        file.seek(0)
        if head[:4] == b"RIFF":
            end = _riff_end(file)
        elif head[:4] == _EBML:
            end = _matroska_end(file)
        else:
            end = _boxes_end(file, size)
        if end > size + _SLACK:
            return True
        return _is_damaged_matroska(file, end) if head[:4] == _EBML and end else None


def _riff_end(file: BinaryIO) -> int:
    """AVI: one part, or of a large file several."""
    end = 0
    while (head := file.read(8))[:4] == b"RIFF":
        length = int.from_bytes(head[4:8], "little")
        end += 8 + length + length % 2
        file.seek(end)
    return end


def _matroska_end(file: BinaryIO) -> int:
    """Matroska and WebM: a header, and a segment with everything, at whose begin the file is left.

    0 where the segment has no end, as of a live recording.
    """
    file.seek(len(_EBML))
    file.seek(_length(file), os.SEEK_CUR)
    if file.read(len(_SEGMENT)) != _SEGMENT:
        return 0
    length = _length(file)
    return file.tell() + length if length else 0


def _is_damaged_matroska(file: BinaryIO, end: int) -> bool | None:
    """Whether what lies in a segment up to its end is no chain of parts; None where one of them has no length."""
    while file.tell() < end:
        name = file.read(1)
        if not name or not (name in _SHORT_NAMES or 0x10 <= name[0] <= 0x1F):
            return True
        file.seek(0 if name in _SHORT_NAMES else 3, os.SEEK_CUR)
        if not (length := _length(file)):
            return None
        file.seek(length, os.SEEK_CUR)
    return False


def _length(file: BinaryIO) -> int:
    """A number whose first byte says by its leading zeros how many follow; 0 where all its bits are set: unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return 0
    more = 8 - first[0].bit_length()
    most = (1 << 7 * (more + 1)) - 1
    value = int.from_bytes(first + file.read(more), "big") & most
    return 0 if value == most else value


def _boxes_end(file: BinaryIO, size: int) -> int:
    """MP4 and MOV: boxes one after the other, each with its length."""
    end = 0
    while end < size:
        file.seek(end)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if kind not in _BOXES or length < 8:  # 0: up to the end of the file
            break
        end += length
    return end
