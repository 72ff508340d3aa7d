"""The images that a model is judged on, by name: what `eval`, `study`, `reproduce` and `bench` are asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssod_edge.errors import UsageError


@dataclass(frozen=True)
class Via:
    """One size, and perhaps one codec, that every image goes through first (`ssod_edge.data.pixels.equalise`).

    Attributes:
        size: of the centred square that an image is reduced or enlarged to, in pixels.
        jpeg: quality, 1 to 95, at which the square is saved and read once; None leaves that out.

    Raises:
        UsageError: a value out of range.
    """

    size: int
    jpeg: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"via_size must be at least 1, got {self.size}")
        if self.jpeg is not None and not 1 <= self.jpeg <= 95:
            raise UsageError(f"via_jpeg is a JPEG quality and must be from 1 to 95, got {self.jpeg}")

    def __str__(self) -> str:
        """As --via takes it: "32" or "32,jpeg75"."""
        return str(self.size) if self.jpeg is None else f"{self.size},jpeg{self.jpeg}"


@dataclass(frozen=True)
class NamedData:
    """Attributes:
    id_data: ID images, labelled with the model's classes; None: the run's validation split.
    ood_data: name -> OOD images.
    via_size: every image is first resized to this many pixels ("via32"); None is protocol "native".
    via_jpeg: and then saved once as JPEG of this quality ("via32-jpeg75"); None leaves that out.
    """

    id_data: str | None = None
    ood_data: Mapping[str, str] | None = None
    via_size: int | None = None
    via_jpeg: int | None = None

    def __post_init__(self) -> None:
        if self.via is None and self.via_jpeg is not None:
            raise UsageError(
                "via_jpeg needs a via_size: the size to which every image is brought before it is saved as JPEG"
            )

    @property
    def via(self) -> Via | None:
        """What every image goes through; None for nothing."""
        return None if self.via_size is None else Via(self.via_size, self.via_jpeg)

    @property
    def protocol(self) -> str:
        """ "native", or "via32" and "via32-jpeg75" where every image first becomes 32 pixels large, and a JPEG."""
        return "native" if self.via is None else f"via{self.via}".replace(",", "-")

    @property
    def equalised(self) -> str:
        """The protocol in words, for tables and captions."""
        if self.via is None:
            return "images as they are: size and codec may tell sets apart"
        codec = (
            " (codecs may tell sets apart)" if self.via_jpeg is None else f" and one JPEG of quality {self.via_jpeg}"
        )
        return f"every image first went through {self.via_size} px{codec}"

    @property
    def said(self) -> dict[str, str]:
        """Both, for a report."""
        return {"protocol": self.protocol, "equalised": self.equalised}


def parse_via(text: str) -> Via:
    """ "32" or "32,jpeg75"; raises UsageError for another form, or a value out of range."""
    match = re.fullmatch(r"(\d+)(?:,jpeg(\d+))?", text.strip())
    if match is None:
        raise UsageError(f"expected --via SIDE or SIDE,jpegQUALITY, such as 32 or 32,jpeg75, got '{text}'")
    return Via(int(match[1]), None if match[2] is None else int(match[2]))


def parse_named_data(items: Sequence[str]) -> dict[str, str]:
    """("NAME=DATA", ...) -> {NAME: DATA}; raises UsageError for another form, a name given twice, and the name "id"."""
    named: dict[str, str] = {}
    for item in items:
        name, equals, data = item.partition("=")
        if not (name and equals and data):
            raise UsageError(f"expected --ood NAME=DATA, got '{item}'")
        if name in named or name == "id":
            raise UsageError(f"expected --ood NAME=DATA with a name of its own, got '{item}': '{name}' is taken")
        named[name] = data
    return named
