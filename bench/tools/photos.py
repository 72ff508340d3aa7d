"""What reading JPEGs at a reduced scale gains, and whether a model still says the same of them.

python -m ssod_edge.bench.tools.photos EXPORT PHOTOS.tar --json bench/results/photos.json
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from ssod_edge.bench.tools.command import Tool, json_option, write_rows
from ssod_edge.config import Preprocess, TrainConfig
from ssod_edge.data.pixels import Picture, read_pixels
from ssod_edge.data.readers import Pictures
from ssod_edge.data.sources import ImageSource, open_dataset
from ssod_edge.data.splits import Splits
from ssod_edge.errors import UsageError
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.predict import Predictor
from ssod_edge.training.batches import TrainImages

#: 12 megapixels, as a phone takes them.
LARGE = (4000, 3000)
#: Standard deviation of the grain, of 255, and quality of the JPEG: 12 megapixels make about 1.5 MB, or 4 MB.
PLAIN, FINE = (3.0, 90), (5.0, 95)


def enlarged(image: Image.Image, width: int, height: int, kind: tuple[float, int] = PLAIN) -> bytes:
    """A JPEG file of another size, with a sensor's grain: it stands in for a photo of that size."""
    large = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    grain = np.random.default_rng(0).normal(0, kind[0], large.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(large + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=kind[1])
    return file.getvalue()


def agreement(predictor: Predictor, source: ImageSource, times: float | None, count: int) -> dict[str, Any]:
    """On photos whose shorter side is `times` the input's (None: as they are): how often both ways say the same.

    Returns:
        `class_agreement` and `decision_agreement` (shares), `score_difference` (median, absolute), `reduced` (share of
        the photos that came at a smaller scale) and `pixel_difference` (mean, of 255).
    """
    settings = predictor.runner.spec.preprocess
    indices = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int).tolist()
    same, decided, scores, pixels = [], [], [], []
    for index in indices:
        picture = source.picture(index)
        if times is not None:
            image = source.image(index)
            factor = times * settings.input_size / min(image.size)
            picture = Picture(enlarged(image, round(factor * image.width), round(factor * image.height)), picture.name)
        one, other = (read_pixels(picture, replace(settings, version=version)) for version in (1, 2))
        outputs = [predictor.runner.infer({"image": image[None]}) for image in (one, other)]
        first, second = (predictor.verdicts([picture], output)[0] for output in outputs)
        same.append(first.class_index == second.class_index)
        decided.append(first.known == second.known)
        scores.append(abs((first.ood_score or 0) - (second.ood_score or 0)))
        pixels.append(np.abs(one.astype(int) - other).mean())
    return {
        "shorter_side": "as it is" if times is None else f"{times:g} times the input, enlarged",
        "photos": len(indices),
        "class_agreement": float(np.mean(same)),
        "decision_agreement": float(np.mean(decided)),
        "score_difference": float(np.median(scores)),
        "reduced": float(np.mean(np.array(pixels) > 0)),
        "pixel_difference": float(np.mean(pixels)),
    }


class _Same(Pictures):
    """A data set that is one file, for the time that training takes to read it."""

    hflip_ok, labels, fingerprint, name = True, np.zeros(1, np.int64), "", ""
    classes: tuple[str, ...] = ("a",)
    fixed_splits: Splits | None = None

    def __init__(self, file: bytes):
        self._picture = Picture(file, "")

    def __len__(self) -> int:
        return 1

    def source(self, index: int) -> str:
        return ""

    def picture(self, index: int) -> Picture:
        return self._picture


def by_turns(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each task, in turn and in the other order every second time, after one untimed round."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name in list(tasks)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            tasks[name]()
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in taken.items()}


def speed(predictor: Predictor, file: bytes, rounds: int) -> dict[str, Any]:
    """Milliseconds of one file to a verdict, and to an input of training, in full (version 1) and reduced (2)."""
    settings = predictor.runner.spec.preprocess
    pixels = read_pixels(file, settings)
    with Image.open(io.BytesIO(file)) as image:
        size = f"{image.width} x {image.height}"

    def verdict(version: int) -> None:
        found = read_pixels(file, replace(settings, version=version))
        predictor.verdicts([file], predictor.runner.infer({"image": found[None]}))

    def training(version: int) -> None:
        one = replace(settings, version=version)
        TrainImages(_Same(file), one, 0, TrainConfig.crop_scale_min, 0.5)[0]

    found = by_turns(
        {
            "verdict_full_ms": lambda: verdict(1),
            "verdict_reduced_ms": lambda: verdict(2),
            "training_full_ms": lambda: training(1),
            "training_reduced_ms": lambda: training(2),
            "engine_ms": lambda: predictor.runner.infer({"image": pixels[None]}),
        },
        rounds,
    )
    return {"size": size, "bytes": len(file), "rounds": rounds, **found}


@click.command(cls=Tool)
@click.argument("export")
@click.argument("data")
@click.option("--engine", default="openvino", show_default=True)
@click.option("--times", default="2,3,4,6,8", show_default=True, help="Sizes of enlarged photos; empty: none.")
@click.option("--photos", "count", default=500, show_default=True, help="Of each size.")
@click.option("--rounds", default=15, show_default=True)
@json_option
def main(export: str, data: str, engine: str, times: str, count: int, rounds: int, json_file: Path | None) -> None:
    """Compare reading photos in full with reading them reduced."""
    if count < 1 or rounds < 1:
        raise UsageError(f"it takes at least one photo and one round, got {count} and {rounds}")
    source = open_dataset(data, labelled=False)
    rows: list[dict[str, Any]] = []
    with Predictor(open_runner(export, engine=engine)) as predictor:
        settings: Preprocess = predictor.runner.spec.preprocess
        for size in (None, *(float(text) for text in times.split(",") if text)):
            rows.append(agreement(predictor, source, size, count))
            click.echo(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
        large = (enlarged(source.image(0), *LARGE, kind) for kind in (PLAIN, FINE))
        for file in (source.picture(0).content, *large):
            assert isinstance(file, bytes), "a data set of files"
            rows.append(speed(predictor, file, rounds))
            click.echo(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    write_rows(json_file, "photos", rows, input_size=settings.input_size)


if __name__ == "__main__":
    main()
