"""Sums over an epoch, kept on the device: reading one would wait for it, in every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Figure of an epoch -> the sum it comes from: losses, as means over images, and kinds of patches, as shares of them.
LOSSES = {"loss": "loss", "ce": "ce", "ood_loss": "ood", "norm_loss": "norm", "outlier_loss": "outlier"}
PATCHES = {"id_patches": "n_id", "ood_patches": "n_ood", "ignored_patches": "n_ignored"}
NAMES = (*LOSSES.values(), "correct", *PATCHES.values(), "n_invalid", "images")


class Meters:
    """Sums of `NAMES`, in double precision.

    Args:
        device: of what is added.
        sums: to go on from; those that are missing are 0.
    """

    def __init__(self, device: torch.device, sums: Mapping[str, float]):
        self._sums = torch.tensor([sums.get(name, 0.0) for name in NAMES], dtype=torch.float64, device=device)

    def add(self, log: Mapping[str, Tensor], n: int) -> None:
        """A step over n images: losses are means over them, the rest counts; what is missing is 0."""
        zero = self._sums.new_zeros(())
        row = torch.stack([log.get(name, zero).detach().to(torch.float64) for name in NAMES[:-1]])
        row[: len(LOSSES)] *= n
        self._sums[:-1] += row
        self._sums[-1] += n

    def read(self) -> dict[str, float]:
        """The sums by name; waits for the device."""
        return dict(zip(NAMES, self._sums.tolist(), strict=True))


def epoch_figures(meters: dict[str, float]) -> dict[str, float]:
    """Means over the images of an epoch, and the shares of ID, OOD and ignored patches."""
    images = max(meters.get("images", 0.0), 1.0)
    patches = max(sum(meters.get(name, 0.0) for name in PATCHES.values()), 1.0)
    means = {figure: meters.get(name, 0.0) / images for figure, name in LOSSES.items()}
    means["accuracy"] = meters.get("correct", 0.0) / images
    shares = {figure: meters.get(name, 0.0) / patches for figure, name in PATCHES.items()}
    return {**means, **shares, "invalid_patches": meters.get("n_invalid", 0.0)}
