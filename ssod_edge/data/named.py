"""The images that a model is judged on, by name: what `eval`, `study`, `reproduce` and `bench` are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssod_edge.errors import UsageError


@dataclass(frozen=True)
class NamedData:
    """Attributes:
    id_data: ID images, labelled with the model's classes; None: the run's validation split.
    ood_data: name -> OOD images.
    via_size: every image is first resized to this many pixels ("via32"); None is protocol "native".
    """

    id_data: str | None = None
    ood_data: Mapping[str, str] | None = None
    via_size: int | None = None

    def __post_init__(self) -> None:
        if self.via_size is not None and self.via_size < 1:
            raise UsageError(f"via_size must be at least 1, got {self.via_size}")

    @property
    def protocol(self) -> str:
        """ "native", or "via32" where every image first becomes 32 pixels large."""
        return "native" if self.via_size is None else f"via{self.via_size}"


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
