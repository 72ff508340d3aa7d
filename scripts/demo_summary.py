"""The last lines of `make demo`: what was reached, and what to try next."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ssod_edge.spec import load_spec


def main(run: Path, seconds: int) -> None:
    """Print the table for a demo run that took this long."""
    figures = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    bench = json.loads((run / "bench.json").read_text(encoding="utf-8"))
    score = load_spec(run / "export").score_name
    auroc = {row["ood"]: row["auroc"] for row in figures["results"] if row["score"] == score}

    table = Table(title=f"The demo in {seconds // 60} min {seconds % 60} s", title_justify="left", show_header=False)
    table.add_row("known digits 0-7, accuracy", f"{figures['id_accuracy']:.1%}")
    table.add_row(f"unknown digits 8 and 9, AUROC of '{score}'", f"{auroc['near']:.1%}")
    table.add_row("unknown photos, AUROC", f"{auroc['photos']:.1%}")
    table.add_row("unknown shapes and textures, AUROC", f"{auroc['shapes']:.1%}")
    for row in bench["rows"]:
        if row["status"] == "ok" and not row["artifact"].startswith("plain"):
            table.add_row(f"{row['artifact']}, image to verdict", f"{row['latency_ms']['p50']:.2f} ms")
    console = Console(highlight=False)
    console.print()
    console.print(table)
    console.print(f"All of it on a page: {run / 'report.html'}")
    console.print("Try next:")
    for command in (
        f"predict {run} YOUR_PHOTO.jpg --json",
        "train YOUR_IMAGES --backbone mobilenetv3   # a folder of CLASS/IMAGE files",
        "doctor",
    ):
        console.print(f"  .venv/bin/ssod-edge {command}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
