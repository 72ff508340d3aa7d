"""Frames with what each graph that takes one makes of them, for whoever writes a client in another language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssod_edge.export.frame_samples import colours_of
from ssod_edge.files import make_directory, write_json
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.golden import GOLDEN, expected, write_input
from ssod_edge.runtime.runner import Array

#: The folder beside the graphs.
GOLDEN_FRAMES = "golden"


def write_golden_frames(
    export: Export,
    frames: Sequence[Array],
    document: Mapping[str, Any],
    outputs: Mapping[str, Sequence[Mapping[str, Array]]],
    place: Path,
) -> None:
    """Write frames as bytes and as pictures, and `GOLDEN` with their sizes, outputs and tolerances.

    `NN.bin` is what a graph takes: uint8, row by row, three bytes a pixel in the order of the graphs' channels, or in
    NV12.
    `NN.png` shows the same, so that a client's reader of pictures is tested too.

    Args:
        export: what the graphs were made of.
        frames: uint8, see `colours_of`.
        document: what is written about the graphs.
        outputs: those of each graph, one for each frame.
        place: the folder, which is made; of files of these names earlier ones are replaced.

    Raises:
        OutputError: the folder cannot be written.
    """
    place, spec, reference = make_directory(place), export.spec, export.reference()
    channels = document["input"]["channels"]
    told = []
    for number, frame in enumerate(frames):
        picture = colours_of(frame, channels)
        written = write_input(place, f"{number:02d}", frame.tobytes(), picture)
        told.append({**written, "height": picture.shape[0], "width": picture.shape[1]})
    graphs = {}
    for name, parts in outputs.items():
        graph = document["graphs"][name]
        graphs[name] = {
            "file": f"../{graph['main_file']}",
            "sha256": graph["files"][graph["main_file"]],
            "threshold": graph["threshold"],
            **expected(spec, spec.artifact(name), reference, parts),
        }
    about = (
        "Give each frame to a graph: logits and ood_score are these, within the tolerance. known is true where "
        "ood_score is at most the threshold; it may be another one where that is nearer than the tolerance."
    )
    shape = {key: document["input"][key] for key in ("name", "dtype", "channels")}
    answer = {"classes": list(spec.classes), "input": shape, "frames": told, "graphs": graphs}
    write_json(place / GOLDEN, {"about": about, "spec_sha256": document["spec_sha256"], **answer})
