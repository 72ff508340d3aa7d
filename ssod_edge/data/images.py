"""In-distribution images by what they may be used for, divided before anything looks at one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

from ssod_edge.config import Preprocess
from ssod_edge.data.pixels import read_pixels
from ssod_edge.data.sources import ImageSource, open_dataset
from ssod_edge.data.splits import Indices
from ssod_edge.errors import ImageError, UsageError

#: Images that the ranges of an int8 graph's activations come from: what NNCF takes by default, and more change nothing.
RANGE_IMAGES = 300
BATCH = 32
#: Fewer readable images than this describe no distribution.
LEAST_IMAGES = 32


@dataclass(frozen=True)
class Subset:
    """Some images of a source.

    Attributes:
        source: where they come from.
        indices: which of them, int64 [n].
        description: for the record.
        unreadable: message of each image that `batches` could not read, once.
    """

    source: ImageSource
    indices: Indices
    description: str
    unreadable: dict[str, None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def batches(
        self, settings: Preprocess, indices: Indices | None = None
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """(images uint8 [n, 3, S, S], labels int64 [n]) in batches. Unreadable images are left out.

        Args:
            settings: the model's preprocessing.
            indices: which images; None for all.
        """
        chosen = self.indices if indices is None else indices
        for start in range(0, len(chosen), BATCH):
            images, labels = [], []
            for index in chosen[start : start + BATCH].tolist():
                try:
                    images.append(read_pixels(self.source.picture(index), settings))
                except ImageError as error:
                    self.unreadable[str(error)] = None
                else:
                    labels.append(int(self.source.labels[index]))
            if images:
                yield np.stack(images), np.array(labels, np.int64)

    def read(self, settings: Preprocess, indices: Indices) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """All that can be read of these images, as one batch.

        Raises:
            UsageError: none can.
        """
        batches = list(self.batches(settings, indices))
        if not batches:
            why = f" ({next(iter(self.unreadable))})" if self.unreadable else ""
            raise UsageError(f"none of the images of {self.description} can be read{why}")
        images, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
        return images, labels

    def halves(self, first: str, second: str) -> tuple[Subset, Subset]:
        """Two seeded halves, by what they are called, with one list of unreadable images."""
        order = np.random.default_rng(1).permutation(self.indices)
        middle = len(order) // 2
        one, other = (
            replace(self, indices=np.sort(part), description=f"{self.description}, {name}")
            for part, name in ((order[:middle], first), (order[middle:], second))
        )
        return one, other


def whole_dataset(name: str, labelled: bool = False) -> Subset:
    """All images of a data set; errors as `open_dataset`."""
    source = open_dataset(name, labelled=labelled)
    return Subset(source, np.arange(len(source)), f"'{name}', fingerprint {source.fingerprint[:12]}")


@dataclass(frozen=True)
class Images:
    """What an export looks at. None where there are no such images.

    Attributes:
        training: those that the model was trained on, for the state of a score.
        choices: those that choices may look at, a run's validation split.
        thresholds: those that nothing else may look at.
        int8: those that are named to quantise with and to check int8 on; None: see `for_int8`.
    """

    training: Subset | None = None
    choices: Subset | None = None
    thresholds: Subset | None = None
    int8: Subset | None = None

    def for_int8(self) -> tuple[Subset, Subset] | None:
        """Images that the ranges of an int8 graph come from, and others to check it on; None where there are none.

        Ranges come from what the model was trained on, which may be much more than what was held out; that is what
        checks. Without training images, and of images that were named for it, they share one set.
        """
        if self.int8 is None and self.training is not None:
            source, parts = self.training.source, (self.choices, self.thresholds)
            held_out = [part for part in parts if part is not None and part.source is source]
            control = np.unique(np.concatenate([part.indices for part in held_out])) if held_out else np.arange(0)
            ranges = np.setdiff1d(self.training.indices, control)
            if len(control) and len(ranges):
                what = " and ".join(part.description for part in held_out)
                return replace(self.training, indices=ranges), Subset(source, control, what)
        shared = self.int8 or self.thresholds
        if shared is None:
            return None
        order = np.random.default_rng(0).permutation(shared.indices)
        middle = len(order) - min(RANGE_IMAGES, len(order) // 2)
        # The last of them for the ranges, because `reference.npz` takes the first.
        return replace(shared, indices=order[middle:]), replace(shared, indices=order[:middle])

    @property
    def unreadable(self) -> bool:
        """Whether an image has been left out."""
        parts = (getattr(self, part.name) for part in fields(self))
        return any(part is not None and part.unreadable for part in parts)

    def divide(self, choosing: bool, say: Callable[[str], None]) -> Images:
        """With images to fit a score on and, where one is chosen, images to choose by, apart from the thresholds'.

        A run has its training, validation and calibration splits. For weights that were trained elsewhere, and runs
        whose training data is gone, the images of --id are divided, and so are those of a calibration split if a run
        has no validation images.

        Raises:
            UsageError: there are none, or too few.
        """
        training, choices, thresholds = self.training, self.choices, self.thresholds
        if training is None:
            if thresholds is None:
                raise UsageError(
                    "this score is fitted on in-distribution images, and there are none. Name some: --id DATA"
                )
            training, rest = thresholds.halves("half that fits the detector", "the other half")
            say(
                f"note: the images that the model was trained on are not at hand: the detector is fitted on "
                f"{len(training)} images of {thresholds.description}, and the thresholds on others of them"
            )
            thresholds, choices = rest, None
        if choosing and (choices is None or len(choices) < LEAST_IMAGES):
            if thresholds is None:
                raise UsageError(
                    "--score auto chooses on in-distribution images, and there are none. Name some: --id DATA"
                )
            choices, thresholds = thresholds.halves("part that chooses", "part for thresholds")
            say(f"note: the score is chosen on {len(choices)} images of {choices.description}")
        _check_count(training, "fit a detector", own=training is self.training)
        if choosing:
            _check_count(choices, "choose a score", own=False)
        return replace(self, training=training, choices=choices, thresholds=thresholds)


def _check_count(images: Subset | None, purpose: str, own: bool) -> None:
    """Raises UsageError for too few images; `own`: the run's, so that --id adds none."""
    found = 0 if images is None else len(images)
    if found < LEAST_IMAGES:
        fix = "Name more with --id DATA"
        if found and own:
            fix = "Train on more, or ship a score without a state (--score energy)"
        raise UsageError(f"it takes at least {LEAST_IMAGES} images to {purpose}, got {found}. {fix}")
