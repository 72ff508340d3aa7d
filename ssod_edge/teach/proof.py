"""What a lesson gained and what it cost, on features that the model which is asked has not seen."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssod_edge.detect.detectors import Array
from ssod_edge.detect.fit import Labels
from ssod_edge.detect.metrics import more_than_chance
from ssod_edge.errors import UsageError, VerificationError

#: A new class of which fewer are known as it is worth a warning.
POOR = 0.5


@dataclass(frozen=True)
class Answers:
    """What a model says of images that it has not seen.

    Attributes:
        right: bool [n], whether the class is right.
        known: bool [n], whether it accepts the image.
    """

    right: NDArray[np.bool_]
    known: NDArray[np.bool_]

    @classmethod
    def of(cls, logits: Array, score: Array, threshold: float, labels: Labels) -> Answers:
        """From what a graph gives."""
        return cls(logits.argmax(axis=1) == labels, score <= threshold)


@dataclass(frozen=True)
class Proof:
    """Figures of a lesson; shares in [0, 1].

    Attributes:
        images: of the classes that were there before, out of fold or held out.
        accuracy: before and after, on those.
        held_out: how many of them no fit has seen at all.
        known: share of these that is accepted, before and after.
        lost: class -> points of its accuracy that were lost, of those that lost any.
        new: class -> {"photos", "recall": classified as it, "accepted": and known, "known_before": share that the
            former model accepted, as whatever}; by models that have not seen the photo.
    """

    images: int
    accuracy: tuple[float, float]
    held_out: int
    known: tuple[float, float]
    lost: dict[str, float] = field(default_factory=dict)
    new: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """For the spec, as JSON gives it back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def lines(self) -> list[str]:
        """The same in words."""
        found = []
        for name, row in self.new.items():
            found.append(
                f"'{name}': of {row['photos']:.0f} photos, each by a model that has not seen it, {row['recall']:.0%} "
                f"are given this class and {row['accepted']:.0%} are known as it; before, {row['known_before']:.0%} "
                "were known as something else"
            )
            if row["recall"] < POOR:
                found.append(f"'{name}' looks like the other classes: more photos help, in other light and places")
        before, after = self.accuracy
        found.append(f"the other classes, {self.images} images: accuracy {before:.1%} -> {after:.1%}")
        if self.held_out:
            was, now = self.known
            found.append(f"known of {self.held_out} held-out images: {was:.1%} -> {now:.1%}")
        if self.lost:
            most = sorted(self.lost.items(), key=lambda item: -item[1])[:3]
            found.append("who pays: " + ", ".join(f"'{name}' {points:.1f} points" for name, points in most))
        return found


def prove(
    before: Answers, after: Answers, labels: Labels, held_out: NDArray[np.bool_], classes: tuple[str, ...]
) -> Proof:
    """Of the classes that were there before.

    Args:
        before, after: of n images of them, out of fold or held out.
        labels: int64 [n], in `classes`.
        held_out: bool [n], which of them no fit has seen.
    """
    if not len(labels):
        raise UsageError("the export holds no features of the classes that stay, so that nothing can be proved")
    lost = {}
    for label in np.unique(labels):
        mine = labels == label
        points = 100 * float(before.right[mine].mean() - after.right[mine].mean())
        if points > 0:
            lost[classes[int(label)]] = points
    known = (float(a.known[held_out].mean()) if held_out.any() else float("nan") for a in (before, after))
    accuracy = (float(before.right.mean()), float(after.right.mean()))
    was, now = known
    return Proof(len(labels), accuracy, int(held_out.sum()), (was, now) if held_out.any() else (0.0, 0.0), lost)


def check(proof: Proof, before: Answers, after: Answers, held_out: NDArray[np.bool_], max_drop: float) -> None:
    """Raises VerificationError where the classes that were there lose more than `max_drop` points.

    What is accepted of few held-out images must also have fallen by more than chance gives.
    """
    dropped = 100 * (proof.accuracy[0] - proof.accuracy[1])
    fewer = 100 * (proof.known[0] - proof.known[1])
    reasons = []
    if not dropped <= max_drop:
        reasons.append(f"the accuracy of the other classes falls by {dropped:.1f} points")
    if fewer > max_drop and more_than_chance(before.known[held_out], after.known[held_out]):
        reasons.append(f"{fewer:.1f} points fewer of the held-out images are known")
    if reasons:
        figures = "; ".join(proof.lines())
        raise VerificationError(
            f"nothing is released: {' and '.join(reasons)}, more than --max-drop {max_drop:g}. {figures}. Teach more "
            "or clearer photos, or allow it with --max-drop"
        )
