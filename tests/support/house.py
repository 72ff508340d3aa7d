"""The modules of the package, and which of them need torch."""

from __future__ import annotations

from pathlib import Path

from places import ROOT

FOLDERS = {"ssod_edge": "ssod_edge", "export": "ssod_edge.export", "bench": "ssod_edge.bench"}

#: Rooms that need torch. Everything else loads without any optional package, because it goes onto a device.
NEED_TORCH = ("ops", "training", "evaluation", "studies", "export.graph", "export.int8", "bench")


def modules() -> dict[str, Path]:
    """Every module of the package -> its file."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def needs_torch(module: str) -> bool:
    return f"{module}.".startswith(tuple(f"ssod_edge.{name}." for name in NEED_TORCH))
