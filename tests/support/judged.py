"""Judged images that nobody had to judge, for the tests of the page of `report`."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

from ssod_edge.config import Preprocess
from ssod_edge.data.pixels import Picture
from ssod_edge.data.readers import Pictures
from ssod_edge.detect.metrics import conformal_threshold
from ssod_edge.detect.scores import probabilities
from ssod_edge.evaluation.page_judged import KNOWN, Judged, JudgedSet

#: Files that images are of.
KINDS = 8
#: Names that a page must show as they are.
HOSTILE = (
    '<img src="https://example.com/x.png" onerror="document.title=1">',
    "</script><script>window.hacked = 1</script>",
    "say \"hi\" & 'bye' <!--",
    "\u05e9\u05dc\u05d5\u05dd \u2028 (\u0623\u0647\u0644\u0627)",
    "plain",
)


class MadeImages(Pictures):
    """Images of few kinds, as JPEG files.

    Args:
        labels: of each image.
        side: in pixels.
    """

    def __init__(self, classes: tuple[str, ...], labels: np.ndarray, seed: int = 0, side: int = 96):
        self.name, self.classes, self.labels = f"made {seed}", classes, labels
        self.fingerprint = f"{seed:064x}"
        self._files = [_jpeg(np.random.default_rng([seed, kind]), side) for kind in range(KINDS)]

    def __len__(self) -> int:
        return len(self.labels)

    def source(self, index: int) -> str:
        return f"{self.name}/{index:05}-{'<b>' if index % 7 == 0 else ''}.jpg"

    def picture(self, index: int) -> Picture:
        return Picture(self._files[index % KINDS], self.source(index))


def _jpeg(rng: np.random.Generator, side: int) -> bytes:
    image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize((side, side * 3 // 4))
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def made_set(n: int, classes: tuple[str, ...], seed: int, known: bool, data: str, side: int = 96) -> JudgedSet:
    """n images; of known ones most get their class and a low score."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(classes), n) if known else np.full(n, -1)
    logits = rng.normal(0, 1, (n, len(classes))).astype(np.float32)
    if known:
        logits[np.arange(n), labels] += rng.gamma(2, 1.5, n).astype(np.float32)
    scores = rng.gamma(2, 1 if known else 2.2, n) + (0 if known else 1)
    source = MadeImages(classes if known else ("x",), labels if known else np.zeros(n, np.int64), seed, side)
    return JudgedSet(data, source, np.arange(n), labels, probabilities(logits), scores.astype(np.float32))


def made(
    n: int = 400,
    classes: tuple[str, ...] = HOSTILE,
    others: Mapping[str, int] | None = None,
    calib: int = 300,
    side: int = 96,
) -> Judged:
    """A judged model of these classes, with n known images and as many of each other set as `others` says."""
    others = {"near <i>things</i>": 150, "\u0628\u0639\u064a\u062f": 90} if others is None else others
    sets = {KNOWN: made_set(n, classes, 1, True, "photos/test", side)}
    for seed, (name, count) in enumerate(others.items(), 2):
        sets[name] = made_set(count, classes, seed, False, f"others/{seed}", side)
    held_out = made_set(calib, classes, 99, True, "calib").scores
    return Judged(
        name="<u>model</u> & more",
        place="runs/demo model",
        judge="a test",
        backbone="made",
        classes=classes,
        preprocess=Preprocess(input_size=64),
        score="energy",
        threshold=conformal_threshold(held_out, 0.95, "calib of '<photos>'"),
        sets=sets,
    )
