"""What an image looks like in few numbers, so that alike ones are found among what was collected."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssod_edge.errors import UsageError
from ssod_edge.runtime.predict import Pixels
from ssod_edge.runtime.runner import Array, Runner
from ssod_edge.runtime.verify import load_reference

Floats = npt.NDArray[np.float32]
Descriptor = npt.NDArray[np.int8]

#: SIDE x SIDE pixels and one more number, or as many mixtures of features.
SIDE = 16
WIDTH = SIDE * SIDE + 1
#: Grey levels (root mean square) that count as no contrast: below, all pictures are alike, whatever their noise.
FLAT = 4.0
#: Images of the reference that say what is usual of each feature, and how many run at a time.
USUAL, BATCH = 64, 8
FEATURES = "features_pooled"


class Describer:
    """Describes images of a model: by its pooled features where the graph gives them, else by their pixels.

    Of features the mean over known images (of the export's reference) is taken away, because those of many networks
    point into one corner, where all images look alike; not that of the images at hand, which may be of one thing. They
    are then mixed at random down to `WIDTH` numbers, which keeps the cosines to about 0.02 where they are high.

    Args:
        runner: it runs `USUAL` images once, where features count.

    Attributes:
        kind: "pixels", or "features:" and the start of the hash of the export's reference; of a taught export, of the
            reference of its first version: the features are the same, and the mean nearly is. Descriptors of different
            kinds must not be compared.
    """

    def __init__(self, runner: Runner) -> None:
        self.kind = "pixels"
        if FEATURES not in runner.spec.outputs or runner.folder is None:
            return
        images = load_reference(runner.folder, runner.spec)["image"]
        images = images[np.unique(np.linspace(0, len(images) - 1, USUAL).astype(int))]
        parts = [runner.infer({"image": images[n : n + BATCH]})[FEATURES] for n in range(0, len(images), BATCH)]
        features: Floats = np.concatenate(parts).astype(np.float32)
        self._mean = features.mean(axis=0)
        # RandomState draws the same numbers in every release of NumPy.
        self._mixing = np.random.RandomState(0).standard_normal((features.shape[1], WIDTH)).astype(np.float32)
        spec = runner.spec
        first = spec.lineage[0]["reference_sha256"] if spec.lineage else spec.reference_sha256
        self.kind = f"features:{first[:12]}"

    def describe(self, pixels: Pixels, outputs: dict[str, Any]) -> Descriptor:
        """int8 [WIDTH] of one image: pixels uint8 [3, S, S], and the outputs of the graph for it."""
        if self.kind == "pixels":
            return of_pixels(pixels)
        return _rounded((outputs[FEATURES] - self._mean) @ self._mixing)


def of_pixels(pixels: Pixels) -> Descriptor:
    """int8 [WIDTH] of uint8 [3, S, S]: 16 x 16 grey values about their mean, and a number that is alike in all images,
    which counts where there is little contrast."""
    grey = Image.fromarray(pixels.mean(axis=0).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(grey, np.float32).ravel()
    return _rounded(np.append(values - values.mean(), FLAT * SIDE))


def _rounded(vector: Array) -> Descriptor:
    largest = np.abs(vector).max()
    return np.rint(vector * (127 / largest) if largest > 0 else vector).astype(np.int8)


def unit(descriptor: Descriptor) -> Floats:
    """float32 [WIDTH] of length 1, whose products are cosines."""
    values = descriptor.astype(np.float32)
    scaled: Floats = values / max(1.0, float(np.linalg.norm(values)))
    return scaled


def to_base64(descriptor: Descriptor) -> str:
    return base64.b64encode(descriptor.tobytes()).decode()


def from_base64(text: str) -> Descriptor:
    """Raises UsageError where it is no descriptor."""
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), np.int8)
    except ValueError as error:
        raise UsageError(f"the descriptor is damaged: {error}") from error
    if values.shape != (WIDTH,):
        raise UsageError(f"a descriptor has {WIDTH} numbers, got {len(values)}")
    return values
