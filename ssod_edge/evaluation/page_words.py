"""The first screen of a report, in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ssod_edge.evaluation.page_judged import Judged

#: Names of classes that are listed.
MOST_NAMES = 12
#: Around a name, so that one that is written from right to left does not turn the sentence around it; the page makes an
#: element of each.
OPEN, CLOSE = "\u2068", "\u2069"


def named(name: str) -> str:
    """A name within a sentence."""
    return f"{OPEN}{name}{CLOSE}"


def percent(share: float) -> str:
    """ "94.6%"; no digit after 100 and 0."""
    text = f"{100 * share:.1f}"
    return f"{text.removesuffix('.0') if share in (0, 1) else text}%"


def listed(names: Sequence[str], last: str = "and") -> str:
    """ "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def first_screen(judged: Judged, latency: tuple[float, str] | None, expected: dict[str, Any] | None) -> list[str]:
    """What the model is, how good, how fast, what it does with what it does not know.

    Args:
        judged: the images.
        latency: milliseconds of an image, and by what; None if nobody measured it.
        expected: of `ssod_edge.evaluation.page_facts.expected`.
    """
    return [*_what(judged), *_unknown(judged), *_new(expected), *_fast(latency)]


def _what(judged: Judged) -> list[str]:
    names = [named(name) for name in judged.classes[:MOST_NAMES]]
    more = len(judged.classes) - len(names)
    classes = listed([*names, f"{more} more"] if more else names)
    n, right = len(judged.known.indices), judged.correct
    lines = [f"It tells {len(judged.classes)} classes apart: {classes}."]
    line = f"Of {n:,} images of them it gives {percent(float(right.mean()))} the right class"
    if judged.threshold is None:
        return [*lines, f"{line}."]
    accepted = judged.known.scores <= judged.threshold.value
    kept = float(accepted.mean())
    answered = f"of these {percent(float(right[accepted].mean()))} get the right class" if accepted.any() else "none"
    return [*lines, f"{line}. At its threshold it calls {percent(kept)} of them known; {answered}."]


def _unknown(judged: Judged) -> list[str]:
    if not judged.unknown:
        return ["How well it tells other things from these was not measured: no unknown images were given."]
    if judged.threshold is None:
        return ["It has no threshold yet, so that it gives a class to every image."]
    value = judged.threshold.value
    shares = [
        f"{percent(float(np.mean(images.scores <= value)))} of {named(name)}" for name, images in judged.unknown.items()
    ]
    return [f"Of images of other things it wrongly takes for known: {listed(shares)}. The rest it calls unknown."]


def _new(expected: dict[str, Any] | None) -> list[str]:
    if not expected or not expected["classes"]:
        return []
    rows = expected["classes"]
    mean = float(np.mean([row["accepted"] for row in rows]))
    hardest, taken_for = named(rows[0]["name"]), named(rows[0]["taken_for"])
    return [
        "A new kind of thing that looks much like its classes is harder: with each class left out of the training in "
        f"turn, {percent(mean)} of its images were taken for one of the others. The hardest is {hardest}, which is "
        f"taken for {taken_for}."
    ]


def _fast(latency: tuple[float, str] | None) -> list[str]:
    return [] if latency is None else [f"From image to verdict it takes {latency[0]:.1f} ms ({latency[1]})."]
