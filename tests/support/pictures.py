"""Small real image folders for the tests: coloured stripes, one hue a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ssod_edge.data.readers import Pictures


def write_folder(root: Path, classes: int = 3, per_class: int = 12, size: int = 40) -> Path:
    """`root`/CLASS/NN.png; class k is bright in channel k % 3, the stripes' phase and the noise vary."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(per_class):
            stripes = 60 * (np.sin(np.arange(size) / (2 + label) + rng.uniform(0, 6)) > 0)
            pixels = rng.integers(0, 60, (size, size, 3)) + stripes[None, :, None]
            pixels[:, :, label % 3] += 120
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:02}.png")
    return root


class Labels(Pictures):
    """Images of which only the labels are there."""

    name = "labels"

    def __init__(self, *counts: int):
        self.labels = np.repeat(np.arange(len(counts)), counts)
        self.classes = tuple(f"c{label}" for label in range(len(counts)))

    def __len__(self) -> int:
        return len(self.labels)

    def source(self, index: int) -> str:
        return f"c{self.labels[index]}/video{index // 4}_{index}.png"
