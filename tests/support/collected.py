"""A folder as `predict --collect` leaves it, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ssod_edge.config import Preprocess
from ssod_edge.data.pixels import read_pixels
from ssod_edge.runtime.field.descriptors import of_pixels, to_base64
from ssod_edge.runtime.field.shelf import INDEX, Collected, to_text

#: What the model took them for, in turn.
SAID = ("cup", "plate", "fork")


def picture(kind: int, number: int) -> Image.Image:
    """One of a kind: a coarse pattern, with a part of its own."""
    base = np.random.default_rng(kind).normal(0, 25, (4, 4, 1))
    own = np.random.default_rng(1000 * kind + number + 1).normal(0, 11, (4, 4, 1))
    pixels = np.clip(90 + base + own - (base + own).mean(), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels.repeat(3, 2).repeat(12, 0).repeat(12, 1))


def write_collected(folder: Path, kinds: Mapping[int, int], scale: int = 1) -> list[str]:
    """Pictures of kinds, so many of each, with a line each; returns their names, KIND-NUMBER.jpg.

    Args:
        folder: to make.
        kinds: kind -> how many. 7, 10 and 3 are unlike each other.
        scale: their sides are 48 times as many pixels.
    """
    folder.mkdir(parents=True)
    lines = []
    for kind, count in kinds.items():
        for number in range(count):
            name = f"{kind:02}-{number:03}.jpg"
            image = picture(kind, number)
            image.resize((48 * scale, 48 * scale), Image.Resampling.NEAREST).save(folder / name, quality=80)
            said = number % len(SAID)
            lines.append(
                Collected(
                    file=name, time="2026-05-04T10:00:00+00:00", source=f"belt/{name}", frame=None,
                    class_name=SAID[said], confidence=0.4, ood_score=2.0, threshold=1.0, known=said == 2,
                    p_known=0.01, engine="onnxruntime", precision="fp32", artifact="onnx-fp32",
                    artifact_sha256="0" * 64, score="energy", weight=1.0, described_by="pixels",
                    descriptor=to_base64(of_pixels(read_pixels(folder / name, Preprocess(input_size=64)))),
                )
            )  # fmt: skip
    (folder / INDEX).write_text("".join(f"{to_text(line)}\n" for line in lines), encoding="utf-8")
    return [line.file for line in lines]
