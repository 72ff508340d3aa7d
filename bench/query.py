"""One query as a user sends it: an encoded image in, a verdict out."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image

from ssod_edge.data.pixels import read_pixels
from ssod_edge.errors import UsageError
from ssod_edge.runtime.predict import Predictor
from ssod_edge.runtime.runner import Array, Runner

#: Different images that queries take in turn, so that a warm cache does not flatter the decoder.
IMAGES = 64
JPEG_QUALITY = 95


def encode(images: Iterable[Image.Image]) -> list[bytes]:
    """RGB images as JPEG files in memory."""
    files = []
    for image in images:
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=JPEG_QUALITY)
        files.append(file.getvalue())
    return files


class ImageQuery:
    """A `ssod_edge.bench.latency.Query` on an open runner.

    Its stages, the ones of `ssod_edge.bench.latency.STAGES`: decode and resize; nothing; the engine's run; the
    verdict. Engines on the CPU read the image where it lies, so "transfer" is 0 there; an engine on another device
    copies inside its run, and that time counts as "compute". Each query takes the next `batch` of the encoded images in
    turn; of a plain classifier the verdict is the class alone.
    """

    def __init__(self, runner: Runner, images: Sequence[bytes], batch: int) -> None:
        if not images:
            raise UsageError("a query needs at least one image")
        self._runner = runner
        self._settings = runner.spec.preprocess
        self._predictor = Predictor(runner)
        self._images = cycle(images)
        self.pixels = np.zeros((batch, 3, self._settings.input_size, self._settings.input_size), np.uint8)

    def __call__(self) -> tuple[int, int, int, int]:
        """Nanoseconds of each stage."""
        files = [next(self._images) for _ in self.pixels]
        start = time.perf_counter_ns()
        for file, row in zip(files, self.pixels, strict=True):
            read_pixels(file, self._settings, row)
        ready = time.perf_counter_ns()
        outputs = self._runner.infer({"image": self.pixels})
        computed = time.perf_counter_ns()
        if "ood_score" in outputs:
            self._predictor.verdicts(files, outputs)
        else:
            classify(outputs)
        done = time.perf_counter_ns()
        return ready - start, 0, computed - ready, done - computed

    def compute(self) -> dict[str, Array]:
        """The engine's run alone, on the images of the last query."""
        return self._runner.infer({"image": self.pixels})


def classify(outputs: dict[str, Array]) -> list[tuple[int, Any]]:
    """What a plain classifier says: class index and confidence of each image."""
    classes = outputs["logits"].argmax(axis=1).tolist()
    return [(index, float(row[index])) for index, row in zip(classes, outputs["probs"], strict=True)]
