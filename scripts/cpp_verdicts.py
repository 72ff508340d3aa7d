"""Does a program of `examples/cpp` say what `ssod-edge predict` says? Of any photos.

    python scripts/cpp_verdicts.py EXPORT FRAMES PROGRAM GRAPH DATA... --json FILE

FRAMES is what `export --frame` wrote of EXPORT, PROGRAM one that is built of examples/cpp, GRAPH the name of a graph in
FRAMES, and each DATA a folder of pictures.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import numpy as np

import ssod_edge
from ssod_edge.data.pixels import is_picture
from ssod_edge.files import write_json

AT_A_TIME = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("export", "frames", "program", "graph"):
        parser.add_argument(name)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--json", required=True)
    given = parser.parse_args()
    pictures = [path for folder in given.data for path in sorted(folder.rglob("*")) if path.is_file()]
    pictures = [path for path in pictures if is_picture(path)]
    with ssod_edge.open(given.export, artifact=given.graph) as model:
        expected = list(model.predict_many(pictures))
    lines: list[str] = []
    for start in range(0, len(pictures), AT_A_TIME):
        part = pictures[start : start + AT_A_TIME]
        command = [str(Path(given.program).resolve()), given.frames, given.graph, *map(str, part)]
        lines += subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.rsplit("\t", 4)[1:] for line in lines]
    off = np.array([abs(float(row[2]) - verdict.ood_score) for row, verdict in zip(rows, expected, strict=True)])
    found = {
        "program": Path(given.program).name,
        "graph": given.graph,
        "data": [folder.name for folder in given.data],
        "pictures": len(pictures),
        "same_class": sum(row[0] == verdict.class_name for row, verdict in zip(rows, expected, strict=True)),
        "same_verdict": sum((row[3] == "known") == verdict.known for row, verdict in zip(rows, expected, strict=True)),
        "threshold": expected[0].threshold,
        "score_off": {"median": float(np.median(off)), "p99": float(np.quantile(off, 0.99)), "max": float(off.max())},
    }
    print(found)
    write_json(given.json, found)


if __name__ == "__main__":
    main()
