"""Damaged pictures, through the library's own reader and through `predict` among whole ones."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from faults import damage, templates
from faults.damage import Rng, any_of
from faults.fault import Fault
from faults.pictures_made import Made, made_pictures
from ssod_edge import open as open_model
from ssod_edge.config import Preprocess
from ssod_edge.data.jpeg import tells_damage
from ssod_edge.data.pixels import load_image
from ssod_edge.errors import ImageError
from ssod_edge.runtime.predict import Verdict

#: Formats whose decoders say so where the end of the file is missing; of a JPEG it is `image_warning` that does.
TELL_A_CUT = ("PNG", "BMP", "TIFF", "PPM", *(("JPEG",) if tells_damage() else ()))
#: Whose checksums find all damage to pixels.
TELL_ALL = ("PNG",)


class Attempts:
    """A picture is damaged and judged between two whole ones."""

    def __init__(self, folder: Path):
        self._model = open_model(templates.colours(folder), engine="onnxruntime", threads=1)
        self._pictures = made_pictures()
        self._whole = [made.content for made in self._pictures if made.pixels is not None and made.format != "JPEG"][:8]
        self._expected = list(self._model.predict_many(self._whole, batch=1, workers=1))
        self._path = folder / "picture"

    def attempt(self, rng: Rng) -> str:
        made = any_of(rng, self._pictures)
        how, content = damaged(rng, made, self._pictures)
        what = f"{made.kind}, {how}, {len(content)} bytes"
        pixels, marks = self._read(rng, content, what)
        verdict = self._judge(rng, content, what)
        if pixels is None:
            return "refused" if verdict.error is not None else "refused in full, judged reduced"
        if verdict.error is not None:
            return "read in full, refused reduced"
        same = made.pixels is not None and np.array_equal(pixels, made.pixels)
        if not same and not marks and made.pixels is not None and is_told(made.format, how):
            raise Fault(f"{what}: other pixels, and nothing says so")
        if marks and verdict.image_warning is None:
            raise Fault(f"{what}: marked when read, and not when judged: {marks}")
        return "the same pixels" if same else "marked" if marks else "other pixels, which the format cannot tell"

    def _read(self, rng: Rng, content: bytes, what: str) -> tuple[np.ndarray | None, list[str]]:
        """Pixels, and what is damaged; None where it is refused."""
        marks: list[str] = []
        settings = Preprocess(input_size=16) if rng.random() < 0.3 else None
        try:
            image = load_image(content, damaged=marks.append)
            load_image(content, settings)
        except ImageError as error:
            if not str(error).startswith("image bytes: ") or "\n" in str(error).strip():
                raise Fault(f"{what}: {error}") from error
            return None, marks
        if not isinstance(image, Image.Image) or image.mode != "RGB" or min(image.size) < 1:
            raise Fault(f"{what}: {image}")
        return np.asarray(image), marks

    def _judge(self, rng: Rng, content: bytes, what: str) -> Verdict:
        """Its verdict; those of the whole pictures around it are as without it."""
        place = int(rng.integers(len(self._whole) + 1))
        source: bytes | Path = content
        if rng.random() < 0.2:
            self._path.write_bytes(content)
            source = self._path
        batch = [*self._whole[:place], source, *self._whole[place:]]
        workers = int(rng.integers(1, 4))
        found = list(self._model.predict_many(batch, batch=int(rng.integers(1, 10)), workers=workers))
        verdict = found.pop(place)
        for one, expected in zip(found, self._expected, strict=True):
            if not alike(one, expected):
                raise Fault(f"{what}: a whole picture beside it became {one}, not {expected}")
        empty = verdict.class_name is None and verdict.known is None and verdict.ood_score is None
        if empty != (verdict.error is not None):
            raise Fault(f"{what}: {verdict}")
        if verdict.error is None and not (np.isfinite(verdict.ood_score) and 0 <= verdict.confidence <= 1):
            raise Fault(f"{what}: {verdict}")
        return verdict


def alike(one: Verdict, other: Verdict) -> bool:
    """Whether two verdicts are the same; the sums of another batch size end in other digits."""
    if one.error is not None or other.error is not None:
        return one.error == other.error
    near = abs(one.ood_score - other.ood_score) < 1e-4 and abs(one.confidence - other.confidence) < 1e-4
    return near and (one.class_index, one.known) == (other.class_index, other.known)


def is_told(file_format: str, how: str) -> bool:
    """Whether damage of this kind has to be told, because pixels are missing or a checksum is wrong."""
    return (how == "cut" and file_format in TELL_A_CUT) or (
        how in ("cut", "flip", "zero", "noise") and file_format in TELL_ALL
    )


def damaged(rng: Rng, made: Made, others: list[Made]) -> tuple[str, bytes]:
    """(how, the file)."""
    how = any_of(rng, ("bytes", "bytes", "bytes", "bytes", "head", "nested", "size", "twice"))
    data, other = made.content, any_of(rng, others).content
    if how == "bytes":
        change = any_of(rng, damage.BYTES)
        return change.__name__, change(rng, data)
    if how == "head":
        length = int(any_of(rng, (2, 4, 8, 12, 16, 32, 64, 256)))
        return "head of another", other[:length] + data[length:]
    if how == "nested":
        place = int(rng.integers(len(data)))
        return "another inside", data[:place] + other + data[place:]
    if how == "twice":
        return "another behind", data + other
    return "size", with_size(rng, data)


def with_size(rng: Rng, data: bytes) -> bytes:
    """The file with another width and height in its header, as far as this knows where they stand."""
    width, height = (int(any_of(rng, (0, 1, 7, 75, 76, 1000, 9459, 65535, 1 << 20, (1 << 31) - 1))) for _ in "wh")
    out = bytearray(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        out[16:24] = struct.pack(">II", width, height)
        out[29:33] = struct.pack(">I", zlib.crc32(out[12:29]))
    elif data[:2] == b"BM":
        out[18:26] = struct.pack("<ii", width, any_of(rng, (height, -height)))
    elif data[:3] == b"GIF":
        out[6:10] = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    elif data[:2] == b"\xff\xd8":
        start = next((data.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if data.find(marker) > 0), -1)
        if start > 0:
            out[start + 5 : start + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    else:
        return damage.absurd(rng, data)
    return bytes(out)
