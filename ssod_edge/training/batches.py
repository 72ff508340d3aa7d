"""How an image becomes a training or evaluation input, and batches of them."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssod_edge.config import Preprocess
from ssod_edge.data.named import Via
from ssod_edge.data.pixels import fit_box, read_pixels
from ssod_edge.data.sources import ImageSource
from ssod_edge.data.splits import Indices
from ssod_edge.errors import ImageError
from ssod_edge.terminal import tell

#: Of a random crop, relative to the picture's or to a square; its inverse is the largest.
ASPECT_MIN = 3 / 4


class EvalImages(Dataset[tuple[Tensor, int, int]]):
    """(uint8 image [3, S, S], label, index) by the one deployment preprocessing.

    Args:
        source: images.
        indices: which of them, in which order; None for all.
        settings: the model's preprocessing.
        via: what an image goes through first (protocol `via32`), or None (`native`).
    """

    def __init__(self, source: ImageSource, indices: Indices | None, settings: Preprocess, via: Via | None = None):
        self.source = source
        self.indices = np.arange(len(source)) if indices is None else indices
        self.settings = settings
        self.via = via

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        index = int(self.indices[position])
        pixels = read_pixels(self.source.picture(index), self.settings, via=self.via)
        return torch.from_numpy(pixels), int(self.source.labels[index]), index


class TrainImages(EvalImages):
    """As `EvalImages` of all images, with a random crop and mirror drawn from (seed, epoch, index) alone."""

    def __init__(self, source: ImageSource, settings: Preprocess, seed: int, crop_scale_min: float, hflip: float):
        super().__init__(source, None, settings)
        self.seed = seed
        self.start_epoch(0, settings.input_size)
        self.crop_scale_min = crop_scale_min
        self.hflip = hflip if source.hflip_ok else 0.0

    def start_epoch(self, epoch: int, size: int) -> None:
        """From here on, draw for this epoch, at this size in pixels. Workers started later see it."""
        self.epoch = epoch
        self.settings = replace(self.settings, input_size=size)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        rng = np.random.default_rng((self.seed, self.epoch, index))
        # The smallest crop is to be twice as large as its result too.
        size = math.ceil(self.settings.input_size / (self.crop_scale_min * ASPECT_MIN) ** 0.5)
        image = self.source.image(index, replace(self.settings, input_size=size, crop_pct=1.0))
        pixels = augment(image, self.settings, rng, self.crop_scale_min, self.hflip)
        return torch.from_numpy(pixels), int(self.source.labels[index]), index


def load_batches(dataset: EvalImages, workers: int, **options: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches (uint8 [N, 3, S, S], labels [N], indices [N]) through a DataLoader.

    Raises:
        ImageError: an image cannot be read; the message names all such images of the data set, without the
            worker's traceback.
    """
    loader = DataLoader(dataset, num_workers=workers, worker_init_fn=_ignore_interrupts, **options)
    try:
        yield from loader
    except ImageError as error:
        first = str(error).strip().splitlines()[-1].rpartition("ImageError: ")[2]
        # It holds the iterator of the loader, whose processes would live until the garbage is collected.
        error.__traceback__ = None
        raise _all_unreadable(dataset, workers, first) from None


def _why_unreadable(source: ImageSource, settings: Preprocess, indices: list[int]) -> list[str]:
    """Why images cannot be read; nothing of those that can."""
    reasons = []
    for index in indices:
        try:
            source.image(index, settings)
        except ImageError as error:
            reasons.append(str(error))
    return reasons


def _all_unreadable(dataset: EvalImages, workers: int, first: str) -> ImageError:
    """The error for every image that cannot be read, so that they need not be found one run at a time."""
    tell(f"an image cannot be read; looking for others among {len(dataset.indices)}", err=True)
    images: Any = dataset.indices.tolist()
    read = partial(_why_unreadable, dataset.source, dataset.settings)
    loader = DataLoader(images, batch_size=64, num_workers=workers, collate_fn=read, worker_init_fn=_ignore_interrupts)
    reasons = [reason for batch in loader for reason in batch] or [first]
    fix = "Remove or replace" if dataset.settings.roi is None else "Give another --roi, or remove or replace"
    if len(reasons) == 1:
        return ImageError(f"{reasons[0]}. {fix} it")
    shown = "".join(f"\n  {reason}" for reason in reasons[:10])
    more = f"\n  and {len(reasons) - 10} more" if len(reasons) > 10 else ""
    return ImageError(
        f"{len(reasons)} of {len(images)} images of '{dataset.source.name}' cannot be read. {fix} them:{shown}{more}"
    )


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main one decides what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def augment(
    image: Image.Image, settings: Preprocess, rng: np.random.Generator, crop_scale_min: float, hflip: float
) -> NDArray[np.uint8]:
    """uint8 [3, S, S]: a random crop (area crop_scale_min..1) resized in one pass, maybe mirrored.

    With fit "crop" its aspect is 3/4..4/3. With the others it is the picture's own times 3/4..4/3, so that what is
    squashed, or stands between bars, is squashed about as much, or has about the same bars, as whole pictures will.
    """
    width, height = image.size
    area = width * height * rng.uniform(crop_scale_min, 1.0)
    aspect = np.exp(rng.uniform(np.log(ASPECT_MIN), -np.log(ASPECT_MIN)))
    if settings.fit != "crop":
        aspect *= width / height
    crop_width, crop_height = min(width, (area * aspect) ** 0.5), min(height, (area / aspect) ** 0.5)
    left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
    pixels = np.asarray(fit_box(image, (left, top, left + crop_width, top + crop_height), settings))
    if rng.uniform() < hflip:
        pixels = pixels[:, ::-1]
    # A copy at any size: one pixel is contiguous whatever its strides, and torch refuses negative ones.
    return pixels.transpose(2, 0, 1).copy()
