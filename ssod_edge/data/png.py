"""The checksums of a PNG's pixels, which Pillow does not compare."""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO

_SIGNATURE_BYTES = 8


def pixels_are_whole(file: BinaryIO) -> bool:
    """Whether each chunk of pixels in a PNG has the checksum that stands behind it.

    Pillow compares those of the other chunks, and stops at the last pixel, before the checksum of the whole: zeros in
    the middle are pixels to it. What is cut off is left to it too.

    Args:
        file: an open PNG; its position stays.
    """
    position = file.tell()
    try:
        file.seek(_SIGNATURE_BYTES)
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            length = int.from_bytes(head[:4], "big")
            if head[4:] != b"IDAT":
                file.seek(length + 4, 1)
                continue
            data, checksum = file.read(length), file.read(4)
            if len(checksum) == 4 and struct.pack(">I", zlib.crc32(data, zlib.crc32(head[4:]))) != checksum:
                return False
        return True
    finally:
        file.seek(position)
