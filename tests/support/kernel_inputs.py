"""Shapes, layouts and values for the tests of the sampling kernel, on the CPU and on CUDA."""

from __future__ import annotations

import itertools
import random

import torch
import torch.nn.functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATCHES = (0, 1, 7, 49, 259, 12_544)
DEPTHS = (1, 3, 64, 129, 784, 1280, 2048)
CLASSES = (1, 2, 10, 15, 16, 31, 32, 1000, 1025, 21_841)
LAYOUTS = ("rows", "slice", "nchw", "channels_last", "map slice")


def combinations():
    """A few rows (p, d, m, dtype, layout) in which every pair of values occurs, without the largest (fp64 is slow)."""

    def pairs(row):
        return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}

    values = (PATCHES, DEPTHS, CLASSES, tuple(DTYPES), LAYOUTS)
    draw, chosen = random.Random(0), []
    left = {(i, a, j, b) for i, j in itertools.combinations(range(5), 2) for a in values[i] for b in values[j]}
    while left:
        i, a, j, b = min(left, key=str)
        rows = [[draw.choice(v) for v in values] for _ in range(30)]
        for row in rows:
            row[i], row[j] = a, b
        best = max(rows, key=lambda row: len(pairs(row) & left))
        left -= pairs(best)
        chosen.append(tuple(best))
    return [row for row in chosen if row[0] * row[1] * row[2] < 3e9]


ROWS = combinations()


def features(p, d, dtype, layout, generator):
    """Patch features in a layout, and the same values as rows [P, D]."""
    if layout in ("rows", "slice"):
        wide = torch.randn(p, d + 5, generator=generator).to(dtype)
        z = wide[:, 3 : 3 + d] if layout == "slice" else wide[:, :d].contiguous()
        return z, z
    side = 7 if p % 49 == 0 else 1
    whole = torch.randn(p // side**2, d + 2, side + 1, side, generator=generator).to(dtype)
    maps = whole[:, 1 : 1 + d, 1:] if layout == "map slice" else whole[:, :d, 1:].contiguous()
    if layout == "channels_last":
        maps = maps.contiguous(memory_format=torch.channels_last)
    z = maps.permute(0, 2, 3, 1)
    return z, z.reshape(-1, d)


def exact(z, weight, bias, target):
    """Confidence in fp64, a few rows at a time."""
    parts = [
        F.linear(rows.double(), weight.double(), bias.double()).softmax(1).gather(1, t.clamp(min=0)[:, None])[:, 0]
        for rows, t in zip(z.split(512), target.split(512), strict=True)
    ]
    return torch.where(target >= 0, torch.cat(parts) if parts else z.new_zeros(0), torch.nan).double()


def mixed(dtype, p=300, d=200, m=40):
    g = torch.Generator().manual_seed(0)
    z, weight = torch.randn(p, d, generator=g), 6 / d**0.5 * torch.randn(m, d, generator=g)
    target = torch.randint(0, m, (p,), generator=g)
    target[::2] = (z @ weight.T).argmax(1)[::2]
    return z.to(dtype), weight, torch.randn(m, generator=g), torch.randn(d, generator=g), torch.zeros(()), target
