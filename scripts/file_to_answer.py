"""Time from a file to the answer beyond the bare engine: ssod-edge beside Ultralytics and anomalib, all on OpenVINO.

    pip install ultralytics anomalib        # in an environment of their own, with ssod-edge
    python scripts/file_to_answer.py EXPORT PHOTOS --json FILE

EXPORT is an export of ssod-edge with an OpenVINO artifact, and a photo of PHOTOS is the file, resized to 0.2 and to 12
megapixels. The peers have networks with random weights, which run as fast as trained ones: Ultralytics' yolo11n-cls
at the same input size, anomalib's FastFlow on ResNet-18 at its own, 256 px. Each opens its model as its documents show,
and is asked for one file at a time. What is subtracted is the same compiled model called on an input that is ready.
anomalib's graph holds its resize; its bare engine gets an image that needs none.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import ssod_edge
from ssod_edge.bench.environment import describe_environment
from ssod_edge.bench.tools.photos import LARGE, enlarged
from ssod_edge.data.sources import open_dataset
from ssod_edge.files import write_json
from ssod_edge.runtime.open import open_runner

#: Sides of the photo that is about 0.2 megapixels.
SMALL = (520, 390)


@dataclass(frozen=True)
class Way:
    """A tool: what it does with a file, and its engine alone."""

    name: str
    predict: Callable[[str], object]
    bare: Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export")
    parser.add_argument("photos")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", required=True)
    given = parser.parse_args()
    given.export, given.json = os.path.abspath(given.export), os.path.abspath(given.json)
    picture = open_dataset(given.photos).image(0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the peers write caches and settings where they run
        ways = [ours(given.export), ultralytics(ours_size(given.export)), anomalib()]
        files = {}
        for width, height in (SMALL, LARGE):
            file = Path(f"{width}x{height}.jpg")
            file.write_bytes(enlarged(picture, width, height))
            files[f"{width * height / 1e6:.1f} MP"] = str(file)
        rows = [measure(name, file, ways, given.rounds) for name, file in files.items()]
    for row in rows:
        print(row["file"], {name: round(ms, 2) for name, ms in row["beyond_ms"].items()}, row["ratio_to_best_peer"])
    packages = {name: version(name) for name in ("ultralytics", "anomalib", "openvino", "torch", "opencv-python")}
    write_json(given.json, {"environment": describe_environment(None), "packages": packages, "rows": rows})


def measure(name: str, file: str, ways: list[Way], rounds: int) -> dict[str, Any]:
    """Milliseconds of each way, in turns: medians, and quartiles over the rounds of what comes on top of the engine."""
    beyond: dict[str, list[float]] = {way.name: [] for way in ways}
    whole: dict[str, list[float]] = {way.name: [] for way in ways}
    for turn in range(rounds + 2):
        for way in ways[:: 1 if turn % 2 else -1]:
            taken = [_milliseconds(task) for task in (lambda way=way: way.predict(file), way.bare)]
            if turn > 1:
                whole[way.name].append(taken[0])
                beyond[way.name].append(taken[0] - taken[1])
    medians = {key: median(values) for key, values in beyond.items()}
    best = min(value for key, value in medians.items() if key != "ssod-edge")
    return {
        "file": name,
        "bytes": os.path.getsize(file),
        "rounds": rounds,
        "whole_ms": {key: median(values) for key, values in whole.items()},
        "beyond_ms": medians,
        "beyond_quartiles_ms": {key: np.quantile(values, [0.25, 0.75]).tolist() for key, values in beyond.items()},
        "ratio_to_best_peer": medians["ssod-edge"] / best,
    }


def _milliseconds(task: Callable[[], object]) -> float:
    started = time.perf_counter()
    task()
    return 1e3 * (time.perf_counter() - started)


def ours(export: str) -> Way:
    model = ssod_edge.open(export, engine="openvino")
    runner = open_runner(export, engine="openvino")
    image = np.zeros((1, 3, *(runner.spec.preprocess.input_size,) * 2), np.uint8)
    return Way("ssod-edge", model.predict, lambda: runner.infer({"image": image}))


def ours_size(export: str) -> int:
    with open_runner(export, engine="openvino") as runner:
        return runner.spec.preprocess.input_size


def ultralytics(size: int) -> Way:
    os.environ["YOLO_CONFIG_DIR"] = os.getcwd()
    os.environ["YOLO_OFFLINE"] = "true"
    from ultralytics import YOLO

    model = YOLO(YOLO("yolo11n-cls.yaml").export(format="openvino", imgsz=size, verbose=False), task="classify")
    # As its backend does it: a dictionary to an asynchronous queue of one, or to the compiled model.
    compiled = open_ir(next(Path("yolo11n-cls_openvino_model").glob("*.xml")))
    image = np.zeros((1, 3, size, size), np.float32)
    return Way("Ultralytics", lambda file: model.predict(file, verbose=False, imgsz=size), lambda: compiled(image))


def anomalib() -> Way:
    from anomalib.deploy import OpenVINOInferencer
    from anomalib.models import Fastflow

    model = Fastflow(backbone="resnet18", pre_trained=False)
    path = Path(model.to_openvino(export_root=Path("anomalib")))
    inferencer = OpenVINOInferencer(path=path, device="CPU")
    compiled, image = inferencer.model, np.zeros((1, 3, 256, 256), np.float32)
    return Way("anomalib", inferencer.predict, lambda: compiled(image))


def open_ir(path: Path) -> Any:
    import openvino

    return openvino.Core().compile_model(path, "CPU", {"PERFORMANCE_HINT": "LATENCY"})


if __name__ == "__main__":
    main()
