"""`python -m ssod_edge` is the command `ssod-edge`."""

from __future__ import annotations

from ssod_edge.cli import main

if __name__ == "__main__":
    main(prog_name="ssod-edge")
