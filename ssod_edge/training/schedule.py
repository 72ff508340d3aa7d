"""What moves the weights, and how fast."""

from __future__ import annotations

import math

import torch
from torch import nn

from ssod_edge.config import FEWEST_AUTO_EPOCHS, TrainConfig

#: Steps that `--epochs auto` aims at, and the most epochs that it takes for them.
AUTO_STEPS, MOST_AUTO_EPOCHS = 1_000, 40


def auto_epochs(steps_per_epoch: int) -> tuple[int, int]:
    """(most epochs, epochs without a gain that end training before) of `--epochs auto`.

    The first make `AUTO_STEPS`, within bounds; the second are a quarter of them.
    """
    most = min(max(math.ceil(AUTO_STEPS / steps_per_epoch), FEWEST_AUTO_EPOCHS), MOST_AUTO_EPOCHS)
    return most, math.ceil(most / 4)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Rate of an optimizer step: "paper" halves it every 30 epochs; the others warm up, then a cosine to 1%."""
    if config.recipe == "paper":
        return config.lr * 0.5 ** (step // (30 * steps_per_epoch))
    total = config.epochs * steps_per_epoch
    warmup = max(1, round(config.lr_warmup_fraction * total))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or, from scratch, SGD; biases and normalisation parameters are not decayed."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.recipe == "scratch":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.lr)
