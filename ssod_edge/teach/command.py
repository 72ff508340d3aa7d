"""The `teach` command: say what happens, and show what came out."""

from __future__ import annotations

import time
from pathlib import Path

from ssod_edge.errors import EXIT_OK, EXIT_SOME_FAILED
from ssod_edge.export.command import say, show
from ssod_edge.teach.teach import TeachOptions, teach


def run_teach(folder: str, out: str, options: TeachOptions) -> int:
    """Teach, and print a table of the new artifacts; returns the exit code: 1 if photos were left out."""
    started = time.monotonic()
    spec, unreadable = teach(folder, out, options, say)
    show(spec, Path(out), started)
    return EXIT_SOME_FAILED if unreadable else EXIT_OK
