"""Sums over an epoch, kept on the device: reading one would wait for it, in every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Losses, as means over the images of an epoch, and counts.
LOSSES = ("loss", "ce", "ood", "norm", "outlier")
NAMES = (*LOSSES, "correct", "n_id", "n_ood", "n_ignored", "n_invalid", "images")


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
    patches = max(sum(meters.get(name, 0.0) for name in ("n_id", "n_ood", "n_ignored")), 1.0)
    return {
        "loss": meters.get("loss", 0.0) / images,
        "ce": meters.get("ce", 0.0) / images,
        "ood_loss": meters.get("ood", 0.0) / images,
        "norm_loss": meters.get("norm", 0.0) / images,
        "outlier_loss": meters.get("outlier", 0.0) / images,
        "accuracy": meters.get("correct", 0.0) / images,
        "id_patches": meters.get("n_id", 0.0) / patches,
        "ood_patches": meters.get("n_ood", 0.0) / patches,
        "ignored_patches": meters.get("n_ignored", 0.0) / patches,
        "invalid_patches": meters.get("n_invalid", 0.0),
    }
