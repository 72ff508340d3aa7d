"""Groups of images that belong together: a burst, a video, a camera. Images of one never lie in two splits."""

from __future__ import annotations

import numpy as np

from ssod_edge.config import compiled
from ssod_edge.data.sources import ImageSource
from ssod_edge.data.splits import Indices
from ssod_edge.errors import UsageError


def image_groups(source: ImageSource, pattern: str | None) -> Indices | None:
    """The group of each image.

    Args:
        source: images; those of a table with a column `group` have groups of their own.
        pattern: a regular expression that is searched for in the name of each image within its data set; its first
            group, or without one the whole match, names the group of the image. None: the source's own groups.

    Returns:
        int64 [n], a number for each group; an image without one has a number of its own. None where there are no
        groups.

    Raises:
        UsageError: the pattern is no regular expression, or fits no image.
    """
    names = source.group_names if pattern is None else _find(source, pattern)
    if names is None:
        return None
    keys = [name or f"\0{index}" for index, name in enumerate(names)]  # no name has a NUL
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _find(source: ImageSource, pattern: str) -> tuple[str, ...]:
    expression = compiled(pattern)
    matches = [expression.search(source.source(index)) for index in range(len(source))]
    names = tuple("" if match is None else match[min(1, expression.groups)] or "" for match in matches)
    if not any(names):
        raise UsageError(f"group '{pattern}' is found in no image of '{source.name}'; one is '{source.source(0)}'")
    return names


def describe_groups(groups: Indices) -> str:
    """How many groups there are, for the user."""
    sizes = np.bincount(groups)
    alone = int((sizes == 1).sum())
    return (
        f"groups: {len(sizes) - alone} of up to {sizes.max()} images, and {alone} images on their own; each group lies "
        "in one split"
    )
