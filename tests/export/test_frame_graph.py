"""The graph that makes pixels of a frame: what `preprocess` makes, to a level, on both engines."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from ssod_edge.config import Preprocess
from ssod_edge.data.pixels import preprocess
from ssod_edge.export.frame_graph import FRAME, pixels_graph

pytest.importorskip("onnxruntime")

SIZE = 48
#: Larger, smaller, of the same size, tall, wide, of one pixel.
FRAMES = ((120, 160), (20, 30), (SIZE, SIZE), (200, 31), (31, 200), (1, 1), (SIZE, 3 * SIZE), (97, 101))
SETTINGS = [
    *(Preprocess(SIZE, interpolation=how) for how in ("bicubic", "bilinear")),
    Preprocess(SIZE, crop_pct=0.875),
    *(Preprocess(SIZE, fit="squash", interpolation=how) for how in ("bicubic", "bilinear")),
    *(Preprocess(SIZE, fit="pad", interpolation=how) for how in ("bicubic", "bilinear")),
]


def on_onnxruntime(graph: onnx.ModelProto) -> Callable[[np.ndarray], np.ndarray]:
    from ssod_edge.runtime.engines.onnxruntime import new_session, session_options

    session = new_session(graph.SerializeToString(), session_options())
    return lambda frame: session.run(None, {FRAME: frame})[0]


def on_openvino(graph: onnx.ModelProto) -> Callable[[np.ndarray], np.ndarray]:
    from ssod_edge.runtime.engines.openvino import open_request, request_config

    openvino = pytest.importorskip("openvino")
    model = openvino.convert_model(io.BytesIO(graph.SerializeToString()))
    request = open_request(model, "CPU", request_config("CPU", "fp32"))
    return lambda frame: np.array(next(iter(request.infer({FRAME: frame}).values())))


def frame_of(height: int, width: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng((height, width))
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    few = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
    return np.asarray(few.resize((width, height), Image.Resampling.BICUBIC))


@cache
def opened(engine: Any, number: int, channels: str) -> Callable[[np.ndarray], np.ndarray]:
    graph = pixels_graph(SETTINGS[number], channels)  # type: ignore[arg-type]
    onnx.checker.check_model(graph, full_check=True)
    found: Callable[[np.ndarray], np.ndarray] = engine(graph)
    return found


@pytest.mark.parametrize("kind", ["noise", "smooth"])
@pytest.mark.parametrize(
    ("engine", "number"),
    [
        # OpenVINO takes seconds to compile each of these graphs, which are the same on both engines.
        *((on_onnxruntime, number) for number in range(len(SETTINGS))),
        *(
            (on_openvino, 0) if n == 0 else pytest.param(on_openvino, n, marks=pytest.mark.slow)
            for n in range(len(SETTINGS))
        ),
    ],
)
def test_pixels_are_those_of_the_library_to_a_level(engine: Any, number: int, kind: str) -> None:
    for height, width in FRAMES:
        frame = frame_of(height, width, kind)
        found = opened(engine, number, "RGB")(frame)
        assert (found.shape, found.dtype) == ((1, 3, SIZE, SIZE), np.uint8)
        expected = preprocess(Image.fromarray(frame), SETTINGS[number])
        assert np.abs(found[0].astype(int) - expected).max() <= 1, (height, width)
        assert (found[0] != expected).mean() < 0.05, (height, width)  # halves: Pillow counts in whole numbers


@pytest.mark.parametrize("engine", [on_onnxruntime, on_openvino])
def test_a_camera_gives_blue_first(engine: Any) -> None:
    frame = frame_of(60, 90, "smooth")
    np.testing.assert_array_equal(opened(engine, 0, "BGR")(frame[:, :, ::-1].copy()), opened(engine, 0, "RGB")(frame))


@pytest.mark.parametrize("engine", [on_onnxruntime, on_openvino])
def test_a_region_of_the_frame(engine: Any) -> None:
    frame, settings = frame_of(120, 160, "smooth"), Preprocess(SIZE, roi=(30, 20, 80, 70))
    expected = preprocess(Image.fromarray(frame[20:90, 30:110].copy()), settings)
    assert np.abs(engine(pixels_graph(settings))(frame)[0].astype(int) - expected).max() <= 1
